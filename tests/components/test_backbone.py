import math
import warnings
from typing import Any

import pytest
import torch

from src.build import build_model
from src.components.backbone import Backbone
from src.components.canon import CanonConfig
from src.components.feedforward import FeedForward, default_hidden_dim
from src.components.initialization import Initialization
from src.components.mixers.attention import Attention
from src.config import ConfigError

# Instantiated by the official release.
OFFICIAL_COUNTS = [
    (["size=1B"], 1_364_396_032, 51_388_416),
    (["size=1B", "canon.positions=ABCD", "position=rope_quarter_dims"], 1_366_460_416, 51_474_432),
    (["size=3B"], 3_141_331_968, 113_258_496),
    (["size=3B", "canon.positions=ABCD", "position=rope_quarter_dims"], 3_144_633_344, 113_385_472),
    (["size=8B"], 8_030_261_248, 218_112_000),
    (["size=8B", "canon.positions=ABCD", "position=rope_quarter_dims"], 8_035_766_272, 218_284_032),
    (["size=12L768D"], 100_313_856, 7_079_424),
    (["size=12L768D", "canon.positions=ABCD"], 100_694_784, 7_111_168),
    (["size=8L512D"], 37_511_680, 3_408_896),
]
TOY = ["size=tiny", "model.vocab_size=100", "model.mixers.T.num_heads=2", "model.mixers.T.num_kv_heads=2"]
OFFICIAL_COUNTS += [
    (TOY, 144_192, 65_664),
    ([*TOY, "canon.positions=ABCD", "model.mixers.T.qk_norm=true"], 151_104, 69_120),
]


@pytest.mark.parametrize(("overrides", "total", "per_layer"), OFFICIAL_COUNTS)
def test_parameter_counts_to_the_last_digit(overrides, total, per_layer):
    net = build_model(["model=llama", *overrides], device="meta")
    assert sum(p.numel() for p in net.parameters()) == net.count_parameters() == total
    assert sum(p.numel() for p in net.blocks[0].parameters()) == per_layer


def small(**options: Any) -> Any:
    def mixer(dim, canon, layer):
        return Attention(dim, canon, num_heads=4, layer=layer)

    return Backbone(**{"vocab_size": 100, "dim": 128, "depth": 3, "mixers": {"T": mixer}} | options)


def test_initial_weights_of_the_training_tree():
    """Truncated at three standard deviations of width^-1/2; the realised std is 0.9866 of it."""
    net = small()
    for weight, width in [
        (net.blocks[1].mixer.qkv_proj.weight, 128),
        (net.blocks[1].feedforward.in_proj.weight, 128),
        (net.blocks[1].feedforward.out_proj.weight, default_hidden_dim(128)),
        (net.embedding.weight, 128),
    ]:
        assert weight.abs().max() <= 3 * width**-0.5
        assert weight.std().item() == pytest.approx(0.9866 * width**-0.5, rel=0.02)


def test_initial_weights_of_the_hugging_face_tree():
    net = small(initialization=Initialization(scheme="normal"))
    for name in ("embedding", "blocks.0.mixer.out_proj", "head"):
        assert net.get_submodule(name).weight.std().item() == pytest.approx(0.02, rel=0.03)


@pytest.mark.parametrize(
    ("scaling", "divisor"),
    [("current_depth", math.sqrt(2 * 3)), ("global_depth", math.sqrt(2 * 4)), ("dim_ratio", 128 / 4096)],
)
def test_depth_scaling_of_what_writes_into_the_residual_stream(scaling, divisor):
    plain, scaled = small(), small(initialization=Initialization(depth_scaling=scaling))
    last = "blocks.2.feedforward.out_proj.weight"
    ratio = plain.get_parameter(last).std() / scaled.get_parameter(last).std()
    assert ratio.item() == pytest.approx(divisor, rel=0.03)
    assert torch.equal(plain.blocks[2].mixer.qkv_proj.weight, scaled.blocks[2].mixer.qkv_proj.weight)


def test_models_that_differ_in_canon_share_all_other_weights():
    without, with_canon = small(seed=3), small(seed=3, canon=CanonConfig("ABCD"))
    shared = dict(without.named_parameters())
    extra = {name for name, _ in with_canon.named_parameters()} - shared.keys()
    assert extra
    assert all("canon" in name for name in extra)
    assert all(torch.equal(p, with_canon.get_parameter(name)) for name, p in shared.items())


def test_weights_depend_on_the_seed_alone_and_not_on_the_global_random_state():
    torch.manual_seed(1)
    first = small(seed=5).state_dict()
    torch.manual_seed(2)
    again, other = small(seed=5).state_dict(), small(seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_building_on_meta_first_gives_the_same_weights():
    eager = small(seed=1)
    with torch.device("meta"):
        deferred = small(seed=1)
    deferred.to_empty(device="cpu")
    deferred.init_weights()
    assert all(torch.equal(p, deferred.get_parameter(name)) for name, p in eager.named_parameters())


def test_pattern_is_tiled_over_the_depth():
    class Other(Attention):
        pass

    mixers = {
        "T": lambda dim, canon, layer: Attention(dim, canon, num_heads=4, layer=layer),
        "G": lambda dim, canon, layer: Other(dim, canon, num_heads=4, layer=layer),
    }
    net = small(mixers=mixers, pattern="GGT", depth=5)
    assert "".join("G" if isinstance(b.mixer, Other) else "T" for b in net.blocks) == "GGTGG"
    with pytest.raises(ValueError, match="model.pattern='GX'.*G, T"):
        small(mixers=mixers, pattern="GX")


def test_tied_embeddings_are_one_parameter():
    net = small(tie_embeddings=True)
    assert net.head.weight is net.embedding.weight
    assert net.count_parameters() == sum(p.numel() for p in net.parameters())


def test_selected_positions_get_the_logits_they_would_have_had():
    net, ids = small(), torch.randint(100, (2, 9))
    select = torch.rand(2, 9) < 0.3
    torch.testing.assert_close(net(ids, select=select), net(ids)[select])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "relu2", "gelu"])
def test_feed_forward_by_its_equation(gated, activation):
    net = FeedForward(16, CanonConfig(), hidden_dim=24, gated=gated, activation=activation)
    x = torch.randn(2, 3, 16)
    act = {"silu": torch.nn.functional.silu, "relu2": lambda z: z.relu() ** 2, "gelu": torch.nn.functional.gelu}[
        activation
    ]
    h = x @ net.in_proj.weight.T
    h = act(h[..., :24]) * h[..., 24:] if gated else act(h)
    torch.testing.assert_close(net(x)[0], h @ net.out_proj.weight.T)


def test_default_hidden_width_is_the_release_s():
    assert [default_hidden_dim(d) for d in (64, 512, 768, 2048, 3072)] == [256, 1536, 2048, 5632, 8192]


def test_compiled_blocks_keep_their_parameter_names():
    net = small()
    names = [name for name, _ in net.named_parameters()]
    net.compile_blocks(backend="eager")
    assert [name for name, _ in net.named_parameters()] == names
    assert net(torch.randint(100, (1, 5))).shape == (1, 5, 100)


def test_a_canon_point_that_no_block_has_is_said():
    with pytest.warns(UserWarning, match="no block of this model has point b"):
        build_model(["model=llama", "canon.positions=AbCD"], device="meta")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_model(["model=hybrid", "canon.positions=AbCD"], device="meta")
        build_model(["model=mamba2", "canon.positions=ABbCD"], device="meta")


@pytest.mark.parametrize(("model", "letter"), [("llama", "T"), ("gla", "G"), ("gdn", "G"), ("mamba2", "M")])
def test_a_misspelt_backend_is_refused_before_anything_runs(model, letter):
    with pytest.raises(ConfigError, match=r"'flaa' does not exist"):
        build_model([f"model={model}", f"model.mixers.{letter}.backend=flaa"], device="meta")


def test_what_is_no_batch_of_ids_is_refused():
    net = build_model(["model.vocab_size=10"])
    with pytest.raises(ValueError, match=r"ids must be \[B, T\]; got shape \(3,\)"):
        net(torch.zeros(3, dtype=torch.long))
    with pytest.raises(TypeError, match="state must be a Cache, net.initial_state"):
        net(torch.zeros(1, 3, dtype=torch.long), state={})
