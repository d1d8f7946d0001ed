"""Mamba2, with the gated feed-forward of the published models (``mlp_type: mlp10``) or without one."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from src.checkpoints.official.family import NORM_EPS, Family, Names, require, whole
from src.components.backbone import Backbone
from src.components.canon import CanonConfig
from src.components.feedforward import FeedForward
from src.components.mixers.base import Mixer
from src.components.mixers.mamba2 import Mamba2

log = logging.getLogger(__name__)


class Mamba2Family(Family):
    """State space duality. Without a feed-forward there is no second norm and no C or D, whatever ``canon_set`` says."""

    model_names = ("Mamba2",)
    mixer_class = Mamba2
    keys = ("zeyuan_layernorm", "mlp_type", "mamba_ssm")
    layer_prefix = "backbone.layers.{}."
    top_names: ClassVar = {
        "embedding.weight": "backbone.embeddings.weight",
        "norm.weight": "backbone.norm_f.weight",
        "head.weight": "lm_head.weight",
    }
    unused = ("mixer.unused_conv",)

    def settings(self, config: dict[str, Any]) -> dict[str, Any]:
        """As ``Family.settings``."""
        settings = super().settings(config)
        if settings["mlp_type"] not in (None, "mlp10"):
            raise ValueError(f"official config mlp_type={settings['mlp_type']!r}: mlp10, or leave it out")
        return settings

    def has_feedforward(self, settings: dict[str, Any]) -> bool:
        """As ``mlp_type`` says."""
        return settings["mlp_type"] is not None

    def describe_feedforward(self, feedforward: FeedForward | None) -> dict[str, Any]:
        """A SwiGLU is mlp10."""
        if feedforward is None:
            return {"mlp_type": None}
        return {"hidden_dim": feedforward.hidden_dim, "mlp_type": "mlp10"}

    def build(self, settings: dict[str, Any], rope_pairing: str) -> Backbone:
        """As ``Family.build``; says which settings mean nothing without a feed-forward."""
        dim, hidden, letters = settings["dim"], settings["hidden_dim"], settings["canon_set"]
        if not self.has_feedforward(settings):
            ignored = [f"the {letter} of canon_set={letters}" for letter in "CD" if letter in letters]
            ignored += [f"hidden_dim={hidden}"] if hidden != self.default_hidden_dim(dim) else []
            if ignored:
                log.warning(f"official config: without mlp_type there is no feed-forward for {', '.join(ignored)}")
        return super().build(settings, rope_pairing)

    def mixer(self, settings: dict[str, Any], rope_pairing: Any, dim: int, canon: CanonConfig, layer: int) -> Mixer:
        """Mamba2, which knows no rotation."""
        heads, states = settings["n_heads"], settings["mamba_ssm"]
        return Mamba2(dim, canon, num_heads=heads, state_size=states, layer=layer, norm_eps=NORM_EPS)

    def describe_mixer(self, mixer: Any) -> dict[str, Any]:
        """The reverse of ``mixer``."""
        found = {"expand": (mixer.inner_width / mixer.dim, 2.0), "groups": (mixer.groups, 1)}
        require(found | {"norm_eps": (mixer.norm.eps, NORM_EPS)})
        return {"n_heads": mixer.num_heads, "mamba_ssm": mixer.state_dim}

    def layer_names(self, settings: dict[str, Any]) -> Names:
        """One matrix each, in our order of rows. Without letter b the release stores a convolution that it does not use."""
        return whole(
            {
                "mixer_norm.weight": "norm.weight",
                "canon_a.weight": "canonA.weight",
                "mixer.in_proj.weight": "mixer.in_proj.weight",
                "mixer.canon_b.weight": "mixer.canonB.weight",
                "mixer.conv_b.weight": "mixer.conv1d.weight",
                "mixer.conv_b.bias": "mixer.conv1d.bias",
                "mixer.unused_conv": "mixer.conv1d.weight",
                "mixer.A_log": "mixer.A_log",
                "mixer.D": "mixer.D",
                "mixer.dt_bias": "mixer.dt_bias",
                "mixer.norm.weight": "mixer.norm.weight",
                "mixer.out_proj.weight": "mixer.out_proj.weight",
                "feedforward_norm.weight": "pre_mlp_layernorm.weight",
                "canon_c.weight": "canonC.weight",
                "feedforward.in_proj.weight": "mlp.both_proj.weight",
                "feedforward.canon_d.weight": "mlp.canonD.weight",
                "feedforward.out_proj.weight": "mlp.down_proj.weight",
            }
        )
