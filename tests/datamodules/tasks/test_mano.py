import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.datamodules.tasks import Mano
from tests.naive import mano as naive

SAMPLES = 20_000
# spec of the official generator, 40,000 samples each: setting -> mean length, sd, P(0), answer entropy, mean depth, its sd, ids seen
PUBLISHED = {
    (10, "train"): (15.99, 5.76, 0.0666, 4.515, 3.769, 1.586, 71),
    (10, "test"): (25, 0, 0.0698, 4.513, 5.650, 0.923, 35),
    (13, "train"): (19.02, 7.54, 0.0678, 4.514, 4.331, 1.798, 83),
    (13, "test"): (31, 0, 0.0728, 4.511, 6.409, 1.014, 35),
    (16, "train"): (21.98, 9.23, 0.0667, 4.515, 4.797, 1.941, 95),
    (16, "test"): (37, 0, 0.0727, 4.511, 7.040, 1.088, 35),
}


def depth(tree):
    return 0 if isinstance(tree, int) else 1 + max(depth(tree[1]), depth(tree[2]))


def close(found, published, sd, samples=SAMPLES):
    """Within four standard errors of the difference of two sample means, the published one of 40,000 and rounded."""
    digits = len(str(published).partition(".")[2])
    return abs(found - published) <= 4 * sd * math.sqrt(1 / samples + 1 / 40_000) + 0.5 * 10**-digits


@pytest.mark.parametrize("setting", PUBLISHED, ids=str)
def test_statistics_of_the_official_generator(setting):
    L, split = setting
    length, sd_length, zero, entropy, deep, sd_deep, distinct = PUBLISHED[setting]
    task = Mano(L=L)
    lengths, answers, depths, ids = [], [], [], set()
    for i in range(SAMPLES):
        tokens, _ = task.example(3, split, i)
        lengths.append(len(tokens))
        answers.append(tokens[-1] - 5000)
        ids.update(tokens.tolist())
        if i < 4000:
            depths.append(depth(task.parse(tokens)[0]))
    lengths, answers, depths = np.array(lengths), np.array(answers), np.array(depths)
    assert close(lengths.mean(), length, lengths.std())
    assert close(lengths.std(), sd_length, lengths.std() / math.sqrt(2))
    assert close((answers == 0).mean(), zero, math.sqrt(zero))
    shares = np.bincount(answers, minlength=23) / SAMPLES
    assert -(shares * np.log2(shares)).sum() == pytest.approx(entropy, abs=0.006)
    assert all(close(share, 0.0423, 0.2) for share in shares[1:])
    assert close(depths.mean(), deep, depths.std(), 4000)
    assert close(depths.std(), sd_deep, depths.std(), 4000)
    assert len(ids) == distinct


@pytest.mark.parametrize("L", [10, 13, 16])
def test_all_lengths_are_equally_likely_in_training(L):
    sizes = np.array([(len(Mano(L=L).example(0, "train", i)[0]) - 5) // 2 for i in range(5000)])
    counts = np.bincount(sizes, minlength=L + 1)[1:]
    assert len(counts) == L
    assert np.abs(counts - 5000 / L).max() < 4 * math.sqrt(5000 / L)


def test_every_name_is_as_frequent_as_its_synonym():
    tokens = Mano().windows(1, "train", 0, 400, 1024).tokens
    counts = np.bincount(tokens.ravel(), minlength=10_000)
    operators = counts[1:8][[0, 1, 2, 4, 5, 6]]
    assert counts[4] == counts[8] == 0
    assert np.abs(operators / operators.sum() - 1 / 6).max() < 4 * math.sqrt(5 / 36 / operators.sum())
    assert abs(counts[9999] / (counts[9998] + counts[9999]) - 0.5) < 4 * 0.5 / math.sqrt(counts[9998] + counts[9999])


@pytest.mark.parametrize("L", [1, 4, 10])
def test_chance_is_the_share_of_the_most_frequent_answer(L):
    task = Mano(L=L)
    answers = np.array([task.example(5, "test", i)[0][-1] - 5000 for i in range(SAMPLES)])
    law = task.value_probabilities(L)
    assert law.sum() == pytest.approx(1)
    assert task.chance(f"length{L}") == law[0] == law.max()
    found = np.bincount(answers, minlength=23) / SAMPLES
    assert (np.abs(found - law) < 4.5 * np.sqrt(law / SAMPLES)).all()


def test_worked_samples_of_the_release():
    task = Mano()
    for tokens, tree, answer in [
        ([9999, 21, 6, 3, 5019, 5000, 5008, 25, 5015], ["-", ["*", 19, 0], 8], 15),
        ([9999, 20, 1, 5002, 1, 5016, 5006, 24, 5001], ["+", 2, ["+", 16, 6]], 1),
        ([9999, 20, 5, 5003, 7, 5018, 5013, 24, 5007], ["+", 3, ["*", 18, 13]], 7),
    ]:
        assert task.parse(np.array(tokens)) == (tree, answer)
        assert task.evaluate(tree) == answer
        assert task.score(np.array([tokens]), np.array([tokens])).counts["length2"] == (1, 1)


parameters = st.builds(
    dict,
    L=st.integers(1, 30),
    modulus=st.integers(2, 60),
    synonyms=st.booleans(),
    loss=st.sampled_from(["all", "answer"]),
    test_lengths=st.sampled_from(["hardest", "all"]),
    compact_ids=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(parameters, st.sampled_from(["train", "val", "test"]), st.integers(0, 2**40), st.integers(0, 2**31))
def test_every_example_evaluates_to_its_answer(options, split, index, seed):
    task = Mano(**options)
    tokens, mask = task.example(seed, split, index)
    tree, answer = task.parse(tokens)
    assert task.evaluate(tree) == answer
    operators = (len(tokens) - 5) // 2
    assert operators == task.L if split != "train" and task.test_lengths == "hardest" else 1 <= operators <= task.L
    for kind, at in (("bos", 0), ("length", 1), ("ans", -2)):
        names = task.ids[kind] if kind == "bos" else task.ids[kind][:, operators]
        assert tokens[at] in (names if task.synonyms else names[:1])
    assert mask[-1]
    assert mask[:-1].all() if task.loss == "all" else not mask[:-1].any()
    assert 0 <= tokens.min() <= tokens.max() < task.vocab_size
    assert str(answer) in task.describe(tokens)


@settings(max_examples=30, deadline=None)
@given(parameters)
def test_compact_ids_do_not_collide(options):
    task = Mano(**options | {"compact_ids": True})
    kinds = {kind: set(rows[rows >= 0].ravel().tolist()) for kind, rows in task.ids.items()}
    names = 2 if task.synonyms else 1
    assert [len(kinds[kind]) for kind in ("bos", "operator", "length", "ans", "value")] == [
        names,
        3 * names,
        names * task.L,
        names * task.L,
        task.modulus,
    ]
    everything = set().union(*kinds.values())
    assert everything == set(range(task.vocab_size))


def test_windows_pack_consecutive_examples():
    task: Any = Mano(L=4, loss="answer")
    for split, per_window in (("train", -(-90 // 7)), ("test", -(-90 // 13))):
        windows = task.windows(3, split, 11, 4, 90)
        for row in range(4):
            pieces = [task.example(3, split, (11 + row) * per_window + i) for i in range(per_window)]
            tokens, mask = (np.concatenate(parts)[:90] for parts in zip(*pieces, strict=True))
            segments = np.concatenate([np.full(len(p[0]), i) for i, p in enumerate(pieces)])[:90]
            assert np.array_equal(windows.tokens[row], tokens)
            assert np.array_equal(windows.loss_mask[row], mask)
            assert np.array_equal(windows.segments[row], segments)


def test_gold_scores_full_marks_and_every_wrong_answer_costs_one():
    task = Mano(L=6, test_lengths="all")
    windows = task.windows(0, "test", 0, 20, 200)
    gold = task.score(windows.tokens, windows.tokens).counts
    assert list(gold) == list(task.groups)
    assert all(right == total > 0 for right, total in gold.values())
    answers = np.isin(np.roll(windows.tokens, 1, axis=1), task.ids["ans"][:, 1:])
    answers[:, 0] = False
    assert sum(total for _, total in gold.values()) == answers.sum()
    for row, t in np.argwhere(answers)[::7]:
        wrong = windows.tokens.copy()
        wrong[row, t] = 5000 + (wrong[row, t] - 5000 + 1) % 23
        assert sum(r for r, _ in task.score(windows.tokens, wrong).counts.values()) == answers.sum() - 1
    elsewhere = np.where(answers, windows.tokens, 0)
    assert task.score(windows.tokens, elsewhere).counts == gold


def test_constant_answer_scores_chance():
    task = Mano(L=4)
    windows = task.windows(0, "test", 0, 600, 260)
    right, total = task.score(windows.tokens, np.full_like(windows.tokens, 5000)).counts["length4"]
    assert total == 600 * 20
    assert right / total == pytest.approx(task.chance("length4"), abs=4 * math.sqrt(0.07 / total))


def test_the_naive_twin_has_the_same_moments():
    task, rng = Mano(L=10), random.Random(0)
    slow = np.array(
        [
            (len(tokens), tokens[-1] == 5000, sum(mask))
            for tokens, mask in (naive.example(task, rng) for _ in range(3000))
        ]
    )
    fast = [task.example(0, "train", i) for i in range(3000)]
    fast = np.array([(len(tokens), tokens[-1] == 5000, mask.sum()) for tokens, mask in fast])
    assert (np.abs(slow.mean(0) - fast.mean(0)) < 4 * np.sqrt((slow.var(0) + fast.var(0)) / 3000)).all()
    tokens, mask, segments = naive.windows(task, rng, 2, 100)
    assert {len(row) for part in (tokens, mask, segments) for row in part} == {100}


def test_examples_depend_on_seed_split_and_index_and_on_nothing_else():
    task: Any = Mano()
    reference = task.example(0, "train", 5)[0]
    assert np.array_equal(reference, Mano().example(0, "train", 5)[0])
    for other in [(1, "train", 5), (0, "val", 5), (0, "train", 6)]:
        assert not np.array_equal(reference, task.example(*other)[0])


def test_examples_never_change():
    """Golden values: a change here changes everybody's data."""
    assert Mano(L=3).example(42, "train", 7)[0].tolist() == GOLDEN


GOLDEN: list[int] = [9998, 20, 2, 5000, 7, 5004, 5019, 25, 5016]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"L": 0}, "Mano.L=0: between 1"),
        ({"modulus": 1}, "Mano.modulus=1"),
        ({"loss": "some"}, "all or answer"),
        ({"test_lengths": "easy"}, "hardest or all"),
        ({"L": 600}, "compact_ids"),
    ],
)
def test_absurd_parameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Mano(**options)


def test_a_broken_example_cannot_be_parsed():
    task = Mano()
    for tokens in ([9999, 20, 1, 5002, 24, 5002], [9999, 20, 5002, 24, 5002], [9999, 20, 1, 5002, 5003, 5005]):
        with pytest.raises((ValueError, IndexError)):
            task.parse(np.array(tokens))
