"""The registry of runs: a folder for each, plain files in it, no server and no account.

    config.yaml        the resolved configuration
    run.json           how it went: command, configuration hash, git state, environment, times, status; earlier attempts
    results.json       what was measured: scores with intervals, parameters, FLOPs, state, speed, memory, kernels, data
    csv/metrics.csv    metrics over the optimizer steps
    checkpoints/

``Recorded`` writes run.json while a run lives; ``find_runs`` and ``runs_table`` (``runs.py``) read all of it back:

>>> from src.runs.registry import find_runs, runs_table
>>> table = runs_table(find_runs("logs"))  # pandas, one row a run
"""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only

from src import __version__
from src.runs.foreign import Unreadable
from src.runs.git import code_words, git_state
from src.runs.runs import (
    COSTS,
    FAILED,
    FINISHED,
    INTERRUPTED,
    LOST,
    RUNNING,
    Run,
    find_runs,
    read_record,
    runs_table,
)
from src.runs.schema import IDENTITY
from src.support.errors import ConfigError
from src.support.files import write_text

__all__ = [
    "COSTS",
    "FAILED",
    "FINISHED",
    "INTERRUPTED",
    "LOST",
    "RUNNING",
    "Recorded",
    "Run",
    "find_runs",
    "runs_table",
]

log = logging.getLogger(__name__)

PACKAGES = ("torch", "lightning", "hydra-core", "numpy", "numba", "triton", "fla-core", "mamba-ssm", "causal-conv1d")


class Recorded:
    """Context of a run: writes run.json when it begins, and how it ended. Only the first rank writes.

    Args:
        folder: of the run.
        config_hash: see ``config.experiment_hash``.
        resumed_from: the checkpoint that it goes on from.
    """

    def __init__(self, folder: Path, config_hash: str, resumed_from: str | None = None):
        self.path = folder / "run.json"
        self.attempt: dict[str, Any] = {
            "status": RUNNING,
            "config_hash": config_hash,
            "identity": IDENTITY,
            "version": __version__,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "resumed_from": resumed_from,
            "started": _now(),
            "ended": None,
            "seconds": None,
            "exit_status": None,
            "error": None,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "git": git_state(),
            "environment": environment(),
        }
        self.clock = time.perf_counter()
        self.other_code = _other_code(resumed_from, self.attempt["git"])
        # A start that is refused leaves the record of a run as it is. One that was cut off may say at once that it is back.
        self.before = _read_json(self.path)
        self.agreed = self.before is None
        same = self.before is not None and self.before.get("config_hash") == config_hash
        self.begun = self.agreed or (same and Run(folder).status != FINISHED)

    def __enter__(self) -> Recorded:
        if self.begun:
            self._write()
        return self

    def begin(self) -> None:
        """Nothing speaks against the run any more: from now on the record is its own."""
        if self.other_code:
            _tell(self.other_code)
        self.agreed, self.other_code = True, None
        if not self.begun:
            self.begun = True
            self._write()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        status, code = FINISHED, 0
        if isinstance(error, KeyboardInterrupt | SystemExit):
            given = getattr(error, "code", None)
            status, code = INTERRUPTED, given if isinstance(given, int) else 1
        elif error is not None:
            status, code = FAILED, 1
            self.attempt["error"] = f"{type(error).__name__}: {error}"[:2000]
        self.attempt |= {
            "status": status,
            "exit_status": code,
            "ended": _now(),
            "seconds": round(time.perf_counter() - self.clock, 3),
        }
        if not self.begun:
            return
        try:
            if self.agreed or not isinstance(error, ConfigError):
                self._write()
            else:
                rank_zero_only(write_json)(self.path, self.before or {})
        except OSError as write_error:  # what the run has to say for itself is worth more than its record
            log.error(
                f"{self.path} cannot be written ({write_error}): it will say that the run is still running, or lost"
            )

    @rank_zero_only
    def _write(self) -> None:
        earlier = []
        if self.path.is_file():
            # Half a file, as a power cut leaves it, must not keep the run from going on.
            before = _read_json(self.path) or {"status": "unreadable", "started": None, "pid": None}
            earlier = before.pop("earlier", [])
            earlier = earlier if isinstance(earlier, list) else []
            if (before.get("started"), before.get("pid")) != (self.attempt["started"], self.attempt["pid"]):
                earlier.append(before)
        write_json(self.path, self.attempt | {"earlier": earlier})


def _other_code(checkpoint: str | None, here: Any) -> str | None:
    """A warning when the run of a checkpoint has last been at work under other code than there is here.

    Args:
        checkpoint: that a run goes on from, in the folder ``checkpoints`` of the run that wrote it; None for a run from the start.
        here: the state of the code.
    """
    if checkpoint is None:
        return None
    folder = Path(checkpoint).resolve().parent.parent
    before, now = code_words(Run(folder).record.get("git")), code_words(here)
    if not before or not now or before == now:
        return None
    return f"going on with other code than before: {before} there, {now} here; the results will be of both ({folder / 'run.json'})"


@rank_zero_only
def _tell(words: str) -> None:
    log.warning(words)


def environment() -> dict[str, Any]:
    """The software and the machine that a run's numbers may depend on."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "packages": {name: number for name in PACKAGES if (number := _version(name)) is not None},
    }
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["cuda"] = torch.version.cuda
    return found


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory that was in use at once: allocated on the GPU, or resident of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file whole or not at all: a reader, or a crash, never meets half of it."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any] | None:
    """None for a run.json that is missing, or is not what was written: half of it, or bytes of something else."""
    try:
        return read_record(path)
    except (FileNotFoundError, Unreadable):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
