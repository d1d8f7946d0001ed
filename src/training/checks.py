"""Can a configuration be run? What is wrong with it is said, with the key to be changed, before data is read or anything trained."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig

from src.config import ConfigError, check, check_complete, instantiate, suggest, to_plain
from src.config.building import model_from_config, optimizer_without_kernels
from src.datamodules.task import TaskDataModule
from src.evaluation.choice import evaluator_of
from src.evaluation.evaluators import TextEvaluator, lower_is_better

RECOMPUTE = ("none", "block", "selective")
MOST_SEED = 2**32 - 1


def checked(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration in plain containers, every section checked against the classes it names.

    The model is built once on the meta device: an impossible combination is found before any data is prepared.
    """
    check_complete(config)
    plain = to_plain(config)
    plain.pop("compare", None)
    check_settings(plain)
    for section in ("trainer", "data", "optimizer", "scheduler", "loss", "callbacks", "logger", "canon"):
        check(plain.get(section), section, {"callbacks", "logger"} if section == "trainer" else None)
    check_watched(plain)
    net = model_from_config(plain["model"] | {"vocab_size": plain["model"]["vocab_size"] or 2}, device="meta")
    for section in ("loss", "scheduler"):
        instantiate(plain[section], section)
    try:
        optimizer_without_kernels(plain["optimizer"], net)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return plain


def check_settings(plain: dict[str, Any]) -> None:
    """Checks what no class signature covers: the top-level keys, and numbers that Lightning would trip over later."""
    kinds: dict[str, Any] = {"train": bool, "test": bool, "compile": bool, "seed": int, "name": str, "tags": list}
    kinds |= {"ckpt_path": str | None, "optimized_metric": str | None, "activation_checkpointing": str}
    sections = {"data", "model", "size", "position", "optimizer", "scheduler", "trainer", "callbacks", "logger"}
    for key in plain:
        if key not in sections | kinds.keys() | {"paths", "canon", "loss"}:
            raise ConfigError(f"{key}: no such key; {suggest(key, sections | kinds.keys())}")
    for key, kind in kinds.items():
        if not isinstance(plain[key], kind) or (kind is int and (isinstance(plain[key], bool) or plain[key] < 0)):
            expected = {bool: "true or false", int: "a number from 0 on", list: "a list, [a, b]"}.get(kind, "a string")
            raise ConfigError(f"{key}={plain[key]!r}: {expected}")
    if plain["seed"] > MOST_SEED:
        raise ConfigError(f"seed={plain['seed']}: at most {MOST_SEED}, which is what NumPy takes")
    if plain["activation_checkpointing"] not in RECOMPUTE:
        word = plain["activation_checkpointing"]
        raise ConfigError(f"activation_checkpointing={word}: no such kind; {suggest(word, RECOMPUTE)}")
    if not plain["train"] and not plain["test"]:
        raise ConfigError("train=false and test=false: nothing to do")
    if not plain["train"] and not plain["ckpt_path"]:
        raise ConfigError("train=false: ckpt_path= must say which checkpoint to test")
    trainer = plain["trainer"]
    for key in ("max_steps", "accumulate_grad_batches", "val_check_interval", "log_every_n_steps"):
        if isinstance(trainer.get(key, 1), int) and trainer.get(key, 1) < 1:
            raise ConfigError(f"trainer.{key}={trainer[key]}: at least 1")
    check_batches(trainer)
    clip = trainer.get("gradient_clip_val")
    if isinstance(clip, int | float) and clip <= 0:
        raise ConfigError(f"trainer.gradient_clip_val={clip}: positive, or null for no clipping")


def check_batches(trainer: dict[str, Any]) -> None:
    """Raises a ConfigError where an optimizer step would be cut by the end of an epoch, or an epoch's length be needed."""
    accumulate, limit = trainer.get("accumulate_grad_batches") or 1, trainer.get("limit_train_batches")
    if isinstance(limit, int) and limit % accumulate:
        raise ConfigError(
            f"trainer.limit_train_batches={limit}: a multiple of trainer.accumulate_grad_batches={accumulate}"
        )
    every, epochs = trainer.get("val_check_interval"), trainer.get("check_val_every_n_epoch")
    if isinstance(every, int) and epochs is not None:
        raise ConfigError(
            f"trainer.check_val_every_n_epoch={epochs}: with trainer.val_check_interval={every} a run is validated after every {every} "
            "batches, wherever epochs end; null for one of the two"
        )
    for key in ("val_check_interval", "limit_train_batches"):
        if isinstance(trainer.get(key), float):
            raise ConfigError(
                f"trainer.{key}={trainer[key]}: a whole number of batches; the stream has no epochs to take a share of"
            )


def check_watched(plain: dict[str, Any]) -> None:
    """Raises a ConfigError when a run is to be judged, or a checkpoint chosen, by what is not measured on its data."""
    if plain["optimized_metric"] is not None:
        check_measured("optimized_metric", plain["optimized_metric"], plain["data"], ("val/",))
    for name, callback in (plain.get("callbacks") or {}).items():
        for key in ("update_starting_at_step", "update_starting_at_epoch"):
            if (callback or {}).get(key):
                raise ConfigError(
                    f"callbacks.{name}.{key}={callback[key]}: until then Lightning would validate the weights of the beginning in place "
                    "of the average; leave it out"
                )
        metric = str((callback or {}).get("monitor"))
        if metric in ("None", "step", "epoch"):
            continue
        if not metric.startswith("train/"):
            check_measured(f"callbacks.{name}.monitor", metric, plain["data"], ("val/",))
        elif metric not in ("train/loss", "train/token_accuracy"):
            continue  # of norms and rates nobody can say which is better
        mode, best = callback.get("mode", "min"), "min" if lower_is_better(metric) else "max"
        if mode != best:
            raise ConfigError(f"callbacks.{name}.mode={mode}: {best}, for {metric}")


def check_machine(plain: dict[str, Any]) -> None:
    """Raises a ConfigError when this machine lacks what the configuration asks for; another one may have it."""
    accelerator = plain["trainer"].get("accelerator")
    if accelerator in ("cuda", "gpu") and not torch.cuda.is_available():
        raise ConfigError(f"trainer.accelerator={accelerator}: no CUDA device here. Use trainer=cpu")


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
        measures = evaluator_of(datamodule, "val").measures
    else:
        measures = TextEvaluator.measures  # building the data might mean to tokenise a corpus
    known = [split + name for split in splits for name in measures]
    if metric not in known:
        raise ConfigError(f"{key}={metric}: not measured {where}; {suggest(metric, known)}")
