"""The folder of a job: what is there already, who is working on it, and how to start it.

A job's folder is a run's folder (``src/runs/registry.py``) and ``job.lock``. Whoever holds the lock runs the job. The lock is
inherited by the job's own process, so it lasts as long as that: when a sweep is killed its jobs go on, and the next sweep
waits for them instead of starting them again. Several sweeps may share the work, on one machine or on a shared file system.
"""

from __future__ import annotations

import json
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from src.checkpoints.files import first_whole, newest_first, read_checkpoint
from src.config import ConfigError, instantiate
from src.config.identity import changed_data
from src.config.quoting import as_override
from src.config.records import has_finished
from src.datamodules.base import StreamDataModule
from src.runs.runs import Run
from src.support.files import Lock, strange_in
from src.sweeps.plan import Job

ROOT = Path(__file__).resolve().parents[2]


class Start(NamedTuple):
    """How to start a job."""

    command: list[str]
    step: int  # from which it goes on


def is_finished(job: Job, root: Path) -> bool:
    """Whether a run of exactly this configuration has ended well, on the data that there are now."""
    run = Run(job.folder(root))
    return has_finished(run, job.recorded_name) and not changed_data(
        run.results.get("data"), expected_data(job.config["data"])
    )


def expected_data(data: dict[str, Any]) -> dict[str, Any]:
    """What a run's results would say of its data, as the files are now; see ``StreamDataModule.expected_fingerprint``.

    Args:
        data: the section of a resolved configuration.
    """
    return _of_task(json.dumps(data, sort_keys=True)) if "task" in data else _fingerprint(data)


@lru_cache(maxsize=4096)
def _of_task(data: str) -> dict[str, Any]:  # hardly ever a file, and thousands of jobs share it
    return _fingerprint(json.loads(data))


def _fingerprint(data: dict[str, Any]) -> dict[str, Any]:
    datamodule: StreamDataModule = instantiate(data, "data")
    return datamodule.expected_fingerprint()


def lock_of(job: Job, root: Path) -> Lock:
    """The lock on a job's folder, which is made if need be.

    Raises:
        ConfigError: the folder, or something in it, leads elsewhere: whatever the job writes would be written there.
    """
    folder = job.folder(root)
    strange = f"it is a link to {str(folder.readlink())!r}" if folder.is_symlink() else strange_in(folder, of_job=True)
    if strange is not None:
        raise ConfigError(f"{folder}: {strange}. Remove it, or choose another jobs_dir=")
    return Lock(folder)


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
    run = Run(folder)
    if (
        tidy
        and has_finished(run, job.recorded_name)
        and changed_data(run.results.get("data"), expected_data(job.config["data"]))
    ):
        _keep_other_run(folder)
    checkpoint = first_whole(newest_first(folder / "checkpoints"))
    if checkpoint is not None:
        step = read_checkpoint(checkpoint, tensors="none")["global_step"]
        return Start([*command, f"ckpt_path={as_override(str(checkpoint))}"], step)
    if tidy and any((folder / "checkpoints").glob("*.ckpt")):
        # None of them is whole, and a new run wants a folder without them.
        _set_aside(folder / "checkpoints")
    return Start(command, 0)


def _keep_other_run(folder: Path) -> None:
    """Moves the run of the same configuration on other data out of the way of a new one."""
    aside = _free(folder / "other_data")
    aside.mkdir()
    for part in list(folder.iterdir()):
        if part.suffix != ".lock" and not part.name.startswith("other_data"):
            part.rename(aside / part.name)


def _set_aside(folder: Path) -> None:
    folder.rename(_free(folder))


def _free(path: Path) -> Path:
    return next(p for n in range(1, 10_000) if not (p := path.with_name(f"{path.name}.{n}")).exists())
