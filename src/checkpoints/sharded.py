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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict, load
from torch.distributed.checkpoint.state_dict_saver import save

from src.build import model_from_config
from src.checkpoints.integrity import PREFIX, SUMS, sha256
from src.checkpoints.optimizer_state import named, numbered
from src.config import instantiate
from src.files import PART

METADATA, META = ".metadata", "meta.pt"
WEIGHTS, OPTIMIZER = "state_dict", "optimizer_"  # DCP's keys, as Lightning names them

# What a description of tensors and where they lie is made of, by name: a module's other classes do things.
_DCP = "torch.distributed.checkpoint"
_TYPES = {
    *((f"{_DCP}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((f"{_DCP}.metadata", f"{kind}StorageMetadata") for kind in ("Tensor", "Bytes", "Chunk")),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
}
_SHARD = re.compile(r"[\w-]+\.distcp")
_MOST_DESCRIPTION = 2**28  # bytes of .metadata


def is_sharded(path: Path) -> bool:
    """Whether a path is a folder of shards."""
    return path.is_dir() and (path / METADATA).is_file()


class _Descriptions(pickle._Unpickler):  # the one in Python, whose steps can be replaced
    """Knows DCP's descriptions and nothing else, and changes no class."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        dtype = module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype)
        if dtype or (module_name, global_name) in _TYPES:
            return super().find_class(module_name, global_name)
        raise pickle.UnpicklingError(
            f"{METADATA} names {module_name}.{global_name}, which is no description of tensors"
        )

    def load_build(self) -> None:
        if isinstance(self.stack[-2], type):  # type: ignore[attr-defined]
            raise pickle.UnpicklingError(f"{METADATA} wants to change a class")
        super().load_build()  # type: ignore[misc]

    dispatch = dict(pickle._Unpickler.dispatch) | {pickle.BUILD[0]: load_build}  # type: ignore[attr-defined]


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
            found = _Descriptions(file).load()
            _check_description(found, folder)
        except pickle.UnpicklingError:
            raise
        except Exception as error:  # bytes that are no pickle can mean anything
            raise pickle.UnpicklingError(f"{METADATA} cannot be read: {type(error).__name__}: {error}") from error
    found.storage_meta = StorageMeta()
    return found


def _check_description(found: Any, folder: Path) -> None:
    """Raises an UnpicklingError unless a description speaks of this folder's own files, and of no more than they hold."""
    if type(found) is not Metadata or not isinstance(found.state_dict_metadata, dict):
        raise pickle.UnpicklingError(f"{METADATA} is no description of shards")
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.distcp") if path.is_file()}
    for place in found.storage_data.values():
        name = str(place.relative_path)
        if not _SHARD.fullmatch(name) or name not in sizes or (folder / name).resolve().parent != folder.resolve():
            raise pickle.UnpicklingError(f"{METADATA} sends readers to {name!r}, which is none of this folder's shards")
        if not 0 <= place.offset <= place.offset + place.length <= sizes[name]:
            raise pickle.UnpicklingError(f"{METADATA} reaches beyond the end of {name}")
        if place.transform_descriptors:
            raise pickle.UnpicklingError(
                f"{METADATA} wants {name} transformed, which no checkpoint of this project does"
            )
    claimed = 0
    for name, entry in found.state_dict_metadata.items():
        path = (found.planner_data or {}).get(name)
        if path is not None and (not isinstance(path, tuple) or ".".join(map(str, path)) != name):
            raise pickle.UnpicklingError(f"{METADATA} files {name!r} under another name")
        if type(entry) is TensorStorageMetadata:
            claimed += math.prod(entry.size) * entry.properties.dtype.itemsize
        elif type(entry) is not BytesStorageMetadata or not name.startswith(OPTIMIZER):
            raise pickle.UnpicklingError(f"{METADATA} has {name!r}, which is no tensor and may be a pickled object")
    if claimed > sum(sizes.values()):
        raise pickle.UnpicklingError(f"{METADATA} describes {claimed:,} bytes of tensors, more than the shards hold")


class _Reader(FileSystemReader):
    """Reads by a description that has been checked, instead of unpickling the file once more."""

    def __init__(self, folder: Path, description: Metadata):
        super().__init__(folder)
        self._description = description

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checked one, whichever is asked for."""
        return self._description


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
    return torch.load(value, weights_only=True)


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
        elif not isinstance(torch.load(piece, map_location="cpu", weights_only=True), torch.Tensor):
            raise pickle.UnpicklingError(f"{name!r} is no tensor")
    torch.load(folder / META, map_location="cpu", weights_only=True)


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
    found = dict(torch.load(folder / META, map_location="cpu", weights_only=True))
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
    """
    config = checkpoint["config"]
    net = model_from_config(config["model"], device="meta")
    built = instantiate(config["optimizer"] | {"fused": False}, "optimizer")(net.named_parameters())
    return named(optimizer, ((PREFIX + name, parameter) for name, parameter in net.named_parameters()), built)


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
