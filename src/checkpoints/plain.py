"""What ``torch.save`` has written, opened as plain data: tensors, and dictionaries, lists, numbers and words.

``torch.load(weights_only=True)`` runs no code, and yet a file of a kilobyte can keep it busy for ever (a key that is a pair of pairs of
pairs, hashed a trillion times; numbers that all have one hash) or fill the memory (encodings of encodings, bytes that are compressed).
So the steps by which a file is to be put together are looked at before any is taken: there are not too many, nothing is called but what
makes a tensor, and keys are short words and small whole numbers.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_BYTES = 2**26  # besides tensors; an 8B model and its optimizer have some hundred thousand
MOST_STEPS = 4_000_000  # some forty a tensor
MOST_THINGS = 1_000_000  # that are made: containers, words and tensors, by what they take in memory; some ten a tensor
MOST_LETTERS = 1000  # of a key: two that are equal are compared to the end, as often as one stands there
# Of a whole number that is a key, as torch.save numbers parameters. The hash of a larger one can be chosen, and whoever chooses one
# hash for all keys makes each wait for all that came before.
MOST_NUMBER = 2**20

# Of the steps that PyTorch takes all but sets, objects and long numbers.
_STEPS = {
    *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID"),
    *("APPEND", "APPENDS", "SETITEM", "SETITEMS", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("NONE", "NEWFALSE", "NEWTRUE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "BINFLOAT", "BINUNICODE"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT"),
}
# What a step makes, as far as it matters here; "pair" is any tuple but one of whole numbers.
_KINDS = dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), "whole") | {"EMPTY_TUPLE": "wholes"}
_KINDS |= {"BINUNICODE": "word", "NEWTRUE": "truth", "NEWFALSE": "truth", "EMPTY_DICT": "dict", "EMPTY_LIST": "list"}
_KEYS = {"word", "whole", "truth", "NONE"}
_COSTS = dict.fromkeys(("word", "dict", "list", "wholes", "pair", "ordered", "storage"), 1) | {"tensor": 4}
# How many things each step takes from the stack, if not all since the last mark; the rest take none.
_TAKES_ALL = {"TUPLE", "APPENDS", "SETITEMS"}
_TAKES = {"REDUCE": 2, "BUILD": 1, "BINPERSID": 1, "APPEND": 1, "SETITEM": 2, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MAKES_NOTHING = {"PROTO", "STOP", "BUILD", "APPEND", "APPENDS", "SETITEM", "SETITEMS"}
# What may be called with what, and what that makes; and which tuple stands for numbers that lie in the archive.
_TENSOR = ("storage", "whole", "wholes", "wholes", "truth", "ordered")
_CALLS: dict[tuple[str, tuple[str, ...] | None], str] = {
    ("collections OrderedDict", ()): "ordered",
    ("torch._utils _rebuild_tensor_v2", _TENSOR): "tensor",
    ("torch._utils _rebuild_tensor_v3", (*_TENSOR, "dtype")): "tensor",
}
_STORED = ("word", "class of storage", "word", "word", "whole")


def load_plain(source: Path | io.BytesIO, *, mapped: bool = True) -> Any:
    """Opens a file, or what has been read of one, on the CPU.

    Args:
        source: a file, or bytes.
        mapped: leave the tensors of a file on the disk until they are needed.

    Raises:
        OSError: it is no file, or cannot be read.
        pickle.UnpicklingError: it is something else, or holds more than plain data.
        ValueError: it is compressed.
    """
    if isinstance(source, Path) and not source.is_file():  # opening a pipe would wait for its other end
        raise FileNotFoundError(f"{source.name} is no file")
    check_plain(source)
    found = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped and isinstance(source, Path))
    for part in _containers(found):
        # Whoever asks whether it is among some words hashes it, and a pair of pairs of pairs would take for ever.
        if isinstance(part, tuple) and any(isinstance(member, tuple) for member in part):
            raise pickle.UnpicklingError("it holds a pair of pairs, which plain data of this project do without")
        if isinstance(
            part, OrderedDict
        ):  # attributes of a dictionary are versions of modules at best, and hide its methods at worst
            vars(part).clear()
    return found


def check_plain(source: Any) -> None:
    """Looks at the steps by which a file of ``torch.save``, or an open stream of one, is put together; raises as ``load_plain`` does."""
    with source.open("rb") if isinstance(source, Path) else nullcontext(source) as file:
        refuse_compressed(file)
        file.seek(0)
    try:
        # By the reader that torch.load itself uses.
        archive = torch._C.PyTorchFileReader(str(source) if isinstance(source, Path) else source)
        steps = archive.get_record("data.pkl")
    except RuntimeError as error:
        raise pickle.UnpicklingError("it is not a checkpoint") from error
    finally:
        if not isinstance(source, Path):
            source.seek(0)
    if len(steps) > MOST_BYTES:
        raise pickle.UnpicklingError(f"it has more than {MOST_BYTES:,} bytes besides tensors")
    try:
        _check_steps(steps, archive)
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # bytes that are no pickle can mean anything
        raise pickle.UnpicklingError(f"its data.pkl is damaged ({type(error).__name__})") from error


class _Thing(NamedTuple):
    """What stands for something on the stack."""

    kind: str
    value: Any = None  # of a word, a whole number, or a class of storages; of a pair, its members


_same = cache(
    _Thing
)  # of those that are their kind alone: a thing for each would take more memory than what it stands for


def _check_steps(steps: bytes, archive: Any) -> None:
    """Takes the steps with kinds of things in the place of things."""
    stack: list[_Thing] = []
    marks: list[int] = []
    memory: dict[int, _Thing] = {}
    argument: Any  # of the step: a number or names
    cost = 0
    for number, (step, argument, _) in enumerate(pickletools.genops(steps)):
        name = step.name
        if number > MOST_STEPS or cost > MOST_THINGS:
            raise pickle.UnpicklingError("it holds more words, tensors and containers than any checkpoint does")
        if name not in _STEPS:
            raise pickle.UnpicklingError(f"its data.pkl takes a step {name}, which plain data do without")
        if name.endswith("BINPUT"):
            memory[argument] = stack[-1]
        elif name.endswith("BINGET"):
            stack.append(memory[argument])
        elif name == "MARK":
            marks.append(len(stack))
        else:
            start = marks.pop() if name in _TAKES_ALL else len(stack) - _TAKES.get(name, 0)
            if start < (marks[-1] if marks else 0):
                raise pickle.UnpicklingError("its data.pkl takes more than there is")
            taken = stack[start:]
            del stack[start:]
            if name == "GLOBAL":
                made = _thing(argument)
            elif name == "BINPERSID":
                made = _storage(taken[0], archive)
            else:
                made = _made(name, argument, taken, stack[-1] if stack else _same("nothing"))
            if name not in _MAKES_NOTHING:
                stack.append(made)
                cost += _COSTS.get(made.kind, 0)


def _storage(stored: _Thing, archive: Any) -> _Thing:
    """Numbers that lie in the archive: PyTorch believes how many there are."""
    members: list[_Thing] = list(stored.value) if stored.kind == "pair" else []
    if tuple(thing.kind for thing in members) != _STORED:
        raise pickle.UnpicklingError("its data.pkl asks for numbers in a way that torch.save does not")
    width, key, numbers = members[1].value, members[2].value, members[4].value
    if not 0 <= numbers * width <= archive.get_record_size(f"data/{key}"):
        raise pickle.UnpicklingError("its data.pkl asks for more numbers than there are")
    return _same("storage")


def _made(name: str, argument: Any, taken: list[_Thing], below: _Thing) -> _Thing:
    """What a step makes of what it takes; ``below`` is what it changes.

    Raises:
        pickle.UnpicklingError: plain data have no such thing.
    """
    kinds = tuple(thing.kind for thing in taken)
    if name.startswith("TUPLE"):
        return _same("wholes", ()) if set(kinds) <= {"whole"} else _Thing("pair", tuple(taken[:16]))
    if name in ("SETITEM", "SETITEMS"):
        if below.kind not in ("dict", "ordered"):
            raise pickle.UnpicklingError("its data.pkl files something in what is no dictionary")
        for key in taken[::2]:
            _check_key(key)
    if name in ("APPEND", "APPENDS") and below.kind != "list":
        raise pickle.UnpicklingError("its data.pkl adds to what is no list")
    if name == "BUILD" and (below.kind, *kinds) != ("ordered", "dict"):
        raise pickle.UnpicklingError("its data.pkl changes what is no dictionary")
    if name == "REDUCE":
        given = tuple(thing.kind for thing in taken[1].value) if kinds[1] in ("pair", "wholes") else None
        made = _CALLS.get((kinds[0], given))
        if made is None:
            raise pickle.UnpicklingError(f"its data.pkl calls {kinds[0]} in a way that torch.save does not")
        return _same(made)
    kind = _KINDS.get(name, name)
    return _Thing(kind, argument) if kind in ("word", "whole") else _same(kind, () if kind == "wholes" else None)


def _check_key(key: _Thing) -> None:
    if key.kind not in _KEYS:
        raise pickle.UnpicklingError("it has a key that is neither a word nor a whole number")
    if key.kind == "whole" and not 0 <= key.value < MOST_NUMBER:
        raise pickle.UnpicklingError(f"it has a number as a key that is not from 0 to {MOST_NUMBER - 1:,}")
    if key.kind == "word" and len(key.value) > MOST_LETTERS:
        raise pickle.UnpicklingError(f"it has a key of more than {MOST_LETTERS:,} letters")


def _thing(names: str) -> _Thing:
    """What a file names, if that makes tensors or is a part of one."""
    module, name = names.split(" ", 1)
    known = getattr(torch, name, None) if module == "torch" else None
    if isinstance(known, torch.dtype):
        return _same("dtype")
    if names == "torch.storage UntypedStorage":
        return _same("class of storage", 1)
    if known is not None and name.endswith("Storage") and hasattr(known, "_dtype"):
        return _same("class of storage", known._dtype.itemsize)
    if any(names == called for called, _ in _CALLS):
        return _same(names)
    raise pickle.UnpicklingError(f"it holds a pickled object, {module}.{name}, which could run code")


def refuse_compressed(file: Any) -> None:
    """Raises an error for an archive that would unpack to more than it is, or that two readers could read in two ways.

    Args:
        file: open, and can be moved about in.

    Raises:
        pickle.UnpicklingError: it is no archive.
        ValueError: it is one that torch.save has not written: checkpoints are stored as they are.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if (
        file.read(4) != b"PK\3\4"
    ):  # or torch.load would take it for a file of another format, of which nothing has been looked at
        raise pickle.UnpicklingError("it is not a checkpoint")
    _check_directory(file, size)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    stored = all(entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1 for entry in entries)
    if not stored or sum(entry.file_size for entry in entries) > size:
        raise ValueError("it is a compressed archive, which no checkpoint of this project is")
    if len({entry.filename.lower() for entry in entries}) < len(entries):
        raise ValueError("it is an archive with two entries of one name")


_END, _END_64, _PLACE_64 = b"PK\5\6", b"PK\6\6", b"PK\6\7"


def _check_directory(file: Any, size: int) -> None:
    """Raises a ValueError for an archive in which two readers could find two directories: the one that is looked at here, and another."""
    file.seek(max(size - 98, 0))
    tail = file.read().rjust(98)
    end, place, end_64 = tail[76:], tail[56:76], tail[:56]
    if end[:4] != _END or end[20:] != b"\0\0":  # with a comment, readers look for the end in it
        raise ValueError("it is an archive whose directory is not at its end: cut off, or not of torch.save")
    start, length = size - 22, int.from_bytes(end[12:16], "little")
    first = int.from_bytes(end[16:20], "little")
    if place[:4] == _PLACE_64:
        start -= 76
        length, first = int.from_bytes(end_64[40:48], "little"), int.from_bytes(end_64[48:56], "little")
        if end_64[:4] != _END_64 or int.from_bytes(place[8:16], "little") != start:
            raise ValueError("it is an archive with two directories")
    if first + length != start:
        raise ValueError("it is an archive whose directory is not at its end")


def is_filled(tensor: Tensor) -> bool:
    """Whether every number of a tensor lies in the file, in a place of its own.

    Strides can make a few bytes look like a thousand gigabytes; and what writes to a tensor may go on where its numbers would lie
    if they lay one after another.
    """
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    if not tensor.numel():
        return True
    end = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < end:
                return False
            end = stride * (size - 1) + end
    return (tensor.storage_offset() + end) * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _containers(node: Any) -> Any:
    """Every container once, however often it stands in others."""
    waiting, seen = [node], set[int]()
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict | list | tuple) or id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        waiting += dict.values(part) if isinstance(part, dict) else part
