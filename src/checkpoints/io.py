"""Writing checkpoints: whole or not at all, with a checksum, in the background if wanted; a full disk loses nothing.

    step00000500.ckpt            the checkpoint
    step00000500.ckpt.sha256     its checksum, as ``sha256sum -c`` reads it
    *.part                       being written; left behind only by a process that was killed

A file appears under its name when every byte of it is on the disk. The checksum is taken of the bytes on their way, so a disk or a
copy that changes them later is noticed.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.fabric.plugins.io import CheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from src.checkpoints.integrity import CHECKSUM
from src.checkpoints.plain import load_plain
from src.checkpoints.sharded import is_sharded, read_shards
from src.support.files import part_of, write_text

log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointFiles(CheckpointIO):
    """Lightning's way to files, made safe.

    A checkpoint that finds no room is given up with an error in the log, and training goes on: what had been saved before stays, and the
    next one is tried again. What is to be removed is kept until a newer checkpoint is whole.

    Args:
        asynchronous: write in a thread while training goes on, from a copy of all tensors in memory.
    """

    config_name = "checkpoint_files"

    def __init__(self, asynchronous: bool = False):
        self.asynchronous = asynchronous
        self.failed: str | None = None  # the newest checkpoint that could not be written
        self._unwanted: list[Path] = []  # to be removed after the next success
        self._thread: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes, or begins to.

        Raises:
            OSError: for whatever but a full disk; of a write in the background at the next call.
        """
        self._raise_errors()
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)  # now: links to the file are made before it is written
        if not self.asynchronous:
            self._save(checkpoint, path)
            return
        copied = apply_to_collection(checkpoint, Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))
        self._submit(self._save, copied, path)

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a checkpoint once the newest one is whole."""
        if self.asynchronous:
            self._submit(self._remove, Path(path))
        else:
            self._remove(Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Opens a checkpoint, one of shards too, as plain data, whatever ``weights_only`` says."""
        if is_sharded(Path(path)):
            return read_shards(Path(path))
        return load_plain(Path(path))

    def wait(self) -> None:
        """Returns when everything is on the disk.

        Raises:
            OSError: what went wrong in the background.
        """
        for future in self._pending:
            future.exception()
        self._raise_errors()

    def teardown(self) -> None:
        """Waits, and ends the thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None
        self._raise_errors()

    def _submit(self, task: Any, *arguments: Any) -> None:
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending = [future for future in self._pending if not future.done() or future.exception()]
        self._pending.append(self._thread.submit(task, *arguments))

    def _raise_errors(self) -> None:
        done = [future for future in self._pending if future.done()]
        self._pending = [future for future in self._pending if not future.done()]
        for future in done:
            future.result()

    def _save(self, checkpoint: dict[str, Any], path: Path) -> None:
        try:
            write_checkpoint(checkpoint, path)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            self.failed = str(path)
            free = shutil.disk_usage(path.parent).free / 2**30
            log.error(
                f"no room for checkpoint {path} ({free:.2f} GiB free): {error}. Training goes on, older checkpoints are kept, and "
                "the next one is tried again"
            )
            return
        self.failed = None
        for old in self._unwanted:
            _remove_files(old)
        self._unwanted.clear()

    def _remove(self, path: Path) -> None:
        if self.failed is not None:
            self._unwanted.append(path)
        else:
            _remove_files(path)


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint and its checksum, each whole or not at all.

    Raises:
        OSError: it could not be written; nothing is left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    checksum = path.with_name(path.name + CHECKSUM)
    try:
        with part.open("wb") as file:
            hashed = _Hashed(file)
            try:
                torch.save(checkpoint, cast(IO[bytes], hashed))
            except RuntimeError as error:
                # torch's writer wraps what the file says into an error of its own.
                raise hashed.error or error from error
            file.flush()
            os.fsync(file.fileno())
        # The old checksum goes first: no file ever stands beside that of another, and one without any is verified by its own CRCs.
        checksum.unlink(missing_ok=True)
        if path.is_dir() and not path.is_symlink():  # of shards, as another strategy has written it
            shutil.rmtree(path)
        os.replace(part, path)
        write_text(checksum, f"{hashed.digest}  {path.name}\n")
        _sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


class _Hashed:
    """A file that is written once, front to back, and knows the SHA-256 of it."""

    def __init__(self, file: IO[bytes]):
        self._file, self._hash = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            written = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self._hash.update(data)
        return written

    def flush(self) -> None:
        self._file.flush()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


def _remove_files(path: Path) -> None:
    if path.suffix != ".ckpt" or not path.stem.strip("."):
        raise ValueError(f"{path} has no name of a checkpoint and is not removed")
    if is_sharded(path) and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.with_name(path.name + CHECKSUM).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems cannot
        pass
    finally:
        os.close(descriptor)
