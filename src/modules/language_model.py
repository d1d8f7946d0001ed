"""A language model in training: masked next-token loss, optimizer, schedule, and what is logged."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.trainer import call
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from src import __version__
from src.checkpoints.described import check_types, weights_of
from src.checkpoints.integrity import CHECKPOINT_FORMAT
from src.checkpoints.resume import check_states, forget_files_elsewhere, recut, set_epoch
from src.components.backbone import Backbone
from src.config import RunError
from src.config.identity import with_names
from src.datamodules.stream import data_share, reads_alone
from src.evaluation.choice import evaluator_of
from src.evaluation.evaluators import Evaluator
from src.modules.losses import NextTokenLoss
from src.modules.optimizers import check_loaded
from src.modules.parallel import lay_out
from src.runs.csv_log import CSVLog


def is_log_step(trainer: Any, step: int) -> bool:
    """Whether metrics of the ``step``-th optimizer step (counted from 1) are logged."""
    return step % trainer.log_every_n_steps == 0


def epoch_of(trainer: Any, step: int) -> int:
    """The epoch, counted from 0, that a trainer's optimizer step (counted from 1) belongs to; without a limit there is but one."""
    limit: Any = trainer.limit_train_batches
    return max(step * trainer.accumulate_grad_batches - 1, 0) // limit if isinstance(limit, int) and limit > 0 else 0


def is_due(batches: int, every: int, micro: int) -> bool:
    """Whether a validation every so many batches falls due in the optimizer step that has just ended, of ``micro`` batches."""
    return batches // every > (batches - micro) // every


def is_last(trainer: Any, batches: int) -> bool:
    """Whether training ends after so many batches, each of which ends an optimizer step, as it was planned."""
    limit, epochs = trainer.limit_train_batches, trainer.max_epochs or -1
    over = isinstance(limit, int) and epochs > 0 and batches >= limit * epochs
    return over or batches >= trainer.max_steps * trainer.accumulate_grad_batches > 0


def is_validated(trainer: Any, batches: int) -> bool:
    """Whether the configuration asks for a validation after so many batches, each of which ends an optimizer step.

    A function of nothing else, so that a run that goes on knows what the straight run has done. Where it is asked for every so many
    batches, ends of epochs do not matter. The last batch that there is, without ``limit_train_batches``, is no end of an epoch: the
    stream is cut after the planned steps.
    """
    every = getattr(trainer, "val_check_interval", None)  # where validations are asked for by time, there is none
    limit, epochs = trainer.limit_train_batches, trainer.check_val_every_n_epoch
    if isinstance(every, int):
        return is_due(batches, every, trainer.accumulate_grad_batches)
    return isinstance(limit, int) and batches % limit == 0 and (epochs is None or batches // limit % epochs == 0)


class LanguageModel(L.LightningModule):
    """Trains and scores a Backbone.

    The training loss is the mean over all targets of the *global* batch, whatever number of ranks and micro-batches it is cut
    into. Logged every ``log_every_n_steps``: ``train/loss`` (as it is minimised: with the z-loss, where there is one),
    ``train/token_accuracy`` (unless a fused loss cannot tell it), ``train/grad_norm`` (before clipping) and ``train/lr``; on
    evaluation windows, all that the data's evaluator computes, under ``val/`` and ``test/``.

    Modules of the net with an ``auxiliary_loss`` (mixtures of experts) have it added to what is minimised, not to
    ``train/loss``, and their ``statistics`` logged as ``train/<name>``, the mean over these modules. An auxiliary loss
    describes one micro-batch and is no sum over tokens: unlike the loss it is averaged over ranks and micro-batches, so that
    cutting the global batch otherwise changes it a little.

    Args:
        net: the model.
        optimizer: called with the net's named parameters; None for a model that is only scored.
        schedule: factor on the learning rate by 0-based optimizer step; likewise.
        loss: loss of each target.
        config: the run's resolved configuration, as plain containers; stored in every checkpoint.
        config_hash: what names it (``config.experiment_hash``); ranks compare it.
        compile: compile each block.
        recompute: what of a block is computed again in the backward pass, see ``Backbone.recompute_blocks``.
    """

    def __init__(
        self,
        net: Backbone,
        *,
        optimizer: Callable[..., Optimizer] | None = None,
        schedule: Callable[[int], float] | None = None,
        loss: NextTokenLoss | None = None,
        config: dict[str, Any] | None = None,
        config_hash: str | None = None,
        compile: bool = False,
        recompute: str = "none",
    ):
        super().__init__()
        self.net = net
        self.build_optimizer, self.schedule = optimizer, schedule
        self.loss = loss or NextTokenLoss()
        self.config = config or {}
        self.config_hash = config_hash
        self.compile_blocks, self.recompute = compile, recompute
        # Filled in by setup(): one for validation, one for the test set.
        self.evaluators = nn.ModuleDict()
        # Right and total answers of the latest evaluation, by metric: what intervals are made of.
        self.counts: dict[str, tuple[int, int]] = {}
        # What the latest validation has found; a resumed run may have ended before the next.
        self.validated: dict[str, float] = {}
        self.validated_step: int | None = None  # of whose weights; None where that is not known
        # States of callbacks before a validation that no longer run would have had: after the last step.
        self.states_before_extra: dict[str, Any] = {}
        # What shorter runs this one has been continued from: step and planned steps.
        self.continued: list[dict[str, int]] = []
        self.continued_here: list[dict[str, int]] = []
        # How training ended, once it has: see ``fit.ending``.
        self.ended: dict[str, Any] | None = None
        # Whether what a checkpoint held has been taken over and training has begun, and after which step.
        self.began = False
        self.began_at = 0
        self._configured = False
        self._step_metrics: list[dict[str, Tensor]] = []
        self._loss_of_step = torch.zeros(())
        self._trained: dict[str, float] = {}
        self._unwritten: tuple[int, dict[str, float]] = (-1, {})
        self._epoch = 0
        # Wall time that earlier attempts had taken up to the checkpoint that this one goes on from.
        self.seconds_before, self._since = 0.0, time.perf_counter()
        self._routed: list[Any] = [module for module in net.modules() if hasattr(module, "auxiliary_loss")]

    @property
    def guards(self) -> list[Any]:
        """Callbacks that look at loss and gradient before an update."""
        return [callback for callback in getattr(self.trainer, "callbacks", []) if hasattr(callback, "before_update")]

    # ---- assembly --------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Lays the model out over the processes; called by Lightning once they know each other."""
        if self._configured:
            return
        self._configured = True
        if self.trainer.precision == "64-true":
            self.double()  # before a checkpoint is taken over: Lightning does it afterwards
        lay_out(self.net, self.trainer.strategy, recompute=self.recompute, compile=self.compile_blocks)

    def setup(self, stage: str) -> None:
        """Takes the evaluators from the data."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if datamodule is not None and not len(self.evaluators):
            for split in ("val", "test"):
                self.evaluators[split] = evaluator_of(datamodule, split)

    def configure_optimizers(self) -> Any:
        """The optimizer, and its schedule stepped after every update."""
        schedule = self.schedule
        if self.build_optimizer is None or schedule is None:
            raise RuntimeError("this module was built to be scored: training needs an optimizer and a schedule")
        optimizer = self.build_optimizer(self.net.named_parameters())
        optimizer.register_load_state_dict_pre_hook(check_loaded)
        # A function rather than the schedule itself, whose attributes LambdaLR would write into every checkpoint.
        scheduler = LambdaLR(optimizer, lambda step: schedule(step))  # noqa: PLW0108
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ---- training --------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one micro-batch, scaled so that the mean over ranks and micro-batches is the mean over all targets."""
        loss, right = self._summed_loss(batch)
        everyone = self.trainer.world_size * self.trainer.accumulate_grad_batches
        count = batch["step_targets"].to(loss.dtype)
        if self.trainer.world_size > 1:
            count = self.trainer.strategy.reduce(count, reduce_op="sum")  # type: ignore[assignment]
        # A step without any target (windows shorter than a question) has loss 0, not NaN.
        mean = loss * everyone / count.clamp(min=1)
        # A loss that is not finite here makes everybody's gradient so, which is where it is noticed (callbacks/guard.py).
        mean = mean * (mean.detach() - mean.detach() + 1)
        metrics = {"loss": mean.detach()}
        if right is not None:
            metrics["token_accuracy"] = (right * everyone / count.clamp(min=1)).to(mean.dtype)
        for module in self._routed:
            if module.auxiliary_loss is not None:
                mean = mean + module.auxiliary_loss
            for name, value in module.statistics.items():
                metrics[name] = metrics.get(name, 0) + value.to(mean.dtype) / len(self._routed)
            module.auxiliary_loss = None  # it holds the graph of this step
        self._step_metrics.append(metrics)
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self._log_step()
        return mean

    def _follow_schedule(self) -> None:
        """Sets the rates of the next step: those in a checkpoint may follow the schedule of a shorter run."""
        step = self.trainer.global_step
        for scheduler in [config.scheduler for config in self.trainer.lr_scheduler_configs]:
            assert isinstance(scheduler, LambdaLR)
            scheduler.base_lrs = [group["initial_lr"] for group in scheduler.optimizer.param_groups]
            scheduler.last_epoch = step
            for group, base, factor in zip(
                scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
            ):
                group["lr"] = base * factor(step)

    def _summed_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Loss and number of right predictions, summed over the targets of a micro-batch."""
        targets, options = self._targets(batch)
        if self.loss.is_fused(targets.numel(), self.net.vocab_size, targets.device):
            return self.net(**options, head=partial(self.loss.of_features, targets=targets))
        logits = self.net(**options)
        loss, _ = self.loss(logits, targets)
        with torch.no_grad():
            right = (logits.argmax(dim=-1) == targets).sum()
        return loss.sum(), right

    def _log_step(self) -> None:
        """Logs the optimizer step whose last micro-batch has just been read, if it is one to be logged."""
        names = list(self._step_metrics[0])
        values = torch.stack([torch.stack([metrics[name] for name in names]) for metrics in self._step_metrics])
        self._step_metrics.clear()
        self._loss_of_step = values[:, names.index("loss")].mean()
        if is_log_step(self.trainer, self.trainer.global_step + 1):
            for name, value in zip(names, values.mean(dim=0), strict=True):
                self.log(f"train/{name}", value, prog_bar=name in ("loss", "token_accuracy"), sync_dist=True)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the global L2 norm, and logs that norm and the learning rate of this update."""
        if gradient_clip_algorithm not in (None, "norm"):
            raise ValueError(f"trainer.gradient_clip_algorithm={gradient_clip_algorithm!r}: only norm is supported")
        limit = float("inf") if gradient_clip_val is None else gradient_clip_val
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(
                optimizer
            )  # Lightning leaves it to the fused optimizer's step, which comes too late for the norm
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # The first steps in float16 overflow until its scale is found: the scaler leaves them out.
        scaling = scaler is not None and not bool(norm.isfinite())
        for callback in [] if scaling else self.guards:
            callback.before_update(self.trainer, optimizer, self._loss_of_step, norm)
        if is_log_step(self.trainer, self.trainer.global_step + 1):
            self.log("train/grad_norm", norm)
            self.log("train/lr", torch.tensor(optimizer.param_groups[0]["lr"]))

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds a validation batch to the evaluator."""
        self._evaluate(batch, "val")
        trainer = self.trainer
        self._examine_after(
            "val", batch_idx, trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        )

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds a test batch to the evaluator."""
        self._evaluate(batch, "test")
        self._examine_after("test", batch_idx, self.trainer.num_test_batches)

    def on_validation_epoch_end(self) -> None:
        """Logs what the evaluator found."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Logs what the evaluator found."""
        self._log_evaluation("test")

    def _evaluate(self, batch: dict[str, Tensor], split: str) -> None:
        targets, options = self._targets(batch)
        logits = self.net(**options)
        if targets.numel() and reads_alone(self.trainer):
            _, nll = self.loss(logits, targets)
            self._evaluator(split).update(batch, logits, nll)

    def _examine_after(self, split: str, batch_idx: int, batches: Sequence[int | float]) -> None:
        """Has the model write after the last batch: at the epoch's end callbacks that average weights have already put others in."""
        if batch_idx + 1 == sum(batches):
            self._evaluator(split).examine(self.net, count=self.trainer.is_global_zero)

    def _log_evaluation(self, split: str) -> None:
        evaluator = self._evaluator(split)
        found = {name: value.float() for name, value in evaluator.compute().items()}
        if split == "val":
            self.validated = {f"val/{name}": float(value) for name, value in found.items()}
            self.validated_step = self.trainer.global_step
        for name, value in found.items():
            # The evaluator has already summed over ranks; sync_dist only tells Lightning that we know.
            shown = name in ("loss", "accuracy", "bits_per_byte")
            self.log(f"{split}/{name}", value, prog_bar=shown, sync_dist=True)
        self.counts |= {f"{split}/{name}": pair for name, pair in evaluator.counts.items()}
        evaluator.reset()

    def _evaluator(self, split: str) -> Evaluator:
        evaluator = self.evaluators[split]
        assert isinstance(evaluator, Evaluator)
        return evaluator

    def _targets(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Targets ``[N]`` where the loss mask says that a token is to be predicted, and how to call the net for them."""
        tokens, segments = batch["tokens"], batch.get("segments")
        is_target = batch["loss_mask"][:, 1:]
        before = None if segments is None else segments[:, :-1]
        return tokens[:, 1:][is_target], {"ids": tokens[:, :-1], "segments": before, "select": is_target}

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds configuration and data fingerprint: plain containers, so that ``torch.load(weights_only=True)`` opens the file."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        checkpoint["format"] = CHECKPOINT_FORMAT
        checkpoint["version"] = __version__
        checkpoint["config"] = with_names(self.config)
        checkpoint["data"] = datamodule.fingerprint() if datamodule is not None else None
        checkpoint["pending_metrics"] = self._pending_metrics()
        counts = {name: pair for name, pair in self.counts.items() if name.startswith("val/")}
        checkpoint["validated"] = {"metrics": self.validated, "counts": counts, "step": self.validated_step}
        # What callbacks would find of training, should they look at it in a validation that is to be made up for.
        logged = self.trainer.callback_metrics.items()
        checkpoint["validated"]["train"] = {name: float(x) for name, x in logged if name.startswith("train/")}
        checkpoint.setdefault("callbacks", {}).update(self.states_before_extra)
        checkpoint["continued"] = self.continued
        # Among how many processes batches are divided: limits on evaluation batches count those of each.
        checkpoint["shares"] = data_share(self.trainer)[1]
        checkpoint["ended"] = self.ended
        checkpoint["seconds"] = self.seconds_before + time.perf_counter() - self._since

    def _pending_metrics(self) -> dict[str, float]:
        """What this step has logged: Lightning hands it to the loggers only after checkpoints of the step are written.

        What was logged before is put on the disk first, so that a checkpoint never knows of steps that the metrics do not.
        """
        for logger in self.trainer.loggers:
            logger.save()
        if not is_log_step(self.trainer, self.trainer.global_step):
            return {}
        logged = self.trainer.callback_metrics.items()
        return {name: float(value) for name, value in logged if name.startswith("train/")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remembers what the last step before has logged.

        Raises:
            ValueError: states in the checkpoint are not those of this trainer's parts.
        """
        check_states(checkpoint, self.trainer.callbacks)  # type: ignore[attr-defined]
        forget_files_elsewhere(checkpoint, self.trainer.callbacks)  # type: ignore[attr-defined]
        for key in ("state_dict", "current_model_state"):  # the second of callbacks that average weights
            check_types(weights_of(checkpoint, key), self.net)
        recut(checkpoint, self.trainer.accumulate_grad_batches)
        limit = self.trainer.limit_train_batches
        set_epoch(checkpoint, limit if isinstance(limit, int) else None, self.trainer.accumulate_grad_batches)
        self._unwritten = (checkpoint["global_step"] - 1, checkpoint.get("pending_metrics") or {})
        self._epoch = epoch_of(self.trainer, checkpoint["global_step"])
        self.seconds_before = checkpoint.get("seconds") or 0.0
        self.ended = checkpoint.get("ended")
        validated: dict[str, Any] = checkpoint.get("validated") or {"metrics": {}, "counts": {}}
        self.validated, self.counts = dict(validated["metrics"]), dict(validated["counts"])
        self.validated_step = validated.get("step")
        self._trained = dict(validated.get("train") or {})
        self.continued = [*(checkpoint.get("continued") or []), *self.continued_here]

    def on_train_start(self) -> None:
        """Makes up for what the last step before had still to do when its checkpoint was written: log, and validate if that was due."""
        (step, metrics), self._unwritten = self._unwritten, (-1, {})
        self.ended, self.began, self.began_at = None, True, self.trainer.global_step
        self.states_before_extra = {}
        self._follow_schedule()
        if self.trainer.ckpt_path is not None:
            # Steps are counted in several places of a checkpoint; where they disagree, training might never end.
            begun = self.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.ready
            if not step + 1 == self.trainer.global_step == begun:
                told = f"{step + 1} steps, {begun} begun and {self.trainer.global_step} ended"
                raise RunError(f"checkpoint {self.trainer.ckpt_path} cannot be gone on from: it counts {told}")
        if step < 0:
            return
        trainer, logs = self.trainer, [logger for logger in self.trainer.loggers if isinstance(logger, CSVLog)]
        folders = [Path(str(getattr(callback, "dirpath", ""))).resolve() for callback in trainer.checkpoint_callbacks]
        if Path(str(trainer.ckpt_path)).resolve().parent not in folders:
            logs = []  # another folder's curve begins with what is new
        for logger in logs:
            logger.go_on_from(step + 1)
            if metrics and not logger.has(step, "train/loss"):
                logger.log_metrics(metrics | {"epoch": self._epoch}, step=step)
        batches = (step + 1) * trainer.accumulate_grad_batches
        due = is_validated(trainer, batches)
        if not due and is_last(trainer, batches):
            self.note_extra_validation()
            due = True
        # What callbacks that keep the best checkpoint or stop early were told after this one was written, they have forgotten.
        missing = bool(logs) and not any(logger.has(step, "val/loss") for logger in logs)
        missing = trainer.strategy.broadcast(missing or self.validated_step != step + 1)
        if due and missing and trainer.enable_validation:
            # Lightning takes a checkpoint before the validation of its step, and does not come back to it.
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self._trained.items()})
            self.validate_now(self._epoch)
        self._end_the_epoch_that_was_over()
        # That training was to end is in no state of a trainer.
        stopped = any(c.stopping_reason_message is not None for c in self._early_stopping)
        trainer.should_stop = trainer.should_stop or stopped

    def validate_now(self, epoch: int) -> None:
        """Validates between two steps, as Lightning would have in the last one.

        Args:
            epoch: that the last step belongs to; Lightning may already have moved on to another one.
        """
        self.trainer.validating = True
        validation = self.trainer.fit_loop.epoch_loop.val_loop
        validation.restarting = False  # or it would leave out as many batches as an earlier validation had read
        progress = self.trainer.fit_loop.epoch_progress.current
        progress.completed, now = epoch, progress.completed
        validation.run()
        progress.completed = now
        self.trainer.training = True

    @property
    def _early_stopping(self) -> list[EarlyStopping]:
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        return [callback for callback in callbacks if isinstance(callback, EarlyStopping)]

    def note_extra_validation(self) -> None:
        """A validation, or an end of an epoch, follows that a longer run would not have had: checkpoints keep what early stopping has known
        before the first of them."""
        self.states_before_extra = self.states_before_extra or {
            c.state_key: c.state_dict() for c in self._early_stopping
        }

    def _end_the_epoch_that_was_over(self) -> None:
        """Callbacks are told of the end of an epoch whose last step a checkpoint holds: Lightning goes on behind it."""
        loop, limit = self.trainer.fit_loop, self.trainer.limit_train_batches
        over = isinstance(limit, int) and self.trainer.global_step * self.trainer.accumulate_grad_batches % limit == 0
        if not (over and loop.restarted_mid_epoch and loop.epoch_loop.restarted_on_train_batch_end):
            return
        epoch: Any = loop.epoch_progress.current
        epoch.completed, now = self._epoch, epoch.completed
        for monitoring in (False, True):
            call._call_callback_hooks(self.trainer, "on_train_epoch_end", monitoring_callbacks=monitoring)
        epoch.completed = now
