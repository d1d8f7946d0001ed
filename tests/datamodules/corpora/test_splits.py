import math
import warnings

import pytest

from src.datamodules.corpora import CorpusError, Document, splits
from src.datamodules.corpora.splits import SPLITS, SplitShares, content_key, hash_unit, plan_splits


def documents(count: int, prefix: str = "doc") -> list[Document]:
    return [Document(f"{prefix}{i}", f"é{prefix}{i}") for i in range(count)]


def unit(document: Document) -> float:
    return hash_unit(content_key(document.text))


def test_golden_hashes():
    """A change here would move documents between the splits of every corpus."""
    assert hash_unit("argparse.py") == 0.09567358656474179
    assert hash_unit("a/b.jsonl:7") == 0.048231508168016024
    assert hash_unit("argparse.py", "tokenizer") != hash_unit("argparse.py")
    assert content_key("a b\n") == content_key(" a\r\nb") == "acc9227cc02e5f5c13e74125bce89499"


def test_shares():
    shares = SplitShares(val=0.1, test=0.3)
    counts = dict.fromkeys(SPLITS, 0)
    for _, text in documents(10_000):
        counts[shares.of(content_key(text))] += 1
    for split, share in {"train": 0.6, "val": 0.1, "test": 0.3}.items():
        assert abs(counts[split] / 10_000 - share) < 5 * math.sqrt(share * (1 - share) / 10_000)


def test_split_depends_on_the_text_only():
    few = plan_splits(documents(300), SplitShares())
    renamed = [Document(f"renamed/{name}", text) for name, text in reversed(documents(300))]
    more = plan_splits([*documents(100, "other"), *renamed], SplitShares())
    assert not few.moved
    assert not more.moved
    keys = [content_key(text) for _, text in documents(300)]
    assert [few.of(key) for key in keys] == [more.of(key) for key in keys]


def test_larger_shares_keep_what_was_held_out():
    small, large = SplitShares(0.05, 0.05), SplitShares(0.1, 0.05)
    keys = [content_key(text) for _, text in documents(1000)]
    assert all(large.of(key) == "val" for key in keys if small.of(key) == "val")


@pytest.mark.parametrize("prefix", ["doc", "x", "file"])
@pytest.mark.parametrize("count", [3, 4, 5, 10, 20, 50, 200])
@pytest.mark.parametrize(
    "shares", [SplitShares(), SplitShares(0.01, 0.01), SplitShares(0.49, 0.5), SplitShares(0.001, 0.9)]
)
def test_no_split_is_empty(prefix, count, shares):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = plan_splits(documents(count, prefix), shares)
    actual = {split: [d for d in documents(count, prefix) if plan.of(content_key(d.text)) == split] for split in SPLITS}
    assert all(actual.values())
    assert plan.documents == {split: len(members) for split, members in actual.items()}
    assert plan.bytes == {split: sum(len(d.text.encode()) for d in members) for split, members in actual.items()}
    empty = [s for s in SPLITS if all(shares.of(content_key(d.text)) != s for d in documents(count, prefix))]
    assert sorted(plan.moved.values()) == sorted(empty)


def test_the_smallest_hash_moves_and_a_warning_says_so():
    names = [d for d in documents(40) if SplitShares().of(content_key(d.text)) == "train"][:5]
    first, second = sorted((unit(d), d.name) for d in names)[:2]
    with pytest.warns(UserWarning, match=r"none of the 5 documents falls into the (val|test) split") as record:
        plan = plan_splits(names, SplitShares())
    assert plan.moved_names == {first[1]: "val", second[1]: "test"}
    assert len(record) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert plan_splits(list(reversed(names)), SplitShares()).moved == plan.moved


def test_the_split_with_the_smallest_hash_gives():
    shares = SplitShares(0.001, 0.5)
    smallest = min(documents(40), key=unit)
    assert shares.of(content_key(smallest.text)) == "test"
    with pytest.warns(UserWarning, match="val split"):
        assert plan_splits(documents(40), shares).moved_names == {smallest.name: "val"}


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_documents(count):
    with pytest.raises(CorpusError, match=rf"{count} document\(s\).*one each"):
        plan_splits(documents(count), SplitShares())


@pytest.mark.parametrize(("val", "test"), [(0, 0.1), (0.1, 0), (-0.1, 0.2), (0.5, 0.5), (1, 0.1), (float("nan"), 0.1)])
def test_impossible_shares(val, test):
    with pytest.raises(CorpusError, match=f"val_share={val} and test_share={test}"):
        SplitShares(val, test)


TEXT = "One line,\n\tand another  one.\n"
TWINS = {
    "same": TEXT,
    "crlf": TEXT.replace("\n", "\r\n"),
    "cr": TEXT.replace("\n", "\r"),
    "no newline at the end": TEXT.strip(),
    "more newlines": "\n\n" + TEXT + "\n \n",
    "byte order mark": "\ufeff" + TEXT,
    "spaces": TEXT.replace(" ", "\u00a0 \u2028"),
}


class TestIdenticalDocuments:
    @pytest.mark.parametrize("twin", TWINS)
    @pytest.mark.parametrize("block", [2**20, 1, 2, 3, 7])
    def test_white_space_makes_no_other_text(self, monkeypatch, twin, block):
        monkeypatch.setattr(splits, "_BLOCK_CHARACTERS", block)
        assert content_key(TWINS[twin]) == content_key(TEXT)
        assert content_key("Oneline, and another one.") != content_key(TEXT)
        assert content_key("One line, and another oneX") != content_key(TEXT)

    @pytest.mark.parametrize("copies", [1, 2, 10])
    @pytest.mark.parametrize("count", [3, 4, 5, 60])
    @pytest.mark.parametrize("shares", [SplitShares(), SplitShares(0.001, 0.9)])
    def test_are_on_one_side(self, count, copies, shares):
        rows = [Document(f"{name}:{copy}", text) for copy in range(copies) for name, text in documents(count)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan = plan_splits(rows, shares)
        sides = {split: [row for row in rows if plan.of(content_key(row.text)) == split] for split in SPLITS}
        assert all(sides.values())
        assert {split: len(side) for split, side in sides.items()} == plan.documents
        assert {split: sum(len(text.encode()) for _, text in side) for split, side in sides.items()} == plan.bytes
        assert plan.duplicates == (copies - 1) * count

    def test_move_together(self):
        few = [d for d in documents(40) if SplitShares().of(content_key(d.text)) == "train"][:3]
        with pytest.warns(UserWarning, match=r"moved 'a:doc\d+' and 4 identical document\(s\) there"):
            plan = plan_splits([Document(f"{c}:{d.name}", d.text) for c in "abcde" for d in few], SplitShares())
        assert plan.documents == {"train": 5, "val": 5, "test": 5}

    def test_fewer_than_three_texts(self):
        rows = [Document(f"{copy}", text + "\n" * copy) for copy in range(50) for _, text in documents(2)]
        with pytest.raises(CorpusError, match=r"100 document\(s\) with 2 distinct text\(s\).*one each"):
            plan_splits(rows, SplitShares())

    def test_a_notable_share_is_said(self):
        rows = documents(1000)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert (
                plan_splits([*rows, *[Document(f"again/{n}", t) for n, t in rows[:5]]], SplitShares()).duplicates == 5
            )
        with pytest.warns(UserWarning, match=r"^1000 of 2000 documents \(50%\) repeat .* 1000 distinct") as record:
            plan_splits([*rows, *rows], SplitShares())
        assert len(record) == 1
