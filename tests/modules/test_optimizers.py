import pytest
import torch

from src.build import build_model
from src.modules.optimizers import AdamW


@pytest.fixture
def named():
    return list(build_model(["canon.positions=ABCD", "model.vocab_size=20"]).named_parameters())


def test_everything_decays_by_default_as_in_the_recipes(named):
    (group,) = AdamW(named, lr=1e-3).param_groups
    assert len(group["params"]) == len(named)
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.03, (0.9, 0.98), 1e-6)


def test_patterns_exempt_parameters_from_decay(named):
    decaying, exempt = AdamW(named, lr=1e-3, no_decay=["*norm*", "*canon*"]).param_groups
    names = {id(p): name for name, p in named}
    assert exempt["weight_decay"] == 0.0
    assert all("norm" in names[id(p)] or "canon" in names[id(p)] for p in exempt["params"])
    assert not any("norm" in names[id(p)] or "canon" in names[id(p)] for p in decaying["params"])


def test_frozen_parameters_are_left_out():
    net = build_model(["canon.positions=ABCD", "canon.trainable=false", "model.vocab_size=20"])
    optimizer = AdamW(net.named_parameters(), lr=1e-3)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == sum(p.requires_grad for p in net.parameters())


def test_decay_is_decoupled():
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.zeros(3)
    AdamW([("w", weight)], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(weight.data, torch.full((3,), 1 - 0.1 * 0.5))


def test_mistakes_are_named(named):
    with pytest.raises(ValueError, match="optimizer.lr=0"):
        AdamW(named, lr=0)
    with pytest.raises(ValueError, match="'\\*cannon\\*' matches no parameter"):
        AdamW(named, lr=1e-3, no_decay=["*cannon*"])
