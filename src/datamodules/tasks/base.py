"""What a synthetic task is, and how its examples fill windows.

    example i of a split   a pure function of (task, seed, split, i)
    window w of a split    packs examples w*M, w*M + 1, ... until it is full; starts with a whole example, the last is cut

M is large enough to fill a window with the shortest examples, so no window needs to know what another one used.

``loss_mask`` is aligned with the *targets*: where it is true, that token is one to be predicted (from those before it).
Only numpy and numba here: the tasks are a library of their own, without torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
from numba import njit
from numpy.typing import NDArray

Split = Literal["train", "val", "test"]
SPLITS: tuple[str, ...] = get_args(Split)


@dataclass(frozen=True)
class Windows:
    """A batch of packed windows: W windows of L tokens."""

    tokens: NDArray[np.int64]  # [W, L]
    loss_mask: NDArray[np.bool_]  # [W, L], target-aligned
    segments: NDArray[np.int32]  # [W, L], number of the example within its window


@dataclass(frozen=True)
class Score:
    """How many answers were right, by difficulty: ``{group: (right, total)}``; groups are the task's own."""

    counts: dict[str, tuple[int, int]]


class Task(ABC):
    """A synthetic task. Subclasses are frozen dataclasses of their parameters."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @property
    @abstractmethod
    def groups(self) -> tuple[str, ...]:
        """The difficulties that ``score`` reports, in order."""

    @abstractmethod
    def chance(self, group: str) -> float:
        """Expected accuracy of the best guess that ignores the question, at evaluation difficulty."""

    @abstractmethod
    def example(self, seed: int, split: Split, index: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Example ``index``: tokens ``[n]`` and target-aligned loss mask ``[n]``."""

    @abstractmethod
    def windows(self, seed: int, split: Split, first: int, count: int, length: int) -> Windows:
        """Windows ``first .. first + count - 1``, each of ``length`` tokens."""

    @abstractmethod
    def score(self, tokens: NDArray[np.int64], predictions: NDArray[np.int64]) -> Score:
        """Counts right answers by group.

        Args:
            tokens: the windows ``[W, L]``.
            predictions: ``[W, L]``, the token predicted *for* each position (from those before it); only positions of
                answers are looked at.
        """

    @abstractmethod
    def describe(self, tokens: NDArray[np.int64]) -> str:
        """One example in human words."""

    def show(self, seed: int = 0, split: Split = "train", index: int = 0) -> str:
        """Example ``index`` in human words."""
        return self.describe(self.example(seed, split, index)[0])


def check_split(split: str) -> None:
    """Raises a ValueError that lists the splits."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: choose {', '.join(SPLITS)}")


@njit(cache=True)
def place(example_tokens, example_mask, size, number, start, tokens, mask, segments):
    """Copies an example of ``size`` tokens into a window at ``start``, cut at its end; returns the next free position."""
    end = min(start + size, tokens.shape[0])
    for t in range(start, end):
        tokens[t] = example_tokens[t - start]
        mask[t] = example_mask[t - start]
        segments[t] = number
    return end
