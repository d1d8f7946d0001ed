"""Depo: reasoning depth. From a word, go k steps along a hidden cycle: which word?  (Part 4.1, section 2.1 and appendix A.1)

An example lists the n edges of one random directed cycle over n words in random order, then asks up to ten questions and gives
each answer right behind its question:

    <bos> x1 y1 x2 y2 ... xn yn   <query_k> w <ans> a   <query_k'> w' <ans> a'  ...          edge x -> y, a = k-th successor of w

Worked example, V = 3 inner tokens, words of one or two tokens, N = 5, K = 4 (26 is the word made of tokens 2 and 6):

    tokens   9999 | 5 26 | 25 15 | 6 5 | 26 25 | 15 6 | Q4 15 > 25 | Q3 6 > 25 | Q2 5 > 25 | Q4 26 > 5 | Q4 25 > 26
    cycle    5 -> 26 -> 25 -> 15 -> 6 -> 5
    learnt   only ">" and the answer behind it (the loss mask)

Words end with a token from V+1..2V and have tokens from 1..V before it, so no separator is needed. They are drawn by plain
rejection until n are distinct: one-token words run out, and long words dominate when n is large, as in the release.

    train       n in 3..N with probability proportional to 1/(n + sqrt N); k uniform in 1..K
    val, test   n = N; k uniform over ``test_hops``

Depo1: N = 225/300/375, K = 8, V = 50, word_length (1, 2). Depo2: N = 75/100/125, K = 16, word_length (5, 7) and V = 4 in the paper,
3 in the release. Where they disagree, or are silent:

    ``length_law``   the paper says "uniformly" once, its formula and the release use the weights: ``weighted`` is the default
    ``test_hops``    the paper reports k = K and K/2 (``extremes``); the release draws powers of two: ``powers`` is the default
    scoring          absent from the release. An answer is right if every token of its word is
    loss mask        alignment is not defined in the release; here it marks targets (the other reading would train on the random k)
    ``compact_ids``  numbers the special tokens right behind the words instead of 9000 and up, for small models
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from src.datamodules.tasks.base import Score, Split, Task, Windows, check_split
from src.datamodules.tasks.depo_sampling import MAX_LEXICON, Params, fill, score_answers, write_example
from src.datamodules.tasks.rng import stream_key


@dataclass(frozen=True)
class Depo(Task):
    """k-hop successor lookup on a hidden cycle; see the head of this file.

    Args:
        N: most words in an example, at least 3.
        K: most hops in a question.
        mini_vocab: V, inner tokens of words; another V tokens end them.
        word_length: fewest and most tokens in a word.
        questions: most questions in an example (the release's M).
        separator: put a separator token before every edge.
        length_law: ``weighted`` or ``uniform`` law of n in training.
        test_hops: ``powers`` (of two up to K; 24 too when K = 32; K itself) or ``extremes`` (K/2 and K).
        compact_ids: number special tokens right behind the words.

    Raises:
        ValueError: for parameters out of range, or when there are not N different words.
    """

    config_name = "depo"

    N: int = 375
    K: int = 8
    mini_vocab: int = 50
    word_length: tuple[int, int] = (1, 2)
    questions: int = 10
    separator: bool = False
    length_law: Literal["weighted", "uniform"] = "weighted"
    test_hops: Literal["powers", "extremes"] = "powers"
    compact_ids: bool = False

    name: ClassVar[str] = "depo"

    def __post_init__(self) -> None:
        object.__setattr__(self, "word_length", tuple(self.word_length))
        for key, least in (("N", 3), ("K", 1), ("mini_vocab", 1), ("questions", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"Depo.{key}={getattr(self, key)}: at least {least}")
        if len(self.word_length) != 2 or not 1 <= self.word_length[0] <= self.word_length[1]:
            raise ValueError(f"Depo.word_length={self.word_length}: two numbers, 1 <= shortest <= longest")
        words = sum(self.mini_vocab**length for length in range(self.word_length[0], self.word_length[1] + 1))
        if words < self.N:
            raise ValueError(
                f"Depo.N={self.N}: only {words} different words exist with mini_vocab={self.mini_vocab} and "
                f"word_length={self.word_length}; raise one of these or lower N"
            )
        if (self.mini_vocab + 1) ** self.word_length[1] >= 2**62:
            raise ValueError(f"Depo.word_length={self.word_length} is too long for mini_vocab={self.mini_vocab}")
        for key, choices in (("length_law", ("weighted", "uniform")), ("test_hops", ("powers", "extremes"))):
            if getattr(self, key) not in choices:
                raise ValueError(f"Depo.{key}={getattr(self, key)!r}: choose {' or '.join(choices)}")
        if not self.compact_ids and (2 * self.mini_vocab > 9000 or self.K > 499):
            raise ValueError(
                f"Depo: mini_vocab={self.mini_vocab} and K={self.K} collide with the special ids at 9000 and up; "
                "set compact_ids=true, or mini_vocab <= 4500 and K <= 499"
            )

    # ---- vocabulary ------------------------------------------------------------------------------------------------

    @property
    def query_id(self) -> int:
        """Id of <query_k> minus k."""
        return 2 * self.mini_vocab if self.compact_ids else 9000

    @property
    def ans_id(self) -> int:
        """Id of <ans>."""
        return self.query_id + self.K + 1 if self.compact_ids else 9500

    @property
    def separator_id(self) -> int:
        """Id of the optional edge separator."""
        return self.ans_id + 1 if self.compact_ids else 9700

    @property
    def bos_id(self) -> int:
        """Id of <bos>; 0 is free in the compact numbering."""
        return 0 if self.compact_ids else 9999

    @property
    def vocab_size(self) -> int:
        """10,000 with the release's ids."""
        return self.separator_id + 1 if self.compact_ids else 10_000

    def vocabulary(self) -> dict[str, Any]:
        """See ``Task.vocabulary``."""
        return {"mini_vocab": self.mini_vocab, "query": self.query_id, "ans": self.ans_id, "bos": self.bos_id}

    # ---- laws ------------------------------------------------------------------------------------------------------

    @cached_property
    def evaluation_hops(self) -> tuple[int, ...]:
        """The hop counts asked for in val and test, ascending."""
        if self.test_hops == "extremes":
            return tuple(sorted({max(1, self.K // 2), self.K}))
        powers = {2**i for i in range(self.K.bit_length()) if 2**i <= self.K}
        return tuple(sorted(powers | {self.K} | ({24} if self.K == 32 else set())))

    @cached_property
    def length_probabilities(self) -> NDArray[np.float64]:
        """P(n) in training for n = 3..N."""
        n = np.arange(3, self.N + 1, dtype=np.float64)
        weights = 1.0 / (n + self.N**0.5 + 1e-12) if self.length_law == "weighted" else np.ones_like(n)
        return weights / weights.sum()

    @property
    def groups(self) -> tuple[str, ...]:
        """``hop1``, ``hop2``, ...: the evaluation hop counts."""
        return tuple(f"hop{k}" for k in self.evaluation_hops)

    def chance(self, group: str) -> float:
        """One of the example's words, but for the one asked about and earlier answers to the same k, which it cannot be."""
        n, hops = self.N, len(self.evaluation_hops)
        if int(group.removeprefix("hop")) % n == 0:
            return 1.0  # once around the cycle
        found, questions = 0.0, min(n, self.questions)
        for asked in range(questions):
            for j in range(
                asked + 1
            ):  # earlier questions with this k; the word asked about may be the answer to one of them
                p = math.comb(asked, j) * (hops - 1) ** (asked - j) / hops**asked
                among = j / (n - 1)
                found += p * (among / (n - j) + (1 - among) / max(n - 1 - j, 1)) / questions
        return found

    # ---- generation ------------------------------------------------------------------------------------------------

    def _params(self, split: Split) -> Params:
        check_split(split)
        training = split == "train"
        return Params(
            n_max=self.N,
            cumulative=np.cumsum(self.length_probabilities) if training else np.empty(0),
            hops=np.asarray(range(1, self.K + 1) if training else self.evaluation_hops, dtype=np.int64),
            inner=self.mini_vocab,
            shortest=self.word_length[0],
            longest=self.word_length[1],
            questions=self.questions,
            separator=self.separator_id if self.separator else -1,
            bos=self.bos_id,
            query=self.query_id,
            ans=self.ans_id,
            **self._lexicon,
        )

    @cached_property
    def _lexicon(self) -> dict[str, Any]:
        """What ``Params`` knows of all words."""
        V, shortest, longest = self.mini_vocab, *self.word_length
        lengths = range(shortest, longest + 1)
        counts = [V**length for length in lengths]
        stride = longest + longest % 2
        tabulated = sum(counts) <= MAX_LEXICON
        rows = np.zeros((sum(counts) if tabulated else 0, stride), dtype=np.int64)
        if tabulated:
            for length, block in zip(lengths, np.split(rows, np.cumsum(counts)[:-1]), strict=True):
                block[:, :length] = 1 + np.indices((V,) * length).reshape(length, -1).T
                block[:, length - 1] += V
        return {
            "counts": np.array(counts, dtype=np.uint64),
            "offsets": np.array(np.cumsum([0, *counts[:-1]]), dtype=np.uint64),
            "uneven": np.array([2**32 % count for count in counts], dtype=np.uint64),
            "stride": stride,
            "lexicon": rows.reshape(-1),
            "sizes": np.repeat(np.array(lengths, dtype=np.uint8), counts if tabulated else 0),
        }

    @property
    def _spare(self) -> int:
        """Room behind the last token: for an edge or a question that is cut, and for the surplus of a row."""
        return 2 + 4 * self.word_length[1]

    def _example_length(self, n: int, word_length: int) -> int:
        edge = 2 * word_length + self.separator
        return 1 + n * edge + min(n, self.questions) * (2 + 2 * word_length)

    @property
    def max_length(self) -> int:
        """Tokens in the longest possible example."""
        return self._example_length(self.N, self.word_length[1])

    def example(self, seed: int, split: Split, index: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """See ``Task.example``."""
        tokens = np.empty(self.max_length + self._spare, dtype=np.int64)
        mask = np.zeros(tokens.shape, dtype=np.bool_)
        size = write_example(self._params(split), stream_key(self.name, seed, split), index, tokens, mask)
        return tokens[:size].copy(), mask[:size].copy()

    def examples_per_window(self, split: Split, length: int) -> int:
        """See ``Task.examples_per_window``."""
        return -(-length // self._example_length(3 if split == "train" else self.N, self.word_length[0]))

    def windows(self, seed: int, split: Split, first: int, count: int, length: int) -> Windows:
        """See ``Task.windows``."""
        params, per_window = self._params(split), self.examples_per_window(split, length)
        size, shape = count * length, (count, length)
        tokens, mask = np.empty(size + self._spare, dtype=np.int64), np.empty(size + self._spare, dtype=np.bool_)
        segments = np.empty(size, dtype=np.int32)
        fill(params, stream_key(self.name, seed, split), first, per_window, length, tokens, mask, segments)
        return Windows(tokens[:size].reshape(shape), mask[:size].reshape(shape), segments.reshape(shape))

    # ---- reading ---------------------------------------------------------------------------------------------------

    def score(self, tokens: NDArray[np.int64], predictions: NDArray[np.int64]) -> Score:
        """Whole-answer exact match by hop count; answers cut by the window's end do not count."""
        right, total = np.zeros(self.K + 1, dtype=np.int64), np.zeros(self.K + 1, dtype=np.int64)
        windows, predicted = np.ascontiguousarray(tokens), np.ascontiguousarray(predictions)
        score_answers(windows, predicted, self.query_id, self.ans_id, self.mini_vocab, right, total)
        asked = set(self.evaluation_hops) | {int(k) for k in np.flatnonzero(total)}
        return Score({f"hop{k}": (int(right[k]), int(total[k])) for k in sorted(asked)})

    def parse(self, tokens: NDArray[np.int64]) -> tuple[list[tuple], list[tuple]]:
        """Reads one example back: edges ``(x, y)`` and questions ``(k, word, answer)``; words are tuples of tokens."""
        ids = [int(token) for token in tokens if token not in (self.bos_id, self.separator_id)]
        edges: list[tuple] = []
        questions: list[tuple] = []
        at = 0

        def word() -> tuple[int, ...]:
            nonlocal at
            start = at
            while at < len(ids) and 1 <= ids[at] <= self.mini_vocab:
                at += 1
            at += 1
            if at > len(ids) or not self.mini_vocab < ids[at - 1] <= 2 * self.mini_vocab:
                raise ValueError(f"token {start}: no whole word here, {ids[start : start + 8]}...")
            return tuple(ids[start:at])

        while at < len(ids) and ids[at] <= 2 * self.mini_vocab:
            edges.append((word(), word()))
        while at < len(ids):
            k = ids[at] - self.query_id
            at += 1
            asked = word()
            if at >= len(ids) or ids[at] != self.ans_id:
                raise ValueError(f"token {at}: expected <ans>")
            at += 1
            questions.append((k, asked, word()))
        return edges, questions

    def describe(self, tokens: NDArray[np.int64]) -> str:
        """The cycle, the edges as listed, and the questions, in words."""
        edges, questions = self.parse(tokens)
        successor = dict(edges)
        start = node = edges[0][0]
        cycle = [start]
        while (node := successor[node]) != start:
            cycle.append(node)
        names = {word: ".".join(map(str, word)) for word in successor}
        lines = [
            "edges    " + "  ".join(f"{names[x]}->{names[y]}" for x, y in edges),
            "cycle    " + " -> ".join(names[word] for word in [*cycle, start]),
        ]
        lines += [f"question {k} steps from {names[word]}?  {names[answer]}" for k, word, answer in questions]
        return "\n".join(lines)
