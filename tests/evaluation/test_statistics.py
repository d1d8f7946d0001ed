import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from src.evaluation.statistics import intervals, wilson_interval


@given(st.integers(1, 5000), st.data(), st.sampled_from([0.8, 0.95, 0.99]))
def test_agrees_with_scipy(total, data, confidence):
    right = data.draw(st.integers(0, total))
    expected = binomtest(right, total).proportion_ci(confidence, method="wilson")
    assert wilson_interval(right, total, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("p", [0.02, 0.3, 0.9])
def test_covers_the_truth_about_as_often_as_it_says(p):
    n = 200
    covered = [low <= p <= high for low, high in (wilson_interval(k, n) for k in range(n + 1))]
    assert 0.93 < (binom.pmf(np.arange(n + 1), n, p) * covered).sum() < 0.975


@pytest.mark.parametrize(("right", "total", "confidence"), [(1, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)])
def test_nonsense_is_refused(right, total, confidence):
    with pytest.raises(ValueError, match="no interval"):
        wilson_interval(right, total, confidence)


def test_intervals_keep_the_counts():
    found = intervals({"test/accuracy": (3, 4)})["test/accuracy"]
    assert (found["right"], found["total"]) == (3, 4)
    assert found["low"] < 0.75 < found["high"]
