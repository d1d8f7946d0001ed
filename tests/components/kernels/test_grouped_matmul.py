import pytest
import torch

from src.components.kernels.grouped_matmul import grouped_matmul
from src.components.kernels.registry import BackendUnavailableError

SIZES = [3, 0, 6, 0, 1, 0]


def problem(k, m, dtype, sizes=SIZES, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), k, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(len(sizes), m, k, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return x, weight, torch.tensor(sizes).cumsum(0).int()


def naive(x, weight, sizes):
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    return torch.stack([weight[g] @ row for g, row in zip(groups, x, strict=True)])


@pytest.mark.parametrize(
    ("backend", "widths", "dtype", "tolerance"),
    [
        ("torch", (5, 7), torch.float64, 1e-12),
        ("torch", (8, 16), torch.float32, 1e-5),
        ("torch", (8, 16), torch.bfloat16, 4e-2),
        ("grouped_mm", (8, 16), torch.float32, 1e-5),
        ("grouped_mm", (8, 16), torch.bfloat16, 4e-2),
    ],
)
def test_equals_one_product_a_row(backend, widths, dtype, tolerance):
    x, weight, ends = problem(widths[0], widths[1], dtype)
    factor = torch.randn(sum(SIZES), widths[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    y = grouped_matmul(x, weight, ends, backend=backend)
    found = (y, *torch.autograd.grad((y * factor).sum(), (x, weight)))
    expected_y = naive(x, weight, SIZES)
    expected = (expected_y, *torch.autograd.grad((expected_y * factor).sum(), (x, weight)))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    assert not found[2][1].any()  # nothing of what was in memory before


def test_gradcheck():
    x, weight, ends = problem(3, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: grouped_matmul(x, w, ends), (x, weight))
    frozen = weight.detach()
    assert torch.autograd.gradcheck(lambda x: grouped_matmul(x, frozen, ends), x)


def test_no_rows():
    x, weight, ends = problem(3, 4, torch.float32, sizes=[0, 0])
    y = grouped_matmul(x, weight, ends)
    assert y.shape == (0, 4)
    y.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_autocast_as_a_linear_layer():
    x, weight, ends = problem(8, 16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_matmul(x, weight, ends)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), naive(x, weight, SIZES), atol=5e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("widths", "dtype", "reason"), [((5, 8), torch.float32, "widths are 5 and 8"), ((8, 8), torch.float64, "float64")]
)
def test_what_grouped_mm_cannot_do_is_said(widths, dtype, reason):
    with pytest.raises(BackendUnavailableError, match=reason):
        grouped_matmul(*problem(widths[0], widths[1], dtype), backend="grouped_mm")


def test_bad_arguments():
    x, weight, ends = problem(3, 4, torch.float32)
    with pytest.raises(ValueError, match=r"\[G, M, K\].*\(10, 3\), \(5, 4, 3\)"):
        grouped_matmul(x, weight[:5], ends)
    with pytest.raises(ValueError, match="int32; got torch.int64"):
        grouped_matmul(x, weight, ends.long())
