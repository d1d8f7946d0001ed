"""Kernels of mamba-ssm (Triton, CUDA) behind `ssd` and `gated_rms_norm`.

The package's `__init__` is never run (see `upstream.load`), so a build without CUDA code will do.

Legend: `B` batch, `T` time, `H` heads, `P` head width, `N` state width, `G` groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from src.components.kernels.upstream import MAMBA, load, needs_gradient, opaque, why_not

CHUNK = 256  # tokens, a power of two; upstream's default
_SMALLEST_CHUNK = 16
_ROW_BYTES = 65536  # that a norm kernel holds at once


def why_not_ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None, memory: Tensor | None, **_rest: Any
) -> str | None:
    """See `upstream.why_not`."""
    return why_not(MAMBA, x, dt, A, B, C, D, memory)


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
    """`ssd` by mamba_chunk_scan_combined, or for one token without gradients selective_state_update.

    x, B and C are multiplied in their common dtype, and states go from chunk to chunk in it; dt, A, D and the memory are float32.
    """
    if x.numel() == 0 or B.numel() == 0:
        return torch.zeros_like(x), memory
    dtype = torch.promote_types(torch.promote_types(x.dtype, B.dtype), C.dtype)
    x, B, C = x.to(dtype), B.to(dtype), C.to(dtype)
    # A view into a wide projection would make the kernels' 32-bit offsets overflow (state-spaces/mamba issue 1016).
    dt, A = dt.float().contiguous(), A.float()
    D = None if D is None else D.float()
    memory = None if memory is None else memory.float()
    if x.shape[1] == 1 and not needs_gradient(x, dt, A, B, C, D, memory):
        return _step(x, dt, A, B, C, D, memory)
    scan = load("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    chunk = min(CHUNK, max(_SMALLEST_CHUNK, 1 << (x.shape[1] - 1).bit_length()))
    # A row begins in run 0 and its memory counts for that run only, which is what the kernel takes `seq_idx` to say.
    seq_idx = None if runs is None else runs.to(torch.int32).contiguous()
    options = {"D": D, "initial_states": memory, "seq_idx": seq_idx, "return_final_states": memory is not None}
    found = scan(x, dt, A, B, C, chunk, **options)
    return (found, None) if memory is None else found


def _step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, memory: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token. Expanded strides of zero tell the kernel that the channels of a head share dt, A and D."""
    update = load("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")
    heads, width, state_size = *x.shape[2:], B.shape[-1]
    # The kernel writes the new state over the old one, which is the caller's.
    state = x.new_zeros(len(x), heads, width, state_size, dtype=torch.float32) if memory is None else memory.clone()
    D = A.new_zeros(heads) if D is None else D
    per_channel = {"D": D[:, None].expand(heads, width), "dt_bias": A.new_zeros(heads, 1).expand(heads, width)}
    dt, A = dt[:, 0, :, None].expand(-1, -1, width), A[:, None, None].expand(heads, width, state_size)
    y = update(state, x[:, 0].contiguous(), dt, A, B[:, 0].contiguous(), C[:, 0].contiguous(), **per_channel)
    return y[:, None], state


def why_not_gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, **_rest: Any) -> str | None:
    """See `upstream.why_not`; a row must fit into 64 KB."""
    if x.shape[-1] * x.element_size() > _ROW_BYTES:
        return f"a row of {x.shape[-1]} numbers is larger than {_ROW_BYTES // 1024} KB"
    return why_not(MAMBA, x, gate, weight)


@opaque
def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float, gate_first: bool) -> Tensor:
    """`gated_rms_norm` in either order."""
    if x.numel() == 0:
        return torch.zeros_like(x)
    kernel = load("mamba_ssm.ops.triton.layernorm_gated", "rmsnorm_fn")
    return kernel(x, weight, None, z=gate, eps=eps, norm_before_gate=not gate_first)
