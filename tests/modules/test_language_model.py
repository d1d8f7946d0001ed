"""What a training step minimises and logs, seen through whole runs of a few steps."""

import csv

import pytest
import torch

from src.components.kernels import linear_cross_entropy as kernel
from tests.runs import TINY, command, results, same, tiny_run

MOE = ["model=moe", "canon.positions=ABC", "model.feedforward.num_experts=4"]
LOGGED = ["train/loss", "train/token_accuracy", "train/grad_norm"]
ROUTING = ["train/balance_loss", "train/largest_load", "train/dropped"]


def curve(folder, column):
    with (folder / "csv" / "metrics.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]


def weights(folder):
    return torch.load(folder / "checkpoints" / "final.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("extra", [[], ["loss.z_loss=0.01", "trainer.accumulate_grad_batches=2"]], ids=["plain", "z"])
def test_a_fused_loss_changes_nothing_but_rounding(tmp_path, extra, monkeypatch):
    monkeypatch.setattr(kernel, "CHUNK_CPU", 21 * 10)
    plain = tiny_run(tmp_path / "plain", *extra, "loss.fused=false")
    fused = tiny_run(tmp_path / "fused", *extra, "loss.fused=true")
    assert plain == pytest.approx(fused, abs=1e-5)
    for column in LOGGED:
        assert curve(tmp_path / "plain", column) == pytest.approx(curve(tmp_path / "fused", column), rel=2e-6)
    assert results(tmp_path / "fused")["backends"]["linear_cross_entropy"] == ["torch"]
    assert "linear_cross_entropy" not in results(tmp_path / "plain")["backends"]
    if not extra:  # small models go on as ever
        tiny_run(tmp_path / "auto")
        assert same(weights(tmp_path / "auto"), weights(tmp_path / "plain"))


def test_a_loss_that_cannot_count_logs_no_accuracy(tmp_path, monkeypatch):
    """``fla``'s kernel is one; here the plain equations stand in for it, asked not to count either."""
    full = kernel._linear_cross_entropy.backends["full"]
    monkeypatch.setitem(kernel._linear_cross_entropy.backends, "fla", full)
    tiny_run(tmp_path, "loss.fused=fla", "test=false")
    assert len(curve(tmp_path, "train/loss")) == 4
    assert curve(tmp_path, "train/token_accuracy") == []


def test_the_balance_loss_is_minimised_but_not_part_of_the_loss(tmp_path):
    for coefficient in (0, 5):
        folder = tmp_path / str(coefficient)
        options = ["trainer.max_steps=8", f"model.feedforward.balance_coefficient={coefficient}", "optimizer.lr=0.01"]
        options += ["trainer.val_check_interval=8", "test=false"]
        tiny_run(folder, *MOE, *options)
    free, balanced = (curve(tmp_path / name, "train/balance_loss") for name in ("0", "5"))
    assert free[0] == balanced[0]
    assert balanced[-1] < free[-1] - 0.005
    assert curve(tmp_path / "0", "train/loss")[0] == curve(tmp_path / "5", "train/loss")[0]
    assert curve(tmp_path / "0", "train/grad_norm")[0] != curve(tmp_path / "5", "train/grad_norm")[0]


@pytest.mark.slow
def test_two_processes_train_a_mixture_as_two_micro_batches_do(tmp_path):
    options = [*MOE, "trainer.max_steps=3", "trainer.val_check_interval=3", "test=false"]
    tiny = ["trainer=ddp" if option == "trainer=cpu" else option for option in TINY]
    where = [f"hydra.run.dir={tmp_path / 'two'}", "trainer.devices=2", "trainer.accelerator=cpu"]
    command("train", *tiny, *options, *where)
    tiny_run(tmp_path / "cut", *options, "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=6")
    for column in LOGGED[:1] + ROUTING:
        assert curve(tmp_path / "two", column) == curve(tmp_path / "cut", column)
    assert same(weights(tmp_path / "two"), weights(tmp_path / "cut"))
