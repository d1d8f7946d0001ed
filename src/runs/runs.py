"""Reads runs back: folders of plain files that may be of any age, of any version of this project, damaged, or somebody else's.

Nothing heavy is imported here: a report over thousands of runs needs neither PyTorch nor Lightning.
"""

from __future__ import annotations

import csv
import io
import math
import os
import socket
from collections.abc import Container, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from src.runs.foreign import Unreadable, clean_text, read_bytes, read_json, read_yaml, shaped
from src.runs.schema import RECORD, RESULTS, SETTINGS, bounded

if TYPE_CHECKING:
    import pandas as pd

RUNNING, FINISHED, FAILED, INTERRUPTED, LOST = "running", "finished", "failed", "interrupted", "lost"
UNREADABLE = "unreadable"  # of a run whose records are not what was written; the reasons are its ``problems``
MOST_CURVE_BYTES = 512 << 20
LAST_STEP = 10**15  # that a curve may have; a floating-point number still tells it from the next one
WITHOUT_RUNS = ("checkpoints", "csv")  # folders of a run in which there are no others
MOST_LEVELS = 50  # of folders below the one in which runs are looked for

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


# What a report of sweeps shows of a run besides its costs.
KEPT_OF_RECORD = {"status", "config_hash", "seconds", "host", "pid", "error", "git", "environment", "earlier"}
KEPT_OF_RESULTS = {"metrics", "config_hash", "data", "chance", *COSTS}


class Run:
    """A run's folder, read when asked. A file that is not what was written reads as missing, and ``problems`` names it.

    Args:
        folder: holds run.json.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._problems: dict[str, str] = {}  # file -> what is wrong with it

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self.status})"

    @cached_property
    def record(self) -> dict[str, Any]:
        """run.json."""
        return self._read("run.json", read_record)

    @cached_property
    def results(self) -> dict[str, Any]:
        """results.json; empty unless the run has finished."""
        return self._read("results.json", lambda path: cast(dict[str, Any], read_json(path, RESULTS)))

    @property
    def config(self) -> dict[str, Any]:
        """config.yaml: the resolved configuration; read anew each time, because thousands of them would fill the memory."""
        return self._read("config.yaml", read_yaml)

    @property
    def composed(self) -> dict[str, Any]:
        """The configuration as Hydra composed it, before anything was filled in; empty for a run without a command line."""
        return self._read(".hydra/config.yaml", read_yaml)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What tables show of config.yaml, each of its kind."""
        return self._read("config.yaml", lambda path: cast(dict[str, Any], shaped(read_yaml(path), SETTINGS)))

    @property
    def problems(self) -> list[str]:
        """What is wrong with run.json and results.json, and with what else has been read."""
        _ = self.record, self.results
        return [f"{name}: {reason}" for name, reason in self._problems.items()]

    @property
    def status(self) -> str:
        """running, finished, failed, interrupted; or lost, for one that was killed without a word."""
        status = self.record.get("status", LOST)
        if status == RUNNING and self.record.get("host") == socket.gethostname() and not _alive(self.record.get("pid")):
            return LOST
        return FINISHED if status == FINISHED and self.results else LOST if status == FINISHED else status

    @property
    def metrics(self) -> dict[str, float]:
        """Final metrics, ``test/accuracy`` and so on."""
        return self.results.get("metrics", {})

    def curve(self, metric: str) -> pd.Series:
        """A metric over finished optimizer steps; empty when it was not logged."""
        import pandas as pd

        values = self.curves([metric])[metric]
        return pd.Series(list(values.values()), index=list(values), name=metric, dtype=float)

    def curves(self, metrics: Sequence[str]) -> dict[str, dict[int, float]]:
        """Several metrics over finished optimizer steps, from one look at the file: metric -> step -> value."""
        try:
            found, problem = _curves_in(self.folder / "csv" / "metrics.csv", tuple(metrics))
            if problem:
                self._problems["csv/metrics.csv"] = problem
            return found
        except FileNotFoundError:
            pass
        except (Unreadable, csv.Error, UnicodeDecodeError, MemoryError) as error:  # a curve less, and the scores stand
            self._problems["csv/metrics.csv"] = clean_text(str(error))[:200]
        return {metric: {} for metric in metrics}

    def slim(self) -> None:
        """Forgets what no report shows: of thousands of runs it would be most of the memory."""
        for kept, known in ((KEPT_OF_RECORD, self.record), (KEPT_OF_RESULTS, self.results)):
            for key in known.keys() - kept:
                del known[key]

    def _read(self, name: str, read: Any) -> dict[str, Any]:
        try:
            return read(self.folder / name)
        except FileNotFoundError:
            return {}
        except Unreadable as error:
            self._problems[name] = str(error)
            return {}


def read_record(path: Path) -> dict[str, Any]:
    """A run.json.

    Raises:
        FileNotFoundError: there is none.
        Unreadable: it is something else.
    """
    return cast(dict[str, Any], read_json(path, RECORD))


_last_read: dict[tuple[Any, ...], Any] = {}


def _curves_in(path: Path, metrics: tuple[str, ...]) -> tuple[dict[str, dict[int, float]], str]:
    """See ``_curves``; a file that many runs share, by links of whichever kind, is read once."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from None
    key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, metrics)
    if key not in _last_read:
        found = _curves(read_bytes(path, MOST_CURVE_BYTES), metrics)
        _last_read.clear()  # one may fill a good part of the memory
        _last_read[key] = found
    curves, problem = _last_read[key]
    return {metric: dict(values) for metric, values in curves.items()}, problem


def _curves(content: bytes, metrics: Sequence[str]) -> tuple[dict[str, dict[int, float]], str]:
    """The last value of every step, and what is wrong with the file: rows that are not whole, or hold what is no number, are left out.

    What a writer was in the middle of, at the end of the file, is no fault, and no row: half a number looks like one.

    Raises:
        Unreadable: a step is a number that none can be; it would decide how all others are drawn.
    """
    rows = csv.reader(io.StringIO(content[: content.rfind(b"\n") + 1].decode()))
    header = next(rows, [])
    found: dict[str, dict[int, float]] = {metric: {} for metric in metrics}
    if "step" not in header:
        return found, "it has no column 'step'" if content else ""
    place = header.index("step")
    columns = [(header.index(metric), found[metric]) for metric in found if metric in header]
    damaged = 0
    for row in rows:
        damaged += len(row) != len(header)
        for column, values in columns if len(row) == len(header) else []:
            if text := row[column]:
                try:
                    step, value = float(row[place]), float(text)
                except ValueError:
                    damaged += 1
                    continue
                if not math.isnan(step) and not 0 <= step <= LAST_STEP:
                    raise Unreadable(f"step {step:g}: steps are counted from 0, and to {LAST_STEP:.0e} at most")
                if not math.isnan(step) and not math.isnan(value):
                    values[int(step) + 1] = bounded(value)
    return found, f"{damaged:,} of its rows are no rows of numbers" if damaged else ""


def find(root: str | Path, name: str, problems: list[tuple[str, str]] | None = None) -> Iterator[Path]:
    """Files of a name below a folder; links to folders are not followed, so there are no circles.

    Args:
        root: the folder.
        name: of the files.
        problems: gets the folders that cannot be looked into, and why; one that lies too deep is one of them.
    """

    def refused(error: OSError) -> None:
        if problems is not None:
            problems.append((clean_text(str(error.filename)), error.strerror or str(error)))

    for folder, folders, files in os.walk(root, onerror=refused):
        if name in files or name in folders:  # a folder of that name is for the reader to refuse
            yield Path(folder) / name
        folders[:] = sorted(entry for entry in folders if entry not in WITHOUT_RUNS)
        if folders and len(Path(folder).relative_to(root).parts) >= MOST_LEVELS:  # os.walk calls itself for each
            folders.clear()
            if problems is not None:
                problems.append((clean_text(folder), f"folders more than {MOST_LEVELS} deep are not looked into"))


def find_runs(
    root: str | Path, problems: list[tuple[str, str]] | None = None, but: Container[str] = frozenset()
) -> list[Run]:
    """All runs below a folder, oldest first.

    Args:
        root: the folder.
        problems: gets the folders that cannot be looked into, and why.
        but: real paths of folders to leave out.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; runs are written below logs/")
    folders = (path.parent for path in find(root, "run.json", problems))
    runs = [Run(folder) for folder in folders if not but or os.path.realpath(folder) not in but]
    return sorted(runs, key=lambda run: (run.record.get("started") or "", str(run.folder)))


def runs_table(runs: Iterable[Run]) -> pd.DataFrame:
    """One row a run: folder, status, hash, the settings that are compared most, costs, and every final metric."""
    import pandas as pd

    return pd.DataFrame([run_line(run) for run in runs])


def run_line(run: Run) -> dict[str, Any]:
    """A row of ``runs_table``; where one of the run's files is not what was written, its status says so."""
    settings, results, record = run.settings, run.results, run.record
    if results.get("config_hash") != record.get("config_hash"):
        results = {}  # those of a shorter run, which this one is continuing
    model, data = settings.get("model") or {}, results.get("data") or {}
    what = data.get("task") or data.get("corpus")
    return (
        {
            "folder": clean_text(str(run.folder)),
            "status": UNREADABLE if run.problems else run.status,
            "name": settings.get("name"),
            "config_hash": record.get("config_hash"),
            "commit": (record.get("git") or {}).get("commit"),
            "data": what if isinstance(what, str | None) else str(what)[:80],
            "mixer": _mixers(model),
            "position": _class(settings.get("position")),
            "dim": model.get("dim"),
            "depth": model.get("depth"),
            "canon": (settings.get("canon") or {}).get("positions"),
            "seed": settings.get("seed"),
            "learning_rate": (settings.get("optimizer") or {}).get("lr"),
        }
        | {key: results.get(key) for key in COSTS}
        | (results.get("metrics") or {})
    )


def _mixers(model: dict[str, Any]) -> str | None:
    """Such as Attention, or GatedDeltaNet+Attention for a mixed stack."""
    mixers = model.get("mixers") or {}
    used = dict.fromkeys(_class(mixers.get(letter)) for letter in model.get("pattern") or "")
    return "+".join(name for name in used if name) or None


def _class(node: dict[str, Any] | None) -> str | None:
    target = (node or {}).get("_target_")
    return target.rpartition(".")[2] if target else None


def _alive(pid: Any) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
