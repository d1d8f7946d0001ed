"""Test a checkpoint: ``python src/evaluate.py ckpt_path=logs/train/runs/<run>``.

Takes data, model and precision from the checkpoint's own configuration, so the numbers are those of the run that wrote it.
``data=...`` asks for other data, ``trainer=...`` for another machine. Every evaluation is a file of its own, so that it may lie in
the folder of the run that it is about.
"""

from __future__ import annotations

import logging
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
from src.cli.entry import entrypoint  # noqa: E402
from src.config import ConfigError, config_hash, instantiate, to_plain  # noqa: E402
from src.datamodules.base import StreamDataModule  # noqa: E402
from src.datamodules.task import TaskDataModule  # noqa: E402
from src.datamodules.tasks import Task  # noqa: E402
from src.evaluation.statistics import intervals  # noqa: E402
from src.modules.language_model import LanguageModel  # noqa: E402
from src.reporting.scores import print_scores  # noqa: E402
from src.runs.registry import write_json  # noqa: E402
from src.support.errors import printable  # noqa: E402
from src.training.run import build_trainer  # noqa: E402

log = logging.getLogger(__name__)

MOST_PROCESSES = 2**20
# Precision plugins of Lightning that are no more than a word; None where the plugin says itself which.
PRECISION_PLUGINS = {"MixedPrecision": None, "HalfPrecision": None, "DoublePrecision": "64-true"}
PRECISION_WORDS = ("16-true", "bf16-true", "16-mixed", "bf16-mixed", "32-true", "64-true")


def evaluate(config: DictConfig) -> dict[str, float]:
    """Scores the checkpoint on its split, prints a table and writes ``evaluation_*.json``.

    Raises:
        ConfigError: what is asked for cannot be scored; a CheckpointError where that is the checkpoint's fault.
    """
    plain = to_plain(config)
    if plain["ckpt_path"] is None:
        raise ConfigError("ckpt_path= must name a checkpoint, or the folder of a run")
    if plain["split"] not in ("val", "test"):
        raise ConfigError(f"split={plain['split']!r}: choose val or test")
    path = find_checkpoint(Path(str(plain["ckpt_path"])))
    checkpoint = read_checkpoint(path, tensors="model")
    trained = checkpoint["config"]

    datamodule, remarks = data_of(plain, trained, path), []
    if not plain.get("data"):
        check_same_data(checkpoint, datamodule.fingerprint(), path)
    else:
        check_same_vocabulary(checkpoint, datamodule, path)
        remarks = of_other_facts(trained, datamodule, path)
    net = model_from_checkpoint(checkpoint, path)
    if net.vocab_size < datamodule.vocab_size:
        raise ConfigError(f"data: has ids up to {datamodule.vocab_size - 1}, the model knows {net.vocab_size}")
    module = LanguageModel(net, loss=of_checkpoint(trained.get("loss"), "loss", path))
    trainer, told = evaluation_trainer(plain, checkpoint, datamodule, path)
    remarks += told
    score = trainer.validate if plain["split"] == "val" else trainer.test
    score(module, datamodule=datamodule, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if trainer.is_global_zero:
        for remark in remarks:
            log.warning(remark)
        report(metrics, module.counts, datamodule, plain, path, checkpoint["global_step"], remarks)
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
        raise CheckpointError(f"checkpoint {printable(path)}: {printable(str(error)[:1000])}") from error


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


def of_other_facts(trained: dict[str, Any], asked: StreamDataModule, path: Path) -> list[str]:
    """A remark where the data that are asked for are about other things than the model has been taught.

    Args:
        trained: the configuration of the checkpoint.
        asked: what is to be scored.
        path: of the checkpoint.
    """
    if not isinstance(asked, TaskDataModule):
        return []
    own: Task = of_checkpoint(trained["data"]["task"], "data.task", path)
    now, seed = asked.task.facts(asked.seed), trained["data"].get("seed", 0)
    before = own.facts(seed if isinstance(seed, int) else 0)
    differs = ", ".join(
        f"{key}: {before.get(key)} there, {now[key]} here" for key in now if before.get(key) != now[key]
    )
    if not differs:
        return []
    return [
        f"data: the model has been trained on other facts of {asked.task.name} than it is asked about ({printable(differs)}); what it has "
        "never been told counts against it"
    ]


def evaluation_trainer(
    plain: dict[str, Any], checkpoint: dict[str, Any], datamodule: StreamDataModule, path: Path
) -> tuple[L.Trainer, list[str]]:
    """One process with the device and precision of training, unless ``trainer`` says otherwise; and in what it differs from the run's.

    Raises:
        CheckpointError: the checkpoint's own trainer cannot be.
    """
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    lines = {"progress": {"_target_": "src.callbacks.progress.Lines"}}
    own, limit = checkpoint["config"]["trainer"], f"limit_{plain['split']}_batches"
    part, remarks = part_of_split(checkpoint, datamodule, plain["split"], path)
    if plain.get("trainer"):
        if part is not None and plain["trainer"].get(limit) is None:
            remarks = [
                f"the run scored a part of the {plain['split']} split, trainer.{limit}={own[limit]}; here all of it is scored"
            ]
        return build_trainer({"trainer": plain["trainer"], "callbacks": lines}, **quiet), remarks
    precision, told = precision_of(own, path)
    settings = {
        "_target_": "lightning.Trainer",
        "accelerator": _word(own.get("accelerator", "auto"), path),
        "precision": precision,
        "devices": 1,
        "use_distributed_sampler": False,
    }
    if part is not None:
        settings[limit] = part
        if plain.get("data"):
            remarks.append(
                f"only {part} batches are scored, or that share, because the run had trainer.{limit}={own[limit]}"
            )
    try:
        return build_trainer({"trainer": settings, "callbacks": lines}, **quiet), remarks + told
    except ConfigError as error:
        raise CheckpointError(f"checkpoint {printable(path)}: {str(error)[:1000]}") from error


def part_of_split(
    checkpoint: dict[str, Any], datamodule: StreamDataModule, split: str, path: Path
) -> tuple[int | float | None, list[str]]:
    """How many batches one process scores to score those windows that the run's processes scored together; None for all of them.

    A limit counts the batches of each process, which take them in turn: of two, two times as many are scored.

    Returns:
        A limit, a number of batches or a share of them, and what is to be said of it.

    Raises:
        CheckpointError: ``shares``, among how many processes a batch was split, is no such number.
    """
    trainer = checkpoint["config"]["trainer"]
    limit, shares = trainer.get(f"limit_{split}_batches"), checkpoint.get("shares", 1)
    if type(shares) is not int or not 1 <= shares <= MOST_PROCESSES:
        raise CheckpointError(
            f"checkpoint {printable(path)}: its 'shares' are {printable(shares)[:50]}, not from 1 to {MOST_PROCESSES:,}"
        )
    if type(limit) not in (int, float) or (type(limit) is float and limit == 1):
        return None, []
    remarks = []
    if "shares" not in checkpoint and (
        trainer.get("devices") not in (None, 1, "1") or trainer.get("num_nodes", 1) != 1
    ):
        remarks.append(
            f"trainer.limit_{split}_batches={limit} counts the batches of each process, and {printable(path)} does not say how many "
            "there were: it is scored as by one, which may be fewer windows than the run's own"
        )
    if type(limit) is int:
        return limit * shares, remarks
    if 0 < limit < 1:
        of_each = -(-(datamodule.source.num_windows(split) or 0) // (datamodule.eval_batch_size * shares))
        return int(of_each * limit) * shares or limit, remarks
    return limit, remarks


def precision_of(trainer: dict[str, Any], path: Path) -> tuple[Any, list[str]]:
    """The word for the precision of a run, and what is to be said of it; of a precision plugin no more than its word is taken.

    Args:
        trainer: the section of a checkpoint's configuration.
        path: of the checkpoint.
    """
    word, plugins = _word(trainer.get("precision"), path), trainer.get("plugins")
    for node in plugins if isinstance(plugins, list) else [plugins]:
        if not isinstance(node, dict) or "Precision" not in str(node.get("_target_")):
            continue
        name = str(node["_target_"]).rpartition(".")[2]
        asked = PRECISION_PLUGINS.get(name) or (node.get("precision") if name in PRECISION_PLUGINS else None)
        # Lightning has no float16 beside float32 on a CPU, and would take bfloat16, which is further away.
        if asked in PRECISION_WORDS and not (asked == "16-mixed" and trainer.get("accelerator") == "cpu"):
            word = asked
        told = f"the run had a precision plugin, {printable(name)[:50]}; it is scored with trainer.precision={word or '32-true'}"
        return word, [f"{told}, and its numbers may differ from the run's in rounding"]
    return word, []


def _word(value: Any, path: Path) -> Any:
    if value is not None and not isinstance(value, str | int):
        raise CheckpointError(
            f"checkpoint {printable(path)}: its trainer's accelerator and precision are words, not objects"
        )
    return value


def report(
    metrics: dict[str, float],
    counts: dict[str, tuple[int, int]],
    datamodule: StreamDataModule,
    plain: dict[str, Any],
    checkpoint: Path,
    step: int,
    remarks: list[str],
) -> None:
    """Prints the metrics with their intervals and writes them, with what is to be said of them, to the output folder."""
    found, chance = intervals(counts), datamodule.chance()
    print_scores(f"{printable(checkpoint)} at step {step}", metrics, found, chance)
    result = {
        "checkpoint": str(checkpoint),
        "step": step,
        "split": plain["split"],
        "data": datamodule.fingerprint(),
        "metrics": metrics,
        "intervals": found,
        "chance": chance,
        "remarks": remarks,
    }
    # The same question again replaces its answer; another one has a file of its own.
    asked = config_hash([str(checkpoint.resolve()), plain.get("data"), datamodule.fingerprint(), plain.get("trainer")])
    path = Path(plain["paths"]["output_dir"]) / f"evaluation_{plain['split']}_step{step:08d}_{asked[:6]}.json"
    write_json(path, result)
    print(f"written to {path}")


if __name__ == "__main__":
    entrypoint("evaluate", evaluate)
