"""Softmax attention (Vaswani et al. 2017), the mixer of the Llama family.

    q, k, v = B(W_qkv x)            optional RMSNorm on q and on k before Canon-B
    o_i     = sum_{i - window < j <= i} softmax_j(q_i . k_j / sqrt(D) + bias(i - j)) v_j
    y       = W_o o

Grouped queries: H_kv key and value heads serve H query heads. The query-key norm spans the whole projected vector, not each head
(as in the official Llama recipes). Canon-B mixes q, k and v together, after that norm and before the rotation.
Departures from the release: ``position`` may also be NoPE or ALiBi, documents packed into a row can be kept apart, and ``window`` limits
how far back a token sees (Beltagy et al. 2020, "Longformer").

With a state, positions count the real tokens of each row, so that padding on either side of a call changes nothing.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.components.cache import Growing
from src.components.canon import CanonConfig, canon_at
from src.components.initialization import Initializer
from src.components.kernels.attention import Pair, attention, check_backend
from src.components.mixers.base import Mixer, State
from src.components.norm import RMSNorm
from src.components.position import NoPE, RoPE
from src.components.tensor_parallel import TensorGroup


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
        window: a token sees the last ``window`` tokens, itself included; None for all.
        backend: kernel of the attention; ``auto`` takes the fastest that can run.
        layer: index of the block, for depth-scaled initialisation.

    Raises:
        ValueError: when heads do not divide the width, key heads do not divide heads, the rotated share is no whole number, the window
            is below 1, or there is no such backend.
    """

    config_name = "attention"

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
        window: int | None = None,
        backend: str = "auto",
        layer: int = 0,
    ):
        super().__init__()
        if num_heads < 1 or (head_dim is None and dim % num_heads):
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}; choose a divisor or give head_dim")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}")
        if window is not None and window < 1:
            raise ValueError(f"window={window}: at least 1 (the token itself), or null for all tokens")
        check_backend(backend)
        self.dim, self.layer, self.window, self.backend = dim, layer, window, backend
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim or dim // num_heads
        self.position = RoPE() if position is None else position
        self.position.check(num_heads, num_kv_heads, self.head_dim)

        self.split: TensorGroup | None = None
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
        """See ``Mixer.forward``. The state holds the keys and values so far (the last ``window``), and the inputs of Canon-B."""
        batch, time = x.shape[:2]
        state = None if state is None else dict(state)
        share, own = 1, None
        if self.split is None:
            qkv = self.qkv_proj(x)
        else:
            share, own = self.split.size, partial(self.split.own, parts=self._own_rows())
            qkv = F.linear(self.split.enter(x), own(self.qkv_proj.weight))
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split(self.widths, dim=-1)
            qkv = torch.cat((self.q_norm(q), self.k_norm(k), v), dim=-1)
        widths = [width // share for width in self.widths]
        q, k, v = canon_at("B", self.canon_b, qkv, segments, state, own).split(widths, dim=-1)
        q = q.view(batch, time, self.num_heads // share, self.head_dim)
        k = k.view(batch, time, self.num_kv_heads // share, self.head_dim)
        v = v.view(batch, time, self.num_kv_heads // share, self.head_dim)

        positions = _positions(state, segments, time, x.device)
        q, k = self.position.rotate(q, k, positions)
        documents, places = (None if segments is None else (segments, segments)), None
        if state is not None:
            k, v, documents, places = _remember(state, k, v, segments, positions)
        out = attention(
            q,
            k.to(q.dtype),
            v.to(q.dtype),
            window=self.window,
            bias=self.position.bias(self.num_heads),
            segments=documents,
            positions=places,
            backend=self.backend,
        )
        if state is not None and self.window is not None:
            _forget(state, self.window, segments)
        out = out.reshape(batch, time, self.q_width // share)
        if self.split is None:
            return self.out_proj(out), state
        columns = self.split.own(self.out_proj.weight, self._own_rows()[:1], dim=1)
        return self.split.leave(F.linear(out, columns)), state

    def split_over(self, split: TensorGroup) -> None:
        """See ``Mixer.split_over``: heads are independent of each other, but for a norm across them or what tells them apart."""
        split.part(self.num_heads, "num_heads")
        split.part(self.num_kv_heads, "num_kv_heads")
        if self.q_norm is not None:
            raise ValueError("qk_norm=true spans all heads: it cannot be split among processes (tensor_parallel)")
        if self.position.differs_by_head:
            raise ValueError(
                f"{self.position} treats heads differently: they cannot be split among processes (tensor_parallel)"
            )
        self.split = split

    def _own_rows(self) -> list[slice]:
        """Rows of ``qkv_proj`` that are this process's query, key and value heads."""
        assert self.split is not None
        rows, start = [], 0
        for width in self.widths:
            part = self.split.part(width, "width")
            rows.append(slice(start + part.start, start + part.stop))
            start += width
        return rows

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
        """Projections, Canon-B, and scores and weighted sum over ``seq_len`` keys, or the window's (what is not yet there at the start of
        a sequence is not discounted).
        """
        projections = 2 * self.dim * (sum(self.widths) + self.q_width)
        canon = self.canon_b.flops_per_token() if self.canon_b is not None else 0
        return projections + canon + 4 * self.q_width * self._keys(seq_len)

    def state_size(self, seq_len: int) -> int:
        """Keys and values of every token in the window, and Canon-B's last inputs."""
        canon = self.canon_b.state_size() if self.canon_b is not None else 0
        return 2 * self.kv_width * self._keys(seq_len) + canon

    def _keys(self, seq_len: int) -> int:
        return seq_len if self.window is None else min(seq_len, self.window)


# The state: `keys` and `values` [B, S, H_kv, D] and, from the first call with document numbers on, `segments` and `positions` [B, S].
# Without these two, all S tokens are real, of document 0, and in all rows at the places total - S .. total - 1.


def _positions(state: State | None, segments: Tensor | None, time: int, device: torch.device) -> Tensor:
    """Places of the new tokens: `[T]`, or `[B, T]` where rows may differ. Padding behind a real token has the place of that token."""
    keys = None if state is None else state.get("keys")
    total = 0 if keys is None else keys.total
    if state is None or (segments is None and "segments" not in state):
        return torch.arange(total, total + time, device=device)
    last = state["positions"].tensor[:, -1:] if total and "positions" in state else total - 1
    if segments is None:
        return last + torch.arange(1, time + 1, device=device)
    counted = segments >= 0
    if total == 0:
        # Padding in front moves the whole row, which no distance sees; so rows padded on the left keep their columns.
        counted = counted | (counted.cumsum(dim=1) == 0)
    return last + counted.cumsum(dim=1)


def _remember(
    state: State, k: Tensor, v: Tensor, segments: Tensor | None, positions: Tensor
) -> tuple[Tensor, Tensor, Pair | None, Pair | None]:
    """Appends to the state; returns all keys and values, and document numbers and positions of queries and keys if rows may differ."""
    batch, time = k.shape[:2]
    if segments is not None and "segments" not in state and "keys" in state:
        past, total = len(state["keys"]), state["keys"].total
        state["segments"] = Growing.of(torch.zeros(batch, past, dtype=torch.long, device=k.device))
        state["positions"] = Growing.of(torch.arange(total - past, total, device=k.device).repeat(batch, 1))
    new = {"keys": k, "values": v}
    if segments is not None or "segments" in state:
        zeros = torch.zeros(batch, time, dtype=torch.long, device=k.device)
        segments = zeros if segments is None else zeros + segments  # the caller may write to its own
        new |= {"segments": segments, "positions": positions}
    for name, x in new.items():
        # Contiguous: a slice of q, k and v would keep all three alive.
        state[name] = state[name].append(x) if name in state else Growing.of(x.contiguous())
    keys, values = state["keys"].tensor, state["values"].tensor
    if segments is None:
        return keys, values, None, None
    return keys, values, (segments, state["segments"].tensor), (positions, state["positions"].tensor)


def _forget(state: State, window: int, segments: Tensor | None) -> None:
    """Keeps the last ``window`` real tokens of each row; padding, where it came in between, goes to the front."""
    names = [name for name in ("keys", "values", "segments", "positions") if name in state]
    if segments is not None and (segments.device.type != "cpu" or bool((segments < 0).any())):
        order = (state["segments"].tensor >= 0).int().argsort(dim=1, stable=True)[:, -window:]
        for name in names:
            state[name] = state[name].map(lambda x: x.gather(1, _like(order, x)))
    for name in names:
        state[name] = state[name].last(window)


def _like(order: Tensor, x: Tensor) -> Tensor:
    """`[B, S]` repeated over what x `[B, ..., ...]` has behind."""
    return order.view(*order.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
