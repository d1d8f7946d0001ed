import itertools
import json
import math
import random
from functools import cache
from importlib.resources import files
from typing import Any, cast

import numpy as np
import pytest

from src.datamodules.tasks.cfg_inference import Inference
from src.datamodules.tasks.lano import Lano, entropy, kl_divergence
from tests.naive import lano as naive


@cache
def task(grammar: str) -> Lano:
    return Lano(grammar)


# ---- published statistics --------------------------------------------------------------------------------------------

# strings, then: share with several parses, nats per row, nats per string, best accuracy, divergence of the uniform and of the
# unigram distribution, share still valid after one random substitution (60 trials)
PUBLISHED = {
    "cfg3b": (200, 0.000, 0.4236, 117.4, 0.7558, 0.9620, 0.6945, 0.000),
    "cfg3f": (200, 0.425, 0.7412, 177.5, 0.6186, 0.6437, 0.3566, 0.017),
    "cfg3g": (100, 0.800, 0.7336, 178.9, 0.6381, 0.6531, 0.3877, 0.067),
    "cfg3h": (100, 0.110, 0.6021, 145.0, 0.6982, 0.7829, 0.4938, 0.033),
    "cfg3i": (100, 0.820, 0.4137, 124.6, 0.7672, 0.9726, 0.6819, 0.000),
    "cfg3j": (200, 0.560, 0.7858, 423.3, 0.5806, 0.6002, 0.3183, 0.083),
    "cfg3k": (200, 0.785, 0.8135, 422.0, 0.5859, 0.5726, 0.2752, 0.100),
}
TERMINALS = {
    "cfg3b": (0.333, 0.333, 0.333),
    "cfg3f": (0.427, 0.266, 0.306),
    "cfg3g": (0.335, 0.317, 0.347),
    "cfg3h": (0.357, 0.236, 0.407),
    "cfg3i": (0.425, 0.323, 0.252),
    "cfg3j": (0.301, 0.381, 0.318),
    "cfg3k": (0.405, 0.242, 0.353),
}
FIRST = {"cfg3f": (0.368, 0.077, 0.555), "cfg3j": (0.335, 0.207, 0.458), "cfg3k": (0.404, 0.307, 0.289)}
SAMPLES = 300


def substitute(tokens, rng):
    """One token replaced by another."""
    changed = tokens.copy()
    i = rng.integers(len(tokens))
    changed[i] = 1 + (changed[i] - 1 + rng.integers(1, 3)) % 3
    return changed


@pytest.mark.parametrize("name", PUBLISHED)
def test_statistics_of_the_published_grammars(name):
    lano = task(name)
    n, several, per_row, per_string, best, uniform_kl, unigram_kl, survive = PUBLISHED[name]
    sentences = [lano.example(3, "test", i)[0][1:] for i in range(SAMPLES)]
    exact = lano.next_token_distributions(sentences)
    rows = np.array([len(e) for e in exact])
    nats = np.array([entropy(e).sum() for e in exact])
    sure = np.array([e.max(axis=1).sum() for e in exact])
    counts = np.array([np.bincount(s, minlength=4)[1:] for s in sentences])
    unigram = np.array([SAMPLES, *counts.sum(axis=0)]) / rows.sum()
    unigram_nats = [kl_divergence(e, np.tile(unigram, (len(e), 1))) for e in exact]
    uniform_nats = [kl_divergence(e, np.full(e.shape, 0.25)) for e in exact]

    def near(found, published, sd, n: float = n):
        """Both are means over samples, the published one rounded too."""
        rounding = 0.5 * 10 ** -len(str(published).partition(".")[2])
        assert abs(found - published) <= 4 * sd * math.sqrt(1 / n + 1 / SAMPLES) + rounding

    def ratio(sums, totals):
        """Sum over sum, and its error per sample by the delta method."""
        found = sums.sum() / totals.sum()
        return found, (sums - found * totals).std() / totals.mean()

    def share(found):
        """A share, and its error per sample, which is not 0 for the lucky ones."""
        p = (found.sum() + 1) / (len(found) + 2)
        return found.mean(), math.sqrt(p * (1 - p))

    for (found, sd), published in ((ratio(nats, rows), per_row), (ratio(sure, rows), best)):
        near(found, published, sd)
    for values, published in ((nats, per_string), (uniform_nats, uniform_kl), (unigram_nats, unigram_kl)):
        near(np.mean(values), published, np.std(values))
    found, sd = share(np.array(lano.parse_counts(sentences)) > 1)
    near(found, several, sd)
    rng = np.random.default_rng(0)
    found, sd = share(lano.memberships([substitute(s, rng) for s in sentences]))
    near(found, survive, sd, n=60)
    for terminal in range(3):
        found, sd = ratio(counts[:, terminal], counts.sum(axis=1))
        near(found, TERMINALS[name][terminal], sd)
        if name in FIRST:
            p = exact[0][0, 1 + terminal]  # known exactly
            near(np.mean([s[0] == 1 + terminal for s in sentences]), p, math.sqrt(p * (1 - p)), n=math.inf)
            near(p, FIRST[name][terminal], math.sqrt(p * (1 - p)))


@pytest.mark.parametrize(("name", "published"), [("cfg3e1", (60, 0.7542, 0.6338)), ("cfg3e2", (100, 0.7227, 0.6220))])
def test_grammars_without_a_table_are_about_as_hard(name, published):
    lano = task(name)
    sentences = [lano.example(3, "test", i)[0] for i in range(60)]
    rows = np.concatenate(lano.next_token_distributions(sentences))
    assert np.mean(entropy(rows)) == pytest.approx(published[1], rel=0.03)
    assert np.mean(rows.max(axis=1)) == pytest.approx(published[2], rel=0.03)
    assert np.mean(np.array(lano.parse_counts(sentences)) > 1) <= 0.05


# ---- worked examples: strings of CPython's generator, seed 7711 ------------------------------------------------------


@cache
def known(name: str) -> tuple[int, ...]:
    grammar = task(name).language
    rules = {symbol: grammar.rules_of(symbol) for layer in grammar.layers[:-1] for symbol in layer}
    return tuple(naive.sentence(rules, grammar.root, random.Random(7711)))


@pytest.mark.parametrize(
    ("name", "length", "start", "first_row", "nats"),
    [
        ("cfg3f", 305, "33331121312322123312", [0, 0.367863, 0.070385, 0.561752], 0.723984),
        ("cfg3k", 625, "13113121311122111211", [0, 0.414588, 0.292706, 0.292706], 0.844247),
    ],
)
def test_worked_examples(name, length, start, first_row, nats):
    lano, tokens = task(name), known(name)
    assert len(tokens) == length
    assert "".join(map(str, tokens[:20])) == start
    assert lano.num_parses(tokens) == 1
    rows = lano.next_token_distribution(tokens)
    assert rows.shape == (length + 1, 4)
    assert rows.sum(axis=1) == pytest.approx(np.ones(length + 1), abs=1e-14)
    assert rows[0] == pytest.approx(first_row, abs=1e-6)
    assert round(entropy(rows).mean(), 6) == nats
    stopping = rows.copy()
    stopping[-1] = [1, 0, 0, 0]
    if name == "cfg3k":
        assert rows[-1].round(6).tolist() == [0.064748, 0.334233, 0.300510, 0.300510]
        assert round(kl_divergence(rows, stopping), 7) == 0.0151780
        assert [next(s for s, begin, _ in layer if begin == 0) for layer in lano.parse(tokens)[::-1]] == [
            *(1, 7, 11, 15, 18, 20, 24, 25)
        ]
    else:
        assert kl_divergence(rows, stopping) == 0.0


def test_beginnings_of_sentences_have_the_rows_of_the_sentences():
    lano, tokens = task("cfg3k"), known("cfg3k")
    rows = lano.next_token_distribution(tokens)
    for length in (0, 1, 100, 625):
        [begun] = lano.next_token_distributions([tokens[:length]], whole=False)
        assert begun == pytest.approx(rows[: length + 1], abs=1e-12)
    with pytest.raises(ValueError, match="string 1 begins no sentence of cfg3k"):
        lano.next_token_distributions([[1], [1, 7]], whole=False)


def test_divergence_weighs_by_the_distribution_without_smoothing():
    exact, model = np.array([[0.5, 0.5], [1.0, 0.0]]), np.array([[0.25, 0.25], [0.0, 1.0]])
    assert kl_divergence(exact, model) == pytest.approx((0 + math.log((1 + 1e-5) / 1e-5)) / 2)
    assert kl_divergence(exact, model, eps=0.1) == pytest.approx(math.log(1.1 / 0.1) / 2)
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(1, 2\)"):
        kl_divergence(exact, model[:1])


def test_entropy_of_a_row():
    assert entropy(np.array([[0.5, 0.5], [1.0, 0.0]])).tolist() == [math.log(2), 0.0]


# ---- extremes and trees ----------------------------------------------------------------------------------------------


def test_the_longest_and_the_shortest_sentences():
    """2052 tokens of cfg3j: no underflow, rows sum to one, and the end is certain where nothing longer exists."""
    grammar = task("cfg3j").language

    @cache
    def extreme(symbol, longest) -> tuple[int, ...]:
        """A sentence that takes the rule of most (or least) tokens everywhere."""
        if symbol <= grammar.terminals:
            return (symbol,)
        written = [
            tuple(itertools.chain(*(extreme(child, longest) for child in rule))) for rule in grammar.rules_of(symbol)
        ]
        return (max if longest else min)(written, key=len)

    for longest, length in ((True, 2052), (False, 128)):
        tokens = extreme(grammar.root, longest)
        assert len(tokens) == length
        assert task("cfg3j").num_parses(tokens) >= 1
        rows = task("cfg3j").next_token_distribution(tokens)
        assert rows.sum(axis=1) == pytest.approx(np.ones(length + 1), abs=1e-13)
        assert (rows[range(length), tokens] > 0).all()
        assert rows[-1].tolist() == [1, 0, 0, 0] if longest else rows[-1, 0] > 0


@pytest.mark.parametrize("scale", [0.1, 40.0])
def test_products_out_of_range_are_computed_again_at_another_scale(scale):
    inference = Inference(task("cfg3k").language)
    expected = inference.next_token_distributions([known("cfg3k")])[0]
    inference._scale = scale
    assert inference.next_token_distributions([known("cfg3k")])[0] == pytest.approx(expected, rel=1e-9, abs=0)


@pytest.mark.parametrize("name", ["cfg3e2", "cfg3g", "cfg3k"])
def test_parse_is_a_derivation_tree(name):
    lano = task(name)
    grammar = lano.language
    for index in range(3):
        tokens = lano.example(2, "val", index)[0]
        layers = lano.parse(tokens)
        assert layers[0] == [(grammar.root, 0, len(tokens) - 1)]
        assert layers[-1] == [(token, i, i + 1) for i, token in enumerate(tokens[1:])]
        for parents, children in itertools.pairwise(layers):
            for symbol, start, end in parents:
                inside = [child for child in children if start <= child[1] and child[2] <= end]
                assert tuple(child[0] for child in inside) in grammar.rules_of(symbol)
                assert [start, *(child[2] for child in inside)] == [*(child[1] for child in inside), end]
            assert len(children) == len(set(children))


# ---- tokens around a sentence ----------------------------------------------------------------------------------------


def test_a_beginning_and_an_end_token_are_tolerated_and_nothing_else():
    lano, bare = task("cfg3f"), list(known("cfg3f"))
    rows = lano.next_token_distribution(bare)
    for tokens in ([0, *bare], [*bare, 0], [0, *bare, 0], [0, *bare, 4], [0, *bare, 4, -1, -1]):
        assert lano.membership(tokens)
        assert lano.num_parses(np.array(tokens)) == 1
        assert np.array_equal(lano.next_token_distribution(tokens), rows)
        assert lano.parse(tokens) == lano.parse(bare)
    wrong = [
        [*bare, 0, 0],
        [0, 0, *bare],
        [4, *bare],
        [*bare, 5],
        [*bare, 1],
        bare[:-1],
        [*bare[:9], 0, *bare[9:]],
        [],
        [0],
        [0, 0],
        [-1],
    ]
    wrong += [[1] * 10_000, [10**12, *bare[1:]], [*bare[:3], -1, *bare[4:]]]
    assert not lano.memberships(wrong).any()
    assert lano.parse_counts(wrong) == [0] * len(wrong)
    for tokens in wrong:
        with pytest.raises(ValueError, match="not a sentence of cfg3f"):
            lano.next_token_distribution(tokens)
        with pytest.raises(ValueError, match="not a sentence of cfg3f"):
            lano.parse(tokens)
    with pytest.raises(ValueError, match="string 1 is not a sentence"):
        lano.next_token_distributions([bare, bare[:-1], bare])


def test_many_strings_are_as_one_by_one():
    lano = task("cfg3k")
    sentences = [lano.example(5, "test", i)[0] for i in range(6)]
    padded = np.full((6, max(map(len, sentences))), -1)
    for row, sentence in zip(padded, sentences, strict=True):
        row[: len(sentence)] = sentence
    for one, listed, row in zip(
        map(lano.next_token_distribution, sentences),
        lano.next_token_distributions(sentences),
        lano.next_token_distributions(padded),
        strict=True,
    ):
        assert np.array_equal(one, listed)
        assert np.array_equal(one, row)
    assert lano.parse_counts(padded) == [lano.num_parses(sentence) for sentence in sentences]
    assert lano.memberships([]).tolist() == lano.parse_counts([]) == lano.next_token_distributions([]) == []


def test_strings_of_the_wrong_kind_are_refused():
    with pytest.raises(ValueError, match="plural names"):
        task("cfg3f").memberships([1, 2, 3])
    with pytest.raises(ValueError, match="integer ids, not float64"):
        task("cfg3f").membership([1.0, 2.0])


# ---- scoring ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminator", ["bos", "eos"])
def test_score_counts_finished_sentences(terminator):
    lano = Lano("cfg3k", levels=4, terminator=terminator)
    stop = lano.stop_id
    sentences = [lano.example(0, "test", i)[0][: None if terminator == "bos" else -1].tolist() for i in range(3)]
    changed = next(
        [*sentences[0][:i], t, *sentences[0][i + 1 :]]
        for i, t in itertools.product(range(1, len(sentences[0])), (1, 2, 3))
        if not lano.membership([*sentences[0][:i], t, *sentences[0][i + 1 :]])
    )
    rows = [
        [*sentences[0], stop],
        [*sentences[1], stop, 1, 2, 3],  # what follows the end does not matter
        sentences[2],  # cut off
        [*changed, stop],
        [*sentences[0][:-1], stop],
        [0, stop],
        [*sentences[0], 5 if terminator == "bos" else 0, stop],
        [],
    ]
    written = np.full((len(rows), max(map(len, rows))), -1)
    for row, tokens in zip(written, rows, strict=True):
        row[: len(tokens)] = tokens
    assert lano.score(written, written).counts == {"valid": (2, 7)}
    predictions = np.where(np.arange(written.shape[1]) == 0, 3, written)
    assert lano.score(written, predictions).counts == {"valid": (2, 7)}  # the prompt is not an answer
    cut = np.array([sentences[2]])
    assert lano.score(cut, cut).counts == {"valid": (1, 1)}  # a whole sentence, whose end is the next row's
    assert lano.score(written[:1], np.full_like(written[:1], stop)).counts == {"valid": (0, 1)}
    assert lano.groups == ("valid",)
    assert lano.chance("valid") == 0.0


@pytest.mark.parametrize(
    ("name", "terminator", "stop"), [("cfg3f", "bos", 0), ("cfg3k", "bos", 0), ("cfg3f", "eos", 4)]
)
def test_generation_starts_from_bos_and_covers_nearly_all_sentences(name, terminator, stop):
    lano = Lano(name, terminator=terminator)
    law = lano.language.length_distribution
    assert (lano.generation.stop, lano.generation.temperature) == (stop, 1.0)
    longest = lano.generation.max_new_tokens - 1  # one is the terminator
    assert law[: longest + 1].sum() >= 0.9999 > law[:longest].sum()
    assert lano.prompt_length(lano.example(0, "test", 0)[0]) == 1


def test_sizes():
    assert (Lano("cfg3f").vocab_size, Lano("cfg3e1").vocab_size) == (7, 13)
    assert (Lano("cfg3f").max_length, Lano("cfg3f", terminator="eos").max_length) == (730, 731)
    assert Lano("cfg3k", levels=2).max_length == 10
    assert Lano().min_window == 2


# ---- in words, and bad parameters ------------------------------------------------------------------------------------


def test_describe():
    lano = Lano("cfg3k", levels=2)
    assert lano.describe(np.array([0, 1, 1, 1, 1, 3, 3, 3, 3])) == (
        "cfg3k, 2 levels: a sentence of 8 tokens with 1 parse\n"
        "layer 0  10[0:8]\n"
        "layer 1  9[0:3]  9[3:6]  7[6:8]\n"
        "tokens   1 1 1 1 3 3 3 3"
    )
    assert lano.describe(np.array([0, 1, 1])) == "cfg3k, 2 levels: 2 tokens, not a sentence\ntokens   1 1"
    assert "with 12 parses" in Lano("cfg3k").show()


def test_a_grammar_of_your_own(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"name": "own", "terminals": 2, "layers": [{"7": "6 6 | 6"}, {"6": "1 2 | 2"}]}))
    lano = Lano(str(path))
    assert lano.vocab_size == 6
    assert lano.next_token_distribution([1, 2]).tolist() == [[0, 0.5, 0.5], [0, 0, 1], [0.5, 0.25, 0.25]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grammar": "cfg4"}, r"Lano\.grammar='cfg4': choose cfg3b, cfg3e1.*cfg3k"),
        ({"levels": 0}, r"Lano\.levels=0: cfg3f has 1\.\.6"),
        ({"levels": 7}, r"levels=7: cfg3f has 1\.\.6"),
        ({"terminator": "pad"}, r"Lano\.terminator='pad': choose bos or eos"),
    ],
)
def test_absurd_parameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Lano(**options)


def test_unknown_split():
    for ask in (lambda: Lano().example(0, cast(Any, "dev"), 0), lambda: Lano().windows(0, cast(Any, "dev"), 0, 1, 9)):
        with pytest.raises(ValueError, match=r"split='dev'.*train, val, test"):
            ask()


def test_another_set_of_rules_is_another_task_even_under_the_same_name(tmp_path):
    path = tmp_path / "mine.json"
    prints = []
    for rules in ("cfg3f", "cfg3g"):
        path.write_text((files("src.datamodules.tasks") / "grammars" / f"{rules}.json").read_text())
        prints.append(Lano(grammar=str(path)).fingerprint())
    assert prints[0]["grammar"] == prints[1]["grammar"]
    assert prints[0] != prints[1]
    assert Lano().fingerprint() == Lano().fingerprint()


@pytest.mark.parametrize("terminator", ["bos", "eos"])
def test_gold_is_right_by_itself_and_in_batches(terminator):
    """An example of ``bos`` has no end of its own; a row that a window has cut does not count, one that ends in padding is wrong."""
    lano = Lano(terminator=terminator)
    sentence = lano.example(0, "test", 0)[0]
    assert lano.score(sentence[None], sentence[None]).counts == {"valid": (1, 1)}
    batch = lano.batch(0, "test", 0, 50).tokens
    assert lano.score(batch, batch).counts == {"valid": (50, 50)}
    cut = sentence[None, :100]
    assert lano.score(cut, cut).counts == {"valid": (0, 0)}
    unfinished = np.append(sentence[:100], -1)[None]
    assert lano.score(unfinished, unfinished).counts == {"valid": (0, 1)}
