"""Stop it anywhere, break what you like: what docs/reliability.md promises of each fault."""

import csv
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import src.checkpoints.io
import src.support.files
from src.build import build_model
from src.callbacks.guard import BadStep, Guard, replay
from src.callbacks.preemption import REQUEUE, Preempted, Preemption
from src.checkpoints import load_model
from src.config import ConfigError
from src.modules.language_model import LanguageModel
from src.training.run import run as run_here
from tests.runs import ROOT, TINY, compose_run, curve, final, free_port, results, same, tiny_run

EVERY = ["callbacks.checkpoint.every_n_train_steps=1", "callbacks.checkpoint.save_top_k=2"]
CLOCKS = ("train/tokens_per_second", "train/data_wait")


def metrics_of(folder: Path) -> list[dict[str, str]]:
    """All that was logged, but what a clock says."""
    with (folder / "csv" / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if v and k not in CLOCKS} for row in csv.DictReader(file)]


def assert_same_run(a: Path, b: Path) -> None:
    one, two = final(a), final(b)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert same(one[part], two[part]), part
    assert metrics_of(a) == metrics_of(b)
    assert results(a)["metrics"] == results(b)["metrics"]


class Process:
    """``python src/train.py`` in a process group of its own."""

    def __init__(self, folder: Path, *overrides: str):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "output.log"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "src" / "train.py"), *overrides, f"hydra.run.dir={folder}"],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": free_port()},
            )

    def steps(self) -> int:
        """The newest step of which there is a checkpoint."""
        found = [int(p.name[4:12]) for p in (self.folder / "checkpoints").glob("step????????.ckpt")]
        return max(found, default=0)

    def reach(self, step: int, seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while self.steps() < step and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self.steps() >= step, self.log.read_text()[-3000:]

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self, seconds: float = 180.0) -> int:
        return self.process.wait(timeout=seconds)


# ---- killed and resumed ---------------------------------------------------------------------------------------------

TASK = TINY[:-5]
CORPUS = ["data=text_files", "data.tokenizer=bytes", "data.window=64", "data.batch_size=4", "data.eval_batch_size=4"]
CORPUS += ["data.val_windows=6", "data.test_windows=6", "model.dim=16", "model.feedforward.hidden_dim=16"]
ON = {
    "one": ["trainer=cpu"],
    "ddp": ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"],
    "fsdp": ["trainer=fsdp", "trainer.devices=2", "trainer.accelerator=cpu"],
}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(40):
        words = np.random.default_rng(i).integers(0, 50, size=200)
        (folder / f"{i}.txt").write_text(" ".join(f"word{w}" for w in words))
    return folder


def exact(tmp_path: Path, data: list[str], model: str, strategy: str, kills: int, steps: int) -> None:
    options = [*(o for o in data if not o.startswith("trainer=")), f"model={model}", *ON[strategy], *EVERY]
    options += ["canon.positions=AbCD", f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps // 4}"]
    options += ["trainer.log_every_n_steps=1", "scheduler.warmup_steps=1"]
    if strategy == "one":
        run_here(compose_run(tmp_path / "straight", *options))
    else:
        straight = Process(tmp_path / "straight", *options)
        assert straight.end() == 0, straight.log.read_text()[-3000:]
    draw = random.Random(f"{data[0]}{model}{strategy}")
    moments = sorted(draw.sample(range(1, steps - 1), kills))
    for moment in moments:
        run = Process(tmp_path / "killed", *options, "ckpt_path=auto")
        run.reach(moment)
        time.sleep(draw.random() * 0.05)
        run.kill()
    last = Process(tmp_path / "killed", *options, "ckpt_path=auto")
    assert last.end() == 0, last.log.read_text()[-3000:]
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_killed_and_resumed_is_the_straight_run(tmp_path):
    exact(tmp_path, TASK, "gdn", "one", kills=1, steps=40)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_stopped_twice_before_the_next_checkpoint(tmp_path, monkeypatch, accumulate):
    """Going on from a checkpoint leaves it as it is: a second time, the same follows from it."""
    options = [
        "trainer.max_steps=6",
        f"trainer.accumulate_grad_batches={accumulate}",
        "callbacks.checkpoint.every_n_train_steps=2",
    ]
    options += ["trainer.val_check_interval=12"]
    tiny_run(tmp_path / "straight", *options)
    monkeypatch.setattr(LanguageModel, "training_step", stopping_at(accumulate * 3, LanguageModel.training_step))
    assert_same_after_failures(tmp_path, monkeypatch, options, times=3)
    for folder in ("straight", "killed"):
        kept = sorted(path.name for path in (tmp_path / folder / "checkpoints").glob("step*.ckpt"))
        assert kept == ["step00000004.ckpt", "step00000006.ckpt"]


def assert_same_after_failures(tmp_path: Path, monkeypatch: Any, options: list[str], times: int) -> None:
    """Begins ``killed`` so often with what has been patched to fail, then ends it without, and compares it with ``straight``."""
    for _ in range(times):
        with pytest.raises(ZeroDivisionError):
            tiny_run(tmp_path / "killed", *options, "ckpt_path=auto")
    monkeypatch.undo()
    tiny_run(tmp_path / "killed", *options, "ckpt_path=auto")
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def stopping_at(batch: int, original):
    """A training step that fails in the last micro-batch of a step, when some of its gradients are there already."""

    def step(self, data, batch_idx):
        if batch_idx == batch - 1:
            raise ZeroDivisionError
        return original(self, data, batch_idx)

    return step


def test_killed_in_the_test(tmp_path, monkeypatch):
    """Training is over: the same command tests, and writes down what the straight run does."""
    options = [
        "trainer.max_steps=5",
        "trainer.val_check_interval=2",
    ]  # the last validation is not that of the last step
    tiny_run(tmp_path / "straight", *options)

    def fails(self, batch, batch_idx):
        raise ZeroDivisionError

    monkeypatch.setattr(LanguageModel, "test_step", fails)
    assert_same_after_failures(tmp_path, monkeypatch, options, times=2)
    costs = {"tokens_per_second", "data_wait", "seconds", "peak_memory_bytes"}
    a, b = (results(tmp_path / name) for name in ("straight", "killed"))
    assert {k: v for k, v in a.items() if k not in costs} == {k: v for k, v in b.items() if k not in costs}
    assert a["metrics"]["val/loss"] == curve(tmp_path / "straight", "val/loss")[-1]  # to the last digit
    # Once more: it is done.
    before = (tmp_path / "killed" / "results.json").stat().st_mtime_ns
    assert tiny_run(tmp_path / "killed", *options, "ckpt_path=auto") == a["metrics"]
    assert (tmp_path / "killed" / "results.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("step", [1, 2, 3, 4])  # the fourth is the last of all
def test_killed_between_a_checkpoint_and_its_validation(tmp_path, step):
    """What the killed run had still to measure, with the weights of this step and on all windows, the resumed one measures."""
    options = [*EVERY, "callbacks.checkpoint.save_top_k=-1", "trainer.val_check_interval=1"]
    tiny_run(tmp_path / "straight", *options)
    shutil.copytree(tmp_path / "straight", tmp_path / "killed")
    (tmp_path / "killed" / "results.json").unlink()
    for path in (tmp_path / "killed" / "checkpoints").iterdir():
        if not path.name.startswith("step") or int(path.name[4:12]) > step:
            path.unlink()
    log = tmp_path / "killed" / "csv" / "metrics.csv"
    with log.open() as file:
        reader = csv.DictReader(file)
        rows = [
            row for row in reader if int(row["step"]) < step - 1 or (row["step"] == str(step - 1) and row["train/loss"])
        ]
    with log.open("w", newline="") as file:
        writer = csv.DictWriter(file, reader.fieldnames or [])
        writer.writeheader()
        writer.writerows(rows)
    tiny_run(tmp_path / "killed", *options, "ckpt_path=auto")
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", list(ON))
@pytest.mark.parametrize("model", ["llama", "gdn"])
@pytest.mark.parametrize("data", ["task", "corpus"])
def test_killed_at_five_moments(tmp_path, corpus, data, model, strategy):
    chosen = TASK if data == "task" else [*CORPUS, f"data.path={corpus}", f"data.cache_dir={tmp_path / 'cache'}"]
    exact(tmp_path, chosen, model, strategy, kills=5, steps=80)


# ---- stopped on request ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "number"),
    [("one", signal.SIGUSR1), pytest.param("ddp", signal.SIGTERM, marks=pytest.mark.slow)],
)
def test_a_signal_leaves_a_checkpoint_and_asks_to_be_started_again(tmp_path, strategy, number):
    options = [*(o for o in TINY if not o.startswith("trainer=")), *ON[strategy], "trainer.max_steps=200"]
    options += ["trainer.val_check_interval=100", "callbacks.checkpoint.every_n_train_steps=20"]
    run = Process(tmp_path / "run", *options, "ckpt_path=auto")
    run.reach(20)
    os.kill(run.process.pid, number)  # to one process only
    assert run.end() == REQUEUE, run.log.read_text()[-3000:]
    stopped = run.steps()
    assert 20 <= stopped < 200
    assert json.loads((tmp_path / "run" / "run.json").read_text())["exit_status"] == REQUEUE
    assert f"stopped after step {stopped} of 200" in run.log.read_text()
    again = Process(tmp_path / "run", *options, "ckpt_path=auto", "trainer.max_steps=200")
    assert again.end() == 0, again.log.read_text()[-3000:]
    # The very next step, and none twice.
    logged = [int(row["step"]) for row in metrics_of(tmp_path / "run") if "train/loss" in row]
    assert logged == list(range(200))
    assert f"step{stopped:08d}.ckpt" in json.loads((tmp_path / "run" / "run.json").read_text())["resumed_from"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_during_the_test_asks_to_be_started_again(tmp_path, monkeypatch, number):
    options = ["trainer.max_steps=3", "ckpt_path=auto"]
    monkeypatch.setattr(LanguageModel, "test_step", lambda *_: os.kill(os.getpid(), number))
    with pytest.raises(Preempted) as stopped:
        tiny_run(tmp_path / "stopped", *options)
    assert stopped.value.code == REQUEUE
    assert signal.getsignal(number) == signal.SIG_DFL
    monkeypatch.undo()
    tiny_run(tmp_path / "stopped", *options)
    tiny_run(tmp_path / "straight", *options)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_ctrl_c_ends_the_step_and_saves_it(tmp_path, monkeypatch):
    original = LanguageModel.training_step

    def step(self, batch, batch_idx):
        if batch_idx == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(LanguageModel, "training_step", step)
    with pytest.raises(Preempted) as stopped:
        tiny_run(tmp_path / "stopped", "ckpt_path=auto")
    assert stopped.value.code == 130
    assert (tmp_path / "stopped" / "checkpoints" / "step00000003.ckpt").exists()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    monkeypatch.undo()
    tiny_run(tmp_path / "stopped", "ckpt_path=auto")
    tiny_run(tmp_path / "straight")
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.slow
def test_ctrl_c_reaches_the_data_workers_too(tmp_path):
    """As from a terminal: to all processes of the run at once, in the middle of a step that still needs data."""
    options = [*TINY, "data.num_workers=2", "trainer.accumulate_grad_batches=4", "trainer.max_steps=2000"]
    run = Process(tmp_path, *options, "callbacks.checkpoint.every_n_train_steps=5", "trainer.val_check_interval=8000")
    run.reach(10)
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.end() == 130, run.log.read_text()[-3000:]
    assert f"stopped after step {run.steps()} of 2000" in run.log.read_text()
    assert "DataLoader worker" not in run.log.read_text()


def test_preempted_often_it_keeps_as_many_checkpoints_as_asked(tmp_path, monkeypatch):
    """Those that signals have made are removed in their turn, and so is the one that a run goes on from."""
    original = LanguageModel.training_step

    def step(self, batch, batch_idx):
        if batch_idx in (1, 3, 5, 7):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(LanguageModel, "training_step", step)
    for stopped in (2, 4, 6, 8):
        with pytest.raises(Preempted):
            tiny_run(tmp_path, "ckpt_path=auto", "trainer.max_steps=9", "callbacks.checkpoint.every_n_train_steps=3")
        kept = sorted(int(path.name[4:12]) for path in (tmp_path / "checkpoints").glob("step*.ckpt"))
        assert kept == {2: [2], 4: [3, 4], 6: [4, 6], 8: [6, 8]}[stopped]
    monkeypatch.undo()
    tiny_run(tmp_path, "ckpt_path=auto", "trainer.max_steps=9", "callbacks.checkpoint.every_n_train_steps=3")
    assert {p.name for p in (tmp_path / "checkpoints").glob("step*.ckpt")} == {"step00000008.ckpt", "step00000009.ckpt"}


def test_a_folder_that_has_moved_keeps_as_many_checkpoints_as_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(LanguageModel, "training_step", stopping_at(4, LanguageModel.training_step))
    with pytest.raises(ZeroDivisionError):
        tiny_run(tmp_path / "here", *EVERY, "callbacks=best", "trainer.val_check_interval=1")
    monkeypatch.undo()
    (tmp_path / "here").rename(tmp_path / "there")
    tiny_run(tmp_path / "there", *EVERY, "callbacks=best", "trainer.val_check_interval=1", "ckpt_path=auto")
    names = {path.name for path in (tmp_path / "there" / "checkpoints").glob("*.ckpt")}
    losses = curve(tmp_path / "there", "val/loss")
    best = f"best_step{losses.index(min(losses)) + 1:08d}.ckpt"
    assert names == {"step00000003.ckpt", "step00000004.ckpt", "last.ckpt", "final.ckpt", best}


def test_one_run_at_a_time_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(src.support.files.time, "monotonic", iter(range(0, 1000, 20)).__next__)  # nobody likes to wait
    held = src.support.files.Lock(tmp_path, "run.lock")
    assert held.acquire()
    with pytest.raises(ConfigError, match="another process is at work in this folder"):
        tiny_run(tmp_path)
    held.release()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step00000001.ckpt.1.part").write_text("half")
    tiny_run(tmp_path)
    assert not list(tmp_path.rglob("*.part"))


def test_the_wall_time_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 60))
    with pytest.raises(SystemExit) as stopped:
        tiny_run(tmp_path, "callbacks.preemption.margin_minutes=5")
    assert stopped.value.code == REQUEUE
    assert "the wall time ends: stopped after step 1 of 4" in str(stopped.value.message)  # type: ignore[attr-defined]
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    assert Preemption(max_minutes=10, margin_minutes=5).deadline == pytest.approx(time.time() + 300, abs=5)
    for options in ({"max_minutes": 1}, {"margin_minutes": -1}):
        with pytest.raises(ValueError, match="callbacks.preemption"):
            Preemption(**options)  # type: ignore[arg-type]


# ---- a gradient or loss that must not be used -----------------------------------------------------------------------


def poison(monkeypatch, step: int, value: float = float("nan"), times: int = 1) -> list[int]:
    """The loss of one step, counted from 1, is multiplied by ``value``."""
    original, met = LanguageModel._summed_loss, []

    def poisoned(self, batch):
        loss, right = original(self, batch)
        if self.trainer.global_step + 1 == step and len(met) < times:
            met.append(step)
            loss = loss * value
        return loss, right

    monkeypatch.setattr(LanguageModel, "_summed_loss", poisoned)
    return met


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, value):
    poison(monkeypatch, 3, value)
    with pytest.raises(BadStep, match=r"step 3: .*(nan|inf).*go on with ckpt_path=.*step00000002.ckpt"):
        tiny_run(tmp_path, *EVERY)
    kept = tmp_path / "bad_batches" / "step00000003.rank0.pt"
    net = load_model(tmp_path / "checkpoints" / "step00000002.ckpt")
    monkeypatch.undo()
    tiny_run(tmp_path / "straight")
    assert replay(kept, net) == pytest.approx(curve(tmp_path / "straight", "train/loss")[2], abs=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_update_can_be_left_out(tmp_path, monkeypatch, accumulate):
    poison(monkeypatch, 3)
    options = [*EVERY, "callbacks.checkpoint.save_top_k=-1", "callbacks.guard.nonfinite=skip"]
    options += [f"trainer.accumulate_grad_batches={accumulate}", f"trainer.val_check_interval={2 * accumulate}"]
    tiny_run(tmp_path, *options)
    before, after = (torch.load(tmp_path / "checkpoints" / f"step{i:08d}.ckpt", weights_only=True) for i in (2, 3))
    assert same(before["state_dict"], after["state_dict"])
    assert same(before["optimizer_states"][0]["state"], after["optimizer_states"][0]["state"])
    assert (
        len(torch.load(tmp_path / "bad_batches" / "step00000003.rank0.pt", weights_only=True)["batches"]) == accumulate
    )
    assert not same(after["state_dict"], final(tmp_path)["state_dict"])


def test_rolling_back_leaves_the_step_out(tmp_path, monkeypatch):
    """From the checkpoint before, once more up to the step, past it: as if its update had been skipped at once."""
    poison(monkeypatch, 4, times=1)
    options = ["trainer.max_steps=6", "callbacks.checkpoint.every_n_train_steps=2"]
    tiny_run(tmp_path / "back", *options, "callbacks.guard.nonfinite=rollback")
    monkeypatch.undo()
    poison(monkeypatch, 4)
    tiny_run(tmp_path / "skipped", *options, "callbacks.guard.nonfinite=skip")
    assert same(final(tmp_path / "back")["state_dict"], final(tmp_path / "skipped")["state_dict"])
    steps = [int(row["step"]) for row in metrics_of(tmp_path / "back") if "train/loss" in row]
    assert steps == list(range(6))


def test_a_spike_is_told_and_can_be_left_out(tmp_path, monkeypatch, caplog):
    options = ["trainer.max_steps=50", "trainer.val_check_interval=50", "callbacks.guard.spike_deviations=20"]
    poison(monkeypatch, 45, 50.0)
    tiny_run(tmp_path / "warned", *options)
    assert "step 45: loss" in caplog.text
    poison(monkeypatch, 45, 50.0)
    tiny_run(tmp_path / "skipped", *options, "callbacks.guard.spike=skip")
    assert "its update is left out" in caplog.text
    assert not same(final(tmp_path / "warned")["state_dict"], final(tmp_path / "skipped")["state_dict"])


def test_a_guard_gives_up(tmp_path, monkeypatch):
    poison(monkeypatch, 2)
    with pytest.raises(BadStep, match=r"more than callbacks.guard.limit=0"):
        tiny_run(tmp_path, "callbacks.guard.nonfinite=skip", "callbacks.guard.limit=0")
    for options in ({"window": 3}, {"margin": -1}, {"spike_deviations": 0}):
        with pytest.raises(ValueError, match="callbacks.guard"):
            Guard("here", **options)  # type: ignore[arg-type]


def kept_batch(**changes) -> dict[str, Any]:
    """What a guard keeps, of one micro-batch, with changes."""
    tokens = torch.arange(10).view(2, 5)
    return {"batches": [{"tokens": tokens, "loss_mask": tokens > 2} | changes]}


def test_steps_that_a_state_leaves_out_are_counted_before_they_are_looked_up():
    """Numbers can all have one hash; a set of many such takes quadratic time."""
    state = Guard("here").state_dict() | {"leave_out": [number * (2**61 - 1) for number in range(20_000)]}
    with pytest.raises(ValueError, match="leaves out more than 16,384 steps"):
        Guard("here").load_state_dict(state)


@pytest.mark.parametrize(
    "content",
    [
        *(
            3,
            [],
            {},
            {1: 2, "a": 3},
            {"batches": 3},
            {"batches": {}},
            {"batches": [3]},
            {"batches": [{}]},
            b"junk",
            b"",
        ),
        *(kept_batch(tokens=value) for value in (3, torch.arange(5), torch.zeros(2, 5), torch.zeros(2, 4).long())),
        *(kept_batch(tokens=torch.full((2, 5), value)) for value in (-1, 20, 2**62)),
        *(kept_batch(loss_mask=value) for value in (None, torch.ones(2, 5), torch.ones(2, 6, dtype=torch.bool))),
        *(kept_batch(segments=value) for value in (3, torch.zeros(2, 5), torch.zeros(1, 5, dtype=torch.int64))),
        kept_batch(tokens=torch.zeros(0, 5).long(), loss_mask=torch.zeros(0, 5) > 0),
        kept_batch(tokens=torch.zeros(2, 0).long(), loss_mask=torch.zeros(2, 0) > 0),
        kept_batch(tokens=torch.zeros(1).long().expand(10**6, 10**6)),
        {"batches": Path("a pickled object")},
    ],
)
def test_what_is_no_kept_batch_is_refused_by_name(tmp_path, content):
    path = tmp_path / "step00000001.rank0.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ConfigError, match=r"step00000001\.rank0\.pt: no batch that a guard has kept"):
        replay(path, build_model(["model=llama", "model.vocab_size=20", "model.dim=64"]))


def test_a_kept_batch_that_is_not_there(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    for name in ("pipe.pt", "nowhere.pt", "."):
        with pytest.raises(ConfigError, match="no batch that a guard has kept"):
            replay(tmp_path / name, None)
    net = build_model(["model=llama", "model.vocab_size=20", "model.dim=64"])
    torch.save(kept_batch(), tmp_path / "good.pt")
    assert replay(tmp_path / "good.pt", net) > 0


# ---- the disk -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, caplog, asynchronous):
    """The third and fourth checkpoints find no room: training goes on, older ones stay, the last one is tried again."""
    original, written, there = src.checkpoints.io.torch.save, [], {}

    def save(checkpoint, file):
        written.append(checkpoint["global_step"])
        there[written[-1]] = {path.name for path in (tmp_path / "checkpoints").glob("*.ckpt")} - {"last.ckpt"}
        if checkpoint["global_step"] in (3, 4) and "optimizer_states" in checkpoint and len(written) < 5:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(checkpoint, file)

    monkeypatch.setattr(src.checkpoints.io.torch, "save", save)
    plugin = (
        f"trainer.plugins=[{{_target_:src.checkpoints.io.CheckpointFiles,asynchronous:{str(asynchronous).lower()}}}]"
    )
    tiny_run(tmp_path, *EVERY, plugin, "trainer.max_steps=6", "callbacks.checkpoint.save_top_k=2")
    assert caplog.text.count("no room for checkpoint") == 2
    # Those before stay until one is whole again, although only two are to be kept.
    assert there[4] == there[5] == {"step00000001.ckpt", "step00000002.ckpt"}
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert not any(name.endswith(".part") for name in names)
    assert {"step00000005.ckpt", "step00000006.ckpt", "final.ckpt"} <= names
    assert not {"step00000001.ckpt", "step00000002.ckpt", "step00000003.ckpt"} & names
    monkeypatch.undo()
    tiny_run(tmp_path / "straight", "trainer.max_steps=6")
    assert same(final(tmp_path)["state_dict"], final(tmp_path / "straight")["state_dict"])


def test_a_corpus_that_vanishes(tmp_path, corpus):
    """The file is named when it is next opened; the same command builds it again and goes on."""
    options = [
        *CORPUS,
        *ON["one"],
        *EVERY,
        f"data.path={corpus}",
        "trainer.max_steps=60",
        "trainer.val_check_interval=30",
    ]
    options += ["ckpt_path=auto"]
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    run = Process(tmp_path / "run", *options, cache)
    run.reach(5)
    for path in (tmp_path / "cache").rglob("*.npy"):
        path.unlink()
    assert run.end() == 2, run.log.read_text()[-3000:]
    message = run.log.read_text().splitlines()[-1]
    assert message.startswith("error: ")
    assert "val.tokens.npy" in message
    again = Process(tmp_path / "run", *options, cache)
    assert again.end() == 0, again.log.read_text()[-3000:]
    run_here(compose_run(tmp_path / "straight", *options, f"data.cache_dir={tmp_path / 'other'}"))
    assert_same_run(tmp_path / "straight", tmp_path / "run")


# ---- processes that die ---------------------------------------------------------------------------------------------


def test_a_data_worker_that_dies(tmp_path):
    options = [*TINY, *EVERY, "data.num_workers=1", "trainer.max_steps=300", "trainer.val_check_interval=300"]
    run = Process(tmp_path / "run", *options)
    run.reach(3)
    workers = [
        child
        for child in psutil.Process(run.process.pid).children()
        if "resource_tracker" not in " ".join(child.cmdline())
    ]
    for worker in workers:
        worker.kill()
    assert run.end() != 0
    assert "DataLoader worker" in run.log.read_text()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_rank_that_dies_stops_the_others_within_a_minute(tmp_path, strategy):
    """Started by hand, so that no launcher looks after them."""
    port = free_port()
    options = [*(o for o in TINY if not o.startswith("trainer=")), *ON[strategy], *EVERY, "trainer.max_steps=2000"]
    processes = []
    for rank in (0, 1):
        with (tmp_path / f"rank{rank}.log").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(ROOT / "src" / "train.py"), *options, f"hydra.run.dir={tmp_path / 'run'}"],
                    cwd=ROOT,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ
                    | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
                    | {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
                    | {"TORCHELASTIC_RUN_ID": "test"},
                )
            )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run" / "checkpoints").glob("step*3.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    processes[1].kill()
    started = time.monotonic()
    try:
        assert processes[0].wait(timeout=60) != 0
    finally:
        processes[0].kill()
    assert time.monotonic() - started < 60
    assert "another process of this run has died" in (tmp_path / "rank0.log").read_text()


# ---- two nodes ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_nodes", "fsdp_nodes"])
def test_two_nodes_over_loopback(tmp_path, strategy):
    """The commands of docs/scaling.md, with CPUs in place of GPUs."""
    port = free_port()
    options = [*(o for o in TINY if not o.startswith("trainer=")), f"trainer={strategy}", "trainer.accelerator=cpu"]
    options += [
        "trainer.devices=1",
        "trainer.precision=32-true",
        "trainer.max_steps=20",
        "trainer.val_check_interval=20",
    ]
    nodes = [
        subprocess.Popen(
            [
                *(
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--nnodes=2",
                    f"--node-rank={node}",
                    "--nproc-per-node=1",
                ),
                *("--master-addr=127.0.0.1", f"--master-port={port}", str(ROOT / "src" / "train.py"), *options),
                f"hydra.run.dir={tmp_path / 'nodes'}",
            ],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for node in (0, 1)
    ]
    assert [node.wait(timeout=300) for node in nodes] == [0, 0]
    tiny_run(tmp_path / "one", "trainer.max_steps=20", "trainer.val_check_interval=20")
    found = curve(tmp_path / "nodes", "train/loss")
    assert len(found) == 20
    assert found == pytest.approx(curve(tmp_path / "one", "train/loss"), abs=1e-5)
