import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from src.components.canon import POINTS, Canon, CanonConfig


def test_tap_order_by_hand():
    """Tap k-1 multiplies the current token, tap 0 the one three steps back; the input is added."""
    canon = Canon(1)
    with torch.no_grad():
        canon.weight.copy_(torch.tensor([1000.0, 100.0, 10.0, 0.0]).view(1, 1, 4))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).view(1, 5, 1)
    expected = [1.0, 2.0 + 10, 3.0 + 20 + 100, 4.0 + 30 + 200 + 1000, 5.0 + 40 + 300 + 2000]
    assert canon(x).flatten().tolist() == expected


def test_equals_depthwise_conv1d_plus_input():
    canon = Canon(6)
    x = torch.randn(2, 9, 6)
    conv = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), canon.weight, groups=6).transpose(1, 2)
    torch.testing.assert_close(canon(x), x + conv)


def test_zero_weights_are_the_identity_with_residual_and_zero_without():
    x = torch.randn(2, 7, 5)
    assert torch.equal(Canon(5, init="zeros")(x), x)
    assert torch.equal(Canon(5, residual=False, init="zeros")(x), torch.zeros_like(x))


@pytest.mark.parametrize("t", [0, 3, 6])
def test_causality(t):
    canon, x = Canon(4), torch.randn(1, 7, 4)
    changed = x.clone()
    changed[:, t] += 1
    difference = (canon(x) != canon(changed)).any(dim=-1)[0]
    assert not difference[:t].any()
    assert difference[t : t + 4].all()
    assert not difference[t + 4 :].any()


@pytest.mark.parametrize("kernel_size", [2, 4, 7])
def test_initial_weights_are_uniform_with_the_conv1d_bound(kernel_size):
    weight = Canon(20_000, kernel_size=kernel_size).weight
    bound = kernel_size**-0.5
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)  # 0.2887 for 4 taps


def test_initial_weights_of_a_whole_model_are_not_overwritten():
    from src.build import build_model

    for scheme in ("fan_in", "normal"):
        net = build_model(["canon.positions=ABCD", f"model.initialization.scheme={scheme}"])
        taps = torch.cat([p.flatten() for name, p in net.named_parameters() if "canon" in name])
        assert taps.std().item() == pytest.approx(0.2887, abs=0.005)


def test_gradients_against_finite_differences():
    canon: Any = Canon(3, activation="silu", bias=True).double()
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    plain = Canon(3).double()
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(plain, {"weight": w}, (x,)), (x, plain.weight)
    )
    assert torch.autograd.gradcheck(
        lambda x, w, b: torch.func.functional_call(canon, {"weight": w, "bias": b}, (x,)), (x, canon.weight, canon.bias)
    )


def test_taps_stop_at_document_boundaries():
    canon, x = Canon(4), torch.randn(2, 9, 4)
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2]]).expand(2, -1)
    apart = torch.cat([canon(x[:, :4]), canon(x[:, 4:7]), canon(x[:, 7:])], dim=1)
    torch.testing.assert_close(canon(x, segments=segments), apart)


@pytest.mark.parametrize("prefill", [1, 2, 5, 9])
def test_step_by_step_equals_full(prefill):
    canon, x = Canon(4, activation="silu"), torch.randn(2, 10, 4)
    state, pieces = canon.initial_state(x), []
    for piece in [x[:, :prefill], *x[:, prefill:].split(1, dim=1)]:
        y, state = canon(piece, segments=None, state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), canon(x))


def test_frozen_weights_do_not_train():
    assert not any(p.requires_grad for p in Canon(4, trainable=False).parameters())


def test_letters_are_normalised():
    assert CanonConfig(positions="DCbbA").positions == "AbCD"
    assert CanonConfig(positions="").at("A", 4) is None
    assert set(POINTS) == set("ABbCD")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "AX"}, "'AX'.*no such point X.*Points: A "),
        ({"kernel_size": 0}, "kernel_size=0"),
        ({"activation": "relu"}, "activation='relu'"),
        ({"init": "ones"}, "init='ones'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CanonConfig(**options)
