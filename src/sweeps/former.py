"""Jobs that an earlier version has finished: their folders bear hashes of another kind, and are found again by what was computed there.

``former.json``, in the folder of all jobs, keeps what has been found, so that the configuration of a finished job is read once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter

from src.config.records import hash_of
from src.runs.foreign import Unreadable, read_json
from src.runs.runs import FINISHED, Run
from src.support.files import write_text
from src.sweeps.plan import Job

INDEX = "former.json"

_SCHEMA = TypeAdapter(dict[str, str])
_HASH = re.compile("[0-9a-f]{12}")


def recognised(jobs: list[Job], root: Path, told: Callable[[str], object] = lambda words: None) -> list[Job]:
    """The jobs; one that an earlier version has finished with the folder in which it did.

    Args:
        jobs: of a plan.
        root: folder of all jobs.
        told: called with words about what is being done.
    """
    missing = {job.name for job in jobs if not job.folder(root).exists()}
    if not missing or not root.is_dir():
        return jobs
    folders = former_folders(root, told)
    return [replace(job, former=folders[job.name]) if job.name in missing & folders.keys() else job for job in jobs]


def former_folders(root: Path, told: Callable[[str], object] = lambda words: None) -> dict[str, str]:
    """Hash of a job -> the name of the folder in which an earlier version has finished it.

    Args:
        root: folder of all jobs.
        told: called with words about what is being done.
    """
    known = before = _index(root / INDEX)
    unknown = sorted(path for path in root.iterdir() if _HASH.fullmatch(path.name) and path.name not in before)
    for number, folder in enumerate(unknown, start=1):
        run = Run(folder)
        if folder.is_symlink() or run.status != FINISHED or run.results.get("identity") is not None:
            continue
        told(f"reading jobs of an earlier version, {number:,} of {len(unknown):,}")
        known = known | {folder.name: hash_of(run) or ""}
    if known != before:
        with suppress(OSError):  # somebody else's folder: they are read again the next time
            write_text(root / INDEX, json.dumps(known, indent=1, sort_keys=True) + "\n")
    return {found: name for name, found in known.items() if found != name and (root / name).is_dir()}


def _index(path: Path) -> dict[str, str]:
    try:
        known = read_json(path, _SCHEMA)
    except (FileNotFoundError, Unreadable):
        return {}
    return {name: found for name, found in known.items() if _HASH.fullmatch(name)}
