"""May a run go on from a checkpoint, or would it be another run under the same name?

All that names a computation (``src/config/identity.py``) must be the same on both sides, except for what is listed here: how the
same steps are computed, how many there are, and how they are watched. What differs all the same is said.
"""

from __future__ import annotations

import logging
import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from src.checkpoints.files import CheckpointError
from src.config.identity import computed, described
from src.support.errors import printable

log = logging.getLogger(__name__)

_REPEAT = "Repeat that run's own overrides; its folder keeps them in .hydra/overrides.yaml"
_MOST_TOLD, _LONGEST_TOLD = 50, 300  # settings that differ, and letters of a value, that a message names

# Shell patterns of keys, each for itself and all below it.
MAY_DIFFER = (
    # On what the same steps are computed, and by which kernels.
    *(f"trainer.{key}" for key in ("accelerator", "devices", "num_nodes", "strategy", "accumulate_grad_batches")),
    *(f"trainer.{key}" for key in ("use_distributed_sampler", "benchmark", "deterministic", "detect_anomaly")),
    *("compile", "optimizer.fused", "loss.fused", "model.*.backend", "model.*backend"),
    # How many steps there are.
    *(f"trainer.{key}" for key in ("max_steps", "max_epochs", "max_time", "min_steps", "min_epochs")),
    *("trainer.limit_train_batches", "scheduler.total_steps"),
    # How they are watched and scored.
    *(f"trainer.{key}" for key in ("val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps")),
    *("trainer.limit_val_batches", "trainer.limit_test_batches", "trainer.enable_*", "trainer.inference_mode"),
    *("train", "test", "data.num_workers", "data.cache_dir", "data.path", "data.eval_batch_size"),
    *("data.val_windows", "data.test_windows", "data.val_answers", "data.test_answers"),
    # What is done about a bad step is decided when there is one.
    "callbacks.guard",
)
# What a callback that ends training by a validation's metric depends on: what is read, and after which steps.
_VALIDATED = ("trainer.limit_val_batches", "data.val_windows", "data.val_answers")
_INTERVALS = ("val_check_interval", "check_val_every_n_epoch", "limit_train_batches", "accumulate_grad_batches")
# What ends training; a run that was over under other values of these may have more to do.
ENDS = ("trainer.max_steps", "trainer.max_epochs", "trainer.max_time", "trainer.limit_train_batches", "callbacks")
# What decides about the outcome of an evaluation besides the weights.
SCORING = (
    "data.val_windows",
    "data.test_windows",
    "data.val_answers",
    "data.test_answers",
    "trainer.limit_val_batches",
)
# Where evaluation is limited to some batches, so does what makes a batch of them.
_BATCHING = ("data.eval_batch_size", "trainer.devices", "trainer.num_nodes", "trainer.strategy")


def check_same_run(
    checkpoint: dict[str, Any], plain: dict[str, Any], path: str | Path, *, over: bool = False, train: bool = True
) -> None:
    """Raises a CheckpointError that names every setting in which the run of a checkpoint differs from this one and must not.

    Args:
        checkpoint: as ``read_checkpoint`` returns it.
        plain: the configuration of this run, with ``model.vocab_size`` filled in.
        path: of the checkpoint, for the message.
        over: nothing will be trained any more: what decides about steps cannot be changed then.
        train: it is to be trained, not only tested.
    """
    if train and not over and plain["trainer"].get("overfit_batches"):
        raise CheckpointError(
            f"ckpt_path={path}: trainer.overfit_batches={plain['trainer']['overfit_batches']} begins again with the first batches, which "
            "going on in the middle does not; leave out ckpt_path"
        )
    differing = differences(checkpoint["config"], plain)
    free = {key for key in differing if _is_under(key, MAY_DIFFER)}
    if any(str((node or {}).get("monitor")).startswith("val/") for node in (plain.get("callbacks") or {}).values()):
        # Scores of other questions do not compare; where batches are limited, what makes a batch decides which are asked.
        limited = plain["trainer"].get("limit_val_batches") is not None
        free -= {key for key in differing if _is_under(key, _VALIDATED + (_BATCHING if limited else ()))}
    if _listens(plain):
        free -= {key for key in differing if _is_under(key, _VALIDATED)}
        if _validation_steps(checkpoint["config"]) != _validation_steps(plain):
            free -= {f"trainer.{key}" for key in _INTERVALS}
    if over or _has_skipped(checkpoint):  # a guard that has left out updates has left its mark on the weights
        free -= {key for key in differing if _is_under(key, ("callbacks",))}
    if over:
        free -= {key for key in differing if _is_under(key, ENDS) or key.startswith("scheduler.")}
    if str((checkpoint.get("ended") or {}).get("why")).startswith("trainer.max_epochs"):
        # Lightning's count of epochs begun does not go on from one that has ended.
        free -= {key for key in differing if _is_under(key, ("trainer.max_epochs", "trainer.limit_train_batches"))}
    refused = {key: pair for key, pair in differing.items() if key not in free}
    if refused:
        raise CheckpointError(
            f"ckpt_path={path} was trained with other settings than this run has: {_told(refused)}. {_REPEAT}"
        )
    if said := {key: pair for key, pair in differing.items() if not key.startswith("scheduler.")}:
        log.warning(f"going on with other settings than before: {_told(said)}")
    if train and "scheduler.total_steps" in differing:
        before, now = differing["scheduler.total_steps"]
        log.warning(
            f"resuming a run whose schedule was one of {_cut(before)} steps with one of {now}: the learning rate follows it from here"
        )


def _listens(plain: dict[str, Any]) -> bool:
    """Whether there is a callback that counts (``config/identity.py``) and looks at a metric: it does so when the run is validated."""
    return any((node or {}).get("monitor") for node in computed(plain).get("callbacks", {}).values())


def _validation_steps(plain: dict[str, Any]) -> tuple[Any, ...]:
    """Every how many optimizer steps, or epochs of how many, a run is validated: intervals count micro-batches."""
    every, epochs, limit, micro = (plain["trainer"].get(key) for key in _INTERVALS)
    numbers = [x / (micro or 1) if isinstance(x, int) and isinstance(micro, int | None) else x for x in (every, limit)]
    return (*numbers, epochs)


def _has_skipped(checkpoint: dict[str, Any]) -> bool:
    states = checkpoint.get("callbacks") or {}
    return any(isinstance(state, dict) and state.get("skipped") for state in states.values())


def continued_from(checkpoint: dict[str, Any], plain: dict[str, Any]) -> list[dict[str, Any]]:
    """What to note of a checkpoint of a run with another number of steps, or another schedule: its weights have seen another schedule.

    Runs that have been continued so bear the hash of the longer run; the note tells them from one that was that long from the start.
    """
    then, now = (
        (config["trainer"].get("max_steps"), (config.get("scheduler") or {}).get("total_steps"))
        for config in (checkpoint["config"], plain)
    )
    return [] if then == now else [{"step": checkpoint["global_step"], "planned": then[0], "schedule": then[1]}]


def is_scored_otherwise(checkpoint: dict[str, Any], plain: dict[str, Any]) -> bool:
    """Whether the validation that a checkpoint remembers would have another outcome now."""
    limited = any(
        config["trainer"].get(f"limit_{split}_batches") is not None
        for config in (checkpoint["config"], plain)
        for split in ("val", "test")
    )
    return any(
        _is_under(key, SCORING + (_BATCHING if limited else ())) for key in differences(checkpoint["config"], plain)
    )


def check_steps_left(checkpoint: dict[str, Any], plain: dict[str, Any], path: str | Path, *, own: bool) -> None:
    """Raises a CheckpointError when a checkpoint leaves nothing to train.

    ``own``: it is in the run's own folder. There one of the very last step is no mistake: the run was stopped in its test.
    """
    step, last = checkpoint["global_step"], plain["trainer"]["max_steps"]
    if step > last or (step == last and not own):
        raise CheckpointError(
            f"ckpt_path={path} is at step {step}, and trainer.max_steps={last}: nothing is left to train. "
            "Raise trainer.max_steps, or test it with train=false"
        )
    limit, epochs = plain["trainer"].get("limit_train_batches"), plain["trainer"].get("max_epochs")
    batches = step * (plain["trainer"].get("accumulate_grad_batches") or 1)
    if isinstance(limit, int) and isinstance(epochs, int) and 0 < epochs * limit < batches:
        raise CheckpointError(
            f"ckpt_path={path} is at step {step}, in epoch {batches // limit + 1}, and trainer.max_epochs={epochs}: nothing is left to "
            "train. Raise trainer.max_epochs, or test it with train=false"
        )
    if not own and is_over(checkpoint, plain):
        why = printable(str(checkpoint["ended"].get("why"))[:200])
        raise CheckpointError(
            f"ckpt_path={path}: training ended after step {step} ({why}), and would end there again: nothing is left to train. "
            "Test it with train=false, or change what ended it"
        )


def is_over(checkpoint: dict[str, Any], plain: dict[str, Any]) -> bool:
    """Whether a checkpoint was written when training had ended, and what ended it would end it again."""
    return bool(checkpoint.get("ended")) and not any(
        _is_under(key, ENDS) for key in differences(checkpoint["config"], plain)
    )


def check_same_model(checkpoint: dict[str, Any], plain: dict[str, Any], path: str | Path) -> None:
    """Raises a CheckpointError naming every setting in which a checkpoint's model differs from the one to be tested."""
    differing = {
        key: pair
        for key, pair in differences(checkpoint["config"], plain).items()
        if (key.startswith("model.") or key == "seed") and not _is_under(key, MAY_DIFFER)
    }
    if differing:
        raise CheckpointError(
            f"ckpt_path={path} holds another model than this run builds: {_told(differing)}. {_REPEAT}"
        )


def check_same_data(checkpoint: dict[str, Any], fingerprint: dict[str, Any], path: str | Path) -> None:
    """Raises a CheckpointError when the data is not what the checkpoint was trained on (another corpus, another tokeniser)."""
    theirs, ours = _flatten(checkpoint["data"] or {}), _flatten(fingerprint)
    # What an older version had not written down cannot be compared.
    if differing := {
        key: pair for key, pair in _pairs(theirs, ours).items() if key in theirs or not checkpoint["data"]
    }:
        raise CheckpointError(
            f"ckpt_path={path} was trained on other data than there is here: {_told(differing)}. If files have changed, restore them; "
            f"else repeat that run's own overrides, which its folder keeps in .hydra/overrides.yaml. (evaluate.py: data=... says what to "
            "score)"
        )


def recut(checkpoint: dict[str, Any], micro: int) -> None:
    """Counts the batches of a checkpoint as micro-batches of another size: a step ends after every ``micro`` of them.

    Lightning counts micro-batches, and takes the count over: after five steps of one it would take the first step of four to have had
    one already.

    Args:
        checkpoint: of which ``loops`` are changed.
        micro: micro-batches a step from now on.

    Raises:
        ValueError: its batches are not those of its steps.
    """
    progress = (checkpoint.get("loops") or {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
    steps = checkpoint["global_step"]
    if not steps or progress is None:
        return
    before, rest = divmod(progress["total"]["ready"], steps)
    if rest or not before:
        raise ValueError(f"it counts {progress['total']['ready']} batches for {steps} steps")
    for count in (progress["total"], progress["current"]):
        # What is behind the others by one is so for a reason: the checkpoint was written while a batch was being ended.
        behind = {name: count["ready"] - value for name, value in count.items()}
        ready = count["ready"] // before * micro
        count.update({name: ready - by for name, by in behind.items()})


def set_epoch(checkpoint: dict[str, Any], limit: int | None, micro: int) -> None:
    """Counts the epochs of a checkpoint by its step alone: Lightning counts one that training broke off as a whole one.

    Where the step ends an epoch, one of which Lightning has told the callbacks is behind, and the next one begins.

    Args:
        checkpoint: of which ``loops`` are changed.
        limit: batches of an epoch; None: there is one epoch, which never ends.
        micro: batches of a step.
    """
    loop = (checkpoint.get("loops") or {}).get("fit_loop", {})
    epochs, batches = (loop.get(key) for key in ("epoch_progress", "epoch_loop.batch_progress"))
    if not epochs or not batches or not checkpoint["global_step"]:
        return
    over, within = divmod(checkpoint["global_step"] * micro, limit) if limit else (0, checkpoint["global_step"] * micro)
    told = epochs["current"]["completed"] == epochs["current"]["ready"] > 0
    ended = within == 0
    if ended and not told:
        over, within = over - 1, limit or 0
    begun = over if ended and told else over + 1
    for count in (epochs["total"], epochs["current"]):
        count.update(ready=begun, started=begun, processed=over, completed=over)
    checkpoint["epoch"] = over
    # What is behind the others by one is so because the checkpoint was written while a batch was being ended.
    ready = batches["current"]["ready"]
    batches["current"].update({name: within - min(ready - n, within) for name, n in batches["current"].items()})
    batches["is_last_batch"] = ended and not told


def check_states(checkpoint: dict[str, Any], callbacks: list[Any]) -> None:
    """Raises a ValueError when the state of a callback is of other kinds than the callback's own: it may come from anybody."""
    for callback in callbacks:
        own, theirs = callback.state_dict(), (checkpoint.get("callbacks") or {}).get(callback.state_key)
        if theirs is None:
            continue
        for name, value in own.items() if isinstance(theirs, dict) else [("", {})]:
            given = theirs.get(name) if isinstance(theirs, dict) else theirs
            kinds = (int, float) if type(value) in (int, float) else type(value)
            if value is not None and given is not None and not isinstance(given, kinds):
                raise ValueError(f"the state of {type(callback).__name__} has {name!r} of type {type(given).__name__}")
            if (
                isinstance(value, Tensor)
                and isinstance(given, Tensor)
                and (given.is_complex() or given.numel() != value.numel())
            ):
                raise ValueError(
                    f"the state of {type(callback).__name__} has a {name!r} that is no {value.numel()} numbers"
                )


def forget_files_elsewhere(checkpoint: dict[str, Any], callbacks: list[Any]) -> None:
    """Callbacks that keep checkpoints remove the oldest in time: they are to know of none outside of their own folder.

    Args:
        checkpoint: of which the states of callbacks are changed.
        callbacks: of this trainer.
    """
    for callback in callbacks:
        state = (checkpoint.get("callbacks") or {}).get(callback.state_key)
        if not isinstance(callback, ModelCheckpoint) or not isinstance(state, dict):
            continue
        if type(callback).load_state_dict is not ModelCheckpoint.load_state_dict:
            continue  # ours, which knows that a folder may have moved
        own = Path(str(callback.dirpath)).resolve()
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            if key in state and not _lies_in(state[key], own):
                state[key] = ""
        if isinstance(state.get("best_k_models"), dict):
            state["best_k_models"] = {k: v for k, v in state["best_k_models"].items() if _lies_in(k, own)}


def _lies_in(path: Any, folder: Path) -> bool:
    return os.path.dirname(os.path.realpath(str(path))) == str(folder)


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Every key whose values differ in what they compute, with both as they are written; an argument left out is one at its default.

    Args:
        theirs: a resolved configuration.
        ours: another.
    """
    written = [_flatten(computed(config)) for config in (theirs, ours)]
    forms = [_flatten(described(config)) for config in (theirs, ours)]
    return {key: (written[0].get(key), written[1].get(key)) for key in _pairs(*forms)}


def _pairs(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = sorted(theirs.keys() | ours.keys())
    return {key: (theirs.get(key), ours.get(key)) for key in keys if theirs.get(key) != ours.get(key)}


def _is_under(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) or fnmatchcase(key, f"{pattern}.*") for pattern in patterns)


def _told(differing: dict[str, tuple[Any, Any]]) -> str:
    told = [f"{printable(k[:200])}: {_cut(there)} there, {_cut(here)} here" for k, (there, here) in differing.items()]
    more = f"; and {len(told) - _MOST_TOLD} more" if len(told) > _MOST_TOLD else ""
    return "; ".join(told[:_MOST_TOLD]) + more


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_TOLD else f"{text[:_LONGEST_TOLD]}..."


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
