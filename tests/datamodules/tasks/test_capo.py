import math
import random
import re
import tomllib
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from scipy import stats

from src.datamodules.tasks import Capo
from src.datamodules.tasks.capo_people import DIRECTORY, FACTS, MONTHS, name_codes, person, pools, read_lines
from src.datamodules.tasks.capo_writing import find_kinds, lengths, templates, vocabulary
from tests.naive import capo as naive

SAMPLES = 4000


@pytest.fixture(scope="module")
def stories():
    """4000 people, one text each, in fixed order: records and texts."""
    task = Capo(num_people=SAMPLES, exposures=1, permute=False)
    examples = task.batch(0, "train", 0, SAMPLES)
    texts = [task.decode(row[1:size]) for row, size in zip(examples.tokens, examples.lengths, strict=True)]
    return [person(0, int(j)) for j in task.people(0, "train", 0, SAMPLES)], texts


# ---- pools and templates ---------------------------------------------------------------------------------------------


def test_pools_have_the_release_s_sizes_and_overlaps():
    pool = pools()
    first, middle, last = set(pool.first), set(pool.middle), set(pool.last)
    assert [len(values) for values in pool] == [400, 400, 1000, 200, 300, 100, 263, 263]
    assert [len(set(values)) for values in pool] == [400, 400, 1000, 200, 300, 100, 263, 133]
    assert (len(first & middle), len(first & last), len(middle & last)) == (286, 64, 70)
    assert pool.employer_cities.count("New York, NY") == 36
    assert len(set(pool.employer_cities) & set(pool.cities)) == 44
    assert all(value.isascii() and value == value.strip() and value for values in pool for value in values)
    assert all(re.fullmatch(r"[A-Z][A-Za-z]+", name) for names in pool[:3] for name in names)
    assert all(re.fullmatch(r"[A-Z][A-Za-z. -]+, [A-Z]{2}", city) for city in {*pool.cities, *pool.employer_cities})
    assert not any(value.endswith(".") for value in (*pool.universities, *pool.fields, *pool.employers))


@pytest.mark.parametrize(
    ("fact", "count", "final"),
    list(zip(FACTS, (46, 49, 49, 52, 47, 48), (33, 46, 45, 36, 45, 36), strict=True)),
    ids=FACTS,
)
def test_templates_are_as_many_as_in_the_release(fact, count, final):
    lines = read_lines(f"templates_{fact}")
    assert len(lines) == len(set(lines)) == count
    assert sum(line.endswith("{value}.") for line in lines) == final
    for line in lines:
        assert re.fullmatch(r"\{subject('s)?\}[a-z' -]*[a-z]? \{value\}[a-z' ,-]*\.", line), line
        assert not re.search(r"\b(he|she|his|her|hers|him|himself|herself|son|daughter)\b", line), line


def test_no_sentence_serves_two_facts():
    sentences = [template for family in templates() for template in family]
    assert len(set(sentences)) == len(sentences) == 291
    assert 3 <= sum(template.possessive for template in sentences) <= 10


def test_the_text_files_are_packaged():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["src.datamodules.tasks"]
    root = DIRECTORY.parent
    assert set(DIRECTORY.iterdir()) <= {path for pattern in patterns for path in root.glob(pattern)}


def is_uniform(counts):
    return cast(Any, stats.chisquare(counts)).pvalue > 1e-4


# ---- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measure", "mean", "sd"),
    [(len, 367.6, 34.5), (lambda text: len(text.split()), 58.16, 5.19)],
    ids=["characters", "words"],
)
def test_lengths_are_those_of_the_release(stories, measure, mean, sd):
    found = np.array([measure(text) for text in stories[1]], dtype=float)
    kurtosis = stats.kurtosis(found, fisher=False)
    assert abs(found.mean() - mean) < 4 * sd * math.sqrt(2 / SAMPLES)
    assert abs(found.std() - sd) < 4 * sd * math.sqrt((kurtosis - 1) / 4) * math.sqrt(2 / SAMPLES)


@pytest.mark.parametrize("permute", [False, True])
def test_the_law_of_token_lengths_is_exact(permute):
    law, n = lengths(permute), 40_000
    sizes = Capo(num_people=n, exposures=1, permute=permute).batch(0, "train", 0, n).lengths
    assert abs(sizes.mean() - law.mean) < 4 * law.sd / math.sqrt(n)
    assert abs(sizes.std() - law.sd) < 4 * law.sd / math.sqrt(2 * n)
    assert sizes.max() <= law.longest
    assert Capo(permute=permute).max_length == law.longest
    assert (sizes > Capo(permute=permute).min_window).mean() < 5e-4
    # The same moments as a mixture over the fact that comes first, whose sentence bears the name.
    encode, moments = vocabulary().encode, []
    for first in range(6 if permute else 1):
        families = [
            np.array([len(encode(t.before)) + len(encode(t.after)) + (fact == first and t.possessive) for t in family])
            for fact, family in enumerate(templates())
        ]
        moments.append((sum(f.mean() for f in families), sum(f.var() for f in families)))
    means, variances = np.array(moments).T
    pool = pools()
    values = [[len(encode(f" {v}")) for v in values] for values in (pool.cities, pool.universities, pool.fields)]
    values += [[len(encode(f" {a} {b}")) for a, b in zip(pool.employers, pool.employer_cities, strict=True)]]
    assert law.mean == pytest.approx(13 + means.mean() + sum(map(np.mean, values)))
    assert law.sd**2 == pytest.approx(variances.mean() + means.var() + sum(map(np.var, values)))


def test_attributes_are_uniform():
    people, n = [person(3, j) for j in range(20_000)], 20_000
    pool = pools()
    months, days, years = zip(*(who.birthday.replace(",", "").split() for who in people), strict=True)
    for found, values in (
        (months, MONTHS),
        (days, [str(day) for day in range(1, 29)]),
        (years, [str(year) for year in range(1900, 2100)]),
        ([who.birth_city for who in people], pool.cities),
        ([who.university for who in people], pool.universities),
        ([who.field for who in people], pool.fields),
        ([who.employer for who in people], pool.employers),
        ([who.first for who in people], pool.first),
        ([who.middle for who in people], pool.middle),
        ([who.last for who in people], pool.last),
    ):
        counts = Counter(found)
        assert set(counts) <= set(values)
        assert is_uniform([counts[value] for value in values])
    cities = dict(zip(pool.employers, pool.employer_cities, strict=True))
    assert all(cities[who.employer] == who.employer_city for who in people)
    # Independence: field and employer, coarsely; the birth year and the person's number.
    joint = np.zeros((10, 10))
    np.add.at(
        joint, ([pool.fields.index(w.field) // 10 for w in people], [int(w.birthday[-2:]) // 10 for w in people]), 1
    )
    assert is_uniform(joint.ravel())
    assert abs(np.corrcoef(range(n), [int(year) for year in years])[0, 1]) < 4 / math.sqrt(n)


def test_names_are_distinct():
    assert len(np.unique(name_codes(5, np.arange(200_000)))) == 200_000
    assert len({person(5, j).full_name for j in range(3000)}) == 3000


def test_every_sentence_has_every_place_equally_often():
    n = 3000
    examples = Capo(num_people=n, exposures=1).batch(1, "train", 0, n)
    places = np.zeros((6, 6))
    for row, size in zip(examples.tokens, examples.lengths, strict=True):
        kinds = find_kinds(row[:size])
        order = kinds[np.flatnonzero(np.diff(kinds, prepend=0) * (kinds > 1))] - 2
        for place, fact in enumerate(order):
            places[fact, place] += 1
    assert (places.sum(axis=0) == n).all()
    assert is_uniform(places.ravel())
    assert all(is_uniform(row) for row in places)


def test_a_text_is_six_templates_filled_in_each_drawn_uniformly(stories):
    lines, drawn = [read_lines(f"templates_{fact}") for fact in FACTS], Counter()
    for who, text in zip(*stories, strict=True):
        at = 0
        for fact, value in enumerate(who.values):
            subject, owner = (who.full_name, f"{who.full_name}'s") if fact == 0 else (who.pronoun, who.possessive)
            fillings = {"subject": subject, "subject's": owner, "value": value}
            sentences = [f" {line.format_map(fillings)}" for line in lines[fact]]
            (template,) = [i for i, sentence in enumerate(sentences) if text.startswith(sentence, at)]
            drawn[fact, template] += 1
            at += len(sentences[template])
        assert at == len(text)
    for fact in range(6):
        assert is_uniform([drawn[fact, template] for template in range(len(lines[fact]))])


# ---- text ------------------------------------------------------------------------------------------------------------


def test_text_tells_all_of_one_person_and_names_her_once():
    n = 1500
    task = Capo(num_people=n, exposures=1)
    for i, j in enumerate(task.people(4, "train", 0, n)):
        who, text = task.person(4, int(j)), task.text(4, "train", i)
        assert text.startswith(f" {who.full_name}")
        assert text.count(who.full_name) == 1
        rest = text[1 + len(who.full_name) :]
        own, other = ((" He ", " His "), (" She ", " Her "))[:: 1 if j % 2 == 0 else -1]
        assert sum(text.count(word) for word in own) == 5
        assert not any(word in text for word in other)
        assert "He's" not in text
        assert "She's" not in text
        for value in who.values:
            assert f" {value}" in rest
        assert len(re.findall(r"\.(?= (?:He|She|His|Her) |$)", text)) == 6


def test_kinds_mark_exactly_the_record():
    task = Capo(num_people=500, exposures=2)
    for split, index in [("train", i) for i in range(600)] + [("test", i) for i in range(300)]:
        who = task.person(8, int(task.people(8, cast(Any, split), index, 1)[0]))
        tokens, mask, kinds = task.annotated_example(8, cast(Any, split), index)
        assert mask.all()
        assert tokens[0] == 0
        assert kinds.dtype == np.int8
        assert kinds[1:4].tolist() == [1, 1, 1]
        found = tuple(task.decode(tokens[kinds == kind]) for kind in range(1, 8))
        assert found == tuple(f" {value}" for value in (who.full_name, *who.values))
        assert np.array_equal(find_kinds(tokens), kinds)


def test_decode_inverts_encode(stories):
    task = Capo()
    for text in stories[1][:500]:
        assert task.decode(task.encode(text)) == text
    tokens = task.example(0, "train", 0)[0]
    assert task.encode(task.decode(tokens)) == tokens.tolist()
    assert task.decode([0]) == "<bos>"
    assert task.vocab_size == len(vocabulary().pieces) == len(set(vocabulary().pieces))
    assert list(vocabulary().pieces[1:]) == sorted(vocabulary().pieces[1:])
    with pytest.raises(ValueError, match=r"character 4: no token ' zebra'"):
        task.encode(" She zebra")


def test_describe_tells_the_record():
    task = Capo(num_people=9)
    text = task.describe(task.windows(0, "val", 0, 1, 400).tokens[0])
    for j in task.people(0, "val", 0, task.examples_per_window("val", 400)):
        assert all(value in text for value in (task.person(0, int(j)).full_name, *task.person(0, int(j)).values))
    assert "employer city" in text


# ---- examples and windows --------------------------------------------------------------------------------------------


def test_examples_depend_on_seed_split_and_index_and_on_nothing_else():
    reference = Capo(num_people=50).example(0, "train", 5)[0]
    assert np.array_equal(reference, Capo(num_people=50, exposures=3).example(0, "train", 5)[0])
    batch = Capo(num_people=50).batch(0, "train", 3, 6)
    assert np.array_equal(batch.tokens[2, : batch.lengths[2]], reference)
    for other in [(1, "train", 5), (0, "val", 5), (0, "train", 6), (0, "train", 55)]:
        assert not np.array_equal(reference, Capo(num_people=50).example(*cast(Any, other))[0])


def test_people_are_the_same_in_all_splits_and_for_every_number_of_them():
    small, large = Capo(num_people=40, exposures=2), Capo(num_people=4000)
    assert all(small.person(1, j) == large.person(1, j) for j in range(40))
    assert small.person(1, 0).full_name != small.person(2, 0).full_name
    assert small.person(1, 0).values != small.person(2, 0).values
    texts = defaultdict(set)
    for split, count in (("train", 80), ("val", 40), ("test", 40)):
        for i, j in enumerate(small.people(1, cast(Any, split), 0, count)):
            text = small.text(1, cast(Any, split), i)
            assert all(value in text for value in (small.person(1, int(j)).full_name, *small.person(1, int(j)).values))
            texts[j].add(text)
    assert len(texts) == 40
    assert all(len(told) == 4 for told in texts.values())  # never the same words twice


def test_an_exposure_shows_everyone_once():
    task: Any = Capo(num_people=37, exposures=3)
    orders = task.people(0, "train", 0, 111).reshape(3, 37)
    assert all(sorted(order) == list(range(37)) for order in orders.tolist())
    orders = [*orders, task.people(0, "val", 0, 37), task.people(0, "test", 0, 37), task.people(1, "train", 0, 37)]
    assert len({tuple(order.tolist()) for order in orders}) == 6
    for split, times in (("train", 3), ("val", 1), ("test", 1)):
        windows = task.windows(0, split, 0, task.num_windows(split, 300), 300)
        names = windows.tokens[windows.kinds == 1].reshape(-1, 3)
        found = Counter(task.decode(name).strip() for name in names)
        assert found == {task.person(0, j).full_name: times for j in range(37)}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("length", [512, 200, 40])  # 40 cuts most biographies
def test_windows_are_examples_and_padding(split, length):
    task: Any = Capo(num_people=11, exposures=2)
    per_window, examples = task.examples_per_window(split, length), 22 if split == "train" else 11
    last = task.num_windows(split, length) - 1
    assert last == (examples - 1) // per_window
    windows = task.windows(3, split, last - 1, 3, length)
    for row, window in enumerate(range(last - 1, last + 2)):
        indices = range(window * per_window, min((window + 1) * per_window, examples))
        pieces = [task.annotated_example(3, split, i) for i in indices]
        assert bool(pieces) == (window <= last)
        segments = [number for number, piece in enumerate(pieces) for _ in piece.tokens]
        padding = max(0, length - len(segments))
        for found, expected in (
            (windows.tokens, [*(t for p in pieces for t in p.tokens), *[0] * padding]),
            (windows.loss_mask, [*(m for p in pieces for m in p.loss_mask), *[False] * padding]),
            (windows.kinds, [*(k for p in pieces for k in p.kinds), *[0] * padding]),
            (windows.segments, [*segments, *[len(pieces)] * padding]),
        ):
            assert found[row].tolist() == expected[:length]


def test_window_w_does_not_depend_on_which_batch_asks_for_it():
    task = Capo(num_people=25, exposures=9)
    together = task.windows(0, "train", 0, 6, 300).tokens
    assert np.array_equal(together[2:5], task.windows(0, "train", 2, 3, 300).tokens)


def test_windows_hold_as_many_biographies_as_all_but_always_fit():
    task = Capo()
    assert [task.examples_per_window("train", length) for length in (1, task.min_window, 512, 2048)] == [1, 1, 6, 28]
    assert task.num_windows("train", 512) == -(-50_000 * 100 // 6)
    assert task.num_windows("val", 512) == -(-50_000 // 6)
    windows = task.windows(0, "train", 0, 3000, 512)
    assert windows.loss_mask[:, -1].mean() < 1e-3


def test_examples_never_change():
    """Golden values: a change here changes everybody's data."""
    task = Capo(num_people=100)
    assert task.text(42, "train", 7) == GOLDEN_TEXT
    assert task.example(42, "train", 7)[0].tolist() == [int(token) for token in GOLDEN_TOKENS.split()]


GOLDEN_TEXT = (
    " Nicole Russell Whitlock was delivered by an experienced midwife on January 14, 2096."
    " She chose Bradley University for a college education."
    " She developed a wide range of professional skills at Ivywall Tutoring."
    " She read practically every textbook that has been published on Communications."
    " She gets paid for professional services that are performed in Mooresville, NC."
    " She considers the place of birth to be Los Angeles, CA."
)
GOLDEN_TOKENS = """
0 1846 2243 2738 3422 2987 2904 2858 3042 3188 3215 1344 6 3452 210 3454 2337 2928 531 2609
3066 2831 2936 3017 3454 2337 2992 2831 3432 3280 3209 3261 3334 2870 1333 2594 3454 2337 3281 3251
3034 3375 3377 3101 2881 3273 3215 761 3454 2337 3085 3230 3066 3261 3324 3377 2867 3240 3125 1770
3452 1802 3454 2337 2953 3378 3245 3209 2890 3388 2879 1555 312 3452 608 3454
"""


# ---- scoring ---------------------------------------------------------------------------------------------------------


def test_gold_scores_full_marks_and_one_wrong_token_costs_one_value():
    task = Capo(num_people=60)
    windows = task.windows(0, "val", 0, 10, 512)
    assert windows.kinds is not None
    gold = task.score(windows.tokens, windows.tokens, windows.kinds).counts
    assert gold == dict.fromkeys(FACTS, (60, 60))
    for kind, fact in enumerate(FACTS, start=2):
        wrong = windows.tokens.copy()
        row, t = np.argwhere(windows.kinds == kind)[11]
        wrong[row, t] += 1
        found = task.score(windows.tokens, wrong, windows.kinds).counts
        assert found == gold | {fact: (59, 60)}
    assert task.score(windows.tokens, windows.tokens).counts == gold


@pytest.mark.parametrize("length", [512, 130, 77, 60, 41])
def test_score_reads_kinds_from_the_tokens(length):
    task = Capo(num_people=300)
    windows = task.windows(2, "test", 0, 60, length)
    predictions = np.where(np.random.default_rng(0).random(windows.tokens.shape) < 0.2, -1, windows.tokens)
    known = task.score(windows.tokens, predictions, windows.kinds)
    assert known.counts == task.score(windows.tokens, predictions).counts
    found = np.array([find_kinds(row) for row in windows.tokens])
    assert ((found == windows.kinds) | (found == 0)).all()
    padded = np.where(windows.loss_mask, windows.tokens, -1)
    assert known.counts == task.score(padded, predictions).counts
    assert all(0 < right < total for right, total in known.counts.values())


def test_only_values_are_looked_at():
    task = Capo(num_people=60)
    windows = task.windows(0, "val", 0, 5, 512)
    assert windows.kinds is not None
    nonsense = np.where(windows.kinds > 1, windows.tokens, -1)
    assert task.score(windows.tokens, nonsense) == task.score(windows.tokens, windows.tokens)


def test_a_value_that_nothing_follows_may_be_cut_and_is_not_read():
    tokens, _, kinds = Capo(num_people=9).annotated_example(0, "val", 2)
    for kind in range(2, 8):
        end = int(np.flatnonzero(kinds == kind)[-1]) + 1
        assert (find_kinds(tokens[: end + 1]) == kind).any()
        assert not (find_kinds(tokens[:end]) == kind).any()


@pytest.mark.parametrize("change", [(2, " was"), (6, " Chloe"), (20, " zzz"), (-3, " was")])
def test_what_is_no_biography_is_refused(change):
    task = Capo()
    tokens = task.example(0, "train", 3)[0].copy()
    tokens[change[0]] = vocabulary().ids.get(change[1], task.vocab_size)
    with pytest.raises(ValueError, match="no sentence of a biography begins here"):
        find_kinds(np.append(tokens, 0))


def test_chance_is_the_share_of_the_commonest_value():
    for permute, city, employer in (
        (False, 36 / 263, 133 / 263),
        (True, (36 / 263 + 1) / 2, (1 / 263 + 133 / 263) / 2),
    ):
        task = Capo(permute=permute)
        assert task.groups == FACTS
        expected = (1 / 67_200, 1 / 200, 1 / 300, 1 / 100, city, employer)
        assert [task.chance(fact) for fact in FACTS] == pytest.approx(expected)
    with pytest.raises(ValueError, match="group='job': choose birthday"):
        Capo().chance("job")


# ---- naive twin ------------------------------------------------------------------------------------------------------


def test_the_naive_generator_has_the_same_law():
    """Means of what a window holds, of both, within 4 standard errors of their difference."""
    task: Any = Capo(num_people=3000, exposures=1)
    count = 300
    windows = task.windows(0, "train", 0, count, 512)
    by_hand = [np.array(part) for part in naive.windows(task, random.Random(0), count, 512)]
    features = [
        window_features(*part) for part in zip(windows.tokens, windows.loss_mask, windows.segments, strict=True)
    ]
    expected = [window_features(*part) for part in zip(*by_hand, strict=True)]
    a, b = np.array(features, dtype=float), np.array(expected, dtype=float)
    errors = np.sqrt((a.var(axis=0) + b.var(axis=0)) / count)
    assert (abs(a.mean(axis=0) - b.mean(axis=0)) <= 4 * errors).all()
    spread = np.sqrt((a.var(axis=0) + b.var(axis=0)) / 2)
    assert (abs(a.std(axis=0) - b.std(axis=0)) <= 4 * spread / math.sqrt(count) + 1e-9).all()


def window_features(tokens, mask, segments):
    """Learnt tokens, segments, commas, possessives, pronouns, 's and words of a frequent template; first places of facts."""
    ids = vocabulary().ids
    counted = [
        (tokens == ids[word]).sum()
        for word in (",", ".", " He", " She", " His", " Her", "'s", " was", " York", " born")
    ]
    kinds = find_kinds(tokens)
    starts = np.flatnonzero((tokens == 0) & mask)
    first = [kinds[start + 4 :][kinds[start + 4 :] > 1][0] for start in starts]
    return [
        mask.sum(),
        segments.max(),
        segments.sum(),
        *counted,
        *(first.count(kind) for kind in range(2, 8)),
        (kinds > 1).sum(),
    ]


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_people": 0}, "Capo.num_people=0: from 1 to 160000000"),
        ({"num_people": 160_000_001}, "number of different names"),
        ({"exposures": 0}, "Capo.exposures=0: at least 1"),
        ({"permute": 2}, "Capo.permute=2: true or false"),
    ],
)
def test_absurd_parameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Capo(**options)


def test_absurd_requests_are_refused():
    task: Any = Capo(num_people=5)
    for request, message in (
        (lambda: task.example(0, "dev", 0), "split='dev'.*train, val, test"),
        (lambda: task.num_windows("dev", 512), "split='dev'"),
        (lambda: task.example(0, "train", -1), "example -1: the first is 0"),
        (lambda: task.windows(0, "train", 0, 1, 0), "windows of 0 tokens"),
        (lambda: task.person(0, 5), "people 0..4"),
    ):
        with pytest.raises(ValueError, match=message):
            request()


def test_more_people_than_fit_in_memory_are_no_trouble():
    task = Capo(num_people=160_000_000, exposures=10**6)
    assert len(task.windows(0, "train", 10**12, 2, 512).tokens) == 2
    assert task.text(0, "train", 10**15).startswith(" ")
