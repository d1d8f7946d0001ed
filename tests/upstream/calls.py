"""One random call of each recurrent operation and of the convolution, and two backends held against each other.

Shared by the interpreter's tests on the CPU and the tests on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from src.components.kernels.causal_conv import ConvState, causal_conv
from src.components.kernels.gated_delta_rule import gated_delta_rule
from src.components.kernels.gla import gla
from src.components.kernels.recurrence import RecurrentState
from src.components.kernels.ssd import ssd
from tests.measured import note

Call = dict[str, Any]  # keyword arguments of an operation but for segments, state and backend

OPERATIONS: dict[str, Callable[..., tuple[Tensor, Any]]] = {
    "gla": gla,
    "gated_delta_rule": gated_delta_rule,
    "ssd": ssd,
    "causal_conv": causal_conv,
}

# Documents of a few tokens in rows of 37: padding in front, inside and behind; one row is a single document.
SEGMENTS = [
    [0] * 5 + [1] + [2] * 20 + [3] * 11,
    [-1] * 4 + [7] * 9 + [-1] * 2 + [7] * 3 + [8] * 16 + [-1] * 3,
    [2] * 37,
]


def documents(batch: int, time: int) -> Tensor:
    """`[batch, time]` document numbers out of `SEGMENTS`, continued by their last document."""
    rows = [(row + [max(row)] * time)[:time] for row in SEGMENTS]
    return torch.tensor([rows[i % len(rows)] for i in range(batch)])


def arguments(operation: str, batch: int, time: int, heads: int, key: int, value: int, *, seed: int = 0) -> Call:
    """Random float32 arguments; for the convolution heads * value channels."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    if operation == "gla":
        decay = F.logsigmoid(normal(batch, time, heads, key)) / 2
        q, k, v = normal(batch, time, heads, key), normal(batch, time, heads, key), normal(batch, time, heads, value)
        return {"q": q, "k": k, "v": v, "log_decay": decay}
    if operation == "gated_delta_rule":
        q, k, v = normal(batch, time, heads, key), normal(batch, time, heads, key), normal(batch, time, heads, value)
        decay, beta = F.logsigmoid(normal(batch, time, heads)), normal(batch, time, heads).sigmoid()
        return {"q": q, "k": k, "v": v, "log_decay": decay, "beta": beta}
    if operation == "ssd":
        B, C = normal(batch, time, 1, key), normal(batch, time, 1, key)
        A, D, dt = -normal(heads).exp(), normal(heads), F.softplus(normal(batch, time, heads))
        return {"x": normal(batch, time, heads, value), "dt": dt, "A": A, "B": B, "C": C, "D": D}
    channels = heads * value
    return {"x": normal(batch, time, channels), "weight": normal(channels, 4) / 2}


def state(operation: str, batch: int, heads: int, key: int, value: int) -> Any:
    """Something to start from, of document 0 in the first row, 7 in the second and 2 in the third."""
    g = torch.Generator().manual_seed(5)
    document = torch.tensor([0, 7, 2])[torch.arange(batch) % 3]
    if operation == "causal_conv":
        return ConvState(torch.randn(batch, 3, heads * value, generator=g), document[:, None].expand(-1, 3).clone())
    shape = (value, key) if operation == "ssd" else (key, value)
    return RecurrentState(torch.randn(batch, heads, *shape, generator=g), document)


def outcome(operation: str, call: Call, *, segments: Tensor | None = None, start: Any = None, **options: Any) -> Call:
    """Outputs and all gradients of one call, by name. The call's tensors are left without gradients."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in call.items() if isinstance(v, Tensor)}
    begin = None
    if start is not None:
        leaves["state"] = start[0].detach().clone().requires_grad_()
        begin = start._replace(**{start._fields[0]: leaves["state"]})
    y, end = OPERATIONS[operation](**{**call, **{k: v for k, v in leaves.items() if k != "state"}}, **options,
                                   segments=segments, state=begin)  # fmt: skip
    found = {"output": y}
    if end is not None and operation != "causal_conv":
        found["final"] = end.memory
    g = torch.Generator().manual_seed(9)
    weights = {name: torch.randn(part.shape, generator=g).to(part.device) for name, part in found.items()}
    # Outputs at padding mean nothing: no loss looks at them.
    if segments is not None:
        weights["output"] = weights["output"] * (segments >= 0).view(*segments.shape, *[1] * (y.ndim - 2))
    loss = sum(((weights[name] * part.float()).sum() for name, part in found.items()), torch.zeros((), device=y.device))
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found |= {f"d {name}": grad for name, grad in zip(leaves, gradients, strict=True) if grad is not None}
    if segments is not None:
        found["output"] = found["output"] * (segments >= 0).view(*segments.shape, *[1] * (y.ndim - 2))
    return {name: part.detach() for name, part in found.items()}


def assert_alike(found: Mapping[Any, Tensor], expected: Mapping[Any, Tensor], tolerance: float) -> None:
    """Largest error of each tensor, relative to the largest expected number where that is above 1."""
    assert found.keys() == expected.keys()
    for name, part in expected.items():
        assert found[name].shape == part.shape, name
        error = (found[name].float() - part.float()).abs().max().item()
        largest = max(1.0, part.abs().max().item())
        note(error / largest)
        allowed = tolerance * largest
        assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e}"
