"""The gated delta rule (Yang, Kautz & Hatamizadeh 2025, "Gated Delta Networks").

    S'_t = exp(g_t) S_{t-1}                             S in R^{K x V} per head, g_t <= 0 one log-decay per head
    S_t  = S'_t + beta_t k_t (v_t - S'_t^T k_t)^T       the value stored under k_t is corrected towards v_t
    o_t  = S_t^T (q_t * scale)

Legend: `B` batch, `T` time, `H` heads, `K` key width, `V` value width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from src.components.kernels import fla
from src.components.kernels.chunks import chunk_length, chunked, chunked_heads, decays, forgetting, unchunked_heads
from src.components.kernels.recurrence import RecurrentState, enter, restart, widest
from src.components.kernels.registry import Operation

_gated_delta_rule = Operation("gated_delta_rule")
check_backend = _gated_delta_rule.check_name
_gated_delta_rule.backend("fla", why_not=fla.why_not_gated_delta_rule)(fla.gated_delta_rule)
_gated_delta_rule.backend("fla_kda", why_not=fla.why_not_kda)(fla.kda)

L2NORM_EPS = 1e-6
CHUNK = 32  # the C x C systems cost more than more steps: 64 takes a fifth longer
SOLVED_AT_ONCE = 16


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    normalize: bool = True,
    segments: Tensor | None = None,
    state: RecurrentState | None = None,
    backend: str = "auto",
) -> tuple[Tensor, RecurrentState | None]:
    """Runs the recurrence over a sequence, or over the next piece of one.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, V]`.
        log_decay: `[B, T, H]`, natural logarithms, at most 0.
        beta: `[B, T, H]`, the writing strength, 0 to 1.
        scale: of the queries, after their normalisation; None for K^-1/2.
        normalize: divide q and k by sqrt(sum of squares + 1e-6) first. The rule is stable for keys of length at most 1.
        segments: `[B, T]` integer document numbers; memory is emptied where they change, and passes over padding (negative).
        state: what came before, `recurrent_state` at the start; None when nothing came before and no state is wanted.
        backend: "auto" for the fastest that can run, or a name.

    Returns:
        `[B, T, H, V]` in v's dtype, and the new state (None if none was given). Computed in float32 at least.

    Raises:
        ValueError: a shape does not fit, or the backend does not exist.
        BackendUnavailableError: the backend named cannot run this call.
    """
    _check(q, k, v, log_decay, beta)
    entry = enter(segments, state)
    if entry.real is not None:
        padding = ~entry.real[..., None]
        beta, log_decay = beta.masked_fill(padding, 0.0), log_decay.masked_fill(padding, 0.0)
    options = {"scale": q.shape[-1] ** -0.5 if scale is None else scale, "normalize": normalize}
    with torch.autocast(q.device.type, enabled=False):
        o, memory = _gated_delta_rule(
            backend, q, k, v, log_decay, beta, **options, runs=entry.runs, memory=entry.memory
        )
    if state is None or memory is None or entry.segment is None:
        return o.to(v.dtype), None
    return o.to(v.dtype), RecurrentState(memory, entry.segment)


def unit_length(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dimension."""
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + L2NORM_EPS)


def _inverse(A: Tensor) -> Tensor:
    """(I + A)^-1 of strictly lower triangular A `[..., C, C]`, by halves: [[P, 0], [R, Q]]^-1 = [[P^-1, 0], [-Q^-1 R P^-1, Q^-1]].

    On several threads the solver needs tenfold the time from some 30 rows on, which it shares out one matrix at a time.
    """
    length = A.shape[-1]
    if length <= SOLVED_AT_ONCE:
        identity = torch.eye(length, dtype=A.dtype, device=A.device)
        # It takes the diagonal of A to be 1 and does not look at it, nor above it.
        return torch.linalg.solve_triangular(A, identity.expand_as(A), upper=False, unitriangular=True, left=False)
    half = length // 2
    upper, lower = _inverse(A[..., :half, :half]), _inverse(A[..., half:, half:])
    between = -(lower @ A[..., half:, :half] @ upper)
    return torch.cat((F.pad(upper, (0, length - half)), torch.cat((between, lower), -1)), -2)


@_gated_delta_rule.backend("torch")
def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float,
    normalize: bool,
    runs: Tensor | None,
    memory: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk: with L the sums of g along a chunk (chunks.py), which S enters and S' leaves, token j writes k_j u_j^T,

        u_i = beta_i (v_i - exp(L_i) S^T k_i - sum_{j < i} exp(L_i - L_j) (k_i . k_j) u_j)

    A triangular system for the u of a chunk (the UT transform of the paper's section 3.3):

        (I + A) U = diag(beta) (V - diag(exp(L)) K S)        A_ij = beta_i exp(L_i - L_j) (k_i . k_j) for j < i
        o_i = exp(L_i) S^T q_i + sum_{j <= i} exp(L_i - L_j) (q_i . k_j) u_j
        S'  = exp(L_C) S + sum_j exp(L_C - L_j) k_j u_j^T

    (I + A)^-1 diag(beta) is computed in all chunks at once, so that only products go from chunk to chunk.
    """
    time = q.shape[1]
    if time <= 1:
        options = {"scale": scale, "normalize": normalize, "runs": runs, "memory": memory}
        return _recurrent(q, k, v, log_decay, beta, **options)
    dtype, length = widest(q, k, v, log_decay, beta), chunk_length(time, CHUNK)
    q, k, v, log_decay, beta = (x.to(dtype) for x in (q, k, v, log_decay, beta))
    q, k = (unit_length(q), unit_length(k)) if normalize else (q, k)
    within, entering, leaving = decays(chunked(forgetting(log_decay, runs), length).transpose(2, 3))
    q, k, v, beta = (chunked_heads(x, length) for x in (q * scale, k, v, beta))
    A = (beta[..., None] * k) @ k.mT * within
    solved = _inverse(A) * beta[..., None, :]
    scores = q @ k.mT * within
    q_entering, k_entering, k_leaving = entering[..., None] * q, entering[..., None] * k, leaving[..., None] * k
    kept = entering[..., -1:, None]
    memory = q.new_zeros(*v.shape[1:3], k.shape[-1], v.shape[-1]) if memory is None else memory.to(dtype)
    u, memories = [], []
    parts = (part.unbind(0) for part in (solved @ v, solved @ k_entering, k_leaving, kept))
    for v_c, k_c, k_leaving_c, kept_c in zip(*parts, strict=True):
        memories.append(memory)
        u.append(v_c - k_c @ memory)
        memory = torch.addcmul(k_leaving_c.mT @ u[-1], memory, kept_c)
    return unchunked_heads(q_entering @ torch.stack(memories) + scores @ torch.stack(u), time), memory


@_gated_delta_rule.backend("recurrent")
def _recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float,
    normalize: bool,
    runs: Tensor | None,
    memory: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The equation at the head of this file, step by step: what every other backend is tested against."""
    dtype = widest(q, k, v, log_decay, beta)
    q, k, v, decay, beta = q.to(dtype), k.to(dtype), v.to(dtype), log_decay.to(dtype).exp(), beta.to(dtype)
    q, k = (unit_length(q), unit_length(k)) if normalize else (q, k)
    memory_bhkv = q.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[-1]) if memory is None else memory.to(dtype)
    outputs = []
    steps = (x.unbind(1) for x in (q * scale, k, v, decay[..., None, None], beta[..., None]))
    for t, (q_t, k_t, v_t, decay_t, beta_t) in enumerate(zip(*steps, strict=True)):
        memory_bhkv = restart(memory_bhkv, runs, t) * decay_t
        correction_bhv = v_t - (k_t[..., None, :] @ memory_bhkv)[..., 0, :]
        memory_bhkv = memory_bhkv + k_t[..., None] * (beta_t * correction_bhv)[..., None, :]
        outputs.append((q_t[..., None, :] @ memory_bhkv)[..., 0, :])
    return torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v), memory_bhkv


def _check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> None:
    if q.ndim != 4 or k.shape != q.shape:
        raise ValueError(f"q and k must be [B, T, H, K] alike; got {tuple(q.shape)} and {tuple(k.shape)}")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must be [B, T, H, V] with B, T, H = {tuple(q.shape[:3])}; got {tuple(v.shape)}")
    if log_decay.shape != q.shape[:3] or beta.shape != q.shape[:3]:
        shapes = f"{tuple(log_decay.shape)} and {tuple(beta.shape)}"
        raise ValueError(f"log_decay and beta must be [B, T, H] = {tuple(q.shape[:3])}; got {shapes}")
