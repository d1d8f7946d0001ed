"""Which checkpoints of a run are kept: Lightning's ModelCheckpoint, made to go on after an interruption as if there had been none."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor


class Checkpoints(ModelCheckpoint):
    """``ModelCheckpoint``, and its arguments, with these differences.

    - It saves after whole optimizer steps only. Lightning, resumed with accumulation, saves the step that it has resumed from once
      more, after the first micro-batch of the next one: without the gradients so far, over the file that was right.
    - It saves the last step of all too; Lightning waits there for a validation, which may not come.
    - What it knows of the files that are to be kept outlives a change of ``every_n_train_steps``, and a run's folder that was moved.
    - The checkpoint that a run was resumed from is removed in its turn like all others.
    - A run that ends before its first checkpoint leaves ``final.ckpt`` (``src/training/run.py``) and no ``last.ckpt`` besides.
    """

    config_name = "checkpoints"

    _resumed: Path | None = None

    @property
    def state_key(self) -> str:
        """Under which a checkpoint holds this callback's state, whatever the class is called."""
        return f"Checkpoints({self.monitor}, {self.filename})"

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notes where it lies, of which ``load_state_dict`` is not told."""
        self._resumed = Path(str(trainer.ckpt_path)).resolve()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what was kept so far; in a folder that has moved, under its new name.

        Raises:
            KeyError, ValueError: it holds something else than files and scores.
        """
        scores = [state_dict["best_model_score"], state_dict["current_score"], state_dict["kth_value"]]
        for score in (*scores, *state_dict["best_k_models"].values()):
            if score is not None and not (isinstance(score, Tensor) and score.numel() == 1):
                raise ValueError("a checkpoint is kept by a score that is no number")
        names = [state_dict[name] for name in ("dirpath", "best_model_path", "kth_best_model_path")]
        names += [*state_dict["best_k_models"], state_dict.get("last_model_path", "")]
        if not all(isinstance(name, str | None) for name in names):
            raise ValueError("a checkpoint that is kept has no name")
        before, now = state_dict["dirpath"], self.dirpath
        if before != now and self._resumed is not None and self._resumed.parent == Path(str(now)).resolve():
            state_dict = {name: _moved(value, str(before), str(now)) for name, value in state_dict.items()}
        super().load_state_dict(state_dict)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves, if it is time, after the last micro-batch of a step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        every = self._every_n_train_steps
        if self.monitor != "step" or every < 1:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif trainer.global_step % every == 0 and not self._should_skip_saving_checkpoint(trainer):
            self.save_now(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing: see above."""

    def save_now(self, trainer: L.Trainer) -> str | None:
        """Saves the step that has just ended, unless that has been done; returns the file."""
        if self._last_global_step_saved != trainer.global_step:
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
        return self._last_checkpoint_saved or None

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        """The time that it takes is none of training's (``callbacks/throughput.py``)."""
        began = time.perf_counter()
        super()._save_checkpoint(trainer, filepath)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "do_not_count"):
                callback.do_not_count(time.perf_counter() - began)

    def _should_remove_checkpoint(self, trainer: L.Trainer, previous: str, current: str) -> bool:
        # What a checkpoint says of files to be removed may come from elsewhere: only checkpoints, by their names, in this very folder.
        path = Path(previous)
        own = (
            path.parent.resolve() == Path(str(self.dirpath)).resolve()
            and path.suffix == ".ckpt"
            and path.stem.strip(".")
        )
        return previous != current and bool(own) and not path.is_symlink()


def _moved(value: Any, before: str, now: str) -> Any:
    if isinstance(value, dict):
        return {_moved(key, before, now): score for key, score in value.items()}
    return now + value.removeprefix(before) if isinstance(value, str) and value.startswith(before) else value
