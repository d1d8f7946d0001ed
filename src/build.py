"""From a configuration to a model, outside a run: for notebooks, counting and tests.

>>> from src.build import build_model
>>> build_model(["model=llama", "size=1B", "canon.positions=ABCD"], device="meta").count_parameters()
1366460416
"""

from src.config.building import build_model, model_from_config
from src.config.compose import CONFIG_DIR, compose_config

__all__ = ["CONFIG_DIR", "build_model", "compose_config", "model_from_config"]
