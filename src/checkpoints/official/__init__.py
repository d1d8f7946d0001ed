"""Models of the official release, to and from ours.

Names are mapped and values are copied; the maths is the same. What the release keeps apart and we stack along the rows, so that one
Canon layer acts on one tensor: q, k, v (and their short convolutions); gate, up.

``family.py`` is what all families share; ``llama.py``, ``linear.py`` and ``mamba2.py`` are their tables.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from src.checkpoints.official.family import Family, remember, remembered
from src.checkpoints.official.linear import GDN2, GLA5
from src.checkpoints.official.llama import Llama
from src.checkpoints.official.mamba2 import Mamba2Family
from src.components.backbone import Backbone

FAMILIES: list[Family] = [Llama(), GLA5(), GDN2(), Mamba2Family()]

__all__ = ["from_official", "to_official"]


def from_official(
    config: dict[str, Any],
    state_dict: dict[str, Tensor],
    *,
    rope_pairing: Literal["adjacent", "half_split"] = "adjacent",
) -> Backbone:
    """Builds our model with the weights of an official one.

    Args:
        config: in the terms of the release's trainer; ``model_name`` is Llama, LlamaCanon, GLA5, GDN2 or Mamba2 (left out: Llama),
            and keys left out or None have the trainer's defaults.
        state_dict: the weights under the release's names (Llama: the training tree's or Hugging Face's), in their own dtypes.
        rope_pairing: which coordinates rotate together, for Llama. The published checkpoints were trained with ``adjacent``,
            whatever names they carry; ``half_split`` is for models trained under Hugging Face's own Llama.

    Returns:
        The model in evaluation mode, ``ids [B, T] int64 -> logits [B, T, V]``.

    Raises:
        ValueError: for a family or key that is not known here, a value that the family cannot take, or weights that are missing,
            left over or of another shape than the configuration says.
    """
    family = _family_named(config.get("model_name"))
    if rope_pairing != "adjacent" and not isinstance(family, Llama):
        raise ValueError(f"rope_pairing={rope_pairing!r}: {family.model_names[0]} has no rotation")
    settings = family.settings(config)
    if settings["n_layers"] > len(state_dict):  # before they are built
        raise ValueError(f"n_layers={settings['n_layers']:,}, but there are {len(state_dict)} weights")
    with torch.device("meta"):  # initial weights that are about to be replaced need not be drawn
        net = family.build(settings, rope_pairing)
    family.load(net, settings, state_dict)
    if rope_pairing == "adjacent":
        remember(net, config, family.describe(net))
    return net.eval()


def to_official(
    model: Backbone, *, names: Literal["training", "hugging_face"] = "training"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The reverse of ``from_official``: configuration and weights as the release has them.

    Args:
        model: any model of ours, read from the release or not. One that was read from it gets back its configuration as it was
            given, also where that says what a model does not show (``z_loss``, ``zeyuan_layernorm``).
        names: of Llama's weights; the other families have one set.

    Returns:
        The configuration in the trainer's terms, and copies of the weights.

    Raises:
        ValueError: for a model that the release cannot express, saying which block and why.
    """
    family = _family_of(model)
    described = family.describe(model)
    config = described | remembered(model, described)
    return config, family.weights(model, family.settings(config), names)


def _family_named(name: str | None) -> Family:
    for family in FAMILIES:
        if (name or "Llama") in family.model_names:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_names)
    raise ValueError(f"model_name={name!r}: the families that can be converted are {known}")


def _family_of(model: Backbone) -> Family:
    mixer = type(getattr(model.blocks[0], "mixer", None))
    for family in FAMILIES:
        if family.mixer_class is mixer:
            return family
    known = ", ".join(family.mixer_class.__name__ for family in FAMILIES)
    raise ValueError(f"the release cannot express block 0: its mixer is {mixer.__name__}, not one of {known}")
