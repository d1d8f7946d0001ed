"""Tokens in a row: Copy as two of them, MQAR with arcs, and packed windows."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray

from src.datamodules.tasks import MQAR, Copy, Windows
from src.reporting.drawings.canvas import (
    BLUE,
    COLOURS,
    GREY,
    INK,
    ORANGE,
    PALE,
    Colour,
    arrow_head,
    cells,
    curves,
    readable_on,
    sheet,
    tint,
)

MOST = 2_000  # tokens that a strip shows


def draw_copy(task: Copy, tokens: NDArray[np.int64], caption: str = "") -> Figure:
    """The sequence above, its copy below, every token joined with its twin; long ones in several lines."""
    rows = tokens[1 : 1 + task.size].tolist(), tokens[2 + task.size :].tolist()
    shown = min(task.size, MOST)
    columns = shown if shown <= 20 else 25 if shown <= 100 else 50
    width, height, gap, line = 0.4 if columns <= 25 else 0.3, 0.27, 0.27, 1.15
    note = "The upper row is the sequence, the lower one its copy, which alone is learnt."
    note += f" Shown are the first {shown:,} tokens." if shown < task.size else ""
    figure, axes = sheet(
        columns * width, -(-shown // columns) * line - 0.34, f"Copy: {task.size} tokens, word for word", note, caption
    )
    shade = colormaps["cividis"]
    fills = [tint(shade(token / (task.N + 1))[:3], 0.8) for token in range(task.N + 2)]
    size = min(9.5, 72 * 1.35 * width / (1 + len(str(task.N))))
    places = [(i % columns * width, i // columns * line) for i in range(shown)]
    for row, below, gid in zip(rows, (0.0, height + gap), ("sequence", "copy"), strict=True):
        cells(axes, [(x, y + below, width, height) for x, y in places], [fills[token] for token in row[:shown]], gid)
        for token, (x, y) in zip(row, places, strict=False):
            style: dict[str, Any] = {"color": readable_on(fills[token]), "ha": "center", "va": "center_baseline"}
            axes.text(x + width / 2, y + below + height / 2, str(token), fontsize=size, **style)
    links = [[(x + width / 2, y + height), (x + width / 2, y + height + gap)] for x, y in places]
    curves(axes, links, "link", colors=[fills[token] for token in rows[0][:shown]], linewidths=2.2)
    return figure


def draw_mqar(task: MQAR, tokens: NDArray[np.int64], caption: str = "") -> Figure:
    """The tokens as a strip; an arc leads from every pair to its question."""
    pairs, questions = task.parse(tokens)
    shown = min(len(tokens), MOST)
    unit = min(0.24, 15.0 / shown)
    numbered = unit >= 0.14
    height, roof = (0.5, 2.6) if numbered else (0.3, 4.2)
    note = "Pairs of a key and a value stand in front. Where a key comes again, its value (dark) has to follow; only that is learnt."
    note += " Grey is filler." + ("" if numbered else " So many tokens are cells without numbers.")
    note += f" Shown are the first {shown:,} tokens." if shown < len(tokens) else ""
    figure, axes = sheet(
        shown * unit, roof + height, f"MQAR: {len(pairs)} pairs in {len(tokens)} tokens", note, caption
    )

    order = {key: i for i, key in enumerate(pairs)}
    fills: list[Colour] = [PALE] * len(tokens)
    for i in order.values():
        fills[2 * i], fills[2 * i + 1] = tint(_colour(i), 0.3), tint(_colour(i), 0.55)
    for t, key, _ in questions:
        fills[t], fills[t + 1] = tint(_colour(order[key]), 0.3), _colour(order[key])
    cells(axes, [(t * unit, roof, unit, height) for t in range(shown)], fills[:shown], "token")

    farthest = max(t - 2 * order[key] for t, key, _ in questions)
    angle = np.linspace(np.pi, 0, 60)
    for t, key, _ in questions:
        left, right = (2 * order[key] + 1) * unit, min(t + 1, shown) * unit
        rise = (roof - 0.15) * ((t - 2 * order[key]) / farthest) ** 0.6
        x, y = (left + right) / 2 + (right - left) / 2 * np.cos(angle), roof - 0.05 - rise * np.sin(angle)
        curves(
            axes,
            [np.stack((x, y), axis=1)],
            "question",
            colors=[_colour(order[key])],
            linewidths=1.3 if numbered else 0.7,
        )
        arrow_head(axes, (x[-2], y[-2]), (x[-1], y[-1]), _colour(order[key]), 5 if numbered else 3.5)
    for t in range(shown if numbered else 0):
        ink = GREY if fills[t] == PALE else readable_on(fills[t])
        style = {"rotation": 90, "ha": "center", "va": "center", "color": ink}
        axes.text((t + 0.5) * unit, roof + height / 2, str(tokens[t]), fontsize=min(7.5, 52 * unit), **style)
    return figure


def _colour(i: int) -> Colour:
    return COLOURS[i % len(COLOURS)]


def draw_window(windows: Windows, caption: str = "", columns: int = 64) -> Figure:
    """The first of these windows as rows of cells: its examples in two colours by turns, what is learnt dark, padding grey."""
    tokens, mask, segments = windows.tokens[0], windows.loss_mask[0], windows.segments[0]
    unit = 0.14
    figure, axes = sheet(
        columns * unit,
        -(-len(tokens) // columns) * unit,
        f"A window of {len(tokens)} tokens packs {len(np.unique(segments[tokens >= 0]))} examples",
        f"{columns} tokens a row. Examples are blue and orange by turns, dark where tokens are learnt. Grey is padding.",
        caption,
    )
    fills = [
        tint((BLUE, ORANGE)[segment % 2], 1.0 if learnt else 0.3) if token >= 0 else PALE
        for token, learnt, segment in zip(tokens.tolist(), mask.tolist(), segments.tolist(), strict=True)
    ]
    boxes = [(t % columns * unit, t // columns * unit, unit, unit) for t in range(len(tokens))]
    cells(axes, boxes, fills, "token")
    starts = [boxes[t] for t in range(len(tokens)) if tokens[t] >= 0 and (t == 0 or segments[t] != segments[t - 1])]
    curves(axes, [[(x, y), (x, y + unit)] for x, y, _, _ in starts], "start", colors=[INK], linewidths=1.6)
    return figure
