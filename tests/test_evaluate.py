"""A checkpoint that is scored again: on the same windows, with the same precision, and what is said where that cannot be."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from src.checkpoints.files import CheckpointError, read_checkpoint
from src.datamodules.stream import EvaluationBatches
from src.datamodules.task import TaskDataModule
from src.datamodules.tasks import Depo
from src.evaluate import evaluate, part_of_split, precision_of
from src.training.run import run
from tests.runs import compose_run, results, tiny_run

CAPO = ["experiment=smoke/capo", "compare=null", "size.dim=16", "size.depth=1", "trainer=cpu", "trainer.max_steps=1"]
CAPO += ["data.batch_size=4", "data.val_windows=4", "data.test_windows=4", "scheduler.warmup_steps=1"]
PATH = Path("a.ckpt")


def scored(checkpoint: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    """What an evaluation wrote."""
    folder.mkdir()
    where = [f"ckpt_path={checkpoint}", f"paths.output_dir={folder}"]
    evaluate(compose_run(folder, *where, *overrides, config_name="evaluate"))
    [path] = folder.glob("evaluation_*.json")
    return json.loads(path.read_text())


def edited(folder: Path, *, without: str = "", trainer: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A copy of a run's last checkpoint with other entries, and other settings of its trainer."""
    checkpoint = {key: value for key, value in read_checkpoint(folder).items() if key != without} | changes
    checkpoint["config"]["trainer"] |= trainer or {}
    path = folder / f"edited{len(list(folder.glob('edited*.ckpt')))}.ckpt"
    torch.save(checkpoint, path)
    return path


def windows_of(batches: EvaluationBatches, count: float) -> int:
    return sum(int(batches[i]["loss_mask"].any(dim=1).sum()) for i in range(int(min(count, len(batches)))))


@pytest.mark.parametrize("shares", [1, 2, 3])
@pytest.mark.parametrize("limit", [1, 2, 100, 0.5, 0.34, 1.0])
@pytest.mark.parametrize("windows", [16, 21])
def test_a_limit_is_of_the_same_windows(limit, shares, windows):
    """One process scores as many batches as the processes of the run took in turns."""
    data = TaskDataModule(
        Depo(N=5, K=2, mini_vocab=8), window=64, batch_size=1, val_windows=windows, test_windows=windows
    )
    data.eval_batch_size = 2
    checkpoint = {"config": {"trainer": {"limit_test_batches": limit}}, "shares": shares}
    part, remarks = part_of_split(checkpoint, data, "test", PATH)
    ranks = [EvaluationBatches(data.source, "test", 2, rank, shares) for rank in range(shares)]
    of_each = limit if isinstance(limit, int) else int(len(ranks[0]) * limit)
    alone = EvaluationBatches(data.source, "test", 2)
    assert windows_of(alone, len(alone) if part is None else part) == sum(windows_of(r, of_each) for r in ranks)
    assert not remarks


def test_a_run_on_two_processes_that_was_scored_on_a_part(tmp_path):
    there = tmp_path / "run"
    tiny_run(there, "data.eval_batch_size=2", "+trainer.limit_test_batches=1")
    assert scored(there, tmp_path / "one")["metrics"]["test/loss"] == results(there)["metrics"]["test/loss"]
    whole = scored(edited(there, trainer={"limit_test_batches": 1.0}), tmp_path / "whole")
    three = scored(edited(there, shares=3), tmp_path / "three")
    assert three["metrics"] == whole["metrics"] != results(there)["metrics"]
    assert not three["remarks"]


def test_a_part_that_cannot_be_known_is_told(tmp_path, caplog):
    """An older checkpoint of two processes, and one that is asked for another machine."""
    there = tmp_path / "run"
    tiny_run(there, "+trainer.limit_test_batches=1")
    older = edited(there, without="shares", trainer={"devices": 2})
    caplog.set_level(logging.WARNING)
    assert "does not say how many there were" in scored(older, tmp_path / "older")["remarks"][0]
    assert "does not say how many there were" in caplog.text
    assert "here all of it is scored" in scored(there, tmp_path / "here", "trainer=cpu")["remarks"][0]
    with pytest.raises(CheckpointError, match=r"edited1\.ckpt: its 'shares' are -1"):
        scored(edited(there, shares=-1), tmp_path / "wrong")


@pytest.mark.parametrize(
    ("plugin", "accelerator", "word"),
    [
        (
            {"_target_": "lightning.pytorch.plugins.MixedPrecision", "precision": "bf16-mixed", "device": "cpu"},
            "cpu",
            "bf16-mixed",
        ),
        (
            {"_target_": "lightning.pytorch.plugins.MixedPrecision", "precision": "16-mixed", "device": "cuda"},
            "gpu",
            "16-mixed",
        ),
        (
            {"_target_": "lightning.pytorch.plugins.MixedPrecision", "precision": "16-mixed", "device": "cpu"},
            "cpu",
            None,
        ),
        ({"_target_": "lightning.pytorch.plugins.DoublePrecision"}, "cpu", "64-true"),
        ({"_target_": "lightning.pytorch.plugins.HalfPrecision", "precision": {"_target_": "os.system"}}, "cpu", None),
        ({"_target_": "lightning.pytorch.plugins.BitsandbytesPrecision", "mode": "nf4"}, "cpu", None),
    ],
)
def test_a_precision_plugin_is_taken_at_its_word(plugin, accelerator, word):
    files = {"_target_": "src.checkpoints.io.CheckpointFiles"}
    found, [told] = precision_of({"accelerator": accelerator, "plugins": [files, plugin]}, PATH)
    assert found == word
    assert f"it is scored with trainer.precision={word or '32-true'}" in told
    assert precision_of({"precision": "bf16-true", "plugins": [files]}, PATH) == ("bf16-true", [])


def test_a_run_with_a_precision_plugin_is_scored_as_it_was(tmp_path):
    half = "trainer.plugins=[{_target_: lightning.pytorch.plugins.HalfPrecision, precision: bf16-true}]"
    tiny_run(tmp_path / "run", half, "~trainer.precision", "optimizer.fused=false")
    found = scored(tmp_path / "run", tmp_path / "again")
    tested = {name: value for name, value in results(tmp_path / "run")["metrics"].items() if name.startswith("test/")}
    assert found["metrics"] == tested
    assert "HalfPrecision" in found["remarks"][0]


def test_people_that_a_model_has_never_been_told_of(tmp_path, caplog):
    run(compose_run(tmp_path / "run", *CAPO, "data.task.num_people=10", "data.seed=1"))
    asked = ["data=capo", "data.test_windows=4", "data.val_windows=4", "data.window=256"]
    caplog.set_level(logging.WARNING)
    same = scored(tmp_path / "run", tmp_path / "same", *asked, "data.task.num_people=10", "data.seed=1")
    assert not same["remarks"]
    for number, (changes, said) in enumerate(
        [
            (["data.task.num_people=10"], "data.seed: 1 there, 42 here"),
            (["data.seed=1"], "num_people: 10 there, 50000 here"),
        ]
    ):
        assert said in scored(tmp_path / "run", tmp_path / str(number), *asked, *changes)["remarks"][0]
        assert said in caplog.text
