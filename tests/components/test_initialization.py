"""How the families start: spreads and ranges of the release, measured; and that Canon layers change no other weight."""

import math
from typing import Any

import pytest
import torch

from src.build import build_model
from src.components.initialization import Initialization, Initializer

SIZE = ["size=tiny", "model.dim=256", "model.vocab_size=400", "size.linear.num_heads=4"]


def net(model: str, canon: str = "AbCD", *more: str) -> Any:
    return build_model([f"model={model}", f"canon.positions={canon or chr(39) * 2}", *SIZE, *more])


def spread(*weights):
    return torch.cat([w.detach().flatten() for w in weights]).std().item()


def in_blocks(built, name):
    return [block.get_parameter(name) for block in built.blocks]


@pytest.mark.parametrize("model", ["gla", "gla5", "gdn", "gdn2"])
def test_matrices_of_gla_and_gated_deltanet(model):
    built = net(model)
    matrices = ["mixer.qkv_proj", "mixer.out_proj", "feedforward.in_proj", "feedforward.out_proj"]
    matrices += ["mixer.gate_proj"] if model in ("gla", "gdn") else []
    matrices += ["mixer.decay_proj", "mixer.beta_proj"] if model in ("gdn", "gdn2") else []
    for name in matrices:
        weights = in_blocks(built, f"{name}.weight")
        assert spread(*weights) == pytest.approx(0.02, rel=0.06 if weights[0].numel() < 10_000 else 0.015), name
    for weight in (built.embedding.weight, built.head.weight):
        assert spread(weight) == pytest.approx(0.02, rel=0.015)
    for name, p in built.named_parameters():
        if name.endswith("_out.bias"):
            assert not p.any()


@pytest.mark.parametrize("model", ["gla5", "gdn2"])
def test_matrices_of_low_rank(model):
    """Each factor has sqrt(0.02) / 16^(1/4); their product what a whole matrix would have."""
    mixer = net(model).blocks[0].mixer
    pairs = [(mixer.gate_in.weight, mixer.gate_out.weight)]
    pairs += [(mixer.decay_in.weight, mixer.decay_out.weight)] if model == "gla5" else []
    for inner, outer in pairs:
        assert spread(inner) == pytest.approx(0.0707, rel=0.05)
        assert spread(outer) == pytest.approx(0.0707, rel=0.05)
        assert spread(outer @ inner) == pytest.approx(0.02, rel=0.08)


def test_the_decay_of_part_41_s_gla_starts_like_any_matrix():
    """fla's default; its product is then twelve times smaller and all decays start alike, at 2^(-1/16)."""
    mixer = net("gla").blocks[0].mixer
    assert spread(mixer.decay_in.weight, mixer.decay_out.weight) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("model", ["gla5", "gdn2"])
def test_short_convolutions_start_like_matrices_and_canon_layers_do_not(model):
    built = net(model, "ABbCD")
    assert spread(*in_blocks(built, "mixer.conv_b.weight")) == pytest.approx(0.02, rel=0.03)
    for name in ("canon_a", "canon_c", "mixer.canon_b", "feedforward.canon_d"):
        assert spread(*in_blocks(built, f"{name}.weight")) == pytest.approx(0.2887, rel=0.04), name


def test_mamba2():
    built = net("mamba2", "ABbCD", "size.mamba2.num_heads=16")
    for name, inputs in (("mixer.in_proj", 256), ("mixer.out_proj", 512), ("feedforward.out_proj", 128)):
        weights = torch.cat([w.flatten() for w in in_blocks(built, f"{name}.weight")])
        assert weights.abs().max() <= inputs**-0.5
        assert spread(weights) == pytest.approx((3 * inputs) ** -0.5, rel=0.01), name
    assert built.head.weight.abs().max() <= 1 / 16
    assert spread(built.head.weight) == pytest.approx(768**-0.5, rel=0.01)
    assert spread(built.embedding.weight) == pytest.approx(0.1, rel=0.01)
    for name in ("mixer.conv_b.weight", "mixer.conv_b.bias", "mixer.canon_b.weight", "canon_a.weight"):
        weights = torch.cat([w.flatten() for w in in_blocks(built, name)])
        assert weights.abs().max() <= 0.5
        assert spread(weights) == pytest.approx(0.2887, rel=0.04), name
    assert all((d == 1).all() for d in in_blocks(built, "mixer.D"))


def test_width_512_has_the_spreads_that_were_measured_on_the_release():
    built: Any = build_model(
        ["model=mamba2", "size=8L512D", "canon.positions=b", "model.vocab_size=400", "model.depth=1"]
    )
    mixer, feedforward = built.blocks[0].mixer, built.blocks[0].feedforward
    assert spread(mixer.in_proj.weight) == pytest.approx(0.0255, abs=1e-4)
    assert spread(mixer.out_proj.weight) == pytest.approx(0.0181, abs=1e-4)
    assert spread(feedforward.in_proj.weight) == pytest.approx(0.0255, abs=1e-4)
    assert spread(mixer.conv_b.weight) == pytest.approx(0.288, abs=0.008)
    assert spread(built.embedding.weight) == pytest.approx(0.0999, abs=0.001)


@pytest.mark.parametrize(
    ("model", "letter", "low"), [("gdn2", "linear", 0.0), ("gdn", "gdn", 0.0), ("mamba2", "mamba2", 1.0)]
)
def test_rates_and_steps(model, letter, low):
    """exp(A_log) is uniform up to 16; softplus(dt_bias) log-uniform from 0.001 to 0.1."""
    heads = [f"size.{letter}.num_heads=256", "model.depth=8"] + (["size.gdn.head_dim=4"] if letter == "gdn" else [])
    built = net(model, "b", *heads)
    rates = torch.cat(in_blocks(built, "mixer.A_log")).exp()
    assert low <= rates.min() < low + 0.1
    assert 15.9 < rates.max() <= 16
    assert rates.mean().item() == pytest.approx((low + 16) / 2, rel=0.05)
    steps = torch.nn.functional.softplus(torch.cat(in_blocks(built, "mixer.dt_bias")))
    assert 0.99e-3 < steps.min() < 1.05e-3
    assert 0.095 < steps.max() < 0.1001
    assert steps.log().mean().item() == pytest.approx(math.log(0.01), abs=0.1)
    assert not torch.equal(built.blocks[0].mixer.A_log, built.blocks[1].mixer.A_log)


def test_a_rate_of_zero_has_a_finite_logarithm(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda values, low, high, generator: values.fill_(low))
    assert net("gdn2").blocks[0].mixer.A_log.isfinite().all()


def test_mimetic_mamba2_starts_as_linear_attention_between_like_tokens():
    plain = net("mamba2", "b", "model.mixers.M.state_size=64").blocks[0].mixer
    mixer = net("mamba2", "b", "model.mixers.M.state_size=64", "model.mixers.M.init=mimetic").blocks[0].mixer
    x = torch.randn(1, 40, 256)
    _, inner, keys, queries, dt = (mixer.in_proj.weight @ x.mT).mT.split(mixer.widths, dim=-1)
    step = torch.nn.functional.softplus(dt + mixer.dt_bias)
    torch.testing.assert_close(step, torch.ones_like(step), atol=1e-3, rtol=0)
    assert (-mixer.A_log.exp() * 1000).exp().min() > 0.7  # after a thousand tokens
    scores = queries[0] @ keys[0].T
    assert scores.diagonal().mean() > 3 * (scores - scores.diagonal().diag()).std()
    # The convolution passes everything through.
    everything = torch.cat((inner, keys, queries), dim=-1)
    torch.testing.assert_close(mixer.conv_b(everything), torch.nn.functional.silu(everything))
    # What it says nothing of is as it was.
    rows = sum(mixer.widths[:3])
    assert torch.equal(mixer.in_proj.weight[:rows], plain.in_proj.weight[:rows])
    assert torch.equal(mixer.out_proj.weight, plain.out_proj.weight)


@pytest.mark.parametrize(
    "model", ["gla", "gla5", "gdn", "gdn2", "mamba2", "mamba2_no_mlp", "linear_attention", "hybrid"]
)
def test_models_that_differ_in_canon_points_share_all_other_weights(model):
    models = [net(model, canon, "model.dim=32") for canon in ("", "b", "ACD", "ABbCD")]
    full = dict(models[-1].named_parameters())
    for built in models[:-1]:
        own = dict(built.named_parameters())
        assert all(torch.equal(p, full[name]) for name, p in own.items() if "unused_conv" not in name)
    differing = {name for name in full if name not in dict(models[0].named_parameters())}
    assert all("canon_" in name or "conv_b" in name for name in differing)


def test_scales_of_the_uniform_scheme():
    layer = torch.nn.Linear(300, 200, bias=False)
    init = Initializer(layer, 0, Initialization("uniform"), depth=7)
    init.matrix(layer.weight, 12345)  # it has 300 inputs, whatever the caller says
    assert layer.weight.abs().max().item() == pytest.approx(300**-0.5, rel=1e-3)
    init = Initializer(layer, 0, Initialization("uniform", std=0.1, depth_scaling="global_depth"), depth=7)
    init.matrix(layer.weight, 300, residual_layer=2)
    assert spread(layer.weight) == pytest.approx(0.1 / 4, rel=0.01)
    init.embedding(layer.weight, 300)
    assert spread(layer.weight) == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "xavier"}, "initialization.scheme='xavier': choose 'fan_in', 'normal' or 'uniform'"),
        ({"embedding_std": 0.0}, "initialization.embedding_std=0.0: must be positive"),
        ({"std": -1.0}, "initialization.std=-1.0: must be positive"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Initialization(**options)
