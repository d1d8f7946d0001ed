"""What the recurrent operations share: the state that they carry, and where documents begin.

A recurrence forgets everything where a new document begins, and does not notice padding (negative document numbers): a padded
token neither writes to the memory nor decays it, so the token after it continues the document before it.

Legend: `B` batch, `T` time, `H` heads, `K` key width, `V` value width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from src.components.kernels.varlen import Kept


class RecurrentState(NamedTuple):
    """What a recurrence remembers."""

    memory: Tensor  # [B, H, K, V] (Mamba2: [B, H, P, N]) in float32, or float64 if the inputs are
    segment: Tensor  # [B] int64, the document of the last token; -1 before the first


class Entry(NamedTuple):
    """A call's documents, in the terms that the backends of an operation work with."""

    real: Tensor | None  # [B, T] bool, False on padding; None: all are real
    runs: (
        Tensor | None
    )  # [B, T] int64: 0 where the given memory still counts, one more from each document's first token on; None: all 0
    memory: (
        Tensor | None
    )  # what is remembered at the start, already empty in rows that begin a document; None: no state wanted
    segment: Tensor | None  # [B] the state's new `segment`


def recurrent_state(
    batch: int, *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> RecurrentState:
    """The state before the first token; shape is (H, K, V)."""
    memory = torch.zeros(batch, *shape, dtype=dtype, device=device)
    return RecurrentState(memory, torch.full((batch,), -1, dtype=torch.int64, device=device))


def enter(segments: Tensor | None, state: RecurrentState | None) -> Entry:
    """Compares a call's documents `[B, T]` (None: all tokens belong to document 0) with those of the state."""
    if segments is None:
        if state is None:
            return Entry(None, None, None, None)
        kept = (state.segment == 0) | (state.segment < 0)
        return Entry(None, None, _where(kept, state.memory), torch.zeros_like(state.segment))
    if state is None and not torch.compiler.is_compiling():
        return _in_training.of(segments, _enter)  # the same for every layer
    return _enter(segments, state)


_in_training = Kept[Entry]()


def _enter(segments: Tensor, state: RecurrentState | None = None) -> Entry:
    if segments.shape[1] == 0:
        return Entry(None, None, *(state or (None, None)))
    segments = segments.long()
    real = segments >= 0
    time = torch.arange(segments.shape[1], device=segments.device)
    # The document of the latest real token, at or before each position: padding takes the number of what it follows.
    latest = torch.where(real, time, -1).cummax(dim=1).values
    before = torch.full_like(segments[:, 0], -1) if state is None else state.segment
    filled = torch.where(latest >= 0, segments.gather(1, latest.clamp(min=0)), before[:, None])
    previous = torch.cat((before[:, None], filled[:, :-1]), dim=1)
    starts = (filled != previous) & (previous >= 0)
    # A start before anything else was written in this call empties the memory instead of counting as a run.
    first = torch.cat((torch.zeros_like(real[:, :1]), latest[:, :-1] >= 0), dim=1)
    runs = (starts & first).long().cumsum(dim=1)
    if state is None:
        return Entry(real, runs, None, None)
    emptied = (starts & ~first).any(dim=1)
    return Entry(real, runs, _where(~emptied, state.memory), filled[:, -1])


def restart(memory: Tensor, runs: Tensor | None, t: int) -> Tensor:
    """The memory `[B, ...]` before token t, empty in rows where t begins a document; for step-by-step references."""
    if runs is None or t == 0:
        return memory
    return _where(runs[:, t] == runs[:, t - 1], memory)


def widest(*tensors: Tensor) -> torch.dtype:
    """The dtype that a recurrence computes in: float64 if anything is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _where(rows: Tensor, memory: Tensor) -> Tensor:
    return torch.where(rows.view(-1, *[1] * (memory.ndim - 1)), memory, 0.0)
