"""Graphs by depth: Brevo's dependencies, Mano's expression, Lano's parse."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from src.datamodules.tasks import Brevo, Lano, Mano
from src.reporting.drawings.canvas import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    INK,
    PALE,
    VERMILLION,
    Colour,
    cells,
    curves,
    flow,
    name_width,
    readable_on,
    sheet,
    tint,
    word_name,
)

TREE_LEAVES = 48  # terminals of the longest sentence that is drawn as a tree
SWEEPS = 24

Node = Any
Points = dict[Any, tuple[float, float]]


class Passage(NamedTuple):
    """Where an edge passes through a row between its ends."""

    parent: Node
    child: Node
    row: int


# ---- Brevo -----------------------------------------------------------------------------------------------------------


def draw_brevo(task: Brevo, tokens: NDArray[np.int64], caption: str = "") -> Figure:
    """The graph, every node below its parents: on the left what the query depends on, on the right what it does not."""
    graph = task.parse(tokens)
    parents, required = graph.parents(), graph.required()
    nodes = list(dict.fromkeys(node for edge in graph.edges for node in edge))
    depth = _depths(nodes, parents)
    needed, idle = [node for node in nodes if node in required], [node for node in nodes if node not in required]
    place = _layered(needed, parents, depth)
    offset = max(x for x, _ in place.values()) + 1.6
    place |= {node: (x + offset, y) for node, (x, y) in _layered(idle, parents, depth).items()}

    unit, floor = 0.3 + max(name_width(word_name(node), 8.5) for node in nodes), 0.8
    at = {node: ((x + 0.6) * unit, (y + 0.4) * floor) for node, (x, y) in place.items()}
    figure, axes = sheet(
        max(x for x, _ in at.values()) + 0.6 * unit,
        max(y for _, y in at.values()) + 0.4 * floor,
        f"Brevo: what does {word_name(graph.query)} depend on? {len(required) - 1} of {len(nodes) - 1} other nodes",
        "Edges lead down, from a node to what depends on it. Orange: the query. Blue: what it needs; small numbers: the order of "
        "the answer. Grey: distractors.",
        caption,
    )
    for kept, colour, gid in ((False, "#DADEE2", "idle edge"), (True, tint(BLUE, 0.55), "edge")):
        chosen = [edge for edge in graph.edges if (edge[1] in required) == kept]
        paths = [flow([at[stop] for stop in _stops(parent, child, depth) if stop in at]) for parent, child in chosen]
        curves(axes, paths, gid, colors=[colour], linewidths=1.1, zorder=1 + kept)
    for node in nodes:
        fill: Colour = VERMILLION if node == graph.query else tint(BLUE, 0.3) if node in required else "white"
        _box(
            axes, at[node], word_name(node), fill, GREY if node not in required else readable_on(fill), node in required
        )
    for turn, node in enumerate(graph.answer, start=1):
        x, y = at[node]
        right = x + name_width(word_name(node), 8.5) / 2 + 0.06
        axes.text(
            right, y - 0.12, str(turn), fontsize=6.5, color=GREEN, weight="bold", va="center", zorder=5, gid="turn"
        )
    return figure


def _box(axes: Axes, at: tuple[float, float], text: str, fill: Colour, ink: str, strong: bool = True) -> None:
    box = {"boxstyle": "round,pad=0.3", "facecolor": fill, "edgecolor": BLUE if strong else "#C3C9CF", "linewidth": 0.8}
    style: dict[str, Any] = {"ha": "center", "va": "center", "zorder": 4, "gid": "node" if strong else "idle node"}
    axes.text(*at, text, fontsize=8.5, color=ink, bbox=box, **style)


def _depths(nodes: Iterable[Node], parents: Mapping[Node, Sequence[Node]]) -> dict[Node, int]:
    """The most edges from a node back to one without parents."""
    depth: dict[Node, int] = {}
    todo = list(nodes)
    while todo:
        node = todo[-1]
        missing = [parent for parent in parents.get(node, ()) if parent not in depth]
        if missing:
            todo += missing
        else:
            depth[todo.pop()] = 1 + max((depth[parent] for parent in parents.get(node, ())), default=-1)
    return depth


def _stops(parent: Node, child: Node, depth: Mapping[Node, int]) -> list[Any]:
    """An edge's ends, and between them its place in every row that it passes through."""
    return [parent, *(Passage(parent, child, row) for row in range(depth[parent] + 1, depth[child])), child]


def _layered(nodes: Sequence[Node], parents: Mapping[Node, Sequence[Node]], depth: Mapping[Node, int]) -> Points:
    """Places nodes in rows by depth, near their parents and children, at least 1 apart; x starts at 0.

    An edge that passes through rows in between takes narrow places there, so that it runs between nodes and not behind them;
    what is returned holds these, too.
    """
    rows: dict[int, list[Any]] = defaultdict(list)
    links: dict[Any, list[Any]] = defaultdict(list)
    chosen = set(nodes)
    for node in nodes:
        rows[depth[node]].append(node)
    for node in nodes:
        for parent in chosen.intersection(parents.get(node, ())):
            stops = _stops(parent, node, depth)
            for stop in stops[1:-1]:
                rows[stop.row].append(stop)
            for above, below in pairwise(stops):
                links[above].append(below)
                links[below].append(above)
    row_of = {item: level for level, row in rows.items() for item in row}
    x = {item: 0.3 * i for row in rows.values() for i, item in enumerate(row)}
    for sweep in range(SWEEPS):
        step = 1 if sweep % 2 == 0 else -1
        for level in sorted(rows, reverse=step < 0):
            # Towards the neighbours in the row just placed; in the end towards all of them.
            for item in rows[level]:
                near = [x[other] for other in links[item] if sweep > SWEEPS - 5 or row_of[other] == level - step]
                x[item] = float(np.mean(near)) if near else x[item]
            row = sorted(rows[level], key=x.__getitem__)
            sizes = [0.2 if isinstance(item, Passage) else 0.5 for item in row]
            for item, place in zip(row, _apart([x[item] for item in row], sizes), strict=True):
                x[item] = place
    least = min(x.values(), default=0.0)
    return {item: (x[item] - least, float(row_of[item])) for item in x}


def _apart(wanted: Sequence[float], sizes: Sequence[float]) -> NDArray[np.float64]:
    """The places nearest to those wanted (least squares) that keep the order, and neighbours apart by the sum of their sizes."""
    offsets = np.cumsum([0.0, *(a + b for a, b in pairwise(sizes))])
    blocks: list[tuple[float, int]] = []  # mean, count: pool adjacent violators
    for value in np.asarray(wanted) - offsets:
        mean, count = float(value), 1
        while blocks and blocks[-1][0] > mean:
            other, number = blocks.pop()
            mean, count = (mean * count + other * number) / (count + number), count + number
        blocks.append((mean, count))
    return np.repeat([mean for mean, _ in blocks], [count for _, count in blocks]) + offsets


# ---- Mano ------------------------------------------------------------------------------------------------------------


def draw_mano(task: Mano, tokens: NDArray[np.int64], caption: str = "") -> Figure:
    """The expression as a tree, the value of every part beside its operator."""
    tree, answer = task.parse(tokens)
    signs = {"+": "+", "-": "\N{MINUS SIGN}", "*": "\N{MULTIPLICATION SIGN}"}
    unit, floor = 0.55, 0.75
    placed: list[tuple[tuple[float, float], str, int | None, int]] = []  # place, text, value, side of the value
    edges: list[tuple[tuple[float, float], tuple[float, float]]] = []
    leaves = deepest = 0

    def lay_out(node: list | int, depth: int, side: int) -> tuple[float, float]:
        nonlocal leaves, deepest
        deepest = max(deepest, depth)
        y = (depth + 0.4) * floor
        if isinstance(node, int):
            leaves += 1
            at = ((leaves - 0.5) * unit, y)
            placed.append((at, str(node), None, side))
            return at
        left, right = lay_out(node[1], depth + 1, -1), lay_out(node[2], depth + 1, 1)
        at = ((left[0] + right[0]) / 2, y)
        edges.extend([(at, left), (at, right)])
        placed.append((at, signs[node[0]], task.evaluate(node), side))
        return at

    lay_out(tree, 0, 1)
    question = task.describe(tokens).splitlines()[0].removeprefix("question ")
    operators = sum(value is not None for _, _, value, _ in placed)
    note = f"{question} = {answer}. Beside each operator: the value of what is below it."
    title = f"Mano: {operators} operator{'s' if operators > 1 else ''} modulo {task.modulus}, value {answer}"
    figure, axes = sheet(leaves * unit, (deepest + 0.8) * floor, title, note, caption)
    curves(axes, edges, "edge", colors=[GREY], linewidths=1.2)
    for number, (at, text, value, side) in enumerate(placed):
        root = number == len(placed) - 1
        if value is None:
            _box(axes, at, text, PALE, INK)
            continue
        box = {"boxstyle": "circle,pad=0.25", "facecolor": VERMILLION if root else tint(BLUE, 0.3), "edgecolor": BLUE}
        style: dict[str, Any] = {"ha": "center", "va": "center", "zorder": 4, "gid": "node"}
        axes.text(*at, text, fontsize=11, color="white" if root else INK, bbox=box, **style)
        beside: dict[str, Any] = {
            "ha": "left" if side > 0 else "right",
            "va": "center",
            "weight": "bold",
            "gid": "value",
        }
        axes.text(
            at[0] + 0.17 * side, at[1] - 0.13, str(value), fontsize=9.5, color=VERMILLION if root else BLUE, **beside
        )
    return figure


# ---- Lano ------------------------------------------------------------------------------------------------------------


def draw_lano(task: Lano, tokens: NDArray[np.int64], caption: str = "") -> Figure:
    """A parse of the sentence: a tree, or for long sentences a bar for every symbol, as wide as what it spans."""
    layers, parses = task.parse(tokens), task.num_parses(tokens)
    length = len(layers[-1])
    symbols = task.language.layers
    tree = length <= TREE_LEAVES
    unit, floor = (max(0.3, min(0.45, 12 / length)), 0.72) if tree else (15 / length, 0.34)
    note = "The terminals are at the bottom; all of them are learnt."
    note += (
        ""
        if parses == 1
        else f" One of {parses:,} parses."
        if parses < 10**9
        else f" One of {float(parses):.1e} parses."
    )
    note += "" if tree else " A bar spans what its symbol became; the symbols of a layer have a colour each."
    title = f"Lano: a sentence of {length} tokens of {task.language.name}"
    figure, axes = sheet(length * unit, len(layers) * floor, title, note, caption)
    for level, layer in enumerate(layers):
        fills = [tint(COLOURS[(symbol - symbols[level].start) % len(COLOURS)], 0.45) for symbol, _, _ in layer]
        y = (level + 0.5) * floor
        narrowest = min(end - start for _, start, end in layer) * unit
        fits = 0.85 * narrowest / name_width(str(symbols[level][-1]), 1)  # points
        if not tree:
            boxes = [(start * unit, y - 0.46 * floor, (end - start) * unit, 0.92 * floor) for _, start, end in layer]
            cells(axes, boxes, fills, "node")
        for (symbol, start, end), fill in zip(layer, fills, strict=True):
            x = (start + end) / 2 * unit
            if tree:
                _box(axes, (x, y), str(symbol), fill, INK)
            elif fits > 5.5:
                axes.text(x, y, str(symbol), fontsize=min(8, fits), color=INK, ha="center", va="center_baseline")
        if tree and level:
            above = [next(span for span in layers[level - 1] if span[1] <= start < span[2]) for _, start, _ in layer]
            ends = [((span[1] + span[2]) / 2 * unit, y - floor) for span in above]
            links = [(end, ((start + stop) / 2 * unit, y)) for end, (_, start, stop) in zip(ends, layer, strict=True)]
            curves(axes, links, "edge", colors=[GREY], linewidths=1.0)
    return figure
