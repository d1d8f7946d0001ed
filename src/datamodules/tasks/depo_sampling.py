"""The compiled generator of Depo. ``depo.py`` says what it is all for.

Words vary in length, and candidates are kept or not: branching on such coin tosses would cost more than all the rest.
So a word is written with its whole row, and what comes next overwrites the surplus; a candidate is stored behind the
words found so far, and kept by counting it. Nothing is cleared between examples: marks carry the number of the
example that left them. Unsigned positions spare numba's check for negative ones.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from src.datamodules.tasks.rng import below, below_pair, next_word, seed_stream, uniform

MAX_LEXICON = 2**16  # words; more than that are not tabulated

_ONE, _TWO, _32, _LOW = (np.uint64(n) for n in (1, 2, 32, 2**32 - 1))


class Params(NamedTuple):
    """A ``Depo`` task as the compiled generator knows it; names as there."""

    n_max: int
    cumulative: NDArray[np.float64]  # P(n <= 3 + i) in training; empty: n = n_max
    hops: NDArray[np.int64]
    inner: int  # V
    shortest: int
    longest: int
    questions: int
    separator: int  # its id, or -1
    bos: int
    query: int  # id of <query_k> is query + k
    ans: int
    counts: NDArray[np.uint64]  # how many words there are of each length, shortest first
    offsets: NDArray[np.uint64]  # and how many that are shorter
    uneven: NDArray[np.uint64]  # 2^32 modulo counts
    stride: int  # tokens in a row of the lexicon: even, at least ``longest``
    lexicon: NDArray[np.int64]  # all words, a row each, zeros behind; empty if they are too many
    sizes: NDArray[np.uint8]  # tokens in each word


class _Scratch(NamedTuple):
    """Room for the words of one example."""

    lexicon: NDArray[np.int64]  # of all words, or of this example's own
    sizes: NDArray[np.uint8]
    words: NDArray[np.uint32]  # rows of the lexicon, as they were drawn
    cycle: NDArray[np.uint32]  # the same, as they follow each other
    order: NDArray[np.uint32]  # of the edges
    drawn_by: NDArray[np.int32]  # which example last drew this word, or took this slot of ``codes``
    codes: NDArray[np.int64]


@njit(cache=True)
def _make_scratch(params):
    tabulated = params.sizes.shape[0] > 0
    rows = 0 if tabulated else params.n_max
    slots = 16
    while slots < 4 * rows:
        slots *= 2
    return _Scratch(
        lexicon=params.lexicon if tabulated else np.zeros(rows * params.stride, dtype=np.int64),
        sizes=params.sizes if tabulated else np.zeros(rows, dtype=np.uint8),
        words=np.zeros(params.n_max + 1, dtype=np.uint32),
        cycle=np.zeros(params.n_max + 1, dtype=np.uint32),
        order=np.zeros(params.n_max, dtype=np.uint32),
        drawn_by=np.full(params.sizes.shape[0] if tabulated else slots, -1, dtype=np.int32),
        codes=np.zeros(slots, dtype=np.int64),
    )


@njit(cache=True)
def _choose_words(params, stream, scratch, number, n):
    """Sets words[:n] to distinct rows of a lexicon of all words, by rejection: a length, then a word of that length."""
    words, drawn_by = scratch.words, scratch.drawn_by
    lengths = np.uint64(params.counts.shape[0])
    lengths_uneven = (_ONE << _32) % lengths
    found = 0
    while found < n:
        bits = next_word(stream)
        length = (bits >> _32) * lengths
        if (length & _LOW) < lengths_uneven:  # this and the next test keep the law exact, as in rng.below
            continue
        count, uneven = params.counts[length >> _32], params.uneven[length >> _32]
        which = (bits & _LOW) * count
        while (which & _LOW) < uneven:
            which = (next_word(stream) & _LOW) * count
        row = params.offsets[length >> _32] + (which >> _32)
        words[found] = row
        found += drawn_by[row] != number
        drawn_by[row] = number


@njit(cache=True)
def _compose_words(params, stream, scratch, number, n):
    """Fills a lexicon of n distinct words, by rejection, and sets words[:n] to its rows: for when all words are too many."""
    lexicon, drawn_by, codes = scratch.lexicon, scratch.drawn_by, scratch.codes
    last_slot = codes.shape[0] - 1
    found = 0
    while found < n:
        size = params.shortest + below(stream, params.longest - params.shortest + 1)
        code = np.int64(0)
        for i in range(size):
            token = 1 + below(stream, params.inner)
            lexicon[found * params.stride + i] = token
            code = code * (params.inner + 1) + token
        # Open addressing; what earlier examples left counts as empty.
        slot = np.int64((np.uint64(code) * np.uint64(0x9E3779B97F4A7C15)) >> _32) & last_slot
        while drawn_by[slot] == number and codes[slot] != code:
            slot = (slot + 1) & last_slot
        if drawn_by[slot] != number:
            drawn_by[slot], codes[slot] = number, code
            lexicon[found * params.stride + size - 1] += params.inner
            scratch.sizes[found], scratch.words[found] = size, found
            found += 1


@njit(cache=True)
def _put_word(params, scratch, word, tokens, at):
    """Writes a word and the rest of its row; returns the position behind the word."""
    source, target = np.uint64(word) * np.uint64(params.stride), np.uint64(at)
    end = source + np.uint64(params.stride)
    while source < end:  # strides are even
        tokens[target] = scratch.lexicon[source]
        tokens[target + _ONE] = scratch.lexicon[source + _ONE]
        source += _TWO
        target += _TWO
    return at + scratch.sizes[word]


@njit(cache=True)
def _example(params, stream, scratch, number, tokens, mask, at, end):
    """Writes an example to tokens[at:] and mask[at:], which must be False; returns the position behind it.

    Stops once ``end`` is reached. The caller leaves some spare room behind ``end``, or behind the longest example, to scribble on.
    """
    n, words, cycle, order = params.n_max, scratch.words, scratch.cycle, scratch.order
    if params.cumulative.shape[0] > 0:
        n = 3 + min(np.searchsorted(params.cumulative, uniform(stream), side="right"), params.n_max - 3)
    if params.sizes.shape[0] > 0:
        _choose_words(params, stream, scratch, number, n)
    else:
        _compose_words(params, stream, scratch, number, n)
    # The words in random order, cycle[i] to be followed by cycle[i + 1], and a random order of edges: two shuffles at once.
    for i in range(n):
        j, k = below_pair(stream, i + 1, i + 1)
        cycle[i], cycle[j] = cycle[j], words[i]
        order[i], order[k] = order[k], i
    cycle[n] = cycle[0]

    tokens[at] = params.bos
    at += 1
    for i in order[:n]:
        if params.separator >= 0:
            tokens[at] = params.separator
            at += 1
        at = _put_word(params, scratch, cycle[i], tokens, at)
        at = _put_word(params, scratch, cycle[i + 1], tokens, at)
        if at >= end:
            return at

    for asked in range(min(n, params.questions)):
        # One step of a Fisher-Yates shuffle draws the next word not asked about so far.
        ahead, hop = below_pair(stream, n - asked, params.hops.shape[0])
        i, k = order[asked + ahead], params.hops[hop]
        order[asked + ahead] = order[asked]
        tokens[at] = params.query + k
        answer = _put_word(params, scratch, cycle[i], tokens, at + 1)
        tokens[answer] = params.ans
        at = _put_word(params, scratch, cycle[(i + k) % n], tokens, answer + 1)
        mask[answer : answer + 1 + params.stride] = True
        mask[at : at + params.stride] = False
        if at >= end:
            return at
    return at


@njit(cache=True)
def write_example(params, key, index, tokens, mask):
    """Writes example ``index`` to the front of tokens and mask; returns its length."""
    stream = np.empty(2, dtype=np.uint64)
    seed_stream(stream, key, index)
    return _example(params, stream, _make_scratch(params), 0, tokens, mask, 0, tokens.shape[0])


@njit(cache=True, nogil=True)
def fill(params, key, first, per_window, length, tokens, mask, segments):
    """Fills windows ``first ...``, laid end to end; window w packs examples w * per_window and following.

    What runs over the end of a window is overwritten by the next one.
    """
    stream, scratch = np.empty(2, dtype=np.uint64), _make_scratch(params)
    drawn = 0
    for start in range(0, segments.shape[0], length):
        at, end, number = start, start + length, 0
        index = (first + start // length) * per_window
        mask[start:end] = False
        while at < end:
            seed_stream(stream, key, index + number)
            behind = _example(params, stream, scratch, drawn, tokens, mask, at, end)
            segments[at : min(behind, end)] = number
            at, number, drawn = behind, number + 1, drawn + 1


@njit(cache=True, nogil=True)
def score_answers(tokens, predictions, query, ans, inner, right, total):
    """Walks every window; an answer runs from behind <ans> to the first word-ending token."""
    for row in range(tokens.shape[0]):
        k = -1
        t = 0
        while t < tokens.shape[1]:
            token = tokens[row, t]
            t += 1
            if query < token < ans:
                k = token - query
            elif token == ans and k > 0:
                correct = True
                while t < tokens.shape[1]:
                    correct &= predictions[row, t] == tokens[row, t]
                    t += 1
                    if tokens[row, t - 1] > inner:
                        right[k] += correct
                        total[k] += 1
                        break
                k = -1
