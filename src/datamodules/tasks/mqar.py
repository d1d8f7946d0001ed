"""MQAR: multi-query associative recall. Pairs of a key and a value; then the keys again: which value?  (Arora et al. 2023)

    k1 v1 k2 v2 ... kn vn   . . ki vi . . . . kj vj . .          every key is asked once; "." is filler

Worked example, 2 pairs, 16 tokens, vocabulary 12, fillers written as dots:

    tokens   2 8 4 7 | . . 4 7 . . . . 2 8 . .
    learnt   7 behind the second 4, 8 behind the second 2

Keys are distinct, from 1..V/2 - 1; values are distinct, from V/2..V - 1. Behind the pairs there are S = length/2 - n places of two tokens.
Key by key, in the order of the pairs, a free place is drawn for its question: P(place g) proportional to g^(power - 1), g = 1..S. So a
small power asks soon, as text tends to repeat what it has just said, and power = 1 makes all places alike.

Zoology, the release of Arora et al. (arXiv 2312.04927), is followed in all this, with its defaults. What departs from it:

    values       zoology's are labels only, and a filler stands behind the question. Here they are tokens, to be predicted and then
                 seen. As no key is asked twice they answer no later question, but they can be ruled out: see ``chance``
    fillers      uniform over the vocabulary, as in zoology, but never one of the example's keys: a key there is a question.
                 ``random_fill=false`` makes them all 0, a token that is no key and no value
    passes       zoology can write the pairs several times; here they are written once

All splits have the same law.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from src.datamodules.tasks.base import Score, Split, Task, Windows, check_split, place
from src.datamodules.tasks.rng import below, seed_stream, stream_key, uniform


class _Params(NamedTuple):
    """What the compiled generator needs to know."""

    pairs: int
    length: int
    vocabulary: int
    cumulative: NDArray[np.float64]  # P(place <= g)
    random_fill: bool


@dataclass(frozen=True)
class MQAR(Task):
    """Multi-query associative recall; see the head of this file.

    Args:
        num_pairs: n, of key and value.
        length: tokens in an example, even, at least 4 n.
        vocabulary: V, more than ``length``; half of it are keys, half values.
        power: of the law of where questions stand; in (0, 2].
        random_fill: fill the rest with random tokens instead of zeros.

    Raises:
        ValueError: for parameters out of range.
    """

    config_name = "mqar"

    num_pairs: int = 8
    length: int = 64
    vocabulary: int = 8192
    power: float = 0.01
    random_fill: bool = True

    name: ClassVar[str] = "mqar"

    def __post_init__(self) -> None:
        if self.num_pairs < 1:
            raise ValueError(f"MQAR.num_pairs={self.num_pairs}: at least 1")
        if self.length % 2 or self.length < 4 * self.num_pairs:
            raise ValueError(
                f"MQAR.length={self.length}: an even number, at least 4 num_pairs = {4 * self.num_pairs}: two tokens for every "
                "pair, and two for its question"
            )
        if self.vocabulary <= self.length:
            raise ValueError(f"MQAR.vocabulary={self.vocabulary}: more than length={self.length}")
        if not 0 < self.power <= 2:  # far beyond, some places would hardly ever be drawn
            raise ValueError(f"MQAR.power={self.power}: more than 0, at most 2; 1 is the uniform law")

    # ---- what it is ------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.vocabulary

    @property
    def max_length(self) -> int:
        """Tokens in every example."""
        return self.length

    @cached_property
    def place_probabilities(self) -> NDArray[np.float64]:
        """P(g) for the first question, g = 1..S."""
        weights = np.arange(1, self.length // 2 - self.num_pairs + 1, dtype=np.float64) ** (self.power - 1)
        return weights / weights.sum()

    @property
    def groups(self) -> tuple[str, ...]:
        """``pairs<n>``: all questions are alike."""
        return (f"pairs{self.num_pairs}",)

    @property
    def extras(self) -> tuple[str, ...]:
        """``distance2``, ``distance4``, ``distance8``, ...: questions that many tokens behind their pair, or up to twice as many."""
        return tuple(f"distance{2**i}" for i in range(1, (self.length - 2).bit_length()))

    def chance(self, group: str) -> float:
        """One of the example's values at random, but none that was an answer already."""
        return math.fsum(1.0 / left for left in range(1, self.num_pairs + 1)) / self.num_pairs

    # ---- examples --------------------------------------------------------------------------------------------------

    def example(self, seed: int, split: Split, index: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """See ``Task.example``."""
        window = self.windows(seed, split, index, 1, self.length)
        return window.tokens[0], window.loss_mask[0]

    def examples_per_window(self, split: Split, length: int) -> int:
        """See ``Task.examples_per_window``: as many as the shortest examples would take."""
        return -(-length // self.length)

    def windows(self, seed: int, split: Split, first: int, count: int, length: int) -> Windows:
        """See ``Task.windows``."""
        check_split(split)
        per_window = self.examples_per_window(split, length)
        cumulative = np.cumsum(self.place_probabilities)
        params = _Params(self.num_pairs, self.length, self.vocabulary, cumulative, self.random_fill)
        found, key = Windows.empty(count, length), stream_key(self.name, seed, split)
        _fill(params, key, first, per_window, found.tokens, found.loss_mask, found.segments)
        return found

    # ---- reading ---------------------------------------------------------------------------------------------------

    def score(self, tokens: NDArray[np.int64], predictions: NDArray[np.int64]) -> Score:
        """Values behind the questions; by distance, too."""
        counts = np.zeros((len(self.extras) + 1, 2), dtype=np.int64)
        windows, predicted = np.ascontiguousarray(tokens), np.ascontiguousarray(predictions)
        _score(windows, predicted, self.num_pairs, self.length, self.vocabulary, counts)
        right, total = map(int, counts.sum(axis=0))
        by_distance = {name: (int(counts[i, 0]), int(counts[i, 1])) for i, name in enumerate(self.extras, start=1)}
        return Score({self.groups[0]: (right, total)}, by_distance)

    def parse(self, tokens: NDArray[np.int64]) -> tuple[dict[int, int], list[tuple[int, int, int]]]:
        """Reads one example back: ``{key: value}``, and questions ``(position, key, answer)``."""
        ids, start = tokens.tolist(), 2 * self.num_pairs
        pairs = dict(zip(ids[:start:2], ids[1:start:2], strict=True))
        return pairs, [(t, ids[t], ids[t + 1]) for t in range(start, len(ids) - 1, 2) if ids[t] in pairs]

    def describe(self, tokens: NDArray[np.int64]) -> str:
        """The pairs, and the questions in order."""
        pairs, questions = self.parse(tokens)
        lines = ["pairs    " + "  ".join(f"{key}->{value}" for key, value in pairs.items())]
        return "\n".join(lines + [f"question at {t}: {key}?  {answer}" for t, key, answer in questions])


# ---- compiled -------------------------------------------------------------------------------------------------------


@njit(cache=True)
def _draw_new(stream, low, high, number, drawn_by):
    """A token from low..high - 1 that example ``number`` has not drawn so far."""
    while True:
        token = low + below(stream, high - low)
        if drawn_by[token] != number:
            drawn_by[token] = number
            return token


@njit(cache=True)
def _example(params, stream, number, drawn_by, taken_by, tokens, mask):
    """Writes one example to tokens and mask; drawn_by [V] and taken_by [S] hold the last example that drew a token, or took a place."""
    start, middle = 2 * params.pairs, params.vocabulary // 2
    mask[:] = False
    for i in range(params.pairs):
        tokens[2 * i] = _draw_new(stream, 1, middle, number, drawn_by)
        tokens[2 * i + 1] = _draw_new(stream, middle, params.vocabulary, number, drawn_by)
    last = taken_by.shape[0] - 1
    for i in range(params.pairs):
        g = last + 1
        while g > last or taken_by[g] == number:
            g = np.searchsorted(params.cumulative, uniform(stream), side="right")
        taken_by[g] = number
        at = start + 2 * g
        tokens[at], tokens[at + 1], mask[at + 1] = tokens[2 * i], tokens[2 * i + 1], True
    for g in range(last + 1):
        if taken_by[g] != number:
            for at in range(start + 2 * g, start + 2 * g + 2):
                tokens[at] = _filler(params, stream, number, drawn_by)


@njit(cache=True)
def _filler(params, stream, number, drawn_by):
    """0, or any token but the example's keys."""
    token = 0
    while params.random_fill:
        token = below(stream, params.vocabulary)
        if token >= params.vocabulary // 2 or drawn_by[token] != number:
            break
    return token


@njit(cache=True, nogil=True)
def _fill(params, key, first, per_window, tokens, mask, segments):
    """Fills windows ``first ...``; window w packs examples w * per_window and following."""
    stream = np.empty(2, dtype=np.uint64)
    drawn_by = np.full(params.vocabulary, -1, dtype=np.int64)
    taken_by = np.full(params.cumulative.shape[0], -1, dtype=np.int64)
    example_tokens, example_mask = np.empty(params.length, dtype=np.int64), np.empty(params.length, dtype=np.bool_)
    drawn = 0
    for row in range(tokens.shape[0]):
        at, number = 0, 0
        while at < tokens.shape[1]:
            seed_stream(stream, key, (first + row) * per_window + number)
            _example(params, stream, drawn, drawn_by, taken_by, example_tokens, example_mask)
            at = place(example_tokens, example_mask, params.length, number, at, tokens[row], mask[row], segments[row])
            number, drawn = number + 1, drawn + 1


@njit(cache=True, nogil=True)
def _score(tokens, predictions, pairs, length, vocabulary, counts):
    """Adds right and total questions to counts [D, 2]; row i has those at a distance of 2^i and more from their pair."""
    position = np.empty(vocabulary, dtype=np.int64)
    seen_in = np.full(vocabulary, -1, dtype=np.int64)
    width = tokens.shape[1]
    for row in range(tokens.shape[0]):
        for start in range(0, width, length):
            number = row * width + start
            for t in range(start, min(start + length, width - 1), 2):
                key = tokens[row, t]
                if key < 0 or tokens[row, t + 1] < 0:
                    break
                if t < start + 2 * pairs:
                    position[key], seen_in[key] = t, number
                elif seen_in[key] == number:
                    octave, distance = 0, t - position[key]
                    while distance > 1:
                        distance, octave = distance // 2, octave + 1
                    counts[octave, 0] += predictions[row, t + 1] == tokens[row, t + 1]
                    counts[octave, 1] += 1
