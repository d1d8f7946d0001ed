"""What the chunked forms of the recurrences share.

A recurrence S_t = decay_t S_{t-1} + (what token t writes) is cut into chunks of C tokens. Within a chunk every token reads
every earlier one through a C x C matrix of scores, as in attention; between chunks only the memory is handed on, in one
step per chunk. Time and stored activations are linear in T, and nearly all work is matrix products.

With L_i = g_1 + ... + g_i, the logarithm of what a chunk's tokens 1 to i leave of the memory that enters it,

    token i reads the entering memory through        exp(L_i)
    token i reads what token j <= i wrote through    exp(L_i - L_j)
    what token j wrote leaves the chunk through      exp(L_C - L_j)

No exponent is positive, so nothing overflows however fast the memory decays.

Legend: `B` batch, `T` time, `n` chunks, `C` tokens of a chunk, `H` heads.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The log-decay that stands for forgetting everything: its exponential is 0, in float64 too, and sums of it are still numbers.
FORGET = -1000.0


class Decays(NamedTuple):
    """What is left along a chunk, for one decay per head."""

    within: Tensor  # [..., C, C]: exp(L_i - L_j) for j <= i, 0 above the diagonal
    entering: Tensor  # [..., C]: exp(L_i)
    leaving: Tensor  # [..., C]: exp(L_C - L_j)


def chunk_length(time: int, longest: int) -> int:
    """The length of equal chunks, of at most `longest` tokens each, that fill `time >= 1` tokens with the least padding."""
    chunks = -(-time // longest)
    return -(-time // chunks)


def chunked(x: Tensor, length: int) -> Tensor:
    """`[B, T, ...]` -> `[n, B, C, ...]`; zeros fill up the last chunk."""
    missing = -x.shape[1] % length
    if missing:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing))
    return x.unflatten(1, (-1, length)).transpose(0, 1)


def chunked_heads(x: Tensor, length: int) -> Tensor:
    """`[B, T, H, ...]` -> `[n, B, H, C, ...]`, contiguous, so that a chunk is as well; zeros fill up the last chunk."""
    return chunked(x, length).transpose(2, 3).contiguous()


def unchunked_heads(chunks: Tensor, time: int) -> Tensor:
    """`[n, B, H, C, ...]` -> `[B, T, H, ...]`."""
    return chunks.permute(1, 0, 3, 2, *range(4, chunks.ndim)).flatten(1, 2)[:, :time]


def run_starts(runs: Tensor) -> Tensor:
    """`[B, T]` bool: where a run (see `Entry`) begins. The first token of a call never begins one."""
    return F.pad(runs[:, 1:] != runs[:, :-1], (1, 0))


def forgetting(log_decay: Tensor, runs: Tensor | None) -> Tensor:
    """Log-decays `[B, T, H]` that are finite, and that leave nothing where a run begins."""
    log_decay = log_decay.clamp(min=FORGET)
    return log_decay if runs is None else log_decay.masked_fill(run_starts(runs)[..., None], FORGET)


def negligible(dtype: torch.dtype) -> float:
    """What decays at most this far counts as gone: 1e-19 in float32.

    A fraction so small of what tokens write and read is lost in the sums of their neighbours, but its products with other
    small numbers would be denormal, and the CPU multiplies matrices with denormal numbers a hundred times slower.
    """
    return math.sqrt(torch.finfo(dtype).tiny)


def decays(log_decay: Tensor) -> Decays:
    """Of log-decays `[..., C]`, finite and at most 0."""
    # Powers of 2, because exp on the CPU is a hundred times slower as well where its result is denormal.
    log_decay = log_decay * (1.0 / math.log(2.0))
    # A float32 cannot tell -64000.1 from -64000.102, and the difference of two such sums is what counts. So they are kept in
    # two parts; the second, what the first rounds away, follows the first and needs no gradient.
    exact = (log_decay if log_decay.device.type == "mps" else log_decay.double()).cumsum(-1)
    total = exact.to(log_decay.dtype)
    rest = (exact - total).to(log_decay.dtype).detach()
    length, least = total.shape[-1], math.log2(negligible(total.dtype))
    # Above the diagonal the differences are positive; they are masked before they become powers.
    future = torch.full((length, length), -torch.inf, dtype=total.dtype, device=total.device).triu(1)
    within = (total[..., :, None] - total[..., None, :]).add_(rest[..., :, None]).sub_(rest[..., None, :]).add_(future)
    leaving = (total[..., -1:] - total) + (rest[..., -1:] - rest)
    return Decays(*(F.threshold(x, least, -torch.inf).exp2() for x in (within, total, leaving)))
