import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from src.components.kernels import fla
from src.components.kernels import linear_cross_entropy as module
from src.components.kernels.linear_cross_entropy import linear_cross_entropy, next_token_losses
from src.components.kernels.registry import BackendUnavailableError

D, V = 12, 31
PENALTIES = [{}, {"z_loss": 0.3}, {"z_loss": 0.3, "z_loss_kind": "nll_squared"}]


def problem(targets, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    h, weight = (torch.randn(n, D, generator=g, dtype=torch.float64).to(dtype) for n in (targets, V))
    return h.requires_grad_(), weight.requires_grad_(), torch.randint(V, (targets,), generator=g)


@pytest.fixture(autouse=True)
def seven_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_CPU", 7 * V + 3)


def losses_and_gradients(h, weight, targets, factor=1.0, **options):
    loss, right = linear_cross_entropy(h, weight, targets, **options)
    (loss * factor).backward()
    found = [loss.detach(), h.grad, weight.grad]
    h.grad = weight.grad = None
    return found, right


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
@pytest.mark.parametrize("targets", [1, 6, 7, 8, 33])
def test_equals_the_equations(targets, penalty):
    """In float64, for numbers of rows that chunks of seven divide and do not."""
    inputs = problem(targets)
    found, right = losses_and_gradients(*inputs, factor=0.37, backend="torch", **penalty)
    expected, expected_right = losses_and_gradients(*inputs, factor=0.37, backend="full", **penalty)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    assert right == expected_right


def test_the_equations_by_hand():
    h, weight, targets = problem(9)
    p = torch.softmax(h @ weight.T, dim=-1)
    nll = -p[torch.arange(9), targets].log()
    log_z = (h @ weight.T).exp().sum(dim=-1).log()
    for penalty, extra in zip(PENALTIES, (0, 0.3 * log_z**2, 0.3 * nll**2), strict=True):
        loss, right = linear_cross_entropy(h, weight, targets, backend="full", **penalty)
        torch.testing.assert_close(loss, (nll + extra).sum())
        assert right == (p.argmax(dim=-1) == targets).sum()


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_gradcheck(penalty):
    h, weight, targets = problem(9)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, backend="torch", **penalty).loss, (h, weight)
    )


def test_float32_is_close():
    inputs = problem(200, torch.float32)
    found, _ = losses_and_gradients(*inputs, factor=1 / 200, backend="torch")
    expected, _ = losses_and_gradients(*inputs, factor=1 / 200, backend="full")
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < 1e-6 * b.norm()


@pytest.mark.parametrize("backend", ["torch", "full"])
def test_no_targets(backend):
    """Loss zero, and gradients of zero rather than none: distributed training waits for every parameter's."""
    found, right = losses_and_gradients(*problem(0), backend=backend)
    assert found[0] == 0
    assert right == 0
    assert found[1].shape == (0, D)
    assert found[2].shape == (V, D)
    assert not found[2].any()


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_wanted(needed):
    h, weight, targets = problem(20)
    expected, _ = losses_and_gradients(h, weight, targets, backend="full")
    for tensor, needs in zip((h, weight), needed, strict=True):
        tensor.requires_grad_(needs)
    loss = linear_cross_entropy(h, weight, targets).loss
    assert loss.requires_grad == any(needed)
    if any(needed):
        loss.backward()
    for tensor, grad, needs in zip((h, weight), expected[1:], needed, strict=True):
        if needs:
            torch.testing.assert_close(tensor.grad, grad)
        else:
            assert tensor.grad is None
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(h, weight, targets).loss, expected[0])


def test_two_backward_passes_give_the_same():
    h, weight, targets = problem(20)
    loss = linear_cross_entropy(h, weight, targets).loss
    first = torch.autograd.grad(3 * loss, (h, weight), retain_graph=True)
    second = torch.autograd.grad(3 * loss, (h, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class LargestTensor(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize(("backend", "largest"), [("torch", 300 * 2), ("full", 300 * V)])
def test_never_all_logits(backend, largest):
    """With features so narrow that logits outweigh all else, the features remain the largest tensor."""
    h, weight, targets = problem(300)
    h, weight = (tensor.detach()[:, :2].requires_grad_() for tensor in (h, weight))
    with LargestTensor() as mode:
        linear_cross_entropy(h, weight, targets, backend=backend).loss.backward()
    assert mode.largest == largest


def test_bf16_autocast_as_a_linear_layer():
    inputs = problem(40, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, right = losses_and_gradients(*inputs, backend="torch")
        expected, expected_right = losses_and_gradients(*inputs, backend="full")
    exact, _ = losses_and_gradients(*inputs, backend="full")
    assert [t.dtype for t in found] == [torch.float32] * 3
    assert right == expected_right
    torch.testing.assert_close(found[0], expected[0])
    assert not torch.equal(found[0], exact[0])  # the product did run in bfloat16
    for a, b, c in zip(found, expected, exact, strict=True):
        assert (a - c).norm() <= 1.2 * (b - c).norm() + 1e-6
        assert (a - b).norm() < 1e-2 * b.norm()


def test_bf16_parameters_are_summed_in_float32():
    """Many chunks: adding up in bfloat16 would lose what is small against the sum."""
    h, weight, targets = problem(2000, torch.bfloat16)
    found, _ = losses_and_gradients(h, weight, targets, backend="torch")
    wide = [t.detach().double().requires_grad_() for t in (h, weight)]
    exact, _ = losses_and_gradients(wide[0], wide[1], targets, backend="full")
    assert found[2].dtype == torch.bfloat16
    assert (found[2].double() - exact[2]).norm() < 4e-3 * exact[2].norm()


def test_fla_is_chosen_by_name_only_and_counts_nothing(monkeypatch):
    def stand_in(h, weight, targets):
        if not len(h):
            return h.sum()
        return F.cross_entropy(h @ weight.T, targets, reduction="sum")

    monkeypatch.setattr(fla, "fused_linear_cross_entropy", stand_in)
    monkeypatch.setattr(fla, "why_not_fused_linear_cross_entropy", lambda *_: None)
    inputs = problem(20)
    expected, count = losses_and_gradients(*inputs, backend="full")
    found, right = losses_and_gradients(*inputs, backend="fla")
    assert right is None
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert linear_cross_entropy(*inputs).right == count
    assert linear_cross_entropy(*inputs, count_right=False).right is None
    nothing, _ = losses_and_gradients(*problem(0), backend="fla")
    assert nothing[2].shape == (V, D)
    with pytest.raises(BackendUnavailableError, match=r"no z-loss, here 0\.1"):
        linear_cross_entropy(*inputs, z_loss=0.1, backend="fla")


def test_fla_says_what_is_missing():
    with pytest.raises(BackendUnavailableError, match="need a CUDA device"):
        linear_cross_entropy(*problem(5, torch.float32), backend="fla")


def test_bad_arguments():
    h, weight, targets = problem(5)
    with pytest.raises(ValueError, match=r"must be \[N, D\].*\(5, 12\), \(31, 12\), \(4,\)"):
        linear_cross_entropy(h, weight, targets[:4])
    with pytest.raises(ValueError, match="int64; got torch.int32"):
        linear_cross_entropy(h, weight, targets.int())
    with pytest.raises(ValueError, match="z_loss_kind='log'"):
        linear_cross_entropy(h, weight, targets, z_loss_kind="log")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no backend 'fast'"):
        linear_cross_entropy(h, weight, targets, backend="fast")


def test_losses_of_each_target():
    h, weight, targets = problem(5)
    loss, nll = next_token_losses(h @ weight.T, targets, 0.2)
    torch.testing.assert_close(loss.sum(), linear_cross_entropy(h, weight, targets, z_loss=0.2).loss)
    torch.testing.assert_close(nll.sum(), linear_cross_entropy(h, weight, targets).loss)
