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
def _draw_graph(stream, n, graph, candidates, children):
    """Fills graph [n, 1 + MAX_DEGREE]: number of parents, and the parents, of each node."""
    leaves = 1 + below(stream, (n - 1) // MAX_DEGREE + 1)
    open_nodes = 0
    for i in range(n):
        graph[i, 0] = 0
        if i >= leaves:
            wanted = 1 + below(stream, min(open_nodes, MAX_DEGREE))
            graph[i, 0] = wanted
            for j in range(wanted):  # the first steps of a Fisher-Yates shuffle
                pick = j + below(stream, open_nodes - j)
                candidates[j], candidates[pick] = candidates[pick], candidates[j]
                graph[i, 1 + j] = candidates[j]
                children[candidates[j]] += 1
            for j in range(wanted - 1, -1, -1):  # the last candidate takes the place of one that is full
                if children[candidates[j]] == MAX_DEGREE:
                    open_nodes -= 1
                    candidates[j] = candidates[open_nodes]
        children[i] = 0
        candidates[open_nodes] = i
        open_nodes += 1


@njit(cache=True)
def _peel(stream, query, graph, waiting, pool, order):
    """Writes the query and its ancestors to ``order``, parents first; returns where they start (they end with the array's n-th)."""
    for i in range(query + 1):
        waiting[i] = -1  # not an ancestor
    waiting[query] = 0
    for i in range(query, -1, -1):  # children have larger numbers
        if waiting[i] >= 0:
            for j in range(1, 1 + graph[i, 0]):
                parent = graph[i, j]
                waiting[parent] = max(waiting[parent], 0) + 1
    pool[0], size, start = query, 1, query + 1
    while size > 0:
        pick = below(stream, size) if size > 1 else 0
        node = pool[pick]
        size -= 1
        pool[pick] = pool[size]
        start -= 1
        order[start] = node
        for j in range(1, 1 + graph[node, 0]):
            parent = graph[node, j]
            waiting[parent] -= 1
            if waiting[parent] == 0:
                pool[size] = parent
                size += 1
    return start


@njit(cache=True)
def _name_nodes(params, stream, n, graph, names, words, sizes, table):
    """Gives node i the word number names[i]. Nodes that no edge mentions need none."""
    if not params.multi_token:
        # The first n steps of a Fisher-Yates shuffle of the ids 1..N.
        for i in range(params.n_max):
            words[i, 0] = i + 1
        for i in range(n):
            j = i + below(stream, params.n_max - i)
            words[i, 0], words[j, 0] = words[j, 0], words[i, 0]
            names[i], sizes[i] = i, 1
        return
    names[:n] = -1
    for i in range(n):
        for j in range(1, 1 + graph[i, 0]):
            names[graph[i, j]] = 0
            names[i] = 0
    # Late words are longer, because short ones run out; so which node gets which is shuffled (inside out).
    listed = table  # free until the words are drawn
    count = 0
    for i in range(n):
        if names[i] == 0:
            j = below(stream, count + 1)
            listed[count] = listed[j]
            listed[j] = i
            count += 1
    for i in range(count):
        names[listed[i]] = i
    _draw_words(params, stream, count, words, sizes, table)


@njit(cache=True)
def _put(words, sizes, which, tokens, at):
    for i in range(sizes[which]):
        tokens[at + i] = words[which, i]
    return at + sizes[which]


class _Scratch(NamedTuple):
    """Room for one example, allocated once."""

    graph: NDArray[np.int64]  # [N, 1 + MAX_DEGREE]
    names: NDArray[np.int64]  # [N]
    pool: NDArray[np.int64]  # [N], candidates, then nodes that may be peeled off
    children: NDArray[np.int64]  # [N], counts
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
        np.empty((n, 1 + MAX_DEGREE), dtype=np.int64),
        np.empty(n, dtype=np.int64),
        np.empty(n, dtype=np.int64),
        np.empty(n, dtype=np.int64),
        np.empty(n, dtype=np.int64),
        np.empty(n * MAX_DEGREE, dtype=np.int64),
        np.empty((n, params.longest), dtype=np.int64),
        np.empty(n, dtype=np.int64),
        np.empty(table_size, dtype=np.int64),
    )


@njit(cache=True)
def _draw_edges(stream, n, graph, edges):
    """Lists the edges as parent << SHIFT | child, in random order; returns their number."""
    count = 0
    for i in range(n):
        for j in range(1, 1 + graph[i, 0]):
            # An inside-out shuffle: the new edge takes a random place, whose holder moves to the end.
            new = below(stream, count + 1)
            edges[count] = edges[new]
            edges[new] = (graph[i, j] << SHIFT) | i
            count += 1
    return count


@njit(cache=True)
def _example(params, stream, scratch, tokens, mask, at):
    """Writes one example to tokens[at:] and mask[at:]; returns where it ends."""
    graph, names, words, sizes = scratch.graph, scratch.names, scratch.words, scratch.sizes
    edges, order = scratch.edges, scratch.order
    n = params.n_max
    if params.cumulative.shape[0] > 0:
        n = 3 + min(np.searchsorted(params.cumulative, uniform(stream), side="right"), params.n_max - 3)
    _draw_graph(stream, n, graph, scratch.pool, scratch.children)
    query = n - 1
    if params.last_quarter:
        query = 3 * n // 4 + below(stream, n - 3 * n // 4)
    _name_nodes(params, stream, n, graph, names, words, sizes, scratch.table)
    count = _draw_edges(stream, n, graph, edges)

    start = at
    tokens[at] = params.bos
    at += 1
    for e in range(count):
        at = _put(words, sizes, names[edges[e] >> SHIFT], tokens, at)
        at = _put(words, sizes, names[edges[e] & MAX_NODES], tokens, at)
    tokens[at] = params.query
    at = _put(words, sizes, names[query], tokens, at + 1)
    mask[start:at] = False
    start = at
    tokens[at] = params.ans
    at += 1
    for i in range(_peel(stream, query, graph, scratch.children, scratch.pool, order), query + 1):
        at = _put(words, sizes, names[order[i]], tokens, at)
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
    line_tokens = np.empty(length + max_length, dtype=np.int64)
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
