"""Convolution kernels of fla-core (Triton) and of causal-conv1d (CUDA) behind `causal_conv`.

fla's, with its `residual`, is the whole Canon layer in one kernel: residual, bias, activation, what came before, and documents
as `cu_seqlens`. causal-conv1d's has no residual, 2 to 4 taps, and takes either documents (`seq_idx`) or what came before.

Padding: a padded token is zero wherever it is looked at, and does not end the document around it; upstream knows no padding, so
it is zeroed before and the output there is set to what a convolution of zeros gives.

Legend: `B` batch, `T` time, `C` channels, `K` taps, `N` pieces of documents.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from src.components.kernels.upstream import CAUSAL_CONV1D, FLA, load, needs_gradient, opaque, why_not
from src.components.kernels.varlen import filled, pieces

_TAPS = (2, 3, 4)  # that causal-conv1d is compiled for
_CHANNELS = 8  # whose multiples it takes channel by channel


class Remembered(Protocol):
    """A `ConvState`."""

    @property
    def inputs(self) -> Tensor:
        """`[B, K-1, C]`."""
        ...

    @property
    def segments(self) -> Tensor:
        """`[B, K-1]`."""
        ...


def why_not_fla(
    x: Tensor, weight: Tensor, *, bias: Tensor | None, segments: Tensor | None, state: Remembered | None, **_rest: Any
) -> str | None:
    """See `upstream.why_not`."""
    return why_not(FLA, x, weight, bias, segments, None if state is None else state.inputs)


@opaque
def fla(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    activation: str | None,
    residual: bool,
    segments: Tensor | None,
    state: Remembered | None,
) -> Tensor:
    """`causal_conv` by fla's causal_conv1d, or for one token without gradients its update kernel."""
    if x.numel() == 0:
        return torch.zeros_like(x)
    x = _without_padding(x, segments)
    window = _window(x, weight, segments, state)
    shared = {"weight": weight, "bias": bias, "activation": activation}
    if x.shape[1] == 1 and window is not None and not needs_gradient(x, weight, bias, window):
        step = load("fla.modules.convolution", "causal_conv1d_update")
        y, _ = step(x.contiguous(), window, residual=x.contiguous() if residual else None, **shared)
        return _with_padding(y.view_as(x), bias, activation, segments)
    convolve = load("fla.modules.convolution", "causal_conv1d")
    cut = None if segments is None else pieces(segments)
    if cut is None or cut.starts.numel() == x.shape[0] + 1:  # no document begins inside a row
        y, _ = convolve(x, residual=x if residual else None, initial_state=window, **shared)
    else:
        row = x.reshape(1, -1, x.shape[2])
        places = {"cu_seqlens": cut.starts, "cu_seqlens_cpu": cut.starts_cpu, "initial_state": cut.enter(window)}
        y, _ = convolve(row, residual=row if residual else None, **places, **shared)
        y = y.view_as(x)
    return _with_padding(y, bias, activation, segments)


def why_not_causal_conv1d(
    x: Tensor, weight: Tensor, *, bias: Tensor | None, segments: Tensor | None, state: Remembered | None, **_rest: Any
) -> str | None:
    """See `upstream.why_not`; 2 to 4 taps, channels in eights, and not documents and a state at once."""
    if weight.shape[1] not in _TAPS:
        return f"it has {_TAPS[0]} to {_TAPS[-1]} taps, not {weight.shape[1]}"
    if x.shape[2] % _CHANNELS:
        return f"it takes a multiple of {_CHANNELS} channels, not {x.shape[2]}"
    if segments is not None and state is not None:
        return "it takes either documents or what came before, not both"
    return why_not(CAUSAL_CONV1D, x, weight, bias, segments, None if state is None else state.inputs)


@opaque
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    activation: str | None,
    residual: bool,
    segments: Tensor | None,
    state: Remembered | None,
) -> Tensor:
    """`causal_conv` by causal_conv1d_fn, in its layout with channels last; the residual is added afterwards."""
    if x.numel() == 0:
        return torch.zeros_like(x)
    x = _without_padding(x, segments).contiguous()
    # Negative numbers would zero the output; padding before the first document may as well belong to document 0.
    seq_idx = None if segments is None else filled(segments).clamp(min=0).to(torch.int32)
    window = _window(x, weight, segments, state)
    before = None if window is None else window[..., 1:].transpose(1, 2).contiguous().transpose(1, 2)
    convolve = load("causal_conv1d", "causal_conv1d_fn")
    options = {"bias": bias, "seq_idx": seq_idx, "initial_states": before, "activation": activation}
    y = convolve(x.transpose(1, 2), weight, **options).transpose(1, 2)
    return _with_padding(y + x if residual else y, bias, activation, segments)


def _window(x: Tensor, weight: Tensor, segments: Tensor | None, state: Remembered | None) -> Tensor | None:
    """What stands before the first token of each row, `[B, C, K]` in x's dtype: slot 0 is never read, slot K-1 is the latest.

    Tokens of another document than the row's first count as zero.
    """
    if state is None or weight.shape[1] == 1:
        return None
    document = torch.zeros_like(state.segments[:, :1])
    if segments is not None:
        first_real = (segments >= 0).int().argmax(dim=1, keepdim=True)
        document = segments.long().gather(1, first_real)
    linked = (state.segments == document)[..., None]
    return F.pad(torch.where(linked, state.inputs, 0.0).to(x.dtype).transpose(1, 2), (1, 0)).contiguous()


def _without_padding(x: Tensor, segments: Tensor | None) -> Tensor:
    return x if segments is None else x.masked_fill((segments < 0)[..., None], 0.0)


def _with_padding(y: Tensor, bias: Tensor | None, activation: str | None, segments: Tensor | None) -> Tensor:
    if segments is None:
        return y
    padding = (segments < 0)[..., None]
    if bias is None:
        return y.masked_fill(padding, 0.0)
    return torch.where(padding, (F.silu(bias) if activation else bias).to(y.dtype), y)
