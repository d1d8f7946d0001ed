"""Reading checkpoints: weights, optimizer state and plain containers, never pickled objects."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from src.checkpoints.contents import MOST_STEPS, check_contents
from src.checkpoints.described import check_types, described_model, weights_of
from src.checkpoints.description import META, read_metadata
from src.checkpoints.integrity import CHECKSUM, damage, step_of
from src.checkpoints.plain import load_plain
from src.checkpoints.sharded import check_shards, is_sharded, read_shards
from src.components.backbone import Backbone
from src.config import ConfigError
from src.support.errors import printable
from src.support.files import put_aside

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
            checkpoint = load_plain(path)
        elif tensors == "none":
            read_metadata(path)
            checkpoint = load_plain(path / META) | {"state_dict": {}}
        else:
            checkpoint = read_shards(path, optimizer=tensors == "all")
    except Exception as error:  # bytes that are no checkpoint can mean anything
        raise CheckpointError(
            f"checkpoint {printable(path)} cannot be opened as plain data: {_reason(error)}"
        ) from error
    try:
        check_contents(checkpoint)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{printable(path)} is damaged, foreign or of another version: {printable(error)}"
        ) from error
    return checkpoint


def _reason(error: Exception) -> str:
    text = printable(str(error).strip())
    if isinstance(error, pickle.UnpicklingError) and text.startswith("Weights only load failed"):
        return "it holds more than plain data (weights_only=True refuses it)"
    return text.split("\\n")[0] if text else type(error).__name__


def problem_of(path: Path, *, thorough: bool = False) -> str | None:
    """Why nothing can go on from a checkpoint, in words; None if it can.

    Its bytes have changed, they are none of this project's, or they hold more than plain data.

    Args:
        path: a file or a folder of shards.
        thorough: open every tensor of a folder of shards too, not only what is no tensor.
    """
    found = damage(path)
    if found is not None:
        return printable(found)
    try:
        _opened(path, "none")
        if is_sharded(path):
            check_shards(path, tensors=thorough)
    except CheckpointError as error:
        return str(error)
    except Exception as error:
        return _reason(error)
    return None


def first_whole(candidates: Iterable[Path]) -> Path | None:
    """The first that one can go on from; each that is passed over is reported."""
    for path in candidates:
        problem = problem_of(path)
        if problem is None:
            return path
        log.warning(f"checkpoint {printable(path)} is damaged: {problem}; it is passed over")
    return None


def newest_first(folder: Path) -> list[Path]:
    """A run's checkpoints but the best, ordered by the optimizer step that each *holds*, whatever it is called.

    ``final.ckpt`` comes first among those of the same step: it knows that training is over. One that cannot be opened has
    the step that its name says; without a number in its name it comes first, to be reported.
    """
    rank = {"final.ckpt": 0, "last.ckpt": 2}
    numbered = (path for path in folder.glob("step*.ckpt") if step_of(path) >= 0)
    named = (folder / "last.ckpt", *numbered, folder / "final.ckpt")
    there: dict[tuple[int, int], Path] = {}  # one that has several names, by links of whichever kind, is looked at once
    for path in named:
        if path.is_file() or path.is_dir():  # who opens a pipe waits for its other end
            there[(status := path.stat()).st_dev, status.st_ino] = path
    return sorted(there.values(), key=lambda path: (-_recorded_step(path), rank.get(path.name, 1), path.name))


def _recorded_step(path: Path) -> int:
    try:
        return int(_opened(path, "none")["global_step"])
    except CheckpointError:
        step = step_of(path)
        # One without a number comes first, so that whoever passes it over hears of it.
        return step if step >= 0 else MOST_STEPS


def newest_whole(folder: Path, below: int | None = None) -> Path | None:
    """The newest checkpoint that one can go on from.

    Args:
        folder: a run's ``checkpoints``.
        below: only of steps before this one.
    """
    return first_whole(path for path in newest_first(folder) if below is None or _recorded_step(path) < below)


def put_later_aside(folder: Path, step: int) -> None:
    """Leaves no checkpoint of a later step under its name: a run that goes on from an earlier one will have others of these steps.

    Args:
        folder: a run's ``checkpoints``.
        step: that it goes on from.
    """
    for path in sorted(path for path in folder.glob("*.ckpt") if _recorded_step(path) > step):
        if path.is_symlink():  # last.ckpt, which holds nothing itself
            path.unlink()
            continue
        kept = put_aside(path, "superseded")
        checksum = path.with_name(path.name + CHECKSUM)
        if checksum.exists():
            checksum.rename(kept.with_name(kept.name + CHECKSUM))
        log.warning(f"{path} is of a later step than the one that the run goes on from; it is kept as {kept.name}")


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means.

    A file, or a folder of shards, means itself. The folder of a run means the checkpoint of its latest step; one that is damaged is
    reported and the one before it taken. ``~`` is the user's own folder.

    Raises:
        CheckpointError: there is none, or none that is whole.
    """
    path = path.expanduser()
    shown = printable(path)
    if path.is_file() or is_sharded(path):
        return path
    if path.is_dir():
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        there = newest_first(folder)
        if (whole := first_whole(there)) is not None:
            return whole
        nearby = _nearby(path)
        found = [printable(file.relative_to(path)) for file in nearby]
        best = [file for file in nearby if file.name.startswith("best_")]
        if there or (best and all(problem_of(file) for file in best)):
            raise CheckpointError(f"ckpt_path={shown}: every checkpoint in it is damaged: {', '.join(found)}")
        hint = f"it holds {', '.join(found)}" if found else "it holds no .ckpt file"
        raise CheckpointError(f"ckpt_path={shown}: a folder without final.ckpt, last.ckpt or step*.ckpt; {hint}")
    if path.is_symlink():
        raise CheckpointError(
            f"ckpt_path={shown}: a link to {printable(path.readlink())}, which is not there; ckpt_path=auto takes the newest"
        )
    if path.exists():
        raise CheckpointError(f"ckpt_path={shown}: neither a file nor a folder")
    if path.parent == Path() and get_close_matches(path.name, ["auto"]):
        raise CheckpointError(f"ckpt_path={shown}: no such file; did you mean auto?")
    parent = next((p for p in path.parents if p.is_dir()), Path())
    nearby = sorted(printable(p.name) for p in parent.iterdir())[:10]
    raise CheckpointError(
        f"ckpt_path={shown}: no such file. {printable(parent)} holds: {', '.join(nearby) or 'nothing'}"
    )


def _nearby(folder: Path) -> list[Path]:
    """Some checkpoints below a folder: links are not followed, and not all of a large tree is looked through."""
    found: list[Path] = []
    for where, folders, files in islice(os.walk(folder), 1000):
        found += [Path(where) / name for name in sorted(files) if name.endswith(".ckpt")]
        if len(Path(where).relative_to(folder).parts) >= 3 or len(found) >= 5:
            folders.clear()
    return sorted(found)[:5]


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
        if folder.is_dir() and not newest_first(folder) and (best := sorted(folder.glob("best_*.ckpt"))):
            # Killed before the first of the others; a best one is as whole as they are.
            whole = first_whole(sorted(best, key=_recorded_step, reverse=True))
            return whole or find_checkpoint(output_dir)
        return find_checkpoint(output_dir) if folder.is_dir() and any(folder.glob("*.ckpt")) else None
    asked = Path(path).expanduser()
    found = find_checkpoint(asked)
    if found != asked:  # a folder, in which a whole one has been looked for
        return found
    problem = problem_of(found)
    if problem is not None:
        others = (other for other in newest_first(found.parent) if other.resolve() != found.resolve())
        whole = next((other for other in others if problem_of(other) is None), None)
        advice = f"the newest whole one beside it is {printable(whole)}" if whole else "there is no whole one beside it"
        raise CheckpointError(f"ckpt_path={printable(found)} is damaged: {problem}; {advice}")
    return found


def load_model(path: str | Path, device: str | torch.device = "cpu") -> Backbone:
    """Opens the model in a checkpoint, in evaluation mode: no Trainer, no command line, and nothing in the file is run.

    Args:
        path: a checkpoint, or the folder of a run.
        device: where to put it.

    Returns:
        The model, ``ids [B, T] int64 -> logits [B, T, V]``.

    Raises:
        CheckpointError: there is none, it is damaged, or it describes no model that this version can build.
    """
    found = find_checkpoint(Path(path))
    return model_from_checkpoint(_opened(found, "model"), found).to(device).eval()


def model_from_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> Backbone:
    """Builds the model that a checkpoint's configuration describes, and fills in its weights.

    Args:
        checkpoint: as ``read_checkpoint`` returns it.
        path: where it came from, for messages.

    Raises:
        CheckpointError: the configuration is that of no model, or of another one than the weights; or these are of types that no model
            is computed in.
    """
    try:
        # Built on the meta device: initial weights that are about to be replaced need not be drawn.
        net, weights = described_model(checkpoint), weights_of(checkpoint)
        check_types(weights, net)
        net.load_state_dict(weights, assign=True)
    except Exception as error:  # whatever a constructor says of arguments that make no sense
        raise CheckpointError(
            f"checkpoint {printable(path)} holds no model that can be built here: {printable(str(error)[:1000])}"
        ) from error
    if net.tie_embeddings:
        net.head.weight = net.embedding.weight
    return net
