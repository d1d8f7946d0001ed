import math

import numpy as np
import pytest

from src.support.permutation import inverse_permute, inverse_permute_array, permute, permute_array

WORD = 2**64 - 1
EDGES = sorted({1, 2, 3, 5, 6, 7, 1000, *(2**b + d for b in (2, 4, 6, 8, 9, 10, 11, 12, 16) for d in (-1, 0, 1))})


def splitmix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & WORD
    return x ^ x >> 31


def reference(index: int, n: int, key: tuple[int, ...]) -> int:
    """The definition in plain Python integers."""
    folded = 0
    for part in key:
        folded = splitmix(splitmix(folded + 0x9E3779B97F4A7C15 & WORD) ^ (part & WORD))
    half = next(h for h in range(4, 32) if 4**h >= n)
    x = index
    while True:
        left, right = x >> half, x % 2**half
        for r in range(1, 9):
            left, right = right, left ^ splitmix(right ^ splitmix(folded + r * 0x9E3779B97F4A7C15 & WORD)) % 2**half
        x = left << half | right
        if x < n:
            return x


@pytest.mark.parametrize("n", EDGES)
def test_bijection(n):
    images = permute_array(np.arange(n), n, (1, 2))
    assert images.dtype == np.int64
    assert np.array_equal(np.sort(images), np.arange(n))
    assert np.array_equal(inverse_permute_array(images, n, (1, 2)), np.arange(n))
    assert np.array_equal(permute_array(inverse_permute_array(np.arange(n), n, (1, 2)), n, (1, 2)), np.arange(n))


@pytest.mark.parametrize("n", [1, 3, 100, 256, 257, 10**6, 2**31 + 1, 2**40, 2**61 + 1, 2**62 - 1, 2**62])
def test_agrees_with_the_definition(n):
    for index in {0, 1 % n, n // 3, n - 1}:
        for key in [(0,), (42, 7), (-1,), (2**64 - 1, -(2**63))]:
            image = permute(index, n, key)
            assert image == reference(index, n, key)
            assert inverse_permute(image, n, key) == index


def test_golden_values():
    """These decide which data every run sees: a change here makes all earlier runs impossible to repeat."""
    assert permute_array(np.arange(10), 10, (42, 0)).tolist() == [7, 1, 0, 6, 9, 2, 8, 4, 5, 3]
    assert permute_array(np.arange(5), 1000, (42, 1)).tolist() == [952, 619, 178, 861, 67]
    assert [permute(i, 10**6, 2**64 - 1) for i in range(3)] == [978871, 307758, 810554]
    large = [3131853813911710327, 2793130428499279378, 1942066667047370239]
    assert [permute(i, 2**62, -7) for i in (0, 1, 2**62 - 1)] == large


def test_keys_select_different_permutations():
    n = 1000
    keys = [0, 1, -1, 2**63, (0, 0), (0, 1), (1, 0), (0, 0, 0), (1, 2), (2, 1), (1, 2, 0)]
    images = [permute_array(np.arange(n), n, key) for key in keys]
    for i, image in enumerate(images):
        for other in images[:i]:
            assert np.count_nonzero(image == other) < 10  # unrelated permutations agree at one place on average
    assert np.array_equal(permute_array(np.arange(n), n, 5), permute_array(np.arange(n), n, (5,)))


@pytest.mark.parametrize("n", [2, 3, 5, 17, 64, 100])
def test_position_is_uniform_over_keys(n):
    keys = 200 * n
    for index in (0, n - 1):
        counts = np.bincount([permute(index, n, (key, 3)) for key in range(keys)], minlength=n)
        statistic = ((counts - 200) ** 2 / 200).sum()
        assert statistic < n - 1 + 5 * math.sqrt(2 * (n - 1)) + 5


@pytest.mark.parametrize("n", [3, 4, 5])
def test_every_order_of_few_items_is_equally_likely(n):
    keys, orders = 100 * math.factorial(n), math.factorial(n)
    images = np.stack([permute_array(np.arange(n), n, key) for key in range(keys)])
    seen, counts = np.unique(images, axis=0, return_counts=True)
    assert len(seen) == orders
    assert ((counts - 100) ** 2 / 100).sum() < orders - 1 + 5 * math.sqrt(2 * (orders - 1))


def test_neighbours_do_not_stay_neighbours():
    images = permute_array(np.arange(10_000), 10_000, 0)
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(images, np.arange(10_000))[0, 1]) < 0.05


def test_shapes_and_integer_types():
    indices = np.arange(12, dtype=np.uint16).reshape(3, 4)
    assert np.array_equal(permute_array(indices, 12, 1).ravel(), permute_array(np.arange(12), 12, 1))
    assert permute_array(np.array([], dtype=np.int64), 5, 0).shape == (0,)
    assert permute_array(indices[:, ::2], 12, 1).shape == (3, 2)
    assert permute(np.int32(3), 12, (np.int64(1),)) == permute(3, 12, 1)


def test_input_is_left_alone():
    indices = np.arange(5)
    permute_array(indices, 5, 0)
    assert np.array_equal(indices, np.arange(5))


@pytest.mark.parametrize("n", [0, -3, 2**62 + 1])
def test_impossible_size(n):
    with pytest.raises(ValueError, match="from 1 to 2"):
        permute(0, n, 0)


@pytest.mark.parametrize("index", [-1, 7, 100])
def test_index_outside(index):
    with pytest.raises(IndexError, match=r"range\(7\)"):
        permute(index, 7, 0)


def test_key_too_wide():
    with pytest.raises(ValueError, match="64 bits"):
        permute(0, 7, 2**64)


def test_indices_must_be_integers():
    with pytest.raises(TypeError, match="float64"):
        permute_array(np.array([0.5]), 7, 0)
