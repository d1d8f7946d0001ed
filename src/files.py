"""Files that are there whole or not at all: a reader, or a crash, never meets half of one."""

from __future__ import annotations

import os
from pathlib import Path

PART = ".part"  # ends the name of what is being written; left behind only by a process that was killed


def part_of(path: Path) -> Path:
    """Under which name this process writes what will be ``path``."""
    return path.with_name(f"{path.name}.{os.getpid()}{PART}")


def write_text(path: Path, text: str) -> None:
    """Writes a small file, on the disk when this returns; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
