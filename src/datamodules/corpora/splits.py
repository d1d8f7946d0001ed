"""Train, validation and test documents, told apart by a hash of their text.

    key = blake2b(text with runs of white space as one space)
    u = blake2b(key) / 2^64 in [0, 1):    u < val: "val";    u < val + test: "test";    else "train"

So the split of a document depends neither on its name, nor on the order, nor on the machine, nor on which other
documents there are. Identical documents are on the same side, those included that differ in line endings, blank space
or a byte order mark only: nothing that is held out is trained on under another name. A corpus that grows keeps its
held-out documents held out. The one exception is a corpus so small that a split would be empty.
"""

import hashlib
import re
import warnings
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from src.datamodules.corpora.errors import CorpusError
from src.datamodules.corpora.sources import Document

SPLITS: tuple[str, ...] = ("train", "val", "test")

NOTABLE_SHARE = 0.01
"""From this share of documents on that repeat another one, there is a warning."""

_WHITE_SPACE = re.compile(r"\s+")
_BLOCK_CHARACTERS = 2**20
_CANDIDATES = 3


def content_key(text: str) -> str:
    """Return what stands for a text: 32 hexadecimal digits, the same for texts that differ in white space only."""
    digest = hashlib.blake2b(digest_size=16)
    begun = space = False
    # In blocks: a copy of a long text may not fit into memory.
    for start in range(0, len(text), _BLOCK_CHARACTERS):
        block = _WHITE_SPACE.sub(" ", text[start : start + _BLOCK_CHARACTERS].replace("\ufeff", ""))
        words = block.strip(" ")
        space |= block.startswith(" ")
        if words:
            separator = " " if begun and space else ""
            digest.update((separator + words).encode("utf-8", "surrogatepass"))
            begun, space = True, block.endswith(" ")
    return digest.hexdigest()


def hash_unit(key: str, purpose: str = "split") -> float:
    """Map a document's key to [0, 1), uniformly and for ever; another `purpose` gives an independent number."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8, person=purpose.encode())
    return (int.from_bytes(digest.digest(), "little") >> 11) / 2**53


@dataclass(frozen=True)
class SplitShares:
    """Expected shares of the documents in "val" and "test"; the rest is "train". CorpusError unless all exceed 0."""

    val: float = 0.05
    test: float = 0.05

    def __post_init__(self) -> None:
        if not (self.val > 0 and self.test > 0 and self.val + self.test < 1):
            raise CorpusError(
                f"val_share={self.val} and test_share={self.test}: both must be greater than 0, their sum less than 1"
            )

    def of(self, key: str) -> str:
        """Return the split of the documents whose text has this `content_key`."""
        u = hash_unit(key)
        return "val" if u < self.val else "test" if u < self.val + self.test else "train"


@dataclass
class SplitPlan:
    """Which split each document goes to, and how many documents and UTF-8 bytes each split gets.

    Attributes: `moved`, the splits of the keys that fill an empty one; `moved_names`, the same by the name of a
    document; `duplicates`, how many documents repeat the text of another one, white space aside.
    """

    shares: SplitShares
    moved: dict[str, str] = field(default_factory=dict)
    moved_names: dict[str, str] = field(default_factory=dict)
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    duplicates: int = 0

    def of(self, key: str) -> str:
        """Return the split of the documents whose text has this `content_key`."""
        return self.moved.get(key) or self.shares.of(key)


@dataclass
class _Candidate:
    """A text that may have to move, with all documents that hold it."""

    u: float
    key: str
    name: str
    documents: int = 0
    bytes: int = 0


def plan_splits(documents: Iterable[Document], shares: SplitShares) -> SplitPlan:
    """Read every document once and return a plan in which no split is empty.

    If the hash leaves a split empty, the texts with the smallest hashes among the splits that can spare one move there,
    each with all documents that hold it, with a warning. Another warning tells of many duplicates. Raises CorpusError
    for fewer than three distinct texts.
    """
    plan = SplitPlan(shares)
    # Three texts of each split are enough to choose from: at most two splits are empty.
    smallest: dict[str, dict[str, _Candidate]] = {split: {} for split in SPLITS}
    seen = array("Q")  # eight bytes per document: half the key, which meets another one by chance in 10^9 documents
    for name, text in documents:
        key = content_key(text)
        split = shares.of(key)
        size = len(text.encode())
        plan.documents[split] += 1
        plan.bytes[split] += size
        seen.append(int(key[:16], 16))
        # A text among the smallest of all was among the smallest so far at its first document: its counts are whole.
        few = smallest[split]
        candidate = few.get(key) or few.setdefault(key, _Candidate(hash_unit(key), key, name))
        candidate.documents += 1
        candidate.bytes += size
        if len(few) > _CANDIDATES:
            del few[max(few.values(), key=lambda candidate: (candidate.u, candidate.key)).key]
    distinct = len(np.unique(np.frombuffer(seen, dtype=np.uint64))) if seen else 0
    plan.duplicates = len(seen) - distinct
    if distinct < len(SPLITS):
        raise CorpusError(
            f"the corpus has {len(seen)} document(s)"
            + (f" with {distinct} distinct text(s)" if plan.duplicates else "")
            + ", but train, val and test need one each: add files, or write the text as .jsonl with one document per"
            " line"
        )
    if plan.duplicates > NOTABLE_SHARE * len(seen):
        warnings.warn(
            f"{plan.duplicates} of {len(seen)} documents ({plan.duplicates / len(seen):.0%}) repeat the text of another"
            f" one: there are {distinct} distinct texts, and a text is in one split only",
            stacklevel=2,
        )
    _fill_empty_splits(
        plan, {split: sorted(few.values(), key=lambda c: (c.u, c.key)) for split, few in smallest.items()}
    )
    return plan


def _fill_empty_splits(plan: SplitPlan, smallest: dict[str, list[_Candidate]]) -> None:
    for empty in [split for split in SPLITS if plan.documents[split] == 0]:
        donors = [split for split in SPLITS if len(smallest[split]) > 1]
        donor = min(donors, key=lambda split: smallest[split][0].u)
        moving = smallest[donor].pop(0)
        plan.moved[moving.key] = plan.moved_names[moving.name] = empty
        smallest[empty].append(moving)
        for counts, amount in ((plan.documents, moving.documents), (plan.bytes, moving.bytes)):
            counts[donor] -= amount
            counts[empty] += amount
        twins = f" and {moving.documents - 1} identical document(s)" if moving.documents > 1 else ""
        warnings.warn(
            f"none of the {sum(plan.documents.values())} documents falls into the {empty} split (val_share="
            f"{plan.shares.val}, test_share={plan.shares.test}): moved {moving.name!r}{twins} there; more documents"
            " avoid this",
            stacklevel=2,
        )
