from itertools import permutations
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from src.datamodules.tasks import MQAR


@st.composite
def parameters(draw):
    """From a single pair whose question is the whole rest to long examples; vocabularies as small as can be."""
    pairs = draw(st.integers(1, 20))
    length = 4 * pairs + 2 * draw(st.integers(0, 30))
    return {
        "num_pairs": pairs,
        "length": length,
        "vocabulary": length + draw(st.one_of(st.integers(1, 3), st.integers(1, 5000))),
        "power": draw(st.one_of(st.sampled_from([1e-9, 0.01, 1.0, 2.0]), st.floats(0.001, 2))),
        "random_fill": draw(st.booleans()),
    }


@settings(max_examples=150, deadline=None)
@given(parameters(), st.sampled_from(["train", "val", "test"]), st.integers(0, 2**31), st.integers(0, 2**40))
def test_every_key_is_asked_once_and_answered_right(options, split, seed, index):
    task: Any = MQAR(**options)
    n, V = task.num_pairs, task.vocabulary
    tokens, mask = task.example(seed, split, index)
    assert len(tokens) == len(mask) == task.length == task.max_length
    keys, values = tokens[: 2 * n : 2], tokens[1 : 2 * n : 2]
    assert len(set(keys)) == len(set(values)) == n
    assert keys.min() >= 1
    assert keys.max() < V // 2 <= values.min()
    assert values.max() < V == task.vocab_size
    assert not mask[: 2 * n].any()

    answers = np.flatnonzero(mask)
    assert (answers % 2 == 1).all()
    pairs = dict(zip(keys, values, strict=True))
    assert sorted(tokens[answers - 1]) == sorted(keys)
    assert [pairs[key] for key in tokens[answers - 1]] == tokens[answers].tolist()
    fillers = np.setdiff1d(np.arange(2 * n, task.length), [*answers, *(answers - 1)])
    assert not set(tokens[fillers]) & set(keys)
    if not task.random_fill:
        assert not tokens[fillers].any()
    assert task.parse(tokens) == (pairs, [(t - 1, tokens[t - 1], tokens[t]) for t in answers])


@settings(max_examples=60, deadline=None)
@given(parameters(), st.integers(0, 2**40), st.integers(1, 150))
def test_windows_are_their_examples_end_to_end(options, first, length):
    task = MQAR(**options)
    windows = task.windows(3, "train", first, 3, length)
    per_window = -(-length // task.length)
    for row in range(3):
        pieces = [task.example(3, "train", (first + row) * per_window + i) for i in range(per_window)]
        tokens, mask = (np.concatenate(parts)[:length] for parts in zip(*pieces, strict=True))
        assert np.array_equal(windows.tokens[row], tokens)
        assert np.array_equal(windows.loss_mask[row], mask)
        assert np.array_equal(windows.segments[row], np.arange(length) // task.length)


def test_examples_depend_on_seed_split_and_index_and_on_nothing_else():
    task: Any = MQAR()
    reference = task.example(0, "train", 5)[0]
    assert np.array_equal(reference, MQAR().example(0, "train", 5)[0])
    for other in [(1, "train", 5), (0, "val", 5), (0, "train", 6)]:
        assert not np.array_equal(reference, task.example(*other)[0])


def test_examples_never_change():
    """Golden values: a change here changes everybody's data."""
    tokens = MQAR(num_pairs=3, length=20, vocabulary=40).example(42, "train", 7)[0]
    assert tokens.tolist() == [13, 32, 19, 39, 7, 36, 26, 8, 12, 11, 13, 32, 16, 37, 7, 36, 19, 39, 24, 2]


# ---- the law ---------------------------------------------------------------------------------------------------------


def places_of_keys(task, samples):
    """[samples, n]: the place, from 0, where the question of each pair's key stands."""
    tokens = task.windows(1, "train", 0, samples, task.length).tokens
    start = 2 * task.num_pairs
    asked = tokens[:, start::2, None] == tokens[:, None, :start:2]
    assert (asked.sum(axis=1) == 1).all()
    return asked.argmax(axis=1)


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0, 2.0])
def test_the_first_key_s_place_follows_the_power_law(power):
    task = MQAR(num_pairs=4, length=64, power=power)
    g = np.arange(1, 29)
    weights = power * g ** (power - 1.0)
    found = np.bincount(places_of_keys(task, 20_000)[:, 0], minlength=28)
    assert stats.chisquare(found, 20_000 * weights / weights.sum()).pvalue > 1e-4


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_later_keys_take_the_places_that_are_left(power):
    """One weighted draw without replacement after the other: the exact probability of every outcome."""
    task = MQAR(num_pairs=3, length=16, vocabulary=100, power=power)
    weights = np.arange(1, 6) ** (power - 1.0)
    outcomes = list(permutations(range(5), 3))
    expected = []
    for outcome in outcomes:
        left, p = weights.sum(), 1.0
        for place in outcome:
            p *= weights[place] / left
            left -= weights[place]
        expected.append(p)
    found = [tuple(row) for row in places_of_keys(task, 30_000).tolist()]
    assert stats.chisquare([found.count(outcome) for outcome in outcomes], 30_000 * np.array(expected)).pvalue > 1e-4


def test_keys_values_and_fillers_are_uniform():
    task = MQAR(num_pairs=2, length=12, vocabulary=13)
    windows = task.windows(1, "train", 0, 30_000, 12)
    keys, values = windows.tokens[:, :4:2], windows.tokens[:, 1:4:2]
    pairs = np.bincount(keys @ [6, 1], minlength=36)
    assert stats.chisquare([pairs[6 * a + b] for a, b in permutations(range(1, 6), 2)]).pvalue > 1e-4
    pairs = np.bincount((values - 6) @ [7, 1], minlength=49)
    assert stats.chisquare([pairs[7 * a + b] for a, b in permutations(range(7), 2)]).pvalue > 1e-4
    # Fillers by what the keys are: uniform over the other 11 tokens.
    filler = ~windows.loss_mask & ~np.roll(windows.loss_mask, -1, axis=1)
    filler[:, :4] = False
    for key in (1, 5):
        rows = keys[:, 0] == key
        found = np.bincount(windows.tokens[rows][filler[rows]], minlength=13)
        others = [found[t] for t in range(1, 6) if t != key]
        assert found[key] == 0
        assert stats.chisquare([found[0], *found[6:]]).pvalue > 1e-4
        assert stats.chisquare(others).pvalue > 1e-4
        # A token that is a key of the example in one case of four is a filler in the other three.
        assert np.mean(others) / np.mean(found[6:]) == pytest.approx(0.75, abs=0.03)


def test_all_splits_have_the_same_law():
    """Answers stand, on average, at the same position."""
    task: Any = MQAR()
    means = [np.nonzero(task.windows(0, split, 0, 4000, 64).loss_mask)[1].mean() for split in ("train", "val", "test")]
    assert np.ptp(means) < 0.5


# ---- scoring ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(parameters(), st.integers(1, 200))
def test_gold_scores_full_marks_and_one_wrong_token_costs_one(options, length):
    task = MQAR(**options)
    windows = task.windows(0, "test", 0, 2, length)
    gold = task.score(windows.tokens, windows.tokens)
    answers = int(windows.loss_mask.sum())
    assert gold.counts == {task.groups[0]: (answers, answers)}
    assert tuple(gold.extra) == task.extras
    assert all(right == total for right, total in gold.extra.values())
    assert sum(total for _, total in gold.extra.values()) == answers
    nonsense = np.where(windows.loss_mask, windows.tokens, -1)
    assert task.score(windows.tokens, nonsense) == gold
    for row, t in np.argwhere(windows.loss_mask)[:5]:
        wrong = windows.tokens.copy()
        wrong[row, t] -= 1
        score = task.score(windows.tokens, wrong)
        assert score.counts == {task.groups[0]: (answers - 1, answers)}
        lost = {name: gold.extra[name][0] - score.extra[name][0] for name in task.extras}
        own = t % task.length - 1
        key = windows.tokens[row, t - 1]
        start = t - t % task.length
        asked = own - int(np.argmax(windows.tokens[row, start : t - 1 : 2] == key)) * 2
        assert lost == {name: int(2 ** (int(asked).bit_length() - 1) == int(name[8:])) for name in task.extras}


def test_padding_does_not_count():
    task = MQAR(num_pairs=2, length=16, vocabulary=40)
    tokens = task.example(0, "val", 0)[0]
    last = max(t for t, _, _ in task.parse(tokens)[1])
    tokens[last + 1 :] = -1
    assert task.score(tokens[None], tokens[None]).counts == {"pairs2": (1, 1)}


def test_chance_is_what_ruling_out_given_answers_scores():
    task: Any = MQAR(num_pairs=6, length=40)
    windows, rng = task.windows(0, "test", 0, 3000, 40), np.random.default_rng(0)
    guesses = np.full_like(windows.tokens, -1)
    for row, guessed in zip(windows.tokens, guesses, strict=True):
        left = row[1:12:2].tolist()
        for t, _, answer in task.parse(row)[1]:
            guessed[t + 1] = rng.choice(left)
            left.remove(answer)
    right, total = task.score(windows.tokens, guesses).counts["pairs6"]
    assert right / total == pytest.approx(task.chance("pairs6"), abs=0.015)


def test_in_words():
    task = MQAR(num_pairs=2, length=16, vocabulary=17, random_fill=False)
    text = task.describe(np.array([2, 8, 4, 7, 0, 0, 4, 7, 0, 0, 0, 0, 2, 8, 0, 0]))
    assert text == "pairs    2->8  4->7\nquestion at 6: 4?  7\nquestion at 12: 2?  8"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_pairs": 0}, "MQAR.num_pairs=0: at least 1"),
        ({"length": 63}, "MQAR.length=63: an even number"),
        ({"num_pairs": 17}, "MQAR.length=64.*at least 4 num_pairs = 68"),
        ({"vocabulary": 64}, "MQAR.vocabulary=64: more than length=64"),
        ({"power": 0}, "MQAR.power=0"),
        ({"power": float("nan")}, "MQAR.power=nan"),
    ],
)
def test_absurd_parameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MQAR(**options)


def test_unknown_split():
    with pytest.raises(ValueError, match="split='dev'.*train, val, test"):
        MQAR().example(0, cast(Any, "dev"), 0)
