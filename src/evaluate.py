"""Test a checkpoint: ``python src/evaluate.py ckpt_path=logs/train/runs/<run>``.

Takes data, model and precision from the checkpoint's own configuration, so the numbers are those of the run that wrote it.
``data=...`` asks for other data, ``trainer=...`` for another machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# Run as a script, Python puts src/ itself on the path; the package is one level up.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import lightning as L  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from src.checkpoints.files import check_same_data, model_from_checkpoint, read_checkpoint  # noqa: E402
from src.config import ConfigError, instantiate, to_plain  # noqa: E402
from src.datamodules.base import StreamDataModule  # noqa: E402
from src.datamodules.task import TaskDataModule  # noqa: E402
from src.datamodules.tasks import Task  # noqa: E402
from src.entry import entrypoint  # noqa: E402
from src.evaluation.statistics import intervals  # noqa: E402
from src.reporting.scores import print_scores  # noqa: E402
from src.run import build_module, build_trainer  # noqa: E402


def evaluate(config: DictConfig) -> dict[str, float]:
    """Scores the checkpoint on its split, prints a table and writes ``results.json``."""
    plain = to_plain(config)
    if plain["ckpt_path"] is None:
        raise ConfigError("ckpt_path= must name a checkpoint, or the folder of a run")
    if plain["split"] not in ("val", "test"):
        raise ConfigError(f"split={plain['split']!r}: choose val or test")
    checkpoint = read_checkpoint(plain["ckpt_path"])
    trained = checkpoint["config"]

    datamodule: StreamDataModule = instantiate(plain.get("data") or trained["data"], "data")
    if not plain.get("data"):
        check_same_data(checkpoint, datamodule.fingerprint(), plain["ckpt_path"])
    else:
        check_same_vocabulary(trained["data"], datamodule)
    net = model_from_checkpoint(checkpoint)
    if net.vocab_size < datamodule.vocab_size:
        raise ConfigError(f"data: has ids up to {datamodule.vocab_size - 1}, the model knows {net.vocab_size}")
    module = build_module(trained, net, training=False)
    trainer = evaluation_trainer(plain, trained)
    score = trainer.validate if plain["split"] == "val" else trainer.test
    score(module, datamodule=datamodule, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if trainer.is_global_zero:
        report(metrics, module.counts, datamodule.chance(), plain, checkpoint["global_step"])
    return metrics


def check_same_vocabulary(trained: dict[str, Any], asked: StreamDataModule) -> None:
    """Raises a ConfigError when the token ids of two synthetic tasks have different meanings.

    Args:
        trained: the checkpoint's ``data`` section. Only its task is built: a corpus may not be on this machine.
        asked: what is to be scored.
    """
    if "task" not in trained or not isinstance(asked, TaskDataModule):
        return
    own: Task = instantiate(trained["task"], "data.task")
    before, now = ({"task": task.name} | task.vocabulary() for task in (own, asked.task))
    if before != now:
        differs = ", ".join(
            f"{key}: {before.get(key)} and {now.get(key)}" for key in before if before.get(key) != now.get(key)
        )
        raise ConfigError(
            f"data: the token ids of the model's own task mean something else here ({differs}). The release's ids "
            "(compact_ids=false) are the same for all difficulties"
        )


def evaluation_trainer(plain: dict[str, Any], trained: dict[str, Any]) -> L.Trainer:
    """One process with the device and precision of training, unless ``trainer`` says otherwise."""
    settings = plain.get("trainer") or {
        "_target_": "lightning.Trainer",
        "accelerator": trained["trainer"].get("accelerator", "auto"),
        "precision": trained["trainer"].get("precision"),
        "devices": 1,
        "use_distributed_sampler": False,
    }
    return build_trainer({"trainer": settings}, enable_progress_bar=False, enable_model_summary=False)


def report(
    metrics: dict[str, float],
    counts: dict[str, tuple[int, int]],
    chance: dict[str, float],
    plain: dict[str, Any],
    step: int,
) -> None:
    """Prints the metrics with their intervals and writes them to the output folder."""
    found = intervals(counts)
    print_scores(f"{plain['ckpt_path']} at step {step}", metrics, found, chance)
    result = {
        "checkpoint": str(plain["ckpt_path"]),
        "step": step,
        "metrics": metrics,
        "intervals": found,
        "chance": chance,
    }
    path = Path(plain["paths"]["output_dir"]) / "results.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    entrypoint("evaluate", evaluate)
