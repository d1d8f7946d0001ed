"""Progress on a terminal as a bar, elsewhere (CI, batch jobs, files) as a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

SHORT = {
    "train/loss": "loss",
    "train/token_accuracy": "token_acc",
    "train/tokens_per_second": "tok/s",
    "val/loss": "val_loss",
    "val/accuracy": "val_acc",
    "val/bits_per_byte": "val_bpb",
}


class Bar(RichProgressBar):
    """Lightning's rich progress bar, with short names and without the version number."""

    config_name = "progress_bar"

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The metrics beside the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        return {SHORT.get(name, name): value for name, value in metrics.items() if name in SHORT}


class Lines(Callback):
    """Prints ``parts`` lines in the course of training, one for each validation, and one every ``seconds`` of longer evaluations."""

    config_name = "progress_lines"

    def __init__(self, parts: int = 20, seconds: float = 15.0):
        self.parts, self.seconds = parts, seconds
        self._told = 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prints when another part of the run is done and there are fresh metrics."""
        step, total = trainer.global_step, trainer.max_steps
        # Only where metrics have just been logged: a line never shows the loss of another step.
        logged: int = getattr(trainer, "log_every_n_steps", 1)
        every = max(1, round(total / self.parts / logged)) * logged
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and step % every == 0:
            self.print(step, total, {k: v for k, v in trainer.progress_bar_metrics.items() if k.startswith("train/")})

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._told = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints what a validation in the course of training has found, under the step whose weights it is of."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
            self.print(trainer.global_step, trainer.max_steps, found)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._told = time.monotonic()

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Prints if it has been quiet for long."""
        self._evaluating("validation", batch_idx, trainer.num_val_batches)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Prints if it has been quiet for long."""
        self._evaluating("test", batch_idx, trainer.num_test_batches)

    def _evaluating(self, what: str, batch_idx: int, batches: Any) -> None:
        if time.monotonic() - self._told >= self.seconds:
            self._told = time.monotonic()
            self._say(f"{what}: {batch_idx + 1} of {sum(batches):,} batches")

    @rank_zero_only
    def _say(self, line: str) -> None:
        print(line, flush=True)

    @rank_zero_only
    def print(self, step: int, total: int, metrics: dict[str, Any]) -> None:
        """One line of progress."""
        shown = [
            f"{SHORT[name]} {value:,.0f}" if name.endswith("per_second") else f"{SHORT[name]} {value:.3f}"
            for name, value in metrics.items()
            if name in SHORT
        ]
        print(f"step {step:>{len(str(total))}}/{total}  " + "  ".join(shown), flush=True)


class Progress(Callback):
    """A bar on a terminal, lines elsewhere."""

    config_name = "progress"

    def __new__(cls) -> Any:
        """One of the two."""
        return Bar(leave=True) if sys.stdout.isatty() else Lines()
