"""Synthetic tasks as a LightningDataModule: fresh examples for ever, and fixed evaluation sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from numpy.typing import NDArray

from src.datamodules.base import StreamDataModule
from src.datamodules.tasks.base import Split, Task


@dataclass(frozen=True)
class TaskWindows:
    """The windows of a synthetic task: a ``WindowSource``.

    Args:
        task: what is packed.
        window: tokens in a window.
        seed: of the data.
        sizes: most windows in each evaluation split.
        isolate: number the examples of a window, to keep them apart.
    """

    task: Task
    window: int
    seed: int
    sizes: dict[str, int | None]
    isolate: bool = False

    def windows(self, split: str, first: int, count: int) -> dict[str, NDArray[Any]]:
        """See ``WindowSource.windows``."""
        packed = self.task.windows(self.seed, cast(Split, split), first, count, self.window)
        batch: dict[str, NDArray[Any]] = {"tokens": packed.tokens, "loss_mask": packed.loss_mask}
        if packed.kinds is not None and split != "train":  # only scores ask for them
            batch["kinds"] = packed.kinds
        return batch | {"segments": packed.segments} if self.isolate else batch

    def num_windows(self, split: str) -> int | None:
        """See ``WindowSource.num_windows``."""
        whole = self.task.num_windows(cast(Split, split), self.window)
        wanted = self.sizes.get(split)
        return whole if wanted is None else wanted if whole is None else min(whole, wanted)


class TaskDataModule(StreamDataModule):
    """Packs a synthetic task's examples into windows.

    Every window starts with a whole example; the last one may be cut at its end. Examples of training are
    drawn anew for every window: twice the same one only where a task has few.

    Args:
        task: one of ``src.datamodules.tasks``.
        window: tokens in a window.
        batch_size: windows per optimizer step, over all ranks and accumulated micro-batches.
        val_windows: size of the validation set; null for all there is, if the task has an end.
        test_windows: size of the test set.
        val_answers: how many validation examples the model answers by writing, for tasks that are scored so.
        test_answers: as many of the test.
        eval_batch_size: windows per evaluation batch, of one rank.
        isolate: keep the examples of a window apart (attention, convolutions and Canon stop at their boundaries). The paper
            does not.
        num_workers: processes that prepare batches.
        seed: of the data; all architectures compared should share it.
    """

    config_name = "task_windows"

    def __init__(
        self,
        task: Task,
        *,
        window: int,
        batch_size: int,
        val_windows: int | None,
        test_windows: int | None,
        val_answers: int = 64,
        test_answers: int = 512,
        eval_batch_size: int = 64,
        isolate: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(window, batch_size, eval_batch_size, num_workers)
        if seed < 0:
            raise ValueError(f"data.seed={seed}: a number from 0 on")
        self._check(
            task, window, {"val": val_windows, "test": test_windows}, {"val": val_answers, "test": test_answers}
        )
        self.task, self.seed = task, seed
        self.answers = {"val": val_answers, "test": test_answers}
        self._source = TaskWindows(task, window, seed, {"val": val_windows, "test": test_windows}, isolate)

    @staticmethod
    def _check(task: Task, window: int, sizes: dict[str, int | None], answers: dict[str, int]) -> None:
        for split, size in sizes.items():
            if size is None and task.num_windows(cast(Split, split), window) is None:
                raise ValueError(f"data.{split}_windows: {task.name} never ends, so it needs a number")
            if size is not None and size < 1:
                raise ValueError(f"data.{split}_windows={size}: at least 1")
            if answers[split] < (0 if task.generation is None else 1):
                raise ValueError(f"data.{split}_answers={answers[split]}: at least 1")
        if task.min_window > window:
            raise ValueError(
                f"data.window={window}: examples of {task.name} need {task.min_window} tokens, and would hardly ever be whole"
            )

    @property
    def source(self) -> TaskWindows:
        """The task's windows."""
        return self._source

    @property
    def vocab_size(self) -> int:
        """The task's."""
        return self.task.vocab_size

    @property
    def training_steps(self) -> int | None:
        """Steps until the task's training examples have all been seen; None for a task without end."""
        windows = self.task.num_windows("train", self.window)
        return None if windows is None else -(-windows // self.batch_size)

    def chance(self) -> dict[str, float]:
        """See ``StreamDataModule.chance``."""
        groups = {f"accuracy/{group}": self.task.chance(group) for group in self.task.groups}
        return {"accuracy": self.task.overall_chance()} | groups

    def fingerprint(self) -> dict[str, Any]:
        """The task's parameters and the seed: they determine every token."""
        return {"seed": self.seed} | self.task.fingerprint()
