"""What a metric's name says about it."""

from __future__ import annotations


def lower_is_better(metric: str) -> bool:
    """Whether a metric, by its name, is a loss."""
    last = metric.rpartition("/")[2]
    return last in ("loss", "bits_per_byte", "kl", "perplexity", "leaked") or last.endswith(("_loss", "_nats"))
