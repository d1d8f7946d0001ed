"""Checkpoints in shards: a folder as torch.distributed.checkpoint (DCP) writes it, one file or more for each process.

    step00000500.ckpt/
        __0_0.distcp, __1_0.distcp, ...   tensors, each process's own shard
        .metadata                         what is where
        meta.pt                           all the rest: configuration, steps, schedules
        SHA256SUMS                        written last, over the other files

DCP pickles its ``.metadata``, and every value that is no tensor, and by itself unpickles them without looking. Here the description
is read once, by an unpickler that knows nothing else, and checked against the files (``description.py``); and that checked description
is what DCP reads by (``_Reader``). Values that are no tensors are read as plain data, and there are none among weights
(``_Planner``). So opening a folder from elsewhere runs nobody's code. Any number of processes can go on from any number of shards.
"""

from __future__ import annotations

import io
import pickle
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict, load
from torch.distributed.checkpoint.state_dict_saver import save

from src.checkpoints.described import described_model
from src.checkpoints.description import META, METADATA, OPTIMIZER, WEIGHTS, read_metadata
from src.checkpoints.integrity import PREFIX, SUMS, sha256
from src.checkpoints.optimizer_state import named, numbered
from src.checkpoints.plain import check_plain, load_plain
from src.config.building import optimizer_without_kernels
from src.support.files import PART


def is_sharded(path: Path) -> bool:
    """Whether a path is a folder of shards."""
    return path.is_dir() and (path / METADATA).is_file()


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
        built = optimizer_without_kernels(checkpoint["config"]["optimizer"], net)
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
