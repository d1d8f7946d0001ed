"""How sure a measured difference between two architectures is, from the few runs that there are.

Three seeds are typical, and no arithmetic makes much of three numbers. So everything here errs on the side of "not sure":

- What counts as one observation is a seed. Runs that share a seed (the same data and initial weights at several learning rates) are not
  independent of each other: they are averaged, or resampled together, never counted as if they were more seeds.
- Student's t interval is the one to report. At three seeds it is wide (4.3 standard errors to each side), and it should be: if the
  differences are normal, it covers what it says.
- The percentile bootstrap assumes nothing about the shape but is too narrow for few seeds: with three, the 95% interval is the range of the
  three differences, which misses the median over all seeds in a quarter of all experiments.
- The sign-flip test assumes only that without an effect a difference is as likely as its negative. With n seeds its p-value cannot be below
  2 / 2^n: 0.25 for three, 0.063 for five, 0.031 for six. Three seeds cannot be significant in this sense, whatever the difference.
- Many comparisons in one table need ``holm``.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

MOST_RESAMPLES = 50_000  # up to which all resamples are enumerated: nine clusters are 24,310, ten 92,378
DRAWS = 10_000  # of Monte Carlo beyond that; of the sign-flip test from 14 differences on, as 2^13 < 10,000 < 2^14


class Interval(NamedTuple):
    """What lies between ``low`` and ``high``; infinite on both sides where nothing can be said."""

    low: float
    high: float


NOTHING_KNOWN = Interval(-math.inf, math.inf)


def student_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Student's interval of a mean ("Student" 1908): mean +- t s / sqrt(n), t with n - 1 degrees of freedom.

    Exact for independent normal values. Equal values give an interval of no width: this says that these runs did not differ, not
    that others would not (scores that are all 1.0 are the usual case).

    Args:
        values: ``[n]`` finite numbers, one of each independent run, in any unit.
        confidence: probability with which such intervals hold the true mean.

    Returns:
        The interval, in the unit of the values; (-inf, inf) for a single value.

    Raises:
        ValueError: for no values, values that are not finite, or a confidence outside (0, 1).
    """
    x = _numbers(values)
    _check_confidence(confidence)
    if len(x) == 1:
        return NOTHING_KNOWN
    if np.all(x == x[0]):  # the computed deviation of equal numbers is rounding error
        return Interval(float(x[0]), float(x[0]))
    half = float(stdtrit(len(x) - 1, (1 + confidence) / 2)) * float(x.std(ddof=1)) / math.sqrt(len(x))
    mean = math.fsum(x) / len(x)
    return Interval(mean - half, mean + half)


def bootstrap_interval(
    values: ArrayLike, clusters: Sequence[Hashable] | None = None, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile bootstrap of the mean (Efron 1979), of whole clusters where runs share something (Field & Welsh 2007).

    As many clusters as there are, are drawn with replacement; the mean is that of all values in them. Up to nine clusters, every
    resample is enumerated with its probability, n! / (c_1! ... c_n!) / n^n for one that holds cluster i c_i times; beyond that
    10,000 are drawn. Where the bootstrap distribution steps across a limit, the wider end is taken.

    Too narrow for few clusters, see the head of this file: an addition to ``student_interval``, no replacement.

    Args:
        values: ``[n]`` finite numbers, in any unit.
        clusters: ``[n]`` what each value belongs to, such as its seed; None: each to itself.
        confidence: share of the bootstrap distribution inside the interval.
        seed: of the draws; the order of values and the names of clusters do not matter.

    Returns:
        The interval, in the unit of the values; (-inf, inf) for a single cluster.

    Raises:
        ValueError: for no values, values that are not finite, another number of clusters than of values, or a confidence
            outside (0, 1).
    """
    x = _numbers(values)
    _check_confidence(confidence)
    names = list(range(len(x)) if clusters is None else clusters)
    if len(names) != len(x):
        raise ValueError(f"clusters has {len(names)} entries for {len(x)} values: one of each value")
    # Sorted, so that the same draws meet the same clusters in whichever order the runs were read; exact sums for the same reason.
    totals = sorted((math.fsum(group), len(group)) for group in _grouped(names, x).values())
    n = len(totals)
    if n == 1:
        return NOTHING_KNOWN
    sums, sizes = (np.array(column, dtype=float) for column in zip(*totals, strict=True))
    if math.comb(2 * n - 1, n) <= MOST_RESAMPLES:
        counts, weights = _all_resamples(n)
        means = (counts @ sums) / (counts @ sizes)
    else:
        rng = np.random.default_rng(seed)
        pieces = [rng.multinomial(n, np.full(n, 1 / n), size=100) for _ in range(DRAWS // 100)]  # spares memory
        means, weights = np.concatenate([(c @ sums) / (c @ sizes) for c in pieces]), np.ones(DRAWS)
    tail = (1 - confidence) / 2
    return Interval(_lower_quantile(means, weights, tail), -_lower_quantile(-means, weights, tail))


def sign_flip_test(differences: ArrayLike) -> float:
    """Two-sided paired permutation test of "a difference is as likely as its negative" (Fisher 1935), on the mean.

    All 2^n choices of signs up to n = 13, beyond that 10,000 drawn from a fixed seed. Never below 2 / 2^n, so from few pairs
    never small; the head of this file has the numbers.

    Args:
        differences: ``[n]`` finite numbers, one of each independent pair of runs.

    Returns:
        The p-value: the share of sign choices whose mean is at least as far from 0; 1 for a single pair.

    Raises:
        ValueError: for no differences, or differences that are not finite.
    """
    x = _numbers(differences)
    if len(x) == 1:
        return 1.0
    from scipy.stats import permutation_test  # half a second and 50 MB, for reports that compare something

    # In sorted order the drawn signs meet the same differences in whichever order the runs were read.
    found = permutation_test(
        (np.sort(x),),
        lambda sample, axis: np.mean(sample, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=DRAWS,
        batch=1000,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """P-values adjusted for being several (Holm 1979): with those up to 0.05 called effects, the chance of even one false call is 5%.

    The i-th smallest of m is multiplied by m - i + 1, and none may be below a smaller one's. Holds whatever the dependence
    between the tests.

    Args:
        p_values: ``[m]`` numbers from 0 to 1.

    Returns:
        ``[m]``, in the order given.

    Raises:
        ValueError: for anything that is no list of probabilities.
    """
    p = np.asarray(p_values, dtype=float)
    if p.ndim != 1 or not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"p_values={p_values!r}: a list of numbers from 0 to 1")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted


@dataclass(frozen=True)
class Difference:
    """How much higher ``a`` scored than ``b``, over the runs that both have."""

    mean: float  # over pairs
    pairs: int
    clusters: int  # independent ones among them: seeds
    unpaired: int  # scores left out because the other side has none of that key
    student: Interval  # of the mean over seeds
    bootstrap: Interval  # of the mean over pairs, whole seeds resampled
    p_value: float  # sign-flip test over seeds
    wins: int  # pairs where a is strictly higher


def difference(a: Mapping[Any, float], b: Mapping[Any, float], confidence: float = 0.95) -> Difference:
    """Compares two architectures run by run: same seed (and learning rate), one score each.

    For keys that are tuples the first entry, the seed, is the cluster: ``student`` and ``p_value`` see one number per seed, the mean of
    its differences, however many learning rates it has. Where seeds have unequally many, ``student`` is around the mean of
    the seeds' means, in which each seed counts alike, and ``mean`` and ``bootstrap`` are about pairs.

    Args:
        a: scores by pair key, which is a seed or a tuple such as (seed, learning_rate).
        b: likewise. Keys that only one of both has are left out, and counted in ``unpaired``.
        confidence: of the two intervals.

    Returns:
        The difference a - b, in the unit of the scores.

    Raises:
        ValueError: when no key is common, a common score is not finite, or for a confidence outside (0, 1).
    """
    keys = [key for key in a if key in b]
    if not keys:
        raise ValueError(f"no pair: a has {_some(a)} and b has {_some(b)}; they must have keys in common")
    for side, scores in (("a", a), ("b", b)):
        for key in keys:
            if not math.isfinite(scores[key]):
                raise ValueError(f"{side}[{key!r}]={scores[key]}: scores must be finite; leave out runs that failed")
    pairs = [float(a[key]) - float(b[key]) for key in keys]
    seeds = [key[0] if isinstance(key, tuple) and key else key for key in keys]
    by_seed = [math.fsum(group) / len(group) for group in _grouped(seeds, pairs).values()]
    return Difference(
        mean=math.fsum(pairs) / len(pairs),
        pairs=len(pairs),
        clusters=len(by_seed),
        unpaired=len(a) + len(b) - 2 * len(keys),
        student=student_interval(by_seed, confidence),
        bootstrap=bootstrap_interval(pairs, seeds, confidence),
        p_value=sign_flip_test(by_seed),
        wins=sum(a[key] > b[key] for key in keys),
    )


def _numbers(values: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or len(x) == 0 or not np.isfinite(x).all():
        raise ValueError(f"values={values!r}: a list of at least one number, all finite")
    return x


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: between 0 and 1, such as 0.95")


def _grouped(names: Sequence[Hashable], values: ArrayLike) -> dict[Hashable, list[float]]:
    groups: dict[Hashable, list[float]] = {}
    for name, value in zip(names, np.asarray(values, dtype=float).tolist(), strict=True):
        groups.setdefault(name, []).append(value)
    return groups


@cache
def _all_resamples(n: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Every multiset of n out of n clusters: how often it holds each ``[R, n]``, and of how many of the n^n draws it comes ``[R]``."""
    chosen = np.array(list(combinations_with_replacement(range(n), n)))
    counts = (chosen[:, :, None] == np.arange(n)).sum(axis=1)
    factorials = np.array([math.factorial(i) for i in range(n + 1)])
    # Whole numbers below 2^53: sums of them are exact.
    return counts, (factorials[n] // factorials[counts].prod(axis=1)).astype(float)


def _lower_quantile(values: NDArray[np.float64], weights: NDArray[np.float64], tail: float) -> float:
    """The smallest value up to which lies a share ``tail`` of the weight; a share that is met but for rounding counts as met."""
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(reached, tail * reached[-1] * (1 - 1e-9))])


def _some(keys: Mapping[Any, float]) -> str:
    shown = ", ".join(repr(key) for key in list(keys)[:5])
    return (shown + (", ..." if len(keys) > 5 else "")) or "none"
