"""Checkpoints in shards: a folder as torch.distributed.checkpoint (DCP) writes it, one file or more for each process.

    step00000500.ckpt/
        __0_0.distcp, __1_0.distcp, ...   tensors, each process's own shard
        .metadata                         what is where
        meta.pt                           all the rest: configuration, steps, schedules
        SHA256SUMS                        written last, over the other files

DCP pickles its ``.metadata``. It is read here only when it names nothing but DCP's own descriptions, so that opening a folder from
elsewhere runs nobody's code. Any number of processes can go on from any number of shards.
"""

from __future__ import annotations

import pickle
import shutil
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save

from src.build import model_from_config
from src.checkpoints.integrity import PREFIX, SUMS, sha256
from src.checkpoints.optimizer_state import named, numbered
from src.config import instantiate
from src.files import PART

METADATA, META = ".metadata", "meta.pt"
WEIGHTS, OPTIMIZER = "state_dict", "optimizer_"  # DCP's keys, as Lightning names them

# What a description of tensors and where they lie is made of: types, not functions that do something.
_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_TYPES = {
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
}


def is_sharded(path: Path) -> bool:
    """Whether a path is a folder of shards."""
    return path.is_dir() and (path / METADATA).is_file()


class _Descriptions(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        described = module in _MODULES and "." not in name and isinstance(_named(module, name), type)
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if described or dtype or (module, name) in _TYPES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{METADATA} names {module}.{name}, which is no description of tensors")


def _named(module: str, name: str) -> Any:
    return getattr(import_module(module), name, None)


def read_metadata(folder: Path) -> Any:
    """DCP's description of a folder of shards.

    Raises:
        pickle.UnpicklingError: it is damaged, or names what is no description.
        OSError: it is not there.
    """
    with (folder / METADATA).open("rb") as file:
        try:
            return _Descriptions(file).load()
        except (AttributeError, ImportError, EOFError, IndexError, TypeError, ValueError, KeyError) as error:
            raise pickle.UnpicklingError(f"{METADATA} cannot be read: {error}") from error


def read_shards(folder: Path, *, optimizer: bool = True) -> dict[str, Any]:
    """A folder of shards as the single file that the same run would have written, in memory.

    Args:
        folder: of the shards.
        optimizer: its state too, twice as large as the weights.
    """
    names = read_metadata(folder).state_dict_metadata
    prefixes = {name.partition(".")[0] for name in names}
    keys = {p for p in prefixes if p == WEIGHTS or optimizer}
    state: dict[str, Any] = {}
    _load_state_dict(
        state,
        storage_reader=FileSystemReader(folder),
        planner=_EmptyStateDictLoadPlanner(keys=keys),
        no_dist=True,
    )
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
