"""Where the time of a few steps goes: a trace for chrome://tracing or ui.perfetto.dev, and a table of the costliest kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile, schedule


class Profile(Callback):
    """Profiles ``steps`` batches after ``wait`` others; writes ``trace.rank0.json.gz`` and ``kernels.rank0.txt``.

    Args:
        folder: where to.
        wait: batches before, in which kernels are compiled and tuned.
        steps: batches that are traced.
        rows: of the table.
    """

    config_name = "profile"

    def __init__(self, folder: str, wait: int = 5, steps: int = 3, rows: int = 40):
        for name, value, least in (("wait", wait, 1), ("steps", steps, 1), ("rows", rows, 1)):
            if value < least:
                raise ValueError(f"callbacks.profile.{name}={value}: at least {least}")
        self.folder, self.wait, self.steps, self.rows = Path(folder), wait, steps, rows
        self._profile: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts counting."""
        cuda = trainer.strategy.root_device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        rank, by = trainer.global_rank, "self_cuda_time_total" if cuda else "self_cpu_time_total"

        def write(finished: Any) -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            finished.export_chrome_trace(str(self.folder / f"trace.rank{rank}.json.gz"))
            table = finished.key_averages().table(sort_by=by, row_limit=self.rows, max_name_column_width=80)
            (self.folder / f"kernels.rank{rank}.txt").write_text(table + "\n")

        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=self.wait - 1, warmup=1, active=self.steps, repeat=1),
            on_trace_ready=write,
            record_shapes=True,
            profile_memory=True,
        )
        self._profile.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts."""
        if self._profile is not None:
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.synchronize(trainer.strategy.root_device)
            self._profile.step()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends a trace that is still open."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
