"""Kernels of fla-core (Triton, CUDA) behind the operations of this folder.

Conventions that differ from call to call upstream, and are settled here: gates are called `g` by the chunk kernels and `gk` by GLA's step
kernel; `beta` and `g` change places between kernels, so everything goes by keyword; documents inside rows become one long row with
`cu_seqlens`; 16-bit tensors want even widths; the first state must be float32. A chunk kernel computes in the dtype of q, k and v and
accumulates in float32; gates and states are float32 throughout.

Legend: `B` batch, `T` time, `H` heads, `K` key width, `V` value width; in `ssd` `P` head width, `N` state width, `G` groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from src.components.kernels.upstream import FLA, hopper_advice, load, needs_gradient, opaque, why_not
from src.components.kernels.varlen import pieces

# Up to here a step kernel, which knows no backward pass, beats a chunk kernel that would compute on padding mostly.
SHORT = 16
_WIDEST_KEY = 256  # of the delta rule's kernels
_ROW_BYTES = 65536  # that a norm kernel holds at once


def why_not_gla(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, memory: Tensor | None, **_rest: Any
) -> str | None:
    """See `upstream.why_not`."""
    return why_not(FLA, q, k, v, log_decay, memory)


@opaque
def gla(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float, runs: Tensor | None, memory: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`gla` by chunk_gla, or for a few tokens without gradients fused_recurrent_gla. Same arguments as its twin."""
    if _is_short(q, k, v, log_decay, memory):
        kernel = load("fla.ops.gla", "fused_recurrent_gla")
        return _recurrence(kernel, q, k, v, {"gk": log_decay}, runs=runs, memory=memory, scale=scale)
    kernel = load("fla.ops.gla", "chunk_gla")
    return _recurrence(kernel, q, k, v, {"g": log_decay}, runs=runs, memory=memory, chunked=True, scale=scale)


def why_not_kda(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, *, memory: Tensor | None, **_rest: Any
) -> str | None:
    """See `upstream.why_not`; keys may be 256 wide at most."""
    if q.shape[-1] > _WIDEST_KEY:
        return f"its keys are at most {_WIDEST_KEY} wide, here {q.shape[-1]}"
    return why_not(FLA, q, k, v, log_decay, beta, memory)


def why_not_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, *, memory: Tensor | None, **_rest: Any
) -> str | None:
    """See `upstream.why_not` and `upstream.hopper_advice`."""
    reason = why_not_kda(q, k, v, log_decay, beta, memory=memory)
    if reason is not None:
        return reason
    advice = hopper_advice(q, k, v, log_decay, beta, memory)
    return None if advice is None else f'{advice}, or use backend "fla_kda"'


@opaque
def gated_delta_rule(
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
) -> tuple[Tensor, Tensor | None]:
    """`gated_delta_rule` by chunk_gated_delta_rule, or for a few tokens without gradients its step kernel."""
    short = _is_short(q, k, v, log_decay, beta, memory)
    name = "fused_recurrent_gated_delta_rule" if short else "chunk_gated_delta_rule"
    options = {"scale": scale, "use_qk_l2norm_in_kernel": normalize}
    kernel, gates = load("fla.ops.gated_delta_rule", name), {"g": log_decay, "beta": beta}
    return _recurrence(kernel, q, k, v, gates, runs=runs, memory=memory, chunked=not short, **options)


@opaque
def kda(
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
) -> tuple[Tensor, Tensor | None]:
    """`gated_delta_rule` by chunk_kda: the same rule with a decay for each key dimension, here all alike.

    Slower than chunk_gated_delta_rule, but right where that one's backward pass is refused (`upstream.hopper_advice`).
    """
    if _is_short(q, k, v, log_decay, beta, memory):
        return gated_delta_rule(q, k, v, log_decay, beta, scale=scale, normalize=normalize, runs=runs, memory=memory)
    options = {"scale": scale, "use_qk_l2norm_in_kernel": normalize}
    gates = {"g": log_decay[..., None].expand_as(q), "beta": beta}
    kernel = load("fla.ops.kda", "chunk_kda")
    return _recurrence(kernel, q, k, v, gates, runs=runs, memory=memory, chunked=True, **options)


def why_not_ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None, memory: Tensor | None, **_rest: Any
) -> str | None:
    """See `upstream.why_not` and `upstream.hopper_advice`."""
    reason = why_not(FLA, x, dt, A, B, C, D, memory)
    if reason is not None:
        return reason
    advice = hopper_advice(x, dt, A, B, C, D, memory)
    return None if advice is None else f'{advice}, or use backend "mamba_ssm" or "torch"'


@opaque
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    runs: Tensor | None,
    memory: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """`ssd` as linear attention with one decay per head: queries C, keys B, values dt x, log-decay dt A, scale 1.

    B and C are repeated for each head of their group, which mamba_ssm's own kernel does not need.
    """
    dt = dt.float()
    q, k = (part.repeat_interleave(x.shape[2] // part.shape[2], dim=2) for part in (C, B))
    v, gates = (x * dt[..., None]).to(x.dtype), {"g": dt * A.float()}
    short = _is_short(q, k, v, gates["g"], memory)
    kernel = load("fla.ops.simple_gla", "fused_recurrent_simple_gla" if short else "chunk_simple_gla")
    memory = None if memory is None else memory.transpose(-1, -2)  # [B, H, P, N] -> [B, H, N, P]
    y, memory = _recurrence(kernel, q, k, v, gates, runs=runs, memory=memory, chunked=not short, scale=1.0)
    y = y if D is None else y.float() + D.float()[:, None] * x
    return y, None if memory is None else memory.transpose(-1, -2)


def _is_short(q: Tensor, *others: Tensor | None) -> bool:
    return q.shape[1] <= SHORT and not needs_gradient(q, *others)


def _recurrence(
    kernel: Callable[..., tuple[Tensor, Tensor | None]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: dict[str, Tensor],
    *,
    runs: Tensor | None,
    memory: Tensor | None,
    chunked: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Calls a kernel for q, k `[B, T, H, K]`, v `[B, T, H, V]`, gates `[B, T, H(, K)]`; memory `[B, H, K, V]` in and out."""
    if v.numel() == 0 or q.numel() == 0:
        return torch.zeros_like(v), memory
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    key, value = q.shape[-1], v.shape[-1]
    more_k, more_v = (key % 2, value % 2) if dtype.itemsize == 2 else (0, 0)
    tensors = {"q": q.to(dtype), "k": k.to(dtype), **{name: gate.float() for name, gate in gates.items()}}
    tensors = {name: F.pad(part, (0, more_k)) if part.ndim == 4 else part for name, part in tensors.items()}
    tensors["v"] = F.pad(v.to(dtype), (0, more_v))
    state = None if memory is None else F.pad(memory.float(), (0, more_v, 0, more_k)).contiguous()
    wants_state = memory is not None
    cut = None if runs is None else pieces(runs)
    if cut is None or cut.starts.numel() == q.shape[0] + 1:  # no document begins inside a row
        o, state = kernel(**tensors, initial_state=state, output_final_state=wants_state, **options)
    else:
        tensors = {name: part.reshape(1, -1, *part.shape[2:]) for name, part in tensors.items()}
        options |= {"cu_seqlens": cut.starts} | ({"cu_seqlens_cpu": cut.starts_cpu} if chunked else {})
        o, state = kernel(**tensors, initial_state=cut.enter(state), output_final_state=wants_state, **options)
        o, state = o.view(*v.shape[:3], -1), cut.leave(state)
    return o[..., :value], state[:, :, :key, :value] if wants_state and state is not None else None


def why_not_gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, **_rest: Any) -> str | None:
    """See `upstream.why_not`; a row must fit into 64 KB."""
    if x.shape[-1] * x.element_size() > _ROW_BYTES:
        return f"a row of {x.shape[-1]} numbers is larger than {_ROW_BYTES // 1024} KB"
    return why_not(FLA, x, gate, weight)


@opaque
def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float, gate_first: bool) -> Tensor:
    """`gated_rms_norm` in either order."""
    if x.numel() == 0:
        return torch.zeros_like(x)
    if gate_first:
        kernel = load("fla.modules.layernorm_gated", "rmsnorm_fn")
        return kernel(x, weight, None, z=gate, eps=eps, norm_before_gate=False)
    return load("fla.modules.fused_norm_gate", "rms_norm_gated")(x, gate, weight, None, activation="swish", eps=eps)


def why_not_fused_linear_cross_entropy(h: Tensor, weight: Tensor, targets: Tensor, **_rest: Any) -> str | None:
    """See `upstream.why_not`. The kernel computes gradients in its forward pass: without a use for them it is a waste."""
    if not needs_gradient(h, weight):
        return "no gradient is wanted, and it would compute them all the same"
    return why_not(FLA, h, weight, targets)


@opaque
def fused_linear_cross_entropy(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(h W^T)[target], without ever holding all logits.

    Args:
        h: `[N, D]`, one row for each token.
        weight: `[V, D]`, the output projection.
        targets: `[N]` int64; -100 counts nothing.

    Returns:
        A float32 scalar. Under autocast h and weight are cast as a linear layer would.
    """
    if targets.numel() == 0:
        return h.float().sum()
    device = h.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(h.dtype, weight.dtype)
    kernel = load("fla.modules.fused_linear_cross_entropy", "fused_linear_cross_entropy_loss")
    with torch.autocast(device, enabled=False):
        return kernel(h.to(dtype), targets, weight.to(dtype), reduction="sum")
