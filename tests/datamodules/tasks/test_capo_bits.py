import math
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from src.datamodules.tasks import Capo
from src.datamodules.tasks.capo import N0, S0, ceiling_bits, learned_bits
from src.datamodules.tasks.capo_people import MONTHS, pools
from src.datamodules.tasks.capo_writing import vocabulary

CEILINGS = {  # people -> million bits, bits a person
    10_000: (0.6156, 61.557),
    20_000: (1.2111, 60.557),
    50_000: (2.9618, 59.236),
    100_000: (5.8235, 58.236),
    200_000: (11.4471, 57.236),
    500_000: (27.9568, 55.914),
    1_000_000: (54.9136, 54.914),
}
SATURATED = {50_000: 2.928, 100_000: 5.753, 200_000: 11.28, 500_000: 27.73, 1_000_000: 54.5}  # published, million bits


@pytest.mark.parametrize("people", CEILINGS)
def test_ceilings(people):
    bits = ceiling_bits(people)
    assert round(bits / 1e6, 4) == CEILINGS[people][0]
    assert abs(bits / people - CEILINGS[people][1]) < 1e-3  # three published values have their last digit rounded up
    assert learned_bits(people, math.log(people), 0) == pytest.approx(bits)
    if people in SATURATED:
        assert 0.984 < SATURATED[people] * 1e6 / bits < 0.994


def test_constants():
    assert N0 == 160_000_000
    assert round(math.log2(S0), 4) == 47.5916
    assert learned_bits(1000, math.log(N0), math.log(S0)) == pytest.approx(0, abs=1e-6)
    assert math.isnan(learned_bits(1000, math.nan, 0))


def nats_by_kind(task, probability):
    """p1 and p2 of a model on the val split: mean over people of the name's and the values' summed cross-entropies."""
    windows = task.windows(0, "val", 0, task.num_windows("val", 512), 512)
    names = values = 0.0
    for row, kinds in zip(windows.tokens, windows.kinds, strict=True):
        bounds = np.flatnonzero(np.diff(kinds, prepend=0, append=0))
        told = {}
        for start, end in pairwise(bounds):
            kind = int(kinds[start])
            told = {} if kind == 1 else told
            if kind == 0:
                continue
            value = tuple(row[start:end].tolist())
            for i in range(len(value)):
                nats = -math.log(probability(kind, told, value[:i], value[i]))
                names, values = names + nats * (kind == 1), values + nats * (kind > 1)
            told[kind] = value
    return names / task.num_people, values / task.num_people


class Counts:
    """Next-token probabilities of a list of sequences, all equally likely."""

    def __init__(self, sequences):
        self.prefixes = Counter(sequence[:i] for sequence in sequences for i in range(len(sequence) + 1))

    def __call__(self, prefix, token):
        return self.prefixes[(*prefix, token)] / self.prefixes[prefix]


def test_a_lookup_table_reaches_the_ceiling():
    task: Any = Capo(num_people=200)
    people = [task.person(0, j) for j in range(200)]
    encode = vocabulary().encode
    names = Counts([tuple(encode(f" {who.full_name}")) for who in people])
    table = {tuple(encode(f" {who.full_name}")): [tuple(encode(f" {v}")) for v in who.values] for who in people}

    def probability(kind, told, prefix, token):
        if kind == 1:
            return names(prefix, token)
        return float(table[told[1]][kind - 2][len(prefix)] == token) or 1e-9

    p1, p2 = nats_by_kind(task, probability)
    assert p1 == pytest.approx(math.log(200))
    assert p2 == 0
    assert learned_bits(200, p1, p2) == pytest.approx(ceiling_bits(200))


def test_a_model_that_knows_only_the_pools_has_learnt_next_to_nothing():
    task: Any = Capo(num_people=600)
    pool, encode = pools(), vocabulary().encode

    def tokens(values):
        return [tuple(encode(f" {value}")) for value in values]

    names = [Counts(tokens(values)) for values in pool[:3]]
    birthday = [Counts(tokens(v)) for v in (MONTHS, range(1, 29), range(1900, 2100))]
    single = [
        Counts(tokens(v)) for v in (pool.cities, pool.universities, pool.fields, pool.employer_cities, pool.employers)
    ]
    seats = list(zip(tokens(pool.employer_cities), tokens(pool.employers), strict=True))

    def probability(kind, told, prefix, token):
        if kind == 1:
            return names[len(prefix)]((), token)
        if kind == 2:
            return 1.0 if len(prefix) == 2 else birthday[min(len(prefix), 2)]((), token)
        if kind == 6 and 7 in told:  # the employer is known: so is its city
            return Counts([city for city, employer in seats if employer == told[7]])(prefix, token)
        if kind == 7 and 6 in told:
            return Counts([employer for city, employer in seats if city == told[6]])(prefix, token)
        return single[kind - 3](prefix, token)

    p1, p2 = nats_by_kind(task, probability)
    assert p1 == pytest.approx(math.log(N0))
    # One bit is the pronoun's, which S0 counts; a little comes from names that begin another's (Xavier University of Louisiana).
    assert 1 <= learned_bits(600, p1, p2) / 600 < 1.1
    assert ceiling_bits(600) / 600 > 60


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda: learned_bits(0, 1, 1), "num_people=0: from 1 to 160000000"),
        (lambda: learned_bits(5, -1, 1), "name_nats=-1"),
        (lambda: learned_bits(5, 1, -1), "value_nats=-1"),
        (lambda: ceiling_bits(N0 + 1), "num_people=160000001"),
    ],
)
def test_absurd_numbers_are_refused(request_, message):
    with pytest.raises(ValueError, match=message):
        request_()
