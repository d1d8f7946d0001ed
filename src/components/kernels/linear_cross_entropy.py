"""The last matrix product and the loss in one operation, which never holds the logits of all tokens at once.

    l_n = W h_n                        logits, V for each of N targets
    nll = logsumexp(l) - l[target]
    L   = sum_n nll_n + c logsumexp(l_n)^2     `log_z`, the z-loss of Chowdhery et al. 2022
    L   = sum_n nll_n + c nll_n^2              `nll_squared`, what the official release computes under that name

Over 32,000 words the logits outweigh all else that a step stores. L is a sum, so its gradient in the logits needs nothing
from above but a factor: dL/dl = softmax(l) (1 + 2 c logsumexp(l)) - onehot(target), or with nll_squared
(1 + 2 c nll) (softmax(l) - onehot(target)). So the forward takes some rows at a time, adds their share to the gradients of h
and W, and forgets their logits (as Liger Kernel does, Hsu et al. 2024).

Legend: `N` targets, `D` model width, `V` words.

Backends: `fla` (Triton; no penalty, and it does not count right predictions, so that only its name chooses it when they are
wanted), `torch`, in plain PyTorch, and `full`, which writes the equations down and holds all logits, to check against.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from src.components.kernels import fla
from src.components.kernels.registry import Operation

ZLossKind = Literal["log_z", "nll_squared"]

# Logits that the torch backend holds at a time, 32 MiB in float32 on the CPU and 256 on a GPU, whose products want many rows.
CHUNK_CPU, CHUNK_GPU = 2**23, 2**26

_linear_cross_entropy = Operation("linear_cross_entropy")
check_backend = _linear_cross_entropy.check_name


class LinearCrossEntropy(NamedTuple):
    """Sums over all targets."""

    loss: Tensor  # scalar, float32 (float64 if the features are), in nats, penalty included
    right: Tensor | None  # scalar int64: targets to which the model gives the largest logit; None if not counted


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    z_loss: float = 0.0,
    z_loss_kind: ZLossKind = "log_z",
    count_right: bool = True,
    backend: str = "auto",
) -> LinearCrossEntropy:
    """The summed loss of predicting ``targets`` from the features h with the head ``weight``.

    The product runs in autocast's dtype where that is on, the softmax in float32 at least.

    Args:
        h: `[N, D]`; N may be 0.
        weight: `[V, D]`.
        targets: `[N]` int64.
        z_loss: c, the coefficient of the penalty.
        z_loss_kind: which penalty.
        count_right: also count right predictions. "auto" then passes over backends that cannot; one asked for by name does not.
        backend: "auto" for the fastest that can run, or a name.

    Returns:
        Loss and right predictions. The loss can be differentiated once. (Under float16 loss scaling the gradients are computed
        unscaled: use bfloat16.)

    Raises:
        ValueError: a shape or dtype does not fit, or the kind of penalty or the backend does not exist.
        BackendUnavailableError: the backend named cannot run this call.
    """
    if h.ndim != 2 or weight.ndim != 2 or h.shape[1] != weight.shape[1] or targets.shape != h.shape[:1]:
        shapes = f"{tuple(h.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}"
        raise ValueError(f"h, weight and targets must be [N, D], [V, D] and [N]; got {shapes}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64; got {targets.dtype}")
    if z_loss_kind not in ("log_z", "nll_squared"):
        raise ValueError(f"z_loss_kind={z_loss_kind!r}: choose log_z or nll_squared")
    options = {"z_loss": z_loss, "z_loss_kind": z_loss_kind, "count_right": count_right and backend != "fla"}
    return _linear_cross_entropy(backend, h, weight, targets, **options)


def next_token_losses(
    logits: Tensor, targets: Tensor, z_loss: float = 0.0, z_loss_kind: ZLossKind = "log_z"
) -> tuple[Tensor, Tensor]:
    """Loss with penalty, and plain nll, of each target: two tensors `[N]` from logits `[N, V]`, in float32 at least."""
    logits = logits.float() if logits.dtype != torch.float64 else logits
    nll = F.cross_entropy(logits, targets, reduction="none")
    if not z_loss:
        return nll, nll
    penalty = torch.logsumexp(logits, dim=-1).square() if z_loss_kind == "log_z" else nll.square()
    return nll + z_loss * penalty, nll


def _why_not_fla(
    h: Tensor, weight: Tensor, targets: Tensor, *, z_loss: float, count_right: bool, **_: Any
) -> str | None:
    if z_loss:
        return f'it knows no z-loss, here {z_loss}; use backend "torch"'
    if count_right:
        return "it does not count right predictions; ask for it by name to do without"
    return fla.why_not_fused_linear_cross_entropy(h, weight, targets)


@_linear_cross_entropy.backend("fla", why_not=_why_not_fla)
def _fla(h: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> LinearCrossEntropy:
    if not targets.numel():  # upstream's kernel would leave the head without a gradient
        return _chunked(h, weight, targets, **options)
    return LinearCrossEntropy(fla.fused_linear_cross_entropy(h, weight, targets), None)


@_linear_cross_entropy.backend("torch")
def _chunked(
    h: Tensor, weight: Tensor, targets: Tensor, *, z_loss: float, z_loss_kind: ZLossKind, count_right: bool
) -> LinearCrossEntropy:
    device = h.device.type
    autocast = torch.is_autocast_enabled(device) and h.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else h.dtype
    result = _Chunked.apply(h, weight, targets, z_loss, z_loss_kind, count_right, dtype, torch.is_grad_enabled())
    loss, right = result  # type: ignore[misc]
    return LinearCrossEntropy(loss, right if count_right else None)


@_linear_cross_entropy.backend("full")
def _full(
    h: Tensor, weight: Tensor, targets: Tensor, *, z_loss: float, z_loss_kind: ZLossKind, count_right: bool
) -> LinearCrossEntropy:
    logits = F.linear(h, weight)
    loss, _ = next_token_losses(logits, targets, z_loss, z_loss_kind)
    return LinearCrossEntropy(loss.sum(), (logits.argmax(dim=-1) == targets).sum() if count_right else None)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_loss: float,
        z_loss_kind: ZLossKind,
        count_right: bool,
        dtype: torch.dtype,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        loss, right = h.new_zeros((), dtype=wide), targets.new_zeros(())
        grad_h = torch.empty_like(h) if needs_grad and ctx.needs_input_grad[0] else None
        # Added up in float32 at least over the chunks.
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_grad and ctx.needs_input_grad[1] else None
        with torch.autocast(h.device.type, enabled=False):
            low = weight.to(dtype)
            for part in _parts(h.shape[0], weight.shape[0], CHUNK_CPU if h.device.type == "cpu" else CHUNK_GPU):
                features = h[part].to(dtype)
                logits = features @ low.T
                if count_right:
                    right += (logits.argmax(dim=-1) == targets[part]).sum()
                part_loss, grad = _loss_and_gradient(logits.to(wide), targets[part], z_loss, z_loss_kind)
                loss += part_loss
                grad = grad.to(dtype)
                if grad_h is not None:
                    grad_h[part] = grad @ low
                if grad_weight is not None:
                    _add_product(grad_weight, grad, features)
        ctx.save_for_backward(grad_h, grad_weight if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_right: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors)
        return (*grads, None, None, None, None, None, None)


def _parts(rows: int, words: int, logits: int) -> Iterator[slice]:
    size = max(1, logits // words)
    return (slice(start, start + size) for start in range(0, rows, size))


def _loss_and_gradient(logits: Tensor, targets: Tensor, z_loss: float, z_loss_kind: ZLossKind) -> tuple[Tensor, Tensor]:
    """Summed loss of logits [n, V], and its gradient in them; overwrites them."""
    log_z = torch.logsumexp(logits, dim=-1, keepdim=True)
    nll = log_z - logits.gather(1, targets[:, None])
    grad = logits.sub_(log_z).exp_()  # softmax
    ones = torch.ones_like(nll)
    if not z_loss:
        return nll.sum(), grad.scatter_add_(1, targets[:, None], -ones)
    if z_loss_kind == "log_z":
        grad.mul_(1 + 2 * z_loss * log_z)
        return (nll + z_loss * log_z.square()).sum(), grad.scatter_add_(1, targets[:, None], -ones)
    grad.scatter_add_(1, targets[:, None], -ones).mul_(1 + 2 * z_loss * nll)
    return (nll + z_loss * nll.square()).sum(), grad


def _add_product(total: Tensor, grad: Tensor, features: Tensor) -> None:
    """total [V, D] += grad [n, V]^T features [n, D]."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.T, features)
    else:
        total += grad.T @ features
