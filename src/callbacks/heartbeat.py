"""Notices within a minute that another process of a run has died, also while this one waits for it on a GPU.

A process that has died leaves the others in an exchange that does not end: over NCCL for as long as the process group's timeout. Here a
thread of each process exchanges a number with all others every few seconds, over TCP between CPUs. The connection to a dead process
breaks, and the thread ends its own with a message and exit status 1. What had been saved is what the run goes on from.
"""

from __future__ import annotations

import os
import sys
import threading
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from src.config import RunError


class RankLost(RunError):
    """An exchange with another process has failed because that one is gone."""

    def __init__(self, rank: int, cause: BaseException):
        reason = str(cause).strip().splitlines()[0][:300]
        super().__init__(
            f"rank {rank}: another process of this run has died or cannot be reached ({reason}). This one stops; what the other "
            "has printed says why. Go on with ckpt_path=auto"
        )


def lost_rank(error: RuntimeError) -> bool:
    """Whether an error is what remains of an exchange with a process that has died."""
    words = (
        "connection closed by peer",
        "connection reset",
        "timed out",
        "broken pipe",
        "socket",
        "remote process exited",
    )
    return isinstance(error, torch.distributed.DistError) or any(word in str(error).lower() for word in words)


class Heartbeat(Callback):
    """See the head of this file; nothing happens in a run of one process.

    Args:
        interval_seconds: between two exchanges.
        timeout_seconds: after which one that does not answer counts as dead. A process that is merely busy answers: its thread does.
    """

    config_name = "heartbeat"

    def __init__(self, interval_seconds: float = 2.0, timeout_seconds: float = 60.0):
        if interval_seconds <= 0 or timeout_seconds <= interval_seconds:
            raise ValueError(
                f"callbacks.heartbeat: interval_seconds={interval_seconds} must be positive and below "
                f"timeout_seconds={timeout_seconds}"
            )
        self.interval, self.timeout = interval_seconds, timeout_seconds
        self._thread: threading.Thread | None = None
        self._over = threading.Event()
        self._aborted = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the thread."""
        if trainer.world_size == 1 or self._thread is not None:
            return
        self._over.clear()
        group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout))
        self._thread = threading.Thread(target=self._beat, args=(group, trainer.global_rank), daemon=True)
        self._thread.start()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """All processes end the exchange together."""
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            self._thread = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """A process that leaves says so no more than one that dies; it must not be the one to call the others dead."""
        self._aborted = True
        self._over.set()
        self._thread = None

    def _beat(self, group: Any, rank: int) -> None:
        while True:
            over = self._over.wait(self.interval)
            if self._aborted:
                return
            leaving = torch.tensor([int(over)])
            try:
                torch.distributed.all_reduce(leaving, group=group)
            except RuntimeError as error:
                if self._aborted or self._over.is_set():
                    return
                print(RankLost(rank, error), file=sys.stderr, flush=True)
                os._exit(1)
            if leaving.item():
                return
