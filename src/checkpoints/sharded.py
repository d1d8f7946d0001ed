"""Checkpoints in shards: a folder as torch.distributed.checkpoint (DCP) writes it, one file or more for each process.

    step00000500.ckpt/
        __0_0.distcp, __1_0.distcp, ...   tensors, each process's own shard
        .metadata                         what is where
        meta.pt                           all the rest: configuration, steps, schedules
        SHA256SUMS                        written last, over the other files

DCP pickles its ``.metadata``, and every value that is no tensor, and by itself unpickles them without looking. Here the description
is read once, by an unpickler that knows DCP's own descriptions and nothing else; what it says is checked against the files; and that
checked description is what DCP reads by (``_Reader``). Values that are no tensors are read as plain data, and there are none among weights
(``_Planner``). So opening a folder from elsewhere runs nobody's code. Any number of processes can go on from any number of shards.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict, load
from torch.distributed.checkpoint.state_dict_saver import save

from src.checkpoints.described import described_model
from src.checkpoints.integrity import PREFIX, SUMS, sha256
from src.checkpoints.optimizer_state import named, numbered
from src.checkpoints.plain import check_plain, load_plain
from src.config import instantiate
from src.files import PART

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
_MOST_DESCRIPTION = 2**28  # bytes of .metadata


def is_sharded(path: Path) -> bool:
    """Whether a path is a folder of shards."""
    return path.is_dir() and (path / METADATA).is_file()


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

    # What is a key is hashed, and a pair of pairs of pairs would take for ever.

    def load_setitem(self) -> None:
        _check_key(self.stack[-2])  # type: ignore[attr-defined]
        super().load_setitem()  # type: ignore[misc]

    def load_setitems(self) -> None:
        items = self.pop_mark()  # type: ignore[attr-defined]
        for key, value in zip(items[::2], items[1::2], strict=True):
            _check_key(key)
            self.stack[-1][key] = value  # type: ignore[attr-defined]

    dispatch = dict(pickle._Unpickler.dispatch) | {  # type: ignore[attr-defined]
        pickle.BUILD[0]: load_build,
        pickle.REDUCE[0]: load_reduce,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }
    for _unused in (pickle.DICT, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET):
        del dispatch[_unused[0]]


def _check_key(key: Any) -> None:
    if type(key) is not str:
        _index(key)


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
    with path.open("rb") as file:
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
    places = {_index(index): _place(place, folder, sizes) for index, place in found.storage_data.items()}
    _check_apart(places.values())
    bytes_of: dict[str, int] = {}
    for index, place in places.items():
        bytes_of[index.fqn] = bytes_of.get(index.fqn, 0) + place.length
    pieces = 0
    entries: dict[str, Any] = {}
    for name, entry in found.state_dict_metadata.items():
        if type(name) is not str:
            raise pickle.UnpicklingError(f"{METADATA} has a name that is none")
        if type(entry) is TensorStorageMetadata:
            # Each piece has its place in a file, so there cannot be more of them; and a list may stand for many of them.
            entries[name] = _tensor(name, entry, bytes_of.get(name, 0), len(places) - pieces)
            pieces += len(entries[name].chunks)
        elif type(entry) is BytesStorageMetadata and name.startswith(OPTIMIZER):
            entries[name] = BytesStorageMetadata()
        else:
            raise pickle.UnpicklingError(f"{METADATA} has {name!r}, which is no tensor and may be a pickled object")
    return Metadata(entries, _paths(found.planner_data, entries), places, StorageMeta())


def _index(index: Any) -> MetadataIndex:
    offset = getattr(index, "offset", None)
    if type(index) is not MetadataIndex or type(index.fqn) is not str:
        raise pickle.UnpicklingError(f"{METADATA} has a place without a name")
    return MetadataIndex(
        index.fqn, None if offset is None else _sizes(offset), index.index if type(index.index) is int else None
    )


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


def _tensor(name: str, entry: TensorStorageMetadata, there: int, pieces: int) -> TensorStorageMetadata:
    size, dtype = _sizes(entry.size), entry.properties.dtype
    if not isinstance(dtype, torch.dtype) or math.prod(size) * dtype.itemsize > there:
        raise pickle.UnpicklingError(f"{METADATA} describes more of {name!r} than the shards hold")
    if type(entry.chunks) is not list or len(entry.chunks) > pieces:
        raise pickle.UnpicklingError(f"{METADATA} describes {name!r} in more pieces than there are")
    chunks = [ChunkStorageMetadata(_sizes(chunk.offsets), _sizes(chunk.sizes)) for chunk in entry.chunks]
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


class _Reader(FileSystemReader):
    """Reads by a description that has been checked, instead of unpickling the file once more."""

    def __init__(self, folder: Path, description: Metadata):
        super().__init__(folder)
        self._description = description

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checked one, whichever is asked for."""
        return self._description

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> Any:
        """The piece of a file that is read next, in memory: DCP's own view of it cannot be moved about in as a ZIP archive wants."""
        file.seek(sinfo.offset)
        piece = io.BytesIO(file.read(sinfo.length))
        check_plain(piece)
        return piece


class _PlainValues(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Hands on a value that is no tensor: a number, a word, or containers of them."""
        plain = io.BytesIO()
        torch.save(plain_value(value, read_item.dest_index.fqn), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


class _Planner(_PlainValues, _EmptyStateDictLoadPlanner):
    """Reads all that lies under some keys."""


def plain_value(value: io.BytesIO, name: str) -> Any:
    """The value that is no tensor under a key.

    Raises:
        pickle.UnpicklingError: it lies among weights, or is an object.
    """
    if not name.startswith(OPTIMIZER):
        raise pickle.UnpicklingError(f"{name!r} is no tensor and may be a pickled object")
    return load_plain(value)


def check_shards(folder: Path, *, tensors: bool = True) -> None:
    """Opens what is in a folder of shards, one piece after another, as a reader would.

    Args:
        folder: of the shards.
        tensors: these too, which is all of its bytes; without them, the few values that are none.

    Raises:
        pickle.UnpicklingError: something is neither a tensor nor plain data.
    """
    description = read_metadata(folder)
    for name, is_tensor, piece in _pieces(folder, description, tensors):
        if not is_tensor:
            plain_value(piece, name)
        elif not isinstance(load_plain(piece), torch.Tensor):
            raise pickle.UnpicklingError(f"{name!r} is no tensor")
    load_plain(folder / META)


def _pieces(folder: Path, description: Metadata, tensors: bool) -> Iterator[tuple[str, bool, io.BytesIO]]:
    for index, place in description.storage_data.items():
        entry = description.state_dict_metadata.get(index.fqn)
        if isinstance(entry, TensorStorageMetadata) and not tensors:
            continue
        with (folder / str(place.relative_path)).open("rb") as file:
            file.seek(place.offset)
            yield index.fqn, isinstance(entry, TensorStorageMetadata), io.BytesIO(file.read(place.length))


def restore(state: dict[str, Any], folder: Path) -> None:
    """Fills the tensors of a state, sharded as this process has them, from a folder of shards; all processes call it together.

    Raises:
        pickle.UnpicklingError: see ``read_metadata`` and ``plain_value``.
    """
    with _dcp_errors():
        load(state, storage_reader=_Reader(folder, read_metadata(folder)), planner=_PlainValues())


@contextmanager
def _dcp_errors() -> Iterator[None]:
    """DCP collects what went wrong on all processes in something that is no Exception."""
    try:
        yield
    except CheckpointException as error:
        rank, failure = next(iter(error.failures.items()))
        raise pickle.UnpicklingError(f"process {rank}: {failure[0]}") from error


def read_shards(folder: Path, *, optimizer: bool = True) -> dict[str, Any]:
    """A folder of shards as the single file that the same run would have written, in memory.

    Args:
        folder: of the shards.
        optimizer: its state too, twice as large as the weights.
    """
    description = read_metadata(folder)
    prefixes = {name.partition(".")[0] for name in description.state_dict_metadata}
    keys = {p for p in prefixes if p == WEIGHTS or optimizer}
    state: dict[str, Any] = {}
    with _dcp_errors():
        _load_state_dict(state, storage_reader=_Reader(folder, description), planner=_Planner(keys=keys), no_dist=True)
    found = dict(load_plain(folder / META))
    found[WEIGHTS] = state[WEIGHTS]
    optimizers = sorted(key for key in state if key.startswith(OPTIMIZER))
    if optimizers:
        found["optimizer_states"] = [numbered(state[key]) for key in optimizers]
    return found


def write_shards(checkpoint: dict[str, Any], folder: Path, files: int) -> None:
    """A single-file checkpoint as a folder of shards.

    Args:
        checkpoint: as ``read_checkpoint`` returns it.
        folder: must not exist.
        files: how many the tensors are spread over.

    Raises:
        ValueError: see ``by_name``; nothing has been written then.
    """
    part = folder.with_name(folder.name + PART)
    shutil.rmtree(part, ignore_errors=True)
    rest = dict(checkpoint)
    state: dict[str, Any] = {WEIGHTS: dict(rest.pop(WEIGHTS))}
    for i, optimizer in enumerate(rest.pop("optimizer_states", [])):
        state[f"{OPTIMIZER}{i}"] = by_name(optimizer, checkpoint)
    save(state, storage_writer=FileSystemWriter(part, thread_count=files), no_dist=True)
    torch.save(rest, part / META)
    (part / SUMS).write_text(checksums(part, [path.name for path in part.iterdir()]))
    part.rename(folder)


def by_name(optimizer: dict[str, Any], checkpoint: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's numbered state keyed by parameter name: the numbers follow the groups that the configuration makes.

    The model is built on the meta device to learn them.

    Raises:
        ValueError: the configuration makes no such model and optimizer, or the state is that of other parameters.
    """
    try:
        net = described_model(checkpoint)
        built = instantiate(checkpoint["config"]["optimizer"] | {"fused": False}, "optimizer")(net.named_parameters())
        return named(optimizer, ((PREFIX + name, parameter) for name, parameter in net.named_parameters()), built)
    except (
        Exception
    ) as error:  # whatever a constructor says of arguments that make no sense, and a state of what is not in it
        reason = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else str(error)
        raise ValueError(
            f"its optimizer's state belongs to no model that can be built here: {reason[:1000]}"
        ) from error


def checksums(folder: Path, names: list[str]) -> str:
    """Lines of SHA256SUMS for some of a folder's files."""
    return "".join(f"{sha256(folder / name)}  {name}\n" for name in sorted(names) if name != SUMS)


def describe(folder: Path) -> dict[str, int]:
    """How many files, tensors and numbers there are, without reading the tensors."""
    entries = read_metadata(folder).state_dict_metadata
    kinds = Counter(type(entry).__name__ for entry in entries.values())
    tensors = [entry for entry in entries.values() if isinstance(entry, TensorStorageMetadata)]
    return {
        "files": len(list(folder.glob("*.distcp"))),
        "tensors": len(tensors),
        "numbers": sum(entry.size.numel() for entry in tensors),
        "other values": kinds[BytesStorageMetadata.__name__],
    }
