"""What lies where in a folder of shards: DCP's ``.metadata``, read without trust, and held against the files that are there.

It is a pickle. An unpickler that knows DCP's own descriptions and nothing else reads it once, counting its steps; of what it says a new
description is made, in which no byte is read twice and every piece has one place.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

METADATA, META = ".metadata", "meta.pt"
WEIGHTS, OPTIMIZER = "state_dict", "optimizer_"  # DCP's keys, as Lightning names them

# What a description of tensors and where they lie is made of, by name: a module's other classes do things.
_DCP = "torch.distributed.checkpoint"
_TYPES = {
    *((f"{_DCP}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((f"{_DCP}.metadata", f"{kind}StorageMetadata") for kind in ("Tensor", "Bytes", "Chunk")),
    (f"{_DCP}.filesystem", "_StorageInfo"),
}
# Where a checkpoint lay when it was written: of no use, and a path of paths of paths would be as long as one likes.
_PATHS = {(module, "PosixPath") for module in ("pathlib", "pathlib._local")}
_FILLED = {"Metadata", "MetadataIndex", "StorageMeta", "_StorageInfo", "_Properties"}
_FILLED |= {"TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"}
_SHARD = re.compile(r"[\w-]+\.distcp")
_MOST_DESCRIPTION = 2**26  # bytes of .metadata; some two hundred a piece
_MOST_STEPS = 2**24  # by which it is put together, one that makes something counted four times; some hundred a piece
_MAKING = (pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.LIST, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
_MAKING += (pickle.NEWOBJ, pickle.REDUCE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE)
_LONGEST_NAME = 1000  # letters: two that are equal are compared to the end
_MOST_NUMBERS = 2**50  # of a tensor; see _check_offset


def _counted(code: int, step: Any, unpickler: _Descriptions) -> None:
    unpickler.count(code)
    step(unpickler)


class _Descriptions(pickle._Unpickler):  # the one in Python, whose steps can be replaced
    """Knows DCP's descriptions and nothing else, fills in their fields and changes nothing besides."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) == ("torch.serialization", "_get_layout"):
            return _layout
        if (module_name, global_name) in _PATHS or global_name == "_MEM_FORMAT_ENCODING":
            return _nothing
        if (module_name, global_name) == ("torch", "Size"):
            return _sizes
        if global_name == "TensorProperties":
            return _Properties
        dtype = module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype)
        if dtype or (module_name, global_name) in _TYPES:
            return super().find_class(module_name, global_name)
        raise pickle.UnpicklingError(
            f"{METADATA} names {module_name}.{global_name}, which is no description of tensors"
        )

    def load_reduce(self) -> None:
        """Only the few functions that ``find_class`` puts in the place of others are called; descriptions are made empty, and filled in."""
        if self.stack[-2] not in (_layout, _nothing, _sizes):  # type: ignore[attr-defined]
            raise pickle.UnpicklingError(f"{METADATA} calls what is no part of a description")
        super().load_reduce()  # type: ignore[misc]

    def load_build(self) -> None:
        filled, state = self.stack[-2:]  # type: ignore[attr-defined]
        fields = state if isinstance(state, dict) else {}
        if type(filled).__name__ not in _FILLED or not all(
            isinstance(key, str) and key.isidentifier() for key in fields
        ):
            raise pickle.UnpicklingError(f"{METADATA} wants to change something that is no description")
        super().load_build()  # type: ignore[misc]

    def load_setitem(self) -> None:
        key, value = self.stack[-2:]  # type: ignore[attr-defined]
        del self.stack[-2:]  # type: ignore[attr-defined]
        self.stack[-1][_key(key)] = value  # type: ignore[attr-defined]

    def load_setitems(self) -> None:
        items = self.pop_mark()  # type: ignore[attr-defined]
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][_key(key)] = value  # type: ignore[attr-defined]

    taken = 0

    def count(self, code: int) -> None:
        """Notes that a step is to be taken."""
        self.taken += 4 if bytes([code]) in _MAKING else 1
        if self.taken > _MOST_STEPS:
            raise pickle.UnpicklingError(f"{METADATA} is put together of more than any description is")

    dispatch = dict(pickle._Unpickler.dispatch) | {  # type: ignore[attr-defined]
        pickle.BUILD[0]: load_build,
        pickle.REDUCE[0]: load_reduce,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }
    # Sets hash what is in them, instances are made by calls, and bytes that are to come are given room at once.
    for _unused in (pickle.DICT, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET):
        del dispatch[_unused[0]]
    for _unused in (pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.BYTEARRAY8):
        del dispatch[_unused[0]]
    dispatch: ClassVar = {code: partial(_counted, code, step) for code, step in dispatch.items()}


class _Where:
    """A place as a key. Its hash is that of a text, which nobody can choose; that of DCP's own key, or of any numbers, anybody can."""

    def __init__(self, index: MetadataIndex):
        self.index, self._text = index, f"{index.fqn} {index.offset}"

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Where) and self._text == other._text


def _key(key: Any) -> Any:
    """What is a key is hashed, and a pair of pairs of pairs would take for ever."""
    if type(key) is not str:
        return _Where(_index(key))
    if len(key) > _LONGEST_NAME:
        raise pickle.UnpicklingError(f"{METADATA} has a name of more than {_LONGEST_NAME:,} letters")
    return key


def _nothing(*_: Any) -> None:
    """In place of a path, or of a word for how numbers lie."""


def _layout(name: Any) -> torch.layout:
    if type(name) is not str or name != "torch.strided":
        raise pickle.UnpicklingError(f"{METADATA} describes a tensor of another layout than torch.strided")
    return torch.strided


class _Properties:
    """In place of DCP's description of a tensor: no more than its type is taken."""

    dtype: Any = None

    def __setstate__(self, state: Any) -> None:
        self.dtype = state[0] if isinstance(state, tuple) and state else None


def read_metadata(folder: Path) -> Metadata:
    """DCP's description of a folder of shards, checked against the files that are there.

    Raises:
        pickle.UnpicklingError: it is damaged, names what is no description, or describes what is not in the folder.
        OSError: it is not there.
    """
    path = folder / METADATA
    if not path.is_file() or not (folder / META).is_file():
        raise FileNotFoundError(f"{folder} lacks {METADATA} or {META}")
    if path.stat().st_size > _MOST_DESCRIPTION:
        raise pickle.UnpicklingError(f"{METADATA} holds more than {_MOST_DESCRIPTION:,} bytes")
    file = io.BytesIO(path.read_bytes())  # of a file, as many bytes are made room for as its own steps ask for
    try:
        return _checked_description(_Descriptions(file).load(), folder)
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # bytes that are no pickle can mean anything, an operation that was taken away too
        raise pickle.UnpicklingError(f"{METADATA} cannot be read: {type(error).__name__}") from error


def _checked_description(found: Any, folder: Path) -> Metadata:
    """A description made anew of what a file says, if that speaks of this folder's own files and of no more than they hold.

    Raises:
        pickle.UnpicklingError: it does not.
    """
    if (
        type(found) is not Metadata
        or type(found.state_dict_metadata) is not dict
        or type(found.storage_data) is not dict
    ):
        raise pickle.UnpicklingError(f"{METADATA} is no description of shards")
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.distcp") if path.is_file()}
    if not all(type(key) is _Where for key in found.storage_data):
        raise pickle.UnpicklingError(f"{METADATA} has a place without a name")
    there = [(where.index, _place(place, folder, sizes)) for where, place in found.storage_data.items()]
    _check_apart(place for _, place in there)
    bytes_of: dict[str, int] = {}
    for index, place in there:
        _check_offset(index, found.state_dict_metadata.get(index.fqn))
        bytes_of[index.fqn] = bytes_of.get(index.fqn, 0) + place.length
    places = dict(there)
    offsets: dict[str, set[torch.Size | None]] = {}
    for index in places:
        offsets.setdefault(index.fqn, set()).add(index.offset)
    entries: dict[str, Any] = {}
    for name, entry in found.state_dict_metadata.items():
        if type(name) is not str:
            raise pickle.UnpicklingError(f"{METADATA} has a name that is none")
        if type(entry) is TensorStorageMetadata:
            entries[name] = _tensor(name, entry, bytes_of.get(name, 0), offsets.get(name, set()))
        elif type(entry) is BytesStorageMetadata and name.startswith(OPTIMIZER):
            entries[name] = BytesStorageMetadata()
        else:
            raise pickle.UnpicklingError(f"{METADATA} has {name!r}, which is no tensor and may be a pickled object")
    return Metadata(entries, _paths(found.planner_data, entries), places, StorageMeta())


def _index(index: Any) -> MetadataIndex:
    offset = getattr(index, "offset", None)
    if type(index) is not MetadataIndex or type(index.fqn) is not str or len(index.fqn) > _LONGEST_NAME:
        raise pickle.UnpicklingError(f"{METADATA} has a place without a name")
    return MetadataIndex(
        index.fqn, None if offset is None else _sizes(offset), index.index if type(index.index) is int else None
    )


def _check_offset(index: MetadataIndex, entry: Any) -> None:
    """A piece begins in its tensor. DCP keeps pieces by their offsets; among so few there are no thousands with one hash."""
    if index.offset is None:
        return
    size = _sizes(getattr(entry, "size", None))
    inside = len(size) == len(index.offset) and all(at <= n for at, n in zip(index.offset, size, strict=True))
    if not inside or math.prod(n + 1 for n in size) > _MOST_NUMBERS:
        raise pickle.UnpicklingError(f"{METADATA} has a piece of {index.fqn!r} that lies in no such tensor")


def _place(place: Any, folder: Path, sizes: dict[str, int]) -> _StorageInfo:
    name, offset, length = place.relative_path, place.offset, place.length
    if type(name) is not str or not _SHARD.fullmatch(name) or name not in sizes or (folder / name).is_symlink():
        shown = repr(name[:200]) if type(name) is str else "what is no name"
        raise pickle.UnpicklingError(f"{METADATA} sends readers to {shown}, which is none of this folder's shards")
    if type(offset) is not int or type(length) is not int or not 0 <= offset <= offset + length <= sizes[name]:
        raise pickle.UnpicklingError(f"{METADATA} reaches beyond the end of {name}")
    if getattr(place, "transform_descriptors", None):
        raise pickle.UnpicklingError(f"{METADATA} wants {name} transformed, which no checkpoint of this project does")
    return _StorageInfo(name, offset, length)


def _check_apart(places: Iterable[_StorageInfo]) -> None:
    """The same bytes again and again would be a tensor of any size."""
    ends: dict[str, int] = {}
    for place in sorted(places, key=lambda place: (place.relative_path, place.offset, place.length)):
        if place.offset < ends.get(place.relative_path, 0):
            raise pickle.UnpicklingError(f"{METADATA} reads the same bytes of {place.relative_path} more than once")
        ends[place.relative_path] = place.offset + place.length


def _tensor(
    name: str, entry: TensorStorageMetadata, there: int, offsets: set[torch.Size | None]
) -> TensorStorageMetadata:
    size, dtype = _sizes(entry.size), entry.properties.dtype
    if not isinstance(dtype, torch.dtype) or math.prod(size) * dtype.itemsize > there:
        raise pickle.UnpicklingError(f"{METADATA} describes more of {name!r} than the shards hold")
    # Each piece has a place of its own in a file; one list may stand for thousands, and one place be read for thousands of pieces.
    if type(entry.chunks) is not list or len(entry.chunks) > len(offsets):
        raise pickle.UnpicklingError(f"{METADATA} describes {name!r} in more pieces than there are")
    chunks = [ChunkStorageMetadata(_sizes(chunk.offsets), _sizes(chunk.sizes)) for chunk in entry.chunks]
    for chunk in chunks:
        if chunk.offsets not in offsets:
            raise pickle.UnpicklingError(f"{METADATA} has a piece of {name!r} without a place, or two in one")
        offsets.remove(chunk.offsets)
    if sum(math.prod(chunk.sizes) for chunk in chunks) > math.prod(size):
        raise pickle.UnpicklingError(f"{METADATA} describes {name!r} more than once")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _sizes(sizes: Any) -> torch.Size:
    if not isinstance(sizes, tuple) or len(sizes) > 16 or not all(type(n) is int and 0 <= n < 2**48 for n in sizes):
        raise pickle.UnpicklingError(f"{METADATA} has a size that is none")
    return torch.Size(sizes)


def _paths(planner_data: Any, entries: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Under which keys of nested dictionaries and lists the entries belong."""
    found: dict[str, tuple[Any, ...]] = {}
    for name in entries:
        path = planner_data.get(name) if isinstance(planner_data, dict) else None
        path = (name,) if path is None else path
        right = type(path) is tuple and all(
            type(key) is str or (type(key) is int and 0 <= key < len(entries)) for key in path
        )
        if (
            not right
            or ".".join(map(str, path)) != name
            or (name.startswith(WEIGHTS) and not all(type(k) is str for k in path))
        ):
            raise pickle.UnpicklingError(f"{METADATA} files {name!r} under another name")
        found[name] = path
    return found
