"""Files that are there whole or not at all, and folders that one process at a time works in."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from pathlib import Path

PART = ".part"  # ends the name of what is being written; left behind only by a process that was killed


def part_of(path: Path) -> Path:
    """Under which name this process writes what will be ``path``."""
    return path.with_name(f"{path.name}.{os.getpid()}{PART}")


def remove_parts(folder: Path) -> None:
    """Removes what processes that were killed have left half-written; for the only one that works in a folder."""
    for part in folder.glob(f"*{PART}"):
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a small file, on the disk when this returns; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


class Lock:
    """An exclusive lock on a folder; released by ``release``, and by the end of every process that has inherited it.

    Args:
        folder: made if need be.
        name: of the file that stands for it.
    """

    def __init__(self, folder: Path, name: str = "job.lock"):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / name
        self._file: int | None = None

    def acquire(self, seconds: float = 0.0) -> bool:
        """Takes the lock unless somebody else has it, and keeps it for so long.

        Raises:
            OSError: the file system knows no locks.
        """
        until = time.monotonic() + seconds
        while not self._try():
            if time.monotonic() >= until:
                return False
            time.sleep(0.1)
        return True

    def _try(self) -> bool:
        if self._file is not None:
            return True
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError:
            os.close(descriptor)
            raise
        self._file = descriptor
        return True

    @property
    def descriptor(self) -> int:
        """The open file that a child process has to inherit to hold the lock too."""
        assert self._file is not None, "not acquired"
        return self._file

    def release(self) -> None:
        """Gives this process's share of the lock back."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
