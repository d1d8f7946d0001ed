"""Test a checkpoint: ``python src/evaluate.py ckpt_path=logs/train/runs/<run>``.

Takes data, model and precision from the checkpoint's own configuration, so the numbers are those of the run that wrote it.
``data=...`` asks for other data, ``trainer=...`` for another machine. Every evaluation is a file of its own, so that it may lie in
the folder of the run that it is about.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

# Run as a script, Python puts src/ itself on the path; the package is one level up.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import lightning as L  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from src.checkpoints.files import (  # noqa: E402
    CheckpointError,
    find_checkpoint,
    model_from_checkpoint,
    read_checkpoint,
)
from src.checkpoints.resume import check_same_data  # noqa: E402
from src.config import ConfigError, config_hash, instantiate, to_plain  # noqa: E402
from src.config.errors import printable  # noqa: E402
from src.datamodules.base import StreamDataModule  # noqa: E402
from src.datamodules.task import TaskDataModule  # noqa: E402
from src.datamodules.tasks import Task  # noqa: E402
from src.entry import entrypoint  # noqa: E402
from src.evaluation.statistics import intervals  # noqa: E402
from src.modules.language_model import LanguageModel  # noqa: E402
from src.reporting.registry import write_json  # noqa: E402
from src.reporting.scores import print_scores  # noqa: E402
from src.run import build_trainer  # noqa: E402


def evaluate(config: DictConfig) -> dict[str, float]:
    """Scores the checkpoint on its split, prints a table and writes ``evaluation_*.json``."""
    plain = to_plain(config)
    if plain["ckpt_path"] is None:
        raise ConfigError("ckpt_path= must name a checkpoint, or the folder of a run")
    if plain["split"] not in ("val", "test"):
        raise ConfigError(f"split={plain['split']!r}: choose val or test")
    path = find_checkpoint(Path(str(plain["ckpt_path"])))
    checkpoint = read_checkpoint(path, tensors="model")
    trained = checkpoint["config"]

    datamodule = data_of(plain, trained, path)
    if not plain.get("data"):
        check_same_data(checkpoint, datamodule.fingerprint(), path)
    else:
        check_same_vocabulary(checkpoint, datamodule, path)
    net = model_from_checkpoint(checkpoint, path)
    if net.vocab_size < datamodule.vocab_size:
        raise ConfigError(f"data: has ids up to {datamodule.vocab_size - 1}, the model knows {net.vocab_size}")
    module = LanguageModel(net, loss=of_checkpoint(trained.get("loss"), "loss", path))
    trainer = evaluation_trainer(plain, trained, path)
    score = trainer.validate if plain["split"] == "val" else trainer.test
    score(module, datamodule=datamodule, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if trainer.is_global_zero:
        report(metrics, module.counts, datamodule, plain, path, checkpoint["global_step"])
    return metrics


def data_of(plain: dict[str, Any], trained: dict[str, Any], path: Path) -> StreamDataModule:
    """The data that are asked for, or those that the checkpoint was trained on.

    The latter are prepared where this machine keeps its data: a file from elsewhere does not say where to write.
    """
    if plain.get("data"):
        return instantiate(plain["data"], "data")
    own = dict(trained["data"])
    if "cache_dir" in own:
        own["cache_dir"] = plain["cache_dir"]
    if "num_workers" in own:
        own["num_workers"] = 0  # how many processes are started is not for a file to say either
    return of_checkpoint(own, "data", path)


def of_checkpoint(section: Any, where: str, path: Path) -> Any:
    """Builds a section of a checkpoint's configuration.

    Raises:
        CheckpointError: it cannot be built; the message names the file.
    """
    try:
        return instantiate(section, where)
    except Exception as error:  # whatever a constructor says of arguments that make no sense
        raise CheckpointError(f"checkpoint {path}: {printable(error)}") from error


def check_same_vocabulary(checkpoint: dict[str, Any], asked: StreamDataModule, path: Path) -> None:
    """Raises a ConfigError when token ids have another meaning in the data that are asked for than in those of the model.

    Args:
        checkpoint: its own. Only its task is built: a corpus may not be on this machine.
        asked: what is to be scored.
        path: of the checkpoint.
    """
    trained = checkpoint["config"]["data"]
    if ("task" in trained) is not isinstance(asked, TaskDataModule):
        raise ConfigError(
            "data: a model of text cannot be scored on a synthetic task, nor the other way round: its token ids mean other things"
        )
    if not isinstance(asked, TaskDataModule):
        words, here = (checkpoint.get("data") or {}).get("tokenizer"), asked.fingerprint().get("tokenizer")
        if words is not None and words != here:
            raise ConfigError(
                "data: the text is cut into other tokens than those that the model knows; give the tokenizer.json of its own corpus "
                "(in the folder of the tokenised corpus, data/<corpus>) as data.tokenizer="
            )
        return
    own: Task = of_checkpoint(trained["task"], "data.task", path)
    before, now = ({"task": task.name} | task.vocabulary() for task in (own, asked.task))
    if before != now:
        differs = ", ".join(
            f"{key}: {before.get(key)} and {now.get(key)}" for key in before if before.get(key) != now.get(key)
        )
        raise ConfigError(
            f"data: the token ids of the model's own task mean something else here ({differs}). The release's ids "
            "(compact_ids=false) are the same for all difficulties"
        )


def evaluation_trainer(plain: dict[str, Any], trained: dict[str, Any], path: Path) -> L.Trainer:
    """One process with the device and precision of training, unless ``trainer`` says otherwise."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    lines = {"progress": {"_target_": "src.callbacks.progress.Lines"}}
    if plain.get("trainer"):
        return build_trainer({"trainer": plain["trainer"], "callbacks": lines}, **quiet)
    settings = {
        "_target_": "lightning.Trainer",
        "accelerator": _word(trained["trainer"].get("accelerator", "auto"), path),
        "precision": _word(trained["trainer"].get("precision"), path),
        "devices": 1,
        "use_distributed_sampler": False,
    }
    for key in ("limit_val_batches", "limit_test_batches"):  # scored on a part, as the run was
        if isinstance(limit := trained["trainer"].get(key), int | float):
            settings[key] = limit
    try:
        return build_trainer({"trainer": settings, "callbacks": lines}, **quiet)
    except ConfigError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from error


def _word(value: Any, path: Path) -> Any:
    if value is not None and not isinstance(value, str | int):
        raise CheckpointError(f"checkpoint {path}: its trainer's accelerator and precision are words, not objects")
    return value


def report(
    metrics: dict[str, float],
    counts: dict[str, tuple[int, int]],
    datamodule: StreamDataModule,
    plain: dict[str, Any],
    checkpoint: Path,
    step: int,
) -> None:
    """Prints the metrics with their intervals and writes them to the output folder."""
    found, chance = intervals(counts), datamodule.chance()
    print_scores(f"{checkpoint} at step {step}", metrics, found, chance)
    result = {
        "checkpoint": str(checkpoint),
        "step": step,
        "split": plain["split"],
        "data": datamodule.fingerprint(),
        "metrics": metrics,
        "intervals": found,
        "chance": chance,
    }
    # The same question again replaces its answer; another one has a file of its own.
    asked = config_hash([str(checkpoint.resolve()), plain.get("data"), datamodule.fingerprint(), plain.get("trainer")])
    path = Path(plain["paths"]["output_dir"]) / f"evaluation_{plain['split']}_step{step:08d}_{asked[:6]}.json"
    write_json(path, result)
    print(f"written to {path}")


if __name__ == "__main__":
    entrypoint("evaluate", evaluate)
