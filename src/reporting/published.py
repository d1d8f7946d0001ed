"""Numbers that others have published, and ours beside them. The tables, and where they come from: ``published/README.md``.

>>> from src.reporting.published import published
>>> published("Depo1(K=8)", "Llama(NoPE) Canon-ABCD(res)", "N=225", "12L768D")  # accuracy in % at k=8 and at k=4
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from src.evaluation.names import lower_is_better
from src.reporting.results import Cell
from src.reporting.statistics import student_interval
from src.reporting.tables import Line, Row, SweepTables, finite
from src.reporting.wording import known

if TYPE_CHECKING:
    import pandas as pd

FOLDER = Path(__file__).parent / "published"
SYNTHETIC = "part41_synthetic"
SIZES = ("8L512D", "12L512D", "8L768D", "12L768D")


class Entry(NamedTuple):
    """A cell of a published table."""

    values: list[float]
    metric: str
    source: str


def published(task: str, arch: str, difficulty: str, size: str) -> list[float]:
    """The published numbers of one model on one synthetic task.

    Args:
        task: such as Depo1(K=8).
        arch: such as Llama(NoPE) Canon-ABCD(res).
        difficulty: such as N=225.
        size: such as 12L768D.

    Returns:
        One number for most tasks; two for Depo, accuracies at K and at K/2 steps; none where the paper has none.

    Raises:
        ConfigError: a name stands nowhere in the table.
    """
    entry = _entry(task, arch, difficulty, size)
    return entry.values if entry else []


def table(name: str) -> pd.DataFrame:
    """One of the tables as it was published.

    Raises:
        ConfigError: there is none of that name.
    """
    import pandas as pd

    from src.config import ConfigError, suggest

    names = sorted(path.stem for path in FOLDER.glob("*.csv"))
    if name not in names:
        raise ConfigError(f"published table {name!r}: {suggest(name, names)}")
    return pd.read_csv(FOLDER / f"{name}.csv")


def beside(tables: SweepTables) -> tuple[list[Line], list[str]]:
    """Our scores and the published ones, for what the sweep says is the same setting.

    Returns:
        One row a number, ours in the unit of the paper; and what is wrong with the names that the sweep gives.
    """
    names = tables.sweep.plan.get("published") or {}
    found: list[Line] = []
    problems: list[str] = []
    for (row, variant), cell in tables.cells.items():
        where, arch = (names.get("tasks") or {}).get(row.task), (names.get("variants") or {}).get(variant)
        if where is None or arch is None:
            continue
        try:
            size = str(cell.others.get("size", where.get("size", "")))
            entry = _entry(where.get("task", ""), arch, where.get("difficulty", ""), size)
        except ValueError as error:
            problems.append(str(error))
            continue
        if entry is not None:
            found += _compared(tables, row, cell, where, f"{arch}, {where['difficulty']}, {size}", entry)
    return found, list(dict.fromkeys(problems))


def _compared(
    tables: SweepTables, row: Row, cell: Cell, where: Mapping[str, str], name: str, entry: Entry
) -> list[Line]:
    found = []
    for value, (quantity, metric, factor) in zip(
        entry.values, _quantities(where["task"], cell.metric, entry), strict=False
    ):
        at_rate = [run.metrics[metric] * factor for run in tables.runs_of(cell) if known(run.metrics.get(metric))]
        anywhere = [tables.runs[folder].metrics.get(metric) for folder in cell.folders.values()]
        scores = [score * factor for score in anywhere if score is not None and known(score)]
        # The sweep may compare by another metric, with another direction.
        better = min if lower_is_better(metric) else max
        low, high = student_interval(at_rate) if at_rate else (None, None)
        found.append(
            {
                "task": row.task,
                "setting": row.setting,
                "variant": cell.variant,
                "published_as": name,
                "quantity": quantity,
                "published": value,
                "mean": sum(at_rate) / len(at_rate) if at_rate else None,
                "low": finite(low),
                "high": finite(high),
                "seeds": len(at_rate),
                "best": better(scores) if scores else None,
                "source": entry.source,
            }
        )
    return found


def _quantities(task: str, metric: str, entry: Entry) -> list[tuple[str, str, float]]:
    """What each published number is: its name, which metric of ours is the same, and the factor to its unit."""
    if match := re.search(r"K=(\d+)", task):
        most = int(match[1])
        return [(f"accuracy at k={k}, %", f"test/accuracy/hop{k}", 100.0) for k in (most, most // 2)]
    if entry.metric.startswith("KL"):
        return [("divergence from the truth", metric if metric.endswith("/kl") else "test/kl", 1.0)]
    return [("accuracy, %", "test/accuracy", 100.0)]


def _entry(task: str, arch: str, difficulty: str, size: str) -> Entry | None:
    entries = _synthetic()
    for name, value, position in (
        ("task", task, 0),
        ("variants", arch, 1),
        ("difficulty", difficulty, 2),
        ("size", size, 3),
    ):
        existing = {key[position] for key in entries}
        if value not in existing:
            from src.config import ConfigError, suggest  # with all of Lightning, for those who misspell

            raise ConfigError(f"published {name}={value!r}: {suggest(value, existing)}")
    return entries.get((task, arch, difficulty, size))


@cache
def _synthetic() -> dict[tuple[str, str, str, str], Entry]:
    found = {}
    with (FOLDER / f"{SYNTHETIC}.csv").open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            for size in SIZES:
                if line[size]:
                    values = [float(part) for part in line[size].split("/")]
                    key = (line["task"], line["arch"], line["difficulty"], size)
                    found[key] = Entry(values, line["metric"], line["source"])
    return found
