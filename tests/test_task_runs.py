"""Runs on the tasks that are not Depo: trained, scored, scored again by ``src/evaluate.py``, and on two processes."""

import pytest

from src.config import ConfigError
from src.evaluate import evaluate
from tests.runs import command, compose_run, evaluation, main, results, tiny_run

SMALL = ["data.window=48", "data.batch_size=4", "data.eval_batch_size=4", "data.val_windows=6", "data.test_windows=6"]
ANSWERS = ["data.val_answers=6", "data.test_answers=10"]
TASKS = {
    "brevo1": ["data=brevo1", "data.task.N=5", "data.task.compact_ids=true", *ANSWERS],
    "brevo2": ["data=brevo2", "data.task.N=4", "data.task.compact_ids=true", "data.window=96", *ANSWERS],
    "mano": ["data=mano", "data.task.L=3", "data.task.compact_ids=true", "data.task.test_lengths=all"],
    "lano": ["data=lano", "data.task.levels=2", *ANSWERS],
    "capo": ["data=capo", "data.task.num_people=30", "data.window=128"],
    "copy": ["data=copy", "data.task.N=20"],
    "mqar": ["data=mqar", "data.task.num_pairs=4", "data.task.length=48", "data.task.vocabulary=64"],
}
MEASURED = {
    "brevo1": {"accuracy", "accuracy/depth1", "official"},
    "brevo2": {"accuracy", "accuracy/depth1", "official"},
    "mano": {"accuracy", "accuracy/length1", "accuracy/length3"},
    "lano": {"accuracy", "accuracy/valid", "kl", "leaked", "entropy"},
    "capo": {"accuracy", "accuracy/birthday", "bits_per_person", "bits_per_parameter", "bits_per_parameter_ceiling"},
    "copy": {"accuracy", "sequence"},
    "mqar": {"accuracy"},
}


def options(name):
    return [*TASKS[name][:1], *SMALL, *TASKS[name][1:], "canon.positions=ABCD"]


@pytest.mark.parametrize("name", TASKS)
def test_every_task_trains_and_is_scored_the_same_twice(name, tmp_path, capsys):
    metrics = tiny_run(tmp_path, *options(name))
    written = results(tmp_path)
    assert {f"test/{metric}" for metric in MEASURED[name]} <= metrics.keys()
    for metric, interval in written["intervals"].items():
        assert interval["low"] <= metrics[metric] <= interval["high"]
        assert metrics[metric] == pytest.approx(interval["right"] / interval["total"])
    assert written["intervals"]["test/accuracy"]["total"] > 5
    assert written["chance"]["accuracy"] >= 0
    again = tmp_path / "again"
    again.mkdir()
    evaluate(compose_run(again, f"ckpt_path={tmp_path}", f"paths.output_dir={again}", config_name="evaluate"))
    found = evaluation(again)
    for key in ("intervals", "metrics"):
        assert found[key] == {k: v for k, v in written[key].items() if k.startswith("test/")}
    assert "95% interval" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_write_the_answers_that_one_writes(tmp_path):
    one = tiny_run(
        tmp_path / "one", *options("brevo1"), "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=4"
    )
    command(
        "train",
        *(option for option in options("brevo1")),
        *["model.dim=16", "model.feedforward.hidden_dim=16", "trainer=ddp", "trainer.max_steps=4"],
        *["trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true", "trainer.val_check_interval=2"],
        *["scheduler.warmup_steps=1", f"hydra.run.dir={tmp_path / 'two'}"],
    )
    two = results(tmp_path / "two")
    assert two["intervals"] == results(tmp_path / "one")["intervals"]
    assert two["metrics"]["test/accuracy"] == one["test/accuracy"]


def test_a_single_run_ends_in_a_table(tmp_path, capsys):
    from src.train import train

    main(
        train,
        "train",
        *options("mano"),
        "trainer=cpu",
        "model.dim=16",
        "trainer.max_steps=2",
        f"hydra.run.dir={tmp_path}",
    )
    out = capsys.readouterr().out
    assert "chance" in out
    assert "accuracy/length3" in out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=brevo1", "data.window=100"], "data.window=100: examples of brevo need"),
        (["data=brevo1", "data.val_answers=0"], "data.val_answers=0: at least 1"),
        (["data=mano", "data.val_windows=null"], "data.val_windows: mano never ends"),
        (["data=lano", "data.task.grammar=cfg3z"], "cfg3z"),
        (["data=capo", "data.task.num_people=0"], "Capo.num_people=0"),
        (["data=mano", "data.task.loss=some"], "loss"),
    ],
)
def test_mistakes_in_a_task_end_in_one_clear_message(overrides, message, tmp_path, capsys):
    from src.train import train

    with pytest.raises(SystemExit):
        main(train, "train", *overrides, "trainer=cpu", f"hydra.run.dir={tmp_path}")
    assert message in capsys.readouterr().err


def test_whole_numbers_may_be_written_as_floats(tmp_path):
    metrics = tiny_run(tmp_path, *options("mano"), "data.task.L=3.0", "data.window=48.0", "trainer.max_steps=2e0")
    assert "test/accuracy/length3" in metrics
    assert results(tmp_path)["data"]["L"] == 3


def test_a_checkpoint_is_not_scored_on_tokens_of_another_meaning(tmp_path):
    tiny_run(tmp_path, *options("brevo1"), "trainer.max_steps=1")
    again = [f"ckpt_path={tmp_path}", f"paths.output_dir={tmp_path}", "data=brevo1", *SMALL, *ANSWERS]
    other = compose_run(tmp_path, *again, "data.task.N=4", "data.task.compact_ids=true", config_name="evaluate")
    with pytest.raises(ConfigError, match=r"token ids .* mean something else here \(query: 6 and 5"):
        evaluate(other)
    same = compose_run(
        tmp_path,
        *again,
        "data.task.N=5",
        "data.task.compact_ids=true",
        "data.task.query=last_quarter",
        config_name="evaluate",
    )
    assert evaluate(same)["test/loss"] > 0


def test_evaluate_says_that_data_must_be_chosen_before_it_is_changed(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(evaluate, "evaluate", f"ckpt_path={tmp_path}", "data.task.N=8")
    assert "data is not chosen here; choose it first, data=..." in capsys.readouterr().err
