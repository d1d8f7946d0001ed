"""What a whole run promises: resumes bit for bit, evaluates to the same numbers, says what went wrong."""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from src.build import model_from_config
from src.checkpoints import CheckpointError, load_model, read_checkpoint
from src.components.kernels.causal_conv import causal_conv
from src.config import ConfigError
from src.config.mistakes import first_misspelt_key
from src.modules.schedules import Cosine
from src.train import train
from tests.runs import TINY, command, curve, evaluation, final, main, results, same, tiny_run

CANON = "canon.positions=ABCD"


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    causal_conv(torch.zeros(1, 2, 3), torch.zeros(3, 4), backend="torch")  # of no concern to the run
    folder = tmp_path_factory.mktemp("straight")
    metrics = tiny_run(folder, CANON, "trainer.max_steps=6", "callbacks.checkpoint.every_n_train_steps=3")
    return folder, metrics


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop", [2, 3])
def test_resuming_equals_the_straight_run_bit_for_bit(tmp_path, accumulate, stop):
    """``stop=2`` is a validation step, 3 is not."""
    options = [CANON, "trainer.max_steps=6", f"trainer.accumulate_grad_batches={accumulate}"]
    options += [f"trainer.val_check_interval={2 * accumulate}", f"callbacks.checkpoint.every_n_train_steps={stop}"]
    options += ["callbacks.checkpoint.save_top_k=-1"]
    expected = tiny_run(tmp_path / "straight", *options)
    checkpoint = tmp_path / "straight" / "checkpoints" / f"step{stop:08d}.ckpt"
    found = tiny_run(tmp_path / "resumed", *options, f"ckpt_path={checkpoint}")
    assert found == expected
    a, b = final(tmp_path / "straight"), final(tmp_path / "resumed")
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert same(a[part], b[part]), part
    full = curve(tmp_path / "straight", "train/loss")
    assert curve(tmp_path / "resumed", "train/loss") == full[stop:]
    assert len(full) == 6


def test_a_run_depends_on_its_seeds_and_on_nothing_else(tmp_path, straight):
    folder, metrics = straight
    torch.manual_seed(99)
    again = tiny_run(tmp_path, CANON, "trainer.max_steps=6", "data.num_workers=1")
    assert again == metrics
    assert same(final(folder)["state_dict"], final(tmp_path)["state_dict"])


def test_accumulation_does_not_change_the_loss(tmp_path, straight):
    tiny_run(
        tmp_path, CANON, "trainer.max_steps=6", "trainer.accumulate_grad_batches=4", "trainer.val_check_interval=8"
    )
    assert curve(tmp_path, "train/loss") == pytest.approx(curve(straight[0], "train/loss"), abs=1e-5)


def test_checkpoints_hold_plain_data_only(straight):
    checkpoint = final(straight[0])  # weights_only=True refuses anything else
    assert checkpoint["config"]["canon"]["positions"] == "ABCD"
    assert checkpoint["config"]["model"]["vocab_size"] == 21
    assert checkpoint["global_step"] == 6


def test_load_model_opens_file_and_folder(straight):
    folder, _ = straight
    net = load_model(folder)
    assert not net.training
    ids = torch.randint(21, (2, 9))
    assert torch.equal(net(ids), load_model(folder / "checkpoints" / "last.ckpt")(ids))
    assert same(dict(net.state_dict()), {k.removeprefix("net."): v for k, v in final(folder)["state_dict"].items()})


def test_evaluate_reproduces_the_test_metrics_exactly(tmp_path, straight):
    folder, metrics = straight
    command(
        "evaluate", f"ckpt_path={folder}", f"hydra.run.dir={tmp_path}", OMP_NUM_THREADS=str(torch.get_num_threads())
    )
    test_metrics = {name: value for name, value in metrics.items() if name.startswith("test/")}
    assert evaluation(tmp_path)["metrics"] == test_metrics
    assert results(folder)["metrics"] == metrics


def test_testing_alone_gives_the_same_metrics(tmp_path, straight):
    folder, metrics = straight
    found = tiny_run(tmp_path, CANON, "train=false", f"ckpt_path={folder}/checkpoints/final.ckpt")
    assert {k: v for k, v in found.items() if k.startswith("test/")} == {
        k: v for k, v in metrics.items() if k.startswith("test/")
    }


def test_results_say_what_was_run(straight):
    found = results(straight[0])
    assert found["parameters"] == sum(p.numel() for p in load_model(straight[0]).parameters())
    assert found["backends"]["causal_conv"] == ["cpu"]
    assert found["data"]["task"] == "depo"
    assert found["steps"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_give_the_loss_curve_of_one(tmp_path, strategy):
    options = [*TINY, CANON, "trainer.max_steps=5", "trainer.devices=2", f"hydra.run.dir={tmp_path / 'two'}"]
    options = [f"trainer={strategy}" if o == "trainer=cpu" else o for o in options]
    command("train", *options, "trainer.accelerator=cpu")
    tiny_run(tmp_path / "one", CANON, "trainer.max_steps=5")
    for column in ("train/loss", "val/loss", "train/grad_norm"):
        assert curve(tmp_path / "two", column) == pytest.approx(curve(tmp_path / "one", column), abs=1e-5)
    a, b = results(tmp_path / "one")["metrics"], results(tmp_path / "two")["metrics"]
    assert a == pytest.approx(b, abs=1e-5)
    ids = torch.randint(21, (2, 9))
    torch.testing.assert_close(
        load_model(tmp_path / "one")(ids), load_model(tmp_path / "two")(ids), atol=1e-4, rtol=1e-4
    )
    if strategy == "ddp":
        # The same numbers added in the same order: two ranks are two accumulated micro-batches, bit for bit.
        tiny_run(tmp_path / "cut", CANON, "trainer.max_steps=5", "trainer.accumulate_grad_batches=2")
        assert curve(tmp_path / "cut", "train/loss") == curve(tmp_path / "two", "train/loss")
        assert same(final(tmp_path / "cut")["state_dict"], final(tmp_path / "two")["state_dict"])


@pytest.mark.slow
def test_quickstart_command_compares_two_models(tmp_path):
    """The command itself, on the smallest scale, on two processes."""
    short = [o for o in TINY if not o.startswith(("data=", "trainer="))]
    done = command(
        "train",
        "experiment=quickstart",
        "trainer=ddp",
        "trainer.devices=2",
        "trainer.accelerator=cpu",
        *short,
        f"hydra.run.dir={tmp_path}",
    )
    assert done.stdout.count("test set") == 1
    assert "accuracy/hop1" in done.stdout
    assert "0.198" in done.stdout  # chance
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    for name in ("without-canon", "canon-abcd"):
        assert results(tmp_path / name)["steps"] == 4


def test_a_comparison_that_was_stopped_goes_on(tmp_path, capsys):
    short = [o for o in TINY if not o.startswith(("data=", "trainer="))]
    arguments = ["experiment=quickstart", "trainer=cpu", *short, f"hydra.run.dir={tmp_path}"]
    main(train, "train", *arguments)
    expected = [results(tmp_path / name)["metrics"] for name in ("without-canon", "canon-abcd")]
    for name in ("canon-abcd/results.json", "comparison.png"):
        (tmp_path / name).unlink()
    written = (tmp_path / "without-canon" / "results.json").stat().st_mtime_ns
    capsys.readouterr()
    main(train, "train", *arguments, "ckpt_path=auto")
    assert "test set" in capsys.readouterr().out
    assert (tmp_path / "comparison.png").exists()
    assert [results(tmp_path / name)["metrics"] for name in ("without-canon", "canon-abcd")] == expected
    assert (tmp_path / "without-canon" / "results.json").stat().st_mtime_ns == written
    with pytest.raises(SystemExit):
        main(train, "train", *arguments, f"ckpt_path={tmp_path}")
    assert "a comparison goes on as a whole, with hydra.run.dir=<its folder> ckpt_path=auto" in capsys.readouterr().err


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["experiment=quickstar"], ["experiment=quickstar", "did you mean 'quickstart'"]),
        (["experiment=results/R3"], ["python src/sweep.py sweep=results/R3"]),
        (["canon.positon=A"], ["canon.positon", "did you mean 'positions'"]),
        (["optimzer.lr=1"], ["no key 'optimzer'", "did you mean 'optimizer'"]),
        (["canon.positions=AX"], ["no such point X", "Points: A "]),
        (["canon.kernel_size=four"], ["canon.kernel_size='four'", "valid integer"]),
        (["model.dim=70"], ["num_heads=4 does not divide dim=70"]),
        (["+trainer.max_stepz=3"], ["trainer.max_stepz", "did you mean 'max_steps'"]),
        (["ckpt_path=nowhere.ckpt"], ["ckpt_path=nowhere.ckpt", "no such file"]),
        (["data.task.N=2"], ["Depo.N=2: at least 3"]),
        (["train=false"], ["ckpt_path= must say"]),
        (["data=text_files", "data.path=/nowhere"], ["/nowhere"]),
        (["data=text_files"], ["data.path"]),
        (["trainer.accumulate_grad_batches=3"], ["data.batch_size=128", "3 accumulated"]),
        (["train=maybe"], ["train='maybe'", "true or false"]),
        (["seed=-1"], ["seed=-1"]),
        (["tags=depo"], ["tags='depo'", "a list"]),
        (["+foo=1"], ["foo: no such key"]),
        (["trainer.gradient_clip_val=-1"], ["trainer.gradient_clip_val=-1", "null"]),
        (["trainer.log_every_n_steps=0"], ["trainer.log_every_n_steps=0"]),
        (["trainer.num_nodes=2"], ["+trainer.num_nodes="]),
        (["optimizer.lr=-1"], ["optimizer.lr=-1"]),
        (["optimizer.betas=[1.5,0.9]"], ["optimizer.betas"]),
        (["optimizer.no_decay=['*foo*']"], ["'*foo*' matches no parameter"]),
        (["data.test_windows=0"], ["data.test_windows=0"]),
        (["canon.backend=fast"], ["'fast' does not exist", "auto"]),
        (["model.norm_eps=-1"], ["norm_eps=-1"]),
        (["compare={a:[],A:[]}"], ["would share a folder"]),
        (["-m", "canon.positon=A,B"], ["no key 'positon'", "did you mean 'positions'"]),
        (["trainer.precision=12"], ["trainer.precision=12"]),
        (["data.window=nan"], ["data.window"]),
        (["data.seed=-1"], ["data.seed=-1"]),
        (["data=lano", "data.task.levels=true"], ["data.task.levels=True", "not true or false"]),
        (["data=mano", "data.task.L=2.5"], ["data.task.L=2.5"]),
    ],
    ids=lambda v: v[0] if isinstance(v, list) and "=" in v[0] else "",
)
def test_a_newcomers_mistake_ends_in_one_clear_message(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_status:
        main(train, "train", *arguments, "trainer=cpu", f"hydra.run.dir={tmp_path}")
    assert exit_status.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error:")
    assert "Traceback" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "overrides",
    [
        ["canon.positions=A,AC", "seed=1,2", "hydra.run.dir=here", "model=llama,gpt2"],
        ["experiment=quickstart", "~logger", "+trainer.num_nodes=2", "++data.seed=3", "model.mixers.T.num_heads=2"],
        ["hydra.sweep.dir=there", "model.canon.positions=A", "optimizer.betas=[0.9,0.95]"],
    ],
)
def test_nothing_is_said_of_a_sweep_without_mistakes(overrides):
    assert first_misspelt_key("train", overrides) is None


def test_the_command_itself_ends_so_too(tmp_path):
    done = command("train", "canon.positions=AX", f"hydra.run.dir={tmp_path}", check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no such point X" in done.stderr


def test_help_is_a_page_that_names_every_group():
    done = command("train", "--help")
    for word in ("experiment=quickstart", "canon.positions=", "ckpt_path=", "position: ", "size: ", "-m "):
        assert word in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(tmp_path):
    with pytest.raises(ConfigError, match="no CUDA device here.*trainer=cpu"):
        tiny_run(tmp_path, "trainer=gpu")


def test_checkpoint_of_another_model(tmp_path, straight):
    with pytest.raises(CheckpointError, match="holds another model.*model.canon.positions: 'ABCD' there, '' here"):
        tiny_run(tmp_path, f"ckpt_path={straight[0]}/checkpoints/last.ckpt")


def test_damaged_foreign_and_pickled_checkpoints_are_refused(tmp_path, straight):
    good = straight[0] / "checkpoints" / "final.ckpt"
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(good.read_bytes()[:2000])
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}}, foreign)
    pickled = tmp_path / "pickled.ckpt"
    torch.save({"config": Path(), "state_dict": {}}, pickled)
    for path, message in [
        (damaged, "cannot be opened"),
        (foreign, "not a checkpoint of this project"),
        (pickled, "cannot be opened as plain data"),
    ]:
        with pytest.raises(CheckpointError, match=message) as caught:
            load_model(path)
        assert str(path) in str(caught.value)


def test_a_folder_without_checkpoint_says_what_it_holds(tmp_path, straight):
    shutil.copy(straight[0] / "checkpoints" / "final.ckpt", tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="other.ckpt"):
        read_checkpoint(tmp_path)


def test_targets_outside_the_project_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="os.system.*may not be built here"):
        tiny_run(tmp_path, "optimizer._target_=os.system")


def test_bf16_mixed_precision_trains(tmp_path, straight):
    tiny_run(tmp_path, CANON, "trainer.max_steps=6", "trainer.precision=bf16-mixed")
    assert final(tmp_path)["state_dict"]["net.head.weight"].dtype == torch.float32
    assert curve(tmp_path, "train/loss") == pytest.approx(curve(straight[0], "train/loss"), rel=0.02)


def test_documents_kept_apart_in_training(tmp_path, straight):
    tiny_run(tmp_path, CANON, "trainer.max_steps=6", "data.isolate=true")
    assert curve(tmp_path, "train/loss") != curve(straight[0], "train/loss")


def test_interruption_by_a_misbehaving_rank_is_not_silent(tmp_path):
    """Ranks with different configurations stop, and say why: each rank draws its own number here."""
    folder = tmp_path / "run"
    options = [*TINY, "trainer.devices=2", "trainer.accelerator=cpu", f"hydra.run.dir={folder}"]
    options = ["trainer=ddp" if o == "trainer=cpu" else o for o in options]
    script = tmp_path / "train.py"
    script.write_text(
        f"import sys, os, random; sys.path.insert(0, {str(Path.cwd())!r}); import src.train as t\n"
        "from omegaconf import OmegaConf\n"
        "OmegaConf.register_new_resolver('draw', lambda: random.random())\n"
        "t.entrypoint('train', t.train)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), *options, "optimizer.lr=${draw:}"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "the ranks run different configurations" in done.stderr


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optimizer.lr=0.5", "optimizer.lr: 0.001 there, 0.5 here"),
        ("data.batch_size=8", "data.batch_size: 4 there, 8 here"),
        ("loss.z_loss=0.1", "loss.z_loss"),
        ("data.task.K=3", "other data than there is here: K: 2 there, 3 here"),
        ("trainer.max_steps=6", "nothing is left to train"),
    ],
)
def test_resuming_with_another_recipe_is_refused(tmp_path, straight, override, named):
    """The optimizer's state and the place in the data would silently win over the command line."""
    options = [CANON, "trainer.max_steps=8", f"ckpt_path={straight[0]}/checkpoints/final.ckpt"]
    with pytest.raises(CheckpointError) as caught:
        tiny_run(tmp_path, *options, override)
    assert named in str(caught.value)


def test_more_steps_than_planned_are_said(tmp_path, straight, caplog):
    tiny_run(tmp_path, CANON, "trainer.max_steps=8", f"ckpt_path={straight[0]}/checkpoints/final.ckpt")
    assert "resuming a run whose schedule was one of 6 steps with one of 8" in caplog.text
    assert results(tmp_path)["steps"] == 8


def test_a_folder_holds_one_run(straight):
    folder, _ = straight
    with pytest.raises(ConfigError, match="holds the checkpoints of an earlier run"):
        tiny_run(folder, CANON)


def test_what_is_logged_is_what_happened(tmp_path):
    """The learning rate of each update, and the norm of the gradient before it is clipped."""
    tiny_run(tmp_path / "free", "optimizer.lr=0.01", "trainer.gradient_clip_val=null")
    tiny_run(tmp_path / "clipped", "optimizer.lr=0.01", "trainer.gradient_clip_val=1e-9", "optimizer.eps=1.0")
    schedule = Cosine(4, 1, 0.1)
    assert curve(tmp_path / "free", "train/lr") == pytest.approx([0.01 * schedule(s) for s in range(4)])
    assert curve(tmp_path / "free", "train/grad_norm")[0] == curve(tmp_path / "clipped", "train/grad_norm")[0] > 1e-3
    # With gradients clipped to nothing (and an eps that does not blow them up again) only weight decay moves the weights.
    before, after = load_model_weights(tmp_path / "clipped"), final(tmp_path / "clipped")["state_dict"]
    decay = 1.0
    for s in range(4):
        decay *= 1 - 0.01 * schedule(s) * 0.03
    torch.testing.assert_close(after["net.head.weight"], before * decay, atol=1e-7, rtol=1e-5)


def load_model_weights(folder: Path) -> torch.Tensor:
    """The head's initial weights: they depend on the configuration alone."""
    return model_from_config(read_checkpoint(folder)["config"]["model"]).head.weight.detach()


def test_the_profiler_leaves_a_trace_and_a_table(tmp_path):
    small = [option for option in TINY if not option.startswith(("trainer.max", "trainer.val"))]
    main(train, "train", "debug=profiler", *small, "trainer.max_steps=9", f"hydra.run.dir={tmp_path}")
    with gzip.open(tmp_path / "profile" / "trace.rank0.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event["name"].startswith("ProfilerStep#") for event in events) >= 3
    assert "aten::mm" in (tmp_path / "profile" / "kernels.rank0.txt").read_text()
