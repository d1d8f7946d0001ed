"""Rows that hold several documents, in the terms of kernels for sequences of varying length.

Such kernels take one row of tokens and the positions where its pieces begin, `cu_seqlens = [0, ..., number of tokens]`. A batch
`[B, T, ...]` becomes one row of B T tokens; a piece begins with each row and wherever the documents of a row change. Counting the pieces
makes the CPU wait for the GPU, so the last counts are kept: all layers of a model see the same documents.

Legend: `B` batch, `T` time, `N` pieces.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Kept(Generic[T]):
    """What was computed of the tensors last asked for, as long as they live and are not written to."""

    def __init__(self, size: int = 4):
        self._entries: deque[tuple[weakref.ref[Tensor], int, T]] = deque(maxlen=size)

    def of(self, tensor: Tensor, compute: Callable[[Tensor], T]) -> T:
        """`compute(tensor)`, or what it returned before. Nothing is kept in inference mode, whose tensors autograd refuses."""
        if torch.is_inference_mode_enabled() or tensor.is_inference() or torch._C._are_functorch_transforms_active():
            return compute(tensor)
        for seen, version, found in self._entries:
            if seen() is tensor and version == tensor._version:
                return found
        found = compute(tensor)
        self._entries.append((weakref.ref(tensor), tensor._version, found))
        return found


class Pieces(NamedTuple):
    """The pieces of a batch of rows, laid end to end."""

    starts: Tensor  # [N + 1] int64, on the device of the tokens: where each piece begins; the last is B T
    starts_cpu: Tensor  # the same on the CPU
    first: Tensor  # [B], the first piece of each row
    last: Tensor  # [B], its last

    def enter(self, memory: Tensor | None) -> Tensor | None:
        """What each piece `[N, ...]` begins with: the first of a row with the row's memory `[B, ...]`, others with zeros."""
        if memory is None:
            return None
        empty = memory.new_zeros(len(self.starts_cpu) - 1, *memory.shape[1:])
        return empty.index_copy(0, self.first, memory)

    def leave(self, memory: Tensor | None) -> Tensor | None:
        """What each row `[B, ...]` ends with: the memory `[N, ...]` of its last piece."""
        return None if memory is None else memory.index_select(0, self.last)


def pieces(numbers: Tensor) -> Pieces:
    """Cuts rows where their numbers `[B, T]`, T >= 1, change. Negative numbers (padding) belong to the piece before them, or after.

    Kept for the tensors last given (`Kept`).
    """
    return _pieces.of(numbers, _cut)


_pieces = Kept[Pieces]()


def filled(numbers: Tensor) -> Tensor:
    """`[B, T]` with each negative number replaced by the latest one at or before it that is not; -1 where there is none."""
    numbers = numbers.long()
    time = torch.arange(numbers.shape[1], device=numbers.device)
    latest = torch.where(numbers >= 0, time, -1).cummax(dim=1).values
    return torch.where(latest >= 0, numbers.gather(1, latest.clamp(min=0)), -1)


def _cut(numbers: Tensor) -> Pieces:
    numbers_bt = numbers.detach().cpu().long()  # the one wait
    batch, time = numbers_bt.shape
    documents = filled(numbers_bt)
    begins = torch.ones(batch, time, dtype=torch.bool)
    begins[:, 1:] = (documents[:, 1:] != documents[:, :-1]) & (documents[:, :-1] >= 0)
    starts = torch.cat((begins.flatten().nonzero().flatten(), torch.tensor([batch * time])))
    last = begins.sum(dim=1).cumsum(dim=0) - 1
    first = torch.cat((torch.zeros(1, dtype=torch.int64), last[:-1] + 1))
    device = numbers.device
    return Pieces(starts.to(device), starts, first.to(device), last.to(device))
