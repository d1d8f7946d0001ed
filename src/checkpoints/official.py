"""Models of the official release, to and from ours.

The release keeps q, k, v and gate, up as separate matrices; ours are stacked (rows q, k, v; rows gate, up), so that Canon-B and
Canon-D act on one tensor. Nothing else differs: names are mapped, values are copied.

Config keys are the training tree's (``dim, n_layers, n_heads, ...``); weights may carry its names or Hugging Face's.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from torch import Tensor

from src.components.backbone import Backbone
from src.components.canon import CanonConfig
from src.components.feedforward import FeedForward, default_hidden_dim
from src.components.mixers.attention import Attention
from src.components.position import RoPE

# The training tree's defaults; None: derived from others.
_LLAMA_DEFAULTS: dict[str, Any] = {
    "dim": 512,
    "n_layers": 8,
    "n_heads": None,
    "n_kv_heads": None,
    "head_dim": None,
    "hidden_dim": None,
    "vocab_size": None,
    "norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "rope_dim": None,
    "qk_norm": False,
    "weight_tying": False,
    "canon_set": "",
    "canon_kernel": 4,
    "canon_residual": True,
    "canon_activation": False,
    "canon_bias": False,
    "z_loss": False,  # of the loss, not of the model
}

_HUGGING_FACE = {
    r"^model\.embed_tokens\.": "tok_embeddings.",
    r"^model\.norm\.": "norm.",
    r"^lm_head\.": "output.",
    r"^model\.layers\.": "layers.",
    r"\.self_attn\.([qkvo])_proj\.": r".attention.w\1.",
    r"\.self_attn\.": ".attention.",
    r"\.mlp\.gate_proj\.": ".feed_forward.w1.",
    r"\.mlp\.up_proj\.": ".feed_forward.w3.",
    r"\.mlp\.down_proj\.": ".feed_forward.w2.",
    r"\.mlp\.": ".feed_forward.",
    r"\.input_layernorm\.": ".attention_norm.",
    r"\.post_attention_layernorm\.": ".ffn_norm.",
}

# Ours -> the release's, for one layer; several names are stacked along their rows.
_LAYER = {
    "mixer_norm.weight": ["attention_norm.weight"],
    "mixer.qkv_proj.weight": ["attention.wq.weight", "attention.wk.weight", "attention.wv.weight"],
    "mixer.out_proj.weight": ["attention.wo.weight"],
    "mixer.q_norm.weight": ["attention.q_norm.weight"],
    "mixer.k_norm.weight": ["attention.k_norm.weight"],
    "mixer.canon_b.weight": ["attention.canonB.weight"],
    "canon_a.weight": ["canonA.weight"],
    "canon_c.weight": ["canonC.weight"],
    "feedforward_norm.weight": ["ffn_norm.weight"],
    "feedforward.in_proj.weight": ["feed_forward.w1.weight", "feed_forward.w3.weight"],
    "feedforward.out_proj.weight": ["feed_forward.w2.weight"],
    "feedforward.canon_d.weight": ["feed_forward.canonD.weight"],
}
_TOP = {"embedding.weight": ["tok_embeddings.weight"], "norm.weight": ["norm.weight"], "head.weight": ["output.weight"]}


def from_official(
    config: dict[str, Any],
    state_dict: dict[str, Tensor],
    *,
    rope_pairing: Literal["adjacent", "half_split"] = "adjacent",
) -> Backbone:
    """Builds our model with the weights of an official Llama or LlamaCanon.

    Args:
        config: in the terms of the training tree; keys left out have its defaults.
        state_dict: the weights, under the training tree's or Hugging Face's names.
        rope_pairing: which coordinates rotate together. The published checkpoints were trained with ``adjacent``, whatever
            names they carry; ``half_split`` is for models trained under Hugging Face's own Llama.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: for a family or key that is not known here, or weights that do not fit the configuration.
    """
    if config.get("model_name", "Llama") not in ("Llama", "LlamaCanon"):
        raise ValueError(
            f"model_name={config['model_name']!r}: the families that can be converted are Llama, LlamaCanon"
        )
    unknown = sorted(set(config) - set(_LLAMA_DEFAULTS) - {"model_name"})
    if unknown:
        raise ValueError(f"official config key {unknown[0]!r} is not known; keys are {', '.join(_LLAMA_DEFAULTS)}")
    settings = _LLAMA_DEFAULTS | config
    missing = [key for key in ("n_heads", "vocab_size") if settings[key] is None]
    if missing:
        raise ValueError(f"official config key {missing[0]!r} must be given")
    if settings["canon_bias"]:
        raise ValueError("canon_bias=True: the release refuses it as well")

    with torch.device("meta"):
        net = _build_llama(settings, rope_pairing)
    source = {_training_name(name): weight for name, weight in state_dict.items()}
    target: dict[str, Tensor] = {}
    for name in net.state_dict():
        parts = _official_names(name)
        if name == "head.weight" and net.tie_embeddings:
            source.pop("output.weight", None)
            parts = []
        absent = [part for part in parts if part not in source]
        if absent:
            raise ValueError(f"the official weights lack {absent[0]!r}, which this configuration needs")
        if parts:
            target[name] = torch.cat([source.pop(part) for part in parts]).clone()
    if source:
        raise ValueError(f"the official weights hold {sorted(source)[0]!r}, for which this configuration has no place")
    if net.tie_embeddings:
        target["head.weight"] = target["embedding.weight"]
    net.load_state_dict(target, assign=True)
    if net.tie_embeddings:
        net.head.weight = net.embedding.weight
    return net.eval()


def to_official(model: Backbone) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The reverse of ``from_official``: configuration and weights under the training tree's names.

    Raises:
        ValueError: for a model that the release cannot express, saying why.
    """
    block: Any = model.blocks[0]
    attention, feedforward = block.mixer, block.feedforward
    _raise_unless_expressible(model)
    canon = model.canon
    config = {
        "dim": model.dim,
        "n_layers": model.depth,
        "n_heads": attention.num_heads,
        "n_kv_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "hidden_dim": feedforward.hidden_dim,
        "vocab_size": model.vocab_size,
        "norm_eps": model.norm.eps,
        "rope_theta": attention.position.theta,
        "rope_dim": int(attention.position.dims * attention.head_dim),
        "qk_norm": attention.q_norm is not None,
        "weight_tying": model.tie_embeddings,
        "canon_set": canon.positions.replace("b", ""),
        "canon_kernel": canon.kernel_size,
        "canon_residual": canon.residual,
        "canon_activation": canon.activation is not None,
        "canon_bias": canon.bias,
    }
    widths = {"mixer.qkv_proj.weight": attention.widths, "feedforward.in_proj.weight": [feedforward.hidden_dim] * 2}
    weights: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        if name == "head.weight" and model.tie_embeddings:
            continue
        parts = _official_names(name)
        rows = widths.get(re.sub(r"^blocks\.\d+\.", "", name), [weight.shape[0]])
        weights |= {part: piece.clone() for part, piece in zip(parts, weight.split(rows), strict=True)}
    return config, weights


def _build_llama(settings: dict[str, Any], pairing: Literal["adjacent", "half_split"]) -> Backbone:
    heads, dim = settings["n_heads"], settings["dim"]
    head_dim = settings["head_dim"] or dim // heads
    rotated = (settings["rope_dim"] or head_dim) / head_dim
    position = RoPE(theta=settings["rope_theta"], pairing=pairing, dims=rotated)

    def mixer(dim: int, canon: CanonConfig, layer: int) -> Attention:
        return Attention(
            dim,
            canon,
            num_heads=heads,
            num_kv_heads=settings["n_kv_heads"],
            head_dim=head_dim,
            qk_norm=settings["qk_norm"],
            norm_eps=settings["norm_eps"],
            position=position,
            layer=layer,
        )

    def feedforward(dim: int, canon: CanonConfig, layer: int) -> FeedForward:
        return FeedForward(dim, canon, hidden_dim=settings["hidden_dim"] or default_hidden_dim(dim), layer=layer)

    return Backbone(
        vocab_size=settings["vocab_size"],
        dim=dim,
        depth=settings["n_layers"],
        mixers={"T": mixer},
        feedforward=feedforward,
        canon=CanonConfig(
            positions=settings["canon_set"].replace("b", ""),  # Llama has no convolution of its own
            kernel_size=settings["canon_kernel"],
            residual=settings["canon_residual"],
            activation="silu" if settings["canon_activation"] else None,
        ),
        norm_eps=settings["norm_eps"],
        tie_embeddings=settings["weight_tying"],
    )


def _raise_unless_expressible(model: Backbone) -> None:
    for layer, block in enumerate(model.blocks):
        mixer, feedforward = getattr(block, "mixer", None), getattr(block, "feedforward", None)
        position = getattr(mixer, "position", None)
        problem = None
        if not isinstance(mixer, Attention):
            problem = f"its mixer is {type(mixer).__name__}"
        elif not isinstance(position, RoPE) or position.heads != 1 or position.pairing != "adjacent":
            problem = f"its position encoding is {position}"
        elif feedforward is None or not feedforward.gated or feedforward.activation != "silu":
            problem = "its feed-forward is not SwiGLU"
        if problem:
            raise ValueError(f"the official Llama cannot express block {layer}: {problem}")


def _official_names(name: str) -> list[str]:
    match = re.match(r"^blocks\.(\d+)\.(.+)$", name)
    if match is None:
        return _TOP[name]
    return [f"layers.{match[1]}.{part}" for part in _LAYER[match[2]]]


def _training_name(name: str) -> str:
    if not name.startswith(("model.", "lm_head.")):
        return name
    for pattern, replacement in _HUGGING_FACE.items():
        name = re.sub(pattern, replacement, name)
    return name
