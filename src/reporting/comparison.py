"""A table of test metrics and a figure of learning curves, from runs on disk."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

# What the figure shows, of the metrics that exist: the first that every variant has, by kind of data.
CURVES = ("val/bits_per_parameter", "val/accuracy", "val/bits_per_byte", "val/loss")


@dataclass(frozen=True)
class Variant:
    """A finished run."""

    name: str
    folder: Path
    test_metrics: dict[str, float]


def print_table(variants: list[Variant], chance: dict[str, float]) -> None:
    """One row a test metric, one column a variant, and the chance level where there is one."""
    table = Table(title="test set")
    table.add_column("metric")
    for variant in variants:
        table.add_column(variant.name, justify="right")
    if chance:
        table.add_column("chance", justify="right")
    for metric in variants[0].test_metrics:
        if metric.startswith("test/"):
            own = metric.removeprefix("test/")
            row = [f"{variant.test_metrics.get(metric, float('nan')):.3f}" for variant in variants]
            table.add_row(
                own,
                *row,
                *([f"{chance[own]:.3f}" if own in chance else ""] if chance else []),
            )
    Console().print(table)


def read_curve(folder: Path, metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric in a run's ``csv/metrics.csv``; steps count finished optimizer steps."""
    steps, values = [], []
    path = folder / "csv" / "metrics.csv"
    if not path.is_file():  # a run without the csv logger
        return steps, values
    with path.open() as file:
        for row in csv.DictReader(file):
            if row.get(metric):
                steps.append(int(row["step"]) + 1)
                values.append(float(row[metric]))
    return steps, values


def draw(variants: list[Variant], path: Path, title: str, chance: float | None = None) -> Path:
    """Draws training loss and one validation metric over the steps, all variants in each panel.

    Args:
        variants: finished runs.
        path: of the figure.
        title: above it.
        chance: accuracy of guessing, drawn as a line where accuracy is shown.

    Returns:
        ``path``, a PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = next(m for m in CURVES if all(read_curve(v.folder, m)[0] for v in variants) or m == CURVES[-1])
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, metric_axes = figure.subplots(1, 2)
    for variant in variants:
        loss_axes.plot(*read_curve(variant.folder, "train/loss"), label=variant.name, linewidth=1.2)
        metric_axes.plot(*read_curve(variant.folder, shown), label=variant.name, marker="o", markersize=3)
    loss_axes.set(xlabel="optimizer step", ylabel="training loss (nats per target)", title="training")
    metric_axes.set(xlabel="optimizer step", ylabel=shown.removeprefix("val/").replace("_", " "), title="validation")
    if shown == "val/accuracy":
        metric_axes.set_ylim(0, 1.02)
        if chance is not None:
            metric_axes.axhline(chance, color="grey", linestyle=":", label="chance")
    for axes in (loss_axes, metric_axes):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
