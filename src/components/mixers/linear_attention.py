"""Linear attention (Katharopoulos et al. 2020, "Transformers are RNNs").

    q, k, v = B(W_qkv u);   phi(x) = elu(x) + 1
    S_t     = S_{t-1} + v_t phi(k_t)^T          n_t = n_{t-1} + phi(k_t)           per head
    y_t     = W_o ( S_t phi(q_t) / (n_t . phi(q_t) + eps) )

Attention with phi(q) . phi(k) in place of exp(q . k): nothing is forgotten, and the memory does not grow. It is computed as the recurrence
of Mamba2 with a decay of 1 and a column of ones beside the values, whose result is the normaliser.

Legend: ``B`` batch, ``T`` time, ``H`` heads, ``K`` head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.components.canon import CanonConfig, canon_at
from src.components.initialization import Initializer
from src.components.kernels.ssd import check_backend, ssd
from src.components.mixers.base import Mixer, State
from src.components.mixers.linear import in_full, remembered


class LinearAttention(Mixer):
    """Normalised linear attention, ``[B, T, dim] -> [B, T, dim]``.

    Args:
        dim: model width.
        canon: Canon configuration; this mixer has point B.
        num_heads: heads H, of width K = dim / H.
        norm_eps: added to the normaliser.
        backend: of the recurrence.
        layer: index of the block, for depth-scaled initialisation.

    Raises:
        ValueError: when heads do not divide the width.
    """

    config_name = "linear_attention"

    def __init__(
        self,
        dim: int,
        canon: CanonConfig,
        *,
        num_heads: int,
        norm_eps: float = 1e-6,
        backend: str = "auto",
        layer: int = 0,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}")
        if norm_eps <= 0:
            raise ValueError(f"norm_eps={norm_eps}: must be positive")
        check_backend(backend)
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.norm_eps, self.backend, self.layer = norm_eps, backend, layer
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.canon_b = canon.at("B", 3 * dim)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(
        self, x: Tensor, *, segments: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """See ``Mixer.forward``. The state holds S and n as one memory ``[B, H, K + 1, K]``, and the last inputs of B."""
        state = None if state is None else dict(state)
        qkv = canon_at("B", self.canon_b, self.qkv_proj(x), segments, state)
        # The normaliser is a sum over the whole past and then a divisor: all of it in full precision.
        q, k, v = (in_full(part) for part in qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(dim=-3))
        one = torch.ones_like(v[..., :1])
        memory = remembered(state, v, self.num_heads, self.head_dim + 1, self.head_dim)
        sums, memory = ssd(
            torch.cat((v, one), dim=-1),
            one.squeeze(-1),
            v.new_zeros(self.num_heads),
            F.elu(k) + 1,
            F.elu(q) + 1,
            segments=segments,
            state=memory,
            backend=self.backend,
        )
        if state is not None:
            state["memory"] = memory
        o = sums[..., :-1] / (sums[..., -1:] + self.norm_eps)
        return self.out_proj(o.flatten(-2).to(qkv.dtype)), state

    def init_weights(self, init: Initializer) -> None:
        """As attention's."""
        init.matrix(self.qkv_proj.weight, self.dim)
        init.matrix(self.out_proj.weight, self.dim, residual_layer=self.layer, cut_before_scaling=True)

    def count_parameters(self) -> int:
        """Projections and Canon-B."""
        return 4 * self.dim**2 + (self.canon_b.count_parameters() if self.canon_b is not None else 0)

    def flops_per_token(self, seq_len: int) -> int:
        """Projections, Canon-B, and the recurrence itself: write (2) and read (2) of each number in the memory."""
        canon = self.canon_b.flops_per_token() if self.canon_b is not None else 0
        return 8 * self.dim**2 + canon + 4 * self.dim * (self.head_dim + 1)

    def state_size(self, seq_len: int) -> int:
        """S, n and the last inputs of B; the same for every ``seq_len``."""
        return self.dim * (self.head_dim + 1) + (self.canon_b.state_size() if self.canon_b is not None else 0)
