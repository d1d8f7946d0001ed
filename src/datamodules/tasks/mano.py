"""Mano: knowledge manipulation. Nested arithmetic modulo 23, done in the head.  (Part 4.1, section 2.1 and appendix A.4)

An example is one expression in prefix notation with its value; every operator has two arguments, a number or an expression:

    <bos> <length l>  op arg arg ...  <ans l>  value          l operators, l + 1 numbers

Worked example, l = 2 operators (19 stands for the token 5019):

    tokens   <bos> <length 2>  - * 19 0 8  <ans 2>  15        (19 * 0) - 8 = -8 = 15 mod 23
    learnt   every token (``loss="answer"``: the value alone)

An expression of l > 0 operators is an operator, uniform among + - *, a left argument of l1 operators, l1 uniform in 0..l-1, and a
right argument of the other l - 1 - l1.

    train       l uniform in 1..L
    val, test   l = L (``test_lengths="all"``: uniform in 1..L)

The paper's difficulties are L = 10, 13, 16. Zero is the most frequent value, because a product with 0 is 0: whoever answers 0 always
is right in 7% of all cases (``chance``), and a model at that level has learnt nothing.

Where the paper and the release disagree, or are silent:

    ``synonyms``     the release has two ids for <bos>, for each operator and for each tag, and tosses a coin at every occurrence;
                     the paper does not mention it. On by default, as in the release, whose author finds that it hardly matters
    ``loss``         the release gives no mask; the paper says all tokens
    scoring          absent from the release: the value must be the most probable token behind <ans l>
    ``compact_ids``  numbers all tokens from 0 on instead of the release's 1..8, 10 l, 5000 + v and 9999, for small models
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from src.datamodules.tasks.base import Score, Split, Task, Windows, check_split, place
from src.datamodules.tasks.rng import below, seed_stream, stream_key

OPERATORS = "+-*"


class _Params(NamedTuple):
    """What the compiled generator needs to know. Rows of ids: the first name of a token, and its synonym."""

    shortest: int  # operators
    longest: int
    modulus: int
    results: NDArray[np.int64]  # [3, modulus, modulus], value of op(left, right)
    names: int  # 1, or 2 with synonyms
    operators: NDArray[np.int64]  # [6], names of + - *, then their synonyms
    bos: NDArray[np.int64]  # [2]
    length_tags: NDArray[np.int64]  # [2, L + 1]
    ans_tags: NDArray[np.int64]  # [2, L + 1]
    value: int  # id of the number v is value + v
    learn_all: bool


@dataclass(frozen=True)
class Mano(Task):
    """Nested modular arithmetic; see the head of this file.

    Args:
        L: most operators in an expression.
        modulus: of the arithmetic.
        synonyms: two ids for each tag and operator, chosen by coin tosses.
        loss: ``all`` tokens are learnt, or the ``answer`` alone.
        test_lengths: expressions of val and test: the ``hardest`` (L operators), or ``all`` lengths alike.
        compact_ids: number all tokens from 0 on.

    Raises:
        ValueError: for parameters out of range.
    """

    config_name = "mano"

    L: int = 10
    modulus: int = 23
    synonyms: bool = True
    loss: Literal["all", "answer"] = "all"
    test_lengths: Literal["hardest", "all"] = "hardest"
    compact_ids: bool = False

    name: ClassVar[str] = "mano"

    def __post_init__(self) -> None:
        for key, least, most in (("L", 1, 10_000), ("modulus", 2, 4_000)):
            if not least <= getattr(self, key) <= most:
                raise ValueError(f"Mano.{key}={getattr(self, key)}: between {least} and {most}")
        for key, choices in (("loss", ("all", "answer")), ("test_lengths", ("hardest", "all"))):
            if getattr(self, key) not in choices:
                raise ValueError(f"Mano.{key}={getattr(self, key)!r}: choose {' or '.join(choices)}")
        if not self.compact_ids and self.L > 499:
            raise ValueError(f"Mano.L={self.L}: tags of the release reach 5000 from L = 500 on; set compact_ids=true")

    # ---- vocabulary ------------------------------------------------------------------------------------------------

    @cached_property
    def ids(self) -> dict[str, NDArray[np.int64]]:
        """Token ids: ``bos`` [2], ``operator`` [2, 3], ``length`` [2, L + 1], ``ans`` [2, L + 1], ``value`` [modulus]."""
        lengths = np.arange(self.L + 1)
        if not self.compact_ids:
            return {
                "bos": np.array([9999, 9998]),
                "operator": np.array([[1, 2, 3], [5, 6, 7]]),
                "length": np.stack((10 * lengths, 10 * lengths + 1)),
                "ans": np.stack((10 * lengths + 4, 10 * lengths + 5)),
                "value": 5000 + np.arange(self.modulus),
            }
        names = 2 if self.synonyms else 1
        sizes = {"bos": 1, "operator": 3, "length": self.L, "ans": self.L}
        found: dict[str, NDArray[np.int64]] = {}
        start = 0
        for kind, size in sizes.items():
            rows = start + np.arange(names * size).reshape(names, size)
            rows = rows if names == 2 else np.concatenate((rows, rows))
            # Tags are asked for by l = 1..L; there is no expression without operators.
            found[kind] = np.insert(rows, 0, -1, axis=1) if size == self.L and kind in ("length", "ans") else rows
            start += names * size
        found["bos"] = found["bos"].ravel()
        return found | {"value": start + np.arange(self.modulus)}

    @property
    def vocab_size(self) -> int:
        """10,000 with the release's ids."""
        return int(self.ids["value"][-1]) + 1 if self.compact_ids else 10_000

    @property
    def max_length(self) -> int:
        """Tokens in an example of L operators."""
        return 2 * self.L + 5

    def vocabulary(self) -> dict[str, Any]:
        """See ``Task.vocabulary``."""
        first = {kind: int(rows.ravel()[1 if kind in ("length", "ans") else 0]) for kind, rows in self.ids.items()}
        return {"modulus": self.modulus} | first

    # ---- laws ------------------------------------------------------------------------------------------------------

    @cached_property
    def results(self) -> NDArray[np.int64]:
        """Value of ``op(left, right)`` for the operators + - *, ``[3, modulus, modulus]``."""
        a, b = np.arange(self.modulus)[:, None], np.arange(self.modulus)[None, :]
        return np.stack([(a + b), (a - b), (a * b)]) % self.modulus

    def value_probabilities(self, operators: int) -> NDArray[np.float64]:
        """P(value) of an expression with that many operators, exactly."""
        laws = [np.full(self.modulus, 1 / self.modulus)]
        for size in range(1, operators + 1):
            pairs = sum(np.outer(laws[left], laws[size - 1 - left]) for left in range(size)) / size
            law = np.zeros(self.modulus)
            for table in self.results:
                np.add.at(law, table, pairs / 3)
            laws.append(law)
        return laws[operators]

    @property
    def groups(self) -> tuple[str, ...]:
        """``length<l>``: the evaluation numbers of operators."""
        return tuple(f"length{size}" for size in self._lengths("test"))

    def chance(self, group: str) -> float:
        """The share of the most frequent value, 0: what a constant answer scores."""
        return float(self.value_probabilities(int(group.removeprefix("length"))).max())

    def _lengths(self, split: Split) -> range:
        easiest = 1 if split == "train" or self.test_lengths == "all" else self.L
        return range(easiest, self.L + 1)

    # ---- generation ------------------------------------------------------------------------------------------------

    def _params(self, split: Split) -> _Params:
        check_split(split)
        ids, lengths = self.ids, self._lengths(split)
        return _Params(
            shortest=lengths[0],
            longest=lengths[-1],
            modulus=self.modulus,
            results=self.results,
            names=2 if self.synonyms else 1,
            operators=ids["operator"].ravel(),
            bos=ids["bos"],
            length_tags=ids["length"],
            ans_tags=ids["ans"],
            value=int(ids["value"][0]),
            learn_all=self.loss == "all",
        )

    def example(self, seed: int, split: Split, index: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """See ``Task.example``."""
        tokens = np.empty(self.max_length, dtype=np.int64)
        mask = np.empty(self.max_length, dtype=np.bool_)
        size = _one(self._params(split), stream_key(self.name, seed, split), index, tokens, mask)
        return tokens[:size].copy(), mask[:size].copy()

    def examples_per_window(self, split: Split, length: int) -> int:
        """See ``Task.examples_per_window``: as many as the shortest examples would take."""
        return -(-length // (2 * self._lengths(split)[0] + 5))

    def windows(self, seed: int, split: Split, first: int, count: int, length: int) -> Windows:
        """See ``Task.windows``."""
        params = self._params(split)
        per_window = self.examples_per_window(split, length)
        found, key = Windows.empty(count, length), stream_key(self.name, seed, split)
        _fill(params, key, first, per_window, self.max_length, found.tokens, found.loss_mask, found.segments)
        return found

    # ---- reading ---------------------------------------------------------------------------------------------------

    def score(self, tokens: NDArray[np.int64], predictions: NDArray[np.int64]) -> Score:
        """Whether the token behind <ans l> is the value, by l."""
        tag_length = np.full(max(self.vocab_size, int(tokens.max(initial=0)) + 1), -1)
        for row in self.ids["ans"]:
            tag_length[row[1:]] = np.arange(1, self.L + 1)
        lengths = np.where(tokens[:, :-1] >= 0, tag_length[tokens[:, :-1]], -1)
        right = predictions[:, 1:] == tokens[:, 1:]
        counts = {}
        for size in range(1, self.L + 1):
            asked = lengths == size
            if asked.any() or f"length{size}" in self.groups:
                counts[f"length{size}"] = (int((asked & right).sum()), int(asked.sum()))
        return Score(counts)

    def parse(self, tokens: NDArray[np.int64]) -> tuple[list, int]:
        """Reads one example back: the expression as a nested list ``[op, left, right]`` of numbers, and the answer."""
        ids = self.ids
        names = {int(token): op for row in ids["operator"] for op, token in zip(OPERATORS, row, strict=True)}
        at = 2

        def argument() -> list | int:
            nonlocal at
            token, at = int(tokens[at]), at + 1
            if token in names:
                return [names[token], argument(), argument()]
            value = token - int(ids["value"][0])
            if not 0 <= value < self.modulus:
                raise ValueError(f"token {at - 1}: {token} is neither an operator nor a number")
            return value

        tree = argument()
        if not isinstance(tree, list) or at + 2 != len(tokens) or int(tokens[at]) not in ids["ans"][:, 1:]:
            raise ValueError(f"token {at}: expected <ans> and one number behind the expression")
        return tree, int(tokens[at + 1]) - int(ids["value"][0])

    def evaluate(self, tree: list | int) -> int:
        """The value of a parsed expression."""
        if isinstance(tree, int):
            return tree
        op, left, right = tree
        return int(self.results[OPERATORS.index(op), self.evaluate(left), self.evaluate(right)])

    def describe(self, tokens: NDArray[np.int64]) -> str:
        """The expression with brackets, step by step, and the answer."""
        tree, answer = self.parse(tokens)
        steps: list[str] = []

        def infix(node: list | int) -> str:
            if isinstance(node, int):
                return str(node)
            left, right = infix(node[1]), infix(node[2])
            steps.append(f"    {self.evaluate(node[1])} {node[0]} {self.evaluate(node[2])} = {self.evaluate(node)}")
            return f"({left} {node[0]} {right})"

        written = infix(tree)
        head = f"{written[1:-1]} mod {self.modulus}"
        return "\n".join([f"question {head}", "steps", *steps, f"answer   {answer}"])


# ---- compiled -------------------------------------------------------------------------------------------------------


@njit(cache=True)
def _example(params, stream, todo, nodes, tokens, mask, at):
    """Writes one example to tokens[at:] and mask[at:]; returns where it ends. ``todo`` and ``nodes`` are scratch."""
    size = params.shortest + below(stream, params.longest - params.shortest + 1)
    start = at
    tokens[at] = params.bos[below(stream, params.names)]
    tokens[at + 1] = params.length_tags[below(stream, params.names), size]
    at += 2
    # Prefix order: what is still to be written, outermost at the bottom, is a stack of operator counts.
    todo[0], waiting, count = size, 1, 0
    while waiting > 0:
        operators = todo[waiting - 1]
        if operators == 0:
            waiting -= 1
            nodes[count] = below(stream, params.modulus)
            tokens[at + count] = params.value + nodes[count]
        else:
            op = below(stream, 3 * params.names)
            tokens[at + count] = params.operators[op]
            nodes[count] = -1 - op
            left = below(stream, operators)
            todo[waiting - 1], todo[waiting] = operators - 1 - left, left
            waiting += 1
        count += 1
    at += count

    # Read backwards, prefix notation is evaluated with a stack of values; ``todo`` is free to be that stack.
    depth = 0
    for t in range(count - 1, -1, -1):
        if nodes[t] >= 0:
            todo[depth] = nodes[t]
            depth += 1
        else:
            op = -1 - nodes[t]
            depth -= 1
            todo[depth - 1] = params.results[op if op < 3 else op - 3, todo[depth], todo[depth - 1]]
    tokens[at] = params.ans_tags[below(stream, params.names), size]
    tokens[at + 1] = params.value + todo[0]
    at += 2
    for t in range(start, at - 1):
        mask[t] = params.learn_all
    mask[at - 1] = True
    return at


@njit(cache=True)
def _one(params, key, index, tokens, mask):
    stream = np.empty(2, dtype=np.uint64)
    seed_stream(stream, key, index)
    todo, nodes = np.empty(tokens.shape[0], dtype=np.int64), np.empty(tokens.shape[0], dtype=np.int64)
    return _example(params, stream, todo, nodes, tokens, mask, 0)


@njit(cache=True, nogil=True)
def _fill(params, key, first, per_window, max_length, tokens, mask, segments):
    """Fills windows ``first ...``; window w packs examples w * per_window and following."""
    stream = np.empty(2, dtype=np.uint64)
    todo, nodes = np.empty(max_length, dtype=np.int64), np.empty(max_length, dtype=np.int64)
    last_tokens, last_mask = np.empty(max_length, dtype=np.int64), np.empty(max_length, dtype=np.bool_)
    length = tokens.shape[1]
    for row in range(tokens.shape[0]):
        at, number = 0, 0
        row_tokens, row_mask, row_segments = tokens[row], mask[row], segments[row]
        while at < length:
            seed_stream(stream, key, (first + row) * per_window + number)
            if at + max_length <= length:
                end = _example(params, stream, todo, nodes, row_tokens, row_mask, at)
                row_segments[at:end] = number
                at = end
            else:  # may be cut by the window's end
                size = _example(params, stream, todo, nodes, last_tokens, last_mask, 0)
                at = place(last_tokens, last_mask, size, number, at, row_tokens, row_mask, row_segments)
            number += 1
