"""Lightning's CSV logger, except that a resumed run goes on with the file instead of deleting it."""

from __future__ import annotations

import csv
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from src.support.files import put_aside, written_whole

# Of what an earlier attempt has left, which is held in memory: a row as a dictionary takes some ten times its bytes.
MOST_BYTES, MOST_COLUMNS = 2**28, 4096

log = logging.getLogger(__name__)


class CSVLog(CSVLogger):
    """Metrics over time in ``<save_dir>/<name>/<version>/metrics.csv``; arguments are those of ``CSVLogger``."""

    config_name = "csv_log"

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of the file."""
        if self._experiment is None:
            self._fs.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _Continued(log_dir=self.log_dir)
        return self._experiment

    @rank_zero_only
    def has(self, step: int, metric: str) -> bool:
        """Whether an earlier attempt has logged a metric at a step (counted from 0)."""
        return self.experiment.has(step, metric)

    @rank_zero_only
    def go_on_from(self, step: int) -> None:
        """Leaves out what an earlier attempt has logged of steps (counted from 0) from this one on: they are run again."""
        self.experiment.go_on_from(step)


class _Continued(ExperimentWriter):
    """Keeps the rows of an earlier attempt, up to the step from which this one logs them again.

    The file is never rewritten in place: whatever happens on the way, all rows of before or all of after are there. Rows that find no
    room on the disk wait for the next time.
    """

    def _check_log_dir_exists(self) -> None:
        """Replaces the deletion in the base class."""
        self._known = _rows(Path(self.metrics_file_path))
        self._earlier: list[dict[str, str]] | None = self._known or None  # None: nothing is left to be done about it
        self._complained = False

    def log_metrics(self, metrics_dict: Mapping[str, Any], step: int | None = None) -> None:
        """Records metrics of a step."""
        if self._earlier is not None:
            # A test that follows training logs at the last step, and does not train again what came before.
            trains = step is not None and any(name.startswith(("train/", "val/")) for name in metrics_dict)
            # Of the same step only what is not logged again: a run may have been stopped between training and validation.
            again = {name.partition("/")[0] for name in metrics_dict if "/" in name}
            kept = [
                row
                for row in self._earlier
                if (_is_before(row, step or 0, again) if trains else not _is_again(row, step or 0, again))
            ]
            self._earlier = None
            self._restore(kept)
        super().log_metrics(dict(metrics_dict), step)

    def go_on_from(self, step: int) -> None:
        """See ``CSVLog.go_on_from``."""
        if self._earlier is not None:
            self._earlier = self._known = [row for row in self._earlier if int(row["step"]) < step]

    def has(self, step: int, metric: str) -> bool:
        """See ``CSVLog.has``."""
        return any(row["step"] == str(step) and row.get(metric) for row in self._known)

    def save(self) -> None:
        """Appends what has been recorded since the last time, or nothing of it."""
        if not self.metrics:
            return
        path = Path(self.metrics_file_path)
        columns = sorted(set(self.metrics_keys).union(*self.metrics))
        try:
            if path.is_file() and columns != self.metrics_keys:
                with path.open(newline="", encoding="utf-8") as file:
                    rows = list(csv.DictReader(file))
                self._write(rows, columns)
            self.metrics_keys = columns
            self._append(path)
        except OSError as error:
            if not self._complained:
                log.error(f"{path} cannot be written ({error}); training goes on, and what is logged is kept for later")
            self._complained = True
        else:
            self.metrics, self._complained = [], False

    def _append(self, path: Path) -> None:
        size = path.stat().st_size if path.is_file() else None
        try:
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
                if size is None:
                    writer.writeheader()
                writer.writerows(self.metrics)
        except BaseException:
            with suppress(OSError):
                path.unlink(missing_ok=True) if size is None else os.truncate(path, size)
            raise

    def _restore(self, rows: list[dict[str, str]]) -> None:
        self.metrics_keys = sorted({name for row in rows for name in row})
        if rows:
            self._write(rows, self.metrics_keys)
        else:
            Path(self.metrics_file_path).unlink(missing_ok=True)

    def _write(self, rows: list[dict[str, str]], fieldnames: list[str]) -> None:
        with written_whole(Path(self.metrics_file_path)) as file:
            writer = csv.DictWriter(file, fieldnames=fieldnames)
            writer.writeheader()
            writer.writerows(rows)


def _is_again(row: dict[str, str], step: int, again: set[str]) -> bool:
    """Whether a test of this very step is logged once more; one of a former last step stays."""
    return "test" in again & _logged(row) and row.get("step") == str(step)


def _is_before(row: dict[str, str], step: int, again: set[str]) -> bool:
    own = int(row["step"] or 0)
    return own < step or (own == step and "train" in _logged(row) and not _logged(row) & again)


def _logged(row: dict[str, str]) -> set[str]:
    """What kinds of metrics a row holds: train, val, test."""
    return {name.partition("/")[0] for name, value in row.items() if "/" in name and value}


def _rows(path: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics; its last one may have been cut off when its writer was killed.

    A file that is damaged otherwise is put aside, and what is whole of it goes into a new one.
    """
    if not path.is_file():
        return []
    rows: list[dict[str, str]] = []
    problem, damaged = None, 0
    if path.stat().st_size > MOST_BYTES:
        problem = f"it has more than {MOST_BYTES:,} bytes"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            header = [] if problem else next(reader, [])
            if not problem and not ("step" in header and len(header) <= MOST_COLUMNS):
                problem = f"it has no column 'step', or more than {MOST_COLUMNS:,} columns"
            last: list[str] | None = None
            for values in reader if not problem else ():
                damaged += last is not None
                last = None
                row = dict(zip(header, values, strict=False))
                if len(values) == len(header) and _is_whole(row):
                    rows.append(row)
                else:
                    last = values  # not damaged, if it is the end of the file and was being written
            damaged += last is not None and not _is_cut_off(last, path)
    except (UnicodeDecodeError, csv.Error) as error:  # bytes of something else
        problem = str(error)
    if damaged:
        problem = problem or f"{damaged} of its rows cannot be read"
    if problem and path.stat().st_size:
        log.warning(
            f"{path} is damaged: {problem}. It is kept as {put_aside(path).name}; {len(rows)} rows go on in a new one"
        )
    return rows


def _is_cut_off(values: list[str], path: Path) -> bool:
    """Whether a row that is not whole is what a killed writer leaves at the end of a file."""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n" and not any("\n" in value for value in values)


def _is_whole(row: dict[str, str]) -> bool:
    return re.fullmatch("[0-9]{1,15}", row.get("step", "")) is not None
