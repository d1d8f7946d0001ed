"""Token ids for the terminal: learnt ones stand out in colour, or in brackets where there is none, as in a pipe."""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from src.datamodules.tasks.base import Split, Task

LEARNT = "bold magenta"
TURNS = ("cyan", "yellow")  # of the examples in a window


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
    packed = task.windows(seed, split, window, 1, length)
    tokens, segments = packed.tokens[0], packed.segments[0]
    starts = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), length]
    first, found = window * task.examples_per_window(split, length), []
    for index, (start, end) in enumerate(pairwise(starts), start=first):
        example = task.example(seed, split, index)[0]
        if np.array_equal(example[: end - start], tokens[start:end]):  # or it is padding
            found.append(Packed(index, start, end, len(example)))
    return found
