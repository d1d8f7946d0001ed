"""A table of test metrics and a figure of learning curves, from runs on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.runs.runs import Run
from src.support.console import print_cells

# What the figure shows, of the metrics that exist: the first that every variant has, by kind of data.
CURVES = ("val/bits_per_parameter", "val/accuracy", "val/bits_per_byte", "val/loss")


@dataclass(frozen=True)
class Variant:
    """A finished run."""

    name: str
    folder: Path
    test_metrics: dict[str, float]
    chance: dict[str, float]  # what guessing gives on its data, by metric


def print_table(variants: list[Variant]) -> None:
    """Test metrics of every variant, and the chance levels where there are any: the longer list makes the rows."""
    named = dict.fromkeys(name for v in variants for name in v.test_metrics if name.startswith("test/"))
    metrics = [name.removeprefix("test/") for name in named]
    columns = {v.name: {m: v.test_metrics.get(f"test/{m}") for m in metrics} for v in variants}
    # Variants may differ in their data, and with them in what guessing gives.
    same = all(v.chance == variants[0].chance for v in variants)
    for v in variants[:1] if same else variants:
        if v.chance:
            columns["chance" if same else f"chance of {v.name}"] = dict(v.chance)
    names = list(columns)
    if len(names) <= max(4, len(metrics)):
        heading, rows = ["metric", *names], [(m, [columns[name].get(m) for name in names]) for m in metrics]
    else:
        heading, rows = ["", *metrics], [(name, [columns[name].get(m) for m in metrics]) for name in names]
    cells = [[text, *("" if value is None else f"{value:.3f}" for value in values)] for text, values in rows]
    print_cells("test set", heading, cells)


def draw(variants: list[Variant], path: Path, title: str) -> Path:
    """Draws training loss and one validation metric over the steps, all variants in each panel.

    Args:
        variants: finished runs.
        path: of the figure.
        title: above it.

    Returns:
        ``path``, a PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = next(m for m in CURVES if all(len(Run(v.folder).curve(m)) for v in variants) or m == CURVES[-1])
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, metric_axes = figure.subplots(1, 2)
    for i, variant in enumerate(variants):
        # Ten colours, and then the same ones dashed.
        style: dict[str, Any] = {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--", "label": variant.name}
        loss, metric = (Run(variant.folder).curve(name) for name in ("train/loss", shown))
        loss_axes.plot(loss.index, loss, linewidth=1.2, **style)
        metric_axes.plot(metric.index, metric, marker="o", markersize=3, **style)
    loss_axes.set(xlabel="optimizer step", ylabel="training loss (nats per target)", title="training")
    metric_axes.set(xlabel="optimizer step", ylabel=shown.removeprefix("val/").replace("_", " "), title="validation")
    if shown == "val/accuracy":
        metric_axes.set_ylim(0, 1.02)
        levels = [variant.chance.get("accuracy") for variant in variants]
        for i, level in enumerate(levels[:1] if len(set(levels)) == 1 else levels):
            if level is not None:
                one = len(set(levels)) == 1
                metric_axes.axhline(
                    level, color="grey" if one else f"C{i % 10}", linestyle=":", label="chance" if one else None
                )
    for axes in (loss_axes, metric_axes):
        axes.yaxis.label.set_parse_math(False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for text in metric_axes.legend(frameon=False, fontsize="small" if len(variants) > 4 else None).get_texts():
        text.set_parse_math(False)
    figure.suptitle(title, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
