"""The LightningDataModule that every data set shares: a window source and how many windows a batch takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import lightning as L
from torch.utils.data import Dataset

from src.datamodules.stream import (
    EvaluationBatches,
    FromStep,
    Share,
    StreamLoader,
    TrainingBatches,
    WindowSource,
    data_share,
    leave_interrupts_to_the_run,
)


class StreamDataModule(L.LightningDataModule, ABC):
    """Serves a window source by the stream contract (``stream.py``).

    Args:
        window: tokens in a window; one fewer is predicted.
        batch_size: windows per optimizer step, over all ranks and accumulated micro-batches.
        eval_batch_size: windows per evaluation batch, of one rank.
        num_workers: processes that prepare batches; 0 does it in the training process.
    """

    def __init__(self, window: int, batch_size: int, eval_batch_size: int, num_workers: int):
        super().__init__()
        limits = {"window": (window, 2), "batch_size": (batch_size, 1)}
        limits |= {"eval_batch_size": (eval_batch_size, 1), "num_workers": (num_workers, 0)}
        for name, (value, least) in limits.items():
            if value < least:
                raise ValueError(f"data.{name}={value}: at least {least}")
        self.window = window
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers

    @property
    @abstractmethod
    def source(self) -> WindowSource:
        """Where windows come from; travels to data-loading processes."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @property
    def expected_vocab_size(self) -> int:
        """The same, where it can be told before the data are prepared; else what is asked for."""
        return self.vocab_size

    @property
    def training_steps(self) -> int | None:
        """Optimizer steps until the training data end; None if they never do."""
        return None

    def chance(self) -> dict[str, float]:
        """What guessing scores, by metric (without the split), where that is known."""
        return {}

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data, in plain values."""

    def expected_fingerprint(self) -> dict[str, Any]:
        """What ``fingerprint`` will say, as far as that can be told without preparing the data."""
        return self.fingerprint()

    def train_dataloader(self) -> StreamLoader:
        """Micro-batches from the trainer's current optimizer step on."""
        trainer = self._trainer()
        share = Share(self.batch_size, *data_share(trainer), trainer.accumulate_grad_batches)
        batches = TrainingBatches(self.source, share, trainer.max_steps)
        return self._loader(batches, FromStep(batches, lambda: trainer.global_step))

    def val_dataloader(self) -> StreamLoader:
        """The fixed validation set."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> StreamLoader:
        """The fixed test set."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: str) -> StreamLoader:
        trainer = self._trainer()
        return self._loader(EvaluationBatches(self.source, split, self.eval_batch_size, *data_share(trainer)))

    def _loader(self, batches: Dataset, sampler: FromStep | None = None) -> StreamLoader:
        return StreamLoader(
            batches,
            batch_size=None,  # the data set's items are whole batches
            sampler=sampler,
            num_workers=self.num_workers,
            worker_init_fn=leave_interrupts_to_the_run,
            pin_memory=self._trainer().strategy.root_device.type == "cuda",
        )

    def _trainer(self) -> L.Trainer:
        if self.trainer is None:
            raise RuntimeError("this data module is not attached to a Trainer; pass it to trainer.fit/validate/test")
        return self.trainer
