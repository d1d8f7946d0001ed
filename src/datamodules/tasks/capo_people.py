"""Who is written about: the pools of values, and the law by which every person of Capo gets hers.

    name        first x middle x last, 400 x 400 x 1000; a keyed permutation of range(1.6e8) gives every person another one
    birthday    12 months x 28 days x 200 years, 1900..2099
    birth city 200, university 300, field of study 100, employer 263: uniform and independent
    city of the employer   follows from the employer (133 cities, 36 of the employers in New York): no information of its own
    pronoun     He for even numbers, She for odd

Person j is a pure function of (seed, j): she is the same in training, validation and test, and whatever the number of people is.

The pools are lists of real given names, surnames, cities, universities and fields, and of invented employers in real cities. Their
sizes and overlaps are those of the release; their entries are not.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from src.datamodules.tasks.rng import below, seed_stream, stream_key
from src.support.permutation import permute_array

FACTS = ("birthday", "birth_city", "university", "field", "employer_city", "employer")
NAME = 1  # the kind of a token of the full name; fact number f (from 0) has kind FIRST_FACT + f, all else 0
FIRST_FACT = 2

MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
DAYS, YEARS, FIRST_YEAR = 28, 200, 1900
NUM_BIRTHDAYS = len(MONTHS) * DAYS * YEARS
FIRST_NAMES, MIDDLE_NAMES, LAST_NAMES = 400, 400, 1000
NUM_NAMES = FIRST_NAMES * MIDDLE_NAMES * LAST_NAMES
CITIES, UNIVERSITIES, FIELDS, EMPLOYERS = 200, 300, 100, 263

DIRECTORY = Path(__file__).with_name("capo_text")


class Pools(NamedTuple):
    """Every value there is; employer e sits in ``employer_cities[e]``."""

    first: tuple[str, ...]
    middle: tuple[str, ...]
    last: tuple[str, ...]
    cities: tuple[str, ...]
    universities: tuple[str, ...]
    fields: tuple[str, ...]
    employers: tuple[str, ...]
    employer_cities: tuple[str, ...]


class Person(NamedTuple):
    """One record, in words."""

    number: int
    first: str
    middle: str
    last: str
    birthday: str
    birth_city: str
    university: str
    field: str
    employer_city: str
    employer: str

    @property
    def full_name(self) -> str:
        """As it opens every biography."""
        return f"{self.first} {self.middle} {self.last}"

    @property
    def pronoun(self) -> str:
        """``He`` or ``She``."""
        return ("He", "She")[self.number % 2]

    @property
    def possessive(self) -> str:
        """``His`` or ``Her``."""
        return ("His", "Her")[self.number % 2]

    @property
    def values(self) -> tuple[str, ...]:
        """The six facts, in the order of ``FACTS``."""
        return self[4:]


def read_lines(name: str) -> tuple[str, ...]:
    """The lines of one of the text files."""
    return tuple((DIRECTORY / f"{name}.txt").read_text(encoding="ascii").splitlines())


@cache
def pools() -> Pools:
    """All pools, read once."""
    employers = [line.split("; ") for line in read_lines("employers")]
    names = ("first_names", "middle_names", "last_names", "cities", "universities", "fields")
    return Pools(
        *(read_lines(name) for name in names),
        employers=tuple(employer for employer, _ in employers),
        employer_cities=tuple(city for _, city in employers),
    )


def name_codes(seed: int, people: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which of the 1.6e8 names each of these people bears."""
    return permute_array(people, NUM_NAMES, int(stream_key("capo", seed, "names")))


def people_key(seed: int) -> np.uint64:
    """Key of the streams that ``draw_attributes`` reads."""
    return stream_key("capo", seed, "people")


def person(seed: int, number: int) -> Person:
    """The record of person ``number``."""
    pool, drawn = pools(), np.empty(5, dtype=np.int64)
    draw_attributes(np.empty(2, dtype=np.uint64), people_key(seed), number, drawn)
    birthday, city, university, field, employer = map(int, drawn)
    month, day, year = birthday // (DAYS * YEARS), birthday // YEARS % DAYS, birthday % YEARS
    name = int(name_codes(seed, np.array([number]))[0])
    return Person(
        number=number,
        first=pool.first[name // (MIDDLE_NAMES * LAST_NAMES)],
        middle=pool.middle[name // LAST_NAMES % MIDDLE_NAMES],
        last=pool.last[name % LAST_NAMES],
        birthday=f"{MONTHS[month]} {day + 1}, {FIRST_YEAR + year}",
        birth_city=pool.cities[city],
        university=pool.universities[university],
        field=pool.fields[field],
        employer_city=pool.employer_cities[employer],
        employer=pool.employers[employer],
    )


@njit(cache=True)
def draw_attributes(stream, key, number, drawn):
    """Writes birthday, birth city, university, field and employer, as numbers, to ``drawn`` [5]."""
    seed_stream(stream, key, number)
    drawn[0] = below(stream, NUM_BIRTHDAYS)
    drawn[1] = below(stream, CITIES)
    drawn[2] = below(stream, UNIVERSITIES)
    drawn[3] = below(stream, FIELDS)
    drawn[4] = below(stream, EMPLOYERS)
