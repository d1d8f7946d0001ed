"""Reading checkpoints: weights, optimizer state and plain containers, never pickled objects."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch

from src.build import model_from_config
from src.checkpoints.integrity import CHECKPOINT_FORMAT, PREFIX, by_age, damage, step_of
from src.checkpoints.sharded import META, is_sharded, read_metadata, read_shards
from src.components.backbone import Backbone
from src.config import ConfigError

_REPEAT = "Repeat that run's own overrides; its folder keeps them in .hydra/overrides.yaml"

log = logging.getLogger(__name__)

Tensors = Literal["all", "model", "none"]


class CheckpointError(ConfigError):
    """A checkpoint that cannot be used; the message says which file and why."""


def read_checkpoint(path: str | Path, *, tensors: Tensors = "all") -> dict[str, Any]:
    """Opens a checkpoint that a run wrote.

    Args:
        path: a file, a folder of shards, or the folder of a run (see ``find_checkpoint``).
        tensors: what of shards is read: ``all``, the ``model`` without the optimizer, or ``none``. (A file is mapped, not read.)

    Returns:
        ``state_dict``, ``config`` (the run's resolved configuration), ``global_step``, optimizer and loop states.

    Raises:
        CheckpointError: for files that do not exist, are damaged, hold pickled objects, or were not written by this project.
    """
    return _opened(find_checkpoint(Path(path)), tensors)


def _opened(path: Path, tensors: Tensors) -> dict[str, Any]:
    try:
        if not is_sharded(path):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        elif tensors == "none":
            read_metadata(path)
            checkpoint = torch.load(path / META, weights_only=True) | {"state_dict": {}}
        else:
            checkpoint = read_shards(path, optimizer=tensors == "all")
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError) as error:
        reason = _reason(error)
        raise CheckpointError(f"checkpoint {path} cannot be opened as plain data: {reason}") from error
    if not isinstance(checkpoint, dict) or "config" not in checkpoint or "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} is not a checkpoint of this project: it has no 'config' and 'state_dict'")
    if checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {checkpoint.get('format')!r}; this version reads {CHECKPOINT_FORMAT}"
        )
    return checkpoint


def _reason(error: Exception) -> str:
    text = str(error).strip()
    if foreign := re.search(r"(?:Unsupported global: GLOBAL|Unsupported class) ([\w.]+)", text):
        return f"it holds a pickled object, {foreign[1]}, which could run code"
    if isinstance(error, pickle.UnpicklingError) and text.startswith("Weights only load failed"):
        return "it holds more than plain data (weights_only=True refuses it)"
    if "mmap can only be used" in text:
        return "it is not a checkpoint"
    return text.splitlines()[0] if text else type(error).__name__


def problem_of(path: Path) -> str | None:
    """Why nothing can go on from a checkpoint, in words: its bytes have changed, or they are none of this project's. None if it can."""
    found = damage(path)
    if found is not None:
        return found
    try:
        _opened(path, "none")
    except CheckpointError as error:
        return str(error)
    return None


def first_whole(candidates: Iterable[Path]) -> Path | None:
    """The first that one can go on from; each that is passed over is reported."""
    for path in candidates:
        problem = problem_of(path)
        if problem is None:
            return path
        log.warning(f"checkpoint {path} is damaged: {problem}; it is passed over")
    return None


def newest_whole(folder: Path, below: int | None = None) -> Path | None:
    """The newest numbered checkpoint that one can go on from.

    Args:
        folder: a run's ``checkpoints``.
        below: only of steps before this one.
    """
    return first_whole(path for path in by_age(folder) if below is None or step_of(path) < below)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means.

    A file, or a folder of shards, means itself. The folder of a run means its ``final.ckpt``, else the newest of its checkpoints;
    one that is damaged is reported and the one before it taken.

    Raises:
        CheckpointError: there is none, or none that is whole.
    """
    if path.is_file() or is_sharded(path):
        return path
    if path.is_dir():
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        candidates = [folder / "final.ckpt", *by_age(folder), folder / "last.ckpt"]
        there = [candidate for candidate in candidates if candidate.exists()]
        if (whole := first_whole(there)) is not None:
            return whole
        found = sorted(str(file.relative_to(path)) for file in path.rglob("*.ckpt"))[:5]
        if there:
            raise CheckpointError(f"ckpt_path={path}: every checkpoint in it is damaged: {', '.join(found)}")
        hint = f"it holds {', '.join(found)}" if found else "it holds no .ckpt file"
        raise CheckpointError(f"ckpt_path={path}: a folder without final.ckpt, last.ckpt or step*.ckpt; {hint}")
    if path.is_symlink():
        raise CheckpointError(
            f"ckpt_path={path}: a link to {path.readlink()}, which is not there; ckpt_path=auto takes the newest"
        )
    if path.parent == Path() and get_close_matches(path.name, ["auto"]):
        raise CheckpointError(f"ckpt_path={path}: no such file; did you mean auto?")
    parent = next((p for p in path.parents if p.is_dir()), Path())
    nearby = sorted(p.name for p in parent.iterdir())[:10]
    raise CheckpointError(f"ckpt_path={path}: no such file. {parent} holds: {', '.join(nearby) or 'nothing'}")


def to_resume(path: str | None, output_dir: Path) -> Path | None:
    """Where a run goes on from.

    Args:
        path: ``ckpt_path`` of the configuration; None: from nowhere; ``auto``: the newest whole checkpoint in the run's own folder,
            if there is any; else see ``find_checkpoint``, and whatever is found must be whole.
        output_dir: the run's folder.

    Raises:
        CheckpointError: it does not exist or is damaged; the message names what could be taken instead.
    """
    if path is None:
        return None
    if path == "auto":
        folder = output_dir / "checkpoints"
        return find_checkpoint(output_dir) if folder.is_dir() and any(folder.glob("*.ckpt")) else None
    found = find_checkpoint(Path(path))
    if found != Path(path):  # a folder, in which a whole one has been looked for
        return found
    problem = problem_of(found)
    if problem is not None:
        others = (other for other in by_age(found.parent) if other.resolve() != found.resolve())
        whole = next((other for other in others if problem_of(other) is None), None)
        advice = f"the newest whole one beside it is {whole}" if whole else "there is no whole one beside it"
        raise CheckpointError(f"ckpt_path={found} is damaged: {problem}; {advice}")
    return found


def load_model(path: str | Path, device: str | torch.device = "cpu") -> Backbone:
    """Opens the model in a checkpoint, in evaluation mode: no Trainer, no command line.

    Args:
        path: a checkpoint, or the folder of a run.
        device: where to put it.

    Returns:
        The model, ``ids [B, T] int64 -> logits [B, T, V]``.
    """
    return model_from_checkpoint(read_checkpoint(path, tensors="model")).to(device).eval()


def model_from_checkpoint(checkpoint: dict[str, Any]) -> Backbone:
    """Builds the model that a checkpoint's configuration describes, and fills in its weights."""
    # Built on the meta device: initial weights that are about to be replaced need not be drawn.
    net = model_from_config(checkpoint["config"]["model"], device="meta")
    weights = {name.removeprefix(PREFIX): w for name, w in checkpoint["state_dict"].items() if name.startswith(PREFIX)}
    net.load_state_dict(weights, assign=True)
    if net.tie_embeddings:
        net.head.weight = net.embedding.weight
    return net


def check_same_model(checkpoint: dict[str, Any], model_config: dict[str, Any], path: str | Path) -> None:
    """Raises a CheckpointError naming every setting in which a checkpoint's model differs from this run's."""
    _refuse_differences(
        f"ckpt_path={path} holds another model than this run builds",
        _flatten(model_config, "model"),
        _flatten(checkpoint["config"]["model"], "model"),
        lambda key: key in ("model.seed", "model.canon.init") or key.endswith(".backend") or ".initialization." in key,
    )


def check_same_recipe(
    checkpoint: dict[str, Any], plain: dict[str, Any], path: str | Path, *, own: bool = False
) -> None:
    """Raises a CheckpointError when a run could not be *continued* as configured: another optimizer, schedule, loss or batch.

    The optimizer's state holds its own settings, and the place in the data is step x batch size: both would silently win over
    the command line. Only the number of steps may change, and that is said.

    ``own``: it is in the run's own folder. There one of the very last step is no mistake: the run was stopped in its test.
    """
    step, last = checkpoint["global_step"], plain["trainer"]["max_steps"]
    if step > last or (step == last and not own):
        raise CheckpointError(
            f"ckpt_path={path} is at step {step}, and trainer.max_steps={last}: nothing is left to train. "
            "Raise trainer.max_steps, or test it with train=false"
        )
    sections = ("optimizer", "scheduler", "loss", "data")
    ours = _flatten({name: plain[name] for name in sections})
    theirs = _flatten({name: checkpoint["config"][name] for name in sections})
    free = {"scheduler.total_steps", "optimizer.fused", "loss.fused", "data.num_workers", "data.cache_dir", "data.path"}
    free |= {"data.eval_batch_size", "data.val_windows", "data.test_windows"}
    what = f"ckpt_path={path} was trained with other settings than this run has"
    _refuse_differences(what, ours, theirs, free.__contains__)
    if ours["scheduler.total_steps"] != theirs["scheduler.total_steps"]:
        total = theirs["scheduler.total_steps"]
        log.warning(
            f"resuming a run of {total} steps as one of {last}: the learning rate follows the new schedule from here"
        )


def check_same_data(checkpoint: dict[str, Any], fingerprint: dict[str, Any], path: str | Path) -> None:
    """Raises a CheckpointError when the data is not what the checkpoint was trained on (another corpus, another tokeniser)."""
    what = f"ckpt_path={path} was trained on other data than there is here"
    _refuse_differences(what, _flatten(fingerprint), _flatten(checkpoint["data"]), lambda key: False)


def _refuse_differences(
    what: str, ours: dict[str, Any], theirs: dict[str, Any], may_differ: Callable[[str], bool]
) -> None:
    """Raises a CheckpointError that begins with ``what`` and lists every key whose values differ and may not."""
    differing = [
        f"{key}: {theirs.get(key, 'absent')!r} there, {ours.get(key, 'absent')!r} here"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key) and not may_differ(key)
    ]
    if differing:
        raise CheckpointError(f"{what}: {'; '.join(differing)}. {_REPEAT}")


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
