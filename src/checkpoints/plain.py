"""What ``torch.save`` has written, opened as plain data: tensors, and dictionaries, lists, numbers and words.

``torch.load(weights_only=True)`` runs no code, and yet a file of a kilobyte can keep it busy for ever (a key that is a pair of pairs of
pairs, hashed a trillion times) or fill the memory (encodings of encodings, bytes that are compressed). So the steps by which a file is
to be put together are looked at before any is taken: nothing is called but what makes a tensor, and keys are words and numbers.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOST_STEPS = 2**28  # bytes of them; an 8B model's optimizer has some ten million

_TENSORS = ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")
_ORDERED = "collections OrderedDict"
# Of PyTorch's own list of steps all but sets and objects.
_STEPS = {
    *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID"),
    *("APPEND", "APPENDS", "SETITEM", "SETITEMS", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *(
        "NONE",
        "NEWFALSE",
        "NEWTRUE",
        "EMPTY_TUPLE",
        "EMPTY_LIST",
        "EMPTY_DICT",
        "BININT",
        "BININT1",
        "BININT2",
        "BINFLOAT",
    ),
    *("BINUNICODE", "SHORT_BINSTRING", "LONG1", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT"),
}
_KEYS = {
    "NONE",
    "NEWFALSE",
    "NEWTRUE",
    "BININT",
    "BININT1",
    "BININT2",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINSTRING",
    "LONG1",
}
# How many things each step takes from the stack, if not all since the last mark; the rest take none.
_TAKES_ALL = {"TUPLE", "APPENDS", "SETITEMS"}
_MAKES_NOTHING = {"PROTO", "STOP", "BUILD", "APPEND", "APPENDS", "SETITEM", "SETITEMS"}
_TAKES = {"REDUCE": 2, "BUILD": 1, "BINPERSID": 1, "APPEND": 1, "SETITEM": 2, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


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
        if isinstance(
            part, OrderedDict
        ):  # attributes of a dictionary are versions of modules at best, and hide its methods at worst
            vars(part).clear()
    return found


def check_plain(source: Any) -> None:
    """Looks at the steps by which a file of ``torch.save``, or an open stream of one, is put together; raises as ``load_plain`` does."""
    refuse_compressed(source)
    opened = str(source) if isinstance(source, Path) else source
    if not isinstance(source, Path):
        source.seek(0)
    try:
        steps = torch._C.PyTorchFileReader(opened).get_record("data.pkl")  # by the reader that torch.load itself uses
    except RuntimeError as error:
        raise pickle.UnpicklingError("it is not a checkpoint") from error
    finally:
        if not isinstance(source, Path):
            source.seek(0)
    if len(steps) > MOST_STEPS:
        raise pickle.UnpicklingError(f"it has more than {MOST_STEPS:,} bytes besides tensors")
    try:
        _check_steps(steps)
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # bytes that are no pickle can mean anything
        raise pickle.UnpicklingError(f"its data.pkl is damaged ({type(error).__name__})") from error


def _check_steps(steps: bytes) -> None:
    """Takes the steps with the kinds of things in their place: the name of the step that makes one, or of what is called."""
    stack: list[str] = []
    marks: list[int] = []
    memory: dict[int, str] = {}
    argument: Any  # of the step: a number or names
    for step, argument, _ in pickletools.genops(steps):
        kind = step.name
        if kind not in _STEPS:
            raise pickle.UnpicklingError(f"its data.pkl takes a step {kind}, which plain data do without")
        if kind.endswith("BINPUT"):
            memory[argument] = stack[-1]
        elif kind.endswith("BINGET"):
            stack.append(memory[argument])
        elif kind == "MARK":
            marks.append(len(stack))
        else:
            start = marks.pop() if kind in _TAKES_ALL else len(stack) - _TAKES.get(kind, 0)
            taken = stack[start:]
            del stack[start:]
            _check_step(kind, taken)
            if kind not in _MAKES_NOTHING:
                stack.append(_called(argument) if kind == "GLOBAL" else kind)


def _check_step(kind: str, taken: list[str]) -> None:
    """``taken``: the kinds of what the step takes from the stack."""
    if kind in ("SETITEM", "SETITEMS") and not set(taken[::2]) <= _KEYS:
        raise pickle.UnpicklingError("it has a key that is neither a word nor a number")
    if kind == "REDUCE" and taken[0] == _ORDERED and taken[1] != "EMPTY_TUPLE":
        raise pickle.UnpicklingError("its data.pkl fills an OrderedDict by a call")


def _called(names: str) -> str:
    """What a file names, if that makes tensors or is a part of one."""
    module, name = names.split(" ", 1)
    known = getattr(torch, name, None) if module == "torch" else None
    if (
        names == _ORDERED
        or (module == "torch._utils" and name in _TENSORS)
        or (module == "torch" and (isinstance(known, torch.dtype) or name == "Size" or name.endswith("Storage")))
        or names == "torch.storage UntypedStorage"
    ):
        return names
    raise pickle.UnpicklingError(f"it holds a pickled object, {module}.{name}, which could run code")


def refuse_compressed(source: Any) -> None:
    """Raises a ValueError for an archive that would unpack to more than it is: checkpoints are stored as they are.

    Args:
        source: a path, or a stream that can be moved about in.
    """
    if not zipfile.is_zipfile(source):
        return  # which PyTorch has words of its own for
    with source.open("rb") if isinstance(source, Path) else nullcontext(source) as file:
        size = file.seek(0, io.SEEK_END)
        _check_directory(file, size)
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
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
    start, length = size - 22, int.from_bytes(end[12:16], "little")
    first = int.from_bytes(end[16:20], "little")
    if place[:4] == _PLACE_64:
        start -= 76
        length, first = int.from_bytes(end_64[40:48], "little"), int.from_bytes(end_64[48:56], "little")
        if end_64[:4] != _END_64 or int.from_bytes(place[8:16], "little") != start:
            raise ValueError("it is an archive with two directories")
    if end[:4] != _END or first + length != start:
        raise ValueError("it is an archive whose directory is not at its end")


def is_filled(tensor: Tensor) -> bool:
    """Whether every number of a tensor lies in the file: strides can make a few bytes look like a thousand gigabytes."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


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
