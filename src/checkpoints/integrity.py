"""Are the bytes of a checkpoint those that were written? By the SHA-256 beside it, or the CRCs inside where that is missing.

Whether what they say is a checkpoint of this project, ``files.py`` asks.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from pathlib import Path

from src.checkpoints.plain import refuse_compressed

CHECKPOINT_FORMAT = 2
READABLE_FORMATS = (1, 2)  # 1 holds dotted paths of classes instead of their names
PREFIX = "net."  # of the model's weights in a state_dict
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
    try:
        with path.open("rb") as file:
            refuse_compressed(file)  # first: a file with a hole may be of any length, and has no directory at its end
            broken = None if written.is_file() else zipfile.ZipFile(file).testzip()
    except Exception as error:  # a changed bit of the directory may mean anything: another compression, a password, a name in no alphabet
        return f"its {path.stat().st_size:,} bytes are cut off, changed or no checkpoint at all ({error})"
    if written.is_file() and _start_of(written).split()[:1] != [sha256(path)]:
        return f"its {path.stat().st_size:,} bytes are not those that were written (SHA-256)"
    return None if broken is None else f"its part {broken} has changed (CRC-32)"


def _damaged_folder(path: Path) -> str | None:
    sums = path / SUMS
    if not sums.is_file():
        return f"it has no {SUMS}: it was not written to its end"
    if sums.stat().st_size > 2**24:
        return f"its {SUMS} is no list of checksums"
    written = {line[66:]: line[:64] for line in sums.read_text(errors="replace").splitlines()}
    if odd := next((name for name in written if not re.fullmatch(r"[\w.-]+", name)), None):
        return f"its {SUMS} names {odd!r}, which is no file of this folder"
    for name in sorted(written.keys() | {".metadata"} | {file.name for file in path.glob("*.distcp")}):
        if (path / name).is_symlink():
            return f"{name!r} is a link"
        if not (path / name).is_file():
            return f"{name!r} is missing"
        if written.get(name) != sha256(path / name):
            return f"the bytes of {name!r} are not those that were written (SHA-256)"
    return None


def _start_of(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(1000).decode("utf-8", "replace")


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal digits; of as many as it says it has, because some of the system's never end."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size
        while chunk := file.read(min(_CHUNK, left)):
            found.update(chunk)
            left -= len(chunk)
    return found.hexdigest()


def step_of(path: Path) -> int:
    """The optimizer step that a numbered checkpoint's name says; -1 for another name."""
    match = re.fullmatch(r"step(\d+)\.ckpt", path.name)
    return int(match[1]) if match else -1
