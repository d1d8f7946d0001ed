"""Numbers and statements as people read them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from src.evaluation.names import lower_is_better
from src.reporting.results import CONFIRMED, CONTRADICTED, INCONCLUSIVE, SweepResults, Verdict

NOTHING = "–"
MEAN = "mean over seeds at the best learning rate"
BEST = "best over learning rates (the paper's measure)"
MARKS = {CONFIRMED: "✓", CONTRADICTED: "✕", INCONCLUSIVE: "≈"}
TONES = {CONFIRMED: "good", CONTRADICTED: "bad"}  # everything else is "unsure"


def known(value: Any) -> bool:
    """Whether there is a finite number."""
    return value is not None and not isinstance(value, str) and math.isfinite(value)


def number(value: Any, signed: bool = False, like: Any = None) -> str:
    """Three decimals, or two digits of what is smaller than they show; a dash for what is not known.

    Args:
        value: any number, or None.
        signed: with a + as well.
        like: another number, beside which it stands: the larger one decides about decimals.
    """
    if not known(value):
        return NOTHING
    sign, size = "+" if signed else "", max(abs(value), abs(like) if known(like) else 0.0)
    if size >= 1000:
        text = f"{value:{sign},.0f}"
    elif size >= 0.01 or size < 1e-12:
        text = f"{value:{sign}.3f}"
    else:
        text = f"{value:{sign}.2g}"
    return text.replace("-", "−", 1) if text[0] == "-" else text


def scored(value: Any, metric: str, signed: bool = False) -> str:
    """A value of a metric: accuracies have three decimals however small they are."""
    return number(value, signed, like=1.0 if "accuracy" in metric else None)


def interval(low: Any, high: Any, signed: bool = False) -> str:
    """Such as [0.912, 0.987]."""
    if not known(low) or not known(high):
        return "no interval"
    return f"[{number(low, signed, high)}, {number(high, signed, low)}]"


def half_interval(low: Any, high: Any) -> float | None:
    """What stands behind ±."""
    return (high - low) / 2 if known(low) and known(high) else None


def compact(value: Any, unit: str = "") -> str:
    """Three digits and a prefix: 17.7k, 1.30M, 54.4G."""
    if not known(value):
        return NOTHING
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power * 0.9995:
            return f"{_three_digits(value / 10**power)}{' ' if unit else ''}{prefix}{unit}"
    return f"{_three_digits(value)}{' ' + unit if unit else ''}"


def rate(value: Any) -> str:
    """A learning rate: 0.002, 3e-05."""
    return f"{value:g}" if known(value) else NOTHING


def p_value(value: Any) -> str:
    """Such as 0.25 or 0.0313."""
    return NOTHING if not known(value) else f"{value:.3g}"


def short_settings(others: Mapping[str, Any]) -> str:
    """Settings of a cell with the last word of their keys, as in N=12, size=8L512D."""
    names = [key.rpartition(".")[2] for key in others]
    keys = list(others) if len(set(names)) < len(names) else names
    return ", ".join(
        f"{key}={value if isinstance(value, str | int | float) else json.dumps(value)}"
        for key, value in zip(keys, others.values(), strict=True)
    )


def row_name(task: str, setting: str) -> str:
    """Of a row of the heat map."""
    return f"{task} · {setting}" if setting else task


def metric_words(metric: str) -> str:
    """Such as accuracy, bits per byte, accuracy at hop4; validation is named, the test set is understood."""
    split, _, name = metric.partition("/")
    words = name.replace("/", " at ").replace("_", " ")
    return {"test": words, "val": f"validation {words}", "train": f"training {words}"}.get(split, metric)


def identity(sweep: SweepResults) -> str:
    """Name and scale in one word, as in results/R3/smoke."""
    return "/".join(part for part in (sweep.name, sweep.plan["scale"]) if part)


def title(sweep: SweepResults) -> str:
    """The name of a sweep and its scale."""
    scale = sweep.plan["scale"]
    return f"{sweep.name} at scale {scale}" if scale else sweep.name


def in_words(verdict: Verdict) -> str:
    """What a statement claims, as a sentence."""
    said, metric = verdict.statement, metric_words(verdict.metric)
    where, by = f"on {verdict.task} ({metric})", said.by
    if lower_is_better(verdict.metric):
        claim = (
            f"lower by at least {by:g} than"
            if by > 0
            else f"higher by at most {-by:g} than"
            if by < 0
            else "no higher than"
        )
        return f"{said.better} is {claim} {said.than} {where}."
    claim = f"at least {by:g} more than" if by > 0 else f"at most {-by:g} less than" if by < 0 else "no less than"
    return f"{said.better} scores {claim} {said.than} {where}."


def smallest_p(seeds: int) -> float:
    """Below which the sign-flip test cannot come with so many seeds."""
    return min(1.0, 2.0 / 2**seeds)


def _three_digits(value: float) -> str:
    if value == int(value) and abs(value) < 1000:
        return str(int(value))
    size = abs(value)
    return f"{value:.0f}" if size >= 99.95 else f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"
