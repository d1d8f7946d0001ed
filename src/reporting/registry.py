"""The registry of runs: a folder for each, plain files in it, no server and no account.

    config.yaml        the resolved configuration
    run.json           how it went: command, configuration hash, git state, environment, times, status; earlier attempts
    results.json       what was measured: scores with intervals, parameters, FLOPs, state, speed, memory, kernels, data
    csv/metrics.csv    metrics over the optimizer steps
    checkpoints/

``Recorded`` writes run.json while a run lives; ``find_runs`` and ``runs_table`` read all of it back:

>>> from src.reporting.registry import find_runs, runs_table
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
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only

from src.files import write_text
from src.reporting.git import git_state

log = logging.getLogger(__name__)

PACKAGES = ("torch", "lightning", "hydra-core", "numpy", "numba", "triton", "fla-core", "mamba-ssm", "causal-conv1d")
RUNNING, FINISHED, FAILED, INTERRUPTED, LOST = "running", "finished", "failed", "interrupted", "lost"


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

    def __enter__(self) -> Recorded:
        self._write()
        return self

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
        try:
            self._write()
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
            if (before["started"], before["pid"]) != (self.attempt["started"], self.attempt["pid"]):
                earlier.append(before)
        write_json(self.path, self.attempt | {"earlier": earlier})


class Run:
    """A run's folder, read when asked.

    Args:
        folder: holds run.json.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self.status})"

    @cached_property
    def record(self) -> dict[str, Any]:
        """run.json."""
        return _read_json(self.folder / "run.json") or {}

    @cached_property
    def results(self) -> dict[str, Any]:
        """results.json; empty unless the run has finished."""
        found = _read_json(self.folder / "results.json") or {}
        metrics = found.get("metrics")
        scores = isinstance(metrics, dict) and all(isinstance(score, int | float) for score in metrics.values())
        return found if scores and isinstance(found.get("seconds"), int | float) else {}

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.yaml: the resolved configuration."""
        path = self.folder / "config.yaml"
        return yaml.safe_load(path.read_text()) if path.is_file() else {}

    @property
    def status(self) -> str:
        """running, finished, failed, interrupted; or lost, for one that was killed without a word."""
        status = self.record.get("status", LOST)
        if status == RUNNING and self.record.get("host") == socket.gethostname() and not _alive(self.record["pid"]):
            return LOST
        return FINISHED if status == FINISHED and self.results else LOST if status == FINISHED else status

    def is_finished(self, config_hash: str) -> bool:
        """Whether a run of exactly this configuration has ended well here."""
        return self.status == FINISHED and self.results.get("config_hash") == config_hash

    @property
    def metrics(self) -> dict[str, float]:
        """Final metrics, ``test/accuracy`` and so on."""
        return self.results.get("metrics", {})

    def curve(self, metric: str) -> pd.Series:
        """A metric over finished optimizer steps; empty when it was not logged."""
        path = self.folder / "csv" / "metrics.csv"
        if path.is_file():
            try:
                table = pd.read_csv(path)
            except ValueError:  # empty, cut off, or bytes of something else: a curve less, and the scores stand
                table = pd.DataFrame()
            if metric in table and "step" in table:
                values = pd.Series(table[metric].to_numpy(), index=table["step"].to_numpy() + 1, name=metric).dropna()
                return values.loc[~values.index.duplicated(keep="last")]
        return pd.Series(dtype=float, name=metric)


def find_runs(root: str | Path) -> list[Run]:
    """All runs below a folder, oldest first.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; runs are written below logs/")
    runs = [Run(path.parent) for path in root.rglob("run.json")]
    return sorted(runs, key=lambda run: (run.record.get("started", ""), str(run.folder)))


def runs_table(runs: Iterable[Run]) -> pd.DataFrame:
    """One row a run: folder, status, hash, the settings that are compared most, costs, and every final metric."""
    rows = []
    for run in runs:
        config, results = run.config, run.results
        rows.append(
            {
                "folder": str(run.folder),
                "status": run.status,
                "name": config.get("name"),
                "config_hash": run.record.get("config_hash"),
                "commit": (run.record.get("git") or {}).get("commit"),
                "data": (results.get("data") or {}).get("task") or (results.get("data") or {}).get("corpus"),
                "mixer": _mixers(config.get("model") or {}),
                "position": _class((config.get("position") or {}).get("_target_")),
                "dim": (config.get("model") or {}).get("dim"),
                "depth": (config.get("model") or {}).get("depth"),
                "canon": config.get("canon", {}).get("positions"),
                "seed": config.get("seed"),
                "learning_rate": config.get("optimizer", {}).get("lr"),
            }
            | {key: results.get(key) for key in COSTS}
            | run.metrics
        )
    return pd.DataFrame(rows)


def _mixers(model: dict[str, Any]) -> str | None:
    """Such as Attention, or GatedDeltaNet+Attention for a mixed stack."""
    mixers = model.get("mixers") or {}
    used = dict.fromkeys(_class((mixers.get(letter) or {}).get("_target_")) for letter in model.get("pattern") or "")
    return "+".join(name for name in used if name) or None


def _class(target: str | None) -> str | None:
    return target.rpartition(".")[2] if target else None


# What a run costs: numbers of results.json.
COSTS = (
    "parameters",
    "flops_per_token",
    "state_size",
    "steps",
    "tokens",
    "training_flops",
    "tokens_per_second",
    "peak_memory_bytes",
    "seconds",
)


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
    """None for a file that is missing, or is not what was written: half of it, or bytes of something else."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # no UTF-8 and no JSON are both ValueErrors
        return None
    return content if isinstance(content, dict) else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
