"""Stops a run in time: at a signal, or before its wall time ends, it writes a checkpoint and exits with a status that asks for more.

    SIGTERM, SIGUSR1      what SLURM, Kubernetes and cloud machines send before they end a process; exit status 75
    SIGINT                Ctrl-C; exit status 130. A second one does not wait for the step to end
    wall time             ``max_minutes``, or the end of the SLURM job (SLURM_JOB_END_TIME), less ``margin_minutes``; 75

All processes of a run stop after the same optimizer step, whichever of them has heard of it: they agree once a step by a number
that travels between CPUs (no device waits for it). ``ckpt_path=auto`` goes on at the very next step. Before and after training there is
nothing to be saved, and a process stops at once (``at_once``).
"""

from __future__ import annotations

import logging
import os
import signal
import time
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from src.callbacks.checkpoints import Checkpoints
from src.support.signals import answered

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: try again later
ASKED_BY_HAND = 130  # what shells make of Ctrl-C

log = logging.getLogger(__name__)


class Preempted(SystemExit):
    """The run has stopped on request, its state is on the disk."""

    def __init__(self, message: str, status: int = REQUEUE):
        super().__init__(status)
        self.message = message


def at_once() -> AbstractContextManager[None]:
    """While this lasts and no training says otherwise, SIGTERM and SIGUSR1 end the process where it is, with status 75."""
    return answered(_leave, signal.SIGTERM, signal.SIGUSR1)


def _leave(number: int, _: Any) -> None:
    message = f"{signal.Signals(number).name}: stopped outside of training"
    log.warning(message)
    raise Preempted(message)


class Preemption(Callback):
    """See the head of this file.

    Args:
        max_minutes: wall time of this attempt, from the start of the process; None for no limit but SLURM's.
        margin_minutes: how long before the limit to stop: a checkpoint and a validation must fit.

    Raises:
        ValueError: for a limit that leaves no time, or a negative margin.
    """

    config_name = "preemption"

    def __init__(self, max_minutes: float | None = None, margin_minutes: float = 5.0):
        if margin_minutes < 0:
            raise ValueError(f"callbacks.preemption.margin_minutes={margin_minutes}: at least 0")
        if max_minutes is not None and max_minutes <= margin_minutes:
            raise ValueError(
                f"callbacks.preemption.max_minutes={max_minutes}: more than margin_minutes={margin_minutes}, or null"
            )
        self.deadline = _deadline(max_minutes, margin_minutes)
        self.signal: int | None = None
        self._listening = ExitStack()
        self._group: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listens to signals, in place of Lightning, which would exchange tensors inside of a handler."""
        if trainer.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")
        self._listening.enter_context(answered(self._note, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What comes now ends the test at once; Lightning's own answer to SIGTERM would be to end it as if it had passed."""
        self._listening.enter_context(at_once())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a whole optimizer step: stops if any process has been asked to.

        Raises:
            Preempted: once the checkpoint is written.
        """
        if (batch_idx + 1) % trainer.accumulate_grad_batches or trainer.global_step >= trainer.max_steps:
            return
        asked = self._asked()
        if asked is None:
            return
        path = save_now(trainer)
        message = f"{asked}: stopped after step {trainer.global_step} of {trainer.max_steps}, "
        message += f"which is kept in {path}" if path else "without a checkpoint (there is no checkpoint callback)"
        log.warning(message)
        raise Preempted(message, ASKED_BY_HAND if asked == signal.SIGINT.name else REQUEUE)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Gives the signals back."""
        self._listening.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """The same, where training ends otherwise."""
        self.teardown(trainer, pl_module, "fit")

    def _note(self, number: int, _: Any) -> None:
        self.signal = number
        if number == signal.SIGINT:
            log.warning("stopping after this step, with a checkpoint; press Ctrl-C again to stop at once")
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _asked(self) -> str | None:
        """Why all processes are to stop now, or None; the same answer on all of them."""
        late = self.deadline is not None and time.time() >= self.deadline
        own = self.signal or (-1 if late else 0)
        if self._group is not None:
            everyone = torch.tensor([max(own, 0), int(late)])
            torch.distributed.all_reduce(everyone, torch.distributed.ReduceOp.MAX, group=self._group)
            own = int(everyone[0]) or (-1 if everyone[1] else 0)
        if own == 0:
            return None
        return signal.Signals(own).name if own > 0 else "the wall time ends"


def save_now(trainer: L.Trainer) -> str | None:
    """Has the run's own checkpoint callback save this step, so that it also looks after the file later.

    Returns:
        The file, whole on the disk; None where there is no such callback.
    """
    callback = next(
        (c for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints) and c.monitor == "step"), None
    )
    if callback is None:
        return None
    path = callback.save_now(trainer)
    wait_for_files(trainer)
    trainer.strategy.barrier()
    return path


def wait_for_files(trainer: Any) -> None:
    """Returns when checkpoints that are written in the background are whole."""
    wait = getattr(trainer.strategy.checkpoint_io, "wait", None)
    if wait is not None:
        wait()


def _deadline(max_minutes: float | None, margin_minutes: float) -> float | None:
    ends = [] if max_minutes is None else [time.time() + 60 * max_minutes]
    if (slurm := os.environ.get("SLURM_JOB_END_TIME", "")).isdigit():
        ends.append(float(slurm))
    return min(ends) - 60 * margin_minutes if ends else None
