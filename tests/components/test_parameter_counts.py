"""Every published size to the last digit, from the configurations, on the meta device."""

from typing import Any

import pytest

from src.build import CONFIG_DIR, build_model, compose_config, model_from_config
from src.config import to_plain

# (layers, Canon letters) -> (all parameters, those of one block), as the release instantiates them
PUBLISHED = {
    ("llama", "1B"): (1_364_396_032, 51_388_416),
    ("llama", "3B"): (3_141_331_968, 113_258_496),
    ("llama", "8B"): (8_030_261_248, 218_112_000),
    ("llama_canon", "1B"): (1_366_460_416, 51_474_432),
    ("llama_canon", "3B"): (3_144_633_344, 113_385_472),
    ("llama_canon", "8B"): (8_035_766_272, 218_284_032),
    ("gla5_conv", "1B"): (1_344_004_096, 50_538_752),
    ("gla5_conv", "3B"): (3_149_086_208, 113_556_736),
    ("gla5_conv", "8B"): (8_009_691_136, 217_469_184),
    ("gla5_canon", "1B"): (1_345_183_744, 50_587_904),
    ("gla5_canon", "3B"): (3_151_003_136, 113_630_464),
    ("gla5_canon", "8B"): (8_013_164_544, 217_577_728),
    ("gdn2_conv", "1B"): (1_343_955_712, 50_536_736),
    ("gdn2_conv", "3B"): (3_150_285_536, 113_602_864),
    ("gdn2_conv", "8B"): (8_013_756_416, 217_596_224),
    ("gdn2_canon", "1B"): (1_345_135_360, 50_585_888),
    ("gdn2_canon", "3B"): (3_152_202_464, 113_676_592),
    ("gdn2_canon", "8B"): (8_017_229_824, 217_704_768),
    ("mamba2_conv", "1B"): (1_353_122_944, 50_918_704),
    ("mamba2_conv", "3B"): (3_164_530_000, 114_150_728),
    ("mamba2_conv", "8B"): (8_036_072_448, 218_293_600),
    ("mamba2_canon", "1B"): (1_354_302_592, 50_967_856),
    ("mamba2_canon", "3B"): (3_166_446_928, 114_224_456),
    ("mamba2_canon", "8B"): (8_039_545_856, 218_402_144),
}
LINEAR_TOY = ["size=tiny", "size.dim=32", "model.vocab_size=100"]
LINEAR_TOY += [f"size.{key}=2" for key in ("linear.num_heads", "mamba2.num_heads")]
LINEAR_TOY += ["size.linear.hidden_dim=64", "size.mamba2.state_size=64"]
TOY = {
    ("gla5", "AbCD"): 39_072,
    ("gla5", "b"): 37_536,
    ("gla5", "ACD"): 38_048,
    ("gdn2", "AbCD"): 37_224,
    ("gdn2", "b"): 35_688,
    ("gdn2", "ACD"): 36_200,
    ("mamba2", "AbCD"): 43_052,
    ("mamba2", "b"): 41_516,
    ("mamba2", "ACD"): 42_668,
}
# What the Canon layers of a published model have: A to D, or A, C and D.
CANON = {
    "1B": {"llama_canon": 2_064_384} | dict.fromkeys(("gla5_canon", "gdn2_canon", "mamba2_canon"), 1_179_648),
    "3B": {"llama_canon": 3_301_376} | dict.fromkeys(("gla5_canon", "gdn2_canon", "mamba2_canon"), 1_916_928),
    "8B": {"llama_canon": 5_505_024} | dict.fromkeys(("gla5_canon", "gdn2_canon", "mamba2_canon"), 3_473_408),
}
SHORT_CONVOLUTIONS = {("gla5_conv", "1B"): 786_432, ("gdn2_conv", "1B"): 786_432, ("mamba2_conv", "1B"): 522_240}
MODELS = sorted(path.stem for path in (CONFIG_DIR / "model").glob("*.yaml") if path.stem != "base")
SIZES = sorted(path.stem for path in (CONFIG_DIR / "size").glob("*.yaml"))


def net(*overrides: str) -> Any:
    return build_model(list(overrides), device="meta")


def counted(model) -> int:
    return sum(p.numel() for p in model.parameters())


def test_every_published_family_is_here():
    families = {path.stem for path in (CONFIG_DIR / "family").glob("*.yaml")}
    assert {(family, size) for family in families for size in ("1B", "3B", "8B")} == set(PUBLISHED)


@pytest.mark.parametrize(("family", "size"), PUBLISHED)
def test_published_models(family, size):
    total, per_block = PUBLISHED[family, size]
    model = net(f"family={family}", f"size={size}")
    assert counted(model) == model.count_parameters() == total
    assert {counted(block) for block in model.blocks} == {per_block}
    parts = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(n for name, n in parts.items() if "canon_" in name) == CANON[size].get(family, 0)
    if (family, size) in SHORT_CONVOLUTIONS:
        assert sum(n for name, n in parts.items() if "conv_b" in name) == SHORT_CONVOLUTIONS[family, size]


@pytest.mark.parametrize(("model", "canon"), TOY)
def test_toys(model, canon):
    toy = net(f"model={model}", f"canon.positions={canon}", *LINEAR_TOY)
    assert counted(toy) == toy.count_parameters() == TOY[model, canon]


@pytest.fixture(scope="module")
def sizes():
    return {size: compose_config([f"size={size}"]).size for size in SIZES}


@pytest.mark.parametrize("model", MODELS)
def test_every_model_in_every_size(model, sizes):
    """Four blocks of each, which is all that a longer one repeats."""
    config = compose_config([f"model={model}", "model.vocab_size=100"])
    for i, size in enumerate(SIZES):
        config.size = sizes[size]
        # Each size with one choice of points, each choice with several sizes.
        config.canon.positions = ["", "b", "ABC" if "moe" in model else "ABbCD"][i % 3]
        built = model_from_config(to_plain(config.model) | {"depth": 4}, "meta")
        assert counted(built) == built.count_parameters()
        assert built.dim == sizes[size].dim


def test_mamba2_without_feed_forward_has_twice_the_blocks_and_about_as_many_parameters():
    for size in ("8L512D", "1B"):
        alternating, alone = net("model=mamba2", f"size={size}"), net("model=mamba2_no_mlp", f"size={size}")
        assert alone.depth == 2 * alternating.depth
        assert all(block.feedforward is None for block in alone.blocks)
        assert alone.count_parameters() == pytest.approx(alternating.count_parameters(), rel=0.03)


def test_a_hybrid_has_both_mixers_even_when_tiny():
    for size, pattern in (("tiny", "GT"), ("8L512D", "GTGGGTGG")):
        kinds = [type(block.mixer).__name__[0] for block in net("model=hybrid", f"size={size}").blocks]
        assert "".join("T" if kind == "A" else kind for kind in kinds) == pattern
