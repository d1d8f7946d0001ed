import math
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.datamodules.tasks import Depo

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


parameters = st.builds(
    dict,
    N=st.integers(3, 30),
    K=st.integers(1, 40),
    mini_vocab=st.integers(6, 60),
    word_length=st.sampled_from([(1, 2), (2, 2), (2, 4), (5, 7)]),
    questions=st.integers(1, 12),
    separator=st.booleans(),
    compact_ids=st.booleans(),
    length_law=st.sampled_from(["weighted", "uniform"]),
)


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


def test_examples_never_change():
    """Golden values: a change here changes everybody's data."""
    assert Depo(N=5, K=4, mini_vocab=3).example(42, "train", 7)[0].tolist() == GOLDEN


GOLDEN = [
    9999,
    5,
    2,
    5,
    4,
    5,
    2,
    4,
    1,
    4,
    2,
    5,
    2,
    4,
    1,
    4,
    4,
    9002,
    4,
    9500,
    2,
    5,
    9001,
    1,
    4,
    9500,
    4,
    9001,
    5,
    9500,
    2,
    5,
    9001,
    2,
    4,
    9500,
    1,
    4,
    9004,
    2,
    5,
    9500,
    5,
]


@pytest.mark.parametrize("split", ["train", "test"])
def test_windows_pack_consecutive_examples_and_start_with_a_whole_one(split):
    task: Any = Depo(N=9, K=3, mini_vocab=5)
    length = 130
    windows = task.windows(3, split, first=11, count=4, length=length)
    shortest = 19 if split == "train" else 1 + 9 * 2 + 9 * 4
    per_window = -(-length // shortest)
    for row in range(4):
        pieces = [task.example(3, split, (11 + row) * per_window + i) for i in range(per_window)]
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


def test_chance_level_is_what_a_random_word_scores():
    task = Depo(N=8, K=2, mini_vocab=16, word_length=(1, 1))
    windows = task.windows(0, "test", 0, 400, 128)
    rng = np.random.default_rng(0)
    guess = rng.choice(np.arange(17, 33), size=windows.tokens.shape)
    right, total = np.sum(list(task.score(windows.tokens, guess).counts.values()), axis=0)
    assert right / total == pytest.approx(1 / 16, abs=0.01)  # any of 16 words; one of the example's 8 doubles that
    assert task.chance("hop1") == 1 / 8


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
