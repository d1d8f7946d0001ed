"""Capo as a text with its facts in colour."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch
from numpy.typing import NDArray

from src.datamodules.tasks import Capo
from src.datamodules.tasks.capo_people import FACTS, NAME
from src.datamodules.tasks.capo_writing import find_kinds
from src.reporting.drawings.canvas import COLOURS, DPI, INK, sheet, tint

WIDTH, LINE, SIZE = 8.4, 0.5, 12.5  # inches, inches, points

Piece = tuple[float, float, str, int]  # left, right, text, kind


def draw_capo(task: Capo, tokens: NDArray[np.int64], caption: str = "") -> Figure:
    """The biography; the name and the values of the facts are coloured, and say below what they are."""
    kinds = find_kinds(tokens)
    lines = _lay_out([task.decode([token]) for token in tokens[1:]], kinds[1:].tolist())
    labels = ["", "name", *(fact.replace("_", " ") for fact in FACTS)]
    colours: list[Any] = ["white", INK, *COLOURS]
    name = task.decode(tokens[kinds == NAME]).strip()
    note = "Coloured are the values, which only a model that has stored them can predict. All tokens are learnt."
    figure, axes = sheet(WIDTH, LINE * len(lines) + 0.05, f"Capo: a biography of {name}", note, caption)
    for number, line in enumerate(lines):
        y = LINE * number + 0.22
        for kind, run in groupby(line, key=lambda piece: piece[3]):
            pieces = list(run)
            if kind:
                left, right, fill = pieces[0][0], pieces[-1][1], tint(colours[kind], 0.25 if kind > NAME else 0.12)
                style: dict[str, Any] = {
                    "boxstyle": "round,pad=0.03",
                    "facecolor": fill,
                    "linewidth": 0,
                    "gid": "value",
                    "clip_on": False,
                }
                axes.add_patch(FancyBboxPatch((left, y - 0.095), right - left, 0.19, **style))
                axes.text((left + right) / 2, y + 0.19, labels[kind], fontsize=6.5, color=INK, ha="center", va="center")
            for left, _, text, _ in pieces:
                axes.text(left, y, text, fontsize=SIZE, color=INK, va="center_baseline", gid="word")
    return figure


def _lay_out(texts: Sequence[str], kinds: Sequence[int]) -> list[list[Piece]]:
    """Breaks tokens into lines, only where there is a space, and places them."""
    renderer, font = RendererAgg(1, 1, DPI), FontProperties(size=SIZE)

    def width(text: str) -> float:
        return renderer.get_text_width_height_descent(text, font, False)[0] / DPI

    space = width("x x") - width("xx")
    lines: list[list[Piece]] = [[]]
    starts = [i for i, text in enumerate(texts) if i == 0 or text.startswith(" ")]
    x = -space
    for start, end in zip(starts, [*starts[1:], len(texts)], strict=True):
        word = [
            (text.strip(), width(text.strip()), kind)
            for text, kind in zip(texts[start:end], kinds[start:end], strict=True)
        ]
        if x + space + sum(size for _, size, _ in word) > WIDTH:
            lines.append([])
            x = -space
        x += space
        for text, size, kind in word:
            lines[-1].append((x, x + size, text, kind))
            x += size
    return lines
