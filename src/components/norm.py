"""RMSNorm (Zhang & Sennrich 2019): y = x / sqrt(mean(x^2) + eps) * g, statistics in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.components.initialization import Initializer
from src.components.kernels.gated_norm import gated_rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square normalisation of the last dimension, ``[..., width] -> [..., width]`` in x's dtype."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        if eps <= 0:
            raise ValueError(f"norm_eps={eps}: must be positive")
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x ``[..., width]``. The gain multiplies after the cast back to x's dtype."""
        if x.dtype == self.weight.dtype == torch.float32:
            return F.rms_norm(x, (self.width,), self.weight, self.eps)
        normed = F.rms_norm(x.float() if x.dtype != torch.float64 else x, (self.width,), None, self.eps)
        return normed.to(x.dtype) * self.weight.to(x.dtype)

    def init_weights(self, init: Initializer) -> None:
        """Gains start at one."""
        init.constant(self.weight, 1.0)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{self.width}, eps={self.eps}"


class GatedRMSNorm(nn.Module):
    """RMSNorm with a SiLU gate: x and gate ``[..., width] -> [..., width]``, see ``kernels/gated_norm.py``."""

    def __init__(self, width: int, eps: float = 1e-5, *, gate_first: bool = False, backend: str = "auto"):
        super().__init__()
        if eps <= 0:
            raise ValueError(f"norm_eps={eps}: must be positive")
        self.width, self.eps, self.gate_first, self.backend = width, eps, gate_first, backend
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Normalises x and multiplies by silu(gate), in the order of ``gate_first``."""
        options = {"eps": self.eps, "gate_first": self.gate_first}
        return gated_rms_norm(x, gate, self.weight, backend=self.backend, **options)

    def init_weights(self, init: Initializer) -> None:
        """Gains start at one."""
        init.constant(self.weight, 1.0)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{self.width}, eps={self.eps}, gate_first={self.gate_first}"
