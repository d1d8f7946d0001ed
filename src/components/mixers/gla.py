"""Gated linear attention (Yang et al. 2024, "Gated Linear Attention Transformers with Hardware-Efficient Training").

    q, k, v = B(b(W_qkv u));   q, k = phi(q), phi(k)           phi: the identity, or elu + 1
    g_t     = logsigmoid(W_out W_in u_t + c) / 16              one decay per key dimension
    S_t     = diag(exp(g_t)) S_{t-1} + k_t v_t^T               S in R^{K x V} per head
    y_t     = W_o (RMSNorm(S_t^T q_t K^-1/2) * silu(z_t))      z: output gate, see ``linear.py``

Part 4.1 uses the defaults of the fla library (4 heads, K = d / 2H, V = d / H, whole output gate, no activation on q, k, v without b);
Part 4.2's GLA5 has K = d / H, V = 2 d / H, an output gate of rank 16, and SiLU on q, k, v with or without b.

Departures from the release: padding does not decay the memory, and Canon-B may be used (after b or the activation, before phi).
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from src.components.canon import CanonConfig
from src.components.initialization import Initializer
from src.components.kernels.gla import check_backend, gla
from src.components.mixers.base import State
from src.components.mixers.linear import LinearMixer, in_full, low_rank_parameters, remembered, whole


class GLA(LinearMixer):
    """Gated linear attention, ``[B, T, dim] -> [B, T, dim]``.

    Args:
        dim: model width.
        canon: Canon configuration; this mixer has points b and B.
        num_heads: heads H.
        expand_k: key width of all heads over the model width, H K / dim.
        expand_v: value width of all heads over the model width, H V / dim.
        decay_rank: rank of the decay's matrix.
        decay_normalizer: divides the log-decays; the larger, the longer the memory lasts at first.
        gate_rank: rank of the output gate's matrix; None for a whole one.
        qkv_activation: on q, k and v when there is no b, which brings a SiLU of its own.
        feature_map: ``elu`` for elu(x) + 1 on queries and keys, or None.
        split_init: the factors of low-rank matrices start with std sqrt(s) / rank^(1/4), so that their product has the scheme's s
            (GLA5). Otherwise each factor starts like any matrix (fla's default, Part 4.1).
        norm_eps: epsilon of the output norm.
        backend: of the recurrence.
        layer: index of the block, for depth-scaled initialisation.

    Raises:
        ValueError: when heads do not divide the widths, or an option does not exist.
    """

    config_name = "gla"

    def __init__(
        self,
        dim: int,
        canon: CanonConfig,
        *,
        num_heads: int,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        decay_rank: int = 16,
        decay_normalizer: float = 16.0,
        gate_rank: int | None = None,
        qkv_activation: Literal["silu"] | None = None,
        feature_map: Literal["elu"] | None = None,
        split_init: bool = False,
        norm_eps: float = 1e-5,
        backend: str = "auto",
        layer: int = 0,
    ):
        whole("num_heads", num_heads)
        check_backend(backend)
        if qkv_activation not in (None, "silu"):
            raise ValueError(f"qkv_activation={qkv_activation!r}: choose null or silu")
        if feature_map not in (None, "elu"):
            raise ValueError(f"feature_map={feature_map!r}: choose null or elu")
        if decay_normalizer <= 0:
            raise ValueError(f"decay_normalizer={decay_normalizer}: must be positive")
        super().__init__(
            dim,
            canon,
            num_heads=num_heads,
            key_dim=whole("expand_k * dim", expand_k * dim, num_heads, "num_heads") // num_heads,
            value_dim=whole("expand_v * dim", expand_v * dim, num_heads, "num_heads") // num_heads,
            gate_rank=gate_rank,
            qkv_activation=qkv_activation,
            split_init=split_init,
            norm_eps=norm_eps,
            backend=backend,
            layer=layer,
        )
        self.decay_rank, self.decay_normalizer, self.feature_map = decay_rank, decay_normalizer, feature_map
        self.decay_in = nn.Linear(dim, whole("decay_rank", decay_rank), bias=False)
        self.decay_out = nn.Linear(decay_rank, self.key_width)

    def forward(
        self, x: Tensor, *, segments: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """See ``Mixer.forward``. The state holds the memory ``[B, H, K, V]`` and the last inputs of b and B."""
        state = None if state is None else dict(state)
        q, k, v = self.project(x, segments, state)
        if self.feature_map == "elu":
            q, k = F.elu(q) + 1, F.elu(k) + 1
        log_decay = F.logsigmoid(in_full(self.decay_out(self.decay_in(x)))) / self.decay_normalizer
        memory = remembered(state, q, self.num_heads, self.key_dim, self.value_dim)
        o, memory = gla(q, k, v, self.heads(log_decay), segments=segments, state=memory, backend=self.backend)
        if state is not None:
            state["memory"] = memory
        return self.output(o, x), state

    def init_weights(self, init: Initializer) -> None:
        """Matrices by the scheme, the decay's as ``split_init`` says; biases start at zero, decays hence at 2^(-1/16)."""
        super().init_weights(init)
        self.init_low_rank(init, self.decay_in, self.decay_out)

    def count_parameters(self) -> int:
        """Projections, gates, output norm, b and Canon-B."""
        return super().count_parameters() + low_rank_parameters(self.dim, self.decay_rank, self.key_width)

    def flops_per_token(self, seq_len: int) -> int:
        """Projections, convolutions, and the recurrence itself: decay (1), write (2) and read (2) of each number in the memory.

        A chunked kernel does more operations than that, in fewer passes.
        """
        decay = 2 * self.decay_rank * (self.dim + self.key_width)
        return super().flops_per_token(seq_len) + decay + 5 * self.num_heads * self.key_dim * self.value_dim
