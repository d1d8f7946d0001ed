"""Gated DeltaNet (Yang, Kautz & Hatamizadeh 2025, "Gated Delta Networks: Improving Mamba2 with Delta Rule").

    q, k, v = B(b(W_qkv u));   q, k = q / |q|, k / |k|         per head; SiLU instead of b without b
    beta_t  = sigmoid(W_b u_t)                                 writing strength, one per head
    g_t     = -exp(A_log) softplus(W_a u_t + dt_bias)          log-decay, one per head
    S'_t    = exp(g_t) S_{t-1}                                 S in R^{K x V} per head
    S_t     = S'_t + beta_t k_t (v_t - S'_t^T k_t)^T
    y_t     = W_o (RMSNorm(S_t^T q_t K^-1/2) * silu(z_t))      z: output gate, see ``linear.py``

Part 4.1 takes the shape of the fla library, H K = 0.75 d and V = 2 K with a whole output gate; Part 4.2's GDN2 has K = d / H, V = 2 K and
an output gate of rank 16. Both are 6 d^2.

Departure from the release: it trains on sequences of any length (there, of more than 64 tokens only).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.components.canon import CanonConfig
from src.components.initialization import Initializer
from src.components.kernels.gated_delta_rule import check_backend, gated_delta_rule
from src.components.mixers.base import State
from src.components.mixers.linear import LinearMixer, in_full, init_A_log, init_dt_bias, remembered, whole


class GatedDeltaNet(LinearMixer):
    """The gated delta rule as a mixer, ``[B, T, dim] -> [B, T, dim]``.

    Args:
        dim: model width.
        canon: Canon configuration; this mixer has points b and B.
        num_heads: heads H.
        head_dim: key width K of a head; None for dim / H.
        expand_v: value width of a head over its key width, V / K.
        gate_rank: rank of the output gate's matrix; None for a whole one.
        norm_eps: epsilon of the output norm.
        backend: of the recurrence.
        layer: index of the block, for depth-scaled initialisation.

    Raises:
        ValueError: when heads do not divide the width, or ``expand_v`` gives no whole width.
    """

    config_name = "gated_deltanet"

    def __init__(
        self,
        dim: int,
        canon: CanonConfig,
        *,
        num_heads: int,
        head_dim: int | None = None,
        expand_v: float = 2.0,
        gate_rank: int | None = None,
        norm_eps: float = 1e-5,
        backend: str = "auto",
        layer: int = 0,
    ):
        whole("num_heads", num_heads)
        check_backend(backend)
        if head_dim is None and dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}; choose a divisor or give head_dim")
        head_dim = dim // num_heads if head_dim is None else whole("head_dim", head_dim)
        super().__init__(
            dim,
            canon,
            num_heads=num_heads,
            key_dim=head_dim,
            value_dim=whole("expand_v * head_dim", expand_v * head_dim),
            gate_rank=gate_rank,
            qkv_activation="silu",
            split_init=True,
            norm_eps=norm_eps,
            backend=backend,
            layer=layer,
        )
        self.decay_proj = nn.Linear(dim, num_heads, bias=False)
        self.beta_proj = nn.Linear(dim, num_heads, bias=False)
        self.A_log = nn.Parameter(torch.zeros(num_heads))
        self.dt_bias = nn.Parameter(torch.zeros(num_heads))

    def forward(
        self, x: Tensor, *, segments: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """See ``Mixer.forward``. The state holds the memory ``[B, H, K, V]`` and the last inputs of b and B."""
        state = None if state is None else dict(state)
        q, k, v = self.project(x, segments, state)
        beta = torch.sigmoid(in_full(self.beta_proj(x)))
        step = F.softplus(in_full(self.decay_proj(x)) + in_full(self.dt_bias))
        log_decay = -in_full(self.A_log).exp() * step
        memory = remembered(state, q, self.num_heads, self.key_dim, self.value_dim)
        o, memory = gated_delta_rule(q, k, v, log_decay, beta, segments=segments, state=memory, backend=self.backend)
        if state is not None:
            state["memory"] = memory
        return self.output(o, x), state

    def init_weights(self, init: Initializer) -> None:
        """Matrices by the scheme; exp(A_log) from U(0, 16), the steps softplus(dt_bias) log-uniform in [0.001, 0.1]."""
        super().init_weights(init)
        init.matrix(self.decay_proj.weight, self.dim)
        init.matrix(self.beta_proj.weight, self.dim)
        init_A_log(init, self.A_log, 0.0, 16.0)
        init_dt_bias(init, self.dt_bias)

    def count_parameters(self) -> int:
        """Projections, gates, decay, output norm, b and Canon-B."""
        return super().count_parameters() + 2 * self.dim * self.num_heads + 2 * self.num_heads

    def flops_per_token(self, seq_len: int) -> int:
        """Projections, convolutions, and the recurrence: decay (1), look-up (2), write (2) and read (2) of each number in the memory.

        A chunked kernel does more operations than that, in fewer passes.
        """
        decay_and_beta = 4 * self.dim * self.num_heads
        recurrence = 7 * self.num_heads * self.key_dim * self.value_dim
        return super().flops_per_token(seq_len) + decay_and_beta + recurrence
