"""The gated delta rule (Yang, Kautz & Hatamizadeh 2025, "Gated Delta Networks").

    S'_t = exp(g_t) S_{t-1}                             S in R^{K x V} per head, g_t <= 0 one log-decay per head
    S_t  = S'_t + beta_t k_t (v_t - S'_t^T k_t)^T       the value stored under k_t is corrected towards v_t
    o_t  = S_t^T (q_t * scale)

Legend: `B` batch, `T` time, `H` heads, `K` key width, `V` value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from src.components.kernels.recurrence import RecurrentState, enter, restart, widest
from src.components.kernels.registry import Operation

_gated_delta_rule = Operation("gated_delta_rule")

L2NORM_EPS = 1e-6


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
    for t in range(q.shape[1]):
        memory_bhkv = restart(memory_bhkv, runs, t) * decay[:, t, :, None, None]
        correction_bhv = v[:, t] - torch.einsum("bhkv,bhk->bhv", memory_bhkv, k[:, t])
        memory_bhkv = memory_bhkv + k[:, t, :, :, None] * (beta[:, t, :, None] * correction_bhv)[:, :, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", memory_bhkv, q[:, t] * scale))
    return torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v), memory_bhkv


def _check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> None:
    if q.ndim != 4 or k.shape != q.shape:
        raise ValueError(f"q and k must be [B, T, H, K] alike; got {tuple(q.shape)} and {tuple(k.shape)}")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must be [B, T, H, V] with B, T, H = {tuple(q.shape[:3])}; got {tuple(v.shape)}")
    if log_decay.shape != q.shape[:3] or beta.shape != q.shape[:3]:
        shapes = f"{tuple(log_decay.shape)} and {tuple(beta.shape)}"
        raise ValueError(f"log_decay and beta must be [B, T, H] = {tuple(q.shape[:3])}; got {shapes}")
