"""What all drawings share: colours that colour-blind readers can tell apart, and a sheet with a heading.

What a drawing shows is marked by a group id (``gid``): its nodes, its edges. That is what tests count, and what an SVG names.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from numpy.typing import ArrayLike, NDArray

Colour = str | tuple[float, float, float]

# Okabe and Ito's, without yellow, which is too light for lines and text.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#B5528C", "#E69F00", "#56B4E9"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
INK, GREY, PALE = "#24303B", "#8B959F", "#E6E9EC"

MARGIN = 0.3  # inches
DPI = 150
LINE = 0.19  # inches, of the small print


def tint(colour: Colour, strength: float) -> tuple[float, float, float]:
    """A colour mixed with white: 1 leaves it as it is."""
    red, green, blue = (1 - strength * (1 - part) for part in to_rgb(colour))
    return red, green, blue


def readable_on(fill: Colour) -> str:
    """White or ink, whichever can be read on it."""
    red, green, blue = to_rgb(fill)
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.55 else INK


def sheet(width: float, height: float, title: str, note: str, caption: str = "") -> tuple[Figure, Axes]:
    """A page with a heading, and below it axes whose unit is an inch, x from 0 to ``width``, y from 0 downwards to ``height``.

    Args:
        width: of what is drawn, in inches.
        height: of what is drawn, in inches.
        title: in bold.
        note: small print, wrapped.
        caption: where the example comes from; stands below the title.
    """
    paper = max(width, 5.0)
    notes = [
        (line, colour)
        for text, colour in ((caption, GREY), (note, INK))
        for line in textwrap.wrap(text, int(paper / 0.066))
    ]
    heading = 0.4 + LINE * len(notes)
    full_width, full_height = paper + 2 * MARGIN, height + heading + 2 * MARGIN
    figure = Figure(figsize=(full_width, full_height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)

    def write(y: float, text: str, **style: Any) -> None:
        figure.text(MARGIN / full_width, 1 - (MARGIN + y) / full_height, text, va="top", **style)

    write(0, title, fontsize=12, fontweight="bold", color=INK)
    for i, (line, colour) in enumerate(notes):
        write(0.27 + LINE * i, line, fontsize=8.5, color=colour)
    left = (full_width - width) / 2 / full_width
    axes = figure.add_axes((left, MARGIN / full_height, width / full_width, height / full_height))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return figure, axes


def curves(axes: Axes, paths: Sequence[ArrayLike], gid: str, **style: Any) -> None:
    """Lines through the points of each path, ``[points, 2]``; one artist for all of them."""
    axes.add_collection(LineCollection([np.asarray(path) for path in paths], gid=gid, **style), autolim=False)


def cells(axes: Axes, boxes: Sequence[tuple[float, float, float, float]], fills: Sequence[Colour], gid: str) -> None:
    """Filled rectangles (x, y, width, height); one artist for all of them."""
    corners = [((x, y), (x + w, y), (x + w, y + h), (x, y + h)) for x, y, w, h in boxes]
    edge = 0.5 if min(w for _, _, w, _ in boxes) > 0.05 else 0.0
    boxed = PolyCollection(corners, facecolors=list(fills), edgecolors="white", linewidths=edge, gid=gid)
    axes.add_collection(boxed, autolim=False)


def arrow_head(axes: Axes, before: ArrayLike, tip: ArrayLike, colour: Colour, size: float) -> None:
    """A triangle at ``tip`` that points away from ``before``; ``size`` in points."""
    dx, dy = np.asarray(tip, dtype=float) - np.asarray(before, dtype=float)
    turn = -np.degrees(np.arctan2(dy, dx)) - 90  # y points down
    axes.plot(*np.asarray(tip), marker=(3, 0, turn), markersize=size, color=colour, markeredgewidth=0)


def bullet(axes: Axes, at: ArrayLike, number: int, colour: Colour, radius: float) -> None:
    """A number in a filled circle."""
    x, y = np.asarray(at)
    axes.add_patch(Circle((x, y), radius, facecolor=colour, edgecolor="white", linewidth=0.6, zorder=3))
    style: dict[str, Any] = {"ha": "center", "va": "center_baseline", "zorder": 4, "weight": "bold"}
    size = min(7.5, 72 * radius * (1.05 if number < 10 else 0.85))
    axes.text(x, y, str(number), fontsize=size, color=readable_on(colour), **style)


def flow(stops: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
    """A smooth curve down through these points, vertical at both ends, ``[points, 2]``."""
    x, y = np.array(stops, dtype=float).T
    slope = np.zeros(len(x))  # of x, per stop (Catmull and Rom)
    slope[1:-1] = (x[2:] - x[:-2]) / 2
    t = np.linspace(0, 1, 24)[:, None]
    along = (1 + 2 * t) * (1 - t) ** 2 * x[:-1] + t * (1 - t) ** 2 * slope[:-1]
    along += (3 - 2 * t) * t**2 * x[1:] + (t - 1) * t**2 * slope[1:]
    return np.stack((along.T.ravel(), (y[:-1] + (y[1:] - y[:-1]) * t).T.ravel()), axis=1)


def word_name(word: Sequence[int]) -> str:
    """A word of several tokens as the tasks print it."""
    return ".".join(map(str, word))


def name_width(name: str, size: float) -> float:
    """Inches that a number, or a word of numbers with dots, takes in the drawings' font."""
    dots = name.count(".")
    return (0.636 * (len(name) - dots) + 0.318 * dots) * size / 72
