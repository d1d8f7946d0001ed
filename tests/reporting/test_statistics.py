import math
from collections import Counter
from itertools import chain, combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from src.reporting.statistics import (
    Interval,
    bootstrap_interval,
    difference,
    holm,
    sign_flip_test,
    student_interval,
)

NOWHERE = (-math.inf, math.inf)
numbers = st.floats(-1e3, 1e3, allow_nan=False, allow_infinity=False).map(lambda x: round(x, 3))


def lists(low, high):
    return st.lists(numbers, min_size=low, max_size=high)


def close(expected):
    return pytest.approx(expected, rel=1e-9, abs=1e-9)


# Student's interval


@given(lists(2, 12), st.sampled_from([0.8, 0.95, 0.99]))
def test_student_agrees_with_scipy(values, confidence):
    if len(set(values)) == 1:
        assert student_interval(values, confidence) == (values[0], values[0])
        return
    expected = stats.t.interval(confidence, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert student_interval(values, confidence) == close(expected)


def test_student_of_three_by_hand():
    """1, 2, 3: mean 2, deviation 1, and t = 4.302653 with two degrees of freedom."""
    low, high = student_interval([1, 2, 3])
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), abs=1e-6)


def test_student_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    runs = rng.normal(0.3, 2.0, size=(4000, 3))
    covered = np.mean([low <= 0.3 <= high for low, high in map(student_interval, runs)])
    assert covered == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors


def test_one_run_says_nothing_and_equal_runs_have_no_width():
    assert student_interval([0.7]) == bootstrap_interval([0.7]) == NOWHERE
    assert sign_flip_test([0.7]) == 1.0
    assert student_interval([0.1] * 3) == (0.1, 0.1)  # whose computed deviation is 1e-17
    assert bootstrap_interval([0.1] * 3) == close((0.1, 0.1))


# Bootstrap


def brute_force(values, clusters, confidence):
    """All n^n ordered choices of clusters, each as likely as another."""
    groups = [[v for v, c in zip(values, clusters, strict=True) if c == name] for name in sorted(set(clusters))]
    means = sorted(np.mean([*chain(*choice)]) for choice in product(groups, repeat=len(groups)))
    least = (1 - confidence) / 2 * len(means)
    needed = math.ceil(least - 1e-6)  # how many means the tail holds at least
    return means[max(needed, 1) - 1], means[-max(needed, 1)]


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(3, 4), st.sampled_from([0.5, 0.8, 0.9, 0.95]))
def test_exact_bootstrap_is_all_ordered_resamples(data, n, confidence):
    values = data.draw(lists(n, n))
    assert bootstrap_interval(values, confidence=confidence) == close(brute_force(values, range(n), confidence))


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(3, 4), st.sampled_from([0.5, 0.8, 0.95]))
def test_clusters_are_resampled_whole_even_if_unequal(data, n, confidence):
    clusters = list(range(n)) + data.draw(st.lists(st.integers(0, n - 1), max_size=6))
    values = data.draw(lists(len(clusters), len(clusters)))
    found = bootstrap_interval(values, clusters, confidence)
    assert found == close(brute_force(values, clusters, confidence))


def test_bootstrap_of_three_is_their_range_and_misses_the_median_of_a_quarter():
    assert bootstrap_interval([0.3, -0.1, 0.2]) == close((-0.1, 0.3))
    runs = np.random.default_rng(2).normal(size=(2000, 3))
    covered = np.mean([low <= 0 <= high for low, high in map(bootstrap_interval, runs)])
    assert covered == pytest.approx(0.75, abs=0.035)


def test_where_the_distribution_steps_the_wider_end_is_taken():
    """0 with probability 1/4, 0.5 with 1/2, 1 with 1/4: half of it lies within (0.5, 0.5) as well."""
    assert bootstrap_interval([0, 1], confidence=0.5) == (0.0, 1.0)
    assert bootstrap_interval([0, 1], confidence=0.51) == (0.0, 1.0)
    assert bootstrap_interval([0, 1], confidence=0.49) == (0.5, 0.5)


@pytest.mark.parametrize("n", [9, 10, 40])
def test_bootstrap_agrees_with_scipy(n):
    """Nine are enumerated, ten are drawn; scipy draws."""
    values = np.random.default_rng(n).exponential(size=n)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert bootstrap_interval(values) == pytest.approx(expected, abs=0.03 * (expected.high - expected.low))


def test_clusters_that_agree_within_are_as_many_values_as_clusters():
    values = np.random.default_rng(3).normal(size=12)
    for n in (5, 12):  # enumerated, drawn
        seeds = np.repeat(np.arange(n), 4).tolist()
        found = bootstrap_interval(np.repeat(values[:n], 4), seeds)
        assert found == close(bootstrap_interval(values[:n]))
    # Taken for twenty runs they would look twice as sure.
    alone, as_twenty = (
        bootstrap_interval(np.repeat(values[:5], 4), c) for c in (np.repeat(np.arange(5), 4).tolist(), None)
    )
    assert as_twenty.high - as_twenty.low < 0.75 * (alone.high - alone.low)


def test_one_cluster_says_nothing():
    assert bootstrap_interval([1.0, 2.0, 3.0], clusters=[7, 7, 7]) == NOWHERE


@pytest.mark.parametrize("n", [4, 14])
def test_order_names_and_scale_of_runs_do_not_matter(n):
    rng = np.random.default_rng(n)
    values, clusters = rng.normal(size=2 * n), [i // 2 for i in range(2 * n)]
    order = rng.permutation(2 * n)
    shuffled, names = values[order], [f"seed {100 - clusters[i]}" for i in order]
    assert bootstrap_interval(shuffled, names) == bootstrap_interval(values, clusters)
    assert bootstrap_interval(shuffled, names, seed=5) == pytest.approx(bootstrap_interval(values, clusters), abs=0.1)
    assert student_interval(shuffled) == close(student_interval(values))
    assert sign_flip_test(shuffled) == sign_flip_test(values)
    for function in (student_interval, bootstrap_interval):
        low, high = function(values)
        assert function(3 * values + 1) == close((3 * low + 1, 3 * high + 1))
    if n == 4:  # exact, so also the mirror image is
        low, high = bootstrap_interval(values, clusters)
        assert bootstrap_interval(-values, clusters) == close((-high, -low))


# Sign-flip test


@settings(max_examples=50, deadline=None)
@given(lists(2, 7))
def test_sign_flip_is_the_share_of_all_sign_choices(differences):
    observed = abs(sum(differences))
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in product((1, -1), repeat=len(differences))
    ]
    assert sign_flip_test(differences) == close(np.mean([s >= observed - 1e-9 for s in sums]))


@pytest.mark.parametrize("signs", ["+++++", "+++-+", "-+-++", "--+++-+", "+++++++++-"])
def test_sign_flip_of_ranks_is_wilcoxon(signs):
    differences = [rank if sign == "+" else -rank for rank, sign in enumerate(signs, 1)]
    assert sign_flip_test(differences) == close(stats.wilcoxon(differences, method="exact")[1])


def test_sign_flip_of_many_is_drawn_and_near_the_t_test():
    differences = np.random.default_rng(4).normal(0.4, 1, size=30)
    assert sign_flip_test(differences) == sign_flip_test(differences)
    assert sign_flip_test(differences) == pytest.approx(stats.ttest_1samp(differences, 0)[1], abs=0.01)


@pytest.mark.parametrize("n", [2, 3, 6, 13])
def test_smallest_p_value(n):
    assert sign_flip_test(np.linspace(5, 6, n)) == close(2 / 2**n)


# Holm


def test_holm_by_hand():
    """0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04 x 1 raised to the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == close([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == close([1.0, 1.0])
    assert holm([0.2]) == close([0.2])
    assert holm([]).shape == (0,)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closure_of_bonferroni(p):
    """An effect is called if every set of hypotheses around it is rejected by its own Bonferroni test (Marcus, Peritz & Gabriel 1976)."""
    everyone = range(len(p))
    sets = [s for size in range(1, len(p) + 1) for s in combinations(everyone, size)]
    expected = [max(min(1.0, len(s) * min(p[j] for j in s)) for s in sets if i in s) for i in everyone]
    assert holm(p) == close(expected)


@pytest.mark.parametrize("m", [1, 5, 40])
def test_holm_agrees_with_statsmodels(m):
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.random.default_rng(m).beta(0.3, 2, size=m).round(2)  # rounded, so that some are equal
    assert holm(p) == close(multitest.multipletests(p, method="holm")[1])


# Both together


def test_difference_of_paired_seeds():
    a, b = {1: 0.9, 2: 0.8, 3: 0.7, 4: 0.5}, {4: 0.5, 3: 0.5, 2: 0.4, 1: 0.3, 5: 0.1}
    found = difference(a, b)
    x, y = [a[k] for k in (1, 2, 3, 4)], [b[k] for k in (1, 2, 3, 4)]
    test = stats.ttest_rel(x, y)
    assert found.student == close(tuple(test.confidence_interval(0.95)))
    assert found.mean == close(0.3)
    assert (found.pairs, found.clusters, found.unpaired, found.wins) == (4, 4, 1, 3)
    assert found.p_value == close(0.25)  # four of sixteen: the sign of 0 does not matter
    assert found.bootstrap == close(brute_force(np.subtract(x, y).tolist(), range(4), 0.95))
    assert isinstance(found.student, Interval)


def test_difference_turns_around_with_its_sides():
    rng = np.random.default_rng(6)
    a, b = ({(s, lr): float(rng.normal()) for s in range(4) for lr in (1e-3, 3e-3)} for _ in range(2))
    found, back = difference(a, b), difference(b, a)
    assert back.mean == close(-found.mean)
    assert back.student == close((-found.student.high, -found.student.low))
    assert back.bootstrap == close((-found.bootstrap.high, -found.bootstrap.low))
    assert back.p_value == found.p_value
    assert back.wins + found.wins == found.pairs == 8


def test_learning_rates_are_no_seeds():
    """Copies of a run at other learning rates may not make anyone surer."""
    gains = {0: 0.1, 1: 0.2, 2: 0.4}
    once = difference(gains, dict.fromkeys(gains, 0.0))
    copies = {(seed, lr): gain for seed, gain in gains.items() for lr in (1, 2, 3, 4)}
    many = difference(copies, dict.fromkeys(copies, 0.0))
    assert (many.pairs, many.clusters, once.clusters) == (12, 3, 3)
    assert many.student == close(once.student)
    assert many.bootstrap == close(once.bootstrap)
    assert many.p_value == once.p_value == close(0.25)


def test_seeds_with_unequally_many_learning_rates():
    a = {(0, 1): 1.0, (0, 2): 3.0, (1, 1): 8.0, (2, 1): 4.0}
    found = difference(a, dict.fromkeys(a, 0.0))
    assert found.mean == close(4.0)
    assert found.student == close(student_interval([2.0, 8.0, 4.0]))
    assert found.bootstrap == close(brute_force([1.0, 3.0, 8.0, 4.0], [0, 0, 1, 2], 0.95))


def test_no_effect_is_rarely_called_one():
    """Six seeds and three learning rates whose noise is the seed's: the test must not count eighteen."""
    rng = np.random.default_rng(7)
    called = Counter()
    for _ in range(300):
        noise = rng.normal(size=6)
        a = {(seed, lr): noise[seed] + 0.1 * rng.normal() for seed in range(6) for lr in range(3)}
        found = difference(a, dict.fromkeys(a, 0.0))
        called["p"] += found.p_value <= 0.05
        called["t"] += not found.student.low <= 0 <= found.student.high
    assert called["p"] / 300 == pytest.approx(2 / 64, abs=0.035)
    assert called["t"] / 300 == pytest.approx(0.05, abs=0.044)


# Nonsense


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf], [[1.0, 2.0]]])
def test_no_numbers_are_refused(values):
    for function in (student_interval, bootstrap_interval, sign_flip_test):
        with pytest.raises(ValueError, match="all finite"):
            function(values)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, math.nan])
def test_confidence_out_of_range(confidence):
    for function in (student_interval, bootstrap_interval):
        with pytest.raises(ValueError, match="confidence="):
            function([1.0, 2.0], confidence=confidence)


def test_other_nonsense_is_refused():
    with pytest.raises(ValueError, match="clusters has 2 entries for 3 values"):
        bootstrap_interval([1, 2, 3], clusters=[1, 2])
    for p in ([0.5, 1.2], [math.nan], 0.5):
        with pytest.raises(ValueError, match="from 0 to 1"):
            holm(p)
    with pytest.raises(ValueError, match=r"a has 1, 2 and b has \(1, 0.1\)"):
        difference({1: 0.5, 2: 0.5}, {(1, 0.1): 0.5})
    with pytest.raises(ValueError, match="none"):
        difference({}, {1: 0.5})
    with pytest.raises(ValueError, match=r"b\[2\]=nan"):
        difference({1: 0.5, 2: 0.5}, {1: 0.5, 2: math.nan})
    assert difference({1: 0.5, 2: math.nan}, {1: 0.25}).mean == 0.25  # a run without a partner is not looked at
