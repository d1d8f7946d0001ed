"""RMSNorm with a gate, as the linear mixers end with.

norm first    y = x / sqrt(mean(x^2) + eps) * w * silu(gate)              GLA, Gated DeltaNet: mean over a head
gate first    u = x * silu(gate);  y = u / sqrt(mean(u^2) + eps) * w      Mamba2: mean over all heads
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from src.components.kernels import fla, mamba
from src.components.kernels.registry import Operation

_gated_rms_norm = Operation("gated_rms_norm")
_gated_rms_norm.backend("fla", why_not=fla.why_not_gated_rms_norm)(fla.gated_rms_norm)
_gated_rms_norm.backend("mamba_ssm", why_not=mamba.why_not_gated_rms_norm)(mamba.gated_rms_norm)


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, *, eps: float = 1e-5, gate_first: bool = False, backend: str = "auto"
) -> Tensor:
    """Normalises and gates the last dimension.

    Args:
        x: `[..., width]`.
        gate: `[..., width]`, before its SiLU.
        weight: `[width]`, the gain.
        eps: added to the mean square.
        gate_first: gate before the norm (Mamba2) instead of after it.
        backend: "auto" for the fastest that can run, or a name.

    Returns:
        `[..., width]` in x's dtype; computed in float32 at least.
    """
    if gate.shape != x.shape or weight.shape != x.shape[-1:]:
        shapes = f"{tuple(x.shape)}, {tuple(gate.shape)}, {tuple(weight.shape)}"
        raise ValueError(f"x and gate must be [..., width] alike and weight [width]; got {shapes}")
    return _gated_rms_norm(backend, x, gate, weight, eps=eps, gate_first=gate_first).to(x.dtype)


@_gated_rms_norm.backend("torch")
def _twin(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float, gate_first: bool) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, gate, weight = x.to(dtype), F.silu(gate.to(dtype)), weight.to(dtype)
    if gate_first:
        return F.rms_norm(x * gate, weight.shape, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps) * gate
