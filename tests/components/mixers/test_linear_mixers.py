"""Each linear mixer against its equations, with random weights in every parameter; then decoding and documents."""

import importlib
from typing import Any

import numpy as np
import pytest
import torch

from src.components.canon import Canon, CanonConfig
from src.components.mixers.gated_deltanet import GatedDeltaNet
from src.components.mixers.gla import GLA
from src.components.mixers.linear_attention import LinearAttention
from src.components.mixers.mamba2 import Mamba2
from tests.naive import mixers as naive

DIM = 16


def gla(canon):
    return GLA(DIM, canon, num_heads=2, decay_rank=3)


def gla_elu(canon):
    return GLA(DIM, canon, num_heads=2, decay_rank=3, decay_normalizer=4.0, feature_map="elu")


def gla5(canon):
    return GLA(DIM, canon, num_heads=2, expand_k=1, expand_v=2, gate_rank=5, qkv_activation="silu", split_init=True)


def gdn(canon):
    return GatedDeltaNet(DIM, canon, num_heads=2, head_dim=6)


def gdn2(canon):
    return GatedDeltaNet(DIM, canon, num_heads=4, gate_rank=5)


def mamba2(canon):
    return Mamba2(DIM, canon, num_heads=4, state_size=5)


def mamba2_groups(canon):
    return Mamba2(DIM, canon, num_heads=4, state_size=5, groups=2)


def linear_attention(canon):
    return LinearAttention(DIM, canon, num_heads=2)


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gla": (gla, naive.gla, {"heads": 2}),
    "gla_elu": (gla_elu, naive.gla, {"heads": 2, "elu": True, "normalizer": 4.0}),
    "gla5": (gla5, naive.gla, {"heads": 2, "activation": True}),
    "gdn": (gdn, naive.gated_deltanet, {"heads": 2}),
    "gdn2": (gdn2, naive.gated_deltanet, {"heads": 4}),
    "mamba2": (mamba2, naive.mamba2, {"heads": 4, "state": 5}),
    "mamba2_groups": (mamba2_groups, naive.mamba2, {"heads": 4, "state": 5, "groups": 2}),
    "linear_attention": (linear_attention, naive.linear_attention, {"heads": 2}),
}
every = pytest.mark.parametrize("name", CASES)
letters_of = pytest.mark.parametrize("letters", ["", "b", "B", "Bb"], ids=lambda letters: letters or "none")


def built(name, letters):
    """The mixer in float64, every parameter random and none at a value that hides it."""
    generator = torch.Generator().manual_seed(0)
    mixer = CASES[name][0](CanonConfig(letters)).double()
    with torch.no_grad():
        for key, p in mixer.named_parameters():
            if key != "unused_conv":
                p.copy_(torch.randn(p.shape, generator=generator) * (0.4 if p.ndim > 1 else 0.5) + 0.3 * (p.ndim == 1))
    return mixer


def inputs(*shape):
    return torch.randn(*shape, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@every
@letters_of
def test_forward_is_the_equation(name, letters):
    mixer, x = built(name, letters), inputs(2, 13)
    weights = {key: p.detach().numpy() for key, p in mixer.named_parameters()}
    expected = np.stack([CASES[name][1](weights, row, letters=letters, **CASES[name][2]) for row in x.numpy()])
    found, none = mixer(x)
    assert none is None
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-10, rtol=1e-10)


@every
@letters_of
def test_decoding_in_pieces_is_the_forward(name, letters):
    mixer, x = built(name, letters), inputs(2, 17)
    state, found = {}, []
    for piece in x.split([6, 1, 1, 2, 7], dim=1):
        given, before = state, dict(state)
        y, state = mixer(piece, state=given)
        found.append(y)
        assert given.keys() == before.keys()
        assert all(given[key] is before[key] for key in given)
    torch.testing.assert_close(torch.cat(found, dim=1), mixer(x)[0], atol=1e-12, rtol=1e-10)
    assert state["memory"].memory.dtype == torch.float64
    assert sum(t.numel() for part in state.values() for t in part if t.is_floating_point()) == 2 * mixer.state_size(17)


@every
@letters_of
def test_documents_and_padding_are_apart(name, letters):
    """Two documents and the padding around them, in one row, against the documents alone."""
    mixer, x = built(name, letters), inputs(1, 15)
    segments = torch.tensor([[-1] * 2 + [0] * 5 + [1] * 6 + [-1] * 2])
    packed, _ = mixer(x, segments=segments)
    torch.testing.assert_close(packed[:, 2:7], mixer(x[:, 2:7])[0], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(packed[:, 7:13], mixer(x[:, 7:13])[0], atol=1e-12, rtol=1e-10)
    assert packed.isfinite().all()


@every
@letters_of
def test_gradients_reach_everything_that_trains(name, letters):
    mixer = built(name, letters)
    mixer(inputs(2, 9))[0].square().sum().backward()
    for key, p in mixer.named_parameters():
        assert p.requires_grad == (key != "unused_conv")
        assert not p.requires_grad or (p.grad is not None and (p.grad != 0).any() and p.grad.isfinite().all()), key


# Operations on each number of the memory: a decay is one, a look-up, a write and a read are a multiplication and an addition each.
PER_NUMBER = {GLA: 1 + 2 + 2, GatedDeltaNet: 1 + 2 + 2 + 2, Mamba2: 1 + 2 + 2, LinearAttention: 2 + 2}


@every
@letters_of
def test_formulas_count_every_parameter_and_operation(name, letters):
    mixer = CASES[name][0](CanonConfig(letters))
    assert mixer.count_parameters() == sum(p.numel() for p in mixer.parameters())
    _, state = mixer(inputs(1, 1).float(), state={})
    operations = PER_NUMBER[type(mixer)] * state["memory"].memory.numel()
    for part in mixer.modules():
        if isinstance(part, torch.nn.Linear):
            operations += 2 * part.in_features * part.out_features
        elif isinstance(part, Canon):
            operations += 2 * 4 * part.width
    assert mixer.flops_per_token(1) == mixer.flops_per_token(1000) == operations


# The recurrence that a mixer calls, and which of its arguments say how much is kept and written.
DECAYS = {GLA: ("gla", slice(3, 4)), GatedDeltaNet: ("gated_delta_rule", slice(3, 5)), Mamba2: ("ssd", slice(1, 3))}


@pytest.mark.parametrize("name", [name for name in CASES if name != "linear_attention"])
def test_decays_are_computed_in_float32_under_autocast(name, monkeypatch):
    """Whatever the matrices run in, the numbers that are multiplied over thousands of tokens are not rounded to bfloat16."""
    mixer, seen = built(name, "b").float(), []
    operation, which = DECAYS[type(mixer)]
    module = importlib.import_module(type(mixer).__module__)
    original = getattr(module, operation)

    def spy(*args, **kwargs):
        seen.extend(args[which])
        return original(*args, **kwargs)

    monkeypatch.setattr(module, operation, spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = mixer(inputs(1, 50).float(), state={})
    assert [t.dtype for t in seen] == [torch.float32] * len(seen)
    assert all((t != t.bfloat16()).float().mean() > 0.5 for t in seen)
    assert y.dtype == torch.bfloat16
    assert state["memory"].memory.dtype == torch.float32


def test_ranks_and_widths_of_the_families():
    """Part 4.1 at 512: GLA 4 d^2 and a memory of 64 d, Gated DeltaNet 6 d^2 and 144 d, Mamba2 6 d^2 and 128 d."""
    none = CanonConfig()
    with torch.device("meta"):
        mixers = [
            (GLA(512, none, num_heads=4), 4 * 512**2, 64 * 512),
            (GatedDeltaNet(512, none, num_heads=4, head_dim=96), 6 * 512**2, 144 * 512),
            (Mamba2(512, none, num_heads=16, state_size=64), 6 * 512**2, 128 * 512),
            (GatedDeltaNet(2048, none, num_heads=16, gate_rank=16), 6 * 2048**2, 256 * 2048),
            (GLA(2048, none, num_heads=16, expand_k=1, expand_v=2, gate_rank=16), 6 * 2048**2, 256 * 2048),
        ]
    for mixer, matrices, memory in mixers:
        assert mixer.state_size(1000) == memory
        assert mixer.count_parameters() == pytest.approx(matrices, rel=0.06)


def test_the_short_convolutions_ignore_the_description_of_canon_layers():
    canon = CanonConfig(
        "ABb", kernel_size=2, residual=False, activation="silu", bias=True, init="zeros", trainable=False
    )
    for mixer, has_bias in [(gla5(canon), False), (gdn2(canon), False), (mamba2(canon), True)]:
        b = mixer.conv_b
        assert (b.kernel_size, b.residual, b.activation) == (4, False, "silu")
        assert (b.bias is not None) == has_bias
        assert b.weight.requires_grad
        assert b.weight.any()
        assert (mixer.canon_b.kernel_size, mixer.canon_b.weight.requires_grad) == (2, False)
    with pytest.raises(ValueError, match="short_convolution for b"):
        canon.at("b", 4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GLA(16, CanonConfig(), num_heads=3), r"expand_k \* dim=8: must be a positive multiple of num_heads=3"),
        (lambda: GLA(16, CanonConfig(), num_heads=2, expand_v=0.3), r"expand_v \* dim=4.8"),
        (lambda: GLA(16, CanonConfig(), num_heads=0), "num_heads=0: must be a positive whole number"),
        (lambda: GLA(16, CanonConfig(), num_heads=2, gate_rank=0), "gate_rank=0"),
        (lambda: GLA(16, CanonConfig(), num_heads=2, decay_rank=0), "decay_rank=0"),
        (lambda: GLA(16, CanonConfig(), num_heads=2, feature_map="relu"), "feature_map='relu': choose null or elu"),  # type: ignore[arg-type]
        (lambda: GLA(16, CanonConfig(), num_heads=2, qkv_activation="relu"), "qkv_activation='relu'"),  # type: ignore[arg-type]
        (lambda: GLA(16, CanonConfig(), num_heads=2, decay_normalizer=0), "decay_normalizer=0"),
        (lambda: GatedDeltaNet(16, CanonConfig(), num_heads=3), "num_heads=3 does not divide dim=16"),
        (lambda: GatedDeltaNet(16, CanonConfig(), num_heads=3, head_dim=5, expand_v=1.5), r"expand_v \* head_dim=7.5"),
        (
            lambda: Mamba2(16, CanonConfig(), num_heads=5, state_size=4),
            r"expand \* dim=32: must be a positive multiple of num_heads=5",
        ),
        (
            lambda: Mamba2(16, CanonConfig(), num_heads=4, state_size=4, groups=3),
            "num_heads=4: must be a positive multiple of groups=3",
        ),
        (lambda: Mamba2(16, CanonConfig(), num_heads=4, state_size=0), "state_size=0"),
        (lambda: Mamba2(16, CanonConfig(), num_heads=4, state_size=4, init="best"), "init='best': choose"),  # type: ignore[arg-type]
        (lambda: LinearAttention(16, CanonConfig(), num_heads=3), "num_heads=3 does not divide dim=16"),
        (lambda: LinearAttention(16, CanonConfig(), num_heads=2, norm_eps=0), "norm_eps=0"),
    ],
)
def test_impossible_options_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
