"""Causal softmax attention over queries that are the last T of S positions.

    o_i = sum_{j <= i} softmax_j(q_i . k_j / sqrt(D) + bias_ij) v_j

Shapes: B batch, T queries, S keys (S >= T), H query heads, H_kv key and value heads (query head h uses
key head h // (H / H_kv)), D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal attention through PyTorch's fused ``scaled_dot_product_attention``.

    Args:
        q: ``[B, T, H, D]``.
        k: ``[B, S, H_kv, D]``.
        v: ``[B, S, H_kv, D]``.
        bias: ``[H, T, S]``, added to the scores; -inf hides a key.
        segments: document numbers of the queries ``[B, T]`` and of the keys ``[B, S]``; a query sees only its own.

    Returns:
        ``[B, T, H, D]``.
    """
    num_queries, num_keys = q.shape[1], k.shape[1]
    mask = None
    plain = bias is None and segments is None
    if not plain or 1 < num_queries < num_keys:
        mask = attention_mask(num_queries, num_keys, bias, segments, q)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None and num_queries > 1,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The equation at the head of this file, spelt out; the twin that ``attention`` is tested against."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores_bhts = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    mask = attention_mask(q.shape[1], k.shape[1], bias, segments, q)
    if mask.dtype == torch.bool:
        scores_bhts = scores_bhts.masked_fill(~mask, -torch.inf)
    else:
        scores_bhts = scores_bhts + mask
    return torch.einsum("bhts,bshd->bthd", scores_bhts.softmax(dim=-1), v)


def attention_mask(
    num_queries: int, num_keys: int, bias: Tensor | None, segments: tuple[Tensor, Tensor] | None, like: Tensor
) -> Tensor:
    """Causality, documents and bias in one tensor that broadcasts to ``[B, H, T, S]``.

    Boolean (True = may look) without a bias, else a float of ``like``'s dtype with -inf where nothing may be seen.
    """
    shape = (num_queries, num_keys)
    visible = torch.ones(shape, dtype=torch.bool, device=like.device).tril(num_keys - num_queries)
    if segments is not None:
        queries_bt, keys_bs = segments
        visible = visible & (queries_bt[:, None, :, None] == keys_bs[:, None, None, :])
    if bias is None:
        return visible
    return bias.to(like.dtype).masked_fill(~visible, -torch.inf)
