"""What training costs: tokens per second, share of the device's peak, memory, and the share of time spent waiting for data.

Evaluation and checkpointing are not counted.

    train/tokens_per_second   of all processes together, over the steps since the last log
    train/mfu                 model FLOPs utilisation (PaLM, appendix B): 3 x forward FLOPs a token x tokens/s over the devices' peak
    train/memory_gib          most memory that PyTorch had in use on this device, so far
    train/data_wait           share of the time between the end of one step and the arrival of the next batch
"""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from src.modules.language_model import is_log_step

# Dense 16-bit products with sums in 32 bits, operations per second, from the makers' data sheets (halved where sparsity is advertised).
PEAKS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A40": 150e12,
    "L40S": 362e12,
    "L40": 181e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
}

MOST = 1e30  # of anything that is counted


def peak_flops(device: torch.device) -> float | None:
    """Of a CUDA device in 16-bit products, operations per second; None where it is not known."""
    if device.type != "cuda":
        return None
    words = set(torch.cuda.get_device_name(device).replace("-", " ").split())  # an RTX A4000 is no A40
    return next((peak for name, peak in PEAKS.items() if words.issuperset(name.split())), None)


class Throughput(Callback):
    """See the head of this file.

    Counts every token that the model read (a window's last is only predicted), whether or not its loss counts. ``rate`` is that of the
    whole run, interruptions included; of each attempt the first logging interval (compilation, warm-up) is left out if there is another.
    ``mfu`` and ``data_wait`` likewise. FLOPs are those of a forward pass with logits for every token; where only some are predicted,
    fewer are computed (a tenth fewer on small synthetic tasks), so ``mfu`` is an upper bound there.

    Args:
        peak: operations per second of one device; None for what is known of it, and no utilisation if nothing is.
    """

    config_name = "throughput"

    def __init__(self, peak: float | None = None) -> None:
        if peak is not None and peak <= 0:
            raise ValueError(f"callbacks.throughput.peak={peak}: operations per second, positive, or null")
        self.peak = peak
        self.tokens, self.seconds, self.waited, self.started, self.ended = 0, 0.0, 0.0, 0.0, 0.0
        self.intervals: list[tuple[int, float, float]] = []  # tokens of all ranks, seconds, of them waiting for data
        self._before = (0, 0.0, 0.0)  # the same of earlier attempts, in all
        self._operations = 0.0  # per token and device-peak second, of the latest run

    @property
    def rate(self) -> float | None:
        """Tokens per second of the run so far; None before the first log."""
        tokens, seconds, _ = self._counted()
        return tokens / seconds if seconds else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation of the run so far; None where the device's peak is not known."""
        return None if self.rate is None or not self._operations else self.rate * self._operations

    @property
    def data_wait(self) -> float | None:
        """Share of the time spent waiting for data; None before the first log."""
        _, seconds, waited = self._counted()
        return waited / seconds if seconds else None

    def _counted(self) -> tuple[int, float, float]:
        counted = [self._before, *self.intervals[1:]]
        if not any(tokens for tokens, _, _ in counted):
            counted = self.intervals
        return sum(c[0] for c in counted), sum(c[1] for c in counted), sum(c[2] for c in counted)

    @property
    def state_key(self) -> str:
        """Under which a checkpoint holds this callback's state, whatever the class is called."""
        return "Throughput"

    def state_dict(self) -> dict[str, Any]:
        """What has been counted so far."""
        tokens, seconds, waited = self._counted()
        return {"tokens": tokens, "seconds": seconds, "waited": waited, "operations": self._operations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse; counting goes on from there.

        Raises:
            KeyError, TypeError, ValueError: it holds something else, or numbers that no run counts to.
        """
        counted = {name: state_dict[name] for name in ("tokens", "seconds", "waited", "operations")}
        if odd := next((name for name, number in counted.items() if not 0 <= number < MOST), None):
            raise ValueError(f"the state of Throughput has {odd!r} that is not from 0 to {MOST:.0e}")
        self._before = (int(counted["tokens"]), float(counted["seconds"]), float(counted["waited"]))
        self._operations = float(counted["operations"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Learns what a token costs."""
        peak = self.peak or peak_flops(trainer.strategy.root_device)
        datamodule: Any = getattr(trainer, "datamodule", None)
        if peak is not None and datamodule is not None:
            net: Any = pl_module.net
            self._operations = 3 * net.flops_per_token(datamodule.window - 1) / (peak * trainer.world_size)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts the clock, unless it runs since the last batch (so that waiting for data counts)."""
        now = time.perf_counter()
        if self.started and self.ended:
            self.waited += now - self.ended
        self.started = self.started or now

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts, and logs at the trainer's logging interval."""
        self.tokens += batch["tokens"][:, 1:].numel()
        self.ended = time.perf_counter()
        if (batch_idx + 1) % trainer.accumulate_grad_batches or not is_log_step(trainer, trainer.global_step):
            return
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._stop()
        if self.seconds > 0:
            tokens = self.tokens * trainer.world_size // getattr(trainer.strategy, "tensor_parallel", 1)
            self.intervals.append((tokens, self.seconds, self.waited))
            logged = {"tokens_per_second": tokens / self.seconds, "data_wait": self.waited / self.seconds}
            if self._operations:
                logged["mfu"] = tokens / self.seconds * self._operations
            if device.type == "cuda":
                logged["memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            for name, value in logged.items():
                pl_module.log(f"train/{name}", torch.tensor(value), prog_bar=name == "tokens_per_second")
        self.tokens, self.seconds, self.waited = 0, 0.0, 0.0
        self.started = self.ended = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops the clock."""
        self._stop()

    def do_not_count(self, seconds: float) -> None:
        """Leaves out time that has just passed."""
        self.started += seconds if self.started else 0.0
        self.ended += seconds if self.ended else 0.0

    def _stop(self) -> None:
        if self.started:
            self.seconds += time.perf_counter() - self.started
            self.started = self.ended = 0.0
