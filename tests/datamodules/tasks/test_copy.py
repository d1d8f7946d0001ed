import math
from itertools import permutations, product
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from src.datamodules.tasks import Copy

parameters = st.one_of(
    st.builds(dict, N=st.integers(1, 40)),
    st.integers(1, 40).flatmap(lambda N: st.builds(dict, N=st.just(N), length=st.integers(1, N))),
    st.builds(dict, N=st.integers(1, 40), length=st.integers(1, 60), distinct=st.just(False)),
)


@settings(max_examples=100, deadline=None)
@given(parameters, st.sampled_from(["train", "val", "test"]), st.integers(0, 2**31), st.integers(0, 2**40))
def test_every_example_is_a_sequence_and_its_copy(options, split, seed, index):
    task: Any = Copy(**options)
    tokens, mask = task.example(seed, split, index)
    M = options.get("length", task.N)
    assert len(tokens) == len(mask) == task.max_length == 2 * M + 2
    sequence = tokens[1 : 1 + M].tolist()
    assert tokens.tolist() == [0, *sequence, task.N + 1, *sequence]
    assert mask.tolist() == [False] * (M + 2) + [True] * M
    assert min(sequence) >= 1
    assert max(sequence) <= task.N
    assert task.vocab_size == task.N + 2
    if task.distinct:
        assert len(set(sequence)) == M


@settings(max_examples=60, deadline=None)
@given(parameters, st.integers(0, 2**40), st.integers(1, 150))
def test_windows_are_their_examples_end_to_end(options, first, length):
    task = Copy(**options)
    windows = task.windows(3, "train", first, 3, length)
    per_window = -(-length // task.max_length)
    for row in range(3):
        pieces = [task.example(3, "train", (first + row) * per_window + i) for i in range(per_window)]
        tokens, mask = (np.concatenate(parts)[:length] for parts in zip(*pieces, strict=True))
        assert np.array_equal(windows.tokens[row], tokens)
        assert np.array_equal(windows.loss_mask[row], mask)
        assert np.array_equal(windows.segments[row], np.arange(length) // task.max_length)


def test_examples_depend_on_seed_split_and_index_and_on_nothing_else():
    task: Any = Copy(N=20)
    reference = task.example(0, "train", 5)[0]
    assert np.array_equal(reference, Copy(N=20).example(0, "train", 5)[0])
    for other in [(1, "train", 5), (0, "val", 5), (0, "train", 6)]:
        assert not np.array_equal(reference, task.example(*other)[0])


def test_examples_never_change():
    """Golden values: a change here changes everybody's data."""
    tokens = Copy(N=9).example(42, "train", 7)[0]
    assert tokens.tolist() == [0, 6, 4, 2, 1, 9, 5, 8, 3, 7, 10, 6, 4, 2, 1, 9, 5, 8, 3, 7]
    tokens = Copy(N=5, length=7, distinct=False).example(42, "train", 7)[0]
    assert tokens.tolist() == [0, 4, 2, 2, 2, 5, 5, 3, 6, 4, 2, 2, 2, 5, 5, 3]


@pytest.mark.parametrize(
    ("options", "outcomes"),
    [
        ({"N": 4}, list(permutations(range(1, 5)))),
        ({"N": 6, "length": 3}, list(permutations(range(1, 7), 3))),
        ({"N": 4, "length": 3, "distinct": False}, list(product(range(1, 5), repeat=3))),
    ],
    ids=["permutations", "some of them", "with replacement"],
)
def test_sequences_are_uniform(options, outcomes):
    task, samples = Copy(**options), 200 * len(outcomes)
    windows = task.windows(1, "train", 0, samples, task.max_length)
    found = [tuple(row[1 : 1 + task.size]) for row in windows.tokens.tolist()]
    assert stats.chisquare([found.count(outcome) for outcome in outcomes]).pvalue > 1e-4
    assert set(found) == set(outcomes)


def test_the_paper_s_permutations():
    """A window of 1024 tokens holds one permutation of 500; every token is equally likely everywhere."""
    task = Copy()
    windows = task.windows(0, "train", 0, 2000, 1024)
    assert (windows.loss_mask.sum(axis=1) == 500).all()
    assert (np.sort(windows.tokens[:, 1:501], axis=1) == np.arange(1, 501)).all()
    means = windows.tokens[:, 1:501].mean(axis=0)
    assert np.abs(means - 250.5).max() < 5 * math.sqrt((500**2 - 1) / 12 / 2000)


def test_gold_scores_full_marks_and_one_wrong_token_costs_one_token_and_one_sequence():
    task = Copy(N=7)
    windows = task.windows(0, "test", 0, 5, 40)
    gold = task.score(windows.tokens, windows.tokens)
    # Two whole examples of 16 tokens, and the third's <bos> and seven tokens.
    assert gold.counts == {"token": (70, 70)}
    assert gold.extra == {"sequence": (10, 10)}
    for row, t in np.argwhere(windows.loss_mask):
        wrong = windows.tokens.copy()
        wrong[row, t] = 1 + wrong[row, t] % 7
        score = task.score(windows.tokens, wrong)
        assert score.counts == {"token": (69, 70)}
        assert score.extra == {"sequence": (9, 10)}


def test_only_answers_are_looked_at():
    task = Copy(N=7)
    windows = task.windows(0, "test", 0, 5, 40)
    nonsense = np.where(windows.loss_mask, windows.tokens, -1)
    assert task.score(windows.tokens, nonsense) == task.score(windows.tokens, windows.tokens)


def test_a_cut_copy_counts_by_the_token_only():
    task = Copy(N=7)
    windows = task.windows(0, "test", 0, 1, 16 + 12)
    score = task.score(windows.tokens, windows.tokens)
    assert score.counts == {"token": (10, 10)}
    assert score.extra == {"sequence": (1, 1)}


def test_padding_does_not_count():
    task = Copy(N=7)
    row = np.concatenate([task.example(0, "val", 0)[0][:12], [-1, -1, -1, -1]])[None]
    score = task.score(row, row)
    assert score.counts == {"token": (3, 3)}
    assert score.extra == {"sequence": (0, 0)}


@pytest.mark.parametrize(
    "options", [{"N": 10}, {"N": 12, "length": 5}, {"N": 6, "length": 9, "distinct": False}], ids=str
)
def test_chance_is_what_guessing_scores(options):
    task: Any = Copy(**options)
    windows = task.windows(0, "test", 0, 2000, task.max_length)
    right, total = task.score(windows.tokens, guess(task, windows.tokens)).counts["token"]
    assert right / total == pytest.approx(task.chance("token"), abs=0.01)
    assert task.groups == ("token",)


def guess(task, tokens):
    """At every answer, a token that this copy has not shown so far."""
    guesses, M, rng = np.full_like(tokens, -1), task.size, np.random.default_rng(0)
    for row, guessed in zip(tokens, guesses, strict=True):
        for t in range(2 + M, 2 + 2 * M):
            ruled_out = set(row[2 + M : t].tolist()) if task.distinct else set()
            guessed[t] = rng.choice([token for token in range(1, task.N + 1) if token not in ruled_out])
    return guesses


def test_in_words():
    task = Copy(N=3)
    assert task.describe(np.array([0, 3, 1, 2, 4, 3, 1, 2])) == "sequence  3 1 2\ncopy      3 1 2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"N": 0}, "Copy.N=0: at least 1"),
        ({"length": 0}, "Copy.length=0: at least 1"),
        ({"N": 5, "length": 6}, "Copy.length=6.*N=5.*distinct=false"),
    ],
)
def test_absurd_parameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Copy(**options)


def test_unknown_split():
    with pytest.raises(ValueError, match="split='dev'.*train, val, test"):
        Copy(N=5).example(0, cast(Any, "dev"), 0)
