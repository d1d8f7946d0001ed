"""Is a checkpoint whole, and which is the newest that is?

What is checked, in this order: it opens as plain data (``weights_only``); it was written by this project, in a format that this version
reads; its bytes are those that were written (SHA-256 beside the file, or the CRCs inside it where the checksum is missing).
"""

from __future__ import annotations

import hashlib
import logging
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

CHECKPOINT_FORMAT = 1
PART = ".part"
CHECKSUM = ".sha256"
SUMS = "SHA256SUMS"  # of a folder of shards
_CHUNK = 2**24


def damage(path: Path) -> str | None:
    """What is wrong with the bytes of a checkpoint, in words; None if nothing is."""
    path = path.resolve()
    return _damaged_folder(path) if path.is_dir() else _damaged_file(path)


def _damaged_file(path: Path) -> str | None:
    written = path.with_name(path.name + CHECKSUM)
    if not path.is_file():
        return "it does not exist"
    if not zipfile.is_zipfile(path):
        return f"it is cut off or no checkpoint at all ({path.stat().st_size:,} bytes)"
    if written.is_file():
        expected = written.read_text().split()[:1]
        return None if expected == [sha256(path)] else "its bytes are not those that were written (SHA-256)"
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        return str(error)
    return None if broken is None else f"its part {broken} has changed (CRC-32)"


def _damaged_folder(path: Path) -> str | None:
    sums = path / SUMS
    if not sums.is_file():
        return f"it has no {SUMS}: it was not written to its end"
    for line in sums.read_text().splitlines():
        digest, _, name = line.partition("  ")
        if not (path / name).is_file():
            return f"{name} is missing"
        if sha256(path / name) != digest:
            return f"the bytes of {name} are not those that were written (SHA-256)"
    return None


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal digits."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


@dataclass(frozen=True)
class Found:
    """A checkpoint by its name: its optimizer step."""

    step: int
    path: Path


def by_age(folder: Path) -> list[Found]:
    """The numbered checkpoints of a run, newest first; none of them opened."""
    numbered = ((re.fullmatch(r"step(\d+)\.ckpt", path.name), path) for path in folder.glob("step*.ckpt"))
    return sorted(
        (Found(int(match[1]), path) for match, path in numbered if match), key=lambda found: found.step, reverse=True
    )


def newest_whole(folder: Path, below: int | None = None) -> Found | None:
    """The newest numbered checkpoint whose bytes are whole; each damaged one that is passed over is reported.

    Args:
        folder: a run's ``checkpoints``.
        below: only of steps before this one.
    """
    for found in by_age(folder):
        if below is not None and found.step >= below:
            continue
        problem = damage(found.path)
        if problem is None:
            return found
        log.warning(f"checkpoint {found.path} is damaged: {problem}; the one before it is taken")
    return None
