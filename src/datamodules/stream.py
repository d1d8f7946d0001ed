"""The stream contract: batch n of a run is a pure function of (seed, n).

    global batch n       = windows  n*G .. n*G + G - 1            G = ``batch_size`` windows per optimizer step
    micro-batch (n, j)   of rank r  = its share of these windows   j = 0..accumulate-1

Nothing depends on the number of workers, on prefetching, or on whether the run was stopped in between; the number of ranks and of
accumulated micro-batches only says how a global batch is cut up. The position in the stream is the optimizer-step count of the
checkpoint: there is no loader state to save, lose or restore wrongly.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

Batch = dict[str, Tensor]


class WindowSource(Protocol):
    """Anything that can say what window w of a split is: a task, a corpus."""

    def windows(self, split: str, first: int, count: int) -> dict[str, NDArray[Any]]:
        """Windows ``first .. first + count - 1``.

        ``tokens`` ``[count, L]``, ``loss_mask`` ``[count, L]`` (target-aligned; absent: every token but the first), and
        ``segments`` ``[count, L]`` when documents are to be kept apart.
        """
        ...

    def num_windows(self, split: str) -> int | None:
        """Windows in a val or test split; None for no end."""
        ...


def data_share(trainer: Any) -> tuple[int, int]:
    """Which share of every batch a trainer's process reads, and how many shares there are.

    Processes that split tensors among them (``Fsdp2.tensor_parallel`` neighbours) read the same.
    """
    size = getattr(trainer.strategy, "tensor_parallel", 1)
    return trainer.global_rank // size, trainer.world_size // size


def reads_alone(trainer: Any) -> bool:
    """Whether this process is the first of those that read the same; what it counts, the others need not."""
    return trainer.global_rank % getattr(trainer.strategy, "tensor_parallel", 1) == 0


@dataclass(frozen=True)
class Share:
    """Which part of every global batch belongs to this process.

    Raises:
        ValueError: when the global batch cannot be cut evenly.
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % (self.world_size * self.accumulate):
            raise ValueError(
                f"data.batch_size={self.batch_size} windows per optimizer step cannot be cut evenly among "
                f"{self.world_size} process(es) x {self.accumulate} accumulated micro-batch(es)"
            )

    @property
    def micro_batch(self) -> int:
        """Windows in one micro-batch of one rank."""
        return self.batch_size // (self.world_size * self.accumulate)

    def first_window(self, step: int, part: int) -> int:
        """First window of micro-batch ``part`` of optimizer step ``step``."""
        return step * self.batch_size + (part * self.world_size + self.rank) * self.micro_batch


class TrainingBatches(Dataset):
    """Micro-batch i of this rank, for i = step * accumulate + part.

    Besides the windows, a batch holds ``step_targets``: how many tokens this rank predicts in the *whole* optimizer step. Dividing
    by it (summed over ranks) makes the loss the mean over all targets of the global batch, however it is cut up.
    """

    def __init__(self, source: WindowSource, share: Share, total_steps: int):
        self.source, self.share, self.total_steps = source, share, total_steps

    def __len__(self) -> int:
        return self.total_steps * self.share.accumulate

    def __getitem__(self, index: int) -> Batch:
        step, part = divmod(index, self.share.accumulate)
        batch = self._windows(step, part)
        targets = 0
        for other in range(self.share.accumulate):
            target_mask = (batch if other == part else self._windows(step, other))["loss_mask"]
            targets += int(target_mask[:, 1:].sum())
        return to_tensors(batch) | {"step_targets": torch.tensor(targets)}

    def _windows(self, step: int, part: int) -> dict[str, NDArray[Any]]:
        return with_loss_mask(self.source.windows("train", self.share.first_window(step, part), self.share.micro_batch))


class EvaluationBatches(Dataset):
    """Batches of a fixed evaluation set; rank r of R holds batches r, r + R, ...

    A rank that runs out gets a window without targets, so that all ranks have equally many batches.
    """

    def __init__(self, source: WindowSource, split: str, batch_size: int, rank: int = 0, world_size: int = 1):
        windows = source.num_windows(split)
        if not windows or batch_size < 1:
            raise ValueError(f"the {split} split needs a positive number of windows and a positive batch size")
        self.source, self.split, self.windows, self.batch_size = source, split, windows, batch_size
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return -(-self.windows // (self.batch_size * self.world_size))

    def __getitem__(self, index: int) -> Batch:
        if index >= len(self):
            raise IndexError(index)
        first = (index * self.world_size + self.rank) * self.batch_size
        if first >= self.windows:
            filler = with_loss_mask(self.source.windows(self.split, 0, 1))
            return to_tensors(filler | {"loss_mask": np.zeros_like(filler["loss_mask"])})
        count = min(self.batch_size, self.windows - first)
        return to_tensors(with_loss_mask(self.source.windows(self.split, first, count)))


class FromStep(Sampler):
    """Micro-batch indices from the current optimizer step to the last; asked anew whenever iteration starts."""

    def __init__(self, batches: TrainingBatches, current_step: Callable[[], int]):
        self.batches, self.current_step = batches, current_step

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.current_step() * self.batches.share.accumulate, len(self.batches)))

    def __len__(self) -> int:
        return len(self.batches)


class StreamLoader(DataLoader):
    """A DataLoader whose position is derived, so it has no state; Lightning asks resumable loaders for one all the same."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


def leave_interrupts_to_the_run(_: int) -> None:
    """Of a data worker: Ctrl-C reaches it too, but the step that is to be ended first may still need its batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def with_loss_mask(batch: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Fills in the mask of a source that predicts every token."""
    return batch if "loss_mask" in batch else batch | {"loss_mask": np.ones(batch["tokens"].shape, dtype=np.bool_)}


def to_tensors(batch: dict[str, NDArray[Any]]) -> Batch:
    """Tokens and segments as int64, as embeddings and comparisons want them."""
    return {
        name: torch.from_numpy(array if array.dtype == np.bool_ else array.astype(np.int64, copy=False))
        for name, array in batch.items()
    }
