"""Token ids for the terminal: learnt ones stand out in colour, or in brackets where there is none, as in a pipe."""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from src.datamodules.tasks.base import Split, Task

LEARNT = "bold magenta"
TURNS = ("cyan", "yellow")  # of the examples in a window
PROBES = 16


def in_colour(console: Console) -> bool:
    """Whether colours will be seen."""
    return console.color_system is not None and not console.no_color


def legend(console: Console, window: bool = False) -> Text:
    """How to read what ``token_text`` writes."""
    if not in_colour(console):
        return Text(f"tokens, {'| where an example begins, ' if window else ''}[learnt ones] in brackets:")
    if not window:
        return Text.assemble("tokens, ", ("learnt ones", LEARNT), " in colour:")
    turns = ("in", TURNS[0]), " ", ("turns", TURNS[1])
    return Text.assemble("tokens, examples ", *turns, ", learnt ones ", ("reversed", "reverse"), ":")


def token_text(
    console: Console, tokens: NDArray[np.int64], mask: NDArray[np.bool_], segments: NDArray[np.int32] | None = None
) -> Text:
    """The ids; with ``segments`` those of a window, example by example. A negative id is padding."""
    colour = in_colour(console)
    numbers = [0] * len(tokens) if segments is None else segments.tolist()
    runs = groupby(
        zip(numbers, mask.tolist(), (tokens < 0).tolist(), tokens.tolist(), strict=True), key=lambda item: item[:3]
    )
    found, before = Text(), None
    for (number, learnt, padding), run in runs:
        ids = [str(token) for *_, token in run]
        words = f"({len(ids)} of padding)" if padding else " ".join(ids)
        bar = "" if segments is None or padding or number == before else "| "
        before = number
        if not colour:
            found.append(f"{bar}[{words}] " if learnt else f"{bar}{words} ")
            continue
        turn = "" if segments is None else TURNS[number % 2]
        style = "dim" if padding else turn if not learnt else LEARNT if segments is None else f"reverse {turn}"
        found.append(bar, style=turn)
        found.append(words, style=style)
        found.append(" ")
    found.rstrip()
    return found


class Packed(NamedTuple):
    """An example in a window."""

    index: int
    start: int
    end: int
    size: int  # tokens of the whole example

    def __str__(self) -> str:
        here = self.end - self.start
        cut = "whole" if here == self.size else f"cut: {here:,} of its {self.size:,} tokens"
        return f"example {self.index}: tokens {self.start:,} to {self.end - 1:,}, {cut}"


def packed_examples(task: Task, seed: int, split: Split, window: int, length: int) -> list[Packed]:
    """Which examples lie in a window, and where; behind them is padding."""
    windows = task.windows(seed, split, window, 1, length)
    first = window * _examples_per_window(task, seed, split, length)
    return _packed_from(task, seed, split, first, windows.tokens[0], windows.segments[0])


def _examples_per_window(task: Task, seed: int, split: Split, length: int) -> int:
    """M: window w packs examples w * M, w * M + 1, .. The task keeps it to itself, but a few windows tell."""
    there_are = task.num_windows(split, length)
    probes = task.windows(seed, split, 1, PROBES if there_are is None else min(PROBES, there_are - 1), length)
    rows = list(enumerate(zip(probes.tokens, probes.segments, strict=True), start=1))
    for per_window in range(1, length + 1):
        if all(_packed_from(task, seed, split, window * per_window, *row) for window, row in rows):
            return per_window
    raise ValueError(f"{task.name}: its windows are not made of its examples")


def _packed_from(
    task: Task, seed: int, split: Split, first: int, tokens: NDArray[np.int64], segments: NDArray[np.int32]
) -> list[Packed]:
    """The examples of a window, if they are those from ``first`` on; empty if they are not."""
    starts = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist()]
    found = []
    for index, (start, end) in enumerate(zip(starts, [*starts[1:], len(tokens)], strict=True), start=first):
        example = task.example(seed, split, index)[0]
        if not np.array_equal(example[: end - start], tokens[start:end]):
            return found if start == starts[-1] else []  # what comes last may be padding
        found.append(Packed(index, start, end, len(example)))
    return found
