"""A table of measured values: shares with their intervals, and the level of chance beside them."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table


def print_scores(
    title: str, metrics: dict[str, float], intervals: dict[str, dict[str, float]], chance: dict[str, float]
) -> None:
    """One row a metric.

    Args:
        title: of the table.
        metrics: values by name, ``<split>/<metric>``.
        intervals: what ``evaluation.statistics.intervals`` makes of the counts, for metrics that are shares.
        chance: what guessing scores, by metric without the split.
    """
    table = Table(title=title)
    for column in ("metric", "value", "95% interval", "answers", "chance"):
        table.add_column(column, justify="left" if column == "metric" else "right", no_wrap=column == "metric")
    for name, value in metrics.items():
        own = intervals.get(name)
        floor = chance.get(name.partition("/")[2])
        table.add_row(
            name,
            f"{value:.4f}",
            f"{own['low']:.4f} - {own['high']:.4f}" if own else "",
            f"{own['total']:,}" if own else "",
            "" if floor is None else f"{floor:.4f}",
        )
    Console().print(table)


def print_results(path: Path) -> None:
    """The table of a run's ``results.json``: of the test, or of the validation if there was no test."""
    results = json.loads(path.read_text())
    metrics = results["metrics"]
    tested = {name: value for name, value in metrics.items() if name.startswith("test/")}
    print_scores(
        f"{results['name']}, step {results['steps']}", tested or metrics, results["intervals"], results["chance"]
    )
    print(f"written to {path}")
