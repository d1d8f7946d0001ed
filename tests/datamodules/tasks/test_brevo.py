import math
import random
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.datamodules.tasks import Brevo
from src.datamodules.tasks.brevo import Graph
from tests.naive import brevo as naive

SAMPLES = 4000
# The official generator, 4000 samples a row: (multi_token, N, split) -> mean length, its sd, mean labelled, pooled share, mean of shares,
# edges: mean, sd; answer nodes: mean, sd; listed nodes, answer / listed, leaves in the answer, share ambiguous
PUBLISHED = {
    (False, 110, "train"): (186.5, 148.4, 19.90, 0.1067, 0.1466, 81.78, 68.6, 17.90, 13.6, 38.55, 0.573, 4.34, 0.860),
    (False, 110, "test"): (521.6, 57.3, 40.84, 0.0783, 0.0764, 238.9, 22.9, 38.84, 17.7, 109.88, 0.353, 9.86, 0.970),
    (False, 90, "train"): (154.6, 119.3, 17.75, 0.1148, 0.1556, 66.92, 54.9, 15.75, 11.5, 31.67, 0.604, 3.74, 0.848),
    (False, 90, "test"): (428.9, 47.7, 36.47, 0.0850, 0.0831, 194.7, 19.0, 34.47, 14.9, 89.89, 0.383, 8.67, 0.976),
    (False, 70, "train"): (127.8, 93.4, 15.90, 0.1244, 0.1648, 54.46, 42.6, 13.90, 9.6, 26.15, 0.624, 3.33, 0.823),
    (False, 70, "test"): (336.3, 38.1, 31.31, 0.0931, 0.0913, 151.0, 15.2, 29.31, 12.0, 69.93, 0.419, 7.21, 0.977),
    (True, 50, "train"): (291.5, 216.4, 37.36, 0.1282, 0.1638, 40.18, 30.9, 11.44, 7.5, 19.69, 0.664, 2.71, 0.791),
    (True, 50, "test"): (760.5, 92.6, 75.56, 0.0994, 0.0974, 107.2, 11.3, 23.21, 9.1, 49.94, 0.465, 5.48, 0.971),
    (True, 40, "train"): (243.3, 170.9, 33.15, 0.1363, 0.1714, 33.31, 24.6, 10.14, 6.3, 16.64, 0.685, 2.43, 0.775),
    (True, 40, "test"): (607.2, 75.2, 64.90, 0.1069, 0.1052, 85.7, 9.3, 20.07, 7.3, 39.97, 0.502, 4.64, 0.969),
    (True, 30, "train"): (187.2, 127.9, 27.98, 0.1495, 0.1846, 25.18, 18.4, 8.50, 5.0, 13.05, 0.716, 2.10, 0.721),
    (True, 30, "test"): (449.6, 59.8, 52.80, 0.1174, 0.1157, 63.2, 7.5, 16.39, 5.7, 29.96, 0.547, 3.86, 0.966),
}
# P(depth = 1, 2, 3, 4, 5, 6, 7 or more)
DEPTHS = {
    (False, 110, "test"): (0.109, 0.370, 0.295, 0.138, 0.067, 0.019, 0.003),
    (False, 70, "train"): (0.237, 0.451, 0.230, 0.070, 0.012, 0.002, 0),
    (True, 50, "test"): (0.111, 0.389, 0.315, 0.140, 0.040, 0.005, 0.0005),
}
# shares of words of two, three and four tokens
WORDS = {
    (50, "test"): (0.235, 0.361, 0.404),
    (50, "train"): (0.276, 0.352, 0.372),
    (30, "test"): (0.275, 0.351, 0.373),
}
EXACT_TRAINING_N = {
    110: (37.912, 29.995),
    90: (32.004, 24.524),
    70: (25.947, 19.029),
    50: (19.687, 13.502),
    40: (16.452, 10.722),
    30: (13.119, 7.929),
}


def ambiguous(graph: Graph) -> bool:
    """Whether the answer's nodes have more than one order: some two neighbours of it could change places."""
    parents = graph.parents()
    return any(a not in parents.get(b, []) for a, b in zip(graph.answer, graph.answer[1:], strict=False))


def measure(task, split):
    rows, depths, words, in_degrees = [], [], np.zeros(5), np.zeros(5)
    for i in range(SAMPLES):
        tokens, mask = task.example(4, split, i)
        graph = task.parse(tokens)
        parents = graph.parents()
        listed = {node for edge in graph.edges for node in edge}
        m = len(graph.answer)
        leaves = sum(node not in parents for node in graph.answer)
        rows.append(
            (
                len(tokens),
                mask.sum(),
                mask.mean(),
                len(graph.edges),
                m,
                len(listed),
                m / len(listed),
                leaves,
                ambiguous(graph),
            )
        )
        depths.append(graph.depth())
        for node in listed:
            words[len(node)] += 1
            in_degrees[len(parents.get(node, []))] += 1
    return np.array(rows, dtype=float).T, np.array(depths), words, in_degrees


def close(found, published, sd):
    """Within four standard errors of the difference of two means over SAMPLES each; the published one is rounded too."""
    digits = len(str(published).partition(".")[2])
    return abs(found - published) <= 4 * sd * math.sqrt(2 / SAMPLES) + 0.5 * 10**-digits


def sd_error(values):
    """Standard deviation of a sample's standard deviation, times the root of the sample's size."""
    kurtosis = ((values - values.mean()) ** 4).mean() / values.var() ** 2
    return values.std() * math.sqrt((kurtosis - 1) / 4)


@pytest.mark.parametrize("setting", PUBLISHED, ids=str)
def test_statistics_of_the_official_generator(setting):
    multi, N, split = setting
    (length, labelled, share, edges, m, listed, ratio, leaves, twofold), depths, words, in_degrees = measure(
        Brevo(N=N, multi_token=multi), split
    )
    expected = PUBLISHED[setting]
    for values, mean in zip(
        (length, labelled, share, edges, m, listed, leaves, twofold),
        (expected[0], expected[2], expected[4], expected[5], expected[7], expected[9], expected[11], expected[12]),
        strict=True,
    ):
        assert close(values.mean(), mean, values.std())
    # The table does not say whether m/nodes is a ratio of means (test rows) or a mean of ratios (train rows): it is either.
    assert close(ratio.mean(), expected[10], ratio.std()) or close(m.sum() / listed.sum(), expected[10], ratio.std())
    for values, sd in ((length, expected[1]), (edges, expected[6]), (m, expected[8])):
        assert close(values.std(), sd, sd_error(values))
    pooled = labelled.sum() / length.sum()
    assert close(pooled, expected[3], (labelled - pooled * length).std() / length.mean())
    if setting in DEPTHS:
        for depth, p in enumerate(DEPTHS[setting], start=1):
            found = (depths == depth).mean() if depth < 7 else (depths >= 7).mean()
            assert close(found, p, math.sqrt(max(p, 1e-3)))
    if multi and (N, split) in WORDS:
        # Words of one example repel each other, so their number overstates the error: a generous bound.
        assert (np.abs(words[2:] / words.sum() - WORDS[N, split]) < 4 * 0.5 * math.sqrt(2 / words.sum()) + 5e-4).all()
    if split == "test":
        # The first nodes have fewer candidates, which shows when there are few nodes.
        assert (np.abs(in_degrees[1:] / in_degrees[1:].sum() - 0.25) < (0.006 if N >= 50 else 0.012)).all()


@pytest.mark.parametrize("N", EXACT_TRAINING_N)
def test_law_of_n_is_the_published_one(N):
    n, p = np.arange(3, N + 1), Brevo(N=N).length_probabilities
    mean = (n * p).sum()
    assert (round(mean, 3), round(math.sqrt((n**2 * p).sum() - mean**2), 3)) == EXACT_TRAINING_N[N]


MICRO = [9999, 2, 5, 4, 3, 4, 2, 1, 2, 2, 3, 1, 3, 9997, 5, 9998, 4, 1, 2, 5, 9999]
MULTI = [9999, 1, 7, 3, 1, 2, 6, 3, 1, 2, 6, 2, 8, 9997, 2, 8, 9998, 1, 7, 3, 1, 2, 6, 2, 8, 9999]


def verdicts(task, tokens):
    """Strict and official verdict on a written example."""
    return task.is_valid(np.array(tokens)), task.is_valid(np.array(tokens), strict=False)


def test_micro_samples_of_the_release():
    task = Brevo(N=5)
    graph = task.parse(np.array(MICRO))
    assert graph.required() == {(1,), (2,), (4,), (5,)}
    assert graph.depth() == 2
    assert task.prompt_length(np.array(MICRO)) == 16
    assert verdicts(task, MICRO) == (1, 1)
    assert verdicts(task, [*MICRO[:16], 1, 4, 2, 5, 9999]) == (1, 1)  # the other valid order
    graph = Brevo(N=5, multi_token=True).parse(np.array(MULTI))
    assert graph.edges == [((1, 7), (3, 1, 2, 6)), ((3, 1, 2, 6), (2, 8))]
    assert graph.answer == [(1, 7), (3, 1, 2, 6), (2, 8)]
    assert verdicts(Brevo(N=5, multi_token=True), MULTI) == (1, 1)
    words = task.describe(np.array(MICRO))
    assert "2->5" in words
    assert "idle      3" in words


@pytest.mark.parametrize(
    ("answer", "strict", "official"),
    [
        ([4, 1, 2, 5], 1, 1),
        ([4, 2, 1, 5], 0, 0),  # 2 before its parent 1
        ([4, 1, 2], 0, 0),  # without the query
        ([1, 2, 5], 0, 0),  # 4 is missing
        ([4, 1, 2, 3, 5], 0, 0),  # 3 is no ancestor
        ([4, 1, 4, 2, 5], 0, 1),  # twice
        ([4, 1, 2, 5, 1], 0, 1),  # behind the query
        ([], 0, 0),
    ],
)
def test_both_checkers(answer, strict, official):
    assert verdicts(Brevo(N=5), [*MICRO[:16], *answer, 9999]) == (strict, official)


def test_checkers_of_words():
    task = Brevo(N=5, multi_token=True)
    assert verdicts(task, [*MULTI[:-1], 3, 3, 9999]) == (0, 1)  # an unfinished word
    assert verdicts(task, [*MULTI[:-2], 9999]) == (0, 0)
    assert verdicts(task, [*MULTI[:14], *MULTI[16:]]) == (0, 0)  # nothing is asked, where the release crashes
    assert verdicts(task, MULTI[:-1]) == verdicts(task, []) == (0, 0)


def test_an_unfinished_answer_is_wrong_when_written_and_does_not_count_when_cut():
    task = Brevo(N=5)
    written = np.array([[*MICRO[:-1], -1]])
    assert sum(total for _, total in task.score(written, written).counts.values()) == 1
    assert sum(right for right, _ in task.score(written, written).counts.values()) == 0
    cut = np.array([MICRO[:-1]])
    assert sum(total for _, total in task.score(cut, cut).counts.values()) == 0


parameters = st.builds(
    dict,
    N=st.integers(3, 40),
    multi_token=st.booleans(),
    mini_vocab=st.integers(4, 9),
    word_length=st.sampled_from([(2, 4), (3, 3), (2, 3), (5, 8)]),
    query=st.sampled_from(["last", "last_quarter"]),
    eos=st.sampled_from(["bos", "ans", "own"]),
    compact_ids=st.booleans(),
)


@settings(max_examples=80, deadline=None)
@given(parameters, st.sampled_from(["train", "val", "test"]), st.integers(0, 2**40), st.integers(0, 2**31))
def test_every_example_is_what_the_head_of_the_file_says(options, split, index, seed):
    task = Brevo(**options)
    tokens, mask = task.example(seed, split, index)
    graph = task.parse(tokens)
    assert graph.is_right(strict=True)
    assert graph.is_right(strict=False)
    assert len(set(graph.edges)) == len(graph.edges)
    listed = {node for edge in graph.edges for node in edge}
    assert len(listed) <= task.N
    parents = graph.parents()
    children = [parent for parent, _ in graph.edges]
    assert max(len(found) for found in parents.values()) <= 4
    assert max(children.count(node) for node in listed) <= 4
    start = task.prompt_length(tokens)
    assert not mask[: start - 1].any()
    assert mask[start - 1 :].all()
    assert tokens[0] == task.bos_id
    assert tokens[-1] == task.eos_id
    assert 0 <= tokens.min() <= tokens.max() < task.vocab_size
    assert len(tokens) <= task.max_length
    if task.query == "last":
        assert graph.query not in children
    assert f"answer    {'.'.join(map(str, graph.answer[0]))}" in task.describe(tokens)


@settings(max_examples=40, deadline=None)
@given(st.booleans(), st.integers(0, 2**31), st.data())
def test_a_wrong_token_in_the_answer_is_found(multi, index, data):
    """One-token nodes: any other id is wrong, except where the order allows a swap, which takes two. Words: as strict."""
    task = Brevo(N=12, multi_token=multi, compact_ids=True)
    tokens, _ = task.example(0, "test", index)
    start = task.prompt_length(tokens)
    at = data.draw(st.integers(start, len(tokens) - 1))
    other = data.draw(st.integers(0, task.vocab_size - 1).filter(lambda token: token != tokens[at]))
    corrupt = tokens.copy()
    corrupt[at] = other
    row = np.append(corrupt, -1)[None]
    assert sum(right for right, _ in task.score(row, row).counts.values()) == 0


@pytest.mark.parametrize("multi", [False, True])
def test_teacher_forced_score_takes_question_and_answer_from_different_places(multi):
    task = Brevo(N=9, multi_token=multi)
    windows = task.windows(0, "test", 0, 20, 400)
    gold = task.score(windows.tokens, np.where(windows.loss_mask, windows.tokens, 0)).counts
    assert all(right == total for right, total in gold.values())
    assert sum(total for _, total in gold.values()) > 20
    nothing = task.score(windows.tokens, np.zeros_like(windows.tokens)).counts
    assert sum(right for right, _ in nothing.values()) == 0
    assert [total for _, total in nothing.values()] == [total for _, total in gold.values()]


def test_number_of_orders():
    graph = Brevo(N=5).parse(np.array(MICRO))
    assert graph.num_orders() == 2  # 4 1 2 5 and 1 4 2 5
    for i in range(50):
        graph = Brevo(N=6).parse(Brevo(N=6).example(0, "test", i)[0])
        orders = [p for p in permutations(graph.answer) if graph._replace(answer=list(p)).is_right()]
        assert graph.num_orders() == len(orders)
        assert ambiguous(graph) == (len(orders) > 1)


@pytest.mark.parametrize("N", [3, 5, 6, 9])
def test_chance_is_what_guesses_that_ignore_the_edges_score(N):
    """Guesses of the length that is best over all, at random from the listed nodes, the query last."""
    task, rng = Brevo(N=N), random.Random(0)
    right, depths = np.zeros((3000, N + 1)), np.zeros(3000, dtype=int)
    for i in range(3000):
        graph = task.parse(task.example(1, "test", i)[0])
        others = list({node for edge in graph.edges for node in edge} - {graph.query})
        depths[i] = graph.depth()
        for m in range(1, len(others) + 2):
            right[i, m] = graph._replace(answer=[*rng.sample(others, m - 1), graph.query]).is_right()
    best = right[:, right.sum(axis=0).argmax()]
    p = task.overall_chance()
    assert abs(best.mean() - p) < 5 * math.sqrt(p / 3000)
    p = task.chance("depth1")
    assert abs(best[depths == 1].mean() - p) < 5 * math.sqrt(p / (depths == 1).sum())


def test_chance_of_large_graphs_is_called_none():
    assert Brevo(N=11).chance("depth1") == Brevo(N=11).overall_chance() == 0
    assert Brevo(N=11)._blind_guess["all"] < 3.5e-3


@pytest.mark.parametrize("multi", [False, True])
def test_windows_pack_consecutive_examples(multi):
    task: Any = Brevo(N=9, multi_token=multi)
    for split, shortest in (("train", 4 + 7 * (2 if multi else 1)), ("test", 4 + 15 * (2 if multi else 1))):
        length = 130
        windows = task.windows(3, split, 11, 4, length)
        per_window = -(-length // shortest)
        for row in range(4):
            pieces = [task.example(3, split, (11 + row) * per_window + i) for i in range(per_window)]
            tokens, mask = (np.concatenate(parts)[:length] for parts in zip(*pieces, strict=True))
            segments = np.concatenate([np.full(len(p[0]), i) for i, p in enumerate(pieces)])[:length]
            assert np.array_equal(windows.tokens[row], tokens)
            assert np.array_equal(windows.loss_mask[row], mask)
            assert np.array_equal(windows.segments[row], segments)


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("N", [3, 4, 5, 9, 30])
def test_no_example_is_shorter_than_windows_reckon(multi, N):
    task = Brevo(N=N, multi_token=multi, query="last_quarter")
    for split in ("train", "test"):
        edges = 2 if split == "train" else N - (N - 1) // 4 - 1
        shortest = 4 + (2 * edges + 3) * (2 if multi else 1)
        assert min(len(task.example(0, split, i)[0]) for i in range(300)) >= shortest


def test_queries_of_the_last_quarter_are_no_longer_all_last():
    paper, release = Brevo(N=24, query="last_quarter"), Brevo(N=24)
    for task, share in ((paper, 1), (release, 0)):
        graphs = [task.parse(task.example(0, "test", i)[0]) for i in range(300)]
        assert any(graph.query in {parent for parent, _ in graph.edges} for graph in graphs) == share


def test_the_naive_twin_has_the_same_moments():
    for task in (Brevo(N=30), Brevo(N=12, multi_token=True, query="last_quarter")):
        rng = random.Random(0)
        slow, fast = [], []
        for i in range(1500):
            for found, (tokens, mask) in ((slow, naive.example(task, rng)), (fast, task.example(0, "train", i))):
                graph = task.parse(np.array(tokens))
                assert graph.is_right()
                found.append((len(tokens), sum(mask), len(graph.edges), len(graph.answer), graph.depth()))
        slow, fast = np.array(slow), np.array(fast)
        assert (np.abs(slow.mean(0) - fast.mean(0)) < 4 * np.sqrt((slow.var(0) + fast.var(0)) / 1500)).all()
        assert {len(row) for part in naive.windows(task, rng, 2, 100) for row in part} == {100}


def test_batches_are_examples_one_a_row():
    task = Brevo(N=9)
    batch = task.batch(0, "train", 5, 3)
    for row in range(3):
        tokens, mask = task.example(0, "train", 5 + row)
        n = batch.lengths[row]
        assert np.array_equal(batch.tokens[row, :n], tokens)
        assert np.array_equal(batch.loss_mask[row, :n], mask)
        assert not batch.tokens[row, n:].any()
        assert not batch.loss_mask[row, n:].any()


def test_examples_depend_on_seed_split_and_index_and_on_nothing_else():
    task: Any = Brevo(N=20)
    reference = task.example(0, "train", 5)[0]
    assert np.array_equal(reference, Brevo(N=20).example(0, "train", 5)[0])
    for other in [(1, "train", 5), (0, "val", 5), (0, "train", 6)]:
        assert not np.array_equal(reference, task.example(*other)[0])


def test_examples_never_change():
    """Golden values: a change here changes everybody's data."""
    assert Brevo(N=5).example(42, "train", 7)[0].tolist() == GOLDEN
    assert Brevo(N=4, multi_token=True).example(42, "train", 7)[0].tolist() == GOLDEN_MULTI


GOLDEN: list[int] = [9999, 2, 3, 5, 3, 2, 5, 9997, 3, 9998, 2, 5, 3, 9999]
GOLDEN_MULTI: list[int] = [
    9999,
    1,
    8,
    2,
    3,
    5,
    1,
    8,
    2,
    4,
    6,
    2,
    4,
    6,
    2,
    3,
    5,
    9997,
    2,
    3,
    5,
    9998,
    1,
    8,
    2,
    4,
    6,
    2,
    3,
    5,
    9999,
]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"N": 2}, "Brevo.N=2: between 3"),
        ({"N": 50, "multi_token": True, "word_length": (2, 2)}, "only 16 different words"),
        ({"multi_token": True, "word_length": (4, 2)}, "shortest <= longest"),
        ({"multi_token": True, "mini_vocab": 0}, "Brevo.mini_vocab=0"),
        ({"query": "first"}, "last, last_quarter"),
        ({"eos": "none"}, "bos, ans, own"),
        ({"N": 9996}, "compact_ids"),
    ],
)
def test_absurd_parameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Brevo(**options)
