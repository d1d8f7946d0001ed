"""Learning-rate schedules: the factor on the peak rate as a function of the 0-based optimizer step s.

All warm up linearly, s / warmup, so the very first update of a schedule with warm-up has rate 0 (as in the official trainer).
p = (s - warmup) / (total - warmup) below; r = ``min_ratio``. From the last step on the factor stays at r.

    cosine    r + (1 - r) (1 + cos(pi p)) / 2
    linear    1 - (1 - r) p
    constant  1
    wsd       1, then over the last ``decay_share`` of all steps 1 / (q / r + (1 - q)), q = progress of the decay
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """What all schedules share.

    Args:
        total_steps: optimizer steps of the whole run; from the config, never from a loader's length.
        warmup_steps: steps of linear warm-up.
        min_ratio: r, final over peak learning rate.
    """

    total_steps: int
    warmup_steps: int = 0
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise ValueError(f"scheduler.total_steps={self.total_steps}: at least 1 (it follows trainer.max_steps)")
        if not self.warmup_steps >= 0:
            raise ValueError(f"scheduler.warmup_steps={self.warmup_steps}: at least 0")
        if self.warmup_steps >= self.total_steps > 1:
            warnings.warn(
                f"scheduler.warmup_steps={self.warmup_steps}, of {self.total_steps} steps in all: "
                "the learning rate never reaches its peak",
                stacklevel=2,
            )
        if not 0 <= self.min_ratio <= 1:
            raise ValueError(f"scheduler.min_ratio={self.min_ratio}: a share in 0..1")

    def __call__(self, step: int) -> float:
        """Factor on the peak learning rate at 0-based optimizer step ``step``."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        length = self.total_steps - self.warmup_steps
        return self.after_warmup(min((step - self.warmup_steps) / length, 1.0) if length > 0 else 1.0)

    def after_warmup(self, progress: float) -> float:
        """Factor at ``progress`` in 0..1 between the end of warm-up and the last step."""
        raise TypeError("Schedule is abstract; use Cosine, Linear, Constant or WSD")


class Cosine(Schedule):
    """Half a cosine from 1 to ``min_ratio``."""

    config_name = "cosine"

    def after_warmup(self, progress: float) -> float:
        """See ``Schedule.after_warmup``."""
        return self.min_ratio + 0.5 * (1 - self.min_ratio) * (1 + math.cos(math.pi * progress))


class Linear(Schedule):
    """A straight line from 1 to ``min_ratio``."""

    config_name = "linear_decay"

    def after_warmup(self, progress: float) -> float:
        """See ``Schedule.after_warmup``."""
        return 1 - (1 - self.min_ratio) * progress


class Constant(Schedule):
    """The peak rate after warm-up."""

    config_name = "constant"

    def after_warmup(self, progress: float) -> float:
        """See ``Schedule.after_warmup``."""
        return 1.0


@dataclass(frozen=True)
class WSD(Schedule):
    """Warm-up, stable, decay (Hu et al. 2024), with the official trainer's harmonic decay.

    Args:
        decay_share: share of all steps over which the rate falls to ``min_ratio``; ``min_ratio`` must be positive.
    """

    config_name = "wsd"

    min_ratio: float = 0.01
    decay_share: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"scheduler.decay_share={self.decay_share}: a share in (0, 1]")
        if self.min_ratio <= 0:
            raise ValueError(f"scheduler.min_ratio={self.min_ratio}: the harmonic decay of wsd needs a positive one")

    def after_warmup(self, progress: float) -> float:
        """See ``Schedule.after_warmup``."""
        step = self.warmup_steps + progress * (self.total_steps - self.warmup_steps)
        decay = max(0.0, (step - (1 - self.decay_share) * self.total_steps) / (self.decay_share * self.total_steps))
        return 1 / (decay / self.min_ratio + (1 - decay))
