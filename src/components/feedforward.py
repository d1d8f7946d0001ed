"""The feed-forward half of a block.

    gated      y = W_out ( act(g) * u ),   [g, u] = D(W_in x)          SwiGLU when act is SiLU (Shazeer 2020)
    standard   y = W_out act(D(W_in x))

Canon-D sees gate and up projections together, before the activation. ReLU^2 after So et al. 2021 (Primer).
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from src.components.canon import CanonConfig, canon_at
from src.components.initialization import Initializer
from src.components.mixers.base import State
from src.components.tensor_parallel import TensorGroup

ACTIVATIONS = {"silu": F.silu, "relu2": lambda x: F.relu(x).square(), "gelu": F.gelu}


class FeedForward(nn.Module):
    """Position-wise feed-forward network, ``[B, T, dim] -> [B, T, dim]``.

    Args:
        dim: model width.
        canon: Canon configuration; this module has point D.
        hidden_dim: inner width I. None: ``default_hidden_dim`` if gated, else 4 dim.
        gated: multiply the activated gate with a second projection.
        activation: ``silu``, ``relu2`` or ``gelu``.
        layer: index of the block, for depth-scaled initialisation.

    Raises:
        ValueError: for an unknown activation or a hidden width below 1.
    """

    config_name = "feedforward"

    def __init__(
        self,
        dim: int,
        canon: CanonConfig,
        *,
        hidden_dim: int | None = None,
        gated: bool = True,
        activation: Literal["silu", "relu2", "gelu"] = "silu",
        layer: int = 0,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r}: choose {', '.join(ACTIVATIONS)}")
        if hidden_dim is None:
            hidden_dim = default_hidden_dim(dim) if gated else 4 * dim
        if hidden_dim < 1:
            raise ValueError(f"hidden_dim={hidden_dim}: at least 1")
        self.dim, self.hidden_dim, self.gated, self.layer = dim, hidden_dim, gated, layer
        self.activation = activation
        self.split: TensorGroup | None = None
        self.in_width = 2 * hidden_dim if gated else hidden_dim
        self.in_proj = nn.Linear(dim, self.in_width, bias=False)
        self.canon_d = canon.at("D", self.in_width)
        self.out_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(
        self, x: Tensor, *, segments: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """Transforms x ``[B, T, dim]``; only Canon-D has memory, so ``segments`` and ``state`` are for it."""
        state = None if state is None else dict(state)
        if self.split is None:
            h = canon_at("D", self.canon_d, self.in_proj(x), segments, state)
            return self.out_proj(self._activated(h)), state
        split, rows = self.split, self._own_units()
        own = partial(split.own, parts=rows)
        h = canon_at("D", self.canon_d, F.linear(split.enter(x), own(self.in_proj.weight)), segments, state, own)
        y = F.linear(self._activated(h), split.own(self.out_proj.weight, rows[:1], dim=1))
        return split.leave(y), state

    def split_over(self, split: TensorGroup) -> None:
        """Has each process of a group compute its share of the hidden units.

        Raises:
            ValueError: they cannot be shared evenly.
        """
        split.part(self.hidden_dim, "feedforward.hidden_dim")
        self.split = split

    def _own_units(self) -> list[slice]:
        """Rows of ``in_proj``: this process's hidden units in the gate, and the same in the up projection."""
        assert self.split is not None
        units = self.split.part(self.hidden_dim, "feedforward.hidden_dim")
        shifted = slice(units.start + self.hidden_dim, units.stop + self.hidden_dim)
        return [units, shifted] if self.gated else [units]

    def _activated(self, h: Tensor) -> Tensor:
        act = ACTIVATIONS[self.activation]
        if self.gated:
            gate, up = h.chunk(2, dim=-1)
            return act(gate) * up
        return act(h)

    def init_weights(self, init: Initializer) -> None:
        """Each matrix by its own fan-in."""
        init.matrix(self.in_proj.weight, self.dim)
        init.matrix(self.out_proj.weight, self.hidden_dim, residual_layer=self.layer)

    def count_parameters(self) -> int:
        """Both matrices and Canon-D."""
        canon = self.canon_d.count_parameters() if self.canon_d is not None else 0
        return self.dim * (self.in_width + self.hidden_dim) + canon

    def flops_per_token(self) -> int:
        """Forward floating-point operations per token in matrices and Canon-D; a multiply-add is two."""
        canon = self.canon_d.flops_per_token() if self.canon_d is not None else 0
        return 2 * self.dim * (self.in_width + self.hidden_dim) + canon

    def state_size(self) -> int:
        """Numbers carried per sequence: Canon-D's last inputs."""
        return self.canon_d.state_size() if self.canon_d is not None else 0


def default_hidden_dim(dim: int, multiple_of: int = 256) -> int:
    """The release's inner width of a gated feed-forward: 8/3 of the model width, rounded up to a multiple of 256."""
    return -(-(2 * 4 * dim // 3) // multiple_of) * multiple_of
