import itertools
import json
import math
import zlib
from collections import Counter, defaultdict
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.datamodules.tasks.cfg import Grammar
from src.datamodules.tasks.cfg_inference import Inference
from src.datamodules.tasks.lano import Lano

# depth, mean length, its standard deviation, shortest and longest possible, derivation entropy in bits, log2 of the derivations
PUBLISHED = {
    "cfg3b": (6, 275.625, 41.709, 138, 432, 169.25, 213.6),
    "cfg3e1": (6, 198.584, 46.811, 66, 557, 215.99, 375.1),
    "cfg3e2": (6, 246.357, 55.899, 82, 645, 256.35, 466.9),
    "cfg3f": (6, 249.860, 69.382, 64, 729, 268.66, 551.7),
    "cfg3g": (6, 252.433, 53.010, 80, 729, 269.92, 491.1),
    "cfg3h": (6, 236.384, 41.497, 97, 459, 204.78, 288.3),
    "cfg3i": (6, 308.094, 45.973, 114, 564, 186.94, 258.3),
    "cfg3j": (7, 543.926, 133.596, 128, 2052, 618.59, 1387.7),
    "cfg3k": (7, 516.305, 91.063, 132, 1458, 608.33, 1160.6),
}
TABLES = [name for name in PUBLISHED if not name.startswith("cfg3e")]


@pytest.mark.parametrize("name", TABLES)
def test_published_tables_have_their_exact_moments(name):
    grammar = Grammar.load(name)
    found = (
        grammar.depth,
        round(grammar.mean_length, 3),
        round(grammar.sd_length, 3),
        grammar.min_length,
        grammar.max_length,
        round(grammar.derivation_entropy, 2),
        round(grammar.log2_derivations, 1),
    )
    assert found == PUBLISHED[name]
    assert grammar.terminals == 3
    assert grammar.root == 7 + len(grammar.rules) - 1 == {6: 22, 7: 25}[grammar.depth]


def test_grammars_without_a_table_are_near_the_published_ones():
    assert set(Grammar.shipped()) == set(PUBLISHED)
    for name, sizes in (("cfg3e1", (1, 3, 9, 27, 81, 27, 9)), ("cfg3e2", (1, 3, 9, 27, 27, 9, 4))):
        grammar = Grammar.load(name)
        _, mean, sd, shortest, longest, entropy, derivations = PUBLISHED[name]
        assert grammar.sizes == sizes
        assert grammar.mean_length == pytest.approx(mean, rel=0.01)
        assert grammar.sd_length == pytest.approx(sd, rel=0.05)
        assert grammar.min_length == pytest.approx(shortest, rel=0.15)
        assert grammar.max_length == pytest.approx(longest, rel=0.02)
        assert grammar.derivation_entropy == pytest.approx(entropy, rel=0.01)
        assert grammar.log2_derivations == pytest.approx(derivations, rel=0.02)


def test_grammars_never_change():
    """Golden values: moments do not see a swap of two symbols in a rule, nor a builder that draws in another order."""
    assert {name: zlib.crc32(repr(Grammar.load(name).rules).encode()) for name in PUBLISHED} == GOLDEN


GOLDEN = {
    "cfg3b": 3106048866,
    "cfg3e1": 1871718889,
    "cfg3e2": 3175512279,
    "cfg3f": 2313378024,
    "cfg3g": 14189516,
    "cfg3h": 3953059126,
    "cfg3i": 1795640575,
    "cfg3j": 1951439921,
    "cfg3k": 2453813344,
}


small = st.builds(
    dict,
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(lambda sizes: [1, *sizes]),
    rules=st.sampled_from([(1, 1), (1, 2), (2, 2), (1, 3)]),
    length=st.sampled_from([(1, 1), (1, 2), (2, 2), (1, 3), (2, 3), (3, 3)]),
    seed=st.integers(0, 10**6),
    distinct_rules=st.just(False),
)


def derivations(grammar, symbol) -> list[tuple[Fraction, tuple[int, ...]]]:
    """Every derivation tree below a symbol: its probability and its terminals."""
    if symbol <= grammar.terminals:
        return [(Fraction(1), (symbol,))]
    found = []
    rules = grammar.rules_of(symbol)
    for rule in rules:
        for parts in itertools.product(*(derivations(grammar, child) for child in rule)):
            probability = math.prod((p for p, _ in parts), start=Fraction(1, len(rules)))
            found.append((probability, tuple(itertools.chain(*(terminals for _, terminals in parts)))))
    return found


@settings(max_examples=80, deadline=None)
@given(small)
def test_moments_are_those_of_all_derivations(options):
    grammar = Grammar.random(**options)
    if grammar.num_derivations > 3000:
        return
    trees = derivations(grammar, grammar.root)
    lengths = [len(terminals) for _, terminals in trees]
    mean = float(sum(p * len(terminals) for p, terminals in trees))
    square = float(sum(p * len(terminals) ** 2 for p, terminals in trees))
    law: dict[int, Fraction] = defaultdict(Fraction)
    for p, terminals in trees:
        law[len(terminals)] += p
    assert grammar.num_derivations == len(trees)
    assert (grammar.min_length, grammar.max_length) == (min(lengths), max(lengths))
    assert grammar.mean_length == pytest.approx(mean)
    assert grammar.sd_length == pytest.approx(math.sqrt(max(square - mean**2, 0)), abs=1e-6)
    assert grammar.derivation_entropy == pytest.approx(-sum(float(p) * math.log2(p) for p, _ in trees), abs=1e-12)
    assert grammar.length_distribution == pytest.approx([float(law[n]) for n in range(max(lengths) + 1)])


def test_quantiles_of_the_length():
    grammar = Grammar.load("cfg3k")
    law = grammar.length_distribution
    n = grammar.length_quantile(0.9999)
    assert law[: n + 1].sum() >= 0.9999 > law[:n].sum()
    assert grammar.length_quantile(1.0) <= grammar.max_length
    assert (law * np.arange(len(law))).sum() == pytest.approx(grammar.mean_length)


# ---- the builder -----------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_builder_keeps_to_its_options(seed, distinct_symbols, distinct_rules):
    options: dict[str, Any] = {"distinct_symbols": distinct_symbols, "distinct_rules": distinct_rules}
    grammar = Grammar.random((1, 3, 5, 4), (2, 4), (2, 3), seed=seed, **options)
    assert grammar == Grammar.random((1, 3, 5, 4), (2, 4), (2, 3), seed=seed, **options)
    assert grammar.sizes == (1, 3, 5, 4)
    assert [list(ids) for ids in grammar.layers] == [[16], [13, 14, 15], [8, 9, 10, 11, 12], [1, 2, 3, 4]]
    for layer in grammar.layers[:-1]:
        rules = [rule for symbol in layer for rule in grammar.rules_of(symbol)]
        assert all(2 <= len(grammar.rules_of(symbol)) <= 4 for symbol in layer)
        assert all(2 <= len(rule) <= 3 for rule in rules)
        assert not distinct_rules or len(set(rules)) == len(rules)
        assert not distinct_symbols or all(len(set(rule)) == len(rule) for rule in rules)


def test_builder_draws_numbers_and_lengths_of_rules_and_symbols_uniformly():
    counts, lengths, symbols = Counter(), Counter(), Counter()
    for seed in range(300):
        grammar = Grammar.random((1, 5, 4), (2, 4), (1, 3), seed=seed, distinct_rules=False)
        counts.update(len(grammar.rules_of(symbol)) for symbol in grammar.layers[1])
        rules = [rule for symbol in grammar.layers[1] for rule in grammar.rules_of(symbol)]
        lengths.update(map(len, rules))
        symbols.update(itertools.chain(*rules))
    for counter, choices in ((counts, (2, 3, 4)), (lengths, (1, 2, 3)), (symbols, (1, 2, 3, 4))):
        total, p = counter.total(), 1 / len(choices)
        assert set(counter) == set(choices)
        assert all(abs(counter[x] / total - p) < 4 * math.sqrt(p * (1 - p) / total) for x in choices)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": (2, 3)}, r"sizes=\(2, 3\): one root"),
        ({"sizes": (1,)}, "one root"),
        ({"sizes": (1, 0, 3)}, "at least one symbol"),
        ({"rules": (0, 2)}, r"rules=\(0, 2\)"),
        ({"rules": (3, 2)}, "fewest <= most"),
        ({"length": (2, 4)}, r"length=\(2, 4\).*most <= 3"),
        (
            {"sizes": (1, 2), "length": (1, 3), "distinct_symbols": True},
            "3 distinct symbols do not exist in a layer of 2",
        ),
        ({"sizes": (1, 9, 2), "rules": (2, 4), "length": (2, 3)}, "36 different rules, but only 12 exist"),
        ({"sizes": (1,) * 11, "length": (3, 3), "rules": (1, 1)}, "59049 tokens; at most 16384"),
    ],
)
def test_builder_refuses_absurd_options(options, message):
    with pytest.raises(ValueError, match=message):
        Grammar.random(**{"sizes": (1, 3, 3), "rules": (2, 2), "length": (2, 3), "seed": 0} | options)


# ---- files and symbols -----------------------------------------------------------------------------------------------


def own(**changes) -> dict[str, Any]:
    """A grammar file of two levels, with changes."""
    layers = [{"8": "6 7 | 7"}, {"6": "1 | 2 2", "7": "2 1 2"}]
    return {"name": "own", "terminals": 2, "layers": layers} | changes


def test_a_grammar_of_your_own(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(own()))
    grammar = Grammar.load(str(path))
    assert grammar.rules_of(8) == ((6, 7), (7,))
    assert grammar.layers == (range(8, 9), range(6, 8), range(1, 3))
    assert (grammar.min_length, grammar.max_length, grammar.mean_length) == (3, 5, 3.75)
    assert "8 -> 6 7 | 7 ;" in str(grammar)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (own(terminal=2), "unknown key 'terminal'"),
        (own(terminals=3), r"numbered from 7.*found \[6, 7, 8\]"),
        (own(layers=[{"8": "6 9"}, {"6": "1", "7": "2"}]), r"rule 8 -> 6 9: .*6\.\.7"),
        (own(layers=[{"8": "6 1"}, {"6": "1", "7": "2"}]), "rule 8 -> 6 1"),
        (own(layers=[{"8": "6 6 6 6"}, {"6": "1", "7": "2"}]), "one to 3 symbols"),
        (own(layers=[{"8": "6 7 |"}, {"6": "1", "7": "2"}]), "one to 3 symbols"),
        (own(layers=[{"8": "6 7"}, {"6": "1", "7": "1 " * 100}]), r"rule 7 -> 1 1 1 1: one to 3 symbols"),
        (own(layers=[{"8": "6 7"}, {"6": "1", "7": "2|" * 2**20}]), "1048579 rules; at most 1048576"),
        # Numbers that all have one hash, and more than there may be.
        (own(layers=[{str(k * (2**61 - 1)): "1" for k in range(65_537)}]), "65537 non-terminals; at most 65536"),
        (own(layers=[{"7": "6", "8": "6"}, {"6": "1"}]), "one root"),
        (
            {"name": "own", "builder": {"sizes": [1, 3], "rules": [1, 1], "length": [1, 1], "seed": 0, "deg": 3}},
            "unknown key 'deg'",
        ),
        ({"name": "own"}, "terminals, layers, or a builder"),
        ([], "terminals, layers, or a builder"),
    ],
)
def test_files_that_are_not_grammars_are_refused_by_name(content, message, tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"own\.json.*{message}"):
        Grammar.load(str(path))


@pytest.mark.parametrize(
    "content",
    [
        *(own(layers=layers) for layers in (3, [3], {}, [{"6": 3}], [{"6": "x"}], [{"6": "9" * 5000}], [[]], [{}], [])),
        *(own(terminals=value) for value in (math.inf, math.nan, 1.5, "2", None, -1, 0, 2**70)),
        own(terminals=10**9, layers=[{"1000000004": "1 2"}]),
        own(layers=[{str(6 + 299 - i): str(6 + 298 - i) if i < 299 else "1"} for i in range(300)]),
        *(own(name=value) for value in (3, None, [])),
        *({"name": "own", "builder": value} for value in (3, [], {}, "sizes", {"sizes": [1], "seed": 1})),
        *(
            {"name": "own", "builder": {"sizes": [1, 3, 2], "rules": [1, 1], "length": [1, 3], "seed": 1} | changes}
            for changes in (
                {"sizes": [1, 10**8, 3]},
                {"sizes": [1, 3, 10**8]},
                {"sizes": [1, 60_000, 60_000], "rules": [1, 60_000]},
                {"sizes": [1, math.inf]},
                {"sizes": [1, "2"]},
                {"rules": [2, 10**9], "distinct_rules": False},
                {"seed": "x"},
                {"seed": math.inf},
            )
        ),
        *(b"", b"[" * 100_000, b"\xff\xfe", b'{"a":' * 100_000, b"1" * 5000, b" " * (2**24 + 1)),
    ],
)
def test_files_of_strangers_take_no_memory_and_are_refused_by_name(content, tmp_path):
    path = tmp_path / "own.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ValueError, match=r"own\.json") as caught:
        Grammar.load(str(path))
    assert len(str(caught.value)) < 1000


def test_names_that_a_terminal_would_obey_are_shown_in_escapes(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(own(name="\x1b]0;P\x07", layers=[{"6": "9"}])))
    with pytest.raises(ValueError, match=r"own\.json.*\\x1b\]0;P\\x07") as caught:
        Grammar.load(str(path))
    assert str(caught.value).isprintable()
    assert "\x1b" not in str(Grammar.from_dict(own(name="\x1b[31m")))


def test_unknown_names_list_the_shipped_ones():
    with pytest.raises(ValueError, match="grammar='cfg4'.*cfg3b, cfg3e1, cfg3e2, cfg3f"):
        Grammar.load("cfg4")
    with pytest.raises(ValueError, match="exists"):
        Grammar.load("nowhere.json")
    for name in ("x" * 5000, "a\0b.json", "x" * 5000 + ".json"):
        with pytest.raises(ValueError, match="exists"):
            Grammar.load(name)


def test_symbols_without_rules_are_refused():
    with pytest.raises(ValueError, match="symbol 6 of layer 1 has no rules"):
        Grammar("x", (1, 1, 2), ((), ((6,),)))
    with pytest.raises(ValueError, match="rules for 1 symbols, but 2"):
        Grammar("x", (1, 1, 2), (((6,),),))


def test_the_lowest_levels_are_a_grammar():
    whole = Grammar.load("cfg3k")
    assert whole.lowest(7).rules == whole.rules
    part = whole.lowest(2)
    assert part.sizes == (1, 3, 3)
    assert part.root == 10
    assert [part.rules_of(symbol) for symbol in range(7, 11)] == [whole.rules_of(symbol) for symbol in range(7, 11)]
    assert whole.lowest(1).rules == (whole.rules_of(7),)
    for levels in (0, 8):
        with pytest.raises(ValueError, match=rf"levels={levels}: cfg3k has 1\.\.7"):
            whole.lowest(levels)


# ---- inference, against independent references ------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(small, st.data())
def test_inference_is_what_listing_all_derivations_gives(options, data):
    """By definition: probabilities of sentences, of prefixes, and numbers of trees, from a list of all trees."""
    grammar = Grammar.random(**options)
    if grammar.num_derivations > 2000:
        return
    trees, probability, prefix = Counter(), defaultdict(Fraction), defaultdict(Fraction)
    for p, terminals in derivations(grammar, grammar.root):
        trees[terminals] += 1
        probability[terminals] += p
        for i in range(len(terminals) + 1):
            prefix[terminals[:i]] += p
    inference = Inference(grammar)
    sentence = data.draw(st.sampled_from(sorted(trees)))
    other = tuple(data.draw(st.lists(st.integers(0, grammar.terminals + 4), max_size=12)))
    changed = list(sentence)
    changed[data.draw(st.integers(0, len(sentence) - 1))] = data.draw(st.integers(1, grammar.terminals))
    strings = [sentence, other, tuple(changed), sentence + sentence, sentence[:-1]]
    assert inference.num_parses(strings) == [trees.get(string, 0) for string in strings]
    assert inference.memberships(strings).tolist() == [string in trees for string in strings]
    rows = inference.next_token_distributions([sentence, sentence])
    for i in range(len(sentence) + 1):
        start = sentence[:i]
        exact = [probability.get(start, 0), *(prefix.get((*start, t), 0) for t in range(1, grammar.terminals + 1))]
        assert rows[1][i] == pytest.approx([float(Fraction(p) / prefix[start]) for p in exact], rel=1e-12, abs=0)


def matrices(grammar, tokens, weight, dtype: Any = object):
    """Dense inside matrices, of Python's own numbers unless told otherwise."""
    size = len(tokens) + 1
    found = {t: np.zeros((size, size), dtype=dtype) for t in grammar.layers[-1]}
    for i, token in enumerate(tokens):
        found[token][i, i + 1] = 1
    for symbol in itertools.chain(*grammar.layers[-2::-1]):
        found[symbol] = np.zeros((size, size), dtype=dtype)
        for rule in grammar.rules_of(symbol):
            product = found[rule[0]] * weight(symbol)
            for child in rule[1:]:
                product = product.dot(found[child])
            found[symbol] = found[symbol] + product
    return found


@pytest.mark.parametrize(("name", "levels"), [("cfg3k", 3), ("cfg3g", 3), ("cfg3e2", 2)])
def test_inference_is_what_dense_matrices_give(name, levels):
    lano = Lano(name, levels=levels)
    grammar = lano.language
    for index in range(3):
        tokens = lano.example(0, "val", index)[0][1:].tolist()
        counts = matrices(grammar, tokens, lambda symbol: 1)
        assert lano.num_parses(tokens) == counts[grammar.root][0, -1] > 0
        inside = matrices(grammar, tokens, lambda symbol: Fraction(1, len(grammar.rules_of(symbol))))
        forward = {symbol: np.array([Fraction(0)] * (len(tokens) + 1)) for symbol in inside}
        forward[grammar.root][0] += 1
        for symbol in sorted(inside, reverse=True)[: len(grammar.rules)]:
            for rule in grammar.rules_of(symbol):
                reached = forward[symbol] / len(grammar.rules_of(symbol))
                for child in rule:
                    forward[child] = forward[child] + reached
                    reached = reached.dot(inside[child])
        rows = np.array([inside[grammar.root][0], *(forward[t] for t in grammar.layers[-1])]).T
        exact = (rows / rows.sum(axis=1, keepdims=True)).astype(float)
        assert lano.next_token_distribution(tokens) == pytest.approx(exact, rel=1e-12, abs=0)


@pytest.mark.parametrize("name", ["cfg3f", "cfg3k"])
def test_membership_of_corruptions(name):
    """Against dense matrices, on strings that differ from sentences in little."""
    lano = Lano(name, levels=4)
    rng = np.random.default_rng(1)
    strings = []
    for index in range(25):
        tokens = lano.example(1, "test", index)[0][1:]
        i = rng.integers(len(tokens))
        changed = tokens.copy()
        changed[i] = 1 + changed[i] % 3
        strings += [tokens, changed, np.delete(tokens, i), np.insert(tokens, i, 1), np.roll(tokens, 1)]
    expected = [matrices(lano.language, s, lambda symbol: 1, np.int64)[lano.language.root][0, -1] for s in strings]
    assert lano.parse_counts(strings) == expected
    assert 25 < sum(e > 0 for e in expected) < 100


def test_counts_beyond_the_integers_of_float64_are_exact():
    """One terminal and two rules a symbol: the trees of 1^n are a coefficient of f(f(f(f(f(x))))), f(x) = x^2 + x^3."""
    grammar = Grammar("ambiguous", (1,) * 6, tuple(((s, s), (s, s, s)) for s in (1, 5, 6, 7, 8)))
    powers = [0, 1]
    for _ in range(5):
        square = [
            sum(powers[i] * powers[n - i] for i in range(n + 1) if max(i, n - i) < len(powers))
            for n in range(2 * len(powers) - 1)
        ]
        cube = [
            sum(square[i] * powers[n - i] for i in range(n + 1) if i < len(square) and n - i < len(powers))
            for n in range(3 * len(powers) - 2)
        ]
        powers = [c + (square[n] if n < len(square) else 0) for n, c in enumerate(cube)]
    lengths = [33, 50, 90, 130]
    expected = [powers[n] for n in lengths]
    assert expected[1] < 2**53 < expected[2]
    assert Inference(grammar).num_parses([[1] * n for n in lengths]) == expected
    assert sum(powers) == grammar.num_derivations
