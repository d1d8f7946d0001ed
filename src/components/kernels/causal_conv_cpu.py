"""`causal_conv` on the CPU: one pass over memory forward, one backward, compiled by Numba.

Legend: `B` batch, `T` time, `C` channels, `K` taps. Tensors are flattened to rows of C channels, row = b * T + t, and
taps are numbered by distance: tap d multiplies the token d steps back. Both directions are the same sweep over rows,

    forward    y[t]  = bias + sum_d w_d * x[t - d]         (+ x[t], folded into w_0)
    backward   dx[t] =        sum_d w_d * g[t + d]         and    dw_d = sum_t x[t] * g[t + d]

with terms that cross a document or sequence boundary left out. Rows are swept in pieces of `_PIECE` elements, so small
that all a piece touches stays in the first-level cache; narrow rows are joined until they fill one piece.

The rows are cut into tiles by the shape alone and each tile sums its own weight gradient, so the result has the same
bits on any number of threads. Large tensors share their tiles out to Python threads (the kernels release the GIL).
Numba's own parallel back ends are avoided: a process forked from one that has used them may be killed or deadlock.
"""

import functools
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_PIECE = 512
_TILE = 1 << 16  # elements
_MAX_TILES = 256  # bounds the memory of the partial weight gradients
_SERIAL_BELOW = 1 << 20  # elements; waking a sleeping thread costs about as much as sweeping this many


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Contraction to fused multiply-adds is the only liberty taken: no reordering, and nan and inf stay what they are.
    options: dict[str, Any] = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither this folder nor the user's cache folder can be written: compile in every process
        return numba.njit(**options)(function)


@_compiled
def _copy(out, at, a, i, n):
    """out[at:at+n] = a[i:i+n]."""
    target, values = out[at : at + n], a[i : i + n]
    for k in range(n):
        target[k] = values[k]


@_compiled
def _add(out, at, a, i, n):
    """out[at:at+n] += a[i:i+n]."""
    total, values = out[at : at + n], a[i : i + n]
    for k in range(n):
        total[k] += values[k]


@_compiled
def _multiply_add(out, at, a, i, b, j, n):
    """out[at:at+n] += a[i:i+n] * b[j:j+n]."""
    total, left, right = out[at : at + n], a[i : i + n], b[j : j + n]
    for k in range(n):
        total[k] += left[k] * right[k]


@_compiled
def _four_taps(out, source, table, at, column, n, step, width):
    """A piece of `out` for K = 4, every tap within reach; `table` holds w_0 ... w_3 and the bias, `width` apart."""
    w0, w1 = table[column : column + n], table[width + column : width + column + n]
    w2, w3 = table[2 * width + column : 2 * width + column + n], table[3 * width + column : 3 * width + column + n]
    bias, total = table[4 * width + column : 4 * width + column + n], out[at : at + n]
    s0, s1 = source[at : at + n], source[at + step : at + step + n]
    s2, s3 = source[at + 2 * step : at + 2 * step + n], source[at + 3 * step : at + 3 * step + n]
    for k in range(n):
        total[k] = bias[k] + w0[k] * s0[k] + w1[k] * s1[k] + w2[k] * s2[k] + w3[k] * s3[k]


@_compiled
def _four_products(sums, x, grad, at, column, n, step, width):
    """What the same piece adds to dw_0 ... dw_3, laid out in `sums` as the taps are in `table`."""
    d0, d1 = sums[column : column + n], sums[width + column : width + column + n]
    d2, d3 = sums[2 * width + column : 2 * width + column + n], sums[3 * width + column : 3 * width + column + n]
    here = x[at : at + n]
    g0, g1 = grad[at : at + n], grad[at + step : at + step + n]
    g2, g3 = grad[at + 2 * step : at + 2 * step + n], grad[at + 3 * step : at + 3 * step + n]
    for k in range(n):
        d0[k] += here[k] * g0[k]
        d1[k] += here[k] * g1[k]
        d2[k] += here[k] * g2[k]
        d3[k] += here[k] * g3[k]


@_compiled
def _linked(segments, row, time, distance, length):
    """Whether the token `distance` steps from `row`, which is at time step `time`, exists and shares its document."""
    if time + distance < 0 or time + distance >= length:
        return False
    return segments.size == 0 or (segments[row] >= 0 and segments[row + distance] == segments[row])


@_compiled
def _free_rows(segments, row, limit, length, taps, direction):
    """How many rows from `row` on, at most `limit`, have all their taps within reach."""
    time = row % length
    if direction < 0 and time < taps - 1:
        return 0
    end = length - time if direction < 0 else length - time - (taps - 1)
    limit = max(0, min(limit, end))
    if segments.size == 0:
        return limit
    for count in range(limit):
        for d in range(taps):
            if not _linked(segments, row + count, time + count, direction * d, length):
                return count
    return limit


@_compiled
def _sweep(out, source, table, x, sums, segments, first, last, length, channels, taps, direction):
    """Compute rows `first` to `last` of `out` and, unless `sums` is empty, fill it with their weight gradients.

    `table` and `sums` hold a line for each tap, by distance, and one for the bias (`sums` may do without); a line is
    as wide as the rows that are swept at once.
    """
    width = table.size // (taps + 1)
    step = direction * channels
    for k in range(sums.size):
        sums[k] = 0.0
    row = first
    while row < last:
        free = _free_rows(segments, row, min(width // channels, last - row), length, taps, direction)
        rows = max(1, free)  # a row with taps out of reach goes alone
        for column in range(0, rows * channels, _PIECE):
            n = min(_PIECE, rows * channels - column)
            at = row * channels + column
            if free and taps == 4:
                _four_taps(out, source, table, at, column, n, step, width)
                if sums.size:
                    _four_products(sums, x, source, at, column, n, step, width)
            else:
                _copy(out, at, table, taps * width + column, n)
                for d in range(taps):
                    if free or _linked(segments, row, row % length, direction * d, length):
                        _multiply_add(out, at, table, d * width + column, source, at + d * step, n)
                        if sums.size:
                            _multiply_add(sums, d * width + column, x, at, source, at + d * step, n)
            if sums.size > taps * width:
                _add(sums, taps * width + column, source, at, n)
        row += rows


@_compiled
def _sweep_tiles(out, source, table, x, sums, segments, begin, end, tile_rows, rows, length, channels, taps, direction):
    """Sweep tiles `begin` to `end`; tile i leaves its weight gradients in sums[i]."""
    for tile in range(begin, end):
        first = tile * tile_rows
        last = min(first + tile_rows, rows)
        _sweep(out, source, table, x, sums[tile], segments, first, last, length, channels, taps, direction)


@_compiled
def _fill_table(table, weight, bias, residual, channels, taps):
    """Lay out weight [C * K] and bias [C] (or nothing) as `_sweep` wants them: by distance, once per joined row."""
    joined = table.size // (taps + 1) // channels
    for line in range(taps + 1):
        for c in range(channels):
            if line == taps:
                value = bias[c] if bias.size else 0.0
            else:
                value = weight[c * taps + taps - 1 - line] + (1.0 if residual and line == 0 else 0.0)
            for j in range(joined):
                table[(line * joined + j) * channels + c] = value


@_compiled
def _collect(sums, dweight, dbias, channels, taps):
    """Add up the tiles of `sums`, in order, then the joined rows, into dweight [C * K] and dbias [C] (or nothing)."""
    tiles, width = sums.shape
    total = sums[0]
    for tile in range(1, tiles):
        part = sums[tile]
        for k in range(width):
            total[k] += part[k]
    lines = taps + 1 if dbias.size else taps
    joined = width // lines // channels
    for line in range(lines):
        for c in range(channels):
            value = total[line * joined * channels + c]
            for j in range(1, joined):
                value += total[(line * joined + j) * channels + c]
            if line == taps:
                dbias[c] = value
            else:
                dweight[c * taps + taps - 1 - line] = value


class _Tiling(NamedTuple):
    """How the rows of [B, T, C] are joined and cut; a function of the shape only."""

    length: int  # T
    channels: int  # C
    rows: int  # B * T
    joined: int  # narrow rows swept as one piece
    tile_rows: int
    tiles: int


def _tiling(x: Tensor) -> _Tiling:
    batch, length, channels = x.shape
    rows = batch * length
    tile_rows = max(-(-_TILE // channels), -(-rows // _MAX_TILES))
    return _Tiling(length, channels, rows, max(1, _PIECE // channels), tile_rows, -(-rows // tile_rows))


def _flat(tensor: Tensor | None, like: Tensor) -> np.ndarray:
    """The tensor as one line, not copied if contiguous; None becomes an empty line."""
    return (like.new_empty(0) if tensor is None else tensor.detach()).numpy().reshape(-1)


def _table(weight: Tensor, bias: Tensor | None, residual: bool, tiling: _Tiling) -> Tensor:
    channels, taps = weight.shape
    # Scratch comes from torch because it aligns memory to 64 bytes; the sweeps are a third slower on NumPy's 16.
    table = weight.new_empty((taps + 1) * tiling.joined * channels)
    # Copies: FSDP2 frees and refills the storage of its parameters, and a storage that NumPy has seen can never be resized.
    own_weight, own_bias = weight.detach().clone(), None if bias is None else bias.detach().clone()
    _fill_table(table.numpy(), _flat(own_weight, weight), _flat(own_bias, weight), residual, channels, taps)
    return table


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, segments: Tensor | None) -> Tensor:
    """conv(x) + bias (+ x), contiguous `[B, T, C]`, of a non-empty x `[B, T, C]`, weight `[C, K]` and bias `[C]`.

    Tensors are plain, on the CPU and of one dtype, float32 or float64; segments are `[B, T]` ids of any integer dtype.
    """
    if (
        segments is not None and segments.shape != x.shape[:2]
    ):  # the loops read as many as x has, whether they are there or not
        raise ValueError(f"segments must be [B, T] = {list(x.shape[:2])}; got {tuple(segments.shape)}")
    return _CausalConv.apply(x.contiguous(), weight, bias, residual, None if segments is None else segments.long())


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, segments: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, segments)
        ctx.residual = residual
        tiling, y = _tiling(x), torch.empty_like(x)
        _run(tiling, -1, y, x, _table(weight, bias, residual, tiling), None, x.new_empty(tiling.tiles, 0), segments)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, segments = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        tiling, (channels, taps) = _tiling(x), weight.shape
        lines = taps + 1 if needs_bias else taps if needs_weight else 0
        dx, sums = torch.empty_like(x), x.new_empty(tiling.tiles, lines * tiling.joined * channels)
        _run(tiling, 1, dx, grad.contiguous(), _table(weight, None, ctx.residual, tiling), x, sums, segments)
        dweight, dbias = torch.empty_like(weight, memory_format=torch.contiguous_format), None
        if lines:
            dbias = weight.new_empty(channels) if needs_bias else None
            _collect(sums.numpy(), _flat(dweight, x), _flat(dbias, x), channels, taps)
        return dx if needs_x else None, dweight if needs_weight else None, dbias, None, None


def _run(
    tiling: _Tiling,
    direction: int,
    out: Tensor,
    source: Tensor,
    table: Tensor,
    x: Tensor | None,
    sums: Tensor,
    segments: Tensor | None,
) -> None:
    """Sweep every tile, on as many threads as torch may use."""
    out_, source_, table_, x_ = _flat(out, out), _flat(source, out), _flat(table, out), _flat(x, out)
    ids = np.empty(0, np.int64) if segments is None else _flat(segments, out)
    length, channels, rows, joined, tile_rows, tiles = tiling
    taps = table_.size // (joined * channels) - 1
    parts = sums.numpy()

    def sweep(begin: int, end: int) -> None:
        _sweep_tiles(
            out_, source_, table_, x_, parts, ids, begin, end, tile_rows, rows, length, channels, taps, direction
        )

    _share(sweep, tiles, torch.get_num_threads() if out.numel() >= _SERIAL_BELOW else 1)


def _share(work: Callable[[int, int], None], tasks: int, threads: int) -> None:
    """Do tasks 0 ... tasks - 1, each once, on this thread and up to `threads` - 1 others; `work` takes a range."""
    if threads == 1:
        work(0, tasks)
        return
    size = -(-tasks // (4 * threads))  # few enough that threads seldom wait for the GIL in between
    todo = deque(range(0, tasks, size))

    def drain(take: Callable[[], int]) -> None:
        while True:
            try:
                begin = take()
            except IndexError:
                return
            work(begin, min(begin + size, tasks))

    # Helpers take from the far end: a core then tends to meet the same part of a tensor in one operation after another.
    # A helper that has not started when the tasks run out is called off: a busy pool delays nothing, never deadlocks.
    futures = [_pool().submit(drain, todo.pop) for _ in range(min(threads, len(todo)) - 1)]
    drain(todo.popleft)
    for future in futures:
        if not future.cancel():
            future.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="causal_conv")


if hasattr(os, "register_at_fork"):  # threads do not survive a fork; the child starts its own
    os.register_at_fork(after_in_child=_pool.cache_clear)
