"""Several variants of one run, on the same data and seed: one table, one figure.

    compare:
      without Canon: [canon.positions='']
      Canon-ABCD: [canon.positions=ABCD]

Each variant is the command line's configuration plus its own overrides. Because every parameter has its own random stream
(``src/components/initialization.py``), variants start from the same weights wherever they share a parameter.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from src.config import ConfigError
from src.config.compose import compose_config
from src.config.quoting import as_override, quoted
from src.reporting.comparison import Variant, draw, print_table
from src.runs.git import code_of, remarks_on_code
from src.runs.registry import Run
from src.training.checks import checked
from src.training.run import run

log = logging.getLogger(__name__)


def compare(config: DictConfig) -> dict[str, dict[str, float]]:
    """Runs every variant, then prints a table of test metrics and draws the curves.

    Returns:
        Test metrics by variant.
    """
    output_dir = Path(config.paths.output_dir)
    configs = variants(config, output_dir, list(HydraConfig.get().overrides.task))
    for variant in configs.values():
        checked(variant)  # a mistake in the last variant is found before the first is trained
    results = {}
    for number, (name, variant) in enumerate(configs.items(), start=1):
        log.info(f"[{number}/{len(configs)}] {name}")
        try:
            results[name] = run(variant)
        except SystemExit:
            where = quoted(f"hydra.run.dir={as_override(str(output_dir))}")
            log.warning(f"the same command with {where} ckpt_path=auto goes on")
            raise
    summarise(config, output_dir, {name: Path(variant.paths.output_dir) for name, variant in configs.items()}, results)
    return results


def variants(config: DictConfig, output_dir: Path, base: list[str]) -> dict[str, DictConfig]:
    """The configuration of every variant, by name: the command line's overrides ``base``, then the variant's own."""
    if not OmegaConf.is_dict(config.compare) or not config.compare:
        raise ConfigError("compare: a mapping from names to lists of overrides, such as {none: ['canon.positions=']}")
    if config.ckpt_path not in (None, "auto"):
        raise ConfigError(
            f"ckpt_path={config.ckpt_path}: a comparison goes on as a whole, with hydra.run.dir=<its folder> ckpt_path=auto; resume "
            "one variant with compare=null and its overrides"
        )
    slugs = [slug(str(name)) for name in config.compare]
    if len(set(slugs)) < len(slugs):
        raise ConfigError(
            f"compare: the names {', '.join(map(str, config.compare))} would share a folder; make them differ"
        )
    result = {}
    for name, overrides in config.compare.items():
        own = [*overrides, f"paths.output_dir={as_override(str(output_dir / slug(str(name))))}", "compare=null"]
        result[str(name)] = compose_config([*base, *own])
    return result


def slug(name: str) -> str:
    """A name as a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "variant"


@rank_zero_only
def summarise(
    config: DictConfig, output_dir: Path, folders: dict[str, Path], results: dict[str, dict[str, float]]
) -> None:
    """Prints the table, draws the figure and says where it is."""
    found = [
        Variant(name, folders[name], metrics, Run(folders[name]).results.get("chance") or {})
        for name, metrics in results.items()
    ]
    print_table(found)
    figure = draw(found, output_dir / "comparison.png", config.name)
    print(f"figure: {figure}")
    for remark in remarks_on_code(Counter(code_of(Run(folder).record) for folder in folders.values())):
        log.warning(f"{output_dir}: {remark}")
