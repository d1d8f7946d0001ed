"""What attention knows about order: rotary, ALiBi, Hard-ALiBi, or nothing.

    RoPE        q_i . k_j depends on i - j: pairs of coordinates are rotated by the angle  t * theta^(-2i/r)
    RoPE(1/4)   only part of the head dimension and/or of the heads rotates (Part 4.1 section 3: half of the heads with half of
                their dimensions; a quarter of the heads; all heads with a quarter of their dimensions)
    ALiBi       adds -2^(-8h/H) (i - j) to the score of head h = 1..H          (Press et al. 2022)
    Hard-ALiBi  head h = 1..H/2 sees the nearest h tokens, the other heads see all   (Jelassi et al. 2024)
    NoPE        nothing: order enters through the causal mask alone

Every class here is a small frozen description without parameters; attention asks it to rotate queries and keys and for
a bias on the scores. All of them are relative: only differences of positions matter. Shapes: B batch, T queries, S keys, H heads,
D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

# Distances i - j [..., T, S] -> what is added to the scores [..., H, T, S].
Bias = Callable[[Tensor], Tensor]


class NoPE:
    """No position information; also the interface that the others fill in."""

    config_name = "nope"

    @property
    def differs_by_head(self) -> bool:
        """Whether heads are treated differently, so that which head is which matters."""
        return False

    def check(self, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        """Raises a ValueError when this scheme cannot serve heads of that number and width."""

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Transforms q ``[B, T, H, D]`` and k ``[B, T, H_kv, D]`` at integer positions ``[T]``, or ``[B, T]`` if rows differ."""
        return q, k

    def bias(self, num_heads: int) -> Bias | None:
        """What to add to the scores, as a function of distances i - j, or None.

        The function maps integers ``[..., T, S]`` to ``[..., H, T, S]``, -inf where a head may not look; distance 0 is never hidden.
        Attention calls it on the pieces that it works on, so that nothing as large as T times S need exist.
        """
        return None


@dataclass(frozen=True)
class RoPE(NoPE):
    """Rotary position embedding (Su et al. 2021), on all or on part of the heads and dimensions.

    Args:
        theta: base of the frequencies theta^(-2i/r), with r the rotated width of a head.
        pairing: ``adjacent`` rotates coordinates (2i, 2i+1) (the training tree), ``half_split`` (i, i + r/2) (Hugging Face).
        heads: share of the heads that rotate, counted from the first.
        dims: share of each head's dimensions that rotate, counted from the first.
    """

    config_name = "rope"

    theta: float = 10_000.0
    pairing: Literal["adjacent", "half_split"] = "adjacent"
    heads: float = 1.0
    dims: float = 1.0

    def __post_init__(self) -> None:
        if self.pairing not in ("adjacent", "half_split"):
            raise ValueError(f"position.pairing={self.pairing!r}: choose adjacent or half_split")
        for name in ("heads", "dims"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"position.{name}={getattr(self, name)}: a share in (0, 1]; position=nope rotates nothing"
                )
        if self.theta <= 0:
            raise ValueError(f"position.theta={self.theta}: must be positive")

    @property
    def differs_by_head(self) -> bool:
        """Where only some of the heads rotate."""
        return self.heads < 1

    def check(self, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        """The rotated shares must come out as whole heads and an even number of dimensions."""
        width = self.dims * head_dim  # 30/88 of 88 is not quite 30
        if abs(width - round(width)) > 1e-6 or round(width) % 2:
            raise ValueError(f"position.dims={self.dims} of head_dim={head_dim} is {width:g}: must be an even number")
        for name, count in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            if self.heads * count != int(self.heads * count):
                raise ValueError(f"position.heads={self.heads} of {name}={count} is not a whole number of heads")

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotates the chosen part of q and k, in float32, and casts back."""
        r = round(self.dims * q.shape[-1])
        # In float32 the angle of position 16,000 is off by 1e-3; Apple's GPUs know nothing better.
        precise = torch.float32 if q.device.type == "mps" else torch.float64
        frequency = self.theta ** (-torch.arange(0, r, 2, device=q.device, dtype=precise) / r)
        angle = positions.to(precise)[..., None] * frequency
        cos, sin = angle.cos(), angle.sin()  # [T, r/2] or [B, T, r/2]
        return self._rotate(q, cos, sin, r), self._rotate(k, cos, sin, r)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor, r: int) -> Tensor:
        rotating_heads = int(self.heads * x.shape[2])
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        cos, sin = cos.to(dtype)[..., None, :], sin.to(dtype)[..., None, :]  # [T, 1, r/2] or [B, T, 1, r/2]
        part = x[:, :, :rotating_heads, :r].to(dtype)
        if self.pairing == "adjacent":
            a, b = part[..., 0::2], part[..., 1::2]
            turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
        else:
            a, b = part.chunk(2, dim=-1)
            turned = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
        turned = turned.to(x.dtype)
        if r < x.shape[-1]:
            turned = torch.cat((turned, x[:, :, :rotating_heads, r:]), dim=-1)
        if rotating_heads < x.shape[2]:
            turned = torch.cat((turned, x[:, :, rotating_heads:]), dim=2)
        return turned


@dataclass(frozen=True)
class ALiBi(NoPE):
    """Attention with linear biases; slope of head h = 1..H is 2^(-8h/H)."""

    config_name = "alibi"

    @property
    def differs_by_head(self) -> bool:
        """Always."""
        return True

    def bias(self, num_heads: int) -> Bias:
        """-slope * distance."""
        return partial(_linear, num_heads)


@dataclass(frozen=True)
class HardALiBi(NoPE):
    """Head h of the first half sees the nearest h tokens, itself included; the second half sees everything."""

    config_name = "hard_alibi"

    @property
    def differs_by_head(self) -> bool:
        """Always."""
        return True

    def check(self, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        """Half of the heads must be a whole number."""
        if num_heads % 2:
            raise ValueError(f"position=hard_alibi needs an even number of heads, got num_heads={num_heads}")

    def bias(self, num_heads: int) -> Bias:
        """0 where a head may look, -inf elsewhere."""
        return partial(_nearest, num_heads)


def _linear(num_heads: int, distance: Tensor) -> Tensor:
    slope_h = 2.0 ** (-8.0 * torch.arange(1, num_heads + 1, device=distance.device) / num_heads)
    return -slope_h[:, None, None] * distance.unsqueeze(-3)


def _nearest(num_heads: int, distance: Tensor) -> Tensor:
    head_h = torch.arange(1, num_heads + 1, device=distance.device)[:, None, None]
    hidden = (head_h <= num_heads // 2) & (distance.unsqueeze(-3) >= head_h)
    return torch.zeros(hidden.shape, device=distance.device).masked_fill_(hidden, -torch.inf)
