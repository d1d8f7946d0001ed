"""The model that a checkpoint describes, before it is given any memory: what anybody may have written is held against its weights first."""

from __future__ import annotations

from typing import Any

import torch

from src.checkpoints.integrity import PREFIX
from src.components.backbone import Backbone
from src.config.building import model_from_config

_OF_A_BLOCK = 3  # tensors that the smallest block has at least: a norm, and what leads into a mixer and out of it
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def described_model(checkpoint: dict[str, Any]) -> Backbone:
    """Builds the model that a checkpoint's configuration describes on the meta device.

    Raises:
        ValueError: it would have more blocks than there are weights.
        Exception: whatever a constructor says of arguments that make no sense.
    """
    weights, depth = weights_of(checkpoint), checkpoint["config"]["model"].get("depth")
    # Before a million blocks are built: names cost next to nothing, numbers of their own do not.
    own = [weight for name, weight in weights.items() if name.startswith("blocks.")]
    most = min(len(own), len({w.untyped_storage().data_ptr() for w in own if not w.is_meta}) or len(own)) // _OF_A_BLOCK
    if isinstance(depth, int | float) and depth > most:
        raise ValueError(f"model.depth={depth:,}, but its tensors are those of at most {most:,} blocks")
    return model_from_config(checkpoint["config"]["model"], device="meta")


def weights_of(checkpoint: dict[str, Any], key: str = "state_dict") -> dict[str, torch.Tensor]:
    """The weights of its model by their names there; none where there is nothing under the key."""
    return {name.removeprefix(PREFIX): w for name, w in (checkpoint.get(key) or {}).items() if name.startswith(PREFIX)}


def check_types(weights: dict[str, torch.Tensor], net: Backbone) -> None:
    """Holds the types of weights against those of the model: all floating weights are of one that models can be computed in.

    Raises:
        ValueError: one is of another type.
    """
    first = None  # that is floating, and its type
    for name, tensor in net.state_dict().items():
        if name not in weights:
            continue  # that it is missing is said when the weights are loaded
        found = weights[name].dtype
        if not tensor.is_floating_point():
            if found != tensor.dtype:
                raise ValueError(f"{name} is of {found}, not of {tensor.dtype}")
            continue
        if found not in FLOATING:
            raise ValueError(f"{name} is of {found}, not of {', '.join(map(str, FLOATING))}")
        first = first or (name, found)
        if found != first[1]:
            raise ValueError(f"{name} is of {found} and {first[0]} of {first[1]}: all must be of one type")
