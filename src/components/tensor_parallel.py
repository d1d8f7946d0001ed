"""Splitting the work of one layer among processes (Shoeybi et al. 2019, "Megatron-LM").

    x                      the same on the n processes of a group
    h = W_in[own rows] x   each its own heads or hidden units
    y = sum over processes of  W_out[own columns] h

Departure: a process computes with a part of each matrix and stores what its strategy gives it to store (under FSDP2 a shard of
all of them), so that checkpoints, optimizers and initial weights are those of the whole model. Gradients are averaged over all
processes by whoever shards the weights; where a process has used a part only, its gradient counts n times, so that this average is
the sum over the group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce


@dataclass(frozen=True)
class TensorGroup:
    """This process's place among those that split layers.

    Args:
        group: the processes.
        rank: this one's number in it.
        size: how many there are.
    """

    group: ProcessGroup
    rank: int
    size: int

    def part(self, whole: int, what: str) -> slice:
        """This process's share of ``whole`` things.

        Raises:
            ValueError: they cannot be shared evenly.
        """
        if whole % self.size:
            raise ValueError(f"{what}={whole} cannot be split among tensor_parallel={self.size} processes")
        each = whole // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def enter(self, x: Tensor) -> Tensor:
        """Into the split part: x as it is; gradients from all processes are added up."""
        return _Enter.apply(x, self)  # type: ignore[no-any-return]

    def leave(self, x: Tensor) -> Tensor:
        """Out of it: the sum over all processes; its gradient goes to each."""
        return _Leave.apply(x, self)  # type: ignore[no-any-return]

    def own(self, weight: Tensor, parts: list[slice], dim: int = 0) -> Tensor:
        """The parts of a weight that this process computes with; see the head of this file for its gradient."""
        chosen = [weight.narrow(dim, part.start, part.stop - part.start) for part in parts]
        picked = chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=dim)
        return _Counted.apply(picked, self.size)  # type: ignore[no-any-return]


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: TensorGroup) -> Tensor:
        ctx.place = place
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous().clone()
        all_reduce(grad, group=ctx.place.group)
        return grad, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: TensorGroup) -> Tensor:
        total = x.contiguous().clone()
        all_reduce(total, group=place.group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, times: int) -> Tensor:
        ctx.times = times
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.times, None
