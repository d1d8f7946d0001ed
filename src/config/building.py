"""Models and optimizers from plain configurations, and from words; ``src/build.py`` is the door to it from outside."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from src.components.backbone import Backbone
from src.config.compose import compose_config
from src.config.schema import instantiate, to_plain


def build_model(overrides: list[str] | None = None, device: str | torch.device = "cpu") -> Backbone:
    """Builds the model that ``configs/train.yaml`` with these overrides describes.

    There is no data here, so ``model.vocab_size`` is, unless given, the published one of the size
    (10,000 for the small ones, 32,000 for 1B and 3B, 128,256 for 8B). A run takes it from its data.

    Args:
        overrides: such as ``["model=llama", "size=1B", "canon.positions=ABCD"]``.
        device: ``meta`` allocates nothing, for counting.

    Returns:
        The initialised model, ``ids [B, T] -> logits [B, T, V]``.
    """
    config = compose_config(overrides)
    model_config = to_plain(config.model)
    if model_config["vocab_size"] is None:
        model_config["vocab_size"] = config.size.vocab_size
    return model_from_config(model_config, device)


def model_from_config(model_config: dict[str, Any], device: str | torch.device = "cpu") -> Backbone:
    """Builds a model from the plain ``model`` section of a resolved configuration."""
    with torch.device(device):
        return instantiate(model_config, "model")


def optimizer_without_kernels(section: dict[str, Any], net: nn.Module) -> Any:
    """The optimizer that a plain configuration describes, for a model on any device: no fused kernel knows "meta".

    Raises:
        ConfigError, ValueError: it cannot be built so, or not for this model.
    """
    unfused = section | ({"fused": False} if "fused" in section else {})
    return instantiate(unfused, "optimizer")(net.named_parameters())
