"""What the linear mixers share.

Those with heads of keys and values, GLA and Gated DeltaNet, differ in the recurrence alone:

    q, k, v = B(b(W_qkv u))                 b: a depthwise convolution and SiLU; without it the family's own activation
    y       = W_o (RMSNorm(o) * silu(z))    o: what the recurrence reads; RMSNorm over a head, one gain for all heads
    z       = W_g u,  or of low rank  G_out G_in u + c

Legend: ``B`` batch, ``T`` time, ``H`` heads, ``K`` key width of a head, ``V`` value width of a head.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.components.canon import CanonConfig, canon_at
from src.components.initialization import Initializer
from src.components.kernels.recurrence import RecurrentState, recurrent_state, widest
from src.components.mixers.base import Mixer, State
from src.components.norm import GatedRMSNorm


class LinearMixer(Mixer):
    """The projections in front of a recurrence and the gated output behind it; a subclass adds decay and recurrence.

    Args:
        dim: model width.
        canon: Canon configuration; such a mixer has points b and B, both on q, k and v together.
        num_heads: heads H.
        key_dim: key width K of a head.
        value_dim: value width V of a head.
        gate_rank: rank of the output gate's matrix; None for a whole one.
        qkv_activation: what b's SiLU is replaced by without b.
        split_init: matrices of low rank start so that their product, not each factor, has the scheme's standard deviation.
        norm_eps: epsilon of the output norm.
        backend: of the recurrence, see ``src/components/kernels``.
        layer: index of the block, for depth-scaled initialisation.
    """

    def __init__(
        self,
        dim: int,
        canon: CanonConfig,
        *,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        gate_rank: int | None,
        qkv_activation: Literal["silu"] | None,
        split_init: bool,
        norm_eps: float,
        backend: str,
        layer: int,
    ):
        super().__init__()
        self.dim, self.num_heads, self.key_dim, self.value_dim = dim, num_heads, key_dim, value_dim
        self.gate_rank, self.qkv_activation, self.split_init = gate_rank, qkv_activation, split_init
        self.backend, self.layer = backend, layer
        self.key_width, self.value_width = num_heads * key_dim, num_heads * value_dim
        self.widths = [self.key_width, self.key_width, self.value_width]
        self.qkv_proj = nn.Linear(dim, sum(self.widths), bias=False)
        self.conv_b = canon.short_convolution(sum(self.widths))
        self.canon_b = canon.at("B", sum(self.widths))
        if gate_rank is None:
            self.gate_proj = nn.Linear(dim, self.value_width, bias=False)
        else:
            self.gate_in = nn.Linear(dim, whole("gate_rank", gate_rank), bias=False)
            self.gate_out = nn.Linear(gate_rank, self.value_width)
        self.norm = GatedRMSNorm(value_dim, norm_eps)
        self.out_proj = nn.Linear(self.value_width, dim, bias=False)

    def project(self, x: Tensor, segments: Tensor | None, state: State | None) -> tuple[Tensor, Tensor, Tensor]:
        """q and k ``[B, T, H, K]`` and v ``[B, T, H, V]``; the state is updated in place."""
        qkv = self.qkv_proj(x)
        if self.conv_b is not None:
            qkv = canon_at("b", self.conv_b, qkv, segments, state)
        elif self.qkv_activation == "silu":
            qkv = F.silu(qkv)
        q, k, v = canon_at("B", self.canon_b, qkv, segments, state).split(self.widths, dim=-1)
        return self.heads(q), self.heads(k), self.heads(v)

    def heads(self, x: Tensor) -> Tensor:
        """``[B, T, H * width] -> [B, T, H, width]``."""
        return x.unflatten(-1, (self.num_heads, -1))

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        """``[B, T, dim]`` from what the heads read, o ``[B, T, H, V]``, and the mixer's input x ``[B, T, dim]``."""
        gate = self.gate_proj(x) if self.gate_rank is None else self.gate_out(self.gate_in(x))
        return self.out_proj(self.norm(o, self.heads(gate)).flatten(-2))

    def init_weights(self, init: Initializer) -> None:
        """The shared matrices by the scheme; biases start at zero."""
        init.matrix(self.qkv_proj.weight, self.dim)
        init.matrix(self.out_proj.weight, self.value_width, residual_layer=self.layer)
        if self.gate_rank is None:
            init.matrix(self.gate_proj.weight, self.dim)
        else:
            self.init_low_rank(init, self.gate_in, self.gate_out)

    def init_low_rank(self, init: Initializer, inner: nn.Linear, outer: nn.Linear) -> None:
        """The two factors of a matrix of low rank, as ``split_init`` says."""
        for factor in (inner, outer):
            if self.split_init:
                init.factor(factor.weight, self.dim, inner.out_features)
            else:
                init.matrix(factor.weight, factor.in_features)
        init.constant(outer.bias, 0.0)

    def count_parameters(self) -> int:
        """What is shared; a subclass adds its decay."""
        gate = self.dim * self.value_width
        if self.gate_rank is not None:
            gate = low_rank_parameters(self.dim, self.gate_rank, self.value_width)
        canon = sum(canon.count_parameters() for canon in self._canons())
        return self.dim * (sum(self.widths) + self.value_width) + gate + self.value_dim + canon

    def flops_per_token(self, seq_len: int) -> int:
        """Projections and convolutions, the same for every ``seq_len``; a subclass adds its decay and recurrence."""
        rank = self.gate_rank
        gate = self.dim * self.value_width if rank is None else rank * (self.dim + self.value_width)
        canon = sum(canon.flops_per_token() for canon in self._canons())
        return 2 * (self.dim * (sum(self.widths) + self.value_width) + gate) + canon

    def state_size(self, seq_len: int) -> int:
        """The memory of all heads, and the last inputs of b and B; the same for every ``seq_len``."""
        canon = sum(canon.state_size() for canon in self._canons())
        return self.num_heads * self.key_dim * self.value_dim + canon

    def _canons(self) -> list:
        return [canon for canon in (self.conv_b, self.canon_b) if canon is not None]


def remembered(state: State | None, x: Tensor, *shape: int) -> RecurrentState | None:
    """The recurrence's state that a mixer's state holds, an empty one at the start, None in training.

    Args:
        state: the mixer's.
        x: ``[B, ...]``, whose device and precision the memory takes (float64, else float32).
        shape: of one row's memory.
    """
    if state is None:
        return None
    return state.get("memory") or recurrent_state(x.shape[0], *shape, dtype=widest(x), device=x.device)


def in_full(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64: decays are multiplied over thousands of tokens and bear no rounding."""
    return x if x.dtype == torch.float64 else x.float()


def init_dt_bias(init: Initializer, bias: Tensor) -> None:
    """Sets b such that softplus(b) is log-uniform in [0.001, 0.1], as Mamba and Gated DeltaNet start their steps."""

    def draw(values: Tensor, generator: torch.Generator) -> None:
        low, high = math.log(1e-3), math.log(1e-1)
        dt = values.uniform_(low, high, generator=generator).exp_().clamp_(min=1e-4)
        values.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    init.fill(bias, draw)


def init_A_log(init: Initializer, A_log: Tensor, low: float, high: float) -> None:
    """Sets the logarithm of numbers drawn from U(low, high)."""

    def draw(values: Tensor, generator: torch.Generator) -> None:
        # Float32 draws exactly 0 once in 2^24; its logarithm would be infinite.
        values.uniform_(low, high, generator=generator).clamp_(min=1e-6).log_()

    init.fill(A_log, draw)


def whole(name: str, value: float, of: int = 1, divisor: str = "") -> int:
    """``value`` as an integer, if it is a positive multiple of ``of``, which the message calls ``divisor``.

    Raises:
        ValueError: it is not; the message begins with ``name``.
    """
    number = round(value)
    if abs(value - number) > 1e-6 or number < 1 or number % of:
        wanted = (
            "a positive whole number" if of == 1 else f"a positive multiple of {divisor}{'=' if divisor else ''}{of}"
        )
        raise ValueError(f"{name}={value:g}: must be {wanted}")
    return number


def low_rank_parameters(inputs: int, rank: int, outputs: int) -> int:
    """Parameters of two factors, the second with a bias."""
    return rank * (inputs + outputs) + outputs
