import math
import warnings

import pytest

from src.datamodules.corpora import CorpusError, Document
from src.datamodules.corpora.splits import SPLITS, SplitShares, hash_unit, plan_splits


def documents(count: int, prefix: str = "doc") -> list[Document]:
    return [Document(f"{prefix}{i}", f"é{i}") for i in range(count)]


def test_golden_hashes():
    """A change here would move documents between the splits of every corpus."""
    assert hash_unit("argparse.py") == 0.09567358656474179
    assert hash_unit("a/b.jsonl:7") == 0.048231508168016024
    assert hash_unit("argparse.py", "tokenizer") != hash_unit("argparse.py")


def test_shares():
    shares = SplitShares(val=0.1, test=0.3)
    counts = dict.fromkeys(SPLITS, 0)
    for name, _ in documents(10_000):
        counts[shares.of(name)] += 1
    for split, share in {"train": 0.6, "val": 0.1, "test": 0.3}.items():
        assert abs(counts[split] / 10_000 - share) < 5 * math.sqrt(share * (1 - share) / 10_000)


def test_split_depends_on_the_name_only():
    few = plan_splits(documents(300), SplitShares())
    more = plan_splits([*documents(100, "other"), *reversed(documents(300))], SplitShares())
    assert not few.moved
    assert not more.moved
    assert [few.of(name) for name, _ in documents(300)] == [more.of(name) for name, _ in documents(300)]


def test_larger_shares_keep_what_was_held_out():
    small, large = SplitShares(0.05, 0.05), SplitShares(0.1, 0.05)
    assert all(large.of(name) == "val" for name, _ in documents(1000) if small.of(name) == "val")


@pytest.mark.parametrize("prefix", ["doc", "x", "file"])
@pytest.mark.parametrize("count", [3, 4, 5, 10, 20, 50, 200])
@pytest.mark.parametrize(
    "shares", [SplitShares(), SplitShares(0.01, 0.01), SplitShares(0.49, 0.5), SplitShares(0.001, 0.9)]
)
def test_no_split_is_empty(prefix, count, shares):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = plan_splits(documents(count, prefix), shares)
    actual = {split: [d for d in documents(count, prefix) if plan.of(d.name) == split] for split in SPLITS}
    assert all(actual.values())
    assert plan.documents == {split: len(members) for split, members in actual.items()}
    assert plan.bytes == {split: sum(len(d.text.encode()) for d in members) for split, members in actual.items()}
    empty = [s for s in SPLITS if all(shares.of(d.name) != s for d in documents(count, prefix))]
    assert sorted(plan.moved.values()) == sorted(empty)


def test_the_smallest_hash_moves_and_a_warning_says_so():
    names = [d for d in documents(40) if SplitShares().of(d.name) == "train"][:5]
    first, second = sorted((hash_unit(d.name), d.name) for d in names)[:2]
    with pytest.warns(UserWarning, match=r"none of the 5 documents falls into the (val|test) split") as record:
        plan = plan_splits(names, SplitShares())
    assert plan.moved == {first[1]: "val", second[1]: "test"}
    assert len(record) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert plan_splits(list(reversed(names)), SplitShares()).moved == plan.moved


def test_the_split_with_the_smallest_hash_gives():
    shares = SplitShares(0.001, 0.5)
    smallest = min(documents(40), key=lambda d: hash_unit(d.name))
    assert shares.of(smallest.name) == "test"
    with pytest.warns(UserWarning, match="val split"):
        assert plan_splits(documents(40), shares).moved == {smallest.name: "val"}


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_documents(count):
    with pytest.raises(CorpusError, match=rf"{count} document\(s\).*one each"):
        plan_splits(documents(count), SplitShares())


@pytest.mark.parametrize(("val", "test"), [(0, 0.1), (0.1, 0), (-0.1, 0.2), (0.5, 0.5), (1, 0.1), (float("nan"), 0.1)])
def test_impossible_shares(val, test):
    with pytest.raises(CorpusError, match=f"val_share={val} and test_share={test}"):
        SplitShares(val, test)
