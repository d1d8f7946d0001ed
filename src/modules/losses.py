"""Next-token loss on the targets of a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from src.components.kernels.linear_cross_entropy import (
    LinearCrossEntropy,
    check_backend,
    linear_cross_entropy,
    next_token_losses,
)

# From how many logits on, and on a GPU from how many words, `fused: auto` avoids holding all logits.
MANY_LOGITS, MANY_WORDS = 2**24, 2**14


@dataclass(frozen=True)
class NextTokenLoss:
    """Negative log-likelihood, in float32, with an optional penalty that keeps the logits small.

        nll + coefficient * log^2 Z       ``log_z``, the z-loss of Chowdhery et al. 2022 (Z = sum of exponentiated logits)
        nll + coefficient * nll^2         ``nll_squared``, what the official release computes under that name

    Args:
        z_loss: the coefficient; 1e-4 in the recipes that use it, 0 for none.
        z_loss_kind: ``log_z`` or ``nll_squared``.
        fused: compute the training loss together with the head, without ever holding all logits. The same loss and gradients
            up to rounding. ``auto``: where there would be more than 2^24 logits, and on a GPU from 16,384 words on. The name
            of a backend (``torch``, ...) means always, on that backend. Evaluation looks at logits anyway.
    """

    config_name = "next_token_loss"

    z_loss: float = 0.0
    z_loss_kind: Literal["log_z", "nll_squared"] = "log_z"
    fused: bool | str = "auto"

    def __post_init__(self) -> None:
        if self.z_loss < 0:
            raise ValueError(f"loss.z_loss={self.z_loss}: at least 0")
        if self.z_loss_kind not in ("log_z", "nll_squared"):
            raise ValueError(f"loss.z_loss_kind={self.z_loss_kind!r}: choose log_z or nll_squared")
        if isinstance(self.fused, str):
            try:
                check_backend(self.fused)
            except ValueError as error:
                raise ValueError(f"loss.fused={self.fused!r}: true, false, or a backend; {error}") from None

    def __call__(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss with penalty, and plain negative log-likelihood, of each target.

        Args:
            logits: ``[N, V]``.
            targets: ``[N]`` int64.

        Returns:
            Two float32 tensors ``[N]``, in nats.
        """
        return next_token_losses(logits, targets, self.z_loss, self.z_loss_kind)

    def is_fused(self, num_targets: int, vocab_size: int, device: torch.device) -> bool:
        """Whether ``of_features`` is to be used for so many targets and words."""
        if self.fused == "auto":
            return num_targets * vocab_size > MANY_LOGITS or (device.type == "cuda" and vocab_size >= MANY_WORDS)
        return bool(self.fused)

    def of_features(self, h: Tensor, weight: Tensor, targets: Tensor) -> LinearCrossEntropy:
        """Loss with penalty, summed over all targets, and right predictions, if the backend counts them.

        Args:
            h: ``[N, D]``, the features of which ``h @ weight.T`` are the logits.
            weight: ``[V, D]``.
            targets: ``[N]`` int64.
        """
        backend = self.fused if isinstance(self.fused, str) else "auto"
        return linear_cross_entropy(
            h, weight, targets, z_loss=self.z_loss, z_loss_kind=self.z_loss_kind, backend=backend
        )
