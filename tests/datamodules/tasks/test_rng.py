import numpy as np
import pytest
from scipy import stats

from src.datamodules.tasks.rng import below, next_word, seed_stream, shuffle, stream_key, uniform


def stream(index=0, key="test"):
    state = np.empty(2, dtype=np.uint64)
    seed_stream(state, stream_key(key), index)
    return state


def test_first_words_never_change():
    state = stream()
    assert [int(next_word(state)) for _ in range(2)] == FIRST_WORDS


FIRST_WORDS = [8416520648801833695, 11170465621669889008]


@pytest.mark.parametrize("n", [1, 2, 3, 23, 375])
def test_below_is_uniform(n):
    state = stream(n)
    counts = np.bincount([below(state, n) for _ in range(40 * n + 2000)], minlength=n)
    assert len(counts) == n
    assert n == 1 or stats.chisquare(counts).pvalue > 1e-4


def test_uniform_is_uniform_across_neighbouring_streams():
    draws = np.array([uniform(stream(i)) for i in range(20_000)])
    assert stats.kstest(draws, "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.03


def test_all_orders_are_equally_likely():
    state, counts = stream(), {}
    for _ in range(24 * 400):
        items = np.arange(4)
        shuffle(state, items)
        counts[tuple(items)] = counts.get(tuple(items), 0) + 1
    assert len(counts) == 24
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4
