"""How it is written: templates, vocabulary, and the exact way back from tokens to facts.

A template is one sentence with a subject at its start and one value in it:

    {subject} was born on {value}.                  {subject's} major was {value}.

The subject is the full name in the first sentence of a biography, and He or She (His or Her) in the others.

The vocabulary is the task's own: a token is a word together with the space in front of it, a number likewise, a possessive 's, or
a punctuation mark. Every piece that pools and templates can produce has one id, in sorted order behind 0 = <bos>, so
``decode(encode(text)) == text`` and nothing is ever unknown. (The paper used the GPT-2 tokenizer, cut to 3275 ids in use.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from src.datamodules.tasks.capo_people import (
    DAYS,
    FACTS,
    FIRST_FACT,
    FIRST_YEAR,
    MONTHS,
    NAME,
    YEARS,
    pools,
    read_lines,
)

BOS = 0
_PIECE = re.compile(r"<bos>|'s| ?[A-Za-z]+| ?[0-9]+| ?[^A-Za-z0-9 ]")
_SUBJECT = re.compile(r"\{subject('s)?\}")
_SUBJECT_WORDS = (" He", " She", " His", " Her", "'s")


class Template(NamedTuple):
    """``before`` and ``after`` stand around the value; the space in front of the value belongs to the value."""

    before: str
    after: str
    possessive: bool


@cache
def templates() -> tuple[tuple[Template, ...], ...]:
    """The sentences, fact by fact in the order of ``FACTS``."""
    return tuple(tuple(map(_template, read_lines(f"templates_{fact}"))) for fact in FACTS)


def _template(line: str) -> Template:
    subject = _SUBJECT.match(line)
    before, slot, after = line.partition(" {value}")
    if subject is None or not slot or "{" in after or not after.endswith("."):
        raise ValueError(f"not a template: {line!r}")
    return Template(before[subject.end() :], after, bool(subject[1]))


# ---- vocabulary ------------------------------------------------------------------------------------------------------


class Vocabulary:
    """Text to ids and back."""

    def __init__(self, pieces: tuple[str, ...]):
        self.pieces = ("<bos>", *pieces)
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """Ids of a text.

        Raises:
            ValueError: for a piece that no pool and no template holds.
        """
        ids, at = [], 0
        while at < len(text):
            found = _PIECE.match(text, at)
            piece = found[0] if found else text[at]
            if piece not in self.ids:
                raise ValueError(f"character {at}: no token {piece!r}; Capo knows the words of its pools and templates")
            ids.append(self.ids[piece])
            at += len(piece)
        return ids

    def decode(self, ids: NDArray[np.int64] | list[int]) -> str:
        """The text of these ids."""
        return "".join(self.pieces[int(i)] for i in ids)


@cache
def vocabulary() -> Vocabulary:
    """The one vocabulary of the task."""
    pool = pools()
    texts = [f" {value}" for values in pool for value in values]
    texts += [f" {month}" for month in MONTHS] + [f" {day}" for day in range(1, DAYS + 1)]
    texts += [f" {FIRST_YEAR + year}" for year in range(YEARS)] + [","]
    texts += [text for family in templates() for template in family for text in (template.before, template.after)]
    return Vocabulary(tuple(sorted({piece for text in texts for piece in _PIECE.findall(text)} | set(_SUBJECT_WORDS))))


# ---- tables for the compiled writer ----------------------------------------------------------------------------------


class Tables(NamedTuple):
    """Token pieces, laid end to end: piece r is ``flat[start[r] : start[r + 1]]``.

    Sentence s is made of the pieces 2s (before the value) and 2s + 1 (behind it); those of fact f are s = ``sentences[f]`` ..
    ``sentences[f + 1] - 1``. Value v of fact f, but for birthdays, is piece ``values[f] + v``; the city of employer v counts as
    value v of its fact.
    """

    flat: NDArray[np.int64]
    start: NDArray[np.int64]
    sentences: NDArray[np.int64]  # [7]
    possessive: NDArray[np.bool_]  # by sentence
    values: NDArray[np.int64]  # [6]
    first: NDArray[np.int64]  # tokens of names: always one
    middle: NDArray[np.int64]
    last: NDArray[np.int64]
    month: NDArray[np.int64]
    day: NDArray[np.int64]
    year: NDArray[np.int64]
    subject: NDArray[np.int64]  # [2, 2]: He, She; His, Her
    owner: int  # 's
    comma: int


def _fact_values() -> tuple[tuple[str, ...], ...]:
    """Values that are written as they stand, by fact; none for the birthday, which is put together."""
    pool = pools()
    return (), pool.cities, pool.universities, pool.fields, pool.employer_cities, pool.employers


@cache
def tables() -> Tables:
    """The tables, built once."""
    encode, pool = vocabulary().encode, pools()
    families = templates()
    pieces = [encode(text) for family in families for template in family for text in (template.before, template.after)]
    values = []
    for strings in _fact_values():
        values.append(len(pieces))
        pieces += [encode(f" {value}") for value in strings]

    def single(words) -> NDArray[np.int64]:
        tokens = [encode(f" {word}") for word in words]
        if any(len(ids) != 1 for ids in tokens):
            raise ValueError("a name must be one token: letters only")
        return np.array(tokens, dtype=np.int64)[:, 0]

    return Tables(
        flat=np.array([token for piece in pieces for token in piece], dtype=np.int64),
        start=np.cumsum([0, *map(len, pieces)]),
        sentences=np.cumsum([0, *map(len, families)]),
        possessive=np.array([template.possessive for family in families for template in family]),
        values=np.array(values),
        first=single(pool.first),
        middle=single(pool.middle),
        last=single(pool.last),
        month=single(MONTHS),
        day=single(range(1, DAYS + 1)),
        year=single(range(FIRST_YEAR, FIRST_YEAR + YEARS)),
        subject=single(("He", "She", "His", "Her")).reshape(2, 2),
        owner=vocabulary().ids["'s"],
        comma=vocabulary().ids[","],
    )


class Lengths(NamedTuple):
    """The law of a biography's length in tokens, <bos> included."""

    mean: float
    sd: float
    longest: int


@cache
def lengths(permute: bool) -> Lengths:
    """Exact moments: six sentences and their values are independent, but for the employer and its city, drawn together.

    The one other dependence: the full name costs a token more, 's, where the sentence it opens is possessive.
    """
    encode = vocabulary().encode
    mean, variance, longest = 1 + 3 + 5.0, 0.0, 1 + 3 + 5  # <bos>, the name, five pronouns

    value_sizes = [np.array([4])] + [np.array([len(encode(f" {v}")) for v in values]) for values in _fact_values()[1:]]
    value_sizes[4:] = [value_sizes[4] + value_sizes[5]]
    for sizes in value_sizes:
        mean, variance, longest = mean + sizes.mean(), variance + sizes.var(), longest + int(sizes.max())

    owner_share, covariance, extra = 0.0, 0.0, 0
    opening = len(FACTS) if permute else 1  # how many facts may come first, equally likely
    for fact, family in enumerate(templates()):
        sizes = np.array([len(encode(template.before)) + len(encode(template.after)) for template in family])
        possessive = np.array([template.possessive for template in family])
        mean, variance, longest = mean + sizes.mean(), variance + sizes.var(), longest + int(sizes.max())
        if fact < opening:
            owner_share += possessive.mean() / opening
            covariance += ((sizes - sizes.mean()) * possessive).mean() / opening
            extra = max(extra, int((sizes + possessive).max() - sizes.max()))
    variance += owner_share * (1 - owner_share) + 2 * covariance
    return Lengths(float(mean + owner_share), math.sqrt(variance), longest + extra)


# ---- reading ---------------------------------------------------------------------------------------------------------


def biographies(tokens: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Where the biographies of a row of tokens lie, without their <bos>; <bos> and negative ids separate them."""
    edges = [-1, *np.flatnonzero(tokens <= BOS).tolist(), len(tokens)]
    for before, end in pairwise(edges):
        if end > before + 1:
            yield before + 1, end


def find_kinds(tokens: NDArray[np.int64]) -> NDArray[np.int8]:
    """What every token of a row is: 0, ``NAME``, or ``FIRST_FACT`` + the fact's number.

    The last biography may be cut by the end of the row; a value that is cut, or that nothing follows, stays 0.

    Raises:
        ValueError: where the tokens are no biography.
    """
    kinds = np.zeros(len(tokens), dtype=np.int8)
    table = tables()
    for start, end in biographies(tokens):
        ids = tokens[start:end].tolist()
        if any(token not in names for token, names in zip(ids, (table.first, table.middle, table.last), strict=False)):
            raise _unreadable(ids, 0, start)
        kinds[start : min(start + 3, end)] = NAME
        begin = 0
        while begin < len(ids):
            sentence = _read_sentence(ids, begin)
            if sentence is None:
                if end < len(tokens) or len(ids) - begin > _longest_sentence():
                    raise _unreadable(ids, begin, start)
                break
            fact, value_start, value_end, begin = sentence
            kinds[start + value_start : start + value_end] = FIRST_FACT + fact
    return kinds


def _unreadable(ids: list[int], begin: int, start: int) -> ValueError:
    words = vocabulary().decode([i for i in ids[begin : begin + 12] if i < len(vocabulary())])
    return ValueError(f"token {start + begin}: no sentence of a biography begins here, {words!r}...")


@cache
def _longest_sentence() -> int:
    """Tokens in the longest sentence: what a cut leaves of one is shorter. A subject is at most a name and 's."""
    sizes = [
        len(before) + _value_tokens()[fact][0][-1] + len(after)
        for sentences in _openings().values()
        for fact, before, after in sentences
    ]
    return 4 + max(sizes)


@cache
def _openings() -> dict[tuple[bool, int], list[tuple[int, list[int], list[int]]]]:
    """(possessive, first token behind the subject) -> the sentences that go on so: fact, tokens before and behind the value."""
    found: dict[tuple[bool, int], list[tuple[int, list[int], list[int]]]] = {}
    encode = vocabulary().encode
    for fact, family in enumerate(templates()):
        for template in family:
            before = encode(template.before)
            found.setdefault((template.possessive, before[0]), []).append((fact, before, encode(template.after)))
    return found


@cache
def _value_tokens() -> tuple[tuple[range, frozenset[tuple[int, ...]]], ...]:
    """By fact: how many tokens a value can have, and all values; birthdays are recognised by their four parts."""
    found = []
    for values in _fact_values():
        tokens = frozenset(tuple(vocabulary().encode(f" {value}")) for value in values)
        sizes = {len(value) for value in tokens} or {4}
        found.append((range(min(sizes), max(sizes) + 1), tokens))
    return tuple(found)


def _is_value(fact: int, ids: tuple[int, ...]) -> bool:
    if fact > 0:
        return ids in _value_tokens()[fact][1]
    table = tables()
    return len(ids) == 4 and all(
        part in known for part, known in zip(ids, (table.month, table.day, (table.comma,), table.year), strict=True)
    )


def _read_sentence(ids: list[int], begin: int) -> tuple[int, int, int, int] | None:
    """Fact, value's start and end, sentence's end; None if no sentence, or too little of one, stands at ``begin``."""
    subjects, owner = tables().subject, tables().owner
    if begin == 0:
        at = 3
        possessive = at < len(ids) and ids[at] == owner
        at += possessive
    else:
        at, possessive = begin + 1, ids[begin] in subjects[1]
        if not possessive and ids[begin] not in subjects[0]:
            return None
    if at >= len(ids):
        return None
    for fact, before, after in _openings().get((possessive, ids[at]), ()):
        start = at + len(before)
        if ids[at:start] != before:
            continue
        for size in _value_tokens()[fact][0]:
            end = start + size
            rest = ids[end : end + len(after)]
            if rest and rest == after[: len(rest)] and _is_value(fact, tuple(ids[start:end])):
                stop = end + len(rest)
                if len(rest) == len(after) or stop == len(ids):
                    return fact, start, end, stop
    return None
