"""Softmax attention (Vaswani et al. 2017), the mixer of the Llama family.

    q, k, v = B(W_qkv x)            optional RMSNorm on q and on k before Canon-B
    o_i     = sum_{j <= i} softmax_j(q_i . k_j / sqrt(D) + bias_ij) v_j
    y       = W_o o

Grouped queries: H_kv key and value heads serve H query heads. The query-key norm spans the whole projected vector, not each head
(as in the official Llama recipes). Canon-B mixes q, k and v together, after that norm and before the rotation.
Departure from the release: ``position`` may also be NoPE or ALiBi, and documents packed into a row can be kept apart.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from src.components.canon import CanonConfig, canon_at
from src.components.initialization import Initializer
from src.components.kernels.attention import attention
from src.components.mixers.base import Mixer, State
from src.components.norm import RMSNorm
from src.components.position import NoPE, RoPE


class Attention(Mixer):
    """Causal self-attention, ``[B, T, dim] -> [B, T, dim]``.

    Args:
        dim: model width.
        canon: Canon configuration; this mixer has point B.
        num_heads: query heads H.
        num_kv_heads: key and value heads H_kv; None for H.
        head_dim: head width D; None for dim / H.
        qk_norm: RMSNorm on the projected queries and keys.
        norm_eps: epsilon of that norm.
        position: one of ``src/components/position.py``.
        layer: index of the block, for depth-scaled initialisation.

    Raises:
        ValueError: when heads do not divide the width, key heads do not divide heads, or the rotated share is no whole number.
    """

    def __init__(
        self,
        dim: int,
        canon: CanonConfig,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        position: NoPE | None = None,
        layer: int = 0,
    ):
        super().__init__()
        if num_heads < 1 or (head_dim is None and dim % num_heads):
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}; choose a divisor or give head_dim")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}")
        self.dim, self.layer = dim, layer
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim or dim // num_heads
        self.position = RoPE() if position is None else position
        self.position.check(num_heads, num_kv_heads, self.head_dim)

        self.q_width, self.kv_width = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.widths = [self.q_width, self.kv_width, self.kv_width]
        self.qkv_proj = nn.Linear(dim, sum(self.widths), bias=False)
        self.q_norm = RMSNorm(self.q_width, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(self.kv_width, norm_eps) if qk_norm else None
        self.canon_b = canon.at("B", sum(self.widths))
        self.out_proj = nn.Linear(self.q_width, dim, bias=False)

    def forward(
        self, x: Tensor, *, segments: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """See ``Mixer.forward``. The state holds all keys and values so far, and the inputs of Canon-B."""
        batch, time = x.shape[:2]
        state = None if state is None else dict(state)
        qkv = self.qkv_proj(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split(self.widths, dim=-1)
            qkv = torch.cat((self.q_norm(q), self.k_norm(k), v), dim=-1)
        q, k, v = canon_at("B", self.canon_b, qkv, segments, state).split(self.widths, dim=-1)
        q = q.view(batch, time, self.num_heads, self.head_dim)
        k = k.view(batch, time, self.num_kv_heads, self.head_dim)
        v = v.view(batch, time, self.num_kv_heads, self.head_dim)

        past = 0 if not state or "keys" not in state else state["keys"].shape[1]
        q, k = self.position.rotate(q, k, offset=past)
        key_segments = segments
        if state is not None:
            k, v, key_segments = self._extend(state, k, v, segments)
        out = attention(
            q,
            k,
            v,
            bias=self.position.bias(self.num_heads, time, past + time, x.device),
            segments=None if segments is None or key_segments is None else (segments, key_segments),
        )
        return self.out_proj(out.reshape(batch, time, self.q_width)), state

    @staticmethod
    def _extend(state: State, k: Tensor, v: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Appends the new keys, values and document numbers to the state; returns all of them."""
        if segments is None:
            segments = torch.zeros(k.shape[:2], dtype=torch.long, device=k.device)
        new = {"keys": k, "values": v, "segments": segments}
        for name, tensor in new.items():
            state[name] = torch.cat((state[name], tensor), dim=1) if name in state else tensor
        return state["keys"], state["values"], state["segments"]

    def init_weights(self, init: Initializer) -> None:
        """All four matrices have the model width as their fan-in, as in the release."""
        init.matrix(self.qkv_proj.weight, self.dim)
        init.matrix(self.out_proj.weight, self.dim, residual_layer=self.layer, cut_before_scaling=True)

    def count_parameters(self) -> int:
        """Projections, norms and Canon-B."""
        norms = (self.q_width + self.kv_width) if self.q_norm is not None else 0
        canon = self.canon_b.count_parameters() if self.canon_b is not None else 0
        return self.dim * (sum(self.widths) + self.q_width) + norms + canon

    def flops_per_token(self, seq_len: int) -> int:
        """Projections, Canon-B, and scores and weighted sum over ``seq_len`` keys (the causal half is not discounted)."""
        projections = 2 * self.dim * (sum(self.widths) + self.q_width)
        canon = self.canon_b.flops_per_token() if self.canon_b is not None else 0
        return projections + canon + 4 * self.q_width * seq_len

    def state_size(self, seq_len: int) -> int:
        """Keys and values of every token, and Canon-B's last inputs."""
        canon = self.canon_b.state_size() if self.canon_b is not None else 0
        return 2 * self.kv_width * seq_len + canon
