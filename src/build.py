"""From a configuration to a model, outside a run: for notebooks, counting and tests.

>>> from src.build import build_model
>>> build_model(["model=llama", "size=1B", "canon.positions=ABCD"], device="meta").count_parameters()
1366460416
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from src.components.backbone import Backbone
from src.config import ConfigError, instantiate, suggest, to_plain
from src.datamodules.base import StreamDataModule
from src.datamodules.task import TaskDataModule
from src.evaluation.evaluators import TextEvaluator

CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"

# `${repository:}` in YAML: the folder that holds configs/ and src/.
OmegaConf.register_new_resolver("repository", lambda: str(CONFIG_DIR.parent), replace=True)

# `${times:2,${size.depth}}` in YAML: a product of whole numbers.
OmegaConf.register_new_resolver("times", lambda a, b: int(a) * int(b), replace=True)


def compose_config(overrides: list[str] | None = None, config_name: str = "train", **options: Any) -> DictConfig:
    """Composes ``configs/<config_name>.yaml`` with Hydra overrides, outside or inside a running Hydra job."""
    if GlobalHydra.instance().is_initialized():
        return compose(config_name=config_name, overrides=list(overrides or []), **options)
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose(config_name=config_name, overrides=list(overrides or []), **options)


def swept_over(overrides: list[str]) -> dict[str, Any]:
    """The values over which ``python src/train.py -m`` would sweep an experiment: key -> values, separated by commas."""
    return to_plain(compose_config(overrides, return_hydra_config=True).hydra.sweeper.get("params") or {})


def _training_steps(data: DictConfig) -> int:
    datamodule: StreamDataModule = instantiate(to_plain(data), "data")
    if datamodule.training_steps is None:
        raise ConfigError("trainer.max_steps=${training_steps:...}: these training data never end; give a number")
    return datamodule.training_steps


# `${training_steps:${data}}` in YAML: optimizer steps until the training data end.
OmegaConf.register_new_resolver("training_steps", _training_steps, replace=True)


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
