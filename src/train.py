"""Train a sequence model: ``python src/train.py experiment=quickstart``; ``--help`` tells the rest.

The story of a run is ``src/training/run.py``: configuration -> data, model, trainer -> fit -> test -> results on disk.
With ``compare`` in the configuration it is told once for each variant, and ends in one table and one figure.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a script, Python puts src/ itself on the path; the package is one level up.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from lightning.pytorch.utilities import rank_zero_only  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from src.cli.comparison import compare  # noqa: E402
from src.cli.entry import entrypoint  # noqa: E402
from src.config import ConfigError, suggest  # noqa: E402
from src.reporting.scores import print_results  # noqa: E402
from src.training.run import run  # noqa: E402


def train(config: DictConfig) -> float | None:
    """One run, or one for each variant to be compared.

    Returns:
        The metric that a hyper-parameter search optimises, ``optimized_metric`` of the configuration.
    """
    if config.compare is not None:
        compare(config)
        return None
    metrics = run(config)
    if rank_zero_only.rank == 0:
        print_results(Path(config.paths.output_dir) / "results.json")
    wanted = config.optimized_metric
    if wanted is None:
        return None
    if wanted not in metrics:
        raise ConfigError(f"optimized_metric={wanted}: not measured in this run; {suggest(wanted, metrics)}")
    return metrics[wanted]


if __name__ == "__main__":
    entrypoint("train", train)
