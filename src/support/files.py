"""Files that are there whole or not at all, and folders that one process at a time works in."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

# What a run writes as a file, and what as a folder; and how deep folders may lie in each other, of which a run makes some five.
_FILES = {
    "run.json",
    "results.json",
    "config.yaml",
    "run.lock",
    "job.lock",
    "metrics.csv",
    "index.html",
    "manifest.json",
}
_FILES |= {
    "wandb_run_id",
    "mlflow_run_id",
    *(f"{name}.log" for name in ("train", "evaluate", "report", "sweep", "output")),
}
_FILES_OF_SWEEPS = {"job.lock", "output.log"}  # in a job's folder, besides what the job itself writes
_OTHER_FILES = re.compile(r".*\.sha256|(results-|evaluation_).*\.json")
_FOLDERS = {"checkpoints", "csv", ".hydra", "bad_batches"}
_DEEPEST = 50
PART = ".part"  # ends the name of what is being written; left behind only by a process that was killed


def part_of(path: Path) -> Path:
    """Under which name this process writes what will be ``path``."""
    return path.with_name(f"{path.name}.{os.getpid()}{PART}")


def remove_parts(folder: Path) -> None:
    """Removes what processes that were killed have left half-written; for the only one that works in a folder."""
    if folder.is_symlink():
        return  # it is somebody else's
    for part in folder.glob(f"*{PART}"):
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part)
        else:
            part.unlink()


@contextmanager
def written_whole(path: Path) -> Iterator[IO[str]]:
    """A text file to be written: under its name only when all of it is on the disk, and nothing is left of it if it fails.

    Its folder is made if need be. Line ends are written as they are given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a small file, on the disk when this returns; its folder is made if need be."""
    with written_whole(path) as file:
        file.write(text)


def put_aside(path: Path, why: str = "damaged") -> Path:
    """Renames a file that cannot be used to ``<name>.<why>``, with a number if there are several; returns the new path."""
    aside = path.with_name(f"{path.name}.{why}")
    number = 2
    while aside.exists():
        aside = path.with_name(f"{path.name}.{why}.{number}")
        number += 1
    return path.rename(aside)


def strange_in(folder: Path, *, of_job: bool = False) -> str | None:
    """What in a run's folder, at any depth, must not or cannot be written to, or waited for: it may have come from elsewhere.

    Args:
        folder: of a run; it need not exist.
        of_job: of a sweep, which goes on with other jobs where this one finds a folder in the place of one of its files.

    Returns:
        In words, the first link that leads out of the folder, the first pipe, socket or device, the first folder in the place of a file
        or the other way round, or the first folder that lies too deep; None if there is none.
    """
    home = os.path.realpath(folder)
    waiting = [(home, 0)] if os.path.isdir(home) else []
    while waiting:
        above, depth = waiting.pop()
        if depth > _DEEPEST:
            return f"folders in it lie more than {_DEEPEST} deep in each other"
        try:
            with os.scandir(above) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            return f"{os.path.relpath(above, home)!r} in it cannot be looked into: {error.strerror}"
        for entry in entries:
            if (strange := _strange(entry, home, of_job)) is not None:
                return f"{os.path.relpath(entry.path, home)!r} in it is {strange}"
            # Each record of W&B's is a new folder, never written to again, with links to its own logs in the user's cache.
            inside = not entry.is_symlink() and entry.is_dir()
            if inside and (above == home or os.path.basename(above) != "wandb"):
                waiting.append((entry.path, depth + 1))
    return None


def _strange(entry: os.DirEntry[str], home: str, of_job: bool) -> str | None:
    if entry.is_symlink():
        # A link in a circle leads nowhere, and nothing can be written through it.
        if os.path.commonpath([home, os.path.realpath(entry.path)]) == home:
            return None
        return f"a link to {os.readlink(entry.path)!r}; what is written there would be written elsewhere"
    if entry.is_dir():
        of_hydra = os.path.basename(os.path.dirname(entry.path)) == ".hydra"
        taken = entry.name in _FILES or of_hydra or _OTHER_FILES.fullmatch(entry.name) is not None
        taken = entry.name in _FILES_OF_SWEEPS if of_job else taken
        return "a folder, where a run writes a file" if taken else None
    if not entry.is_file():
        return "a pipe, a socket or a device, and no file"
    return "a file, where a run writes a folder" if entry.name in _FOLDERS and not of_job else None


def leads_out(folder: Path, root: Path) -> str | None:
    """Whether a folder that lies below another by its name lies elsewhere: some link on the way may have come with the other.

    Returns:
        In words, where it lies; None if all is well, or it is not below ``root`` by its name either.
    """
    if not Path(os.path.abspath(folder)).is_relative_to(os.path.abspath(root)):
        return None
    real = os.path.realpath(folder)
    return None if Path(real).is_relative_to(os.path.realpath(root)) else f"a link on the way leads to {real!r}"


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
