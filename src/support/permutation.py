"""Keyed pseudo-random permutations of range(n), evaluated one index at a time and never stored.

A shuffle of 10^10 windows must not need 80 GB of indices, and the window at position w must not depend on what was
read before it. So a shuffle is a function: a balanced Feistel network on 2h bits, the smallest even number from 8 up
that holds n - 1, walked along its cycle until it falls below n:

    (left, right) -> (right, left XOR F(right XOR key_r)),    r = 1..8,    F = low h bits of the splitmix64 finaliser
    permute(x)    =  E(x), E(E(x)), ...  the first of them that is < n

The network is a bijection for every F, and walking along cycles keeps it one on range(n). For n > 64 less than 3/4 of
the domain lies outside, so a walk takes fewer than 4 steps on average; for smaller n it takes 256 / n. (On 4 bits the
orders of 5 items would not be equally likely, however many rounds.) The round keys are the splitmix64 sequence that
starts at the folded key.

Sources: Luby & Rackoff 1988 (Feistel networks as permutations); Black & Rogaway 2002 (cycle walking); Steele, Lea &
Flood 2014 (splitmix64). The outputs decide which data a run sees: golden values pin them, and they must never change.
"""

import operator
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
from numba import njit

MAX_SIZE = 2**62
_ROUNDS = 8
_WORD = 2**64 - 1

Key = SupportsIndex | Sequence[SupportsIndex]


def permute(index: SupportsIndex, n: SupportsIndex, key: Key) -> int:
    """Return the image of `index` under the permutation of range(n) that `key` selects.

    `key` is an integer of at most 64 bits or a sequence of them, such as (seed, epoch); k and (k,) are the same key.
    Raises ValueError if n is not in 1..2^62 or the key does not fit, IndexError if `index` is not in range(n).
    """
    return int(permute_array(np.array([operator.index(index)], dtype=np.int64), n, key)[0])


def inverse_permute(index: SupportsIndex, n: SupportsIndex, key: Key) -> int:
    """Return the position that `permute` sends to `index`; arguments and errors as there."""
    return int(inverse_permute_array(np.array([operator.index(index)], dtype=np.int64), n, key)[0])


def permute_array(indices: np.ndarray, n: SupportsIndex, key: Key) -> np.ndarray:
    """Return `permute` of each entry of `indices`, an integer array of any shape, as int64 of the same shape."""
    return _apply(indices, n, key, inverse=False)


def inverse_permute_array(indices: np.ndarray, n: SupportsIndex, key: Key) -> np.ndarray:
    """Return `inverse_permute` of each entry of `indices`; shapes as for `permute_array`."""
    return _apply(indices, n, key, inverse=True)


def _apply(indices: np.ndarray, n: SupportsIndex, key: Key, inverse: bool) -> np.ndarray:
    size = operator.index(n)
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"cannot permute range({size}): its size must be from 1 to 2**62")
    indices = np.asarray(indices)
    if indices.size and not np.issubdtype(indices.dtype, np.integer):
        raise TypeError(f"indices must be integers, not {indices.dtype}")
    if indices.size and (indices.min() < 0 or indices.max() >= size):
        raise IndexError(f"indices from {indices.min()} to {indices.max()} are not all in range({size})")
    flat = np.ascontiguousarray(indices, dtype=np.int64).reshape(-1)
    out = np.empty_like(flat)
    _walk(flat, out, np.uint64(size), np.uint64(_fold(key)), inverse)
    return out.reshape(indices.shape)


def _fold(key: Key) -> int:
    """Reduce a key to 64 bits: every part passes the mixer, and their order and number matter."""
    folded = 0
    for part in key if isinstance(key, Sequence) else (key,):
        value = operator.index(part)
        if not -(2**63) <= value <= _WORD:
            raise ValueError(f"key part {value} does not fit in 64 bits")
        folded = int(_mix(np.uint64((folded + 0x9E3779B97F4A7C15) & _WORD))) ^ (value & _WORD)
        folded = int(_mix(np.uint64(folded)))
    return folded


@njit(cache=True)
def _mix(x):
    """Finalise like splitmix64: a bijection of 64-bit words; each input bit flips each output bit half the time."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(cache=True)
def _walk(indices, out, size, key, inverse):
    """Write the (inverse) permutation of `indices` to `out`. Everything is uint64: mixed signs would become floats."""
    half_bits = np.uint64(4)
    while np.uint64(1) << (half_bits + half_bits) < size:
        half_bits += np.uint64(1)
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    keys = np.empty(_ROUNDS, np.uint64)
    for r in range(_ROUNDS):
        keys[r] = _mix(key + np.uint64(r + 1) * np.uint64(0x9E3779B97F4A7C15))
    if inverse:  # a Feistel network run backwards is itself, with the halves exchanged and the keys reversed
        keys = keys[::-1].copy()
    for i in range(indices.size):
        x = np.uint64(indices[i])
        while True:
            high = x >> half_bits
            low = x & mask
            left = low if inverse else high
            right = high if inverse else low
            for r in range(_ROUNDS):
                left, right = right, left ^ (_mix(right ^ keys[r]) & mask)
            x = (right << half_bits) | left if inverse else (left << half_bits) | right
            if x < size:
                break
        out[i] = np.int64(x)
