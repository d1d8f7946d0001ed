"""Tokens per second of training, evaluation and checkpointing not counted."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from src.modules.language_model import is_log_step


class Throughput(Callback):
    """Logs ``train/tokens_per_second`` (all ranks together) over the steps since the last log.

    Counts every token that the model read, window by window, whether or not its loss counts. ``rate`` is that of the whole
    run, its first logging interval (compilation, warm-up) left out if there is another.
    """

    def __init__(self) -> None:
        self.tokens, self.seconds, self.started = 0, 0.0, 0.0
        self.rates: list[tuple[int, float]] = []  # tokens of all ranks and seconds, by logging interval

    @property
    def rate(self) -> float | None:
        """Tokens per second of the run so far; None before the first log."""
        counted = self.rates[1:] or self.rates
        seconds = sum(seconds for _, seconds in counted)
        return sum(tokens for tokens, _ in counted) / seconds if seconds else None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts the clock, unless it runs since the last batch (so that waiting for data counts)."""
        self.started = self.started or time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts, and logs at the trainer's logging interval."""
        self.tokens += batch["tokens"].numel()
        if (batch_idx + 1) % trainer.accumulate_grad_batches or not is_log_step(trainer, trainer.global_step):
            return
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(trainer.strategy.root_device)
        self._stop()
        if self.seconds > 0:
            tokens = self.tokens * trainer.world_size
            self.rates.append((tokens, self.seconds))
            rate = tokens / self.seconds
            pl_module.log("train/tokens_per_second", torch.tensor(rate), prog_bar=True)
        self.tokens, self.seconds, self.started = 0, 0.0, time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops the clock."""
        self._stop()

    def _stop(self) -> None:
        if self.started:
            self.seconds += time.perf_counter() - self.started
            self.started = 0.0
