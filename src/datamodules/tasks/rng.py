"""Random numbers that are a pure function of a key: every example has a stream of its own.

SplitMix64 (Steele, Lea & Flood 2014): output j of a stream is  mix(start + j * gamma).  Start *and* gamma come from the
example's key, so that two streams are not shifted copies of each other. Nothing here has state outside the two-word array
that the caller passes along, hence the same numbers in any process, on any worker, in any order.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numba import njit

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_ONE, _27, _30, _31, _32 = (np.uint64(n) for n in (1, 27, 30, 31, 32))
_LOW = np.uint64(0xFFFFFFFF)


def stream_key(*parts: object) -> np.uint64:
    """A 64-bit key for anything that prints, such as (task name, seed, split)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


@njit(cache=True)
def mix(z):
    """SplitMix64's finaliser: a bijection of 64-bit words whose output bits all depend on all input bits."""
    z = (z ^ (z >> _30)) * _MIX_1
    z = (z ^ (z >> _27)) * _MIX_2
    return z ^ (z >> _31)


@njit(cache=True)
def seed_stream(stream, key, index):
    """Points ``stream`` (uint64 [2]) at the first number of example ``index`` under ``key``."""
    stream[0] = mix(key + np.uint64(index) * _GOLDEN)
    stream[1] = mix(stream[0] ^ _GOLDEN) | _ONE


@njit(cache=True)
def next_word(stream):
    """The next 64 random bits."""
    stream[0] += stream[1]
    return mix(stream[0])


@njit(cache=True)
def uniform(stream):
    """A float64 in [0, 1)."""
    return (next_word(stream) >> np.uint64(11)) * 2.0**-53


@njit(cache=True)
def below(stream, n):
    """An exactly uniform integer in 0..n-1 for 1 <= n < 2^32 (Lemire 2019)."""
    bound = np.uint64(n)
    product = (next_word(stream) >> _32) * bound
    if (product & _LOW) < bound:
        threshold = ((_ONE << _32) - bound) % bound
        while (product & _LOW) < threshold:
            product = (next_word(stream) >> _32) * bound
    return np.int64(product >> _32)


@njit(cache=True)
def shuffle(stream, items):
    """Shuffles a one-dimensional array in place (Fisher-Yates)."""
    for i in range(items.shape[0] - 1, 0, -1):
        j = below(stream, i + 1)
        items[i], items[j] = items[j], items[i]


@njit(cache=True)
def below_pair(stream, n, m):
    """Two independent, exactly uniform integers, in 0..n-1 and 0..m-1, 1 <= n, m < 2^32: one from each half of a random word."""
    n_bound, m_bound = np.uint64(n), np.uint64(m)
    word = next_word(stream)
    first, second = (word >> _32) * n_bound, (word & _LOW) * m_bound
    if (first & _LOW) < n_bound or (second & _LOW) < m_bound:
        n_uneven, m_uneven = (_ONE << _32) % n_bound, (_ONE << _32) % m_bound
        while (first & _LOW) < n_uneven or (second & _LOW) < m_uneven:
            word = next_word(stream)
            first, second = (word >> _32) * n_bound, (word & _LOW) * m_bound
    return np.int64(first >> _32), np.int64(second >> _32)
