"""Lightning's CSV logger, except that a resumed run goes on with the file instead of deleting it."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only


class CSVLog(CSVLogger):
    """Metrics over time in ``<save_dir>/<name>/<version>/metrics.csv``; arguments are those of ``CSVLogger``."""

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


class _Continued(ExperimentWriter):
    """Keeps the rows of an earlier attempt, up to the step from which this one logs them again."""

    def _check_log_dir_exists(self) -> None:
        """Replaces the deletion in the base class."""
        self._earlier = self._known = _rows(Path(self.metrics_file_path))

    def log_metrics(self, metrics_dict: Mapping[str, Any], step: int | None = None) -> None:
        """Records metrics of a step."""
        if self._earlier:
            # A test that follows training logs at the last step, and does not train again what came before.
            trains = step is not None and any(name.startswith(("train/", "val/")) for name in metrics_dict)
            # Of the same step only what is not logged again: a run may have been stopped between training and validation.
            again = {name.partition("/")[0] for name in metrics_dict if "/" in name}
            kept = [row for row in self._earlier if not trains or _is_before(row, step or 0, again)]
            self._earlier = []
            self._restore(kept)
        super().log_metrics(dict(metrics_dict), step)

    def has(self, step: int, metric: str) -> bool:
        """See ``CSVLog.has``."""
        return any(row["step"] == str(step) and row.get(metric) for row in self._known)

    def _restore(self, rows: list[dict[str, str]]) -> None:
        self.metrics_keys = sorted({name for row in rows for name in row})
        with Path(self.metrics_file_path).open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)
        if not rows:
            Path(self.metrics_file_path).unlink()


def _is_before(row: dict[str, str], step: int, again: set[str]) -> bool:
    own = int(row["step"] or 0)
    logged = {name.partition("/")[0] for name, value in row.items() if "/" in name and value}
    return own < step or (own == step and "train" in logged and not logged & again)


def _rows(path: Path) -> list[dict[str, str]]:
    """Whole rows of a CSV file: the last may have been cut off when its writer was killed."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file, strict=False)
        try:
            rows = list(reader)
            header = reader.fieldnames or []
        except (UnicodeDecodeError, csv.Error):  # bytes of something else
            return []
    if rows and (None in rows[-1] or None in rows[-1].values()):
        rows.pop()
    return rows if "step" in header else []
