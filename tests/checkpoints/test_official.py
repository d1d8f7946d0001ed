"""The release's models, converted: against their own logits, and against a plain implementation for every variant of the configuration."""

import json

import pytest
import torch
from safetensors.torch import load_file

from src.build import build_model
from src.checkpoints import from_official, to_official
from tests.naive import official

LLAMA = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 24, "vocab_size": 11, "qk_norm": True}
LLAMA |= {"rope_dim": 4, "canon_set": "ABCD"}
SMALL = {"dim": 16, "n_heads": 2, "n_layers": 2, "vocab_size": 11, "canon_set": "AbCD"}
GLA5, GDN2 = {"model_name": "GLA5"} | SMALL, {"model_name": "GDN2"} | SMALL
MAMBA2 = {"model_name": "Mamba2", "mlp_type": "mlp10", "mamba_ssm": 8} | SMALL
PLAIN = {"model_name": "Mamba2", "mamba_ssm": 8} | SMALL
LETTERS = ["", "b", "bb", "B", "D", "ACD", "AbbCD", "DCbBA"]
KIND = [{"canon_kernel": 2}, {"canon_kernel": 5}, {"canon_residual": False}, {"canon_activation": True}]
KIND += [{"canon_residual": False, "canon_activation": True, "canon_kernel": 3, "canon_set": "ABbCD"}]
SHARED = [{"canon_set": letters} for letters in LETTERS] + KIND
SHARED += [{"n_heads": 1}, {"n_heads": 8}, {"hidden_dim": 20}, {"n_layers": 1}, {"z_loss": True}, {"canon_bias": False}]
ONLY = {
    "llama": [{}, {"model_name": "Llama"}, {"model_name": "LlamaCanon"}, {"n_kv_heads": None, "rope_dim": None}]
    + [
        {"qk_norm": False},
        {"n_kv_heads": 1},
        {"head_dim": 6, "rope_dim": 2},
        {"head_dim": 12, "n_heads": 3, "n_kv_heads": 3},
    ]
    + [{"head_dim": 88, "rope_dim": 30, "n_heads": 1, "n_kv_heads": 1}]  # 30 / 88 * 88 is not 30 in floating point
    + [{"rope_theta": 100.0}, {"norm_eps": 0.01}, {"weight_tying": True}, {"hidden_dim": None, "n_layers": 1}]
    + [{"canon_set": letters} for letters in ["", "B", "ACD", "DCBA", "AABB"]]
    + [kind | {"canon_set": "ABCD"} for kind in KIND],
    "gla5": [{"zeyuan_layernorm": True}, {"zeyuan_layernorm": False}, *SHARED],
    "gdn2": [{"zeyuan_layernorm": True}, *SHARED],
    "mamba2": [{"zeyuan_layernorm": True}, {"mamba_ssm": 5}, {"mamba_ssm": None, "n_layers": 1}, *SHARED],
    "mamba2_plain": [{}, {"mlp_type": None}, {"canon_set": ""}, {"canon_set": "ABb"}, {"canon_set": "ABCD"}, *KIND],
}
BASE = {"llama": LLAMA, "gla5": GLA5, "gdn2": GDN2, "mamba2": MAMBA2, "mamba2_plain": PLAIN}
VARIANTS = [pytest.param(BASE[f] | v, id=f"{f}-{v}") for f, variants in ONLY.items() for v in variants]
FAMILIES = [pytest.param(config, id=name) for name, config in BASE.items()]
GOLDEN = ["llama_canon", "gla5_canon", "gdn2_canon", "mamba2_canon"]


def some_ids(*shape, seed=0):
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(seed))


def in_double(config, **options):
    """The converted model in float64, so that nothing but the formula is left to differ."""
    state = {name: weight.double() for name, weight in official.weights(config).items()}
    return from_official(config, state, **options)


def golden(folder, name):
    """Configuration, weights, and pairs of ids and logits."""
    tensors = load_file(folder / f"{name}.safetensors")
    state = {key.removeprefix("state."): t for key, t in tensors.items() if key.startswith("state.")}
    pairs = [(tensors[ids], tensors[ids.replace("ids", "logits")]) for ids in ("ids", "ids1") if ids in tensors]
    return json.loads((folder / f"{name}.json").read_text())["config"], state, pairs


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_of_the_official_model(golden_dir, name):
    config, state, pairs = golden(golden_dir, name)
    net = from_official(config, state)
    assert not net.training
    for ids, logits in pairs:
        with torch.no_grad():
            torch.testing.assert_close(net(ids), logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_plain_implementation_gives_the_official_logits(golden_dir, name):
    config, state, pairs = golden(golden_dir, name)
    assert official.shapes(config) == {name: tuple(weight.shape) for name, weight in state.items()}
    for ids, logits in pairs:
        torch.testing.assert_close(official.logits(config, state, ids).float(), logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", GOLDEN)
def test_official_models_there_and_back(golden_dir, name):
    config, state, _ = golden(golden_dir, name)
    assert_same(to_official(from_official(config, state)), config, state)


def test_logits_with_half_split_rotation(golden_dir):
    """The same weights under Hugging Face's pairing of coordinates."""
    config, state, [(ids, _)] = golden(golden_dir, "llama_canon")
    logits = load_file(golden_dir / "llama_canon.safetensors")["logits_hf_rope_same_weights"]
    with torch.no_grad():
        found = from_official(config, state, rope_pairing="half_split")(ids)
    torch.testing.assert_close(found, logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("config", VARIANTS)
def test_every_variant_computes_what_the_description_says(config):
    ids = some_ids(1, 9)
    with torch.no_grad():
        found = in_double(config)(ids)
    expected = official.logits(config, official.weights(config), ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("config", FAMILIES)
def test_rows_longer_than_a_chunk(config):
    ids = some_ids(2, 75)
    with torch.no_grad():
        found = from_official(config, official.weights(config))(ids)
    expected = official.logits(config, official.weights(config), ids)
    torch.testing.assert_close(found, expected.float(), atol=2e-5, rtol=0)


def test_half_split_rotation():
    ids = some_ids(1, 9)
    with torch.no_grad():
        found = in_double(LLAMA, rope_pairing="half_split")(ids)
    expected = official.logits(LLAMA | {"half_split": True}, official.weights(LLAMA), ids)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


# --------------------------------------------------------------------------------------------------------------- there and back


def assert_same(found, config, state):
    found_config, found_state = found
    assert {key: found_config[key] for key in config} == config
    assert found_state.keys() == state.keys()
    for name, weight in state.items():
        torch.testing.assert_close(found_state[name], weight, atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("config", VARIANTS)
def test_there_and_back(config):
    state = official.weights(config)
    net = from_official(config, state)
    found_config, found_state = to_official(net)
    assert_same((found_config, found_state), config, state)
    assert_same(to_official(from_official(found_config, found_state)), found_config, found_state)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=llama", "canon.positions=ABCD", "position=rope_quarter_dims"],
        ["model=llama", "model.tie_embeddings=true", "model.norm_eps=1e-6"],
        ["model=gla5", "canon.positions=AbCD"],
        ["model=gla5", "canon.positions=b", "++model.mixers.G.qkv_activation=null"],  # b brings its SiLU
        ["model=gdn2", "canon.positions=ABCD", "canon.residual=false"],
        ["model=gdn2", "canon.positions=b", "canon.trainable=false"],
        ["model=mamba2", "canon.positions=AbCD", "canon.kernel_size=3"],
        ["model=mamba2", "canon.positions=ACD", "canon.activation=silu"],
        ["model=mamba2_no_mlp", "canon.positions=Ab"],
    ],
    ids=" ".join,
)
def test_a_model_of_ours_there_and_back(overrides):
    net = build_model([*overrides, "model.vocab_size=11"]).eval()
    config, state = to_official(net)
    assert official.shapes(config) == {name: tuple(weight.shape) for name, weight in state.items()}
    ids = some_ids(1, 9)
    with torch.no_grad():
        torch.testing.assert_close(from_official(config, state)(ids), net(ids), atol=0, rtol=0)


def test_what_a_model_does_not_show_is_kept_only_while_it_is_what_it_was():
    net = from_official(GLA5 | {"z_loss": True}, official.weights(GLA5))
    assert to_official(net)[0]["z_loss"] is True
    net.blocks = net.blocks[:1]
    net.depth = 1
    config, state = to_official(net)
    assert "z_loss" not in config
    assert config["n_layers"] == 1
    assert not any("layers.1" in name for name in state)


def test_weights_are_copied():
    state = official.weights(MAMBA2)
    net = from_official(MAMBA2, state)
    _, exported = to_official(net)
    with torch.no_grad():
        for weight in net.parameters():
            weight.zero_()
    original = official.weights(MAMBA2)
    for name in original:
        assert torch.equal(state[name], original[name])
        assert torch.equal(exported[name], original[name])


@pytest.mark.parametrize("config", FAMILIES)
def test_dtypes_are_kept(config):
    state = {
        name: w if name.endswith(("A_log", "dt_bias")) else w.bfloat16() for name, w in official.weights(config).items()
    }
    net = from_official(config, state)
    assert_same(to_official(net), config, state)
    with torch.no_grad():
        assert net(some_ids(1, 5)).isfinite().all()


def hugging_face(name):
    """A training tree's name as Hugging Face has it, by hand."""
    name = name.replace("tok_embeddings.", "model.embed_tokens.").replace("output.", "lm_head.")
    name = "model.norm.weight" if name == "norm.weight" else name
    for ours, theirs in [
        ("attention.w", "self_attn."),
        ("attention.", "self_attn."),
        ("feed_forward.canonD", "mlp.canonD"),
    ]:
        name = name.replace(f".{ours}", f".{theirs}")
    for letter in "qkvo":
        name = name.replace(f"self_attn.{letter}.weight", f"self_attn.{letter}_proj.weight")
    for ours, theirs in [("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")]:
        name = name.replace(f"feed_forward.{ours}", f"mlp.{theirs}")
    name = name.replace("attention_norm", "input_layernorm").replace("ffn_norm", "post_attention_layernorm")
    return "model." + name if name.startswith("layers.") else name


def test_hugging_face_names():
    state = official.weights(LLAMA)
    renamed = {hugging_face(name): weight for name, weight in state.items()}
    net = from_official(LLAMA, renamed)
    assert_same(to_official(net), LLAMA, state)
    assert_same(to_official(net, names="hugging_face"), LLAMA, renamed)
    assert_same(
        to_official(from_official(GLA5, official.weights(GLA5)), names="hugging_face"), GLA5, official.weights(GLA5)
    )


@pytest.mark.parametrize("with_head", [False, True])
def test_tied_embeddings(with_head):
    config = LLAMA | {"weight_tying": True}
    state = official.weights(config)
    net = from_official(config, state | ({"output.weight": state["tok_embeddings.weight"]} if with_head else {}))
    assert net.head.weight is net.embedding.weight
    assert_same(to_official(net), config, state)


def test_the_unused_convolution_of_mamba2():
    """Without b it is stored as zeros, frozen, and means nothing; with b it is a weight like another."""
    config = MAMBA2 | {"canon_set": "ACD"}
    state, name = official.weights(config), "backbone.layers.1.mixer.conv1d.weight"
    assert not state[name].any()
    ids = some_ids(1, 9)
    expected = official.logits(config, state, ids).float()
    for given in (
        state,
        state | {name: torch.ones_like(state[name])},
        {k: w for k, w in state.items() if "conv1d" not in k},
    ):
        net = from_official(config, given)
        with torch.no_grad():
            torch.testing.assert_close(net(ids), expected, atol=2e-5, rtol=0)
        assert [n for n, p in net.named_parameters() if not p.requires_grad] == [
            f"blocks.{i}.mixer.unused_conv" for i in range(2)
        ]
        assert_same(to_official(net), config, state)
    assert all(parameter.requires_grad for parameter in from_official(MAMBA2, official.weights(MAMBA2)).parameters())


def test_settings_without_a_feedforward_are_said_to_be_ignored(caplog):
    from_official(PLAIN | {"hidden_dim": 20}, official.weights(PLAIN))
    assert "the C of canon_set=AbCD, the D of canon_set=AbCD, hidden_dim=20" in caplog.text


# ----------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LLAMA | {"n_head": 4}, "'n_head' is not known; keys of Llama are dim"),
        (GLA5 | {"rope": 4}, "'rope' is not known; keys of GLA5 are dim"),
        ({k: v for k, v in LLAMA.items() if k != "n_heads"}, "'n_heads' must be given"),
        (GDN2 | {"vocab_size": None}, "'vocab_size' must be given"),
        (LLAMA | {"canon_set": "ABC"}, "hold 'layers.0.feed_forward.canonD.weight', 'layers.1.feed_forward"),
        (LLAMA | {"n_layers": 3}, "lack 'layers.2.attention_norm.weight', .* and 12 more"),
        (LLAMA | {"dim": 48}, "'tok_embeddings.weight' has shape \\(11, 32\\); this configuration needs \\(11, 48\\)"),
        (LLAMA | {"n_kv_heads": 1}, "'layers.0.attention.wk.weight' has shape \\(16, 32\\); .* needs \\(8, 32\\)"),
        (LLAMA | {"canon_kernel": 3}, "'layers.0.canonA.weight' has shape \\(32, 1, 4\\); .* needs \\(32, 1, 3\\)"),
        (LLAMA | {"model_name": "RetNet"}, "model_name='RetNet': .* Llama, LlamaCanon, GLA5, GDN2, Mamba2"),
        (LLAMA | {"canon_bias": True}, "canon_bias=True"),
        (LLAMA | {"canon_set": "AE"}, "canon_set='AE': letters are A B b C D"),
        (LLAMA | {"rope_dim": 10}, "rope_dim=10: at most head_dim=8"),
        (LLAMA | {"n_heads": 5}, "n_heads=5: does not divide dim=32"),
        (LLAMA | {"n_heads": "4"}, "n_heads='4': must be of type int"),
        (LLAMA | {"n_layers": True}, "n_layers=True: must be of type int"),
        (LLAMA | {"n_layers": 0}, "n_layers=0: at least 1"),
        (LLAMA | {"canon_activation": "silu"}, "canon_activation='silu': must be of type bool"),
        (LLAMA | {"zeyuan_layernorm": True}, "zeyuan_layernorm=True: Llama has no such setting"),
        (GLA5 | {"qk_norm": True}, "qk_norm=True: GLA5 has no such setting"),
        (GDN2 | {"mamba_ssm": 64}, "mamba_ssm=64: GDN2 has no such setting"),
        (GLA5 | {"canon_set": "ACD"}, "hold 'model.layers.0.attn.k_conv1d.weight'"),
        (GLA5 | {"zeyuan_layernorm": True}, "lack 'model.layers.0.attn.g_norm.weight'"),
        (GDN2 | {"canon_set": "AbC"}, "lack 'model.layers.0.mlp.gate_proj.weight', 'model.layers.0.mlp.up_proj"),
        (GDN2 | {"hidden_dim": 20}, "both_proj.weight' has shape \\(64, 16\\); .* needs \\(40, 16\\)"),
        (MAMBA2 | {"mlp_type": "mlp4"}, "mlp_type='mlp4'"),
        (MAMBA2 | {"mlp_type": None}, "hold 'backbone.layers.0.canonC.weight'"),
        (MAMBA2 | {"mamba_ssm": None}, "in_proj.weight' has shape \\(82, 16\\); .* needs \\(578, 16\\)"),
    ],
)
def test_what_does_not_fit_is_named(config, message):
    base = {"GLA5": GLA5, "GDN2": GDN2, "Mamba2": MAMBA2}.get(config.get("model_name"), LLAMA)
    with pytest.raises(ValueError, match=message):
        from_official(config, official.weights(base))


@pytest.mark.parametrize("key", ["norm_eps", "rope_theta", "weight_tying", "n_kv_heads", "qk_norm"])
def test_a_setting_of_another_family_may_have_its_default(key):
    """Configurations of one trainer list all of its keys."""
    value = {"norm_eps": 1e-5, "rope_theta": 1e4, "n_kv_heads": None}.get(key, False)
    from_official(GLA5 | {key: value, "mlp_type": ""}, official.weights(GLA5))


def test_rotation_is_for_llama():
    with pytest.raises(ValueError, match="rope_pairing='half_split': GDN2 has no rotation"):
        from_official(GDN2, official.weights(GDN2), rope_pairing="half_split")


def test_names_that_do_not_exist():
    with pytest.raises(ValueError, match="names='gguf'"):
        to_official(from_official(GDN2, official.weights(GDN2)), names="gguf")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=llama", "position=nope"], "Llama cannot express block 0: its position encoding is"),
        (["model=llama", "position=rope_quarter"], "block 0: its position encoding is"),
        (["model=llama", "position=alibi"], "block 0: its position encoding is"),
        (["model=llama", "++model.mixers.T.window=8"], "block 0: its attention has a window of 8 tokens"),
        (["model=gpt2"], "cannot express block 0"),
        (["model=llama", "canon.positions=A", "canon.bias=true"], "this model: canon_bias is True"),
        (["model=linear_attention"], "block 0: its mixer is LinearAttention, not one of Attention, GLA"),
        (["model=hybrid"], "GDN2 cannot express block 1: its mixer is Attention"),
        (["model=gla"], "GLA5 cannot express block 0: expand_k is 0.5, not 1.0, expand_v is 1.0, not 2.0, gate_rank"),
        (["model=gla5", "++model.mixers.G.qkv_activation=null"], "qkv_activation is None, not silu"),
        (["model=gla5", "++model.mixers.G.decay_normalizer=8"], "decay_normalizer is 8, not 16.0"),
        (["model=gla5", "++model.mixers.G.feature_map=elu"], "feature_map is elu, not None"),
        (["model=gla5", "++model.mixers.G.norm_eps=1e-6"], "norm_eps is 1e-06, not 1e-05"),
        (["model=gla5", "model.norm_eps=1e-6"], "this model: norm_eps is 1e-06, which can only be 1e-05"),
        (["model=gla5", "model.tie_embeddings=true"], "this model: weight_tying is True"),
        (["model=gla5", "model.feedforward.activation=relu2"], "activation=relu2"),
        (["model=gla5", "~model.feedforward", "+model.feedforward=null"], "block 0: it has no feed-forward"),
        (["model=gdn2", "++model.mixers.G.gate_rank=null"], "gate_rank is None, not 16"),
        (["model=gdn2", "++model.mixers.G.expand_v=1.0"], "expand_v is 1.0, not 2.0"),
        (["model=mamba2", "++model.mixers.M.groups=2"], "groups is 2, not 1"),
        (["model=mamba2", "++model.mixers.M.expand=4"], "expand is 4.0, not 2.0"),
        (["model=moe"], "its feed-forward is MixtureOfExperts, not SwiGLU"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_release_cannot_express_is_refused(overrides, message):
    net = build_model([*overrides, "model.vocab_size=20"], device="meta")
    with pytest.raises(ValueError, match=message):
        to_official(net)


def test_blocks_that_differ_are_refused():
    net = from_official(GDN2, official.weights(GDN2))
    other = from_official(GDN2 | {"hidden_dim": 20}, official.weights(GDN2 | {"hidden_dim": 20}))
    net.blocks[1] = other.blocks[1]
    with pytest.raises(ValueError, match="cannot express block 1: hidden_dim is 20, and 32 in block 0"):
        to_official(net)
