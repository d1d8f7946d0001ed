"""Exact inference in layered grammars: membership, number of parses, parse trees, next-token distribution.

Position i lies before token i; T tokens have positions 0..T. With rule weights p_r and a number w per token,

    inside    P_t[i, i+1] = w where token i is t       P_A = sum over rules A -> X1 .. Xr of  p_r P_X1 .. P_Xr       [T+1, T+1]
    forward   o_root = e_0     o_X1 += p_r o_A     o_X2 += p_r o_A P_X1     o_X3 += p_r o_A P_X1 P_X2                [T+1]

Then P_root[0, T] > 0 says that the string is a sentence. With p_r = 1 and w = 1 it is the number of its derivations. With
p_r = 1/n_A and w = 1, o_t[i] is the probability that a sentence starts with the first i tokens and goes on with t, and P_root[0, i]
that these i tokens are a sentence; divided by their sum, the probability of the prefix, they are row i of the next-token
distribution.

Row i of P_A is a short list of (end, weight), because a symbol that starts at i can end at few places: a cfg3k string of 500 tokens
takes some 16,000 multiplications, where dense matrices take 10^10. Rows are computed from the last position to the first.

w > 1 keeps long products from underflow and cancels in every row of the result. It comes from the grammar, and is changed for the
rare string that needs another. Counts are exact: sums and products of integers in float64 are, up to 2^53; larger counts are redone
in Python's integers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from src.datamodules.tasks.cfg import Grammar, Rule

Span = tuple[int, int, int]  # symbol, first position, last position


class _Chart(NamedTuple):
    """The inside matrices of one string: row (i, symbol) is entries ``row[i, symbol] .. row[i, symbol + 1] - 1``."""

    row: NDArray[np.int32]  # [T + 1, S + 1] for S symbols
    ends: NDArray[np.int32]  # [entries], where the symbol can end
    weights: NDArray[np.float64]  # [entries]
    sums: NDArray[np.float64]  # [2, T + 1], working memory: running sums of a row by end; zero between uses
    touched: NDArray[np.int32]  # [2, T + 1], which of them are not zero


class Inference:
    """Exact questions to a grammar. A string is a sequence of ids, of terminals only if it is to be a sentence."""

    def __init__(self, grammar: Grammar):
        self.grammar = grammar
        self._tables = tables = grammar.tables
        rules = np.diff(tables.first_rule)
        self._ones = np.ones(len(tables.size))
        self._uniform = np.repeat(1.0 / np.maximum(rules, 1), rules)
        # A derivation of n tokens has probability 2^-(n H / E) on average: with this number per token products stay near 1.
        self._scale = 2.0 ** (grammar.derivation_entropy / grammar.mean_length)

    def memberships(self, strings: Sequence[ArrayLike]) -> NDArray[np.bool_]:
        """Whether each string is a sentence."""
        return self._counts(strings) > 0

    def num_parses(self, strings: Sequence[ArrayLike]) -> list[int]:
        """Derivation trees of each string, exactly."""
        counts = self._counts(strings)
        return [
            int(n) if n < 2.0**53 else self._count_exactly(string) for n, string in zip(counts, strings, strict=True)
        ]

    def next_token_distributions(self, strings: Sequence[ArrayLike], whole: bool = True) -> list[NDArray[np.float64]]:
        """``[T + 1, V + 1]`` for each sentence of T tokens; column 0 is the end of the sentence, column t terminal t.

        Args:
            strings: the sentences.
            whole: whether they are; else they are the beginnings of sentences, which may be empty.

        Raises:
            ValueError: for a string that is not a sentence, or not the beginning of one.
        """
        if len(strings) == 0:
            return []
        tokens, starts = self._flatten(strings)
        outside = self._out_of_range(starts) if whole else np.diff(starts) > self.grammar.max_length
        told = self._not_a_sentence if whole else f"begins no sentence of {self.grammar.label}"
        if outside.any():
            raise ValueError(f"string {int(outside.argmax())} {told}")
        rows = np.zeros((len(tokens) + len(strings), self.grammar.terminals + 1))
        given = (self._tables, self._uniform, self._ones, self._scale, tokens, starts, rows, whole)
        number, found = _distributions(*given)
        if number >= 0 and not found:
            raise ValueError(f"string {number} {told}")
        if number >= 0:
            raise FloatingPointError(f"string {number}: its probabilities are out of float64's range")
        return np.split(rows, starts[1:-1] + np.arange(1, len(strings)))

    def parse(self, string: ArrayLike) -> list[list[Span]]:
        """One derivation tree: for every layer, root first, its (symbol, first position, last position) from left to right.

        Where there are several, the first that fits: rules in order, then early ends in order.

        Raises:
            ValueError: for a string that is not a sentence.
        """
        row = self._rows(string)
        length = np.asarray(string).size
        if length not in row(self.grammar.root, 0):
            raise ValueError(f"the string {self._not_a_sentence}")
        layers: list[list[Span]] = [[(self.grammar.root, 0, length)]]
        for _ in range(self.grammar.depth):
            layers.append([child for parent in layers[-1] for child in next(self._splits(row, *parent))])
        return layers

    # ---- one string in Python ----------------------------------------------------------------------------------------

    @property
    def _not_a_sentence(self) -> str:
        return f"is not a sentence of {self.grammar.label}; ask membership first"

    def _rows(self, string: ArrayLike) -> Callable[[int, int], list[int]]:
        """The ends of a symbol that starts at a position, ascending."""
        tokens, starts = self._flatten([string])
        if self._out_of_range(starts).any():
            return lambda symbol, start: []
        chart = _count(self._tables, self._ones, tokens, starts, np.zeros(1, dtype=np.bool_), np.zeros(1))

        def row(symbol: int, start: int) -> list[int]:
            return sorted(chart.ends[chart.row[start, symbol] : chart.row[start, symbol + 1]].tolist())

        return row

    def _splits(self, row: Callable[[int, int], list[int]], symbol: int, start: int, end: int) -> Iterator[list[Span]]:
        """All ways to divide a span among the children of one of its symbol's rules."""

        def divide(rule: Rule, at: int) -> Iterator[list[Span]]:
            for middle in row(rule[0], at):
                if len(rule) == 1 and middle == end:
                    yield [(rule[0], at, end)]
                elif len(rule) > 1 and middle < end:
                    yield from ([(rule[0], at, middle), *rest] for rest in divide(rule[1:], middle))

        return (children for rule in self.grammar.rules_of(symbol) for children in divide(rule, start))

    def _count_exactly(self, string: ArrayLike) -> int:
        """The inside matrices again, row by row as they are asked for, in Python's integers."""
        tokens = np.asarray(string).tolist()

        @cache
        def row(symbol: int, start: int) -> dict[int, int]:
            if symbol <= self.grammar.terminals:
                return {start + 1: 1} if tokens[start : start + 1] == [symbol] else {}
            total: dict[int, int] = defaultdict(int)
            for rule in self.grammar.rules_of(symbol):
                reached = {start: 1}
                for child in rule:
                    further: dict[int, int] = defaultdict(int)
                    for middle, count in reached.items():
                        for end, more in row(child, middle).items():
                            further[end] += count * more
                    reached = further
                for end, count in reached.items():
                    total[end] += count
            return total

        return row(self.grammar.root, 0)[len(tokens)]

    # ---- many strings, compiled --------------------------------------------------------------------------------------

    def _counts(self, strings: Sequence[ArrayLike]) -> NDArray[np.float64]:
        tokens, starts = self._flatten(strings)
        counts = np.zeros(len(strings))
        _count(self._tables, self._ones, tokens, starts, self._out_of_range(starts), counts)
        return counts

    def _flatten(self, strings: Sequence[ArrayLike]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All strings in a row, and where each starts; what is not a terminal becomes 0."""
        arrays = [np.asarray(string) for string in strings]
        for number, array in enumerate(arrays):
            if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
                raise ValueError(f"string {number}: one dimension of integer ids, not {array.dtype} {array.shape}")
        starts = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
        tokens = np.concatenate([np.empty(0, dtype=np.int64), *arrays]).astype(np.int64, copy=False)
        return np.where((tokens >= 1) & (tokens <= self.grammar.terminals), tokens, 0), starts

    def _out_of_range(self, starts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Strings too short or too long to be sentences."""
        lengths = np.diff(starts)
        return (lengths < self.grammar.min_length) | (lengths > self.grammar.max_length)


# ---- compiled -------------------------------------------------------------------------------------------------------


@njit(cache=True)
def _new_chart(tables, length, entries):
    return _Chart(
        np.zeros((length + 1, tables.root + 2), dtype=np.int32),
        np.empty(entries, dtype=np.int32),
        np.empty(entries, dtype=np.float64),
        np.zeros((2, length + 1), dtype=np.float64),
        np.empty((2, length + 1), dtype=np.int32),
    )


@njit(cache=True)
def _extend(value, first, last, ends, weights, sums, touched, n):
    """Adds ``value`` times entries first..last-1 to running sums; returns how many sums are not zero."""
    for k in range(first, last):
        end, product = ends[k], value * weights[k]
        if product == 0.0:  # an underflow, which must not look like a sum that nothing was added to
            continue
        if sums[end] == 0.0:
            touched[n] = end
            n += 1
        sums[end] += product
    return n


@njit(cache=True)
def _sum_rules(rules, i, size, children, rule_weights, row, ends, weights, out, out_touched, partial, partial_touched):
    """Sums a symbol's row i over its rules, from rows of the layer below; returns how many entries it has."""
    n_out = 0
    for rule in range(*rules):
        left = children[rule, 0]
        n_partial = 0
        for k in range(row[i, left], row[i, left + 1]):
            if size[rule] == 1:
                n_out = _extend(rule_weights[rule], k, k + 1, ends, weights, out, out_touched, n_out)
                continue
            end, value, right = ends[k], rule_weights[rule] * weights[k], children[rule, 1]
            first, last = row[end, right], row[end, right + 1]
            if size[rule] == 2:
                n_out = _extend(value, first, last, ends, weights, out, out_touched, n_out)
            else:
                n_partial = _extend(value, first, last, ends, weights, partial, partial_touched, n_partial)
        for k in range(n_partial):
            end, right = partial_touched[k], children[rule, 2]
            n_out = _extend(partial[end], row[end, right], row[end, right + 1], ends, weights, out, out_touched, n_out)
            partial[end] = 0.0
    return n_out


@njit(cache=True)
def _inside(tables, rule_weights, scale, tokens, chart):
    """Computes all rows, from the last position to the first and from the terminals up; False: the chart is too small."""
    # Arrays are taken out of their tuples once: each time costs as much as several multiplications.
    first_rule, size, children, shortest = tables.first_rule, tables.size, tables.children, tables.shortest
    row, ends, weights = chart.row, chart.ends, chart.weights
    out, out_touched, partial, partial_touched = chart.sums[0], chart.touched[0], chart.sums[1], chart.touched[1]
    length, used = tokens.shape[0], 0
    row[length] = 0
    for i in range(length - 1, -1, -1):
        if used == ends.shape[0]:
            return False
        ends[used], weights[used] = i + 1, scale
        for symbol in range(tables.lowest):
            row[i, symbol] = used
            used += tokens[i] == symbol  # 0 stands for what is not a terminal; no rule asks for it
        row[i, tables.lowest] = used
        for symbol in range(tables.lowest, tables.root + 1):
            n = 0
            if length - i >= shortest[symbol] and (i == 0 or symbol < tables.root):
                rules = (first_rule[symbol], first_rule[symbol + 1])
                n = _sum_rules(
                    rules,
                    i,
                    size,
                    children,
                    rule_weights,
                    row,
                    ends,
                    weights,
                    out,
                    out_touched,
                    partial,
                    partial_touched,
                )
            fits = used + n <= ends.shape[0]
            for k in range(n):
                end = out_touched[k]
                if fits:
                    ends[used + k], weights[used + k] = end, out[end]
                out[end] = 0.0
            if not fits:
                return False
            used += n
            row[i, symbol + 1] = used
    return True


@njit(cache=True)
def _fill_chart(tables, rule_weights, scale, tokens, chart):
    """Returns the chart, or a larger one where it was too small."""
    while not _inside(tables, rule_weights, scale, tokens, chart):
        chart = _new_chart(tables, chart.row.shape[0] - 1, 2 * chart.ends.shape[0])
    return chart


@njit(cache=True)
def _whole(tables, tokens, chart):
    """The root's weight over the whole string."""
    for k in range(chart.row[0, tables.root], chart.row[0, tables.root + 1]):
        if chart.ends[k] == tokens.shape[0]:
            return chart.weights[k]
    return 0.0


@njit(cache=True)
def _count_one(tables, ones, tokens, chart):
    chart = _fill_chart(tables, ones, 1.0, tokens, chart)
    return _whole(tables, tokens, chart), chart


@njit(cache=True, nogil=True)
def _count(tables, ones, tokens, starts, skip, counts):
    """Counts derivations of every string that is not skipped; returns the chart of the last."""
    longest = 0
    for n in range(counts.shape[0]):
        if not skip[n]:
            longest = max(longest, starts[n + 1] - starts[n])
    chart = _new_chart(tables, longest, 8 * longest + 64)
    for n in range(counts.shape[0]):
        if not skip[n]:
            counts[n], chart = _count_one(tables, ones, tokens[starts[n] : starts[n + 1]], chart)
    return chart


@njit(cache=True)
def _forward(tables, rule_weights, tokens, chart, forward):
    """Fills forward [T + 1, S]: entry (i, symbol) is the weight of the first i tokens with that symbol next."""
    row, ends, weights = chart.row, chart.ends, chart.weights
    forward[: tokens.shape[0] + 1] = 0.0
    forward[0, tables.root] = 1.0
    for i in range(tokens.shape[0] + 1):
        for symbol in range(tables.root, tables.lowest - 1, -1):
            if forward[i, symbol] == 0.0:
                continue
            for rule in range(tables.first_rule[symbol], tables.first_rule[symbol + 1]):
                first, second, third = tables.children[rule, 0], tables.children[rule, 1], tables.children[rule, 2]
                size, value = tables.size[rule], forward[i, symbol] * rule_weights[rule]
                forward[i, first] += value
                if size == 1:
                    continue
                for k in range(row[i, first], row[i, first + 1]):
                    end, value_2 = ends[k], value * weights[k]
                    forward[end, second] += value_2
                    if size == 2:
                        continue
                    for k_2 in range(row[end, second], row[end, second + 1]):
                        forward[ends[k_2], third] += value_2 * weights[k_2]


@njit(cache=True)
def _normalise(tables, tokens, chart, forward, rows):
    """Fills rows [T + 1, V + 1]; returns whether all of them are well within float64's range."""
    rows[:, 0] = 0.0
    for k in range(chart.row[0, tables.root], chart.row[0, tables.root + 1]):
        rows[chart.ends[k], 0] = chart.weights[k]
    sane = True
    for i in range(tokens.shape[0] + 1):
        total = rows[i, 0]
        for terminal in range(1, tables.terminals + 1):
            rows[i, terminal] = forward[i, terminal]
            total += forward[i, terminal]
        sane &= 1e-280 < total < 1e280
        for outcome in range(tables.terminals + 1):
            rows[i, outcome] /= total
    return sane


@njit(cache=True, nogil=True, error_model="numpy")
def _distributions(tables, uniform, ones, scale, tokens, starts, rows, whole):
    """Fills all strings' rows, one below the other. Returns the first string that fails or -1, and whether it is a sentence.

    Where strings are not whole: whether it is the beginning of one.
    """
    longest = 0
    for n in range(starts.shape[0] - 1):
        longest = max(longest, starts[n + 1] - starts[n])
    chart = _new_chart(tables, longest, 8 * longest + 64)
    forward = np.empty((longest + 1, tables.root + 1), dtype=np.float64)
    for n in range(starts.shape[0] - 1):
        string, attempt = tokens[starts[n] : starts[n + 1]], 0
        while True:
            power = (attempt + 1) // 2 * (1 if attempt % 2 else -1)  # 0, 1, -1, 2, -2, ...
            own_scale = scale * np.exp(600.0 * power / string.shape[0])
            chart = _fill_chart(tables, uniform, own_scale, string, chart)
            _forward(tables, uniform, string, chart, forward)
            own_rows = rows[starts[n] + n : starts[n + 1] + n + 1]
            possible = not whole or _whole(tables, string, chart) > 0.0
            if possible and _normalise(tables, string, chart, forward, own_rows):
                break
            if attempt == 0:  # is it too small a number, or nothing?
                parses, chart = _count_one(tables, ones, string, chart)
                if not whole:
                    _forward(tables, ones, string, chart, forward)
                    for symbol in range(1, tables.root):
                        parses += forward[string.shape[0], symbol]
                if parses == 0.0:
                    return n, False
            if attempt == 8:
                return n, True
            attempt += 1
    return -1, True
