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

from src.components.kernels import fla, mamba
from src.components.kernels.chunks import chunk_length, chunked, decays, forgetting
from src.components.kernels.recurrence import RecurrentState, enter, restart, widest
from src.components.kernels.registry import Operation

_ssd = Operation("ssd")
check_backend = _ssd.check_name
_ssd.backend("mamba_ssm", why_not=mamba.why_not_ssd)(mamba.ssd)
_ssd.backend("fla", why_not=fla.why_not_ssd)(fla.ssd)

CHUNK = 64


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


@_ssd.backend("torch")
def _chunked(
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
    """Chunk by chunk: with L the sums of dt A along a chunk (chunks.py), which h enters and h' leaves,

        y_i = sum_{j <= i} (C_i . B_j) exp(L_i - L_j) dt_j x_j  +  exp(L_i) h C_i  +  D x_i
        h'  = exp(L_last) h + sum_j exp(L_last - L_j) (dt_j x_j) B_j^T

    The products of B and C serve all heads of a group; the memories of a group are one matrix `[N, H/G P]`.
    """
    (batch, time, heads, width), groups = x.shape, B.shape[2]
    if time <= 1:
        return _recurrent(x, dt, A, B, C, D=D, runs=runs, memory=memory)
    dtype, length = widest(x, dt, A, B, C), chunk_length(time, CHUNK)
    x, dt, A, B, C = (part.to(dtype) for part in (x, dt, A, B, C))
    within, entering, leaving = decays(chunked(forgetting(dt * A, runs), length).transpose(2, 3))  # [n, B, H, c(, c)]
    kept = entering[..., -1].unflatten(2, (groups, 1, -1))[..., None]  # [n, B, G, 1, H/G, 1]
    entering, leaving = (part.transpose(2, 3)[..., None] for part in (entering, leaving))  # [n, B, c, H, 1]
    written = chunked(x * dt[..., None], length)  # [n, B, c, H, P]
    lasting = (written * leaving).unflatten(3, (groups, -1)).flatten(4).transpose(2, 3)  # [n, B, G, c, H/G P]
    B, C = (chunked(part, length).transpose(2, 3) for part in (B, C))  # [n, B, G, c, N]
    scores = ((C @ B.mT).unsqueeze(3) * within.unflatten(2, (groups, -1))).flatten(2, 3)  # [n, B, H, c, c]
    if memory is None:
        memory = x.new_zeros(batch, heads, width, B.shape[-1])
    memory = memory.to(dtype).unflatten(1, (groups, -1)).movedim(-1, 2)  # [B, G, N, H/G, P]
    outputs = []
    parts = (part.unbind(0) for part in (scores, written, lasting, B, C, entering, kept))
    for scores_c, written_c, lasting_c, B_c, C_c, entering_c, kept_c in zip(*parts, strict=True):
        y = (scores_c @ written_c.transpose(1, 2)).transpose(1, 2)
        read = (C_c @ memory.flatten(-2)).transpose(1, 2).reshape(y.shape)
        outputs.append(torch.addcmul(y, read, entering_c))
        memory = torch.addcmul((B_c.mT @ lasting_c).unflatten(-1, (-1, width)), memory, kept_c)
    y = torch.cat(outputs, dim=1)[:, :time]
    y = y if D is None else torch.addcmul(y, x, D.to(dtype)[:, None])
    return y, memory.movedim(2, -1).flatten(1, 2).contiguous()


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
    decay, written = (dt * A).exp(), dt[..., None] * x
    memory_bhpn = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1]) if memory is None else memory.to(dtype)
    outputs = []
    for t, (decay_t, written_t, B_t, C_t) in enumerate(
        zip(*(z.unbind(1) for z in (decay, written, B, C)), strict=True)
    ):
        memory_bhpn = (
            restart(memory_bhpn, runs, t) * decay_t[..., None, None] + written_t[..., None] * B_t[..., None, :]
        )
        outputs.append((memory_bhpn @ C_t[..., None])[..., 0])
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
