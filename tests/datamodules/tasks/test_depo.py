import math
import random
from collections import Counter
from itertools import combinations, permutations, product
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from src.datamodules.tasks import Depo
from src.datamodules.tasks import depo as depo_module
from src.datamodules.tasks.rng import below_pair
from tests.naive import depo as naive

# spec of the official generator, 4000 samples each:
# setting -> mean length, sd of length, mean labelled, mean of per-sample label share, mean word length, share of k mod n = 0
PUBLISHED = {
    ("depo1", 375, "train"): (433.4, 381.2, 25.26, 0.1247, 1.740, 0.0078),
    ("depo1", 375, "test"): (1458.4, 1.58, 28.68, 0.01966, 1.867, 0.0),
    ("depo1", 300, "train"): (355.5, 300.0, 24.95, 0.1374, 1.707, 0.0093),
    ("depo1", 300, "test"): (1158.2, 1.92, 28.37, 0.02449, 1.834, 0.0),
    ("depo1", 225, "train"): (283.2, 221.2, 24.54, 0.1504, 1.666, 0.0107),
    ("depo1", 225, "test"): (859.3, 3.03, 27.82, 0.03237, 1.784, 0.0),
    ("depo2", 125, "train"): (641.3, 426.9, 64.70, 0.1502, 6.013, 0.0255),
    ("depo2", 125, "test"): (1648.0, 18.8, 70.25, 0.04263, 6.026, 0.0),
    ("depo2", 100, "train"): (547.6, 340.3, 64.24, 0.1624, 6.010, 0.0290),
    ("depo2", 100, "test"): (1345.5, 17.5, 70.22, 0.05219, 6.020, 0.0),
    ("depo2", 75, "train"): (459.0, 260.3, 62.97, 0.1762, 6.007, 0.0345),
    ("depo2", 75, "test"): (1043.7, 15.9, 70.12, 0.06718, 6.016, 0.0),
}
EXACT_TRAINING_N = {
    375: (109.541, 101.206),
    300: (90.080, 81.219),
    225: (70.102, 61.121),
    125: (42.264, 34.083),
    75: (27.478, 20.406),
}
ONE_TOKEN_WORDS = {
    (375, "test"): 0.133,
    (300, "test"): 0.166,
    (225, "test"): 0.216,
    (375, "train"): 0.260,
    (225, "train"): 0.334,
}
TEN_QUESTIONS = {
    ("depo1", 375): 0.899,
    ("depo1", 300): 0.882,
    ("depo1", 225): 0.870,
    ("depo2", 125): 0.820,
    ("depo2", 75): 0.766,
}
SAMPLES = 4000


def depo(variant: str, N: int) -> Any:
    if variant == "depo1":
        return Depo(N=N, K=8, mini_vocab=50, word_length=(1, 2))
    return Depo(N=N, K=16, mini_vocab=3, word_length=(5, 7))


def measure(task, split):
    """Per sample: length, labelled, share, number of words and their tokens, one-token words, questions, k mod n = 0."""
    rows = []
    for i in range(SAMPLES):
        tokens, mask = task.example(1, split, i)
        first_question = int(np.argmax(tokens > 9000)) if tokens[0] != 9999 else 1 + int(np.argmax(tokens[1:] > 9000))
        edge_part = tokens[1:first_question]
        n = int((edge_part > task.mini_vocab).sum()) // 2
        hops = tokens[(tokens > 9000) & (tokens < 9500)] - 9000
        ends = np.flatnonzero(edge_part > task.mini_vocab)
        one_token = int((np.diff(ends, prepend=-1) == 1).sum()) / 2
        rows.append(
            (len(tokens), mask.sum(), mask.mean(), n, len(edge_part) / 2, one_token, len(hops), (hops % n == 0).sum())
        )
    return np.array(rows, dtype=float)


def within_four_errors(found, published, sd):
    """Both numbers are means over SAMPLES samples; the published one is also rounded."""
    return abs(found - published) <= 4 * sd * math.sqrt(2 / SAMPLES) + 0.5 * 10 ** -_decimals(published)


def _decimals(x):
    return len(str(x).partition(".")[2])


@pytest.mark.parametrize("setting", PUBLISHED, ids=lambda s: "-".join(map(str, s)))
def test_statistics_of_the_official_generator(setting):
    variant, N, split = setting
    mean_length, sd_length, labelled, share, word_length, wrapped = PUBLISHED[setting]
    length, label, label_share, n, word_tokens, one_token, questions, k_wraps = measure(depo(variant, N), split).T
    assert within_four_errors(length.mean(), mean_length, length.std())
    # A standard deviation's own error: sqrt((kurtosis - 1) / 4n) times it.
    kurtosis = ((length - length.mean()) ** 4).mean() / length.var() ** 2
    assert within_four_errors(length.std(), sd_length, length.std() * math.sqrt((kurtosis - 1) / 4))
    assert within_four_errors(label.mean(), labelled, label.std())
    assert within_four_errors(label_share.mean(), share, label_share.std())
    # Ratios of sums; error by the delta method.
    found = word_tokens.sum() / n.sum()
    assert within_four_errors(found, word_length, (word_tokens - found * n).std() / n.mean())
    found = k_wraps.sum() / questions.sum()
    assert within_four_errors(found, wrapped, (k_wraps - found * questions).std() / questions.mean())
    if (N, split) in ONE_TOKEN_WORDS and variant == "depo1":
        found = one_token.sum() / n.sum()
        assert within_four_errors(found, ONE_TOKEN_WORDS[N, split], (one_token - found * n).std() / n.mean())
    if split == "train" and (variant, N) in TEN_QUESTIONS:
        assert within_four_errors((questions == 10).mean(), TEN_QUESTIONS[variant, N], (questions == 10).std())


@pytest.mark.parametrize("N", EXACT_TRAINING_N)
def test_law_of_n_is_the_published_one(N):
    n, p = np.arange(3, N + 1), Depo(N=N).length_probabilities
    mean = (n * p).sum()
    assert (round(mean, 3), round(math.sqrt((n**2 * p).sum() - mean**2), 3)) == EXACT_TRAINING_N[N]


MICRO = [9999, *[5, 2, 6, 2, 5, 1, 5, 6, 5, 2, 6, 2, 5, 1, 5, 6]]
MICRO += [9004, 1, 5, 9500, 2, 5, 9003, 6, 9500, 2, 5, 9002, 5, 9500, 2, 5, 9004, 2, 6, 9500, 5, 9004, 2, 5, 9500, 2, 6]
MICRO_MASK = "0" * 17 + "000111" + "00111" + "00111" + "00011" + "000111"


def test_micro_sample_of_the_release_parses_to_its_cycle():
    task = Depo(N=5, K=4, mini_vocab=3)
    text = task.describe(np.array(MICRO))
    assert "5 -> 2.6 -> 2.5 -> 1.5 -> 6 -> 5" in text
    assert "question 4 steps from 1.5?  2.5" in text
    assert mask_of(task, np.array(MICRO)) == MICRO_MASK
    windows = np.array([MICRO])
    assert task.score(windows, windows).counts == {"hop1": (0, 0), "hop2": (1, 1), "hop3": (1, 1), "hop4": (3, 3)}


def mask_of(task, tokens):
    """An independent reading: <ans> and what follows up to and including a word-ending token."""
    mask, open_answer = [], False
    for token in tokens:
        mask.append("1" if token == task.ans_id or open_answer else "0")
        if token == task.ans_id:
            open_answer = True
        elif open_answer and task.mini_vocab < token <= 2 * task.mini_vocab:
            open_answer = False
    return "".join(mask)


def possible(options):
    """There are enough words."""
    shortest, longest = options["word_length"]
    return sum(options["mini_vocab"] ** length for length in range(shortest, longest + 1)) >= options["N"]


parameters = st.builds(
    dict,
    N=st.integers(3, 30),
    K=st.integers(1, 40),
    mini_vocab=st.one_of(st.integers(1, 3), st.integers(4, 60)),
    word_length=st.sampled_from([(1, 1), (1, 2), (2, 2), (2, 4), (3, 3), (5, 7)]),
    questions=st.integers(1, 12),
    separator=st.booleans(),
    compact_ids=st.booleans(),
    length_law=st.sampled_from(["weighted", "uniform"]),
).filter(possible)


@settings(max_examples=60, deadline=None)
@given(parameters, st.sampled_from(["train", "val", "test"]), st.integers(0, 2**40), st.integers(0, 2**31))
def test_every_example_is_a_cycle_with_right_answers(options, split, index, seed):
    task = Depo(**options)
    tokens, mask = task.example(seed, split, index)
    edges, questions = task.parse(tokens)
    n = len(edges)
    assert 3 <= n <= task.N if split == "train" else n == task.N
    assert len(questions) == min(n, task.questions)
    assert len({word for _, word, _ in questions}) == len(questions)
    assert "".join("01"[int(m)] for m in mask) == mask_of(task, tokens)
    assert tokens[0] == task.bos_id
    assert tokens.max() < task.vocab_size
    assert len(tokens) <= task.max_length

    successor = dict(edges)
    walk = [edges[0][0]]
    while (following := successor[walk[-1]]) != walk[0]:
        walk.append(following)
    assert len(walk) == n == len(successor)
    allowed = range(1, task.K + 1) if split == "train" else task.evaluation_hops
    for k, word, answer in questions:
        assert k in allowed
        assert answer == walk[(walk.index(word) + k) % n]


def test_examples_depend_on_seed_split_and_index_and_on_nothing_else():
    task: Any = Depo(N=20)
    reference = task.example(0, "train", 5)[0]
    assert np.array_equal(reference, Depo(N=20).example(0, "train", 5)[0])
    for other in [(1, "train", 5), (0, "val", 5), (0, "train", 6)]:
        assert not np.array_equal(reference, task.example(*other)[0])


@pytest.mark.parametrize("mini_vocab", [3, 300])
def test_examples_never_change(mini_vocab):
    """Golden values: a change here changes everybody's data. 300 inner tokens: more words than are tabulated."""
    tokens, _ = Depo(N=5, K=4, mini_vocab=mini_vocab).example(42, "train", 7)
    assert " ".join(map(str, tokens)) == GOLDEN[mini_vocab]


GOLDEN = {
    3: "9999 5 3 4 6 3 6 3 6 4 3 4 6 4 5 9002 3 4 9500 3 6 9004 5 9500 4 9004 6 9500 3 4 9001 3 6 9500 4 9001 4 9500 5",
    300: "9999 497 481 27 371 145 339 145 339 497 481 309 309 27 371 "
    "9001 497 9500 481 9001 27 371 9500 145 339 9002 145 339 9500 481 9003 481 9500 145 339 9001 309 9500 27 371",
}


# ---- the law ---------------------------------------------------------------------------------------------------------


def moments(tokens, mask, segments):
    """Of each window: numbers that tell much of the law, and the least ids' shares."""
    tokens, mask, segments = np.asarray(tokens), np.asarray(mask), np.asarray(segments)
    hops = np.where((tokens > 9000) & (tokens < 9500), tokens - 9000, 0)
    adjacent = tokens[:, :-1] == tokens[:, 1:]
    columns = [
        *(mask.sum(axis=1), segments.max(axis=1), segments.mean(axis=1), (segments == 0).sum(axis=1)),
        *((hops > 0).sum(axis=1), hops.sum(axis=1), (hops**2).sum(axis=1), adjacent.sum(axis=1)),
        *(
            (mask[:, :-1] & adjacent).sum(axis=1),
            (mask & (segments == 1)).sum(axis=1),
            mask[:, -1],
            tokens[:, -1] > 9000,
        ),
        *((tokens == token).sum(axis=1) for token in (1, 2, 3, 4, 5, 6, 51, 52, 9500, 9700, 9999)),
        *((mask & (tokens == token)).sum(axis=1) for token in (1, 3, 4, 51, 9500)),
    ]
    return np.stack(columns, axis=1).astype(float)


@pytest.mark.parametrize("tabulated", [True, False], ids=["tabulated", "composed"])
@pytest.mark.parametrize(
    "options",
    [
        {"N": 40, "mini_vocab": 50, "word_length": (1, 2)},
        {"N": 25, "K": 16, "mini_vocab": 3, "word_length": (5, 7)},
        {"N": 6, "mini_vocab": 2, "word_length": (1, 2), "questions": 3, "separator": True, "length_law": "uniform"},
    ],
    ids=["depo1", "depo2", "all words used up"],
)
def test_same_law_as_the_naive_twin(options, tabulated, monkeypatch):
    if not tabulated:
        monkeypatch.setattr(depo_module, "MAX_LEXICON", 0)
    task: Any = Depo(**options)
    count, length = 600, 384
    windows = task.windows(0, "train", 0, 8 * count, length)
    found = moments(windows.tokens, windows.loss_mask, windows.segments)
    expected = moments(*naive.windows(task, random.Random(1), count, length))
    error = np.sqrt(found.var(axis=0) / len(found) + expected.var(axis=0) / len(expected))
    difference = np.abs(found.mean(axis=0) - expected.mean(axis=0))
    assert (difference <= 4.5 * error).all(), (difference / np.maximum(error, 1e-9)).round(1)


@pytest.mark.parametrize("tabulated", [True, False], ids=["tabulated", "composed"])
def test_sets_of_words_follow_the_law_of_plain_rejection(tabulated, monkeypatch):
    """Exactly: the chance of drawing word after word, given that none comes twice."""
    if not tabulated:
        monkeypatch.setattr(depo_module, "MAX_LEXICON", 0)
    task: Any = Depo(N=3, mini_vocab=2, word_length=(1, 2), questions=1)
    ends = {1: [(3,), (4,)], 2: [(a, b) for a in (1, 2) for b in (3, 4)]}
    chance = {word: 1 / (2 * len(words)) for words in ends.values() for word in words}
    expected = dict.fromkeys(map(frozenset, combinations(chance, 3)), 0.0)
    for first, second, third in permutations(chance, 3):
        left = 1 - chance[first]
        p = chance[first] * chance[second] / left * chance[third] / (left - chance[second])
        expected[frozenset((first, second, third))] += p
    samples = 8000
    found = Counter(
        frozenset(word for edge in task.parse(task.example(5, "test", i)[0])[0] for word in edge)
        for i in range(samples)
    )
    assert set(found) <= set(expected)
    assert stats.chisquare([found[words] for words in expected], [samples * p for p in expected.values()]).pvalue > 1e-4


def test_cycle_order_of_edges_and_questions_are_uniform_and_independent():
    """All 3! cycles through four words, all 4! orders of edges, all 12 ordered pairs of questions, all 2 * 2 hops."""
    task: Any = Depo(N=4, K=2, mini_vocab=4, word_length=(1, 1), questions=2)
    samples, found = 40_000, Counter()
    for i in range(samples):
        edges, ((k, w, _), (m, v, _)) = task.parse(task.example(9, "val", i)[0])
        successor = dict(edges)
        first = successor[(5,)]
        cycle = (first, successor[first])
        found["structure", cycle, tuple(x for x, _ in edges)] += 1
        found["questions", cycle, w, v, k, m] += 1
        found["both", edges[0][0], edges[1][0], w, v] += 1
    words = [(5,), (6,), (7,), (8,)]
    cells = {
        "structure": [(c, o) for c in permutations(words[1:], 2) for o in permutations(words)],
        "questions": [
            (c, *q, *h)
            for c, q, h in product(permutations(words[1:], 2), permutations(words, 2), product((1, 2), repeat=2))
        ],
        "both": [(*o, *q) for o in permutations(words, 2) for q in permutations(words, 2)],
    }
    for kind, keys in cells.items():
        counts = [found[(kind, *key)] for key in keys]
        assert sum(counts) == samples
        assert stats.chisquare(counts).pvalue > 1e-4, kind


def test_two_draws_from_one_word_are_uniform_and_independent():
    """With bounds of 3 * 2^30, nearly half of all words must be thrown away."""
    stream = np.array([1, 3], dtype=np.uint64)
    draws = np.array([below_pair(stream, 3 * 2**30, 3 * 2**30) for _ in range(30_000)])
    assert stats.chisquare(np.bincount((draws // 2**28) @ np.array([12, 1]), minlength=144)).pvalue > 1e-4
    draws = np.array([below_pair(stream, 5, 7) for _ in range(30_000)])
    assert stats.chisquare(np.bincount(draws @ np.array([7, 1]), minlength=35)).pvalue > 1e-4


# ---- windows ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(parameters, st.sampled_from(["train", "test"]), st.integers(0, 2**40), st.integers(1, 300))
def test_windows_are_their_examples_end_to_end(options, split, first, length):
    task = Depo(**options)
    windows = task.windows(3, split, first, 3, length)
    n, word = 3 if split == "train" else task.N, task.word_length[0]
    shortest = 1 + n * (2 * word + task.separator) + min(n, task.questions) * (2 + 2 * word)
    per_window = -(-length // shortest)
    for row in range(3):
        pieces = [task.example(3, split, (first + row) * per_window + i) for i in range(per_window)]
        tokens, mask = (np.concatenate(parts)[:length] for parts in zip(*pieces, strict=True))
        segments = np.concatenate([np.full(len(p[0]), i) for i, p in enumerate(pieces)])[:length]
        assert np.array_equal(windows.tokens[row], tokens)
        assert np.array_equal(windows.loss_mask[row], mask)
        assert np.array_equal(windows.segments[row], segments)


def test_window_w_does_not_depend_on_which_batch_asks_for_it():
    task = Depo(N=9, mini_vocab=9)
    together = task.windows(0, "train", 0, 6, 64).tokens
    assert np.array_equal(together[2:5], task.windows(0, "train", 2, 3, 64).tokens)


def test_gold_scores_full_marks_and_one_wrong_token_costs_one_answer():
    task = Depo(N=12, K=8, mini_vocab=4)
    windows = task.windows(0, "test", 0, 50, 256)
    gold = task.score(windows.tokens, windows.tokens).counts
    assert all(right == total > 0 for right, total in gold.values())
    wrong = windows.tokens.copy()
    answers = np.argwhere(windows.loss_mask & (windows.tokens != task.ans_id))
    complete = [(r, t) for r, t in answers if (windows.tokens[r, t:] > task.mini_vocab)[: 256 - t].any()]
    row, t = complete[0]
    wrong[row, t] = 1 + wrong[row, t] % task.mini_vocab
    scored = task.score(windows.tokens, wrong).counts
    assert sum(r for r, _ in gold.values()) - sum(r for r, _ in scored.values()) == 1
    assert [t for _, t in gold.values()] == [t for _, t in scored.values()]


def test_only_answers_are_looked_at():
    task = Depo(N=12, K=8, mini_vocab=4)
    windows = task.windows(0, "test", 0, 5, 256)
    nonsense = np.where(windows.loss_mask, windows.tokens, -1)
    assert task.score(windows.tokens, nonsense).counts == task.score(windows.tokens, windows.tokens).counts


def test_an_answer_cut_by_the_window_does_not_count():
    task = Depo(N=5, K=4, mini_vocab=3)
    cut = np.array([MICRO[:-1]])
    assert sum(total for _, total in task.score(cut, cut).counts.values()) == 4


@pytest.mark.parametrize(("N", "K", "questions"), [(8, 2, 10), (4, 2, 10), (12, 4, 5), (3, 2, 10)])
def test_chance_is_what_one_scores_who_never_reads_an_edge(N, K, questions):
    """Any listed word but the one asked about and the answers to earlier questions with the same k."""
    task, rng = Depo(N=N, K=K, mini_vocab=8, questions=questions), random.Random(0)
    right = {k: [] for k in task.evaluation_hops}
    for i in range(3000):
        edges, asked = task.parse(task.example(2, "test", i)[0])
        seen: dict[int, set] = {}
        for k, word, answer in asked:
            left = [x for x, _ in edges if x != word and x not in seen.setdefault(k, set())]
            right[k].append(rng.choice(left) == answer)
            seen[k].add(answer)
    for k, found in right.items():
        p = task.chance(f"hop{k}")
        assert abs(np.mean(found) - p) < 4 * math.sqrt(p / len(found))
    assert Depo(N=8, K=8, mini_vocab=8).chance("hop8") == 1  # once around
    assert 1 / 375 < Depo(N=375).chance("hop8") < 1.01 / 375


@pytest.mark.parametrize(
    ("K", "hops"), [(8, (1, 2, 4, 8)), (16, (1, 2, 4, 8, 16)), (6, (1, 2, 4, 6)), (32, (1, 2, 4, 8, 16, 24, 32))]
)
def test_evaluation_hops(K, hops):
    assert Depo(K=K).evaluation_hops == hops


def test_the_paper_s_evaluation_hops():
    assert Depo(K=8, test_hops="extremes").evaluation_hops == (4, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"N": 2}, "Depo.N=2: at least 3"),
        ({"K": 0}, "Depo.K=0"),
        ({"word_length": (3, 2)}, "shortest <= longest"),
        ({"N": 9, "mini_vocab": 2, "word_length": (1, 2)}, "only 6 different words"),
        ({"length_law": "linear"}, "weighted or uniform"),
        ({"K": 600}, "compact_ids"),
        ({"word_length": (5, 40)}, "too long"),
    ],
)
def test_absurd_parameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Depo(**options)


def test_unknown_split():
    with pytest.raises(ValueError, match="split='dev'.*train, val, test"):
        Depo(N=5).example(0, cast(Any, "dev"), 0)


def test_the_task_library_does_not_need_torch():
    import subprocess
    import sys

    code = "import sys; from src.datamodules.tasks import Depo; Depo(N=5).example(0, 'train', 0); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
