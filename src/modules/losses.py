"""Next-token loss on the targets of a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class NextTokenLoss:
    """Negative log-likelihood, in float32, with an optional penalty that keeps the logits small.

        nll + coefficient * log^2 Z       ``log_z``, the z-loss of Chowdhery et al. 2022 (Z = sum of exponentiated logits)
        nll + coefficient * nll^2         ``nll_squared``, what the official release computes under that name

    Args:
        z_loss: the coefficient; 1e-4 in the recipes that use it, 0 for none.
        z_loss_kind: ``log_z`` or ``nll_squared``.
    """

    z_loss: float = 0.0
    z_loss_kind: Literal["log_z", "nll_squared"] = "log_z"

    def __post_init__(self) -> None:
        if self.z_loss < 0:
            raise ValueError(f"loss.z_loss={self.z_loss}: at least 0")
        if self.z_loss_kind not in ("log_z", "nll_squared"):
            raise ValueError(f"loss.z_loss_kind={self.z_loss_kind!r}: choose log_z or nll_squared")

    def __call__(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss with penalty, and plain negative log-likelihood, of each target.

        Args:
            logits: ``[N, V]``.
            targets: ``[N]`` int64.

        Returns:
            Two float32 tensors ``[N]``, in nats.
        """
        logits = logits.float() if logits.dtype != torch.float64 else logits
        nll = F.cross_entropy(logits, targets, reduction="none")
        if not self.z_loss:
            return nll, nll
        penalty = torch.logsumexp(logits, dim=-1).square() if self.z_loss_kind == "log_z" else nll.square()
        return nll + self.z_loss * penalty, nll
