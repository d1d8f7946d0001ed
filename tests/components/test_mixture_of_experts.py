import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from src.build import build_model
from src.components.canon import CanonConfig
from src.components.initialization import Initializer
from src.components.mixture_of_experts import MixtureOfExperts

D, E = 8, 5
ACT = {"silu": F.silu, "relu2": lambda h: F.relu(h) ** 2, "gelu": F.gelu}
# Left padding, two documents, padding at the end.
SEGMENTS = torch.tensor([[-1, -1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1]])


def experts(dtype=torch.float64, *, spread=1.0, **options):
    """A mixture whose router, unlike a new one's, has an opinion."""
    settings: dict[str, Any] = {"num_experts": E} | options
    module = MixtureOfExperts(D, CanonConfig(), **settings)
    module.init_weights(Initializer(module, seed=1))
    torch.nn.init.normal_(module.router.weight, 0, spread, generator=torch.Generator().manual_seed(2))
    return module.to(dtype)


def tokens(batch=2, time=12, dtype=torch.float64, seed=0):
    return torch.randn(batch, time, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive(module, x, segments=None):
    """Token by token: output, balance loss, and which (row, time, expert) were dropped."""
    y, dropped, shares, chances = torch.zeros_like(x), [], torch.zeros(E, dtype=x.dtype), []
    for row in range(x.shape[0]):
        real = [t for t in range(x.shape[1]) if segments is None or segments[row, t] >= 0]
        room = [math.inf] * E
        if module.training and module.capacity_factor is not None:
            room = [math.ceil(module.capacity_factor * module.top_k * len(real) / E)] * E
        for t in real:
            p = torch.softmax(module.router.weight @ x[row, t], dim=0)
            chances.append(p)
            for e in p.argsort(descending=True)[: module.top_k].tolist():
                shares[e] += 1
                room[e] -= 1
                if room[e] < 0:
                    dropped.append((row, t, e))
                    continue
                h = module.in_proj[e] @ x[row, t]
                act = ACT[module.activation]
                h = act(h[: module.hidden_dim]) * h[module.hidden_dim :] if module.gated else act(h)
                y[row, t] = y[row, t] + p[e] * (module.out_proj[e] @ h)
    balance = E * (shares / shares.sum() * torch.stack(chances).mean(dim=0)).sum()
    return y, balance, dropped


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "padded"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gated": True, "hidden_dim": 6},
        {"activation": "relu2", "top_k": 2},
        {"activation": "gelu", "top_k": E},
        {"capacity_factor": 0.7},
        {"capacity_factor": 1.0, "top_k": 3, "gated": True},
    ],
    ids=str,
)
def test_equals_a_loop_over_tokens(options, segments):
    """Values and gradients, the balance loss's included, in training; and nothing is dropped in evaluation."""
    module = experts(**options)
    for training in (True, False):
        module.train(training)
        x = tokens().requires_grad_()
        y, state = module(x, segments=segments)
        assert state is None
        expected, balance, dropped = naive(module, x, segments)
        torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)
        factor = tokens(seed=3)
        found, wanted = (y * factor).sum(), (expected * factor).sum()
        if training:
            assert module.auxiliary_loss is not None
            torch.testing.assert_close(module.auxiliary_loss, 0.01 * balance)
            found, wanted = found + 50 * module.auxiliary_loss, wanted + 0.5 * balance
            if "capacity_factor" in options:
                assert dropped
                total = module.top_k * (24 if segments is None else int((segments >= 0).sum()))
                assert module.statistics["dropped"].item() == pytest.approx(len(dropped) / total)
        else:
            assert not dropped
        leaves = [x, *module.parameters()]
        grads = zip(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves), strict=True)
        for a, b in grads:
            torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def test_capacity_keeps_the_earliest_tokens_of_each_row():
    """Equal tokens all want the same expert; ceil(1.25 * 8 / 5) = 2 of a row find room."""
    module = experts(capacity_factor=1.25)
    x = tokens(1, 1).expand(3, 8, D).clone()
    y, _ = module(x)
    assert y[:, :2].abs().sum(dim=-1).min() > 0
    assert not y[:, 2:].any()
    assert module.statistics["dropped"] == 0.75
    assert module.statistics["largest_load"] == E
    alone, _ = module(x[:1])
    assert torch.equal(alone, y[:1])  # the other rows do not compete
    # A whole number stays one: 1.1 * 50 / 5 = 11, though not in binary fractions.
    module = experts(capacity_factor=1.1)
    y, _ = module(tokens(1, 1).expand(1, 50, D))
    assert y.abs().sum(dim=-1).gt(0).sum() == 11


def test_no_token_is_displaced_by_a_later_one():
    module = experts(capacity_factor=0.5)
    x, changed = tokens(2, 20), tokens(2, 20)
    changed[:, 13:] = tokens(2, 7, seed=5)
    assert torch.equal(module(x)[0][:, :13], module(changed)[0][:, :13])


def test_in_evaluation_a_token_sees_itself_only():
    """So prefill, decoding and any batch agree with the full forward."""
    module, x = experts(capacity_factor=0.1, top_k=2), tokens()
    module(x)
    full, _ = module.eval()(x)
    assert module.auxiliary_loss is None
    assert module.statistics == {}
    given: dict = {}
    for t in range(x.shape[1]):
        step, state = module(x[:, t : t + 1], state=given)
        torch.testing.assert_close(step, full[:, t : t + 1])
        assert state == {}
        assert state is not given


def test_padding_takes_no_room_gives_zero_and_is_not_counted():
    module = experts(capacity_factor=1.0)
    x = tokens(1, 9)
    alone, _ = module(x)
    balance = module.statistics["balance_loss"]
    padded = torch.cat([x[:, :1].expand(1, 6, D), x], dim=1)
    segments = torch.tensor([[-1] * 6 + [0] * 9])
    y, _ = module(padded, segments=segments)
    torch.testing.assert_close(y[:, 6:], alone)
    assert not y[:, :6].any()
    torch.testing.assert_close(module.statistics["balance_loss"], balance)
    nothing, _ = module(x, segments=torch.full((1, 9), -1))
    assert not nothing.any()
    assert module.statistics["balance_loss"] == 0


def test_balance_loss_of_the_extremes():
    """1 for a router without preference, E when one expert gets everything."""
    undecided = experts(spread=0.0)
    undecided(tokens())
    torch.testing.assert_close(undecided.statistics["balance_loss"], torch.tensor(1.0, dtype=torch.float64))
    decided = experts(spread=0.0)
    with torch.no_grad():
        decided.router.weight[3] = 1e3
    decided(tokens().abs())
    torch.testing.assert_close(decided.statistics["balance_loss"], torch.tensor(float(E), dtype=torch.float64))
    assert decided.statistics["largest_load"] == E


def test_without_coefficient_there_is_nothing_to_add():
    module = experts(balance_coefficient=0.0)
    module(tokens())
    assert module.auxiliary_loss is None
    assert module.statistics["balance_loss"] > 1


def test_balancing_balances():
    """Descending the auxiliary loss alone evens out the load."""
    module = experts(balance_coefficient=1.0)
    with torch.no_grad():
        module.router.weight[0] += 1
    x, loads = tokens(8, 64) + 1, []
    for _ in range(150):
        module(x)
        assert module.auxiliary_loss is not None
        (grad,) = torch.autograd.grad(module.auxiliary_loss, module.router.weight)
        loads.append(module.statistics["largest_load"].item())
        with torch.no_grad():
            module.router.weight -= 0.5 * grad
    assert loads[-1] < 1.4 < 2 < loads[0]


def test_recomputed_activations_give_the_same_gradients():
    module = experts(capacity_factor=1.0)
    found = []
    for recompute in (False, True):
        x = tokens().requires_grad_()
        y, _ = checkpoint(module, x, use_reentrant=False) if recompute else module(x)
        assert module.auxiliary_loss is not None
        loss = y.square().sum() + module.auxiliary_loss
        found.append(torch.autograd.grad(loss, [x, *module.parameters()]))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_bf16_routes_in_float32():
    module = experts(torch.float32).eval()
    x = tokens(dtype=torch.float32)
    full, _ = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, _ = module(x)
    assert low.dtype == torch.bfloat16
    # Same input, so the same expert and gate for every token: only the experts' own products are rounded.
    assert (low.float() - full).norm() < 1e-2 * full.norm()
    whole = module.bfloat16()(x.bfloat16())[0]
    assert whole.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["torch", "grouped_mm"])
def test_backends_agree(backend):
    module, other = experts(torch.float32, hidden_dim=12), experts(torch.float32, hidden_dim=12, backend=backend)
    torch.testing.assert_close(module(tokens(dtype=torch.float32))[0], other(tokens(dtype=torch.float32))[0])


def test_initial_weights():
    module = MixtureOfExperts(64, CanonConfig(), num_experts=4, hidden_dim=256)
    module.init_weights(Initializer(module, seed=0))
    assert module.router.weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert module.in_proj.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert module.out_proj.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert not torch.equal(module.in_proj[0], module.in_proj[1])


@pytest.mark.parametrize("options", [{}, {"gated": True, "hidden_dim": 24, "top_k": 2, "num_experts": 7}])
def test_formulas(options):
    module = experts(**options)
    assert module.count_parameters() == sum(p.numel() for p in module.parameters())
    inner = (3 * 24 if options else 2 * D) * D
    assert module.flops_per_token() == 2 * (D * module.num_experts + module.top_k * inner)
    assert module.state_size() == 0


def test_the_share_of_parameters_at_work_is_part_3_3_s():
    """8.8 % of those outside the embeddings, counting attention's 4 d^2 a layer: what tells experts d -> d -> d."""
    net = build_model(["model=moe", "size=12L768D"], device="meta")
    d, blocks = 768, 12
    whole = net.count_parameters() - 2 * 10_000 * d
    at_work = blocks * (4 * d**2 + 2 * d**2)
    assert whole == blocks * (4 * d**2 + 32 * 2 * d**2 + 32 * d + 2 * d) + d
    assert at_work / whole == pytest.approx(0.088, abs=5e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activation": "tanh"}, "activation='tanh': choose silu"),
        ({"num_experts": 0}, "num_experts=0: at least 1"),
        ({"hidden_dim": 0}, "hidden_dim=0: at least 1"),
        ({"top_k": 0}, "top_k=0: from 1 to num_experts=5"),
        ({"top_k": 6}, "top_k=6: from 1 to num_experts=5"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0: a positive number"),
        ({"balance_coefficient": -1.0}, "balance_coefficient=-1.0: at least 0"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        experts(**options)


def test_canon_d_is_refused_early():
    with pytest.raises(ValueError, match="canon.positions='ABCD': MixtureOfExperts has no point D.*use 'ABC'"):
        build_model(["model=moe", "canon.positions=ABCD"], device="meta")
