"""Gated linear attention (Yang et al. 2024, "Gated Linear Attention Transformers with Hardware-Efficient Training").

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T          S in R^{K x V} per head, g_t <= 0 a log-decay per key dimension
    o_t = S_t^T (q_t * scale)

Legend: `B` batch, `T` time, `H` heads, `K` key width, `V` value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from src.components.kernels.recurrence import RecurrentState, enter, restart, widest
from src.components.kernels.registry import Operation

_gla = Operation("gla")


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


@_gla.backend("recurrent")
def _recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float, runs: Tensor | None, memory: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The equation at the head of this file, step by step: what every other backend is tested against."""
    dtype = widest(q, k, v, log_decay)
    q, k, v, decay = q.to(dtype), k.to(dtype), v.to(dtype), log_decay.to(dtype).exp()
    memory_bhkv = q.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[-1]) if memory is None else memory.to(dtype)
    outputs = []
    for t in range(q.shape[1]):
        memory_bhkv = restart(memory_bhkv, runs, t) * decay[:, t, :, :, None] + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", memory_bhkv, q[:, t] * scale))
    return torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v), memory_bhkv


def _check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> None:
    if q.ndim != 4 or k.shape != q.shape or log_decay.shape != q.shape:
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(log_decay.shape)}"
        raise ValueError(f"q, k and log_decay must be [B, T, H, K] alike; got {shapes}")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must be [B, T, H, V] with B, T, H = {tuple(q.shape[:3])}; got {tuple(v.shape)}")
