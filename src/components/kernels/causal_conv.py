"""Causal depthwise convolution, the heart of the Canon layer and of the linear mixers' short convolutions.

    conv(x)[t, c] = sum_{j=0..K-1} weight[c, j] * x[t - (K-1) + j, c]          x[s] = 0 before the first token
    y             = act(conv(x) + bias)  (+ x with a residual)

so tap K-1 multiplies the current token, as in a depthwise `Conv1d` padded on the left. Canon is K = 4 with the
residual, without bias or activation (*Physics of Language Models, Part 4.1*).

Legend: `B` batch, `T` time, `C` channels, `K` taps.

Documents: with `segments` a tap that falls on a token of another document counts as zero. Tokens with a negative id
are padding: they count as zero for every tap and for the residual, so that left-padded and unpadded runs agree. Where
a state is given too, taps also reach over padding: a document goes on behind it as if it were not there, wherever in
the calls it stands. Without a state nothing is moved, and padding inside a document counts as tokens that are zero.

Backends: `fla` and `causal_conv1d` (CUDA, see causal_conv_upstream.py), `cpu` (float32 and float64 on the CPU,
compiled by Numba, see causal_conv_cpu.py) and `torch`, the twin to check against the equation, which runs everywhere,
also under torch.compile and torch.func, and can be differentiated twice.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from src.components.kernels import causal_conv_upstream as upstream
from src.components.kernels.registry import Operation

_convolve = Operation("causal_conv")
check_backend = _convolve.check_name
_convolve.backend("fla", why_not=upstream.why_not_fla)(upstream.fla)
_convolve.backend("causal_conv1d", why_not=upstream.why_not_causal_conv1d)(upstream.causal_conv1d)


class ConvState(NamedTuple):
    """What a convolution remembers: the last K-1 inputs but for padding, oldest first, and the documents that they belong to."""

    inputs: Tensor  # [B, K-1, C], zero where there was no token yet
    segments: Tensor  # [B, K-1] int64; -1 where there was no token yet, which is in front


def causal_conv_state(
    batch: int,
    channels: int,
    kernel_size: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> ConvState:
    """The state before the first token."""
    return ConvState(
        torch.zeros(batch, kernel_size - 1, channels, dtype=dtype, device=device),
        torch.full((batch, kernel_size - 1), -1, dtype=torch.int64, device=device),
    )


def causal_conv(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    activation: Literal["silu"] | None = None,
    residual: bool = True,
    segments: Tensor | None = None,
    state: ConvState | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ConvState | None]:
    """Convolve a sequence, or the next piece of one: any split into calls that hand on the state equals one call.

    Args:
        x: `[B, T, C]`, floating point; T may be 0.
        weight: `[C, K]`, K >= 1.
        bias: `[C]`, added before the activation.
        activation: None or "silu"; applied to the convolution, not to the residual.
        residual: add x to the result.
        segments: `[B, T]` integer document ids, constant within a document; negative ids mark padding. None puts every
            token in document 0.
        state: what the tokens before x left behind, `causal_conv_state` at the start; None when nothing came before
            and no state is wanted. Gradients flow through it: detach it to cut them.
        backend: "auto" for the fastest that can run, or a name; `used_backends()` tells which ran.

    Returns:
        y `[B, T, C]`, contiguous, in the dtype of x (16-bit inputs are summed in float32), and the state after the last
        token, or None if no state was given. The given state is left as it was.

    Raises:
        TypeError: x or weight is not floating point, or segments are not integers.
        ValueError: a shape or device does not fit, or the activation or the backend does not exist.
        BackendUnavailableError: the backend named cannot run this call.
    """
    _check(x, weight, bias=bias, activation=activation, segments=segments, state=state)
    options = {"bias": bias, "activation": activation, "residual": residual}
    if state is not None and segments is not None and _may_be_padded(segments):
        y, new_state = _around_padding(backend, x, weight, segments=segments, state=state, **options)
    else:
        y = _convolve(backend, x, weight, segments=segments, state=state, **options)
        new_state = None if state is None else _advance(state, x, segments)
    return y.to(x.dtype).contiguous(), new_state


def _may_be_padded(segments: Tensor) -> bool:
    """Whether there is padding; True where the answer would cost waiting for a device, or cannot be had."""
    if segments.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return bool((segments < 0).any())


def _around_padding(
    backend: str, x: Tensor, weight: Tensor, *, segments: Tensor, state: ConvState, **options: Any
) -> tuple[Tensor, ConvState]:
    """Convolves with all padding moved in front of what is remembered and of x, and moves the results back."""
    (time, channels), keep = x.shape[1:], state.inputs.shape[1]
    inputs, ids = _extended(x, segments, state)
    order = (ids >= 0).int().argsort(dim=1, stable=True)
    inputs, ids = inputs.gather(1, order[..., None].expand(-1, -1, channels)), ids.gather(1, order)
    y = _convolve(backend, inputs, weight, segments=ids, state=None, **options)
    y = y.gather(1, order.argsort(dim=1)[:, keep:, None].expand(-1, -1, channels))
    recent = _without_padding(inputs[:, time:], ids[:, time:]).to(state.inputs.dtype)
    return y, ConvState(recent, ids[:, time:].clone())


def _advance(state: ConvState, x: Tensor, segments: Tensor | None) -> ConvState:
    """The state after x, none of it padding: its last K-1 tokens, topped up from the old state where x is shorter."""
    keep = state.inputs.shape[1]
    first = max(0, x.shape[1] - keep)
    ids = x.new_zeros(x.shape[:2], dtype=torch.int64) if segments is None else segments.long()
    recent = x[:, first:].to(state.inputs.dtype)
    added = recent.shape[1]
    return ConvState(
        torch.cat([state.inputs, recent], 1)[:, added:],
        torch.cat([state.segments, ids[:, first:]], 1)[:, added:],
    )


def _without_padding(x: Tensor, segments: Tensor | None) -> Tensor:
    return x if segments is None else x.masked_fill((segments < 0).unsqueeze(-1), 0.0)


def _extended(x: Tensor, segments: Tensor | None, state: ConvState) -> tuple[Tensor, Tensor]:
    """x `[B, K-1+T, C]` and its ids with the remembered tokens in front."""
    ids = x.new_zeros(x.shape[:2], dtype=torch.int64) if segments is None else segments.long()
    return torch.cat([state.inputs.to(x.dtype), x], 1), torch.cat([state.segments, ids], 1)


def _why_not_cpu(
    x: Tensor, weight: Tensor, *, bias: Tensor | None, segments: Tensor | None, **_rest: object
) -> str | None:
    if torch.compiler.is_compiling():
        return 'torch.compile cannot trace it; use backend "torch"'
    if x.device.type != "cpu":
        return f'x is on {x.device.type}; use backend "torch" or move it to the CPU'
    if x.dtype not in (torch.float32, torch.float64):
        return f'x is {x.dtype}, not float32 or float64; use backend "torch" or cast it'
    tensors = [t for t in (x, weight, bias, segments) if t is not None]
    if any(t.dtype != x.dtype for t in tensors if t is not segments):
        return f'x is {x.dtype} but a parameter is not; use backend "torch" or cast it'
    # Fake, distributed and otherwise wrapped tensors have no memory that a compiled kernel could read.
    if any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors):
        return 'it takes plain tensors only; use backend "torch"'
    if torch._C._are_functorch_transforms_active():
        return 'torch.func transforms cannot see through it; use backend "torch"'
    return None


def _then_activated(convolve: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes a backend of a convolution that knows the residual but no activation."""

    def run(
        x: Tensor, weight: Tensor, *, activation: str | None, residual: bool, segments: Tensor | None, **rest: Any
    ) -> Tensor:
        # The residual joins the convolution itself unless an activation stands between the two.
        y = convolve(x, weight, residual=residual and activation is None, segments=segments, **rest)
        if activation is None:
            return y
        return F.silu(y) + _without_padding(x, segments) if residual else F.silu(y)

    return run


@_convolve.backend("cpu", why_not=_why_not_cpu)
@_then_activated
def _cpu(
    x: Tensor, weight: Tensor, *, bias: Tensor | None, residual: bool, segments: Tensor | None, state: ConvState | None
) -> Tensor:
    if x.numel() == 0:
        return _twin(x, weight, bias=bias, residual=residual, segments=segments, state=state)
    from src.components.kernels.causal_conv_cpu import convolve  # imports Numba

    history = 0
    if state is not None:
        history = state.inputs.shape[1]
        x, segments = _extended(x, segments, state)
    return convolve(x, weight, bias, residual, segments)[:, history:]


@_convolve.backend("torch")
@_then_activated
def _torch(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return _twin(x, weight, **options)


def _twin(
    x: Tensor, weight: Tensor, *, bias: Tensor | None, residual: bool, segments: Tensor | None, state: ConvState | None
) -> Tensor:
    """The equation as K shifted multiply-adds; returns the dtype it computes in, at least float32."""
    (time, taps), dtype = (x.shape[1], weight.shape[1]), torch.promote_types(x.dtype, weight.dtype)
    dtype = torch.float32 if dtype.itemsize < 4 else dtype
    x, weight = _without_padding(x, segments).to(dtype), weight.to(dtype)
    ids = None if segments is None else F.pad(segments.long(), (taps - 1, 0), value=-1)
    if state is None:
        padded = F.pad(x, (0, 0, taps - 1, 0))
    else:
        padded, ids = _extended(x, segments, state)
    y = x * weight[:, taps - 1]
    for j in range(taps - 1):
        tap = padded[:, j : j + time]
        if ids is not None:
            linked = ids[:, j : j + time] == ids[:, taps - 1 :]
            tap = torch.where(linked.unsqueeze(-1), tap, 0.0)
        y = torch.addcmul(y, tap, weight[:, j])
    if bias is not None:
        y = y + bias
    return y + x if residual else y


def _check(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    activation: str | None,
    segments: Tensor | None,
    state: ConvState | None,
) -> None:
    if x.ndim != 3:
        raise ValueError(f"x must be [B, T, C]; got shape {tuple(x.shape)}")
    batch, time, channels = x.shape
    if weight.ndim != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(f"weight must be [C, K] = [{channels}, at least 1]; got {tuple(weight.shape)}")
    if not (x.is_floating_point() and weight.is_floating_point()):
        raise TypeError(f"x and weight must be floating point; got {x.dtype} and {weight.dtype}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must be [C] = [{channels}]; got {tuple(bias.shape)}")
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be None or 'silu'; got {activation!r}")
    if segments is not None:
        if segments.is_floating_point() or segments.is_complex() or segments.dtype == torch.bool:
            raise TypeError(f"segments must be integers; got {segments.dtype}")
        if segments.shape != (batch, time):
            raise ValueError(f"segments must be [B, T] = [{batch}, {time}]; got {tuple(segments.shape)}")
    history = weight.shape[1] - 1
    if state is not None and state.inputs.shape != (batch, history, channels):
        wanted = [batch, history, channels]
        raise ValueError(f"state.inputs must be [B, K-1, C] = {wanted}; got {tuple(state.inputs.shape)}")
    if state is not None and (state.segments.shape != (batch, history) or state.segments.dtype != torch.int64):
        got = f"{tuple(state.segments.shape)} of {state.segments.dtype}"
        raise ValueError(f"state.segments must be [B, K-1] = {[batch, history]} of int64; got {got}")
    parts = {"weight": weight, "bias": bias, "segments": segments}
    parts |= {"state": state and state.inputs, "state.segments": state and state.segments}
    for name, part in parts.items():
        if part is not None and part.device != x.device:
            raise ValueError(f"{name} is on {part.device} but x is on {x.device}; move one of them")
