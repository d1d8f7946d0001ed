"""The compiled generator of Brevo: a random graph, its nodes' names, and the order of the answer. ``brevo.py`` says what it is all for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from src.datamodules.tasks.rng import below, seed_stream, uniform

MAX_DEGREE = 4  # parents, and children
SHIFT = 20  # an edge in one number: parent << SHIFT | child
MAX_NODES = (1 << SHIFT) - 1


class Params(NamedTuple):
    """A ``Brevo`` task as the compiled generator knows it; names as there."""

    n_max: int
    cumulative: NDArray[np.float64]  # P(n <= 3 + i) in training; empty: n = n_max
    multi_token: bool
    inner: int  # V
    shortest: int
    longest: int
    last_quarter: bool
    bos: int
    query: int
    ans: int
    eos: int


@njit(cache=True)
def _draw_words(params, stream, count, words, sizes, table):
    """Fills words [., longest] and sizes with ``count`` distinct words, by rejection. ``table`` is open addressing, of word codes."""
    if count > 0:
        table[:] = -1
    wrap = np.int64(table.shape[0] - 1)
    found = 0
    while found < count:
        size = params.shortest + below(stream, params.longest - params.shortest + 1)
        code = np.int64(0)
        for i in range(size):
            token = 1 + below(stream, params.inner)
            words[found, i] = token
            code = code * (params.inner + 1) + token
        slot = np.int64((np.uint64(code) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(33)) & wrap
        while table[slot] != -1 and table[slot] != code:
            slot = (slot + 1) & wrap
        if table[slot] == -1:
            table[slot] = code
            words[found, size - 1] += params.inner
            sizes[found] = size
            found += 1


@njit(cache=True)
def _draw_graph(stream, n, parents, counts, candidates, children):
    """Fills counts [n], numbers of parents, and parents [n, MAX_DEGREE], filled up with a node that does not exist."""
    nobody = children.shape[0] - 1
    leaves = 1 + below(stream, (n - 1) // MAX_DEGREE + 1)
    open_nodes = 0
    for i in range(n):
        for j in range(MAX_DEGREE):
            parents[i, j] = nobody
        counts[i] = 0
        if i >= leaves:
            wanted = 1 + below(stream, min(open_nodes, MAX_DEGREE))
            counts[i] = wanted
            for j in range(wanted):  # the first steps of a Fisher-Yates shuffle
                pick = j + below(stream, open_nodes - j)
                candidates[j], candidates[pick] = candidates[pick], candidates[j]
                parents[i, j] = candidates[j]
                children[candidates[j]] += 1
            for j in range(wanted - 1, -1, -1):  # the last candidate takes the place of one that is full
                if children[candidates[j]] == MAX_DEGREE:
                    open_nodes -= 1
                    candidates[j] = candidates[open_nodes]
        children[i] = 0
        candidates[open_nodes] = i
        open_nodes += 1


@njit(cache=True)
def _draw_edges(stream, n, parents, counts, edges):
    """Lists the edges as parent << SHIFT | child, in random order; returns their number."""
    count = 0
    for i in range(n):
        for j in range(counts[i]):
            # An inside-out shuffle: the new edge takes a random place, whose holder moves to the end.
            new = below(stream, count + 1)
            edges[count] = edges[new]
            edges[new] = (parents[i, j] << SHIFT) | i
            count += 1
    return count


@njit(cache=True)
def _peel(stream, query, parents, waiting, pool, order):
    """Writes the query and its ancestors to ``order``, parents first; returns where they start (they end with entry ``query``).

    Without branches on what is random: it would cost more than the work it saves. The node that does not exist waits for ever.
    """
    waiting[:] = 0  # for how many children in the answer
    for i in range(query, -1, -1):  # children have larger numbers
        needed = (waiting[i] > 0) | (i == query)
        for j in range(MAX_DEGREE):
            waiting[parents[i, j]] += needed
    waiting[waiting.shape[0] - 1] = waiting.shape[0] * MAX_DEGREE
    pool[0], size, start = query, 1, query + 1
    while size > 0:
        pick = below(stream, size)
        node = pool[pick]
        size -= 1
        pool[pick] = pool[size]
        start -= 1
        order[start] = node
        for j in range(MAX_DEGREE):
            parent = parents[node, j]
            waiting[parent] -= 1
            pool[size] = parent
            size += waiting[parent] == 0
    return start


@njit(cache=True)
def _name_nodes(params, stream, n, parents, counts, names, listed):
    """Gives node i the name names[i]: a token, or the number of a word. Returns how many words there are to be.

    Nodes that no edge mentions get no word.
    """
    if not params.multi_token:
        # The first n steps of a Fisher-Yates shuffle of the ids 1..N.
        for i in range(params.n_max):
            names[i] = i + 1
        for i in range(n):
            j = i + below(stream, params.n_max - i)
            names[i], names[j] = names[j], names[i]
        return 0
    names[:n] = -1
    for i in range(n):
        for j in range(counts[i]):
            names[parents[i, j]] = 0
            names[i] = 0
    # Late words are longer, because short ones run out; so which node gets which is shuffled (inside out).
    count = 0
    for i in range(n):
        if names[i] == 0:
            j = below(stream, count + 1)
            listed[count] = listed[j]
            listed[j] = i
            count += 1
    for i in range(count):
        names[listed[i]] = i
    return count


class _Scratch(NamedTuple):
    """Room for one example, allocated once."""

    parents: NDArray[np.int64]  # [N, MAX_DEGREE]
    counts: NDArray[np.int64]  # [N], of parents
    names: NDArray[np.int64]  # [N]
    pool: NDArray[np.int64]  # [N + MAX_DEGREE], candidates, then nodes that may be peeled off
    children: NDArray[np.int64]  # [N + 1], counts; the last is of the node that does not exist
    order: NDArray[np.int64]  # [N]
    edges: NDArray[np.int64]  # [N * MAX_DEGREE]
    words: NDArray[np.int64]  # [N, longest]
    sizes: NDArray[np.int64]  # [N], tokens in words
    table: NDArray[np.int64]  # hash table of words


@njit(cache=True)
def _scratch(params):
    n, table_size = params.n_max, 16
    while table_size < 4 * n:
        table_size *= 2
    return _Scratch(
        np.empty((n, MAX_DEGREE), dtype=np.int64),
        np.empty(n, dtype=np.int64),
        np.empty(n, dtype=np.int64),
        np.empty(n + MAX_DEGREE, dtype=np.int64),
        np.zeros(n + 1, dtype=np.int64),
        np.empty(n, dtype=np.int64),
        np.empty(n * MAX_DEGREE, dtype=np.int64),
        np.empty((n, params.longest), dtype=np.int64),
        np.empty(n, dtype=np.int64),
        np.empty(table_size, dtype=np.int64),
    )


@njit(cache=True)
def _put(params, words, sizes, name, tokens, at):
    """Writes a node, a word with its whole row: what comes next overwrites the surplus. Returns the position behind the node."""
    if not params.multi_token:
        tokens[at] = name
        return at + 1
    for i in range(params.longest):
        tokens[at + i] = words[name, i]
    return at + sizes[name]


@njit(cache=True)
def _example(params, stream, scratch, tokens, mask, at):
    """Writes one example to tokens[at:] and mask[at:]; returns where it ends. Some room behind it is scribbled on."""
    parents, counts, names, words, sizes = scratch.parents, scratch.counts, scratch.names, scratch.words, scratch.sizes
    edges, order = scratch.edges, scratch.order
    n = params.n_max
    if params.cumulative.shape[0] > 0:
        n = 3 + min(np.searchsorted(params.cumulative, uniform(stream), side="right"), params.n_max - 3)
    _draw_graph(stream, n, parents, counts, scratch.pool, scratch.children)
    query = n - 1
    if params.last_quarter:
        query = 3 * n // 4 + below(stream, n - 3 * n // 4)
    num_words = _name_nodes(params, stream, n, parents, counts, names, order)
    _draw_words(params, stream, num_words, words, sizes, scratch.table)
    count = _draw_edges(stream, n, parents, counts, edges)

    start = at
    tokens[at] = params.bos
    at += 1
    for edge in edges[:count]:
        at = _put(params, words, sizes, names[edge >> SHIFT], tokens, at)
        at = _put(params, words, sizes, names[edge & MAX_NODES], tokens, at)
    tokens[at] = params.query
    at = _put(params, words, sizes, names[query], tokens, at + 1)
    mask[start:at] = False
    start = at
    tokens[at] = params.ans
    at += 1
    first = _peel(stream, query, parents, scratch.children, scratch.pool, order)
    for node in order[first : query + 1]:
        at = _put(params, words, sizes, names[node], tokens, at)
    tokens[at] = params.eos
    mask[start : at + 1] = True
    return at + 1


@njit(cache=True)
def write_example(params, key, index, tokens, mask):
    """Writes example ``index`` to the front of tokens and mask; returns its length."""
    stream = np.empty(2, dtype=np.uint64)
    seed_stream(stream, key, index)
    return _example(params, stream, _scratch(params), tokens, mask, 0)


@njit(cache=True, nogil=True)
def fill(params, key, first, per_window, max_length, tokens, mask, segments):
    """Fills windows ``first ...``; window w packs examples w * per_window and following."""
    stream = np.empty(2, dtype=np.uint64)
    scratch = _scratch(params)
    length = tokens.shape[1]
    # Examples are written to a line that is longer than the window, and cut there.
    line_tokens = np.empty(length + max_length + params.longest, dtype=np.int64)
    line_mask = np.empty(length + max_length, dtype=np.bool_)
    for row in range(tokens.shape[0]):
        at, number = 0, 0
        while at < length:
            seed_stream(stream, key, (first + row) * per_window + number)
            end = _example(params, stream, scratch, line_tokens, line_mask, at)
            segments[row, at:end] = number
            at, number = end, number + 1
        tokens[row] = line_tokens[:length]
        mask[row] = line_mask[:length]
