"""A table of measured values: shares with their intervals, and the level of chance beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.runs.foreign import Unreadable, read_json
from src.runs.schema import RESULTS
from src.support.console import print_cells
from src.support.errors import RunError, printable


def print_scores(
    title: str, metrics: dict[str, float], intervals: dict[str, dict[str, float]], chance: Mapping[str, float | None]
) -> None:
    """One row a metric.

    Args:
        title: of the table.
        metrics: values by name, ``<split>/<metric>``.
        intervals: what ``evaluation.statistics.intervals`` makes of the counts, for metrics that are shares.
        chance: what guessing scores, by metric without the split.
    """
    rows = []
    for name, value in metrics.items():
        own = intervals.get(name)
        floor = chance.get(name.partition("/")[2])
        rows.append(
            [
                name,
                f"{value:.4f}",
                f"{own['low']:.4f} - {own['high']:.4f}" if own else "",
                f"{own['total']:,.0f}" if own else "",
                "" if floor is None else f"{floor:.4f}",
            ]
        )
    print_cells(title, ["metric", "value", "95% interval", "answers", "chance"], rows, wrapped=False)


def print_results(path: Path) -> None:
    """The table of a run's ``results.json``: of the test, or of the validation if there was no test.

    Raises:
        RunError: the file, which may have come with a folder of somebody else's, is not what a run writes.
    """
    try:
        results: Any = read_json(path, RESULTS)
    except Unreadable as error:
        raise RunError(f"{printable(path)}: {error}; remove it, and the same command measures again") from None
    metrics = results["metrics"]
    tested = {name: value for name, value in metrics.items() if name.startswith("test/")}
    title = results.get("name") or path.parent.name
    if results.get("steps") is not None:
        title += f", step {results['steps']:.0f}"
    print_scores(title, tested or metrics, results.get("intervals") or {}, results.get("chance") or {})
    print(f"written to {path}")
