"""Gated linear attention (Yang et al. 2024, "Gated Linear Attention Transformers with Hardware-Efficient Training").

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T          S in R^{K x V} per head, g_t <= 0 a log-decay per key dimension
    o_t = S_t^T (q_t * scale)

Legend: `B` batch, `T` time, `H` heads, `K` key width, `V` value width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from src.components.kernels import fla
from src.components.kernels.chunks import chunk_length, chunked, chunked_heads, negligible, run_starts, unchunked_heads
from src.components.kernels.recurrence import RecurrentState, enter, restart, widest
from src.components.kernels.registry import Operation

_gla = Operation("gla")
check_backend = _gla.check_name
_gla.backend("fla", why_not=fla.why_not_gla)(fla.gla)

MIDPOINT_CHUNK, HALVES_CHUNK = 64, 32
LARGEST = 40.0  # exp(2 * 40) is 1e35


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    segments: Tensor | None = None,
    state: RecurrentState | None = None,
    backend: str = "auto",
) -> tuple[Tensor, RecurrentState | None]:
    """Runs the recurrence over a sequence, or over the next piece of one.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        log_decay: `[B, T, H, K]`, natural logarithms, at most 0.
        scale: of the queries; None for K^-1/2.
        segments: `[B, T]` integer document numbers; memory is emptied where they change, and passes over padding (negative).
        state: what came before, `recurrent_state` at the start; None when nothing came before and no state is wanted.
        backend: "auto" for the fastest that can run, or a name.

    Returns:
        `[B, T, H, V]` in v's dtype, and the new state (None if none was given). Computed in float32 at least.

    Raises:
        ValueError: a shape does not fit, or the backend does not exist.
        BackendUnavailableError: the backend named cannot run this call.
    """
    _check(q, k, v, log_decay)
    entry = enter(segments, state)
    if entry.real is not None:
        padding = ~entry.real[..., None, None]
        k, log_decay = k.masked_fill(padding, 0.0), log_decay.masked_fill(padding, 0.0)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        o, memory = _gla(backend, q, k, v, log_decay, scale=scale, runs=entry.runs, memory=entry.memory)
    if state is None or memory is None or entry.segment is None:
        return o.to(v.dtype), None
    return o.to(v.dtype), RecurrentState(memory, entry.segment)


@_gla.backend("torch")
def _chunked(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float, runs: Tensor | None, memory: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk (chunks.py). With one decay per key dimension, the score of token i for token j <= i of its chunk is

        sum over K of  q_i k_j exp(L_i - L_j)

    which is a matrix product once exp(L_i - L_j) is split into a factor for i and a factor for j. `_by_midpoint` and
    `_by_halves` do this in two ways, a fast and an exact one.
    """
    time = q.shape[1]
    if time <= 1:
        return _recurrent(q, k, v, log_decay, scale=scale, runs=runs, memory=memory)
    dtype = widest(q, k, v, log_decay)
    q, k, v, log_decay = q.to(dtype) * scale, k.to(dtype), v.to(dtype), log_decay.to(dtype)
    chunks = _by_midpoint(q, k, log_decay, runs) if _readable(log_decay) else None
    if chunks is None:
        chunks = _by_halves(q, k, log_decay, runs)
    v = chunked_heads(v, chunks.scores.shape[-1])
    memory = q.new_zeros(*v.shape[1:3], k.shape[-1], v.shape[-1]) if memory is None else memory.to(dtype)
    entering = []
    for written, kept in zip((chunks.k_leaving.mT @ v).unbind(0), chunks.kept.unbind(0), strict=True):
        entering.append(memory)
        memory = torch.addcmul(written, memory, kept)
    return unchunked_heads(chunks.scores @ v + chunks.q_entering @ torch.stack(entering), time), memory


class _Chunks(NamedTuple):
    """The parts of the chunked form that do not depend on the values."""

    scores: Tensor  # [n, B, H, C, C]: of token i (row) for token j
    q_entering: Tensor  # [n, B, H, C, K]: q_i exp(L_i), which reads the memory that enters the chunk
    k_leaving: Tensor  # [n, B, H, C, K]: k_j exp(L_C - L_j), under which a token is written to the memory that leaves
    kept: Tensor  # [n, B, H, K, 1]: exp(L_C), what is left of the entering memory


def _by_midpoint(q: Tensor, k: Tensor, log_decay: Tensor, runs: Tensor | None) -> _Chunks | None:
    """exp(L_i - L_j) = exp(L_i - L_m) exp(L_m - L_j), m the middle of the chunk; None if a half decays too fast for that.

    One of the two exponents may be positive. Half a chunk that decays by at most exp(-LARGEST) keeps both factors, and their
    product above the diagonal where it is masked, within float32.
    """
    length = chunk_length(q.shape[1], MIDPOINT_CHUNK)
    q, k, log_decay = (chunked_heads(x, length) for x in (q, k, log_decay))
    total, last = log_decay.cumsum(-2), log_decay.sum(-2, keepdim=True)
    # L_m cancels from all that follows, and so does its gradient.
    first, middle = total.detach()[..., :1, :], total.detach()[..., (length - 1) // 2, None, :]
    # Sums of log-decays fall, so that their ends bound what is between. (Written so that NaN takes the other way.)
    if not bool((torch.maximum(first - middle, middle - last) <= LARGEST).all()):
        return None
    factor = (total - middle).exp()
    q, k = q * factor, k / factor
    scores = (q @ k.mT).tril()
    q_entering, k_leaving, kept = q * middle.exp(), k * (last - middle).exp(), last.exp()
    if runs is not None:  # tokens of different runs do not meet
        # The last run fills up the last chunk.
        runs = (chunked(runs - runs[:, -1:], length) + runs[:, -1:])[:, :, None]  # [n, B, 1, C]
        last_run = runs[..., -1:]
        run_before = F.pad(last_run[:-1], (0, 0) * 3 + (1, 0))  # of the memory that enters
        scores = scores * (runs[..., :, None] == runs[..., None, :])
        q_entering = q_entering * (runs == run_before)[..., None]
        k_leaving = k_leaving * (runs == last_run)[..., None]
        kept = kept * (last_run == run_before)[..., None]
    return _Chunks(scores, q_entering, k_leaving, kept.mT)


def _by_halves(q: Tensor, k: Tensor, log_decay: Tensor, runs: Tensor | None) -> _Chunks:
    """Only products of decays at most 1: right for any log-decay, -inf included, and without looking at its values.

    Two neighbouring blocks of s tokens become one of 2s, from s = 1 on. In either block, with a_t = exp(g_t),

        q'_i = q_i * a_first ... a_i       k'_j = k_j * a_{j+1} ... a_last       total = a_first ... a_last

    so the scores of the right block's queries for the left block's keys are q'_i k'_j, and then q' grows by the left block's
    total in the right block, k' by the right block's total in the left one.
    """
    if runs is not None:
        log_decay = log_decay.masked_fill(run_starts(runs)[..., None, None], -torch.inf)
    least, length = negligible(q.dtype), min(HALVES_CHUNK, 1 << (q.shape[1] - 1).bit_length())
    q, k, log_decay = (chunked_heads(x, length) for x in (q, k, log_decay))
    decay = F.threshold((log_decay * (1.0 / math.log(2.0))).exp2(), least, 0.0)  # as in `decays`
    # Of a chunk's blocks, at first C of one token each:
    scores, total = (q * k).sum(-1)[..., None, None], decay[..., None, :]  # [n, B, H, C/s, s, s], [n, B, H, C/s, 1, K]
    q, k = (q * decay)[..., None, :], k[..., None, :]  # [n, B, H, C/s, s, K]
    for size in (1 << level for level in range(length.bit_length() - 1)):
        (q_left, q_right), (k_left, k_right), (left, right), (scores_left, scores_right) = (
            x.unflatten(-3, (-1, 2)).unbind(-3) for x in (q, k, total, scores)
        )
        if size <= 2:  # faster than products of such small matrices
            between = (q_right[..., :, None, :] * k_left[..., None, :, :]).sum(-1)
        else:
            between = q_right @ k_left.mT
        scores = torch.cat((F.pad(scores_left, (0, size)), torch.cat((between, scores_right), -1)), -2)
        q, k = torch.cat((q_left, q_right * left), -2), torch.cat((k_left * right, k_right), -2)
        total = F.threshold(left * right, least, 0.0)
    scores, q, k, total = (x.squeeze(-3) for x in (scores, q, k, total))
    return _Chunks(scores, q, k, total.mT)


def _readable(x: Tensor) -> bool:
    """Whether a look at x's values costs nothing: on a GPU it would wait for it, and when tracing there are none."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    return not torch._C._are_functorch_transforms_active()


@_gla.backend("recurrent")
def _recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float, runs: Tensor | None, memory: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The equation at the head of this file, step by step: what every other backend is tested against."""
    dtype = widest(q, k, v, log_decay)
    q, k, v, decay = q.to(dtype) * scale, k.to(dtype), v.to(dtype), log_decay.to(dtype).exp()
    memory_bhkv = q.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[-1]) if memory is None else memory.to(dtype)
    outputs = []
    for t, (q_t, k_t, v_t, decay_t) in enumerate(zip(*(x.unbind(1) for x in (q, k, v, decay)), strict=True)):
        memory_bhkv = restart(memory_bhkv, runs, t) * decay_t[..., None] + k_t[..., None] * v_t[..., None, :]
        outputs.append((q_t[..., None, :] @ memory_bhkv)[..., 0, :])
    return torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v), memory_bhkv


def _check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> None:
    if q.ndim != 4 or k.shape != q.shape or log_decay.shape != q.shape:
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(log_decay.shape)}"
        raise ValueError(f"q, k and log_decay must be [B, T, H, K] alike; got {shapes}")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must be [B, T, H, V] with B, T, H = {tuple(q.shape[:3])}; got {tuple(v.shape)}")
