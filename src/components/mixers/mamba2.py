"""Mamba2 (Dao & Gu 2024, "Transformers are SSMs").

    z, x, B, C, dt = W_in u                            Canon-B on this whole vector, if there is one
    x, B, C        = b(x, B, C)                        b: depthwise convolution with bias, and SiLU; nothing without b
    dt_t           = softplus(dt_t + dt_bias)          one step per head
    h_t            = exp(-dt_t exp(A_log)) h_{t-1} + (dt_t x_t) B_t^T          h in R^{P x N} per head
    y_t            = W_out (RMSNorm((h_t C_t + D x_t) * silu(z_t)))            gate first; the mean over all heads

A Mamba2 block alone has no feed-forward (and twice the blocks); Part 4.1's Mamba2(mlp) and Part 4.2's Mamba2 alternate with a gated one.

Departures from the release: padding does not decay the memory; without b it keeps the unused convolution's weight, as the release does, so
that parameters are counted alike.

Mimetic initialisation (Trockman et al. 2024, "Mimetic Initialization Helps State Space Models Learn to Recall"): the layer starts
as linear attention in which like tokens attend to each other,

    A_log = -8               c = 8: exp(A dt) is about 1, nothing is forgotten
    dt_bias = 0.54, W_dt = 0 softplus(0.54) = 1: all tokens are written alike
    W_C <- (W_B + W_C) / 2   queries resemble keys, so that W_C^T W_B has a positive diagonal
    b's taps = identity      the convolution passes its input through, its bias is 0

Part 4.1 gives c = 8, b_Delta = 0.54 and the convolution as near the identity. That c enters as A = -exp(-c), that W_dt is exactly 0, the
average of W_B and W_C, and taps without noise are our reading of it.

Legend: ``B`` batch, ``T`` time, ``H`` heads, ``P`` head width, ``N`` state width, ``G`` groups of heads that share B and C.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.components.canon import CanonConfig, canon_at
from src.components.canon.config import SHORT_CONVOLUTION_TAPS
from src.components.initialization import Initializer
from src.components.kernels.ssd import check_backend, ssd
from src.components.mixers.base import Mixer, State
from src.components.mixers.linear import in_full, init_A_log, init_dt_bias, remembered, whole
from src.components.norm import GatedRMSNorm

MIMETIC_C, MIMETIC_DT_BIAS = 8.0, 0.54


class Mamba2(Mixer):
    """The state space layer of Mamba2, ``[B, T, dim] -> [B, T, dim]``.

    Args:
        dim: model width.
        canon: Canon configuration; this mixer has points b (on x, B, C) and B (on all of the projection).
        num_heads: heads H.
        state_size: state width N.
        expand: inner width over model width; P = expand dim / H.
        groups: sets of B and C; each serves H / groups heads.
        norm_eps: epsilon of the output norm.
        init: ``default``, or ``mimetic`` (see the head of this file).
        backend: of the recurrence.
        layer: index of the block, for depth-scaled initialisation.

    Raises:
        ValueError: when heads do not divide the inner width or groups do not divide the heads, or for an unknown ``init``.
    """

    config_name = "mamba2"

    def __init__(
        self,
        dim: int,
        canon: CanonConfig,
        *,
        num_heads: int,
        state_size: int,
        expand: int = 2,
        groups: int = 1,
        norm_eps: float = 1e-5,
        init: Literal["default", "mimetic"] = "default",
        backend: str = "auto",
        layer: int = 0,
    ):
        super().__init__()
        if init not in ("default", "mimetic"):
            raise ValueError(f"init={init!r}: choose default or mimetic")
        whole("num_heads", num_heads, whole("groups", groups), "groups")
        check_backend(backend)
        self.dim, self.num_heads, self.groups, self.backend, self.layer = dim, num_heads, groups, backend, layer
        self.init = init
        self.inner_width = whole("expand * dim", expand * dim, num_heads, "num_heads")
        self.head_dim, self.state_dim = self.inner_width // num_heads, whole("state_size", state_size)
        shared = groups * state_size
        self.widths = [self.inner_width, self.inner_width, shared, shared, num_heads]  # z, x, B, C, dt
        self.conv_width = self.inner_width + 2 * shared

        self.in_proj = nn.Linear(dim, sum(self.widths), bias=False)
        self.canon_b = canon.at("B", sum(self.widths))
        self.conv_b = canon.short_convolution(
            self.conv_width,
            bias=True,
            init="identity" if init == "mimetic" else "uniform",
            bias_init="zeros" if init == "mimetic" else "uniform",
        )
        if self.conv_b is None:
            unused = torch.zeros(self.conv_width, 1, SHORT_CONVOLUTION_TAPS)
            self.unused_conv = nn.Parameter(unused, requires_grad=False)
        self.A_log = nn.Parameter(torch.zeros(num_heads))
        self.D = nn.Parameter(torch.ones(num_heads))
        self.dt_bias = nn.Parameter(torch.zeros(num_heads))
        self.norm = GatedRMSNorm(self.inner_width, norm_eps, gate_first=True)
        self.out_proj = nn.Linear(self.inner_width, dim, bias=False)

    def forward(
        self, x: Tensor, *, segments: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """See ``Mixer.forward``. The state holds the memory ``[B, H, P, N]`` and the last inputs of b and B."""
        state = None if state is None else dict(state)
        projected = canon_at("B", self.canon_b, self.in_proj(x), segments, state)
        gate, mixed, dt = projected.split([self.inner_width, self.conv_width, self.num_heads], dim=-1)
        values, keys, queries = canon_at("b", self.conv_b, mixed, segments, state).split(self.widths[1:4], dim=-1)
        memory = remembered(state, values, self.num_heads, self.head_dim, self.state_dim)
        y, memory = ssd(
            values.unflatten(-1, (self.num_heads, self.head_dim)),
            F.softplus(in_full(dt) + in_full(self.dt_bias)),
            -in_full(self.A_log).exp(),
            keys.unflatten(-1, (self.groups, self.state_dim)),
            queries.unflatten(-1, (self.groups, self.state_dim)),
            D=in_full(self.D),
            segments=segments,
            state=memory,
            backend=self.backend,
        )
        if state is not None:
            state["memory"] = memory
        return self.out_proj(self.norm(y.flatten(-2), gate)), state

    def init_weights(self, init: Initializer) -> None:
        """Matrices by the scheme, D = 1; exp(A_log) from U(1, 16), the steps softplus(dt_bias) log-uniform in [0.001, 0.1]."""
        init.matrix(self.in_proj.weight, self.dim)
        init.matrix(self.out_proj.weight, self.inner_width, residual_layer=self.layer)
        init.constant(self.D, 1.0)
        if self.conv_b is None:
            init.constant(self.unused_conv, 0.0)
        if self.init == "mimetic":
            init.constant(self.A_log, -MIMETIC_C)
            init.constant(self.dt_bias, MIMETIC_DT_BIAS)
            with torch.no_grad():
                _, _, keys, queries, dt = self.in_proj.weight.split(self.widths)
                queries.add_(keys).mul_(0.5)
                dt.zero_()
        else:
            init_A_log(init, self.A_log, 1.0, 16.0)
            init_dt_bias(init, self.dt_bias)

    def count_parameters(self) -> int:
        """Projections, A, D and dt's bias, output norm, b (its unused weight where there is no b) and Canon-B."""
        canon = sum(canon.count_parameters() for canon in self._canons())
        unused = SHORT_CONVOLUTION_TAPS * self.conv_width if self.conv_b is None else 0
        projections = self.dim * (sum(self.widths) + self.inner_width)
        return projections + 3 * self.num_heads + self.inner_width + canon + unused

    def flops_per_token(self, seq_len: int) -> int:
        """Projections, convolutions, and the recurrence itself: decay (1), write (2) and read (2) of each number in the memory.

        A chunked kernel does more operations than that, in fewer passes.
        """
        canon = sum(canon.flops_per_token() for canon in self._canons())
        recurrence = 5 * self.inner_width * self.state_dim
        return 2 * self.dim * (sum(self.widths) + self.inner_width) + canon + recurrence

    def state_size(self, seq_len: int) -> int:
        """The memory of all heads, and the last inputs of b and B; the same for every ``seq_len``."""
        return self.inner_width * self.state_dim + sum(canon.state_size() for canon in self._canons())

    def _canons(self) -> list:
        return [canon for canon in (self.conv_b, self.canon_b) if canon is not None]
