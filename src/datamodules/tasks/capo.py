"""Capo: knowledge capacity. How many bits about N people does a model store?  (Part 4.1, appendix A.3; Part 3.3: bioS(N))

A biography tells six facts about one person, each in a sentence chosen anew at every exposure, in an order shuffled anew:

    <bos> Gina Shane Johnson holds a university diploma in Fine Arts. She names July 9, 2049 as the date of birth. She was educated
    principally at University of San Francisco. She made a living in Philadelphia, PA. She is a dedicated employee of Nova Circuit.
    She comes from Colorado Springs, CO.

Worked example: the beginning of this one, example 326 of seed 0, about person 18427 (odd, so She). Kind 1 is the full name, 2..7 are
birthday, birth city, university, field, employer's city and employer, 0 is the rest:

    token   <bos>| Gina| Shane| Johnson| holds| a| university| diploma| in| Fine| Arts|.| She| names| July| 9|,| 2049| as| ...
    kind       0     1      1        1      0   0           0        0   0     5     5 0    0      0     2  2 2     2   0

    training    exposure e shows every one of the N people exactly once, in an order of its own; there are ``exposures`` of them
    val, test   every one of the *same* N people once, in texts never seen: what is measured is what was memorised
    learnt      all tokens, the closing <bos> of the next biography included
    windows     M biographies each, M so small that they all but always fit; then padding, which is not learnt. So a window
                needs to know nothing of its neighbours, and an exposure is neither more nor less than one. Behind the last
                biography of a split there is only padding

Bits (Part 3.3). With p1 the cross-entropy of a name (nats, summed over its tokens) and p2 that of the six values of a person, both
averaged over the people,

    learned bits = N log2(N0 / e^p1) + N log2(S0 / e^p2)      N0 = 400 * 400 * 1000
    at most        N log2(N0 / N)    + N log2 S0              S0 = 2 * (12 * 28 * 200) * 200 * 300 * 100 * 263

The release has the sentences and their shuffling; sampler, tokens, packing, exposures and the metric are not in it. Decided here:

    text         own templates and pools, with the release's numbers of each; texts have its mean and spread of length
    references   the full name stands once, at the start; then He and She, and His and Her in possessive sentences (the release
                 would write "He's birthday"); dates as "October 2, 1996", the city before its employer when not shuffled
    years        1900..2099: the paper says 200 years, not which
    tokens       words (``capo_writing.py``); the paper used GPT-2's tokenizer, cut to the ids in use
    p2           sums all six values. S0 counts the employer, not its city, which follows from it. By the chain rule the two cost
                 an ideal reader ln 263 together when they are unknown, whichever is written first, and 0 when they are known;
                 so the sum is what S0 is to be compared with
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from src.datamodules.tasks.base import Examples, Score, Split, Task, Windows, check_split
from src.datamodules.tasks.capo_people import (
    CITIES,
    DAYS,
    EMPLOYERS,
    FACTS,
    FIELDS,
    FIRST_FACT,
    LAST_NAMES,
    MIDDLE_NAMES,
    NAME,
    NUM_BIRTHDAYS,
    NUM_NAMES,
    UNIVERSITIES,
    YEARS,
    Person,
    draw_attributes,
    name_codes,
    people_key,
    person,
    pools,
)
from src.datamodules.tasks.capo_writing import BOS, biographies, find_kinds, lengths, tables, vocabulary
from src.datamodules.tasks.rng import below, seed_stream, shuffle, stream_key
from src.support.permutation import permute_array

N0 = NUM_NAMES
S0 = 2 * NUM_BIRTHDAYS * CITIES * UNIVERSITIES * FIELDS * EMPLOYERS


class Annotated(NamedTuple):
    """One example, and what its tokens are."""

    tokens: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    kinds: NDArray[np.int8]  # 0 other, 1 full name, 2..7 the facts in the order of ``FACTS``


@dataclass(frozen=True)
class Capo(Task):
    """Synthetic biographies of the same people, told anew at every exposure; see the head of this file.

    Args:
        num_people: N.
        exposures: how often training tells of every person.
        permute: shuffle the sentences of every biography.

    Raises:
        ValueError: for parameters out of range.
    """

    config_name = "capo"

    num_people: int = 50_000
    exposures: int = 100
    permute: bool = True

    name: ClassVar[str] = "capo"

    def __post_init__(self) -> None:
        if not 1 <= self.num_people <= NUM_NAMES:
            raise ValueError(f"Capo.num_people={self.num_people}: from 1 to {NUM_NAMES}, the number of different names")
        if self.exposures < 1:
            raise ValueError(f"Capo.exposures={self.exposures}: at least 1")
        if not isinstance(self.permute, bool):
            raise ValueError(f"Capo.permute={self.permute!r}: true or false")

    # ---- what it is ------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Every word of pools and templates, and <bos>."""
        return len(vocabulary())

    @property
    def max_length(self) -> int:
        """Tokens in the longest possible biography."""
        return lengths(self.permute).longest

    @property
    def min_window(self) -> int:
        """All but a few biographies in ten thousand are no longer (mean + 3.5 sd)."""
        law = lengths(self.permute)
        return math.ceil(law.mean + 3.5 * law.sd)

    @property
    def groups(self) -> tuple[str, ...]:
        """The six facts."""
        return FACTS

    def chance(self, group: str) -> float:
        """How often one who knows the pools, but nobody, is right.

        That is the share of the most frequent value; but an employer's city gives the employer away in part, and an employer its city.
        """
        if group not in FACTS:
            raise ValueError(f"group={group!r}: choose {', '.join(FACTS)}")
        cities = pools().employer_cities
        city, employer = max(map(cities.count, cities)) / EMPLOYERS, len(set(cities)) / EMPLOYERS
        if self.permute:  # each of the two comes first half of the time
            city, employer = (city + 1) / 2, (1 / EMPLOYERS + employer) / 2
        shares = (1 / NUM_BIRTHDAYS, 1 / CITIES, 1 / UNIVERSITIES, 1 / FIELDS, city, employer)
        return shares[FACTS.index(group)]

    def facts(self, seed: int) -> dict[str, Any]:
        """See ``Task.facts``: the people, whom the seed draws, and how many there are, on which a bit of their names depends."""
        return {"data.seed": seed, "data.task.num_people": self.num_people}

    def encode(self, text: str) -> list[int]:
        """Ids of a text made of the task's words; ``decode`` gives it back."""
        return vocabulary().encode(text)

    def decode(self, ids: NDArray[np.int64] | list[int]) -> str:
        """The text of these ids."""
        return vocabulary().decode(ids)

    def person(self, seed: int, j: int) -> Person:
        """The record of person ``j``, the same in all splits and for every ``num_people`` above j."""
        if not 0 <= j < self.num_people:
            raise ValueError(f"j={j}: there are people 0..{self.num_people - 1}")
        return person(seed, j)

    # ---- generation ------------------------------------------------------------------------------------------------

    def people(self, seed: int, split: Split, first: int, count: int) -> NDArray[np.int64]:
        """Whom examples ``first .. first + count - 1`` are about.

        Behind the last example of a split the same goes on: another exposure in training, another round of texts elsewhere.
        """
        check_split(split)
        if first < 0:
            raise ValueError(f"example {first}: the first is 0")
        people, done = np.empty(count, dtype=np.int64), 0
        while done < count:
            turn, position = divmod(first + done, self.num_people)
            size = min(count - done, self.num_people - position)
            key = (self.name, seed, "exposure", turn) if split == "train" else (self.name, seed, "order", split)
            positions = np.arange(position, position + size)
            people[done : done + size] = permute_array(positions, self.num_people, int(stream_key(*key)))
            done += size
        return people

    def examples_per_window(self, split: Split, length: int) -> int:
        """M: the most whose length exceeds the window in less than 1 of 4000 cases (3.5 standard deviations), at least 1."""
        law = lengths(self.permute)
        root = (math.sqrt((3.5 * law.sd) ** 2 + 4 * law.mean * length) - 3.5 * law.sd) / (2 * law.mean)
        return max(1, math.floor(root**2))

    def num_examples(self, split: Split) -> int:
        """Biographies in a split: N a time of training, N in the others."""
        check_split(split)
        return self.num_people * (self.exposures if split == "train" else 1)

    def num_windows(self, split: Split, length: int) -> int:
        """Windows that hold the biographies of a split."""
        return -(-self.num_examples(split) // self.examples_per_window(split, length))

    def windows(self, seed: int, split: Split, first: int, count: int, length: int) -> Windows:
        """See ``Task.windows``; a window behind the last one is all padding."""
        if length < 1:
            raise ValueError(f"windows of {length} tokens: at least 1")
        per_window = self.examples_per_window(split, length)
        stop = min((first + count) * per_window, self.num_examples(split))
        return self._pack(seed, split, first * per_window, stop, (count, per_window, length))

    def _pack(self, seed: int, split: Split, first: int, stop: int, shape: tuple[int, int, int]) -> Windows:
        """Examples ``first .. stop - 1`` in rows of a number of examples and of tokens: shape (rows, examples, tokens)."""
        rows, per_row, length = shape
        people = self.people(seed, split, first, max(0, stop - first))
        tokens = np.empty((rows, length), dtype=np.int64)
        mask = np.empty((rows, length), dtype=np.bool_)
        segments = np.empty((rows, length), dtype=np.int32)
        kinds = np.empty((rows, length), dtype=np.int8)
        keys = (people_key(seed), stream_key(self.name, seed, split))
        names = name_codes(seed, people)
        writer = _Writer(self.permute, per_row, lengths(self.permute).longest)
        _fill(tables(), writer, keys, first, people, names, tokens, mask, segments, kinds)
        return Windows(tokens, mask, segments, kinds)

    def annotated_example(self, seed: int, split: Split, index: int) -> Annotated:
        """Example ``index``, with what its tokens are."""
        row = self._pack(seed, split, index, index + 1, (1, 1, self.max_length))
        size = int(row.loss_mask.sum())
        assert row.kinds is not None
        return Annotated(row.tokens[0, :size], row.loss_mask[0, :size], row.kinds[0, :size])

    def example(self, seed: int, split: Split, index: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """See ``Task.example``; in training, example i is of exposure i // num_people."""
        return self.annotated_example(seed, split, index)[:2]

    def batch(self, seed: int, split: Split, first: int, count: int) -> Examples:
        """See ``Task.batch``."""
        rows = self._pack(seed, split, first, first + count, (count, 1, self.max_length))
        sizes = rows.loss_mask.sum(axis=1)
        longest = int(sizes.max(initial=0))
        return Examples(rows.tokens[:, :longest], rows.loss_mask[:, :longest], sizes)

    def text(self, seed: int, split: Split, index: int) -> str:
        """The biography as plain text; it begins with a space, as every sentence does."""
        return self.decode(self.example(seed, split, index)[0][1:])

    # ---- reading ---------------------------------------------------------------------------------------------------

    def score(
        self, tokens: NDArray[np.int64], predictions: NDArray[np.int64], kinds: NDArray[np.int8] | None = None
    ) -> Score:
        """How many values were predicted whole, by fact; values cut by the window's end do not count.

        Args:
            tokens: windows ``[W, L]``.
            predictions: ``[W, L]``, the token predicted for each position.
            kinds: those of ``windows``; without them the text is read back sentence by sentence, which is slower.
        """
        if kinds is None:
            kinds = np.array([find_kinds(row) for row in tokens], dtype=np.int8).reshape(tokens.shape)
        counts = np.zeros((len(FACTS), 2), dtype=np.int64)
        _score(np.ascontiguousarray(tokens), np.ascontiguousarray(predictions), np.ascontiguousarray(kinds), counts)
        return Score({fact: (int(right), int(total)) for fact, (right, total) in zip(FACTS, counts, strict=True)})

    def describe(self, tokens: NDArray[np.int64]) -> str:
        """The text of every biography in a row of tokens, and its record."""
        kinds, lines = find_kinds(tokens), []
        for start, end in biographies(tokens):
            own, own_kinds = tokens[start:end], kinds[start:end]
            lines.append(self.decode(own).strip())
            for kind, label in enumerate(("name", *FACTS), start=NAME):
                value = self.decode(own[own_kinds == kind]).strip()
                lines.append(f"    {label.replace('_', ' '):14} {value or '(cut)'}")
        return "\n".join(lines)


# ---- bits ------------------------------------------------------------------------------------------------------------


def learned_bits(num_people: int, name_nats: float, value_nats: float) -> float:
    """Bits a model has learned about N people: ``N log2(N0 / e^name_nats) + N log2(S0 / e^value_nats)``, either term at least 0.

    (It is a lower bound; one that is worse than guessing from the pools, as an untrained model is, has learned nothing, not less.)

    Args:
        num_people: N, the people of training.
        name_nats: p1, the mean over these people of the summed cross-entropy of the full name's tokens.
        value_nats: p2, the mean of the summed cross-entropy of all tokens of the six values.

    Divide by the number of parameters for bits per parameter. A model that knows the pools but nobody in particular gets 1 bit a
    person, because S0 counts the pronoun and neither term does.
    """
    _check_people(num_people)
    for key, nats in (("name_nats", name_nats), ("value_nats", value_nats)):
        if nats < 0:
            raise ValueError(f"{key}={nats}: a cross-entropy in nats, at least 0")
    terms = math.log2(N0) - name_nats / math.log(2), math.log2(S0) - value_nats / math.log(2)
    return num_people * sum(term if math.isnan(term) else max(0.0, term) for term in terms)


def ceiling_bits(num_people: int) -> float:
    """Most bits that N people hold: ``N log2(N0 / N) + N log2 S0``, reached with p1 = ln N and p2 = 0."""
    _check_people(num_people)
    return num_people * (math.log2(N0 / num_people) + math.log2(S0))


def _check_people(num_people: int) -> None:
    if not 1 <= num_people <= N0:
        raise ValueError(f"num_people={num_people}: from 1 to {N0}")


# ---- compiled --------------------------------------------------------------------------------------------------------


class _Writer(NamedTuple):
    """How rows are written."""

    permute: bool
    per_row: int  # biographies
    longest: int  # tokens of the longest biography


@njit(cache=True)
def _copy(table, piece, kind, tokens, kinds, at):
    for t in range(table.start[piece], table.start[piece + 1]):
        tokens[at] = table.flat[t]
        kinds[at] = kind
        at += 1
    return at


@njit(cache=True)
def _put(token, kind, tokens, kinds, at):
    tokens[at] = token
    kinds[at] = kind
    return at + 1


@njit(cache=True)
def _put_birthday(table, birthday, tokens, kinds, at):
    at = _put(table.month[birthday // (DAYS * YEARS)], FIRST_FACT, tokens, kinds, at)
    at = _put(table.day[birthday // YEARS % DAYS], FIRST_FACT, tokens, kinds, at)
    at = _put(table.comma, FIRST_FACT, tokens, kinds, at)
    return _put(table.year[birthday % YEARS], FIRST_FACT, tokens, kinds, at)


@njit(cache=True)
def _put_name(table, name, tokens, kinds, at):
    at = _put(table.first[name // (MIDDLE_NAMES * LAST_NAMES)], NAME, tokens, kinds, at)
    at = _put(table.middle[name // LAST_NAMES % MIDDLE_NAMES], NAME, tokens, kinds, at)
    return _put(table.last[name % LAST_NAMES], NAME, tokens, kinds, at)


@njit(cache=True)
def _choose(begin, permute, stream, order, sentences):
    """Draws a sentence for every fact, and their order. (As a part of ``_biography`` it would slow that down by a half.)"""
    for fact in range(6):
        order[fact] = fact
        sentences[fact] = begin[fact] + below(stream, begin[fact + 1] - begin[fact])
    if permute:
        shuffle(stream, order)


@njit(cache=True)
def _biography(table, who, name, drawn, order, sentences, tokens, kinds, at):
    """Writes one biography at ``at``; returns the next free position."""
    at = _put(BOS, 0, tokens, kinds, at)
    for place in range(6):
        fact = order[place]
        sentence = sentences[fact]
        if place == 0:
            at = _put_name(table, name, tokens, kinds, at)
            if table.possessive[sentence]:
                at = _put(table.owner, 0, tokens, kinds, at)
        else:
            at = _put(table.subject[np.int64(table.possessive[sentence]), who & 1], 0, tokens, kinds, at)
        at = _copy(table, 2 * sentence, 0, tokens, kinds, at)
        if fact == 0:
            at = _put_birthday(table, drawn[0], tokens, kinds, at)
        else:  # the employer's city (4) and the employer (5) have the employer's number
            at = _copy(table, table.values[fact] + drawn[min(fact, 4)], FIRST_FACT + fact, tokens, kinds, at)
        at = _copy(table, 2 * sentence + 1, 0, tokens, kinds, at)
    return at


@njit(cache=True, nogil=True)
def _fill(table, writer, keys, first, people, names, tokens, mask, segments, kinds):
    """Fills rows with ``per_row`` biographies each, from example ``first`` on, as long as there are people; then padding."""
    stream, drawn = np.empty(2, dtype=np.uint64), np.empty(5, dtype=np.int64)
    order, sentences = np.empty(6, dtype=np.int64), np.empty(6, dtype=np.int64)
    row_tokens = np.empty(writer.per_row * writer.longest, dtype=np.int64)
    row_kinds = np.empty(row_tokens.shape[0], dtype=np.int8)
    length = tokens.shape[1]
    for row in range(tokens.shape[0]):
        at, number = 0, 0
        for i in range(row * writer.per_row, min((row + 1) * writer.per_row, people.shape[0])):
            draw_attributes(stream, keys[0], people[i], drawn)
            seed_stream(stream, keys[1], first + i)
            _choose(table.sentences, writer.permute, stream, order, sentences)
            start = at
            at = _biography(table, people[i], names[i], drawn, order, sentences, row_tokens, row_kinds, at)
            segments[row, start:at] = number  # slices end at the window's
            number += 1
        used = min(at, length)
        tokens[row, :used], kinds[row, :used], mask[row, :used] = row_tokens[:used], row_kinds[:used], True
        tokens[row, used:], kinds[row, used:], mask[row, used:], segments[row, used:] = BOS, 0, False, number


@njit(cache=True, nogil=True)
def _score(tokens, predictions, kinds, counts):
    """Walks runs of one kind. A run at the window's end may be cut: every whole value has something behind it."""
    for row in range(tokens.shape[0]):
        t = 0
        while t < tokens.shape[1]:
            kind = kinds[row, t]
            if kind < FIRST_FACT:
                t += 1
                continue
            correct = True
            while t < tokens.shape[1] and kinds[row, t] == kind:
                correct &= predictions[row, t] == tokens[row, t]
                t += 1
            if t < tokens.shape[1]:
                counts[kind - FIRST_FACT, 0] += correct
                counts[kind - FIRST_FACT, 1] += 1
