"""How sure a measured share is."""

from __future__ import annotations

import math
from statistics import NormalDist


def wilson_interval(right: float, total: float, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927): the p for which ``right`` out of ``total`` is not surprising.

        (p - right/total)^2 <= z^2 p (1 - p) / total

    Unlike mean +- z * standard error it is sensible for 0 and for ``total`` right answers, where models often are.

    Raises:
        ValueError: unless 0 <= right <= total, total > 0 and 0 < confidence < 1.
    """
    if not 0 <= right <= total or total <= 0 or not 0 < confidence < 1:
        raise ValueError(f"no interval for {right} of {total} at confidence {confidence}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, squared = right / total, z * z / total
    centre = (share + squared / 2) / (1 + squared)
    half = z * math.sqrt(share * (1 - share) / total + squared / (4 * total)) / (1 + squared)
    # Exactly 0 and 1 at the ends, where rounding would leave 1e-17.
    return (0.0 if right == 0 else centre - half), (1.0 if right == total else centre + half)


def intervals(counts: dict[str, tuple[int, int]]) -> dict[str, dict[str, float]]:
    """For each metric, from its right and total answers: these, and the 95% Wilson interval."""
    found = {}
    for name, (right, total) in counts.items():
        low, high = wilson_interval(right, total)
        found[name] = {"right": right, "total": total, "low": low, "high": high}
    return found
