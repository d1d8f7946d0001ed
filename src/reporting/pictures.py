"""The figures of a report as PNG files for papers and talks, drawn by matplotlib from the same tables."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from src.reporting.figures import COSTS_SHOWN, cost_ticks, shares_of
from src.reporting.palette import HUES, THEMES, Look, on_scale
from src.reporting.results import CONFIRMED, CONTRADICTED
from src.reporting.tables import Line, Row, SweepTables, of_row
from src.reporting.wording import (
    NOTHING,
    TONES,
    compact,
    half_interval,
    known,
    metric_words,
    number,
    rate,
    row_name,
    scored,
)

COLORS = THEMES["light"]
MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "cross": "P", "x": "X", "star": "*"}
DASHES: dict[str, Any] = {
    "solid": "-",
    "dash": (0, (5, 2)),
    "dot": (0, (1, 1.5)),
    "dashdot": (0, (5, 2, 1, 2)),
    "longdash": (0, (9, 3)),
}
Looks = Mapping[str, Look]
TALLEST = 100  # rows of a picture; more are for a screen, and beyond what a PNG file can hold


def panels_of(tables: SweepTables) -> int:
    """How many panels the grids of a sweep would have, each a twentieth of a second of work."""
    groups = {(line["task"], line["setting"], line["group"]) for line in tables.groups}
    return len({row for row, _ in tables.cells}) * (3 + len(COSTS_SHOWN)) + len(groups)


def draw_pictures(
    tables: SweepTables, looks: Looks, prefix: str, tasks: Mapping[str, str], folder: Path, grids: bool = True
) -> dict[str, list[str]]:
    """Draws everything that a sweep has.

    Args:
        tables: of the sweep.
        looks: of the variants.
        prefix: of the names of files.
        tasks: task -> its part of names of files.
        folder: for the files.
        grids: curves, learning rates, difficulties and costs as well, not only scores and verdicts.

    Returns:
        Names of the files by kind; "curves/Depo" and so on for kinds that have one for each task.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[str]] = {}

    def save(kind: str, task: str | None, figure: Figure | None) -> None:
        if figure is not None:
            name = f"{prefix}_{kind}" + (f"_{tasks[task]}" if task else "") + ".png"
            figure.savefig(folder / name)
            found[f"{kind}/{task}" if task else kind] = [name]

    save("scores", None, heat_map(tables))
    save("verdicts", None, forest(tables))
    measured = {row for row, _ in tables.cells}
    for task in tables.tasks if grids else ():
        rows = [row for row in tables.rows if row.task == task and row in measured]
        quantities = ("train/loss", tables.sweep.plan["selections"][task])
        save(
            "curves",
            task,
            _grid(rows, quantities, tables.variants, lambda axes, row, name: _curves(axes, tables, row, name, looks)),
        )
        save("rates", task, _grid(rows, ("",), tables.variants, lambda axes, row, _: _rates(axes, tables, row, looks)))
        names = sorted({line["group"] for line in tables.groups if line["task"] == task})
        save(
            "groups",
            task,
            _grid(rows, names, tables.variants, lambda axes, row, name: _groups(axes, tables, row, name, looks)),
        )
        save(
            "costs",
            task,
            _grid(rows, COSTS_SHOWN, tables.variants, lambda axes, row, cost: _costs(axes, tables, row, cost, looks)),
        )
    return found


def heat_map(tables: SweepTables) -> Figure | None:
    """Mean over seeds at the best learning rate, printed in cells of the sequential scale."""
    if not tables.cells or len(tables.rows) > TALLEST:
        return None
    width, height = 2.2 + 1.25 * len(tables.variants), 1.0 + 0.75 * len(tables.rows)
    figure, axes = _figure(width, height)
    for y, row in enumerate(tables.rows):
        of = {line["variant"]: line for line in of_row(tables.scores, row)}
        shares = shares_of([of.get(name, {}) for name in tables.variants], "mean", tables.uncertainty(row))
        for x, (name, share) in enumerate(zip(tables.variants, shares, strict=True)):
            color, text = on_scale("light", share) if share is not None else (COLORS["faint"], COLORS["muted"])
            axes.add_patch(_tile(x, y, color))
            if name in of:
                head, told = _cell_lines(of[name])
                axes.text(
                    x,
                    y - 0.12,
                    head,
                    ha="center",
                    va="center",
                    color=text,
                    fontsize=11,
                    fontweight="bold",
                    parse_math=False,
                )
                axes.text(x, y + 0.24, told, ha="center", va="center", color=text, fontsize=7.5, parse_math=False)
    axes.set(xlim=(-0.5, len(tables.variants) - 0.5), ylim=(len(tables.rows) - 0.5, -0.5))
    axes.set_xticks(range(len(tables.variants)), [_broken(name, 14) for name in tables.variants])
    axes.set_yticks(range(len(tables.rows)), [_broken(row_name(row.task, row.setting), 22) for row in tables.rows])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelcolor=COLORS["ink"])
    axes.spines[:].set_visible(False)
    _literal(axes)
    return figure


def forest(tables: SweepTables) -> Figure | None:
    """Differences of statements: Student interval thin, bootstrap interval thick, the claim a tick."""
    lines = [line for line in tables.verdicts if known(line["difference"])]
    if not lines or len(lines) > TALLEST:
        return None
    figure, axes = _figure(7.5, 1.0 + 0.5 * len(lines))
    for y, line in enumerate(lines):
        color = COLORS[TONES.get(line["outcome"], "unsure")]
        for kind, width, alpha in (("student", 1.5, 1.0), ("bootstrap", 6, 0.35)):
            if known(line[f"{kind}_low"]):
                axes.plot(
                    [line[f"{kind}_low"], line[f"{kind}_high"]], [y, y], color=color, linewidth=width, alpha=alpha
                )
        axes.plot(line["by"], y, marker="|", markersize=16, markeredgewidth=2, color=COLORS["ink"])
        marker, face = {CONFIRMED: ("o", color), CONTRADICTED: ("X", color)}.get(
            line["outcome"], ("o", COLORS["paper"])
        )
        axes.plot(line["difference"], y, marker=marker, markersize=8, color=color, markerfacecolor=face)
    axes.axvline(0, color=COLORS["muted"], linewidth=0.8)
    names = [_broken(f"{line['better']} vs {line['than']}, {line['task']}: {line['outcome']}", 44) for line in lines]
    axes.set_yticks(range(len(lines)), names)
    axes.set(ylim=(len(lines) - 0.5, -0.5), xlabel="difference (tick: what was claimed at least)")
    axes.spines["left"].set_visible(False)
    _literal(axes)
    return figure


def _grid(
    rows: Sequence[Row], columns: Sequence[Any], variants: Sequence[str], draw: Callable[[Axes, Row, Any], bool]
) -> Figure | None:
    """Panels for rows x columns, with one legend; None when nothing was drawn."""
    if not rows or not columns or len(rows) > TALLEST:
        return None
    # Margins in inches: matplotlib's own layouts would take most of the time that a report takes.
    width = 3.6 * len(columns) + 0.3
    across = max(1, min(len(variants), int(width / (0.55 + 0.075 * max(map(len, variants))))))
    below = 0.6 + 0.18 * -(-len(variants) // across)
    height = 2.6 * len(rows) + 0.1 + below
    figure = Figure(figsize=(width, height), dpi=150)
    FigureCanvasAgg(figure)
    room = {"left": 0.7 / width, "right": 1 - 0.2 / width, "bottom": below / height, "top": 1 - 0.35 / height}
    grid = figure.subplots(len(rows), len(columns), squeeze=False, gridspec_kw=room | {"wspace": 0.3, "hspace": 0.4})
    drawn, handles = False, {}
    for row, line in zip(rows, grid, strict=True):
        for column, axes in zip(columns, line, strict=True):
            _quiet(axes)
            if draw(axes, row, column):
                drawn = True
                axes.set_title(row_name(row.task, row.setting), fontsize=9, loc="left", parse_math=False)
                handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
            else:
                axes.set_axis_off()
    if not drawn:
        return None
    legend = figure.legend(list(handles.values()), list(handles), loc="lower center", ncols=across, frameon=False)
    for text in legend.get_texts():
        text.set(fontsize=8, parse_math=False)
    return figure


def _curves(axes: Axes, tables: SweepTables, row: Row, quantity: str, looks: Looks) -> bool:
    table = [point for point in of_row(tables.curves, row) if point["quantity"] == quantity]
    _bands(axes, tables, table, "step", looks, markers=not quantity.startswith("train/"))
    axes.set(xlabel="optimizer steps", ylabel=metric_words(quantity))
    _score_limits(axes, quantity, None if quantity.startswith("train/") else tables.chance(row))
    return bool(table)


def _rates(axes: Axes, tables: SweepTables, row: Row, looks: Looks) -> bool:
    table, means = of_row(tables.seeds, row), of_row(tables.rates, row)
    existing = sorted({line["learning_rate"] for line in means})
    for variant in tables.variants:
        line = [mean for mean in means if mean["variant"] == variant]
        if line:
            x, y = [mean["learning_rate"] for mean in line], [mean["mean"] for mean in line]
            axes.plot(x, y, label=variant, **_style(looks[variant], marker=""))
            points = [point for point in table if point["variant"] == variant]
            x, y = [point["learning_rate"] for point in points], [point["value"] for point in points]
            axes.plot(x, y, **_style(looks[variant], linestyle="", alpha=0.6, markersize=4))
            chosen = next(mean for mean in line if mean["chosen"])
            ring = _style(looks[variant], marker="o", markersize=11, markerfacecolor="none")
            axes.plot(chosen["learning_rate"], chosen["mean"], **ring)
    if existing and existing[0] > 0:
        axes.set_xscale("log")
    axes.set_xticks(existing, [rate(value) for value in existing])
    axes.minorticks_off()
    metric = tables.sweep.plan["metrics"][row.task]
    axes.set(xlabel="learning rate (ring: chosen on the validation set)", ylabel=metric_words(metric))
    _score_limits(axes, metric, tables.chance(row))
    return len(existing) > 1


def _groups(axes: Axes, tables: SweepTables, row: Row, group: str, looks: Looks) -> bool:
    table = [point for point in of_row(tables.groups, row) if point["group"] == group]
    levels = sorted({point["number"] for point in table})
    _bands(axes, tables, table, "number", looks, markers=True)
    axes.set_xticks(levels, [str(level) for level in levels])
    axes.set(xlabel=group, ylabel="accuracy")
    chances = {point["chance"] for point in table}
    _score_limits(axes, "accuracy", chances.pop() if len(chances) == 1 else None)
    return len(levels) > 1


def _costs(axes: Axes, tables: SweepTables, row: Row, cost: tuple[str, str], looks: Looks) -> bool:
    table = [line for line in of_row(tables.scores, row) if known(line["mean"]) and known(line[cost[0]])]
    for line in table:
        style = _style(looks[line["variant"]], linestyle="", markersize=8)
        half = half_interval(line["low"], line["high"])
        axes.errorbar(line[cost[0]], line["mean"], yerr=half, label=line["variant"], elinewidth=1.2, **style)
    if table:
        ticks = cost_ticks([line[cost[0]] for line in table])
        if ticks[0] > 0:
            axes.set_xscale("log")
            axes.minorticks_off()
        axes.set_xticks(ticks, [compact(tick) for tick in ticks])
        axes.margins(x=0.15)
        axes.set(xlabel=cost[1], ylabel=metric_words(table[0]["metric"]))
        _score_limits(axes, table[0]["metric"], tables.chance(row))
    return bool(table)


def _bands(axes: Axes, tables: SweepTables, table: list[Line], x: str, looks: Looks, markers: bool) -> None:
    for variant in tables.variants:
        line = [point for point in table if point["variant"] == variant]
        if line:
            style = _style(looks[variant]) if markers else _style(looks[variant], marker="")
            steps, means, low, high = ([point[key] for point in line] for key in (x, "mean", "low", "high"))
            axes.plot(steps, means, label=variant, **style)
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.16, linewidth=0)


def _score_limits(axes: Axes, metric: str, chance: float | None) -> None:
    if "accuracy" in metric:
        axes.set_ylim(-0.03, 1.04)
    if chance is not None and known(chance):
        axes.axhline(chance, color=COLORS["muted"], linewidth=0.8, linestyle=":")


def _style(look: Look, **more: Any) -> dict[str, Any]:
    style: dict[str, Any] = {
        "color": HUES["light"][look.hue],
        "linestyle": DASHES[look.dash],
        "marker": MARKERS[look.symbol],
    }
    return style | {"markersize": 4.5, "linewidth": 1.5} | more


def _cell_lines(line: Line) -> tuple[str, str]:
    runs = f"{line['runs']} of {line['planned']} runs"
    if not known(line["mean"]):
        return NOTHING, runs
    half = half_interval(line["low"], line["high"])
    told = (f"±{number(half, like=line['mean'])} " if half is not None else "") + f"n={line['seeds']}"
    return scored(line["mean"], line["metric"]), told + (f"\n{runs}" if line["runs"] < line["planned"] else "")


def _tile(x: int, y: int, color: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, facecolor=color, edgecolor="none")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _quiet(axes)
    axes.grid(visible=False)
    return figure, axes


def _quiet(axes: Axes) -> None:
    axes.grid(axis="y", color=COLORS["line"], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(COLORS["line"])
    axes.tick_params(color=COLORS["line"], labelcolor=COLORS["muted"], labelsize=8)
    for side in (axes.xaxis.label, axes.yaxis.label):
        side.set(fontsize=8.5, color=COLORS["muted"], parse_math=False)


def _literal(axes: Axes) -> None:
    """Names of users are no formulas, even if there are dollars in them."""
    for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        text.set_parse_math(False)


def _broken(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width, break_long_words=False))
