"""Copy: say a random sequence again, word for word.  (Part 4.1, figure 5: "full copy")

    <bos> x_1 x_2 ... x_M  <copy>  x_1 x_2 ... x_M

Worked example, N = 5:

    tokens   0 | 3 1 5 2 4 | 6 | 3 1 5 2 4
    learnt   only the copy, behind <copy>

x is a uniformly random permutation of 1..N; N = 500 in the paper, where a window of 1024 tokens holds one example. Find the last token
in the sequence, say what came behind it: that takes two steps, and a Canon layer can be one of them. In the paper a single
attention layer with RoPE needs width 128 for it; two of them, or one with Canon, make do with 16.

What the paper leaves open: the ids of <bos> and <copy> are 0 and N + 1 here. All splits have the same law. Two options go beyond it:

    ``length``     M < N tokens out of N, for a sequence shorter than its alphabet
    ``distinct``   false: tokens are drawn with replacement, so that the place of one cannot be found by looking for the one before
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

from src.datamodules.tasks.base import Score, Split, Task, Windows, check_split, place
from src.datamodules.tasks.rng import below, seed_stream, stream_key


@dataclass(frozen=True)
class Copy(Task):
    """Copying of random sequences; see the head of this file.

    Args:
        N: how many tokens there are to choose from.
        length: of the sequence to copy; N unless told.
        distinct: no token occurs twice.

    Raises:
        ValueError: for parameters out of range.
    """

    config_name = "copy"

    N: int = 500
    length: int | None = None
    distinct: bool = True

    name: ClassVar[str] = "copy"

    def __post_init__(self) -> None:
        if self.N < 1:
            raise ValueError(f"Copy.N={self.N}: at least 1")
        if self.length is not None and self.length < 1:
            raise ValueError(f"Copy.length={self.length}: at least 1, or null for N")
        if self.distinct and self.size > self.N:
            raise ValueError(
                f"Copy.length={self.length}: there are only N={self.N} different tokens; raise N, or set distinct=false"
            )

    # ---- what it is ------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """M, tokens to copy."""
        return self.N if self.length is None else self.length

    @property
    def bos_id(self) -> int:
        """Id of <bos>."""
        return 0

    @property
    def copy_id(self) -> int:
        """Id of <copy>."""
        return self.N + 1

    @property
    def vocab_size(self) -> int:
        """N tokens, <bos> and <copy>."""
        return self.N + 2

    @property
    def max_length(self) -> int:
        """Tokens in every example."""
        return 2 * self.size + 2

    @property
    def groups(self) -> tuple[str, ...]:
        """``token``: tokens of copies."""
        return ("token",)

    @property
    def extras(self) -> tuple[str, ...]:
        """``sequence``: copies without a mistake."""
        return ("sequence",)

    def chance(self, group: str) -> float:
        """A token at random; one that has not come up in the copy so far, if all are distinct."""
        if not self.distinct:
            return 1.0 / self.N
        return float(np.mean([1.0 / (self.N - done) for done in range(self.size)]))

    # ---- examples --------------------------------------------------------------------------------------------------

    def example(self, seed: int, split: Split, index: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """See ``Task.example``."""
        window = self.windows(seed, split, index, 1, self.max_length)
        return window.tokens[0], window.loss_mask[0]

    def examples_per_window(self, split: Split, length: int) -> int:
        """See ``Task.examples_per_window``: as many as the shortest examples would take."""
        return -(-length // self.max_length)

    def windows(self, seed: int, split: Split, first: int, count: int, length: int) -> Windows:
        """See ``Task.windows``."""
        check_split(split)
        per_window = self.examples_per_window(split, length)
        found = Windows.empty(count, length)
        key = stream_key(self.name, seed, split)
        _fill(self.N, self.size, self.distinct, key, first, per_window, found.tokens, found.loss_mask, found.segments)
        return found

    # ---- reading ---------------------------------------------------------------------------------------------------

    def score(self, tokens: NDArray[np.int64], predictions: NDArray[np.int64]) -> Score:
        """Single tokens of copies; and whole copies, where the window's end does not cut them."""
        counts = np.zeros(4, dtype=np.int64)
        _score(np.ascontiguousarray(tokens), np.ascontiguousarray(predictions), self.copy_id, self.size, counts)
        right, total, whole_right, whole_total = map(int, counts)
        return Score({"token": (right, total)}, {"sequence": (whole_right, whole_total)})

    def describe(self, tokens: NDArray[np.int64]) -> str:
        """The sequence and its copy."""
        sequence, copied = tokens[1 : 1 + self.size], tokens[2 + self.size :]
        return "\n".join(
            f"{name:10s}{' '.join(map(str, part.tolist()))}"
            for name, part in (("sequence", sequence), ("copy", copied))
        )


# ---- compiled -------------------------------------------------------------------------------------------------------


@njit(cache=True)
def _example(stream, distinct, alphabet, tokens, wanted):
    """Writes one example to tokens [2 M + 2], or its first tokens if ``wanted`` is less; ``alphabet`` [N] is room to work in."""
    N, size = alphabet.shape[0], tokens.shape[0] // 2 - 1
    tokens[0], tokens[1 + size] = 0, N + 1
    for i in range(N if distinct else 0):
        alphabet[i] = 1 + i
    for i in range(min(size, wanted)):
        if distinct:  # the beginning of a Fisher-Yates shuffle
            j = i + below(stream, N - i)
            token = alphabet[j]
            alphabet[j] = alphabet[i]
        else:
            token = 1 + below(stream, N)
        tokens[1 + i] = tokens[2 + size + i] = token


@njit(cache=True, nogil=True)
def _fill(N, size, distinct, key, first, per_window, tokens, mask, segments):
    """Fills windows ``first ...``; window w packs examples w * per_window and following."""
    stream, alphabet = np.empty(2, dtype=np.uint64), np.empty(N, dtype=np.int64)
    example_tokens = np.empty(2 * size + 2, dtype=np.int64)
    example_mask = np.arange(2 * size + 2) >= 2 + size
    for row in range(tokens.shape[0]):
        at, number = 0, 0
        while at < tokens.shape[1]:
            seed_stream(stream, key, (first + row) * per_window + number)
            _example(stream, distinct, alphabet, example_tokens, tokens.shape[1] - at)
            at = place(example_tokens, example_mask, 2 * size + 2, number, at, tokens[row], mask[row], segments[row])
            number += 1


@njit(cache=True, nogil=True)
def _score(tokens, predictions, copy_id, size, counts):
    """Adds right and total tokens, right and total copies, to counts [4]."""
    for row in range(tokens.shape[0]):
        t = 0
        while t < tokens.shape[1]:
            t += 1
            if tokens[row, t - 1] != copy_id:
                continue
            start, right = t, 0
            while t < min(start + size, tokens.shape[1]) and tokens[row, t] >= 0:
                right += predictions[row, t] == tokens[row, t]
                t += 1
            counts[0] += right
            counts[1] += t - start
            if t - start == size:
                counts[2] += right == size
                counts[3] += 1
