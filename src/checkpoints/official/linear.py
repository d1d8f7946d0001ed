"""GLA5 (gated linear attention) and GDN2 (gated DeltaNet), the release's variants with 6 d^2 weights in mixer and feed-forward each.

Both keep q, k, v and their short convolutions apart, in ours one matrix and one convolution of rows q, k, v.
"""

from __future__ import annotations

from typing import Any, ClassVar

from src.checkpoints.official.family import NORM_EPS, Family, Names, require, whole
from src.components.canon import CanonConfig
from src.components.mixers.base import Mixer
from src.components.mixers.gated_deltanet import GatedDeltaNet
from src.components.mixers.gla import GLA

RANK = 16


class _Linear(Family):
    """What the two share."""

    layer_prefix = "model.layers.{}."
    top_names: ClassVar = {
        "embedding.weight": "model.embeddings.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    options: ClassVar[dict[str, Any]]  # of the mixer, in every model of the family

    def mixer(self, settings: dict[str, Any], rope_pairing: Any, dim: int, canon: CanonConfig, layer: int) -> Mixer:
        """The family's mixer, which knows no rotation."""
        return self.mixer_class(dim, canon, num_heads=settings["n_heads"], layer=layer, **self.options)

    def describe_mixer(self, mixer: Any) -> dict[str, Any]:
        """The number of heads is all there is to choose. Where b is, it brings the activation of q, k and v."""
        found = {
            "expand_k": mixer.key_width / mixer.dim,
            "expand_v": mixer.value_width / mixer.dim,
            "norm_eps": mixer.norm.eps,
        }
        found |= {name: getattr(mixer, name) for name in self.options if name not in found}
        if mixer.conv_b is not None:
            found.pop("qkv_activation", None)
        expected = {"expand_k": 1.0} | self.options
        require({name: (value, expected[name]) for name, value in found.items()})
        return {"n_heads": mixer.num_heads}

    def layer_names(self, settings: dict[str, Any]) -> Names:
        """The names that both have."""
        dim = settings["dim"]
        widths = {"q": dim, "k": dim, "v": 2 * dim}
        return {
            "mixer.qkv_proj.weight": {f"attn.{x}_proj.weight": width for x, width in widths.items()},
            "mixer.conv_b.weight": {f"attn.{x}_conv1d.weight": width for x, width in widths.items()},
        } | whole(
            {
                "mixer_norm.weight": "attn_norm.weight",
                "canon_a.weight": "canonA.weight",
                "mixer.canon_b.weight": "attn.canonB.weight",
                "mixer.gate_in.weight": "attn.g_proj.0.weight",
                "mixer.gate_out.weight": "attn.g_proj.1.weight",
                "mixer.gate_out.bias": "attn.g_proj.1.bias",
                "mixer.out_proj.weight": "attn.o_proj.weight",
                "feedforward_norm.weight": "mlp_norm.weight",
                "canon_c.weight": "canonC.weight",
                "feedforward.canon_d.weight": "mlp.canonD.weight",
                "feedforward.out_proj.weight": "mlp.down_proj.weight",
            }
        )


class GLA5(_Linear):
    """Gated linear attention. Departure: the release refuses letter B, ours has it where GDN2 does."""

    model_names = ("GLA5",)
    mixer_class = GLA
    keys = ("zeyuan_layernorm",)
    options: ClassVar = {
        "expand_k": 1.0,
        "expand_v": 2.0,
        "decay_rank": RANK,
        "decay_normalizer": 16.0,
        "gate_rank": RANK,
        "qkv_activation": "silu",
        "feature_map": None,
        "norm_eps": NORM_EPS,
    }

    def layer_names(self, settings: dict[str, Any]) -> Names:
        """Gate and up are one matrix; ``zeyuan_layernorm``, another way to round, has another name for the output norm."""
        return super().layer_names(settings) | whole(
            {
                "mixer.decay_in.weight": "attn.gk_proj.0.weight",
                "mixer.decay_out.weight": "attn.gk_proj.1.weight",
                "mixer.decay_out.bias": "attn.gk_proj.1.bias",
                "mixer.norm.weight": f"attn.{'g_norm' if settings['zeyuan_layernorm'] else 'g_norm_swish_gate'}.weight",
                "feedforward.in_proj.weight": "mlp.gate_proj.weight",
            }
        )


class GDN2(_Linear):
    """Gated DeltaNet."""

    model_names = ("GDN2",)
    mixer_class = GatedDeltaNet
    keys = ("zeyuan_layernorm",)
    options: ClassVar = {"expand_v": 2.0, "gate_rank": RANK, "norm_eps": NORM_EPS}

    def layer_names(self, settings: dict[str, Any]) -> Names:
        """Gate and up are one matrix where Canon-D acts on them, else two."""
        hidden = settings["hidden_dim"]
        gate_up = {"mlp.gate_proj.weight": hidden, "mlp.up_proj.weight": hidden}
        names: Names = super().layer_names(settings) | whole(
            {
                "mixer.decay_proj.weight": "attn.a_proj.weight",
                "mixer.beta_proj.weight": "attn.b_proj.weight",
                "mixer.A_log": "attn.A_log",
                "mixer.dt_bias": "attn.dt_bias",
                "mixer.norm.weight": "attn.o_norm.weight",
                "feedforward.in_proj.weight": "mlp.both_proj.weight",
            }
        )
        return names if "D" in settings["canon_set"] else names | {"feedforward.in_proj.weight": gate_up}
