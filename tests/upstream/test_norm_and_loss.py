"""Upstream's gated norms and fused linear cross-entropy, run on the CPU by Triton's interpreter, against PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from src.components.kernels import BackendUnavailableError, fla
from src.components.kernels.gated_norm import gated_rms_norm
from src.components.kernels.linear_cross_entropy import linear_cross_entropy

TOLERANCE = 2e-4


def gradients(function, *tensors):
    leaves = [part.clone().requires_grad_() for part in tensors]
    y = function(*leaves)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return [y, *torch.autograd.grad((y * weights).sum(), leaves)]


@pytest.mark.parametrize("backend", ["fla", "mamba_ssm"])
@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("shape", [(2, 7, 3, 12), (5, 600)])
def test_gated_norms(backend, gate_first, shape):
    torch.manual_seed(0)
    tensors = torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])
    found, expected = (
        gradients(
            lambda *args, name=name: gated_rms_norm(*args, eps=1e-3, gate_first=gate_first, backend=name), *tensors
        )
        for name in (backend, "torch")
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("backend", ["fla", "mamba_ssm"])
def test_gated_norms_of_nothing_and_of_too_much(backend):
    assert gated_rms_norm(torch.zeros(0, 8), torch.zeros(0, 8), torch.ones(8), backend=backend).shape == (0, 8)
    wide = torch.zeros(1, 20_000)
    with pytest.raises(BackendUnavailableError, match="20000 numbers is larger than 64 KB"):
        gated_rms_norm(wide, wide, wide[0], backend=backend)


def loss_of_torch(h, weight, targets):
    return F.cross_entropy(h @ weight.T, targets, ignore_index=-100, reduction="sum")


def test_fused_linear_cross_entropy():
    torch.manual_seed(0)
    h, weight, targets = torch.randn(30, 16), torch.randn(50, 16), torch.randint(50, (30,))
    targets[::7] = -100
    found, expected = (
        gradients(lambda h, weight, loss=loss: loss(h, weight, targets), h, weight)
        for loss in (fla.fused_linear_cross_entropy, loss_of_torch)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=TOLERANCE)


def test_fused_linear_cross_entropy_as_a_backend():
    torch.manual_seed(0)
    h, weight, targets = torch.randn(30, 16), torch.randn(50, 16), torch.randint(50, (30,))
    found, expected = (
        gradients(lambda h, weight, name=name: linear_cross_entropy(h, weight, targets, backend=name).loss, h, weight)
        for name in ("fla", "full")
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=TOLERANCE)


def test_fused_linear_cross_entropy_of_no_tokens():
    h, weight = torch.randn(0, 16, requires_grad=True), torch.randn(50, 16)
    loss = fla.fused_linear_cross_entropy(h, weight, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0


def test_fused_linear_cross_entropy_without_gradients_is_left_to_others():
    tensors = torch.randn(3, 16), torch.randn(50, 16), torch.zeros(3, dtype=torch.long)
    assert "no gradient is wanted" in str(fla.why_not_fused_linear_cross_entropy(*tensors))
