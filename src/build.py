"""From a configuration to a model, outside a run: for notebooks, counting and tests.

>>> from src.build import build_model
>>> build_model(["model=llama", "size=1B", "canon.positions=ABCD"], device="meta").count_parameters()
1366460416
"""

from __future__ import annotations

from typing import Any

import torch

from src.components.backbone import Backbone
from src.compose import CONFIG_DIR, compose_config, swept_over
from src.config import ConfigError, instantiate, suggest, to_plain
from src.datamodules.task import TaskDataModule
from src.evaluation.evaluators import TextEvaluator

__all__ = [
    "CONFIG_DIR",
    "build_model",
    "check_measured",
    "compose_config",
    "model_from_config",
    "optimizer_without_kernels",
    "swept_over",
]


def check_measured(
    key: str,
    metric: str,
    data: dict[str, Any],
    splits: tuple[str, ...] = ("val/", "test/"),
    where: str = "in this run",
) -> None:
    """Before anything is paid for: an evaluation on these data will give the metric.

    Args:
        key: of the configuration, that asks for it.
        metric: such as test/accuracy.
        data: that section of a plain configuration.
        splits: which are evaluated.
        where: for the message.

    Raises:
        ConfigError: it will not.
    """
    if "task" in data:
        datamodule: TaskDataModule = instantiate(data, "data")
        measures = datamodule.evaluator("val").measures
    else:
        measures = TextEvaluator.measures  # building the data might mean to tokenise a corpus
    known = [split + name for split in splits for name in measures]
    if metric not in known:
        raise ConfigError(f"{key}={metric}: not measured {where}; {suggest(metric, known)}")


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


def optimizer_without_kernels(section: dict[str, Any], net: Backbone) -> Any:
    """The optimizer that a plain configuration describes, for a model on any device: no fused kernel knows "meta".

    Raises:
        ConfigError, ValueError: it cannot be built so, or not for this model.
    """
    unfused = section | ({"fused": False} if "fused" in section else {})
    return instantiate(unfused, "optimizer")(net.named_parameters())
