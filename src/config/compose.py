"""From words to a configuration: ``configs/`` composed with overrides, outside or inside a running Hydra job. Imports no PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from src.config.schema import instantiate, to_plain
from src.support.errors import ConfigError

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"

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
    datamodule: Any = instantiate(to_plain(data), "data")
    if datamodule.training_steps is None:
        raise ConfigError("trainer.max_steps=${training_steps:...}: these training data never end; give a number")
    return datamodule.training_steps


# `${training_steps:${data}}` in YAML: optimizer steps until the training data end.
OmegaConf.register_new_resolver("training_steps", _training_steps, replace=True)
