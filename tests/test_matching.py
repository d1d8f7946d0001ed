"""Solved models are built again here, from their overrides, and counted by their tensors where that is possible."""

import math
import warnings
from typing import Any

import pytest
from omegaconf import OmegaConf

import src.sweeps.matching
from src.build import CONFIG_DIR, build_model, compose_config, model_from_config
from src.components.backbone import Backbone
from src.config import ConfigError, to_plain
from src.sweeps.matching import match_model

MODELS = sorted(p.stem for p in (CONFIG_DIR / "model").glob("*.yaml") if p.stem != "base")
SMALL = "model.vocab_size=50"  # so that the blocks decide
WIDTHS = {"size.dim", "size.attention.hidden_dim", "size.linear.hidden_dim", "size.gdn.head_dim"}
FEEDFORWARD = "model.feedforward.hidden_dim"


def meta(*overrides) -> Any:
    return build_model(list(overrides), device="meta")


def settings(matched):
    return {key: int(value) for key, value in (override.split("=") for override in matched.overrides)}


def count(net, budget, seq_len=2048):
    measures = {
        "parameters": net.count_parameters,
        "flops": lambda: net.flops_per_token(seq_len),
        "state": lambda: net.state_size(seq_len),
    }
    return measures[budget]()


def count_of(config, changes, budget, seq_len):
    """What one candidate has, or None if there can be none; without composing again, which takes most of the time."""
    config = config.copy()
    for key, value in changes.items():
        OmegaConf.update(config, key, value)
    try:
        return count(model_from_config(to_plain(config.model), "meta"), budget, seq_len)
    except ConfigError:
        return None


@pytest.mark.parametrize(
    "model",
    [pytest.param(m, marks=[] if m in ("llama", "gdn", "mamba2_no_mlp", "moe") else pytest.mark.slow) for m in MODELS],
)
def test_every_model_matches_the_parameters_of_a_tiny_llama_by_width(model):
    found = match_model([f"model={model}"], budget="parameters", target=1_411_392)
    net = meta(f"model={model}", *found.overrides)
    assert found.parameters == found.value == sum(p.numel() for p in net.parameters())
    assert found.error == found.value / found.target - 1
    assert abs(found.error) <= 0.05
    assert (found.flops, found.state) == (net.flops_per_token(2048), net.state_size(2048))
    assert (
        (found.dim, found.depth) == (net.dim, net.depth) == (settings(found)["size.dim"], 4 if "no_mlp" in model else 2)
    )


@pytest.mark.parametrize(
    ("overrides", "budget", "change", "target"),
    [
        (["model=gla", "size=8L512D", "size.depth=2"], "parameters", "width", 7_500_123),
        (["model=gdn"], "flops", "width", 400_123),
        (["model=linear_attention"], "state", "width", 40_123),
        (["model=mamba2_no_mlp"], "parameters", "depth", 400_123),
        (["model=gla5"], "state", "depth", 40_123),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else str(value),
)
def test_no_neighbour_is_closer(overrides, budget, change, target):
    """The target is none that a candidate hits."""
    overrides, seq_len = [*overrides, "canon.positions=A", SMALL], 100
    found = match_model(overrides, budget=budget, target=target, change=change, seq_len=seq_len)
    config, solved = compose_config(overrides), settings(found)
    if change == "depth":
        assert set(solved) == {"size.depth"}
        others = [{"size.depth": solved["size.depth"] + i} for i in (-1, 1)]
    else:
        assert set(solved) == WIDTHS
        factors = [(solved["size.dim"] + i) / config.size.dim for i in (-8, -4, -2, -1, 1, 2, 4, 8)]
        others = [{key: round(OmegaConf.select(config, key) * factor) for key in WIDTHS} for factor in factors]
    counts = [c for c in (count_of(config, other, budget, seq_len) for other in others) if c is not None]
    assert min(counts) < target < max(counts)
    assert min(abs(c - target) for c in counts) >= abs(found.value - target) > 0
    assert found.value == count_of(config, solved, budget, seq_len)


@pytest.mark.parametrize("size", ["tiny", "8L768D"])
def test_all_widths_grow_alike_and_the_heads_stay(size):
    overrides = ["model=gla", f"size={size}", "size.depth=2", SMALL]
    start = meta(*overrides)
    found = match_model(overrides, budget="parameters", target=3 * start.count_parameters())
    config, solved = compose_config(overrides), settings(found)
    factor = found.dim / start.dim
    assert factor == pytest.approx(math.sqrt(3), rel=0.05)  # parameters grow as the square
    for key in WIDTHS:
        width = OmegaConf.select(config, key)
        coarse = width >= 256  # and a multiple of 8, in all sizes
        assert solved[key] == pytest.approx(width * factor, abs=4 if coarse else 0.5)
        assert not coarse or solved[key] % 8 == 0
    net = meta(*overrides, *found.overrides)
    assert net.blocks[0].mixer.num_heads == start.blocks[0].mixer.num_heads
    assert net.blocks[0].feedforward.hidden_dim == solved["size.attention.hidden_dim"]
    assert net.depth == start.depth


@pytest.mark.parametrize(
    ("budget", "change", "factor"),
    [
        ("parameters", "width", 0.25),
        ("state", "width", 4),
        ("flops", "depth", 4),
        ("parameters", "depth", 0.25),
    ],
)
def test_a_model_that_was_changed_is_found_again(budget, change, factor):
    overrides = ["model=llama", "size=8L512D", "size.depth=4", "canon.positions=ABCD", SMALL]
    dim, depth = (int(512 * factor), 4) if change == "width" else (512, int(4 * factor))
    twin = [*overrides, f"size.dim={dim}", f"size.depth={depth}", f"size.attention.hidden_dim={3 * dim}"]
    found = match_model(overrides, budget=budget, target=twin, change=change, seq_len=300)
    assert (found.dim, found.depth, found.error) == (dim, depth, 0.0)
    assert found.target == count(meta(*twin), budget, 300)


def test_where_widths_are_far_apart_the_feedforward_makes_up_for_it():
    """32 heads of which a quarter rotates: the width is a multiple of 256, and parameters go in steps of a quarter."""
    overrides = ["model=llama", "size=1B", "size.depth=4", "position=rope_quarter_dims", SMALL]
    found = match_model(overrides, budget="parameters", target=235_000_000)
    assert abs(found.error) < 0.005
    assert found.dim % 256 == 0
    own = settings(found)["size.attention.hidden_dim"]
    assert 2 / 3 <= settings(found)[FEEDFORWARD] / own <= 3 / 2
    assert settings(found)[FEEDFORWARD] % 8 == 0
    net = meta(*overrides, *found.overrides)
    assert (net.count_parameters(), net.blocks[0].feedforward.hidden_dim) == (found.value, settings(found)[FEEDFORWARD])


def test_what_cannot_be_made_up_for_shows():
    """No feed-forward; one that would have to be distorted; and states, which a feed-forward's Canon layer is not to make up for."""
    cases: list[Any] = [
        (["model=mamba2_no_mlp", "size.mamba2.num_heads=64", SMALL], "parameters", 220_000),
        (["model=moe"], "flops", 2_590_720),
        (["model=llama", SMALL], "state", 2 * 2 * 68 * 2048),
        (["model=gla", "canon.positions=D", SMALL], "state", (4096 + 4752) // 2),
    ]
    for overrides, budget, target in cases:
        found = match_model(overrides, budget=budget, target=target)
        assert abs(found.error) > 0.05
        assert set(settings(found)) == WIDTHS


def test_widths_that_the_constructors_refuse_are_skipped():
    """Values 1.5 times as wide as keys: the head width must be even, which the model width says nothing of."""
    overrides = ["model=gdn", "+model.mixers.G.expand_v=1.5", SMALL]
    for target in (30_000, 345_678):
        found = match_model(overrides, budget="parameters", target=target)
        assert settings(found)["size.gdn.head_dim"] % 2 == 0
        assert abs(found.error) < 0.05


def test_few_models_are_built(monkeypatch):
    """Out of 2048 widths: five doublings, nine halvings and the look for what the width must be a multiple of."""
    built = []
    net = src.sweeps.matching._net
    monkeypatch.setattr(src.sweeps.matching, "_net", lambda *args: built.append(args) or net(*args))
    match_model(["model=gdn2", "size=8L768D", "size.depth=2", SMALL], budget="parameters", target=5_000_000_000)
    assert 0 < len(built) <= 20


def test_what_is_idle_is_said_once():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        match_model(["model=gpt2", "canon.positions=AbCD"], budget="parameters", target=1_400_000)
    assert sum("no block of this model has point b" in str(w.message) for w in seen) == 1


# Errors


def test_a_state_of_nothing_cannot_be_matched(monkeypatch):
    monkeypatch.setattr(Backbone, "state_size", lambda self, seq_len: 0)
    with pytest.raises(ConfigError, match=r"state of this model are 0 at size.dim=64 and at size.dim=4096 alike"):
        match_model(["model=gla"], budget="state", target=1000)
    with pytest.raises(ConfigError, match="target=0: a positive number"):
        match_model(["model=gla"], budget="state", target=["model=llama"])


def test_overrides_that_fix_the_size():
    with pytest.raises(ConfigError, match=r"change='depth': parameters of this model are .* alike"):
        match_model(["model=llama", "model.depth=2"], budget="parameters", target=10**7, change="depth")


@pytest.mark.parametrize(
    ("change", "target", "message"),
    [
        ("width", 100, "target=100: by its width this model comes to no less than 2,888 .*at size.dim=8"),
        ("width", 10**12, "no more than .*at size.dim=4096"),
        ("depth", 100, "no less than 72,128 .*at size.depth=1"),
        ("depth", 10**9, "by its depth this model comes to no more than .*at size.depth=128"),
    ],
)
def test_targets_out_of_reach(change, target, message):
    with pytest.raises(ConfigError, match=message):
        match_model(["model=llama", SMALL], budget="parameters", target=target, change=change)


def test_arguments_that_make_no_sense():
    good = {"overrides": ["model=llama"], "budget": "flops", "target": 10**6}
    for name, value, message in (
        ("budget", "flop", "budget='flop': no such budget; did you mean 'flops'"),
        ("change", "size", "change='size': no such change; .*depth, width"),
        ("overrides", "model=gla", "overrides='model=gla': a list, such as"),
        ("target", "model=gla", "target='model=gla': a positive number, or the list of overrides"),
        ("target", -1, "target=-1"),
        ("target", math.nan, "target=nan"),
        ("target", None, "target=None"),
        ("target", True, "target=True"),
        ("seq_len", 0, "seq_len=0: at least 1"),
        ("overrides", ["model=llama", "size.dim=63"], "does not divide dim=63"),
    ):
        arguments: dict[str, Any] = good | {name: value}
        with pytest.raises(ConfigError, match=message):
            match_model(**arguments)


def test_widths_at_which_the_model_does_not_run_are_passed_over(monkeypatch):
    """A mixer whose heads do not divide its width builds, and fails in its forward."""
    from src.components.mixers.attention import Attention

    forward = Attention.forward

    def of_four_heads(self, x, **more):
        x.unflatten(-1, (4, x.shape[-1] // 4 if x.shape[-1] % 16 == 0 else 1))
        return forward(self, x, **more)

    overrides = ["model=llama", "size=tiny", "position=nope"]
    target = match_model(overrides, budget="parameters", target=overrides).value * 1.37
    free = match_model(overrides, budget="parameters", target=target)
    assert free.dim % 16
    monkeypatch.setattr(Attention, "forward", of_four_heads)
    with pytest.warns(UserWarning, match=r"size.dim=\d+: the model can be built and cannot run .*passed over"):
        found = match_model(overrides, budget="parameters", target=target)
    assert found.dim % 16 == 0


def test_a_model_that_does_not_run_here_is_matched_all_the_same(monkeypatch):
    from src.components.mixers.attention import Attention

    overrides = ["model=llama", "size=tiny", "position=nope"]
    expected = match_model(overrides, budget="parameters", target=150_000)
    monkeypatch.setattr(Attention, "forward", lambda *_, **__: 1 / 0)
    assert match_model(overrides, budget="parameters", target=150_000) == expected
