"""One folder, one computation: results belong to the configuration, data and weights that they say."""

import json
import logging
import os
import shutil
import signal
from pathlib import Path

import lightning as L
import pytest

from src.callbacks.preemption import Preempted
from src.checkpoints import load_model, read_checkpoint
from src.checkpoints.files import find_checkpoint
from src.config import ConfigError, experiment_hash, to_plain
from src.evaluate import evaluate
from src.modules.language_model import LanguageModel
from src.train import train as train_command
from src.training.run import build_trainer
from tests.runs import TINY, compose_run, curve, evaluation, final, main, results, same, tiny_run

CORPUS = ["data=text_files", "data.tokenizer=bytes", "data.window=64", "data.batch_size=4", "data.eval_batch_size=4"]
CORPUS += ["data.val_windows=6", "data.test_windows=6"]
EVERY = ["callbacks.checkpoint.every_n_train_steps=1"]
EARLY = "+callbacks.early={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss, patience: 1, min_delta: 9}"


def texts(folder: Path, word: str) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(40):
        (folder / f"{i}.txt").write_text(" ".join(f"{word}{(i * 7 + j) % 50}" for j in range(100)))
    return folder


# ---- W1: validation and test are of the same weights ----------------------------------------------------------------


def test_the_last_step_is_validated(tmp_path):
    """Also where no validation fell due in the whole run."""
    for name, every in (("never", 100), ("before", 3)):
        metrics = tiny_run(tmp_path / name, "trainer.max_steps=5", f"trainer.val_check_interval={every}")
        assert metrics["val/loss"] == curve(tmp_path / name, "val/loss")[-1]
        main(evaluate, "evaluate", f"ckpt_path={tmp_path / name}", "split=val", f"hydra.run.dir={tmp_path / name}")
        assert evaluation(tmp_path / name)["metrics"]["val/loss"] == metrics["val/loss"]


# ---- W2: whose run is it --------------------------------------------------------------------------------------------


FINISHED = ["canon.positions=A", *EVERY]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    tiny_run(folder, *FINISHED)
    return folder


@pytest.mark.parametrize(
    "override",
    [
        *("seed=7", "trainer.gradient_clip_val=0.5", "trainer.precision=bf16-mixed", "canon.init=zeros"),
        *("model.initialization.scheme=normal", "optimizer.lr=0.5", "scheduler.warmup_steps=2", "loss.z_loss=0.1"),
        *("data.seed=7", "model.feedforward.activation=relu", "canon.kernel_size=3", "data.batch_size=8", EARLY),
    ],
)
def test_another_computation_does_not_take_over_a_folder(finished, tmp_path, override):
    """Neither of a run that has finished, nor of one that was stopped on its way."""
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    key = "EarlyStopping" if override == EARLY else override.partition("=")[0].rpartition(".")[2]
    before = {path: path.read_bytes() for path in run.rglob("*.json") if path.name != "run.json"}
    for stopped in (False, True):
        if stopped:
            for name in ("final.ckpt", "step00000004.ckpt"):
                (run / "checkpoints" / name).unlink()
        with pytest.raises(ConfigError, match=key):
            tiny_run(run, *FINISHED, override, "ckpt_path=auto")
        assert {path: path.read_bytes() for path in before} == before


def test_what_may_differ_is_said(tmp_path, caplog):
    tiny_run(tmp_path, "trainer.max_steps=2")
    caplog.set_level(logging.WARNING)
    tiny_run(tmp_path, "trainer.max_steps=4", "trainer.accumulate_grad_batches=2", "ckpt_path=auto")
    assert "trainer.accumulate_grad_batches: 1 there, 2 here" in caplog.text
    assert "trainer.max_steps: 2 there, 4 here" in caplog.text
    assert results(tmp_path)["steps"] == 4
    (kept,) = tmp_path.glob("results-*.json")
    assert json.loads(kept.read_text())["steps"] == 2  # of the shorter run


# ---- W3: on which data ----------------------------------------------------------------------------------------------


def test_results_on_files_that_were_replaced_do_not_stand(tmp_path):
    options = [*CORPUS, f"data.path={texts(tmp_path / 'texts', 'one')}", f"data.cache_dir={tmp_path / 'cache'}"]
    options += [option for option in TINY if not option.startswith("data")]
    run = tmp_path / "run"
    tiny = compose_run(run, *options, "ckpt_path=auto")
    from src.training.run import run as run_here

    first = run_here(tiny)
    assert run_here(compose_run(run, *options, "ckpt_path=auto")) == first
    written = (run / "results.json").read_bytes()
    texts(tmp_path / "texts", "two")
    with pytest.raises(ConfigError, match=r"finished before, on other data.*fingerprint"):
        run_here(compose_run(run, *options, "ckpt_path=auto"))
    assert (run / "results.json").read_bytes() == written


def test_a_grammar_or_tokenizer_file_that_was_replaced(tmp_path):
    path = tmp_path / "own.json"
    shipped = Path("src/datamodules/tasks/grammars/cfg3b.json")
    content = json.loads(shipped.read_text())
    path.write_text(json.dumps(content))
    options = ["data=lano", f"data.task.grammar={path}", "data.task.levels=null", "data.val_answers=1"]
    options += [
        "data.test_answers=1",
        "data.window=256",
        *(o for o in TINY if not o.startswith(("data=", "data.window"))),
    ]
    from src.training.run import run as run_here

    run = tmp_path / "run"
    run_here(compose_run(run, *options, "ckpt_path=auto"))
    content["layers"][0]["22"] = "20 21 | 20 19"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"finished before, on other data.*rules"):
        run_here(compose_run(run, *options, "ckpt_path=auto"))


def test_a_sweep_runs_again_what_ran_on_files_that_were_replaced(tmp_path):
    """The old run is kept beside the new one."""
    from src.sweeps.jobs import is_finished, start_of
    from src.sweeps.plan import job_of

    tiny = [option for option in TINY if not option.startswith("data")]
    options = [*CORPUS, f"data.path={texts(tmp_path / 'texts', 'one')}", f"data.cache_dir={tmp_path / 'cache'}", *tiny]
    root = tmp_path / "jobs"

    def run_it() -> None:
        job = job_of("text", "tiny", {}, [*options, "compare=null"])
        start = start_of(job, root)
        main(train_command, "train", *start.command[2:])
        assert is_finished(job, root)

    run_it()
    job = job_of("text", "tiny", {}, [*options, "compare=null"])
    before = (job.folder(root) / "results.json").read_bytes()
    texts(tmp_path / "texts", "two")
    assert not is_finished(job, root)
    run_it()
    assert (job.folder(root) / "other_data.1" / "results.json").read_bytes() == before
    assert json.loads((job.folder(root) / "results.json").read_text())["data"] != json.loads(before)["data"]


# ---- W4: the hash knows what changes numbers ------------------------------------------------------------------------

EMA = "+callbacks.ema={_target_: lightning.pytorch.callbacks.EMAWeightAveraging}"
TIMER = "+callbacks.timer={_target_: lightning.pytorch.callbacks.Timer, duration: 00:00:01:00}"
HALF = "trainer.plugins=[{_target_: lightning.pytorch.plugins.HalfPrecision, precision: bf16-true}]"
LR = "+callbacks.lr={_target_: lightning.pytorch.callbacks.LearningRateMonitor}"


def test_the_hash_covers_what_changes_numbers_and_nothing_else(tmp_path):
    def hashed(*overrides: str) -> str:
        return experiment_hash(to_plain(compose_run(tmp_path, *TINY, *overrides)))

    plain = hashed()
    changing = [EARLY, EMA, TIMER, HALF, "callbacks.guard.nonfinite=skip", "callbacks.guard.spike=rollback"]
    changing += ["seed=1", "trainer.gradient_clip_val=2", "+trainer.max_time=00:00:01:00", "compile=true"]
    watching = [LR, "callbacks.guard.spike=stop", "callbacks.guard.window=64", "~callbacks.guard", "callbacks=quiet"]
    watching += ["callbacks=best", "trainer.plugins.0.asynchronous=true", "callbacks.preemption.max_minutes=5"]
    watching += ["trainer.log_every_n_steps=3"]
    assert all(hashed(override) == plain for override in watching)
    # Of training a callback knows what is logged, when it is logged.
    by_training = EARLY.replace("val/loss", "train/loss")
    assert hashed(by_training) != hashed(by_training, "trainer.log_every_n_steps=3")
    assert len({plain, *(hashed(override) for override in changing)}) == 1 + len(changing)


# ---- W5: how training ended -----------------------------------------------------------------------------------------

ENDS = {
    "early stopping": ([EARLY], "EarlyStopping"),
    "time": (["+trainer.max_time={seconds: 0}"], "max_time"),
    "epochs": (["+trainer.max_epochs=2", "+trainer.limit_train_batches=2"], "max_epochs"),
}


@pytest.mark.parametrize("end", ENDS)
def test_an_end_before_the_last_planned_step_is_recorded(tmp_path, caplog, monkeypatch, end):
    """And the restart of a run that was killed in its test does what the straight run does: it tests."""
    overrides, why = ENDS[end]
    options = ["trainer.max_steps=30", "trainer.val_check_interval=2", *overrides, *EVERY]
    metrics = tiny_run(tmp_path / "straight", *options)
    ended = results(tmp_path / "straight")["ended"]
    assert ended["step"] < ended["planned"] == 30
    assert why in ended["why"]
    assert f"training ended after step {ended['step']} of 30" in caplog.text
    assert results(tmp_path / "straight")["steps"] == ended["step"]
    # The same command again: it is done.
    assert tiny_run(tmp_path / "straight", *options, "ckpt_path=auto") == metrics
    if end == "time":
        return  # another run does not end after the same step
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "test_step", lambda self, batch, batch_idx: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiny_run(tmp_path / "killed", *options)
    assert tiny_run(tmp_path / "killed", *options, "ckpt_path=auto") == metrics
    assert results(tmp_path / "killed")["ended"] == ended
    assert len(curve(tmp_path / "killed", "train/loss")) == ended["step"]


def kill_at_the_final_checkpoint(monkeypatch: pytest.MonkeyPatch, run: Path, *options: str) -> None:
    save = L.Trainer.save_checkpoint

    def dies(self: L.Trainer, path: Path, *more: object) -> None:
        if Path(path).name == "final.ckpt":
            raise ZeroDivisionError
        save(self, path, *more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(L.Trainer, "save_checkpoint", dies)
        with pytest.raises(ZeroDivisionError):
            tiny_run(run, *options)


def test_killed_after_a_callback_has_stopped_it_and_before_that_is_kept(tmp_path, monkeypatch):
    """The checkpoint of the step was written before the validation that ended training."""
    options = ["trainer.max_steps=30", "trainer.val_check_interval=2", EARLY, *EVERY]
    metrics = tiny_run(tmp_path / "straight", *options)
    kill_at_the_final_checkpoint(monkeypatch, tmp_path / "killed", *options)
    assert tiny_run(tmp_path / "killed", *options, "ckpt_path=auto") == metrics
    assert results(tmp_path / "killed")["ended"] == results(tmp_path / "straight")["ended"]


def test_more_time_trains_further(tmp_path):
    tiny_run(tmp_path, "trainer.max_steps=8", "+trainer.max_time={seconds: 0}")
    assert results(tmp_path)["steps"] < 8
    tiny_run(tmp_path, "trainer.max_steps=8", "+trainer.max_time={minutes: 9}", "ckpt_path=auto")
    assert results(tmp_path)["steps"] == 8
    assert results(tmp_path)["ended"] == {"step": 8, "planned": 8, "why": "as planned"}


# ---- W6: a finished run given more steps ----------------------------------------------------------------------------


def test_a_finished_run_given_more_steps_is_the_longer_run(tmp_path, monkeypatch):
    """Its weights, results and curve are those of the longer one, also if that one is stopped on the way."""
    constant = ["scheduler=constant", "scheduler.warmup_steps=1", *EVERY]
    longer = tiny_run(tmp_path / "straight", *constant, "trainer.max_steps=8")
    run = tmp_path / "run"
    tiny_run(run, *constant, "trainer.max_steps=4")
    stop = [False]

    def stops(self, *_: object) -> None:
        if self.trainer.global_step == 5 and not stop[0]:
            stop[0] = True
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(LanguageModel, "on_train_batch_end", stops)
    with pytest.raises(Preempted):
        tiny_run(run, *constant, "trainer.max_steps=8", "ckpt_path=auto")
    assert find_checkpoint(run).name == "step00000006.ckpt"
    assert read_checkpoint(run)["global_step"] == 6
    assert tiny_run(run, *constant, "trainer.max_steps=8", "ckpt_path=auto") == longer
    assert same(final(run)["state_dict"], final(tmp_path / "straight")["state_dict"])
    assert same(dict(load_model(run).state_dict()), dict(load_model(tmp_path / "straight").state_dict()))
    assert curve(run, "train/loss") == curve(tmp_path / "straight", "train/loss")
    steps = [int(step) for step in curve(run, "step")]
    assert sorted(set(steps)) == list(range(8))


# ---- found by a sceptic: validation of another step or setting, half steps, other limits ------------------------------


@pytest.mark.parametrize("logger", [[], ["~logger"]])
def test_the_last_validation_is_of_the_last_step_after_a_kill_too(tmp_path, monkeypatch, logger):
    options = [
        "trainer.max_steps=6",
        "trainer.val_check_interval=2",
        "callbacks.checkpoint.every_n_train_steps=2",
        *logger,
    ]
    expected = tiny_run(tmp_path / "straight", *options)
    kill_at_the_final_checkpoint(monkeypatch, tmp_path / "killed", *options)
    assert tiny_run(tmp_path / "killed", *options, "ckpt_path=auto") == expected


def test_training_ends_after_whole_steps(tmp_path, monkeypatch):
    """Time that is over within a step of several batches: the rest of the step is done, and what follows is the straight run."""
    options = ["trainer.max_steps=6", "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=3", *EVERY]
    expected = tiny_run(tmp_path / "straight", *options)
    run = tmp_path / "run"

    class Ends(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            trainer.should_stop = trainer.should_stop or trainer.fit_loop.epoch_loop.total_batch_idx == 4

    with monkeypatch.context() as patch:
        patch.setattr(
            "src.training.run.build_trainer", lambda plain, build=build_trainer: with_callback(build(plain), Ends())
        )
        tiny_run(run, *options, "+trainer.max_time=00:01:00:00")
    assert results(run)["steps"] == 3
    found = tiny_run(run, *options, "+trainer.max_time=00:02:00:00", "ckpt_path=auto")
    assert found == expected
    assert curve(run, "train/loss") == curve(tmp_path / "straight", "train/loss")


def with_callback(trainer: L.Trainer, callback: L.Callback) -> L.Trainer:
    trainer.callbacks.append(callback)  # type: ignore[attr-defined]
    return trainer


def test_epochs_that_end_are_validated_and_cannot_be_added_to(tmp_path):
    options = ["trainer.max_steps=30", "trainer.val_check_interval=4", "+trainer.limit_train_batches=6"]
    tiny_run(tmp_path, *options, "+trainer.max_epochs=1")
    assert results(tmp_path)["steps"] == 6
    main(evaluate, "evaluate", f"ckpt_path={tmp_path}", "split=val", f"hydra.run.dir={tmp_path}")
    assert evaluation(tmp_path)["metrics"]["val/loss"] == results(tmp_path)["metrics"]["val/loss"]
    with pytest.raises(ConfigError, match="trainer.max_epochs: 1 there, 2 here"):
        tiny_run(tmp_path, *options, "+trainer.max_epochs=2", "ckpt_path=auto")
    with pytest.raises(ConfigError, match="a multiple of trainer.accumulate_grad_batches=4"):
        tiny_run(tmp_path / "other", *options, "trainer.accumulate_grad_batches=4")


def test_other_evaluation_settings_are_those_of_both_scores(tmp_path):
    wider = ["data.val_windows=20", "data.test_windows=20"]
    expected = tiny_run(tmp_path / "straight", *wider)
    tiny_run(tmp_path / "run")
    assert tiny_run(tmp_path / "run", *wider, "ckpt_path=auto") == expected
    longer = tiny_run(tmp_path / "run", *wider, "trainer.max_steps=6", "+trainer.limit_val_batches=0", "ckpt_path=auto")
    assert not any(name.startswith("val/") for name in longer)  # none is of these weights
    assert results(tmp_path / "run")["continued"] == [{"step": 4, "planned": 4, "schedule": 4}]


def test_a_guard_that_has_left_out_updates_is_not_relabelled(tmp_path):
    guard = ["callbacks.guard.spike=skip", "callbacks.guard.spike_deviations=0.01", "callbacks.guard.window=32"]
    options = ["trainer.max_steps=50", "optimizer.lr=0.3", "trainer.val_check_interval=50", "callbacks.guard.limit=50"]
    tiny_run(tmp_path, *options, *guard)
    with pytest.raises(ConfigError, match="callbacks.guard"):
        tiny_run(tmp_path, *options, "ckpt_path=auto")


def test_a_start_that_is_refused_leaves_a_finished_run_finished(tmp_path):
    tiny_run(tmp_path)
    before = (tmp_path / "run.json").read_bytes()
    for override in ("seed=7", "trainer.max_steps=3"):
        with pytest.raises(ConfigError):
            tiny_run(tmp_path, override, "ckpt_path=auto")
        assert (tmp_path / "run.json").read_bytes() == before


def test_testing_alone_says_what_the_weights_were_trained_with(tmp_path):
    tiny_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="optimizer.lr"):
        tiny_run(tmp_path / "test", "train=false", f"ckpt_path={tmp_path / 'run'}", "optimizer.lr=0.5")


# ---- L1: evaluations are files of their own -------------------------------------------------------------------------


def test_an_evaluation_leaves_the_record_of_the_run_alone(tmp_path):
    run = tmp_path / "run"
    tiny_run(run)
    before = {path: path.read_bytes() for path in run.glob("*.json")} | {
        path: path.read_bytes() for path in (run / "csv").iterdir()
    }
    for split in ("val", "test"):
        main(evaluate, "evaluate", f"ckpt_path={run}", f"split={split}", f"hydra.run.dir={run}")
    assert len(list(run.glob("evaluation_*.json"))) == 2
    with pytest.raises(ConfigError, match=r"train=false.*record of a run.*evaluate\.py"):
        tiny_run(run, "train=false", f"ckpt_path={run}")
    assert {path: path.read_bytes() for path in before} == before
