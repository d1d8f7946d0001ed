"""Lano: hierarchical structure. Sentences of a layered context-free grammar, one behind the other.  (Part 4.1, section 2 and appendix A.5)

A sentence is drawn from the root down, each symbol picking one of its rules uniformly (``cfg.py``); only its terminals are written:

    <bos> x1 x2 ... xT   <bos> x1 x2 ... xT'   ...                   the next <bos> ends a sentence

Worked example, the lowest two levels of cfg3k:

    10 -> 7 7 | 8 8 | 9 9 7 | 7 9 7        7 -> 3 3 | 1 3 1 | 2 1     8 -> 2 3 | 1 1 2 | 3 1 | 1 2 2     9 -> 1 3 3 | 2 2 | 1 1 1 | 3 2 3

    tokens   0 | 1 1 1 1 3 3 3 3            0 is <bos>
    parse    10( 9(1 1 1) 9(1 3 3) 7(3 3) )
    learnt   every token

To know what may come next, a model has to follow all parses of what came before, as a dynamic program does. There is no question and
no answer: a model is asked to write sentences from <bos> alone, at temperature 1, and the share of these that belong to the language
is its score. Since the grammar is known, so is the best possible next-token distribution, and how far a model is from it
(``next_token_distribution``, ``kl_divergence``).

Part 4.1 trains on cfg3f (250 tokens on average, window 512), cfg3j (544, window 1536) and cfg3k (516, window 1536), in order of
difficulty. Training and test are fresh sentences of one grammar. Where the paper and the release are silent:

    ``terminator``   the paper separates sentences by <bos>, and so does ``bos``: the token that ends a sentence is the first of the next
                     example. ``eos`` writes <bos> x <eos>
    ids              the release has terminals 1..V, V+1 (eos), V+2 (mask), V+3 (separator); <bos> is 0 here. The last two are never written
    stopping         a model that has not stopped after more tokens than 99.99 % of sentences have is cut off, which counts as wrong
    ``levels``       ours: the lowest levels of a grammar are a small grammar, for small machines
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from src.datamodules.tasks.base import Generation, Score, Split, Task, Windows, check_split
from src.datamodules.tasks.cfg import Grammar
from src.datamodules.tasks.cfg_inference import Inference, Span
from src.datamodules.tasks.rng import below, seed_stream, stream_key

BOS = 0
COVERED = 0.9999  # the share of sentences short enough to be written


@dataclass(frozen=True)
class Lano(Task):
    """Sentences of a layered grammar; see the head of this file.

    Wherever tokens are read, one <bos> in front and one <bos> or <eos> behind are allowed, and negative ids behind are padding.

    Args:
        grammar: a shipped grammar (cfg3b, 3e1, 3e2, 3f, 3g, 3h, 3i, 3j, 3k), or the path of a .json file with one. The rules of 3e1 and
            3e2 are of the published kind and sizes, but not the published ones, which are in the release alone.
        levels: use its lowest levels alone, rooted at the first symbol of the layer above them; None: all of it.
        terminator: what ends a sentence, the ``bos`` of the next one or an ``eos`` of its own.

    Raises:
        ValueError: for a grammar that does not exist or is not layered, and for levels that it does not have.
    """

    config_name = "lano"

    grammar: str = "cfg3f"
    levels: int | None = None
    terminator: Literal["bos", "eos"] = "bos"

    name: ClassVar[str] = "lano"

    def __post_init__(self) -> None:
        if self.terminator not in ("bos", "eos"):
            raise ValueError(f"Lano.terminator={self.terminator!r}: choose bos or eos")
        try:
            self.language  # noqa: B018 (reads the grammar)
        except ValueError as error:
            raise ValueError(f"Lano.{error}") from error

    # ---- vocabulary and laws -----------------------------------------------------------------------------------------

    @cached_property
    def language(self) -> Grammar:
        """The grammar itself."""
        grammar = Grammar.load(self.grammar)
        return grammar if self.levels is None else grammar.lowest(self.levels)

    @property
    def bos_id(self) -> int:
        """Id of <bos>."""
        return BOS

    @property
    def eos_id(self) -> int:
        """Id of <eos>, written only with ``terminator="eos"``."""
        return self.language.terminals + 1

    @property
    def stop_id(self) -> int:
        """Id of the token that ends a sentence."""
        return self.eos_id if self.terminator == "eos" else self.bos_id

    @property
    def vocab_size(self) -> int:
        """<bos>, V terminals, and three reserved ids."""
        return self.language.terminals + 4

    @property
    def _extra_tokens(self) -> int:
        return 1 + (self.terminator == "eos")

    @property
    def max_length(self) -> int:
        """Tokens in the longest possible example."""
        return self.language.max_length + self._extra_tokens

    @property
    def min_window(self) -> int:
        """Any window will do: every token is learnt, in a cut sentence too, and scoring writes its own sentences."""
        return 2

    @property
    def groups(self) -> tuple[str, ...]:
        """``valid``: sentences of the language."""
        return ("valid",)

    def chance(self, group: str) -> float:
        """0: random strings of this length are practically never sentences."""
        return 0.0

    def vocabulary(self) -> dict[str, Any]:
        """See ``Task.vocabulary``."""
        return {"terminals": self.language.terminals, "stop": self.stop_id}

    def fingerprint(self) -> dict[str, Any]:
        """See ``Task.fingerprint``; a file of rules may change under its name, so they are part of it."""
        return super().fingerprint() | {"rules": self._rules}

    def facts(self, seed: int) -> dict[str, Any]:
        """See ``Task.facts``: the grammar."""
        return {"data.task.grammar": self.grammar, "data.task.levels": self.levels, "rules": self._rules}

    @property
    def _rules(self) -> int:
        return zlib.crc32(str(self.language).encode())

    # ---- examples ----------------------------------------------------------------------------------------------------

    def example(self, seed: int, split: Split, index: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """See ``Task.example``."""
        check_split(split)
        tokens = np.empty(self.max_length, dtype=np.int64)
        size = _one(self.language.tables, self._written_eos, stream_key(self.name, seed, split), index, tokens)
        return tokens[:size].copy(), np.ones(size, dtype=np.bool_)

    def examples_per_window(self, split: Split, length: int) -> int:
        """See ``Task.examples_per_window``: as many as the shortest examples would take."""
        return -(-length // (self.language.min_length + self._extra_tokens))

    def windows(self, seed: int, split: Split, first: int, count: int, length: int) -> Windows:
        """See ``Task.windows``."""
        check_split(split)
        tokens = np.empty((count, length), dtype=np.int64)
        segments = np.empty((count, length), dtype=np.int32)
        per_window = self.examples_per_window(split, length)
        key = stream_key(self.name, seed, split)
        _fill(self.language.tables, self._written_eos, key, first, per_window, tokens, segments)
        return Windows(tokens, np.ones((count, length), dtype=np.bool_), segments)

    @property
    def _written_eos(self) -> int:
        return self.eos_id if self.terminator == "eos" else -1

    # ---- scoring -----------------------------------------------------------------------------------------------------

    @property
    def generation(self) -> Generation:
        """From <bos>, at temperature 1, until the terminator; as many tokens as 99.99 % of sentences need."""
        return Generation(self.stop_id, self.language.length_quantile(COVERED) + 1, temperature=1.0)

    def prompt_length(self, tokens: NDArray[np.int64]) -> int:
        """1: a model is given <bos>."""
        return 1

    def score(self, tokens: NDArray[np.int64], predictions: NDArray[np.int64]) -> Score:
        """Counts sentences of the language among those written, one a row behind its <bos>.

        Right is a row that reaches the terminator with a sentence in front of it; what follows is not looked at. A row that is full
        before the terminator counts if it is a sentence: otherwise a window may have cut it. One that ends in padding without a
        terminator was never finished, which is wrong. Rows of padding alone do not count.
        """
        finished, cut = [], []
        for row in predictions[(tokens >= 0).any(axis=1), 1:]:
            stops, padding = np.flatnonzero(row == self.stop_id), np.flatnonzero(row < 0)
            unfinished = not len(stops) and len(padding)
            finished.append(row[: stops[0]] if len(stops) else row[:0] if unfinished else row)
            cut.append(not len(stops) and not len(padding))
        valid = self._inference.memberships(finished)
        return Score({"valid": (int(valid.sum()), int((valid | ~np.array(cut, dtype=bool)).sum()))})

    # ---- exact questions ---------------------------------------------------------------------------------------------

    @cached_property
    def _inference(self) -> Inference:
        return Inference(self.language)

    def _bare(self, tokens: ArrayLike) -> NDArray[np.int64]:
        """Without padding, the <bos> in front and the terminator behind."""
        bare = np.asarray(tokens)
        if bare.ndim != 1:
            raise ValueError(
                f"tokens of shape {bare.shape}: one dimension; the methods with plural names take many strings"
            )
        bare = bare[: np.flatnonzero(bare >= 0).max(initial=-1) + 1]
        if len(bare) and bare[0] == self.bos_id:
            bare = bare[1:]
        if len(bare) and bare[-1] in (self.bos_id, self.eos_id):
            bare = bare[:-1]
        return bare

    def membership(self, tokens: ArrayLike) -> bool:
        """Whether a string is a sentence of the language."""
        return bool(self.memberships([tokens])[0])

    def memberships(self, strings: Sequence[ArrayLike] | NDArray[np.int64]) -> NDArray[np.bool_]:
        """``membership`` of many strings, in a sequence or in the rows of an array padded with negative ids."""
        return self._inference.memberships([self._bare(tokens) for tokens in strings])

    def num_parses(self, tokens: ArrayLike) -> int:
        """How many derivation trees a string has; 0 when it is not a sentence."""
        return self.parse_counts([tokens])[0]

    def parse_counts(self, strings: Sequence[ArrayLike] | NDArray[np.int64]) -> list[int]:
        """``num_parses`` of many strings."""
        return self._inference.num_parses([self._bare(tokens) for tokens in strings])

    def next_token_distribution(self, tokens: ArrayLike) -> NDArray[np.float64]:
        """The true distribution of the next token after 0, 1, .., T tokens of a sentence, ``[T + 1, V + 1]``.

        Column 0 is the end of the sentence, column t terminal t.

        Raises:
            ValueError: when ``tokens`` is not a sentence of the language.
        """
        return self.next_token_distributions([tokens])[0]

    def next_token_distributions(
        self, strings: Sequence[ArrayLike] | NDArray[np.int64], whole: bool = True
    ) -> list[NDArray[np.float64]]:
        """``next_token_distribution`` of many sentences, or, if they are not ``whole``, of the beginnings of sentences.

        Raises:
            ValueError: when one is not a sentence of the language, or not the beginning of one.
        """
        return self._inference.next_token_distributions([self._bare(tokens) for tokens in strings], whole)

    def parse(self, tokens: ArrayLike) -> list[list[Span]]:
        """One derivation tree, root first: the (symbol, first position, last position) of every layer; see ``Inference.parse``."""
        return self._inference.parse(self._bare(tokens))

    # ---- in words ----------------------------------------------------------------------------------------------------

    def describe(self, tokens: NDArray[np.int64]) -> str:
        """Length, parses, and the upper layers of the tree, with the positions that each symbol spans."""
        bare = self._bare(tokens)
        shown = " ".join(map(str, bare[:40].tolist())) + (" ..." if len(bare) > 40 else "")
        parses = self.num_parses(bare)
        if not parses:
            return f"{self.language.name}: {len(bare)} tokens, not a sentence\ntokens   {shown}"
        lines = [
            f"{self.language.name}: a sentence of {len(bare)} tokens with {parses} parse{'s' if parses > 1 else ''}"
        ]
        for depth, layer in enumerate(self.parse(bare)[:-1]):
            if len(layer) > 20:
                break
            lines.append(f"layer {depth}  " + "  ".join(f"{symbol}[{start}:{end}]" for symbol, start, end in layer))
        return "\n".join([*lines, f"tokens   {shown}"])


# ---- comparing with a model ------------------------------------------------------------------------------------------


def kl_divergence(exact: NDArray[np.float64], model: NDArray[np.float64], eps: float = 1e-5) -> float:
    """Mean over rows of sum_j D_j (ln D'_j - ln Q'_j) in nats, with ' for adding eps and normalising (the release's formula).

    Args:
        exact: D, from ``next_token_distribution``, ``[T + 1, V + 1]``.
        model: Q, a model's probabilities of the same outcomes. What it gives to others is not part of the comparison: rows may sum to less
            than one.
        eps: keeps the logarithm of an impossible outcome finite.
    """
    exact, model = np.asarray(exact, dtype=np.float64), np.asarray(model, dtype=np.float64)
    if exact.ndim != 2 or exact.shape != model.shape:
        raise ValueError(f"distributions of shapes {exact.shape} and {model.shape}: both [T + 1, V + 1]")

    def log_smoothed(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.log((rows + eps) / (rows + eps).sum(axis=1, keepdims=True))

    return float((exact * (log_smoothed(exact) - log_smoothed(model))).sum(axis=1).mean())


def entropy(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Entropy of every row in nats, ``[.., n] -> [..]``.

    Its mean over all targets, of all sentences alike, is the loss that a perfect model is expected to have.
    """
    return -np.sum(rows * np.log(np.where(rows > 0, rows, 1.0)), axis=-1)


# ---- compiled -------------------------------------------------------------------------------------------------------


@njit(cache=True)
def _example(tables, stream, waiting, eos, tokens, at):
    """Writes an example from position ``at`` on, cut at the end of tokens; returns the next free position."""
    first_rule, size, children, stacked = tables.first_rule, tables.size, tables.children, tables.stacked
    end = tokens.shape[0]
    tokens[at] = BOS
    at += 1
    waiting[0] = tables.root  # symbols still to be written, the next one last
    n = 1
    while n > 0 and at < end:
        n -= 1
        symbol = waiting[n]
        rule = first_rule[symbol] + below(stream, first_rule[symbol + 1] - first_rule[symbol])
        # All three children are copied whatever the rule's size, which would be a branch that no processor predicts.
        if symbol >= tables.upper:
            waiting[n], waiting[n + 1], waiting[n + 2] = stacked[rule, 0], stacked[rule, 1], stacked[rule, 2]
            n += size[rule]
        elif at + 3 <= end:
            tokens[at], tokens[at + 1], tokens[at + 2] = children[rule, 0], children[rule, 1], children[rule, 2]
            at += size[rule]
        else:
            for child in range(min(size[rule], end - at)):
                tokens[at] = children[rule, child]
                at += 1
    if eos >= 0 and at < end:
        tokens[at] = eos
        at += 1
    return at


@njit(cache=True)
def _one(tables, eos, key, index, tokens):
    stream, waiting = np.empty(2, dtype=np.uint64), np.empty(tables.deepest, dtype=np.int64)
    seed_stream(stream, key, index)
    return _example(tables, stream, waiting, eos, tokens, 0)


@njit(cache=True, nogil=True)
def _fill(tables, eos, key, first, per_window, tokens, segments):
    """Fills windows ``first ...``; window w packs examples w * per_window and following. Nothing is drawn behind a window's end."""
    stream, waiting = np.empty(2, dtype=np.uint64), np.empty(tables.deepest, dtype=np.int64)
    for row in range(tokens.shape[0]):
        start, number = 0, 0
        while start < tokens.shape[1]:
            seed_stream(stream, key, (first + row) * per_window + number)
            end = _example(tables, stream, waiting, eos, tokens[row], start)
            segments[row, start:end] = number
            start = end
            number += 1
