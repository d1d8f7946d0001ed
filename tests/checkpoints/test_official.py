import json

import pytest
import torch
from safetensors.torch import load_file

from src.build import build_model
from src.checkpoints import from_official, to_official

# The project's own fixture: a toy LlamaCanon's names and shapes in the release's terms.
CONFIG = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 24, "vocab_size": 11, "qk_norm": True}
CONFIG |= {"rope_dim": 4, "canon_set": "ABCD"}


def weights():
    generator = torch.Generator().manual_seed(0)
    shapes = {"tok_embeddings.weight": (11, 32), "norm.weight": (32,), "output.weight": (11, 32)}
    for i in range(2):
        layer = {
            "attention.wq.weight": (32, 32),
            "attention.wk.weight": (16, 32),
            "attention.wv.weight": (16, 32),
            "attention.wo.weight": (32, 32),
            "attention.q_norm.weight": (32,),
            "attention.k_norm.weight": (16,),
            "attention.canonB.weight": (64, 1, 4),
            "feed_forward.w1.weight": (24, 32),
            "feed_forward.w3.weight": (24, 32),
            "feed_forward.w2.weight": (32, 24),
            "feed_forward.canonD.weight": (48, 1, 4),
            "canonA.weight": (32, 1, 4),
            "canonC.weight": (32, 1, 4),
            "attention_norm.weight": (32,),
            "ffn_norm.weight": (32,),
        }
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_logits_of_the_official_model(golden_dir):
    config = json.loads((golden_dir / "llama_canon.json").read_text())["config"]
    tensors = load_file(golden_dir / "llama_canon.safetensors")
    net = from_official(config, official_state(tensors))
    with torch.no_grad():
        assert (net(tensors["ids"]) - tensors["logits"]).abs().max() < 1e-5


def test_logits_with_half_split_rotation(golden_dir):
    """The same weights under Hugging Face's pairing of coordinates."""
    config = json.loads((golden_dir / "llama_canon.json").read_text())["config"]
    tensors = load_file(golden_dir / "llama_canon.safetensors")
    net = from_official(config, official_state(tensors), rope_pairing="half_split")
    with torch.no_grad():
        assert (net(tensors["ids"]) - tensors["logits_hf_rope_same_weights"]).abs().max() < 1e-5


def official_state(tensors):
    return {name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")}


def test_there_and_back():
    config, state = to_official(from_official(CONFIG, weights()))
    assert {key: config[key] for key in CONFIG} == CONFIG
    original = weights()
    assert state.keys() == original.keys()
    assert all(torch.equal(state[name], original[name]) for name in state)


def test_hugging_face_names():
    renamed = {}
    for name, tensor in weights().items():
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
        renamed["model." + name if name.startswith("layers.") else name] = tensor
    ids = torch.randint(11, (1, 9))
    assert torch.equal(from_official(CONFIG, renamed)(ids), from_official(CONFIG, weights())(ids))


def test_tied_embeddings():
    tied = {name: t for name, t in weights().items() if name != "output.weight"}
    net = from_official(CONFIG | {"weight_tying": True}, tied)
    assert net.head.weight is net.embedding.weight
    assert to_official(net)[1].keys() == tied.keys()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIG | {"n_head": 4}, "'n_head' is not known"),
        ({k: v for k, v in CONFIG.items() if k != "n_heads"}, "'n_heads' must be given"),
        (CONFIG | {"canon_set": "ABC"}, "hold 'layers.0.feed_forward.canonD.weight'"),
        (CONFIG | {"n_layers": 3}, "lack 'layers.2"),
        (CONFIG | {"model_name": "RetNet"}, "RetNet"),
    ],
)
def test_what_does_not_fit_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        from_official(config, weights())


@pytest.mark.parametrize(
    "overrides", [["position=nope"], ["position=rope_quarter"], ["model=gpt2"]], ids=lambda o: o[0].split("=")[1]
)
def test_what_the_release_cannot_express_is_refused(overrides):
    with pytest.raises(ValueError, match="cannot express block 0"):
        to_official(build_model([*overrides, "model.vocab_size=20"]))
