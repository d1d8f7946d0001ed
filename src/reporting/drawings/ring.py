"""Depo as a ring: the hidden cycle clockwise, and inside it an arc for every question."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from numpy.typing import ArrayLike, NDArray

from src.datamodules.tasks import Depo
from src.reporting.drawings.canvas import (
    COLOURS,
    GREY,
    INK,
    arrow_head,
    bullet,
    curves,
    name_width,
    sheet,
    tint,
    word_name,
)

NAMED = 40  # words on a ring that still have room for their names
SIDE = 7.0  # inches


class Ring:
    """n places on a circle, the first at the top, clockwise."""

    def __init__(self, n: int, radius: float):
        self.n, self.radius = n, radius

    def at(self, step: ArrayLike, radius: ArrayLike) -> NDArray[np.float64]:
        """Points ``step`` places along the ring, at a distance from its centre."""
        angle = 2 * np.pi * np.asarray(step) / self.n
        return SIDE / 2 + np.stack((radius * np.sin(angle), -np.asarray(radius) * np.cos(angle)), axis=-1)


def draw_depo(task: Depo, tokens: NDArray[np.int64], caption: str = "") -> Figure:
    """The cycle as a ring; questions run on tracks inside, from the word asked for to the answer."""
    edges, questions = task.parse(tokens)
    successor = dict(edges)
    cycle = [edges[0][0]]
    while (word := successor[cycle[-1]]) != cycle[0]:
        cycle.append(word)
    names = [word_name(word) for word in cycle]
    room = 0.25 + max(name_width(name, 11) for name in names) if len(cycle) <= NAMED else 0.1
    ring = Ring(len(cycle), SIDE / 2 - room)
    texts = [
        f"{k} step{'s' if k > 1 else ''} from {word_name(asked)}: {word_name(answer)}" for k, asked, answer in questions
    ]
    figure, axes = sheet(
        SIDE + 0.6 + max(name_width(text, 9.5) for text in texts),
        SIDE,
        f"Depo: {len(questions)} questions about a cycle of {len(cycle)} words",
        "The cycle runs clockwise. A question starts at its number, and its arrow ends at the answer."
        + ("" if len(cycle) <= NAMED else f" More than {NAMED} words are dots without names."),
        caption,
    )
    _draw_cycle(axes, ring, names)
    starts = [cycle.index(asked) for _, asked, _ in questions]
    lanes = _lanes(ring, [(start, k) for start, (k, _, _) in zip(starts, questions, strict=True)])
    gap = min(0.26, 0.8 * (ring.radius - 0.3) / (1 + max(lanes)))
    line = min(0.36, SIDE / len(questions))
    for number, (k, _, _) in enumerate(questions):
        colour = COLOURS[number % len(COLOURS)]
        radius = ring.radius - 0.3 - gap * lanes[number]
        _draw_question(axes, ring, starts[number], k, radius, gap, colour)
        size = min(0.1, 0.45 * gap)
        bullet(axes, ring.at(starts[number] - size / radius * ring.n / (2 * np.pi), radius), number + 1, colour, size)
        y = SIDE / 2 + (number - (len(questions) - 1) / 2) * line
        bullet(axes, (SIDE + 0.3, y), number + 1, colour, min(0.1, 0.5 * line))
        axes.text(SIDE + 0.5, y, texts[number], fontsize=min(9.5, 50 * line), color=INK, va="center_baseline")
    return figure


def _draw_cycle(axes: Axes, ring: Ring, names: list[str]) -> None:
    n, named = ring.n, ring.n <= NAMED
    dot = min(0.07, 2.2 * ring.radius / n)
    trim = min(0.3, 1.7 * dot * n / (2 * np.pi * ring.radius)) if named else 0.0  # of an edge, next to its dots
    arcs = [ring.at(np.linspace(i + trim, i + 1 - trim, 2 + 90 // n), ring.radius) for i in range(n)]
    curves(axes, arcs, "edge", colors=[GREY], linewidths=1.4 if named else 0.8, zorder=0.8)
    upright = n <= 16 and max(map(len, names)) <= 5
    for i, name in enumerate(names):
        x, y = ring.at(i, ring.radius)
        axes.add_patch(Circle((x, y), dot, facecolor=INK, edgecolor="none", gid="node"))
        if not named:
            continue
        arrow_head(axes, arcs[i][-2], arcs[i][-1], GREY, 6 if n <= 20 else 4.5)
        spoke = 90 - 360 * i / n  # degrees, counterclockwise from the right
        flip = 90 < spoke % 360 < 270
        style: dict[str, Any] = {"ha": "right" if flip else "left", "rotation": spoke + 180 * flip}
        if upright:
            style = {"ha": "center" if abs(np.cos(np.radians(spoke))) < 0.35 else style["ha"]}
        x, y = ring.at(i, ring.radius + (0.2 if upright else 0.13))
        axes.text(x, y, name, fontsize=11 if n <= 20 else 9, color=INK, va="center", rotation_mode="anchor", **style)


def _lanes(ring: Ring, questions: list[tuple[int, int]]) -> list[int]:
    """The outermost track on which every question (start, steps) meets no earlier one; further than once around takes several."""
    ticks = 720
    taken: list[NDArray[np.bool_]] = []
    found = []
    pad = round(ticks * 0.35 / (2 * np.pi * ring.radius * 0.7))  # room for the number in front, and some air behind
    for start, k in questions:
        wound = k >= ring.n
        first, last = round(start / ring.n * ticks) - pad, round((start + k) / ring.n * ticks) + pad // 2
        wanted = np.zeros(ticks, dtype=np.bool_)
        wanted[np.arange(first, min(last + 1, first + ticks)) % ticks] = True
        lanes = 1 + k // ring.n + wound  # a spiral ends on the lane behind its last turn
        lane = 0
        while any((taken[i] & wanted).any() for i in range(lane, min(lane + lanes, len(taken)))):
            lane += 1
        taken += [np.zeros(ticks, dtype=np.bool_) for _ in range(lane + lanes - len(taken))]
        for i in range(lane, lane + lanes):
            taken[i] |= wanted
        found.append(lane)
    return found


def _draw_question(axes: Axes, ring: Ring, start: int, k: int, radius: float, gap: float, colour: str) -> None:
    # Further than once around, the track winds inwards, a lane with every turn.
    steps = np.linspace(start, start + k, 2 + 240 * k // ring.n)
    track = ring.at(steps, radius - (gap * (steps - start) / ring.n if k >= ring.n else 0.0))
    ends = [(ring.at(start, ring.radius), track[0]), (ring.at(start + k, ring.radius), track[-1])]
    curves(axes, ends, "leader", colors=[tint(colour, 0.7)], linewidths=0.8, linestyles=":", zorder=0.5)
    curves(axes, [track], "question", colors=[colour], linewidths=1.8)
    arrow_head(axes, track[-2], track[-1], colour, min(7, 36 * gap))
