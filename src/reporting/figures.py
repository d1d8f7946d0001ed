"""Figures of a report as plotly describes them: plain dictionaries, made from the tables of a sweep.

Colours are tokens (``palette.py``); the page paints them. What the page does beyond plotly is said in two keys next to ``data``
and ``layout``: ``rows`` (ids of the y axis with the tasks they belong to, so that a filter can take some away) and ``minWidth``.
A trace's ``meta`` may hold ``variant``, by which it is switched off, and ``narrow``, its text on a phone. Names come from users
and plotly reads a kind of HTML: whatever is shown goes through ``label``.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from src.reporting.palette import Look
from src.reporting.results import CONFIRMED, CONTRADICTED
from src.reporting.tables import Line, Row, SweepTables, Table, of_row
from src.reporting.wording import (
    NOTHING,
    TONES,
    compact,
    half_interval,
    interval,
    known,
    metric_words,
    number,
    rate,
    scored,
)

Figure = dict[str, Any]
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif'
OUTCOME_SYMBOLS = {CONFIRMED: "circle", CONTRADICTED: "x"}  # everything else an open circle
COSTS_SHOWN = (
    ("flops_per_token", "forward FLOPs per token"),
    ("parameters", "parameters"),
    ("state_size", "numbers in the state"),
)


def label(text: str, width: int = 0) -> str:
    """Any text as plotly shows it literally, in lines of at most so many characters where it can be broken."""
    lines = textwrap.wrap(text, width, break_long_words=False) if width else [text]
    return "<br>".join(html.escape(line, quote=False) for line in lines)


def small(text: str) -> str:
    """Text in a smaller size."""
    return f'<span style="font-size:10.5px">{text}</span>'


def heat_map(tables: SweepTables, score: str) -> Figure:
    """Rows x variants; ``score`` is mean or best. Clicks find the cell by ``customdata``, its row in ``tables.scores``."""
    shares, hover, ids, text = [], [], [], _Text()
    scores = Table(line | {"cell": i} for i, line in enumerate(tables.scores))
    for y, row in enumerate(tables.rows):
        of = {line["variant"]: line for line in of_row(scores, row)}
        values = [of[name][score] if name in of else None for name in tables.variants]
        line_shares = shares_of([of.get(name, {}) for name in tables.variants], score, tables.uncertainty(row))
        shares.append(line_shares)
        hover.append([cell_words(of[name]) if name in of else "" for name in tables.variants])
        ids.append([of[name]["cell"] if name in of else None for name in tables.variants])
        for x, name in enumerate(tables.variants):
            if name in of:
                text.add(x, f"r{y}", *_cell_text(of[name], score, values[x]), line_shares[x])
    heat = {"type": "heatmap", "x": list(range(len(tables.variants))), "y": [f"r{y}" for y in range(len(tables.rows))]}
    heat |= {"z": shares, "zmin": 0, "zmax": 1, "colorscale": "@scale", "showscale": False, "xgap": 4, "ygap": 4}
    heat |= {"hovertext": hover, "hovertemplate": "%{hovertext}<extra></extra>", "customdata": ids}
    layout = base_layout() | {
        "xaxis": axis(showgrid=False, side="top", range=[-0.5, len(tables.variants) - 0.5], fixedrange=True)
        | {"tickvals": heat["x"], "ticktext": [label(name, 12) for name in tables.variants]}
        | {"tickfont": {"color": "@ink", "size": 12}, "tickangle": 0},
        "yaxis": axis(showgrid=False, type="category", fixedrange=True, tickfont={"color": "@ink", "size": 12}),
        "hovermode": "closest",
    }
    labels = [_row_label(tables, row) for row in tables.rows]
    rows = {
        "ids": heat["y"],
        "tasks": [row.task for row in tables.rows],
        "labels": labels,
        "height": 62 if len(labels) < 16 else 52,
        "extra": 70,
    }
    return {
        "data": [heat, text.trace()],
        "layout": layout,
        "rows": rows,
        "minWidth": 96 + 62 * len(tables.variants),
        "maxWidth": 150 + 240 * len(tables.variants),
        "narrow": {"ticktext": [label(name, 7) for name in tables.variants]},
    }


class _Text:
    """Collects what is printed in cells."""

    def __init__(self) -> None:
        self.x: list[int] = []
        self.y: list[str] = []
        self.text: list[str] = []
        self.narrow: list[str] = []
        self.colors: list[str] = []

    def add(self, x: int, y: str, wide: str, narrow: str, share: float | None) -> None:
        self.x.append(x)
        self.y.append(y)
        self.text.append(wide)
        self.narrow.append(narrow)
        self.colors.append("@muted" if share is None else f"@on/{share:.4f}")

    def trace(self) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "scatter", "mode": "text", "x": self.x, "y": self.y, "text": self.text}
        return found | {
            "textfont": {"size": 14, "color": self.colors},
            "hoverinfo": "skip",
            "meta": {"narrow": self.narrow},
        }


def _cell_text(line: Mapping[str, Any], score: str, value: float | None) -> tuple[str, str]:
    """What a cell says: wide, and in the width of a phone."""
    missing = line["planned"] - line["runs"]
    runs = f"{line['runs']} of {line['planned']} runs"
    if not known(value):
        return f"{NOTHING}<br>{small(runs)}", f"{NOTHING}<br>{small(runs)}"
    head = f"<b>{scored(value, line['metric'])}</b>"
    if score == "best":
        told = small(runs if missing else f"best of {line['runs']}")
        return f"{head}<br>{told}", f"{head}<br>{told}"
    half = half_interval(line["low"], line["high"])
    spread, count = f"±{number(half, like=value)}" if half is not None else "", f"n={line['seeds']}"
    lines = [" ".join(part for part in (spread, count) if part)]
    thin = [part for part in (spread, count) if part]
    if missing:
        lines.append(runs)
        thin[-1] += f", {line['runs']}/{line['planned']}"
    return (f"{head}<br>" + "<br>".join(map(small, lines))), (f"{head}<br>" + "<br>".join(map(small, thin)))


def _row_label(tables: SweepTables, row: Row) -> str:
    parts = [f"<b>{label(row.task, 14)}</b>"]
    parts += [small(label(row.setting, 18))] if row.setting else []
    chance = tables.chance(row)
    parts += [small(f"chance {number(chance)}")] if known(chance) else []
    return "<br>".join(parts)


def shares_of(lines: Sequence[Mapping[str, Any]], score: str, uncertainty: float | None = None) -> list[float | None]:
    """Where the cells of a row stand on the colour scale: accuracies by themselves, other scores from worst to best of the row.

    The ends of the scale are for a worst and a best that are far apart: by twice the uncertainty of their difference. A smaller difference
    takes as much less of the middle of the scale, and one of which nothing is known none of it.

    Args:
        lines: of the cells; empty mappings where there are none.
        score: mean or best.
        uncertainty: half the width of the interval of the difference; None to take it from the intervals of the two cells.
    """
    values = [line.get(score) for line in lines]
    there = [value for value in values if value is not None and known(value)]
    if not there:
        return [None] * len(values)
    first = next(line for line in lines if line)
    if "accuracy" in first["metric"]:
        return [min(max(value, 0.0), 1.0) if value is not None and known(value) else None for value in values]
    worst, best = (max(there), min(there)) if first["lower_is_better"] else (min(there), max(there))
    if uncertainty is None:
        ends = [next(line for line in lines if line.get(score) == value) for value in (worst, best)]
        halves = [half_interval(line.get("low"), line.get("high")) for line in ends]
        uncertainty = math.inf if None in halves else math.hypot(*(half or 0.0 for half in halves))
    distance = abs(best - worst)
    span = distance / max(distance, 2 * uncertainty) if distance else 0.0  # how much of the scale is used
    start, across = (1 - span) / 2, (best - worst) or 1.0
    return [start + span * (value - worst) / across if value is not None and known(value) else None for value in values]


def cell_words(line: Mapping[str, Any]) -> str:
    """What hovering over a cell tells."""
    where = label(" · ".join(part for part in (line["task"], line["setting"], line["variant"]) if part))
    runs = f"{line['runs']} of {line['planned']} runs finished"
    if line["unfinished"]:
        runs += f" ({label(line['unfinished'])})"
    if not known(line["mean"]):
        return f"<b>{where}</b><br>{runs}"
    seeds = f"{line['seeds']} of {line['seeds_planned']} seeds at learning rate {rate(line['learning_rate'])}"
    remarks = f"<br>{label(line['remarks'], 60)}" if line["remarks"] else ""
    return (
        f"<b>{where}</b><br>{label(metric_words(line['metric']))}: mean {scored(line['mean'], line['metric'])}, "
        f"95% {interval(line['low'], line['high'])}<br>{seeds}<br>best over learning rates {scored(line['best'], line['metric'])}"
        f"{remarks}<br>{runs}<br><i>click for the commands</i>"
    )


def curves(tables: SweepTables, row: Row, quantity: str, looks: Mapping[str, Look]) -> Figure | None:
    """One quantity over optimizer steps: a line for the mean over seeds, a band from the lowest to the highest of them."""
    table = [point for point in of_row(tables.curves, row) if point["quantity"] == quantity]
    if not table:
        return None
    data = []
    for variant, line in _by_variant(tables, table):
        data += _line_and_band(
            line, "step", looks[variant], variant, markers=len(line) <= 40 and quantity != "train/loss"
        )
    means = [point["mean"] for point in table]
    y = _score_axis(quantity)
    if "accuracy" not in quantity and min(point["low"] for point in table) > 0 and max(means) / min(means) > 50:
        y |= {"type": "log", "dtick": 1}
    last = max(point["step"] for point in of_row(tables.curves, row))
    x = axis("optimizer steps", showgrid=False, hoverformat=",d", range=[0, last * 1.02], tickformat=",d", nticks=6)
    x["unifiedhovertitle"] = {"text": "step %{x}"}
    chance = None if quantity.startswith("train/") else tables.chance(row)
    return _figure(data, x, y, chance=chance, hovermode="x unified")


def rates(tables: SweepTables, row: Row, looks: Mapping[str, Look]) -> Figure | None:
    """Score against learning rate: a point for each seed, a line through their means, a ring around the chosen rate."""
    means = of_row(tables.rates, row)
    existing = sorted({line["learning_rate"] for line in means})
    if len(existing) < 2 or existing[0] <= 0:  # its axis is logarithmic
        return None
    metric = tables.sweep.plan["metrics"][row.task]
    data: list[dict[str, Any]] = []
    gap = min(math.log(b / a) for a, b in pairwise(existing))
    shown = _by_variant(tables, means)
    for place, (variant, line) in enumerate(shown):
        # Side by side, so that the seeds of one variant do not hide those of another.
        aside = math.exp(gap * 0.4 * ((place + 0.5) / len(shown) - 0.5))
        data += _rate_traces(line, of_row(tables.seeds, row, variant), variant, looks[variant], aside, metric)
    pad = gap * 0.5 / math.log(10)
    x = axis("learning rate", type="log", tickvals=existing, ticktext=[rate(value) for value in existing])
    x["range"] = [math.log10(existing[0]) - pad, math.log10(existing[-1]) + pad]
    return _figure(data, x, _score_axis(metric), chance=tables.chance(row))


def _rate_traces(
    means: list[Line], seeds: list[Line], variant: str, look: Look, aside: float, metric: str
) -> list[dict[str, Any]]:
    common = {"meta": {"variant": variant}, "hoverinfo": "skip"}
    x, y = [line["learning_rate"] * aside for line in means], [line["mean"] for line in means]
    line = trace("lines", x, y, line={"color": look.token, "width": 2, "dash": look.dash}, **common)
    told = [
        f"<b>{label(variant)}</b><br>{scored(run['value'], metric)} at learning rate {rate(run['learning_rate'])}, seed {run['seed']}"
        for run in seeds
    ]
    points = trace(
        "markers", [run["learning_rate"] * aside for run in seeds], [run["value"] for run in seeds], opacity=0.8
    )
    points |= {"marker": {"color": look.token, "symbol": look.symbol, "size": 7}, "meta": {"variant": variant}} | _told(
        told
    )
    chosen = [i for i, mean in enumerate(means) if mean["chosen"]]
    ring = trace("markers", [x[i] for i in chosen], [y[i] for i in chosen], **common)
    ring["marker"] = {"symbol": "circle-open", "size": 18, "color": look.token, "line": {"width": 1.5}}
    return [line, points, ring]


def groups(tables: SweepTables, row: Row, group: str, looks: Mapping[str, Look]) -> Figure | None:
    """Accuracy against a difficulty such as hops: means over seeds, bands from lowest to highest."""
    table = [point for point in of_row(tables.groups, row) if point["group"] == group]
    levels = sorted({point["number"] for point in table})
    if len(levels) < 2:
        return None
    data = []
    for variant, line in _by_variant(tables, table):
        data += _line_and_band(line, "number", looks[variant], variant, markers=True)
    x = axis(group, showgrid=False, tickvals=levels, ticktext=[str(level) for level in levels])
    x["unifiedhovertitle"] = {"text": f"{label(group)} %{{x}}"}
    if levels[0] > 0 and all(level & (level - 1) == 0 for level in levels):
        x |= {"type": "log", "range": [math.log10(levels[0]) - 0.06, math.log10(levels[-1]) + 0.06]}
    chances = {point["chance"] for point in table}
    chance = chances.pop() if len(chances) == 1 else None
    return _figure(data, x, _score_axis("test/accuracy"), chance=chance, hovermode="x unified")


def costs(tables: SweepTables, row: Row, cost: str, name: str, score: str, looks: Mapping[str, Look]) -> Figure | None:
    """Score against one cost, a point for each variant; the Student interval where the score is the mean over seeds."""
    table = [line for line in of_row(tables.scores, row) if known(line["mean"]) and known(line[cost])]
    if not table:
        return None
    data = []
    for line in table:
        look = looks[line["variant"]]
        point = trace("markers", [line[cost]], [line[score]], meta={"variant": line["variant"]})
        point["marker"] = {"color": look.token, "symbol": look.symbol, "size": 11}
        half = half_interval(line["low"], line["high"])
        if score == "mean" and half is not None:
            point["error_y"] = {"type": "data", "array": [half], "color": look.token, "thickness": 1.5, "width": 0}
        told = f"<b>{label(line['variant'])}</b><br>{scored(line[score], line['metric'])}"
        told += f", 95% {interval(line['low'], line['high'])}" if score == "mean" else f", best of {line['runs']} runs"
        data.append(point | _told([f"{told}<br>{compact(line[cost])} {name}"]))
    x = _cost_axis([line[cost] for line in table])
    return _figure(data, x, _score_axis(table[0]["metric"]), chance=tables.chance(row), height=280)


def _cost_axis(values: Sequence[float]) -> dict[str, Any]:
    """Logarithmic, with ticks at the ends: models that were made equal differ by less than plotly's own ticks do."""
    low, high = min(values), max(values)
    if low <= 0:
        return axis(showgrid=False)
    pad = max(0.18 * math.log10(high / low), 0.01)
    ticks = cost_ticks(values)
    found = axis(showgrid=False, type="log", tickvals=ticks, ticktext=[compact(tick) for tick in ticks])
    return found | {"range": [math.log10(low) - pad, math.log10(high) + pad]}


def cost_ticks(values: Sequence[float]) -> list[float]:
    """The ends, and the middle on a logarithmic axis if they are far apart."""
    low, high = min(values), max(values)
    return sorted({low, high} if high < low * 1.5 or low <= 0 else {low, math.sqrt(low * high), high})


def forest(tables: SweepTables) -> Figure | None:
    """Differences that statements are about: point, Student interval (thin), bootstrap interval (thick), the claim (a tick)."""
    lines = [line for line in tables.verdicts if known(line["difference"])]
    if not lines:
        return None
    keys = ("difference", "by", "student_low", "student_high", "bootstrap_low", "bootstrap_high")
    ends = [0.0, *(line[key] for line in lines for key in keys if known(line[key]))]
    low, high = min(ends), max(ends)
    if all("accuracy" in line["metric"] for line in lines):
        low, high = max(low, -1.0), min(high, 1.0)
    pad = 0.04 * (high - low)
    x = axis(
        "difference, positive where the first is better", range=[low - pad, high + pad], showgrid=False, showline=True
    )
    y = axis(showgrid=False, type="category", fixedrange=True, showticklabels=False)
    # Two lines of each: its name, and below it the intervals.
    ids = [f"{kind}{i}" for i in range(len(lines)) for kind in ("name", "row")]
    rows = {"ids": ids, "tasks": [line["task"] for line in lines for _ in range(2)], "labels": [""] * len(ids)}
    names = [f"{line['better']} vs {line['than']}, {line['task']}" for line in lines]
    text = trace("text", [low - pad] * len(lines), ids[::2], text=[label(name) for name in names], hoverinfo="skip")
    text |= {
        "meta": {"narrow": [label(name, 40) for name in names]},
        "textposition": "middle right",
        "cliponaxis": False,
    }
    text["textfont"] = {"color": "@ink", "size": 12}
    data = [text]
    for name, y_id, line in zip(names, ids[1::2], lines, strict=True):
        data += _forest_traces(name, y_id, line)
    return _figure(data, x, y) | {"rows": rows | {"height": 30, "extra": 60}}


def _forest_traces(name: str, y: str, line: Line) -> list[dict[str, Any]]:
    color = f"@{TONES.get(line['outcome'], 'unsure')}"
    zero = {"symbol": "line-ns", "size": 26, "line": {"width": 1, "color": "@muted"}}
    found = [trace("markers", [0], [y], marker=zero, hoverinfo="skip")]
    for kind, width, opacity in (("student", 1.5, 1.0), ("bootstrap", 7, 0.35)):
        ends = [line[f"{kind}_low"], line[f"{kind}_high"]]
        if known(ends[0]):
            look = {"line": {"color": color, "width": width}, "opacity": opacity, "hoverinfo": "skip"}
            found.append(trace("lines", ends, [y, y], **look))
    claim = {"symbol": "line-ns", "size": 20, "color": "@ink", "line": {"width": 2, "color": "@ink"}}
    found.append(trace("markers", [line["by"]], [y], marker=claim, hoverinfo="skip"))
    told = (
        f"<b>{label(name)}</b><br>{number(line['difference'], signed=True)}, "
        f"claimed at least {number(line['by'], signed=True)}"
        f"<br>Student {interval(line['student_low'], line['student_high'], signed=True)}"
        f"<br>bootstrap {interval(line['bootstrap_low'], line['bootstrap_high'], signed=True)}<br>{line['outcome']}"
    )
    point = {
        "symbol": OUTCOME_SYMBOLS.get(line["outcome"], "circle-open"),
        "size": 11,
        "color": color,
        "line": {"width": 2},
    }
    found.append(trace("markers", [line["difference"]], [y], marker=point, **_told([told])))
    return found


def trace(mode: str, x: Sequence[Any], y: Sequence[Any], **more: Any) -> dict[str, Any]:
    """Points, lines or text."""
    return {"type": "scatter", "mode": mode, "x": list(x), "y": list(y)} | more


def _told(texts: Sequence[str]) -> dict[str, Any]:
    return {"hovertext": list(texts), "hovertemplate": "%{hovertext}<extra></extra>"}


def _line_and_band(line: list[Line], x: str, look: Look, variant: str, markers: bool) -> list[dict[str, Any]]:
    steps, low, high, means = ([point[name] for point in line] for name in (x, "low", "high", "mean"))
    meta, found = {"variant": variant}, []
    if low != high:
        band = trace("lines", steps + steps[::-1], high + low[::-1], fill="toself", fillcolor=f"{look.token}/0.16")
        found.append(band | {"line": {"width": 0}, "hoverinfo": "skip", "meta": meta})
    middle = trace("lines+markers" if markers else "lines", steps, means, name=label(variant), meta=meta)
    middle["line"] = {"color": look.token, "width": 2, "dash": look.dash}
    middle["marker"] = {"color": look.token, "symbol": look.symbol, "size": 7}
    middle["customdata"] = [list(ends) for ends in zip(low, high, strict=True)]
    middle["hovertemplate"] = "%{y:.3f} (%{customdata[0]:.3f} to %{customdata[1]:.3f})"
    return [*found, middle]


def _by_variant(tables: SweepTables, lines: list[Line]) -> list[tuple[str, list[Line]]]:
    of = [(variant, [line for line in lines if line["variant"] == variant]) for variant in tables.variants]
    return [(variant, found) for variant, found in of if found]


def _figure(
    data: list[dict[str, Any]],
    x: dict[str, Any],
    y: dict[str, Any],
    *,
    chance: float | None = None,
    hovermode: str = "closest",
    height: int = 300,
) -> Figure:
    # Accuracies have a grid line at 0, which is enough.
    x |= {"showline": y.get("range") is None, "spikecolor": "@muted", "spikethickness": 1, "spikedash": "solid"}
    layout = base_layout() | {"xaxis": x, "yaxis": y, "hovermode": hovermode, "height": height}
    if chance is not None and known(chance):
        line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": chance, "y1": chance, "layer": "below"}
        layout["shapes"] = [line | {"line": {"color": "@muted", "width": 1, "dash": "dot"}}]
        note = {"xref": "paper", "x": 1, "xanchor": "left", "xshift": 4, "y": chance, "showarrow": False}
        layout["annotations"] = [note | {"text": "chance", "font": {"size": 11, "color": "@muted"}}]
        layout["margin"] = layout["margin"] | {"r": 50}
    return {"data": data, "layout": layout}


def _score_axis(metric: str) -> dict[str, Any]:
    return axis(range=[-0.03, 1.04]) if "accuracy" in metric else axis()


def base_layout() -> dict[str, Any]:
    """What all figures have in common."""
    return {
        "font": {"family": FONT, "size": 12, "color": "@muted"},
        "paper_bgcolor": "@paper",
        "plot_bgcolor": "@paper",
        "margin": {"l": 4, "r": 10, "t": 10, "b": 4},
        "showlegend": False,
        "hoverlabel": {
            "bgcolor": "@panel",
            "bordercolor": "@line",
            "align": "left",
            "font": {"color": "@ink", "size": 12},
        },
    }


def axis(title: str = "", **more: Any) -> dict[str, Any]:
    """A quiet axis."""
    found: dict[str, Any] = {
        "automargin": True,
        "zeroline": False,
        "gridcolor": "@line",
        "showline": False,
        "linecolor": "@line",
        "ticks": "",
    }
    found["tickfont"] = {"color": "@muted", "size": 11}
    if title:
        found["title"] = {"text": label(title), "font": {"color": "@muted", "size": 12}, "standoff": 10}
    return found | more
