"""A matrix product for each group of rows, as the experts of a mixture need.

    y[r] = weight[g] x[r]      for the rows r of group g: ends[g-1] <= r < ends[g]

Legend: `N` rows, `G` groups, `K` inner width, `M` outer width.

Backends: `grouped_mm` is PyTorch's own (16- and 32-bit floats, one kernel, never waits for the group sizes); `torch` is
the twin, one product after another, for every width and dtype, and no slower on the CPU from some tens of rows a group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from src.components.kernels.registry import AUTO, Operation
from src.components.kernels.upstream import opaque

_grouped_matmul = Operation("grouped_matmul")


def grouped_matmul(x: Tensor, weight: Tensor, ends: Tensor, *, backend: str = "auto") -> Tensor:
    """Multiplies each row with the matrix of its group.

    Args:
        x: `[N, K]`, rows sorted by group; N may be 0.
        weight: `[G, M, K]`, for each group a matrix laid out as in `nn.Linear`.
        ends: `[G]` int32, where each group ends; not decreasing, the last is N. Groups may be empty.
        backend: "auto" for the fastest that can run, or a name.

    Returns:
        `[N, M]` in x's dtype, or in autocast's where that is on, as a linear layer would return.

    Raises:
        ValueError: a shape or dtype does not fit.
        BackendUnavailableError: the backend named cannot run this call.
    """
    groups = weight.shape[0]
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2] or ends.shape != (groups,):
        shapes = f"{tuple(x.shape)}, {tuple(weight.shape)}, {tuple(ends.shape)}"
        raise ValueError(f"x, weight and ends must be [N, K], [G, M, K] and [G]; got {shapes}")
    if ends.dtype != torch.int32:
        raise ValueError(f"ends must be int32; got {ends.dtype}")
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    if backend == AUTO and device == "cpu":
        backend = "torch"
    return _grouped_matmul(backend, x.to(dtype), weight.to(dtype), ends)


def _why_not_grouped_mm(x: Tensor, weight: Tensor, _ends: Tensor) -> str | None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f'x is {x.dtype}; use backend "torch" or cast it'
    if torch.compiler.is_compiling() and x.dtype != torch.bfloat16:
        return f'torch.compile traces it in bfloat16 only and x is {x.dtype}; use backend "torch"'
    widths = (*weight.shape[1:], x.shape[1])
    if any(width * x.element_size() % 16 for width in widths):
        return f"its rows must be multiples of 16 bytes; the widths are {weight.shape[2]} and {weight.shape[1]}"
    if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 10:
        return "on Blackwell the gradient of a group without rows is not zero (PyTorch issue 172439)"
    return None


@_grouped_matmul.backend("grouped_mm", why_not=_why_not_grouped_mm)
def _grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=ends)


@_grouped_matmul.backend("torch")
@opaque
def _twin(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    result = _Looped.apply(x, weight, ends)
    assert isinstance(result, Tensor)
    return result


class _Looped(torch.autograd.Function):
    """One product for each group that has rows; slicing under autograd would cost a third more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        stops = ends.tolist()
        ctx.groups = [(g, a, b) for g, (a, b) in enumerate(zip([0, *stops], stops, strict=False)) if b > a]
        ctx.save_for_backward(x, weight)
        y = x.new_empty(x.shape[0], weight.shape[1])
        for g, a, b in ctx.groups:
            torch.mm(x[a:b], weight[g].T, out=y[a:b])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for g, a, b in ctx.groups:
            if grad_x is not None:
                torch.mm(grad[a:b], weight[g], out=grad_x[a:b])
            if grad_weight is not None:
                torch.mm(grad[a:b].T, x[a:b], out=grad_weight[g])
        return grad_x, grad_weight, None
