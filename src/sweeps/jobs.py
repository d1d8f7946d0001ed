"""The folder of a job: what is there already, who is working on it, and how to start it.

A job's folder is a run's folder (``src/reporting/registry.py``) and ``job.lock``. Whoever holds the lock runs the job. The lock is
inherited by the job's own process, so it lasts as long as that: when a sweep is killed its jobs go on, and the next sweep
waits for them instead of starting them again. Several sweeps may share the work, on one machine or on a shared file system.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from src.checkpoints.files import first_whole
from src.checkpoints.integrity import by_age, step_of
from src.config import ConfigError
from src.overrides import as_override
from src.reporting.runs import Run
from src.sweeps.plan import Job

ROOT = Path(__file__).resolve().parents[2]


class Start(NamedTuple):
    """How to start a job."""

    command: list[str]
    step: int  # from which it goes on


def is_finished(job: Job, root: Path) -> bool:
    """Whether a run of exactly this configuration has ended well."""
    return Run(job.folder(root)).is_finished(job.name)


def start_of(job: Job, root: Path, *, tidy: bool = True) -> Start:
    """The command that runs a job, from its newest whole checkpoint on where there is one. To be called with the lock held.

    Args:
        job: the job.
        root: folder of all jobs.
        tidy: put checkpoints that cannot be gone on from out of the way; for one of the processes that run the job together.
    """
    folder = job.folder(root)
    if "${" in str(folder):
        raise ConfigError(
            f"{folder}: Hydra takes ${{ in the name of a folder for an interpolation; choose another jobs_dir="
        )
    # Hydra sets the second key from the first, and would take an interpolation in the name of a folder for one.
    where = [f"{key}={as_override(str(folder))}" for key in ("hydra.run.dir", "paths.output_dir")]
    command = [sys.executable, str(ROOT / "src" / "train.py"), *job.overrides, *where]
    final = folder / "checkpoints" / "final.ckpt"
    checkpoint = first_whole(path for path in (final, *by_age(final.parent)) if path.exists())
    if checkpoint is not None:
        step = job.config["trainer"]["max_steps"] if checkpoint == final else step_of(checkpoint)
        return Start([*command, f"ckpt_path={as_override(str(checkpoint))}"], step)
    if tidy and any((folder / "checkpoints").glob("*.ckpt")):
        # None of them is whole, and a new run wants a folder without them.
        _set_aside(folder / "checkpoints")
    return Start(command, 0)


def _set_aside(folder: Path) -> None:
    number = next(n for n in range(1, 10_000) if not folder.with_name(f"{folder.name}.{n}").exists())
    folder.rename(folder.with_name(f"{folder.name}.{number}"))
