"""Does a checkpoint that opens as plain data hold what the rest of the program, and Lightning, take for granted?

It may come from anybody. What is wrong with it is said here, before a small file can ask for much memory or time, or ends somewhere in a
traceback that does not name it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from src.checkpoints.integrity import READABLE_FORMATS
from src.checkpoints.plain import is_filled

MOST_STEPS = 2**48
MOST_PARTS = 1_000_000  # containers, names and values; an 8B model's optimizer has some ten thousand
DEEPEST = 40
LONGEST_VALUE = 10_000  # letters of a word in its configuration
MOST_LETTERS = (
    2**25
)  # of words and of the keys on the way to each part, as often as they stand somewhere; a large model's has some million

# What there is, and of which kind; None for a kind that is looked at below.
_NEEDED = {"config": dict, "state_dict": dict, "global_step": int}
_OPTIONAL = {"data": dict, "pending_metrics": dict, "validated": dict, "ended": dict, "seconds": float, "epoch": int}
_OPTIONAL |= {"callbacks": dict, "loops": dict, "optimizer_states": list, "lr_schedulers": list, "continued": list}
_OPTIONAL |= {"shares": int}
# Of a LambdaLR; the optimizer, an attribute too, is no part of it.
_OF_SCHEDULES = {"base_lrs", "last_epoch", "verbose", "_step_count", "_last_lr", "_get_lr_called_within_step"}
_OF_SCHEDULES |= {"lr_lambdas", "_is_initial"}
_WITHOUT_TENSORS = ("config", "data", "validated", "pending_metrics", "ended")


def check_contents(checkpoint: Any) -> None:
    """Checks what ``torch.load(weights_only=True)`` has opened.

    Raises:
        ValueError: it is no checkpoint of this project, or parts of it are of another kind than they should be.
    """
    if not isinstance(checkpoint, dict) or "config" not in checkpoint or "state_dict" not in checkpoint:
        raise ValueError("not a checkpoint of this project: it has no 'config' and 'state_dict'")
    written = checkpoint.get("format")
    if type(written) is not int or written not in READABLE_FORMATS:
        known = " and ".join(map(str, READABLE_FORMATS))
        raise ValueError(f"it has checkpoint format {_shown(written)}; this version reads {known}")
    _check_parts(checkpoint)
    for key, kind in (_NEEDED | _OPTIONAL).items():
        value = checkpoint.get(key)
        right = (
            isinstance(value, kind) or (value is None and key in _OPTIONAL) or (kind is float and type(value) is int)
        )
        if not right or isinstance(value, bool):
            raise ValueError(f"its {key!r} is a {type(value).__name__}")
    if not 0 <= checkpoint["global_step"] < MOST_STEPS:
        raise ValueError(f"its 'global_step' is not from 0 to {MOST_STEPS:,}")
    if not 0 <= (checkpoint.get("seconds") or 0) < MOST_STEPS:
        raise ValueError("its 'seconds' are no time")
    _check_kept(checkpoint)
    _check_optimizers(checkpoint)
    _check_progress(checkpoint)
    _check_measured(checkpoint)


def _check_parts(checkpoint: dict[str, Any]) -> None:
    """Tensors lie in the file, values are values, and words of the configuration are no books."""
    for name, part in _parts(checkpoint):
        if isinstance(part, Tensor) and not is_filled(part):
            raise ValueError(f"{name!r} is no plain tensor whose numbers lie in the file")
        if callable(part) or isinstance(part, torch.dtype):
            raise ValueError(f"{name!r} is no value")


def _shown(value: Any) -> str:
    """A number or a word; of what may be nested, only what it is."""
    return repr(value)[:50] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def _check_kept(checkpoint: dict[str, Any]) -> None:
    """The configuration has its sections, weights are tensors, and nothing else is one that should be none."""
    for key, kind in (("why", str), ("step", int), ("planned", int)):
        if not isinstance((checkpoint.get("ended") or {}).get(key), kind | None):
            raise ValueError(f"its 'ended' has a {key!r} of another kind")
    for name, part in _parts(checkpoint["config"]):
        if isinstance(part, str) and len(part) > LONGEST_VALUE:
            raise ValueError(
                f"{name[:100]!r} of its configuration has {len(part):,} letters; at most {LONGEST_VALUE:,}"
            )
    for section in ("model", "trainer", "data"):
        if not isinstance(checkpoint["config"].get(section), dict):
            raise ValueError(f"its configuration has no section {section!r}")
    for section in ("callbacks", "optimizer", "scheduler", "loss"):
        if not isinstance(checkpoint["config"].get(section), dict | None):
            raise ValueError(
                f"section {section!r} of its configuration is a {type(checkpoint['config'][section]).__name__}"
            )
    for name, weight in checkpoint["state_dict"].items():
        if not isinstance(name, str) or not isinstance(weight, Tensor):
            raise ValueError(f"{str(name)[:100]!r} among its weights is no tensor")
    for key in _WITHOUT_TENSORS:
        if any(isinstance(part, Tensor) for _, part in _parts(checkpoint.get(key))):
            raise ValueError(f"its {key!r} holds a tensor")


def _parts(node: Any) -> Iterator[tuple[str, Any]]:
    """Everything in nested containers, with the name of the last key on the way to it.

    Raises:
        ValueError: there is too much: a container in itself, or the same one again and again, is more than it takes in the file, and a
            long word is written there once, wherever it stands.
    """
    waiting, seen, letters = [("", node, 0, 0)], 0, 0
    while waiting:
        name, part, depth, way = waiting.pop()
        yield name, part
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
        if isinstance(part, dict | list | tuple | set | frozenset):
            seen += len(part)
        if seen > MOST_PARTS:
            raise ValueError(f"it has more than {MOST_PARTS:,} parts")
        letters += way + _letters(part)
        if letters > MOST_LETTERS:
            raise ValueError(f"its words have more than {MOST_LETTERS:,} letters")
        if isinstance(part, dict):
            keys = [(str(key), value) for key, value in part.items()]
            waiting += [(key[:100], value, depth + 1, way + len(key) + 1) for key, value in keys]
        elif isinstance(part, list | tuple | set | frozenset):
            waiting += [(name, value, depth + 1, way) for value in part]


def _letters(part: Any) -> int:
    """How long it is when it is written out, roughly; of a container, what it takes besides its parts."""
    if isinstance(part, str | bytes):
        return len(part)
    return part.bit_length() // 3 if type(part) is int else 0


def _check_optimizers(checkpoint: dict[str, Any]) -> None:
    """Groups of parameters name these by numbers, and have rates that are numbers.

    Whether tensors fit the parameters shows when those are there.
    """
    for state in checkpoint.get("optimizer_states") or []:
        groups = state.get("param_groups") if isinstance(state, dict) else None
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            raise ValueError("the state of an optimizer has no 'param_groups'")
        for group in groups:
            names = group.get("params")
            if not isinstance(names, list) or not all(type(name) is int and 0 <= name < MOST_PARTS for name in names):
                raise ValueError("the 'params' of an optimizer are no numbers of parameters")
            for key in ("lr", "weight_decay", "eps"):
                numbers = group.get(key, 0)
                numbers = numbers if isinstance(numbers, tuple | list) else [numbers]  # Adafactor has two eps
                if not all(type(number) in (int, float, type(None)) for number in numbers):
                    raise ValueError(f"an optimizer's {key!r} is a {type(group[key]).__name__}")


def _check_progress(checkpoint: dict[str, Any]) -> None:
    """Loops have counts, schedules numbers under their own names, and what a run was continued from are steps."""
    for name, part in _parts(checkpoint.get("loops")):
        whole = type(part) is int and 0 <= part < MOST_STEPS
        if not (whole or part is None or isinstance(part, bool | dict | list)):
            raise ValueError(f"its 'loops' hold {name!r}, which is no count")
    for state in checkpoint.get("lr_schedulers") or []:
        if not isinstance(state, dict) or not state.keys() <= _OF_SCHEDULES:
            raise ValueError("the state of a schedule is none")
        for name, part in _parts(state):
            if not isinstance(part, int | float | bool | dict | list | None):
                raise ValueError(f"the state of a schedule has {name!r}, which is no number")
    for note in checkpoint.get("continued") or []:
        if not isinstance(note, dict) or not all(type(value) in (int, type(None)) for value in note.values()):
            raise ValueError("its 'continued' are no steps")


def _check_measured(checkpoint: dict[str, Any]) -> None:
    """Metrics that travel with a checkpoint are numbers by name."""
    validated = checkpoint.get("validated") or {"metrics": {}, "counts": {}}
    metrics, counts = validated.get("metrics"), validated.get("counts")
    if type(validated.get("step")) not in (int, type(None)):
        raise ValueError("its 'validated' is of a 'step' that is no number")
    if not isinstance(metrics, dict) or not isinstance(counts, dict):
        raise ValueError("its 'validated' has no 'metrics' and 'counts'")
    trained = validated.get("train") or {}
    if not isinstance(trained, dict):
        raise ValueError("its 'validated' has no metrics of training by name")
    for numbers in (metrics, trained, checkpoint.get("pending_metrics") or {}):
        for name, value in numbers.items():
            if not isinstance(name, str) or not name.isprintable() or type(value) not in (int, float):
                raise ValueError(f"{str(name)[:100]!r} among its metrics is no number by name")
    for name, pair in counts.items():
        right = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair)
        if not isinstance(name, str) or not right:
            raise ValueError(f"{str(name)[:100]!r} among its counts is no pair of numbers")
