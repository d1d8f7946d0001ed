"""Llama and LlamaCanon.

Weights carry the training tree's names or Hugging Face's. The published ones are of the training tree (adjacent coordinates rotate
together) under either set of names.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from src.checkpoints.official.family import Family, Names, whole
from src.components.canon import CanonConfig
from src.components.feedforward import default_hidden_dim
from src.components.mixers.attention import Attention
from src.components.mixers.base import Mixer
from src.components.position import RoPE

# Training tree -> Hugging Face; ".weight" follows, "layers.i." or "model.layers.i." precedes those of a layer.
_TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.canonB": "self_attn.canonB",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.canonD": "mlp.canonD",
    "canonA": "canonA",
    "canonC": "canonC",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_FROM_TOP = {theirs: ours for ours, theirs in _TOP.items()}
_FROM_LAYER = {theirs: ours for ours, theirs in _LAYER.items()}


class Llama(Family):
    """Softmax attention; B acts on q, k and v together."""

    model_names = ("Llama", "LlamaCanon")
    mixer_class = Attention
    keys = ("n_kv_heads", "head_dim", "norm_eps", "rope_theta", "rope_dim", "qk_norm", "weight_tying")
    points = "ABCD"  # there is no short convolution of its own
    layer_prefix = "layers.{}."
    top_names: ClassVar = {
        "embedding.weight": "tok_embeddings.weight",
        "norm.weight": "norm.weight",
        "head.weight": "output.weight",
    }

    def settings(self, config: dict[str, Any]) -> dict[str, Any]:
        """As ``Family.settings``, with the widths of heads worked out."""
        settings = super().settings(config)
        settings["n_kv_heads"] = settings["n_kv_heads"] or settings["n_heads"]
        settings["head_dim"] = settings["head_dim"] or settings["dim"] // settings["n_heads"]
        settings["rope_dim"] = settings["rope_dim"] or settings["head_dim"]
        if settings["rope_dim"] > settings["head_dim"]:
            most = f"at most head_dim={settings['head_dim']}"
            raise ValueError(f"official config rope_dim={settings['rope_dim']}: {most}")
        return settings

    def default_hidden_dim(self, dim: int) -> int:
        """8/3 of the model width, rounded up to a multiple of 256."""
        return default_hidden_dim(dim)

    def mixer(self, settings: dict[str, Any], rope_pairing: Any, dim: int, canon: CanonConfig, layer: int) -> Mixer:
        """Attention with rotation of the first ``rope_dim`` coordinates of each head."""
        dims = settings["rope_dim"] / settings["head_dim"]
        return Attention(
            dim,
            canon,
            num_heads=settings["n_heads"],
            num_kv_heads=settings["n_kv_heads"],
            head_dim=settings["head_dim"],
            qk_norm=settings["qk_norm"],
            norm_eps=settings["norm_eps"],
            position=RoPE(theta=settings["rope_theta"], pairing=rope_pairing, dims=dims),
            layer=layer,
        )

    def describe_mixer(self, mixer: Any) -> dict[str, Any]:
        """The reverse of ``mixer``."""
        position = mixer.position
        if type(position) is not RoPE or position.heads != 1 or position.pairing != "adjacent":
            raise ValueError(f"its position encoding is {position}, not rotation of adjacent coordinates in all heads")
        if getattr(mixer, "window", None) is not None:
            raise ValueError(f"its attention has a window of {mixer.window} tokens")
        norm_eps = {} if mixer.q_norm is None else {"norm_eps": mixer.q_norm.eps}
        return norm_eps | {
            "n_heads": mixer.num_heads,
            "n_kv_heads": mixer.num_kv_heads,
            "head_dim": mixer.head_dim,
            "rope_theta": position.theta,
            "rope_dim": round(position.dims * mixer.head_dim),
            "qk_norm": mixer.q_norm is not None,
        }

    def layer_names(self, settings: dict[str, Any]) -> Names:
        """q, k, v and gate, up are matrices of their own."""
        q, kv = (settings[heads] * settings["head_dim"] for heads in ("n_heads", "n_kv_heads"))
        hidden = settings["hidden_dim"]
        return {
            "mixer.qkv_proj.weight": {"attention.wq.weight": q, "attention.wk.weight": kv, "attention.wv.weight": kv},
            "feedforward.in_proj.weight": {"feed_forward.w1.weight": hidden, "feed_forward.w3.weight": hidden},
        } | whole(
            {
                "mixer_norm.weight": "attention_norm.weight",
                "canon_a.weight": "canonA.weight",
                "mixer.q_norm.weight": "attention.q_norm.weight",
                "mixer.k_norm.weight": "attention.k_norm.weight",
                "mixer.canon_b.weight": "attention.canonB.weight",
                "mixer.out_proj.weight": "attention.wo.weight",
                "feedforward_norm.weight": "ffn_norm.weight",
                "canon_c.weight": "canonC.weight",
                "feedforward.canon_d.weight": "feed_forward.canonD.weight",
                "feedforward.out_proj.weight": "feed_forward.w2.weight",
            }
        )

    def training_name(self, name: str) -> str:
        """From Hugging Face's name; any other is returned as it is."""
        stem = name.removesuffix(".weight")
        layer = re.fullmatch(r"model\.(layers\.\d+\.)(.+)", stem)
        if layer is not None and layer[2] in _FROM_LAYER:
            return f"{layer[1]}{_FROM_LAYER[layer[2]]}.weight"
        return f"{_FROM_TOP[stem]}.weight" if stem in _FROM_TOP else name

    def export_name(self, name: str, names: str) -> str:
        """To Hugging Face's name if wanted."""
        if names == "training":
            return name
        stem = name.removesuffix(".weight")
        layer = re.fullmatch(r"(layers\.\d+\.)(.+)", stem)
        return f"{_TOP[stem]}.weight" if layer is None else f"model.{layer[1]}{_LAYER[layer[2]]}.weight"
