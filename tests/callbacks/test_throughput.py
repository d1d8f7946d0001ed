import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer

from src.callbacks import throughput
from src.callbacks.progress import Lines
from tests.runs import tiny_run


def two_ranks(**parts: Any) -> Any:
    """What the callback asks of a trainer after its first step."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(accumulate_grad_batches=1, global_step=1, world_size=2, strategy=strategy, **parts)


def test_tokens_per_second_by_a_fake_clock(monkeypatch):
    """Two batches of 8 x 16 tokens, of which 15 are read, on each of two ranks, 3 s of training, 100 s of validation in between."""
    now, logged = [10.0], {}
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    trainer = two_ranks(log_every_n_steps=2)
    module: Any = SimpleNamespace(log=lambda name, value, **_: logged.update({name: float(value)}))
    batch, callback = {"tokens": torch.zeros(8, 16)}, throughput.Throughput()
    callback.on_train_batch_start(trainer, module, batch, 0)
    now[0] += 1
    callback.on_train_batch_end(trainer, module, None, batch, 0)
    callback.on_validation_start(trainer, module)
    now[0] += 100
    callback.on_train_batch_start(trainer, module, batch, 1)
    now[0] += 2
    trainer.global_step = 2
    callback.on_train_batch_end(trainer, module, None, batch, 1)
    assert logged == {"train/tokens_per_second": pytest.approx(2 * 2 * 8 * 15 / 3), "train/data_wait": 0.0}


def test_writing_a_checkpoint_is_neither_training_nor_waiting(tmp_path, monkeypatch):
    """A tenth of a second for each."""
    save = Trainer.save_checkpoint

    def slowly(self, *arguments, **more):
        time.sleep(0.1)
        save(self, *arguments, **more)

    monkeypatch.setattr(Trainer, "save_checkpoint", slowly)
    counted = []
    monkeypatch.setattr(throughput.Throughput, "do_not_count", lambda self, seconds: counted.append(seconds))
    tiny_run(tmp_path, "trainer.max_steps=3", "callbacks.checkpoint.every_n_train_steps=1")
    assert len(counted) == 3
    assert min(counted) >= 0.1
    monkeypatch.undo()
    clock = throughput.Throughput()
    clock.started, clock.ended = 10.0, 12.0
    clock.do_not_count(3.0)
    assert (clock.started, clock.ended) == (13.0, 15.0)
    clock.started = clock.ended = 0.0  # it stands still
    clock.do_not_count(3.0)
    assert (clock.started, clock.ended) == (0.0, 0.0)


def test_utilisation_and_waiting_by_a_fake_clock(monkeypatch):
    """Of 10 s between two logs, 4 are spent waiting for the second batch; 3 x 50 operations a token, on two devices of 1,000 a second."""
    now, logged = [0.0], {}
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    trainer = two_ranks(log_every_n_steps=1, datamodule=SimpleNamespace(window=17))
    net = SimpleNamespace(flops_per_token=lambda seq_len: {16: 50}[seq_len])
    module: Any = SimpleNamespace(log=lambda name, value, **_: logged.update({name: float(value)}), net=net)
    batch, callback = {"tokens": torch.zeros(4, 5)}, throughput.Throughput(peak=1000.0)
    callback.on_train_start(trainer, module)
    callback.on_train_batch_start(trainer, module, batch, 0)
    now[0] += 1
    callback.on_train_batch_end(trainer, module, None, batch, 0)
    now[0] += 4
    callback.on_train_batch_start(trainer, module, batch, 1)
    now[0] += 6
    callback.on_train_batch_end(trainer, module, None, batch, 1)
    rate = 2 * 4 * 4 / 10
    assert [logged["train/tokens_per_second"], callback.rate] == pytest.approx([rate, rate])
    assert [logged["train/data_wait"], callback.data_wait] == pytest.approx([0.4, 0.4])
    assert [logged["train/mfu"], callback.mfu] == pytest.approx([rate * 3 * 50 / 2000] * 2)
    with pytest.raises(ValueError, match="callbacks.throughput.peak=0"):
        throughput.Throughput(peak=0)


def test_lines_appear_only_where_metrics_are_fresh(capsys):
    trainer: Any = SimpleNamespace(
        accumulate_grad_batches=1,
        max_steps=100,
        log_every_n_steps=10,
        progress_bar_metrics={"train/loss": 1.5, "other": 2},
    )
    lines = Lines(parts=4)
    for step in range(1, 101):
        trainer.global_step = step
        lines.on_train_batch_end(trainer, trainer, None, None, step - 1)
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"step {step:>3}/100  loss 1.500" for step in (20, 40, 60, 80, 100)]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA RTX A4000", None),
    ],
)
def test_the_peak_of_a_device_by_its_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert throughput.peak_flops(torch.device("cuda")) == peak


def test_a_long_test_says_how_far_it_is(tmp_path, capsys):
    tiny_run(tmp_path, "+callbacks.lines={_target_: src.callbacks.progress.Lines, seconds: 0}")
    out = capsys.readouterr().out
    assert "test: 1 of 2 batches" in out
    assert "validation: 2 of 2 batches" in out
