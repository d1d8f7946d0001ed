"""What a synthetic task is, and how its examples fill windows.

    example i of a split   a pure function of (task, seed, split, i)
    window w of a split    packs examples w*M, w*M + 1, ... until it is full; starts with a whole example, the last is cut

M is large enough to fill a window with the shortest examples, so no window needs to know what another one used.

``loss_mask`` is aligned with the *targets*: where it is true, that token is one to be predicted (from those before it).
Only numpy and numba here: the tasks are a library of their own, without torch.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

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
    kinds: NDArray[np.int8] | None = None  # [W, L], what a token is, for tasks whose score asks for it

    @classmethod
    def empty(cls, count: int, length: int) -> Windows:
        """Room for ``count`` windows of ``length`` tokens, without kinds, to be filled in."""
        shape = (count, length)
        return cls(np.empty(shape, np.int64), np.empty(shape, np.bool_), np.empty(shape, np.int32))


@dataclass(frozen=True)
class Examples:
    """B examples, one a row, padded with zeros on the right."""

    tokens: NDArray[np.int64]  # [B, n]
    loss_mask: NDArray[np.bool_]  # [B, n], target-aligned; False on padding
    lengths: NDArray[np.int64]  # [B]


@dataclass(frozen=True)
class Score:
    """How many answers were right, by difficulty: ``{group: (right, total)}``; groups are the task's own.

    ``extra`` counts other things than the task's accuracy, such as answers that only a laxer checker accepts.
    """

    counts: dict[str, tuple[int, int]]
    extra: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Generation:
    """How a model writes the answers of a task that is scored on what it writes.

    It is given the first ``Task.prompt_length`` tokens of an example, and writes until ``stop``.
    """

    stop: int  # token id
    max_new_tokens: int
    temperature: float = 0.0  # 0: the most probable token


class Task(ABC):
    """A synthetic task. Subclasses are frozen dataclasses of their parameters."""

    name: ClassVar[str]

    # ---- what it is ------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @property
    @abstractmethod
    def max_length(self) -> int:
        """Tokens in the longest possible example."""

    @property
    def min_window(self) -> int:
        """The shortest window in which the examples of the test are whole, but for rare ones."""
        return self.max_length

    @property
    @abstractmethod
    def groups(self) -> tuple[str, ...]:
        """The difficulties that ``score`` reports, in order."""

    @property
    def extras(self) -> tuple[str, ...]:
        """What else ``score`` counts."""
        return ()

    @abstractmethod
    def chance(self, group: str) -> float:
        """Expected accuracy of the best guess that ignores the question, at evaluation difficulty."""

    def overall_chance(self) -> float:
        """Expected accuracy of that guess over all answers; for difficulties that are equally frequent, the mean."""
        return sum(map(self.chance, self.groups)) / len(self.groups)

    @property
    def generation(self) -> Generation | None:
        """How answers are written, or None for a task scored on single predictions (teacher forcing)."""
        return None

    def vocabulary(self) -> dict[str, Any]:
        """What gives token ids their meaning, in plain values: a model of one task can be scored on another with the same."""
        return {"vocab_size": self.vocab_size}

    def facts(self, seed: int) -> dict[str, Any]:
        """What a model can know from training alone, in plain values: one that was trained with others has not been told of these.

        Args:
            seed: of the data.
        """
        return {}

    def fingerprint(self) -> dict[str, Any]:
        """What determines the examples besides seed, split and index, in plain values."""
        return {"task": self.name} | dataclasses.asdict(self)  # type: ignore[call-overload]

    # ---- examples --------------------------------------------------------------------------------------------------

    @abstractmethod
    def example(self, seed: int, split: Split, index: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Example ``index``: tokens ``[n]`` and target-aligned loss mask ``[n]``."""

    @abstractmethod
    def windows(self, seed: int, split: Split, first: int, count: int, length: int) -> Windows:
        """Windows ``first .. first + count - 1``, each of ``length`` tokens."""

    @abstractmethod
    def examples_per_window(self, split: Split, length: int) -> int:
        """M: window w packs examples w*M, w*M + 1, ... as far as they fit."""

    def batch(self, seed: int, split: Split, first: int, count: int) -> Examples:
        """Examples ``first .. first + count - 1``, one a row."""
        examples = [self.example(seed, split, index) for index in range(first, first + count)]
        lengths = np.array([len(tokens) for tokens, _ in examples], dtype=np.int64)
        tokens = np.zeros((count, lengths.max(initial=0)), dtype=np.int64)
        mask = np.zeros(tokens.shape, dtype=np.bool_)
        for row, (own_tokens, own_mask) in enumerate(examples):
            tokens[row, : lengths[row]], mask[row, : lengths[row]] = own_tokens, own_mask
        return Examples(tokens, mask, lengths)

    def num_windows(self, split: Split, length: int) -> int | None:
        """How many windows of ``length`` tokens a split has, or None if it never ends."""
        return None

    # ---- scoring ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def score(self, tokens: NDArray[np.int64], predictions: NDArray[np.int64]) -> Score:
        """Counts right answers by group.

        Args:
            tokens: windows ``[W, L]``; a negative id is padding.
            predictions: ``[W, L]``, the token predicted *for* each position (from those before it); only positions of
                answers are looked at. What a model has written is scored as its own prediction: ``score(written, written)``.
        """

    def prompt_length(self, tokens: NDArray[np.int64]) -> int:
        """How many tokens of an example a model is given before it writes the rest."""
        raise ValueError(f"{self.name} is not scored by generation")

    # ---- in words --------------------------------------------------------------------------------------------------

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
