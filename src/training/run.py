"""One run: check the configuration, build data, model and trainer, fit, test, write down what happened."""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from src import __version__
from src.callbacks.guard import Guard, RollBack
from src.callbacks.preemption import Preemption, at_once
from src.callbacks.throughput import Throughput
from src.checkpoints.files import put_later_aside, read_checkpoint, to_resume
from src.checkpoints.resume import (
    check_same_data,
    check_same_model,
    check_same_run,
    check_steps_left,
    continued_from,
    is_over,
    is_scored_otherwise,
)
from src.components.backbone import Backbone
from src.components.canon import Canon
from src.components.kernels.registry import forget_backends, used_backends
from src.config import ConfigError, experiment_hash, instantiate
from src.config.building import model_from_config
from src.config.identity import changed_data
from src.config.records import has_finished
from src.config.schema import TARGET
from src.datamodules.base import StreamDataModule
from src.datamodules.stream import Share
from src.evaluation.statistics import intervals
from src.modules.language_model import LanguageModel
from src.modules.parallel import may_be_deferred
from src.runs.registry import Recorded, Run, peak_memory_bytes, write_json
from src.runs.schema import IDENTITY
from src.support.errors import printable
from src.support.files import Lock, put_aside, remove_parts, strange_in, write_text
from src.training.checks import check_machine, checked
from src.training.fit import PLANNED, fit, log_at_step

log = logging.getLogger(__name__)

DEFAULT_POSITION = "src.components.position.RoPE"


def run(config: DictConfig) -> dict[str, float]:
    """Trains and tests as ``configs/train.yaml`` describes.

    Returns:
        The metrics of the last validation and of the test.

    Raises:
        ConfigError: before anything is trained, for a configuration or checkpoint that cannot be.
    """
    plain = checked(config)
    check_machine(plain)
    output_dir, identity = Path(plain["paths"]["output_dir"]), experiment_hash(plain)
    refuse_strange(output_dir)
    with at_once(), alone_in(output_dir):
        refuse_to_test_in_a_runs_folder(plain, output_dir)
        if plain["ckpt_path"] == "auto" and (earlier := finished_before(plain, identity, output_dir)) is not None:
            return earlier
        resumed = to_resume(plain["ckpt_path"], output_dir)
        checkpoint = None if resumed is None else str(resumed)
        if plain["train"]:
            refuse_foreign_checkpoints(output_dir, checkpoint)
            if checkpoint is None:
                begin_records(output_dir)
        return _recorded(plain, identity, output_dir, checkpoint)


def refuse_strange(output_dir: Path) -> None:
    """Raises a ConfigError when what a run writes into its folder would be written elsewhere, or waited for."""
    if rank_zero_only.rank == 0 and (strange := strange_in(output_dir)) is not None:
        raise ConfigError(f"{output_dir}: {strange}. Remove it, or choose another hydra.run.dir")


def refuse_to_test_in_a_runs_folder(plain: dict[str, Any], output_dir: Path) -> None:
    """Raises a ConfigError when a test would be recorded over the record of another run; repeating one is fine."""
    recorded = Run(output_dir).record.get("config_hash")
    if not plain["train"] and (output_dir / "run.json").exists() and recorded != experiment_hash(plain):
        raise ConfigError(
            f"train=false: {output_dir} holds the record of a run, which a test would overwrite; choose another hydra.run.dir, or "
            f"score it with python src/evaluate.py ckpt_path={output_dir}"
        )


def finished_before(plain: dict[str, Any], identity: str, output_dir: Path) -> dict[str, float] | None:
    """The metrics of this very run, if it has finished in its folder before.

    Raises:
        ConfigError: it has, on data that have changed since.
    """
    earlier = Run(output_dir)
    if not has_finished(earlier, identity):
        return None
    datamodule: StreamDataModule = instantiate(plain["data"], "data")
    if changed := changed_data(earlier.results.get("data"), datamodule.expected_fingerprint()):
        told = "; ".join(f"{key}: {then!r} then, {now!r} now" for key, (then, now) in changed.items())
        raise ConfigError(
            f"{output_dir}: this run has finished before, on other data than there are now ({told}); the results there are of "
            "those. Choose another hydra.run.dir for the new data, or restore the files"
        )
    ended = earlier.results.get("ended")
    early = ""
    if isinstance(ended, dict) and ended.get("why", PLANNED) != PLANNED:
        early = f", after step {ended.get('step')} of {ended.get('planned')} ({printable(ended['why'])[:200]})"
    log.info(f"{output_dir}: this run has finished before{early}, its results stand")
    return earlier.metrics


@contextmanager
def alone_in(output_dir: Path) -> Iterator[None]:
    """Holds the run's folder: two runs in it, such as one put back into a queue and one that still lives, would spoil each other's files.

    Raises:
        ConfigError: another process works in it.
    """
    lock = Lock(output_dir, "run.lock")
    if rank_zero_only.rank == 0:
        try:
            if not lock.acquire(seconds=10):  # data workers of a run that was killed outlive it by a few seconds
                raise ConfigError(
                    f"hydra.run.dir={output_dir}: another process is at work in this folder; wait for it, or end it"
                )
            remove_parts(output_dir / "checkpoints")
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            log.warning(f"{output_dir} is on a file system without locks: see to it that only one run writes there")
    try:
        yield
    finally:
        lock.release()


def _recorded(plain: dict[str, Any], identity: str, output_dir: Path, checkpoint: str | None) -> dict[str, float]:
    with Recorded(output_dir, identity, checkpoint) as recorded:
        leave_out: set[int] = set()
        while True:
            try:
                return _run(plain, identity, output_dir, checkpoint, leave_out, recorded)
            except RollBack as back:
                checkpoint, leave_out = str(back.checkpoint), back.leave_out


def _run(
    plain: dict[str, Any],
    identity: str,
    output_dir: Path,
    checkpoint: str | None,
    leave_out: set[int],
    recorded: Recorded,
) -> dict[str, float]:
    """One attempt: from the start or a checkpoint to the end.

    Raises:
        RollBack: the guard wants another one, from an earlier checkpoint.
    """
    L.seed_everything(plain["seed"], verbose=False)
    forget_backends()
    trainer = build_trainer(plain)
    for guard in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(guard, Guard):
            guard.leave_out = set(leave_out)
    datamodule: StreamDataModule = instantiate(plain["data"], "data")
    check_cut(datamodule, trainer)
    check_steps(datamodule, plain["trainer"]["max_steps"])
    net = build_net(plain, datamodule, deferred=may_be_deferred(plain["model"], trainer.strategy))
    opened, over = take_up(plain, datamodule, checkpoint, output_dir)
    module = build_module(plain, net, config_hash=identity)
    if opened is not None and plain["train"]:
        module.continued_here = continued_from(opened, plain)
    recorded.begin()
    # With auto it is the newest whole one, and only damaged ones come after it.
    chosen = plain["ckpt_path"] != "auto" or leave_out
    if opened is not None and plain["train"] and not over and chosen and _is_in(str(checkpoint), output_dir):
        rank_zero_only(put_later_aside)(output_dir / "checkpoints", opened["global_step"])
    introduce(plain, net, datamodule, output_dir)

    started = time.perf_counter()
    if plain["train"] and not over:
        fit(trainer, module, datamodule, checkpoint, output_dir, planned=plain["trainer"]["max_steps"])
    metrics = score(trainer, module, datamodule, plain, checkpoint, opened, over)
    steps = opened["global_step"] if opened is not None and (over or not plain["train"]) else trainer.global_step
    if plain["train"] and module.validated_step in (None, steps):  # None: of an older version's checkpoint
        metrics |= module.validated
    result = {name: float(value) for name, value in metrics.items() if not name.startswith("train/")}
    seconds = time.perf_counter() - started + (module.seconds_before if plain["train"] else 0.0)
    record(output_dir, plain["name"], identity, steps, module, datamodule, trainer, result, seconds)
    return result


def score(
    trainer: L.Trainer,
    module: LanguageModel,
    datamodule: StreamDataModule,
    plain: dict[str, Any],
    checkpoint: str | None,
    opened: dict[str, Any] | None,
    over: bool,
) -> dict[str, Any]:
    """Test metrics, where a test is asked for; afterwards the module knows a validation of the same weights.

    Args:
        trainer: that has trained them, or will not.
        module: the model.
        datamodule: its data.
        plain: the run's configuration.
        checkpoint: that the run goes on from.
        opened: what it holds besides tensors.
        over: its training is over: its own weights are tested.
    """
    metrics: dict[str, Any] = {}
    if plain["test"]:
        weights = checkpoint if over or not plain["train"] else None
        if weights is not None and opened is not None:
            log_at_step(trainer, opened["global_step"])
        trainer.test(module, datamodule, ckpt_path=weights, verbose=False, weights_only=True)
        metrics = dict(trainer.callback_metrics)
    elif over and opened is not None:
        module.on_load_checkpoint(read_checkpoint(str(checkpoint), tensors="none"))
    if over and opened is not None:
        recall_speed(trainer, opened)
        if is_scored_otherwise(opened, plain):
            trainer.validate(module, datamodule, ckpt_path=checkpoint, verbose=False, weights_only=True)
            module.validated_step = opened["global_step"]
    return metrics


def recall_speed(trainer: L.Trainer, opened: dict[str, Any]) -> None:
    """A run that is only tested was as fast as its checkpoint says; Lightning restores callbacks for training alone."""
    for clock in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(clock, Throughput) and clock.state_key in (opened.get("callbacks") or {}):
            clock.load_state_dict(opened["callbacks"][clock.state_key])


def take_up(
    plain: dict[str, Any], datamodule: StreamDataModule, checkpoint: str | None, output_dir: Path
) -> tuple[dict[str, Any] | None, bool]:
    """What a run goes on from, and whether its training is over; None for a run from the start.

    Raises:
        ConfigError: the checkpoint is that of another run, or leaves nothing to do.
    """
    if checkpoint is None:
        return None, False
    opened, train = read_checkpoint(checkpoint, tensors="none"), plain["train"]
    check_same_data(opened, datamodule.fingerprint(), checkpoint)
    check_same_model(opened, plain, checkpoint)
    own = _is_in(checkpoint, output_dir)
    over = train and own and is_over(opened, plain)
    if train and not over:
        check_steps_left(opened, plain, checkpoint, own=own)
    check_same_run(opened, plain, checkpoint, over=over, train=train)
    if train:
        log.info(
            f"{checkpoint}: {'training is over, testing' if over else 'going on'} after step {opened['global_step']}"
        )
    return opened, over


def refuse_foreign_checkpoints(output_dir: Path, checkpoint: str | None) -> None:
    """A run's folder holds the checkpoints of one run: refuses one that another has filled."""
    folder = (output_dir / "checkpoints").resolve()
    resumed_here = checkpoint is not None and _is_in(checkpoint, output_dir)
    if rank_zero_only.rank == 0 and not resumed_here and any(folder.glob("*.ckpt")):
        raise ConfigError(
            f"{output_dir} holds the checkpoints of an earlier run; choose another hydra.run.dir, or go on with that run: ckpt_path=auto"
        )


def begin_records(output_dir: Path) -> None:
    """A run from the start has no earlier curve: what another one has left in its folder, without checkpoints, is put aside."""
    curve = output_dir / "csv" / "metrics.csv"
    if rank_zero_only.rank == 0 and curve.exists():
        log.warning(
            f"{curve} is of an earlier run, of which there is no checkpoint; it is kept as {put_aside(curve, 'earlier').name}"
        )


def _is_in(checkpoint: str, output_dir: Path) -> bool:
    return Path(checkpoint).resolve().parent == (output_dir / "checkpoints").resolve()


def check_cut(datamodule: StreamDataModule, trainer: L.Trainer) -> None:
    """Raises a ConfigError when the global batch cannot be cut evenly among processes and micro-batches."""
    try:
        world = trainer.num_devices * trainer.num_nodes // getattr(trainer.strategy, "tensor_parallel", 1)
        Share(datamodule.batch_size, 0, max(world, 1), trainer.accumulate_grad_batches)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_steps(datamodule: StreamDataModule, max_steps: int) -> None:
    """Raises a ConfigError when training would go on after its data have ended."""
    end = datamodule.training_steps
    if end is not None and max_steps > end:
        raise ConfigError(f"trainer.max_steps={max_steps}: the training data end after {end} steps")


def build_net(plain: dict[str, Any], datamodule: StreamDataModule, deferred: bool = False) -> Backbone:
    """Builds the model; a ``vocab_size`` of None becomes the data's, in ``plain`` as well.

    ``deferred``: without memory, which the strategy gives it shard by shard (``modules/parallel.py``).
    """
    wanted = plain["model"]["vocab_size"]
    if wanted is None:
        plain["model"]["vocab_size"] = datamodule.vocab_size
    elif wanted < datamodule.vocab_size:
        raise ConfigError(f"model.vocab_size={wanted}: the data has ids up to {datamodule.vocab_size - 1}")
    return model_from_config(plain["model"], device="meta" if deferred else "cpu")


def build_module(plain: dict[str, Any], net: Backbone, config_hash: str | None = None) -> LanguageModel:
    """Wraps a model with the optimizer, schedule and loss that a plain configuration describes."""
    return LanguageModel(
        net,
        optimizer=instantiate(plain["optimizer"], "optimizer"),
        schedule=instantiate(plain["scheduler"], "scheduler"),
        loss=instantiate(plain["loss"], "loss"),
        config=plain,
        config_hash=config_hash,
        compile=plain["compile"],
        recompute=plain["activation_checkpointing"],
    )


def build_trainer(plain: dict[str, Any], **overrides: Any) -> L.Trainer:
    """Builds Lightning's Trainer with the configured callbacks and loggers."""
    callbacks = [instantiate(node, f"callbacks.{name}") for name, node in (plain.get("callbacks") or {}).items()]
    # It saves where others are still to learn of the step, averages of weights say, unless it comes last.
    callbacks.sort(key=lambda callback: isinstance(callback, Preemption))
    loggers = [instantiate(node, f"logger.{name}") for name, node in (plain.get("logger") or {}).items()]
    has_checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return instantiate(
        # Lightning would want one whole epoch with min_steps, and one epoch is the whole stream.
        {"enable_checkpointing": has_checkpoints, "enable_progress_bar": _has_bar(callbacks), "min_epochs": 0}
        | plain["trainer"]
        | overrides,
        "trainer",
        callbacks=callbacks,
        logger=loggers or False,
    )


def _has_bar(callbacks: list[Any]) -> bool:
    return any(isinstance(callback, ProgressBar) for callback in callbacks)


@rank_zero_only
def introduce(plain: dict[str, Any], net: Backbone, datamodule: StreamDataModule, output_dir: Path) -> None:
    """Says what is about to run, and writes the resolved configuration before the first step."""
    write_text(output_dir / "config.yaml", yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
    chosen, mixers = plain["position"], plain["model"]["mixers"].values()
    if chosen[TARGET] != DEFAULT_POSITION and all(mixer.get("position") is None for mixer in mixers):
        log.warning(f"position={chosen[TARGET]}: no mixer of this model takes positions; it is ignored")
    points = {module.point for module in net.modules() if isinstance(module, Canon)}
    canon = "".join(letter for letter in net.canon.positions if letter in points) or "none"
    log.info(
        f"{plain['name']}: {net.count_parameters():,} parameters, {net.depth} x {net.dim} {net.pattern}, "
        f"Canon {canon}, {plain['trainer']['max_steps']:,} steps of {datamodule.batch_size} x "
        f"{datamodule.window} tokens, in {output_dir}"
    )


@rank_zero_only
def record(
    output_dir: Path,
    name: str,
    identity: str,
    steps: int,
    module: LanguageModel,
    datamodule: StreamDataModule,
    trainer: L.Trainer,
    metrics: dict[str, float],
    seconds: float,
) -> None:
    """Writes ``results.json``: what was measured, of what, with which kernels, at what cost.

    Results of another configuration, a shorter run that this one has continued say, stay under another name.
    """
    net, tokens = module.net, steps * datamodule.batch_size * datamodule.window
    # A window's last token is predicted, and not read.
    flops, read = net.flops_per_token(datamodule.window - 1), steps * datamodule.batch_size * (datamodule.window - 1)
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    clock = next((callback for callback in callbacks if isinstance(callback, Throughput)), None)
    result = {
        "name": name,
        "config_hash": identity,
        "identity": IDENTITY,
        "version": __version__,
        "data": datamodule.fingerprint(),
        "parameters": net.count_parameters(),
        "flops_per_token": flops,
        "state_size": net.state_size(datamodule.window - 1),
        "backends": used_backends(),
        "steps": steps,
        "ended": module.ended,
        "continued": module.continued,
        "tokens": tokens,
        "training_flops": 3 * flops * read,
        "tokens_per_second": clock.rate if clock else None,
        "mfu": clock.mfu if clock else None,
        "data_wait": clock.data_wait if clock else None,
        "peak_memory_bytes": peak_memory_bytes(trainer.strategy.root_device),
        "seconds": round(seconds, 3),
        "torch": torch.__version__,
        "metrics": metrics,
        "intervals": intervals({name: pair for name, pair in module.counts.items() if name in metrics}),
        "chance": datamodule.chance(),
    }
    path = output_dir / "results.json"
    before = Run(output_dir).results.get("config_hash")
    if before is not None and before != identity:
        # What another has written there is a name only if it looks like one.
        path.rename(output_dir / f"results-{before if re.fullmatch('[0-9a-f]{1,64}', before) else 'other'}.json")
    write_json(path, result)
