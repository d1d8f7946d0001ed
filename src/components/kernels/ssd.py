"""State space duality: the recurrence of Mamba2 (Dao & Gu 2024, "Transformers are SSMs").

    h_t = exp(dt_t A) h_{t-1} + (dt_t x_t) B_t^T        h in R^{P x N} per head, A < 0 one number per head, dt_t > 0
    y_t = h_t C_t + D x_t

B and C are shared by the heads of a group. It is linear attention with one decay per head: C are the queries (unscaled), B the
keys and dt x the values.

Legend: `B` batch, `T` time, `H` heads, `P` head width, `N` state width, `G` groups (head h belongs to group h // (H / G)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from src.components.kernels.recurrence import RecurrentState, enter, restart, widest
from src.components.kernels.registry import Operation

_ssd = Operation("ssd")


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    segments: Tensor | None = None,
    state: RecurrentState | None = None,
    backend: str = "auto",
) -> tuple[Tensor, RecurrentState | None]:
    """Runs the recurrence over a sequence, or over the next piece of one.

    Args:
        x: `[B, T, H, P]`.
        dt: `[B, T, H]`, the step, positive (after its softplus).
        A: `[H]`, at most 0.
        B: `[B, T, G, N]`; G divides H.
        C: `[B, T, G, N]`.
        D: `[H]`, or None for no direct path from x to y.
        segments: `[B, T]` integer document numbers; memory is emptied where they change, and passes over padding (negative).
        state: what came before, `recurrent_state` at the start; None when nothing came before and no state is wanted.
        backend: "auto" for the fastest that can run, or a name.

    Returns:
        `[B, T, H, P]` in x's dtype, and the new state (None if none was given). Computed in float32 at least.

    Raises:
        ValueError: a shape does not fit, or the backend does not exist.
        BackendUnavailableError: the backend named cannot run this call.
    """
    _check(x, dt, A, B, C, D)
    entry = enter(segments, state)
    if entry.real is not None:
        dt = dt.masked_fill(~entry.real[..., None], 0.0)
    with torch.autocast(x.device.type, enabled=False):
        y, memory = _ssd(backend, x, dt, A, B, C, D=D, runs=entry.runs, memory=entry.memory)
    if state is None or memory is None or entry.segment is None:
        return y.to(x.dtype), None
    return y.to(x.dtype), RecurrentState(memory, entry.segment)


@_ssd.backend("recurrent")
def _recurrent(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    runs: Tensor | None,
    memory: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The equation at the head of this file, step by step: what every other backend is tested against."""
    dtype, heads = widest(x, dt, A, B, C), x.shape[2]
    x, dt, A = x.to(dtype), dt.to(dtype), A.to(dtype)
    B, C = (part.to(dtype).repeat_interleave(heads // part.shape[2], dim=2) for part in (B, C))
    memory_bhpn = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1]) if memory is None else memory.to(dtype)
    outputs = []
    for t in range(x.shape[1]):
        decay = (dt[:, t] * A).exp()[..., None, None]
        added = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        memory_bhpn = restart(memory_bhpn, runs, t) * decay + added
        outputs.append(torch.einsum("bhpn,bhn->bhp", memory_bhpn, C[:, t]))
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x)
    return y if D is None else y + D.to(dtype)[:, None] * x, memory_bhpn


def _check(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> None:
    if x.ndim != 4 or dt.shape != x.shape[:3]:
        raise ValueError(f"x must be [B, T, H, P] and dt [B, T, H]; got {tuple(x.shape)} and {tuple(dt.shape)}")
    batch, time, heads, _ = x.shape
    if B.ndim != 4 or B.shape[:2] != (batch, time) or C.shape != B.shape or B.shape[2] < 1 or heads % B.shape[2]:
        shapes = f"{tuple(B.shape)} and {tuple(C.shape)}"
        raise ValueError(f"B and C must be [{batch}, {time}, G, N] alike with G dividing H={heads}; got {shapes}")
    for name, part in (("A", A), ("D", D)):
        if part is not None and part.shape != (heads,):
            raise ValueError(f"{name} must be [H] = [{heads}]; got {tuple(part.shape)}")
