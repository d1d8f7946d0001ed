"""What a sweep says beforehand, and which of its axes repeat a comparison; known to plans and to reports, and free of anything heavy."""

from __future__ import annotations

from dataclasses import dataclass

SEED, LEARNING_RATE = "seed", "optimizer.lr"


@dataclass(frozen=True)
class Statement:
    """A checkable statement: ``better`` scores at least ``by`` more than ``than``.

    With a negative ``by`` it says that something is at most so much worse. Scores are those of the best learning rate of
    each, paired by seed.

    Args:
        better: a variant.
        than: another.
        by: least difference.
        task: on which of the tasks; None for every one of them, which makes one statement each.
    """

    better: str
    than: str
    by: float = 0.0
    task: str | None = None


@dataclass(frozen=True)
class Match:
    """Makes variants as large as one of them.

    Args:
        budget: parameters, flops (per token) or state.
        to: the variant that stays as it is.
        change: width or depth of the others.
    """

    budget: str
    to: str
    change: str = "width"


def is_repetition(keys: str) -> bool:
    """Whether an axis repeats a comparison (seeds) or tunes it (the learning rate), instead of asking something else."""
    return bool({SEED, LEARNING_RATE} & set(keys.split(",")))
