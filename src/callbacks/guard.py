"""Watches loss and gradient: what to do about one that is not finite, or far above what it has been.

    stop       the run ends before the update, with a message; the batch is kept
    skip       the update is left out; training goes on with the next batch
    rollback   back to the newest whole checkpoint from before; when that step comes again, its update is left out
    warn       a message, nothing else

The norm of the gradient is that of the global batch, the same on all processes, so all of them decide alike; a loss that is not
finite on one process makes everybody's gradient so. The batch of a step that was objected to is kept, with its number, under
``bad_batches/`` of the run's folder, of the first ``keep`` such steps: ``replay`` computes its loss again. A level that stays high
after a warning becomes the new normal.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from src.checkpoints.files import newest_whole
from src.checkpoints.plain import is_filled, load_plain
from src.config import ConfigError, RunError
from src.support.files import part_of

log = logging.getLogger(__name__)

LEAST_HISTORY = 32  # steps, before which nothing is called a spike
MOST_LEFT_OUT = 2**14  # steps that the state in a checkpoint may name


class BadStep(RunError):
    """A step whose loss or gradient must not be used; the message says which, why, and how to go on."""


class RollBack(Exception):  # no error, a request
    """Training is to go on from an earlier checkpoint.

    Args:
        checkpoint: the file.
        leave_out: steps, counted from 1, whose updates are left out from now on.
    """

    def __init__(self, checkpoint: Path, leave_out: set[int]):
        super().__init__(f"back to {checkpoint}, leaving out steps {sorted(leave_out)}")
        self.checkpoint, self.leave_out = checkpoint, leave_out


class Guard(Callback):
    """See the head of this file.

    Args:
        nonfinite: what to do about a loss or gradient that is not finite.
        spike: what to do about a loss or norm above mean + ``spike_deviations`` standard deviations of the last ``window`` steps.
        spike_deviations: how far is too far.
        window: steps.
        margin: steps before and after a bad one whose updates a rollback leaves out as well.
        keep: how many batches are kept at most, of each process.
        limit: how many steps may be left out, and how often training may be rolled back, before the run stops all the same.
        folder: of the run; its ``checkpoints`` are what a rollback goes back to.

    Raises:
        ValueError: for numbers out of range.
    """

    config_name = "guard"

    def __init__(
        self,
        folder: str,
        nonfinite: Literal["stop", "skip", "rollback"] = "stop",
        spike: Literal["warn", "stop", "skip", "rollback"] | None = "warn",
        spike_deviations: float = 8.0,
        window: int = 128,
        margin: int = 0,
        limit: int = 20,
        keep: int = 20,
    ):
        numbers = (("window", window, LEAST_HISTORY), ("margin", margin, 0), ("limit", limit, 0), ("keep", keep, 0))
        for name, value, least in numbers:
            if value < least:
                raise ValueError(f"callbacks.guard.{name}={value}: at least {least}")
        if spike_deviations <= 0:
            raise ValueError(f"callbacks.guard.spike_deviations={spike_deviations}: positive")
        self.folder = Path(folder)
        self.nonfinite, self.spike, self.spike_deviations = nonfinite, spike, spike_deviations
        self.window, self.margin, self.limit, self.keep = window, margin, limit, keep
        self.history: dict[str, deque[float]] = {name: deque(maxlen=window) for name in ("loss", "grad_norm")}
        self.leave_out: set[int] = set()
        self.skipped: list[int] = []
        self._batches: list[Any] = []

    # ---- what a step brings ----------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps hold of the micro-batches of the step."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._batches.clear()
        self._batches.append(batch)

    def before_update(self, trainer: Any, optimizer: Any, loss: Tensor, norm: Tensor) -> None:
        """Called by the module with the step's loss (this process's share) and its gradient's norm, before the update.

        Raises:
            BadStep: the run is to stop.
            RollBack: it is to go on from an earlier checkpoint.
        """
        step = trainer.global_step + 1
        if step in self.leave_out:
            self._skip(step, optimizer, "it was objected to before")
            return
        loss = trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean") if trainer.world_size > 1 else loss
        found = {"loss": float(loss), "grad_norm": float(norm)}
        strange = [f"{name} {value}" for name, value in found.items() if not math.isfinite(value)]
        if strange:
            self._object(trainer, optimizer, step, found, self.nonfinite, f"{' and '.join(strange)}")
            return
        limits = {name: self._highest(name) if self.spike is not None else math.inf for name in found}
        strange = [
            f"{name} {value:.4g} after {_mean(self.history[name]):.4g}"
            for name, value in found.items()
            if value > limits[name]
        ]
        if strange:
            self._object(trainer, optimizer, step, found, str(self.spike), f"{' and '.join(strange)}")
            if self.spike != "warn":
                return
        for name, value in found.items():
            # After a warning training goes on, perhaps on another level: it is learnt, but one value alone moves it little.
            self.history[name].append(min(value, limits[name]))

    def _highest(self, name: str) -> float:
        """Above which a value is a spike."""
        history = self.history[name]
        if len(history) < LEAST_HISTORY:
            return math.inf
        mean = _mean(history)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in history) / (len(history) - 1))
        # A loss that hardly moves any more has next to no deviation: what is within a tenth is no spike.
        return mean + max(self.spike_deviations * deviation, 0.1 * abs(mean))

    # ---- what is done about it -------------------------------------------------------------------------------------

    def _object(self, trainer: Any, optimizer: Any, step: int, found: dict[str, float], action: str, why: str) -> None:
        kept = self._keep(trainer, step, found)
        if action == "warn":
            log.warning(f"step {step}: {why}; {kept}")
        elif action == "skip":
            log.warning(f"step {step}: {why}; its update is left out; {kept}")
            self._skip(step, optimizer, why)
        else:
            whole = (
                newest_whole(self.folder / "checkpoints", below=step - self.margin) if trainer.is_global_zero else None
            )
            path = trainer.strategy.broadcast(None if whole is None else str(whole))
            if action == "rollback" and path is not None:
                wanted = self.leave_out | set(range(step - self.margin, step + self.margin + 1))
                if len(wanted) <= self.limit:
                    log.warning(f"step {step}: {why}; back to {path}; {kept}")
                    raise RollBack(Path(path), wanted)
                why += f"; rolled back too often (callbacks.guard.limit={self.limit})"
            older = f" that is {self.margin} steps older (callbacks.guard.margin)" if self.margin else ""
            how = (
                f"go on with ckpt_path={path} and"
                if path
                else f"there is no checkpoint from before{older}: begin again with"
            )
            raise BadStep(
                f"step {step}: {why}. The update was not made; {kept}; {how} "
                "callbacks.guard.nonfinite=skip (or spike=skip) to leave such steps out"
            )

    def _skip(self, step: int, optimizer: Any, why: str) -> None:
        self.skipped.append(step)
        if len(self.skipped) > self.limit:
            raise BadStep(
                f"step {step}: {why}; {len(self.skipped)} updates have been left out, more than "
                f"callbacks.guard.limit={self.limit}: {self.skipped}"
            )
        # Parameters without a gradient are passed over: weights, moments and the step count of the optimizer stay as they are.
        optimizer.zero_grad(set_to_none=True)

    def _keep(self, trainer: Any, step: int, found: dict[str, float]) -> str:
        """Writes the batch of a step down, unless there are enough of them; says where it is."""
        folder, rank = self.folder / "bad_batches", trainer.global_rank
        path = folder / f"step{step:08d}.rank{rank}.pt"
        if not path.exists() and len(list(folder.glob(f"step*.rank{rank}.pt"))) >= self.keep:
            return f"its batch is not kept, {folder} holds {self.keep} (callbacks.guard.keep)"
        batches = [{name: value.cpu() for name, value in batch.items()} for batch in self._batches]
        part = part_of(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save({"step": step, "rank": rank, "batches": batches} | found, part)
            part.replace(path)
        except (OSError, RuntimeError) as error:  # torch says RuntimeError of a full disk
            return f"its batch could not be kept in {folder}: {str(error).splitlines()[0]}"
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        return f"its batch is kept in {path}"

    # ---- over interruptions ----------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Under which a checkpoint holds this callback's state, whatever the class is called."""
        return "Guard"

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to decide as one that was not stopped."""
        history = {name: list(values) for name, values in self.history.items()}
        return {"history": history, "skipped": list(self.skipped), "leave_out": sorted(self.leave_out)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse; steps that are to be left out from now on are added to those before.

        Raises:
            KeyError, TypeError, ValueError: it holds something else.
        """
        for name in self.history:
            self.history[name] = deque(map(float, state_dict["history"][name]), maxlen=self.window)
        self.skipped = list(map(int, state_dict["skipped"]))
        if (
            len(state_dict["leave_out"]) > MOST_LEFT_OUT
        ):  # numbers that all have one hash would take for ever to be a set
            raise ValueError(f"its state leaves out more than {MOST_LEFT_OUT:,} steps")
        self.leave_out |= set(map(int, state_dict["leave_out"]))


def _mean(values: deque[float]) -> float:
    return sum(values) / len(values)


def replay(path: str | Path, net: Any) -> float:
    """The mean loss per target of a kept batch, in nats, under a model.

    Args:
        path: a file of ``bad_batches/``.
        net: the model, such as ``load_model`` of a checkpoint from before the step.

    Raises:
        ConfigError: the file is no kept batch, or not one of this model's; it may come from a stranger.
    """
    batches = _kept_batches(Path(path), net)
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            is_target = batch["loss_mask"][:, 1:]
            segments = batch.get("segments")
            logits = net(
                batch["tokens"][:, :-1], segments=None if segments is None else segments[:, :-1], select=is_target
            )
            targets = batch["tokens"][:, 1:][is_target]
            total += torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum").item()
            count += targets.numel()
    return total / max(count, 1)


def _kept_batches(path: Path, net: Any) -> list[dict[str, Tensor]]:
    """The micro-batches that a file holds; ConfigError unless each is what the model can read."""
    if not path.is_file():
        raise ConfigError(f"{path}: no batch that a guard has kept; there is no such file")
    try:
        kept = load_plain(path)
    except Exception as error:  # bytes that are no such file can mean anything
        why = (str(error).splitlines() or [""])[0][:200]
        raise ConfigError(
            f"{path}: no batch that a guard has kept; it cannot be opened as plain data: {why}"
        ) from error
    if not isinstance(kept, dict) or "batches" not in kept:
        holds = json.dumps(sorted(map(str, kept))) if isinstance(kept, dict) else f"a {type(kept).__name__}"
        raise ConfigError(f"{path}: no batch that a guard has kept; it holds {holds[:500]}")
    batches = kept["batches"]
    if not isinstance(batches, list):
        raise ConfigError(f"{path}: no batch that a guard has kept; its 'batches' are a {type(batches).__name__}")
    for number, batch in enumerate(batches):
        fault = _fault_of(batch, net.vocab_size)
        if fault is not None:
            raise ConfigError(f"{path}: no batch that a guard has kept for this model: in batch {number}, {fault}")
    return batches


def _fault_of(batch: Any, vocab_size: int) -> str | None:
    """Why a model of this vocabulary cannot read a batch, in words; None if it can."""
    if not isinstance(batch, dict):
        return f"there is a {type(batch).__name__}"
    kinds = {"tokens": torch.int64, "loss_mask": torch.bool, "segments": torch.int64}
    for name, kind in kinds.items():
        value = batch.get(name)
        if value is None and name == "segments":
            continue
        if not isinstance(value, Tensor) or value.dtype != kind or value.ndim != 2 or not is_filled(value):
            return f"{name!r} is no tensor [B, L] of {str(kind).removeprefix('torch.')}"
        if value.shape != batch["tokens"].shape:  # those of the tokens themselves come first
            return f"{name!r} has shape {list(value.shape)}, but 'tokens' {list(batch['tokens'].shape)}"
    tokens = batch["tokens"]
    if tokens.shape[0] < 1 or tokens.shape[1] < 2:
        return f"'tokens' has shape {list(tokens.shape)}: there is nothing to predict"
    # On a GPU, an id out of range would end the process.
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
        return f"ids are {int(tokens.min())}..{int(tokens.max())}, those of the model 0..{vocab_size - 1}"
    return None
