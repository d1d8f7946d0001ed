"""Training from the start or a checkpoint to its end, and why it ended.

    as planned     ``trainer.max_steps`` optimizer steps
    otherwise      a callback stopped it (early stopping), its time was up (``trainer.max_time``), or its epochs were over

Whatever the reason, the last step is validated, so that validation and test scores are of the same weights, and ``final.ckpt`` says that
training is over: a run that is killed in its test is only tested when it is started again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.loops.fit_loop import _FitLoop as _LightningFitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from src.callbacks.heartbeat import RankLost, lost_rank
from src.callbacks.preemption import Preempted, wait_for_files
from src.config import RunError
from src.datamodules.base import StreamDataModule
from src.modules.language_model import LanguageModel, epoch_of, is_last, is_validated
from src.support.errors import printable

log = logging.getLogger(__name__)


def fit(
    trainer: L.Trainer,
    module: LanguageModel,
    datamodule: StreamDataModule,
    checkpoint: str | None,
    output_dir: Path,
    planned: int,
) -> None:
    """Trains, and writes ``checkpoints/final.ckpt``; an interruption says how to go on.

    Args:
        trainer: with the run's callbacks and loggers.
        module: what is trained; ``module.ended`` says afterwards how training ended.
        datamodule: its data.
        checkpoint: to go on from.
        output_dir: of the run.
        planned: optimizer steps of the whole run.

    Raises:
        RankLost: another process of the run has died.
        RunError: a data worker has died, or there is no room for the final checkpoint.
    """
    folder = output_dir / "checkpoints"
    finish = cache(partial(_finish, trainer, module, folder / "final.ckpt", planned))  # once
    trainer.fit_loop.__class__ = _FitLoop
    trainer.fit_loop.before_end = finish  # type: ignore[attr-defined]
    trainer.fit_loop.epoch_loop.__class__ = _EpochLoop
    try:
        trainer.fit(module, datamodule, ckpt_path=checkpoint, weights_only=True)
    except Preempted:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError, ArithmeticError) as error:
        if checkpoint is not None and module.began and trainer.global_step == module.began_at:
            error.add_note(f"This was the first step after {checkpoint}, and may be the fault of what that holds.")
        if checkpoint is None or module.began:
            raise
        raise _not_gone_on_from(checkpoint, error) from error
    except (RuntimeError, ConnectionError, EOFError) as error:
        if (told := _told(error, trainer, module, datamodule, checkpoint)) is not None:
            raise told from error
        raise
    except SystemExit:  # how Lightning ends after Ctrl-C
        kept = folder / "last.ckpt"
        advice = (
            f"the newest checkpoint is {kept.resolve().name}" if kept.exists() else "no checkpoint had been written yet"
        )
        log.warning(f"interrupted at step {trainer.global_step} of {trainer.max_steps}; {advice}")
        raise
    finish()  # unless the loop has: where there was nothing to be trained, it does not
    wait_for_files(trainer)
    if getattr(trainer.strategy.checkpoint_io, "failed", None):
        raise RunError(f"no room for the final checkpoint in {folder}; free some and go on with ckpt_path=auto")


def _told(
    error: Exception, trainer: L.Trainer, module: LanguageModel, datamodule: StreamDataModule, checkpoint: str | None
) -> RunError | None:
    """What an error of the machine, of another process, or of PyTorch's own loading means; None for one that speaks for itself."""
    # PyTorch says one or the other, depending on what it was waiting for when the process died.
    if datamodule.num_workers and (not isinstance(error, RuntimeError) or "DataLoader worker" in str(error)):
        return RunError(
            f"a DataLoader worker, a process that prepares batches, has died ({error}); out of memory is the usual reason. Go on "
            "with ckpt_path=auto; data.num_workers=0 prepares batches in the training process"
        )
    if not isinstance(error, RuntimeError) or isinstance(error, RunError | torch.OutOfMemoryError):
        return None
    if trainer.world_size > 1 and lost_rank(error):
        return RankLost(trainer.global_rank, error)
    return None if checkpoint is None or module.began else _not_gone_on_from(checkpoint, error)


def _not_gone_on_from(checkpoint: str, error: Exception) -> RunError:
    """It was whole, and yet the weights or states in it are not those of this trainer's parts."""
    reason = printable(" ".join(str(error).split())[:1000])
    return RunError(f"checkpoint {checkpoint} cannot be gone on from: {type(error).__name__}: {reason}")


def _finish(trainer: L.Trainer, module: LanguageModel, path: Path, planned: int) -> None:
    """Notes how training ended, and writes the final checkpoint."""
    module.ended = ending(trainer, planned)
    if module.ended["why"] != PLANNED:
        log.warning(f"training ended after step {module.ended['step']} of {planned}: {module.ended['why']}")
    trainer.save_checkpoint(path)
    log_at_step(trainer, trainer.global_step)


PLANNED = "as planned"


def ending(trainer: L.Trainer, planned: int) -> dict[str, Any]:
    """How training ended: ``step``, ``planned`` (steps) and ``why``, in words.

    Args:
        trainer: whose training has ended.
        planned: optimizer steps of the whole run.
    """
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    dry: Any = getattr(trainer, "fast_dev_run", False)
    epochs: Any = trainer.fit_loop.epoch_progress.current
    why = PLANNED
    if trainer.global_step < planned:
        reasons = [f"{type(c).__name__}: {c.stopping_reason_message}" for c in callbacks if _has_stopped(c)]
        if any(isinstance(c, Timer) and (c.time_remaining() or 0) <= 0 for c in callbacks):
            why = "the time that it was given is over (trainer.max_time, or a Timer among callbacks)"
        elif dry:
            why = f"trainer.fast_dev_run={dry} ended it"
        elif epochs.processed >= (trainer.max_epochs or -1) > 0:
            why = f"trainer.max_epochs={trainer.max_epochs} are over"
        elif trainer.should_stop:
            why = "; ".join(reasons) or "a callback stopped it"
        else:
            why = "the trainer's limits (trainer.fast_dev_run, trainer.limit_train_batches) ended it"
    return {"step": trainer.global_step, "planned": planned, "why": why}


def _has_stopped(callback: Any) -> bool:
    return isinstance(callback, EarlyStopping) and callback.stopping_reason_message is not None


def log_at_step(trainer: L.Trainer, step: int) -> None:
    """Under which step Lightning logs what follows, a test say: it knows only of steps that it has seen itself.

    Args:
        trainer: that logs.
        step: how many are done; loggers count them from 0.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = max(step - 1, 0)
    trainer.fit_loop.epoch_progress.current.completed = epoch_of(trainer, step)


class _FitLoop(_LightningFitLoop):
    before_end: Callable[[], None]

    def on_advance_end(self) -> None:
        """Callbacks are told of the end of an epoch, also of one that training breaks off, which a longer run would not have had there."""
        limit: Any = self.trainer.limit_train_batches
        if not isinstance(limit, int) or self.trainer.global_step * self.trainer.accumulate_grad_batches % limit:
            self.trainer.lightning_module.note_extra_validation()  # type: ignore[operator, union-attr]
        super().on_advance_end()

    def on_run_end(self) -> None:
        """Writes the final checkpoint first: then what averages weights replaces those that training would go on with by the averages.

        Before that, validates a last step after which a callback has stopped training too late for Lightning to do so.
        """
        module: Any = self.trainer.lightning_module
        if self.trainer.enable_validation and module.validated_step != self.trainer.global_step:
            module.note_extra_validation()
            self.epoch_loop._batches_that_stepped = self.trainer.global_step - 1
            module.validate_now(epoch_of(self.trainer, self.trainer.global_step))
        self.before_end()
        super().on_run_end()

    @property
    def done(self) -> bool:
        """Lightning's own leaves out the end of an epoch of which a checkpoint holds all steps, and with it a validation that is due."""
        epoch: Any = self.epoch_progress.current
        return super().done and epoch.processed >= epoch.started


class _EpochLoop(_TrainingEpochLoop):
    @property
    def done(self) -> bool:
        """Training ends after whole optimizer steps only: gradients of a part of one are in no checkpoint."""
        return super().done and not self._is_within_a_step()

    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
        """The last step of all is validated too, whatever ``val_check_interval`` says, as is the one after which a callback stops."""
        if self._is_within_a_step() or not self.trainer.enable_validation:
            return False
        trainer: Any = self.trainer
        clock = trainer._val_check_time_interval
        late = clock is not None and time.monotonic() - trainer._last_val_time >= clock
        if late or is_validated(trainer, self.total_batch_idx + 1):
            return True
        stopped = self.trainer.should_stop and self.trainer.fit_loop._can_stop_early
        if stopped or is_last(self.trainer, self.total_batch_idx + 1):
            self.trainer.lightning_module.note_extra_validation()  # type: ignore[operator, union-attr]
            return True
        return False

    def on_advance_end(self, data_fetcher: Any) -> None:
        """What is logged belongs to the step that has just ended, also where a checkpoint of a validation leads right into it."""
        if not self._is_within_a_step():
            self._batches_that_stepped = self.global_step - 1
        super().on_advance_end(data_fetcher)

    def _is_within_a_step(self) -> bool:
        return self._should_accumulate()

    def reset(self) -> None:
        """Lightning adds one to the number of steps that it has logged, also after a checkpoint that had counted them all."""
        super().reset()
        self._batches_that_stepped = self.global_step
