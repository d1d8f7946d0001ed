"""Causal softmax attention over queries that are the last T of S positions.

    o_i = sum_{j in V(i)} softmax_j(q_i . k_j / sqrt(D) + bias(i - j)) v_j
    V(i) = the j <= i of i's document at a distance below the window

Shapes: B batch, T queries, S keys (S >= T), H query heads, H_kv key and value heads (query head h uses
key head h // (H / H_kv)), D head width.

Backends: `varlen` (CUDA, 16 bit: flash attention over the documents as they are, without a mask), `blockwise` (a window much shorter
than the sequence, time and memory linear in T), `sdpa` (PyTorch's fused kernels with a mask of T times S where one is needed: everything,
everywhere), and `reference`, the equation.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from src.components.kernels.registry import AUTO, Operation
from src.components.kernels.upstream import opaque
from src.components.position import Bias

_attention = Operation("attention")
check_backend = _attention.check_name

# Something about the queries [B, T] and the same about the keys [B, S].
Pair = tuple[Tensor, Tensor]

_SMALLEST_BLOCK = 32


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    bias: Bias | None = None,
    segments: Pair | None = None,
    positions: Pair | None = None,
    backend: str = AUTO,
) -> Tensor:
    """Attends from the last T of S positions.

    Args:
        q: `[B, T, H, D]`.
        k: `[B, S, H_kv, D]`.
        v: `[B, S, H_kv, D]`.
        window: a query sees keys at distances 0 .. window - 1 only; None: all.
        bias: from distances i - j `[..., T, S]` to what is added to the scores, `[..., H, T, S]`; -inf hides a key.
        segments: document numbers of the queries `[B, T]` and of the keys `[B, S]`; a query sees only its own document. Padding
            (negative) is a document too, which no other sees.
        positions: integers that distances are measured in, `[B, T]` and `[B, S]`; None: the columns, the queries being the last. They
            need not tell what is before what, which is a matter of columns in any case. The distance of a query to itself must be 0.
        backend: "auto" for the fastest that can run, or a name; `used_backends()` tells which ran.

    Returns:
        `[B, T, H, D]`.

    Raises:
        ValueError: a shape does not fit, the window is below 1, or the backend does not exist.
        BackendUnavailableError: the backend named cannot run this call.
    """
    _check(q, k, v, window)
    if window is not None:
        reach = q.shape[1] + window - 1
        if positions is None and k.shape[1] > reach:  # no query sees further back
            k, v = k[:, -reach:], v[:, -reach:]
            segments = None if segments is None else (segments[0], segments[1][:, -reach:])
        if k.shape[1] <= window:
            window = None
    if backend == AUTO and window is None and bias is None and segments is None:
        backend = "sdpa"  # which has a kernel for just that everywhere
    return _attention(backend, q, k, v, window=window, bias=bias, segments=segments, positions=positions)


def attention_mask(
    q: Tensor, num_keys: int, window: int | None, bias: Bias | None, segments: Pair | None, positions: Pair | None
) -> Tensor:
    """Causality, window, documents and bias in one tensor that broadcasts to `[B, H, T, S]`.

    Boolean (True = may look) without a bias, else a float of q's dtype with -inf where nothing may be seen.
    """
    num_queries = q.shape[1]
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).tril(num_keys - num_queries)
    if segments is not None:
        visible = visible & (segments[0][:, None, :, None] == segments[1][:, None, None, :])
    if window is None and bias is None:
        return visible
    if positions is None:
        column = torch.arange(num_keys, device=q.device)
        distance = column[num_keys - num_queries :, None] - column
    else:
        distance = positions[0][:, :, None] - positions[1][:, None, :]
    if window is not None:
        visible = visible & (distance < window).unsqueeze(-3)
    if bias is None:
        return visible
    return bias(distance).to(q.dtype).masked_fill(~visible, -torch.inf)


# ---- varlen --------------------------------------------------------------------------------------------------------


def _why_not_varlen(
    q: Tensor, k: Tensor, _v: Tensor, *, window: int | None, bias: Bias | None, positions: Pair | None, **_rest: object
) -> str | None:
    if q.device.type != "cuda":
        return f'q is on {q.device.type}; use backend "sdpa" or move it to a CUDA device'
    if bias is not None:
        return 'it adds nothing to the scores; use backend "sdpa" or another position encoding'
    if positions is not None or q.shape[1] != k.shape[1]:
        return 'it takes whole sequences only; use backend "sdpa" for what continues one'
    if _varlen_dtype(q) not in (torch.float16, torch.bfloat16):
        return f"q is {_varlen_dtype(q)}, not float16 or bfloat16; train with trainer.precision=bf16-mixed"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"the head width {q.shape[-1]} is not a multiple of 8 up to 256; choose another or backend sdpa"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "flash attention needs a GPU of compute capability 8.0 (Ampere) or later"
    if window is not None and "window_size" not in _varlen_options():
        return f"torch {torch.__version__} knows no window there; install torch 2.13"
    return None


def _varlen_dtype(q: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else q.dtype


def _varlen_options() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


_varlen_options._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see registry.py


# How many documents there are is data, which a compiled graph cannot have in its shapes.
@_attention.backend("varlen", why_not=_why_not_varlen)
@opaque
def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    bias: Bias | None,  # none, see above
    segments: Pair | None,
    positions: Pair | None,  # none
) -> Tensor:
    """Documents end to end; padding attends to itself, in documents of its own."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    known = _varlen_options()
    if "window_size" in known:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    else:
        options["is_causal"] = True
    if q.shape[2] != k.shape[2]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    starts, longest = document_starts(q.shape[0], q.shape[1], None if segments is None else segments[0], q.device)
    q_nhd, k_nhd, v_nhd = (x.to(_varlen_dtype(q)).flatten(0, 1) for x in (q, k, v))
    out: Any = varlen_attn(q_nhd, k_nhd, v_nhd, starts, starts, longest, longest, **options)
    return out.view(q.shape)


_last_starts: tuple[weakref.ref[Tensor], int, tuple[Tensor, int]] | None = None


def document_starts(batch: int, time: int, segments: Tensor | None, device: torch.device) -> tuple[Tensor, int]:
    """Where documents begin in rows laid end to end: `[N + 1]` int32, the total length last, and the longest one's length.

    A document is a stretch of equal numbers. Finding them waits for the GPU, so the answer is kept for the other layers.
    """
    global _last_starts  # noqa: PLW0603
    if segments is None:
        return torch.arange(0, batch * time + 1, time, dtype=torch.int32, device=device), time
    version = -1 if segments.is_inference() else segments._version
    if _last_starts is not None and _last_starts[0]() is segments and _last_starts[1] == version:
        return _last_starts[2]
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = F.pad(first.flatten().nonzero().flatten(), (0, 1), value=batch * time).to(torch.int32)
    found = starts, int(starts.diff().max())
    _last_starts = weakref.ref(segments), version, found
    return found


# ---- blockwise -----------------------------------------------------------------------------------------------------


def _block(window: int) -> int:
    return max(window, _SMALLEST_BLOCK)


def _why_not_blockwise(_q: Tensor, k: Tensor, _v: Tensor, *, window: int | None, **_rest: object) -> str | None:
    if window is None:
        return 'there is no window; set one or use backend "sdpa"'
    if k.shape[1] < 4 * _block(window):
        return f'the window is not much shorter than the {k.shape[1]} keys; use backend "sdpa"'
    return None


@_attention.backend("blockwise", why_not=_why_not_blockwise)
def _blockwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    bias: Bias | None,
    segments: Pair | None,
    positions: Pair | None,
) -> Tensor:
    """Queries in N blocks of C >= window; each block sees the keys of its own place and of the block before."""
    (batch, time), size = q.shape[:2], _block(window)
    blocks = -(-time // size)
    past = min(k.shape[1] - time, size)  # keys before the first query that it can see
    front, back = size - past, blocks * size - time

    def own(x: Tensor) -> Tensor:
        """`[B, T, ...]` -> `[B N, C, ...]`."""
        return _padded(x, 0, back).reshape(batch * blocks, size, *x.shape[2:])

    def around(x: Tensor) -> Tensor:
        """`[B, S, ...]` -> `[B N, 2 C, ...]`."""
        x = _padded(x[:, x.shape[1] - time - past :], front, back)
        before, at = (part.unflatten(1, (blocks, size)) for part in (x[:, :-size], x[:, size:]))
        return torch.cat((before, at), dim=2).flatten(0, 1)

    key = torch.arange(2 * size, device=q.device)
    column_distance = (key[size:, None] - key)[None]  # [1, C, 2C], the same in all blocks
    # A column of padding behind the last query is seen by padding alone, and each sees itself: no row without a key, which gave nan.
    visible = (column_distance >= 0).expand(blocks, -1, -1).clone()
    visible[0, :, :front] = False
    visible = visible.repeat(batch, 1, 1)
    distance = column_distance
    if positions is not None:
        distance = own(positions[0])[:, :, None] - around(positions[1])[:, None, :]
    visible &= distance < window
    if segments is not None:
        visible &= own(segments[0])[:, :, None] == around(segments[1])[:, None, :]
    mask = visible[:, None]
    if bias is not None:
        mask = bias(distance).to(q.dtype).masked_fill(~mask, -torch.inf)
    out = _fused(own(q), around(k), around(v), mask)
    return out.reshape(batch, blocks * size, *q.shape[2:])[:, :time]


def _padded(x: Tensor, front: int, back: int) -> Tensor:
    return F.pad(x, (0, 0) * (x.ndim - 2) + (front, back))


# ---- sdpa and the equation -----------------------------------------------------------------------------------------


@_attention.backend("sdpa")
def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    bias: Bias | None,
    segments: Pair | None,
    positions: Pair | None,
) -> Tensor:
    num_queries, num_keys = q.shape[1], k.shape[1]
    plain = window is None and bias is None and segments is None
    if plain and num_queries in (1, num_keys):
        return _fused(q, k, v, None)
    return _fused(q, k, v, attention_mask(q, num_keys, window, bias, segments, positions))


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None and q.shape[1] > 1,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


@_attention.backend("reference")
def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    bias: Bias | None,
    segments: Pair | None,
    positions: Pair | None,
) -> Tensor:
    """The equation at the head of this file, spelt out: what every other backend is tested against."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores_bhts = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    mask = attention_mask(q, k.shape[1], window, bias, segments, positions)
    if mask.dtype == torch.bool:
        scores_bhts = scores_bhts.masked_fill(~mask, -torch.inf)
    else:
        scores_bhts = scores_bhts + mask
    return torch.einsum("bhts,bshd->bthd", scores_bhts.softmax(dim=-1), v)


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"window={window}: at least 1 (the token itself), or None")
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q must be [B, T, H, D], k and v [B, S, H_kv, D]; got {shapes}")
    if k.shape[1] < q.shape[1] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"at least as many keys as queries, and heads in whole groups; got {tuple(q.shape)} and {tuple(k.shape)}"
        )
