"""Synthetic tasks as a LightningDataModule: fresh examples for ever, and fixed evaluation sets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

from numpy.typing import NDArray

from src.datamodules.base import StreamDataModule
from src.datamodules.tasks.base import Split, Task
from src.evaluation.evaluators import TaskEvaluator


@dataclass(frozen=True)
class TaskWindows:
    """The windows of a synthetic task: a ``WindowSource``.

    Args:
        task: what is packed.
        window: tokens in a window.
        seed: of the data.
        sizes: windows in each evaluation split.
        isolate: number the examples of a window, to keep them apart.
    """

    task: Task
    window: int
    seed: int
    sizes: dict[str, int]
    isolate: bool = False

    def windows(self, split: str, first: int, count: int) -> dict[str, NDArray[Any]]:
        """See ``WindowSource.windows``."""
        packed = self.task.windows(self.seed, cast(Split, split), first, count, self.window)
        batch: dict[str, NDArray[Any]] = {"tokens": packed.tokens, "loss_mask": packed.loss_mask}
        return batch | {"segments": packed.segments} if self.isolate else batch

    def num_windows(self, split: str) -> int | None:
        """See ``WindowSource.num_windows``."""
        return self.sizes.get(split)


class TaskDataModule(StreamDataModule):
    """Packs a synthetic task's examples into windows.

    Every window starts with a whole example; the last one is cut at its end. Training never sees an example twice.

    Args:
        task: one of ``src.datamodules.tasks``.
        window: tokens in a window.
        batch_size: windows per optimizer step, over all ranks and accumulated micro-batches.
        val_windows: size of the validation set.
        test_windows: size of the test set.
        eval_batch_size: windows per evaluation batch, of one rank.
        isolate: keep the examples of a window apart (attention, convolutions and Canon stop at their boundaries). The paper
            does not.
        num_workers: processes that prepare batches.
        seed: of the data; all architectures compared should share it.
    """

    def __init__(
        self,
        task: Task,
        *,
        window: int,
        batch_size: int,
        val_windows: int,
        test_windows: int,
        eval_batch_size: int = 64,
        isolate: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(window, batch_size, eval_batch_size, num_workers)
        for name, size in (("val_windows", val_windows), ("test_windows", test_windows)):
            if size < 1:
                raise ValueError(f"data.{name}={size}: at least 1")
        longest = getattr(task, "max_length", 0)
        if longest > window:
            raise ValueError(
                f"data.window={window}: the longest example of {task.name} has {longest} tokens and would never be whole"
            )
        self.task, self.seed = task, seed
        self._source = TaskWindows(task, window, seed, {"val": val_windows, "test": test_windows}, isolate)

    @property
    def source(self) -> TaskWindows:
        """The task's windows."""
        return self._source

    @property
    def vocab_size(self) -> int:
        """The task's."""
        return self.task.vocab_size

    def evaluator(self) -> TaskEvaluator:
        """Loss, token accuracy, and the task's own score."""
        return TaskEvaluator(self.task)

    def fingerprint(self) -> dict[str, Any]:
        """The task's parameters and the seed: they determine every token."""
        return {"task": self.task.name, "seed": self.seed} | dataclasses.asdict(self.task)  # type: ignore[call-overload]
