"""Train, validation and test documents, told apart by a hash of their names.

    u = blake2b(name) / 2^64 in [0, 1):    u < val: "val";    u < val + test: "test";    else "train"

So the split of a document does not depend on the order, on the machine, or on which other documents there are: a corpus
that grows keeps its held-out documents held out. The one exception is a corpus so small that a split would be empty.
"""

import hashlib
import heapq
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

from src.datamodules.corpora.errors import CorpusError
from src.datamodules.corpora.sources import Document

SPLITS: tuple[str, ...] = ("train", "val", "test")


def hash_unit(name: str, purpose: str = "split") -> float:
    """Map a document's name to [0, 1), uniformly and for ever; another `purpose` gives an independent number."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8, person=purpose.encode())
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

    def of(self, name: str) -> str:
        """Return the split of the document called `name`."""
        u = hash_unit(name)
        return "val" if u < self.val else "test" if u < self.val + self.test else "train"


@dataclass
class SplitPlan:
    """Which split each document goes to, and how many documents and UTF-8 bytes each split gets."""

    shares: SplitShares
    moved: dict[str, str] = field(default_factory=dict)
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))

    def of(self, name: str) -> str:
        """Return the split of the document called `name`."""
        return self.moved.get(name) or self.shares.of(name)


def plan_splits(documents: Iterable[Document], shares: SplitShares) -> SplitPlan:
    """Read every document once and return a plan in which no split is empty.

    If the hash leaves a split empty, the documents with the smallest hashes among the splits that can spare one move
    there, with a warning. Raises CorpusError for fewer than three documents.
    """
    plan = SplitPlan(shares)
    # Three documents of each split are enough to choose from: at most two splits are empty. (u, name, bytes)
    smallest: dict[str, list[tuple[float, str, int]]] = {split: [] for split in SPLITS}
    for name, text in documents:
        split = shares.of(name)
        size = len(text.encode())
        plan.documents[split] += 1
        plan.bytes[split] += size
        candidates = [*smallest[split], (hash_unit(name), name, size)]
        smallest[split] = heapq.nsmallest(3, candidates)
    total = sum(plan.documents.values())
    if total < len(SPLITS):
        raise CorpusError(
            f"the corpus has {total} document(s), but train, val and test need one each: add files, or write the text"
            " as .jsonl with one document per line"
        )
    _fill_empty_splits(plan, smallest)
    return plan


def _fill_empty_splits(plan: SplitPlan, smallest: dict[str, list[tuple[float, str, int]]]) -> None:
    for empty in [split for split in SPLITS if plan.documents[split] == 0]:
        donors = [split for split in SPLITS if plan.documents[split] > 1]
        donor = min(donors, key=lambda split: smallest[split][0])
        u, name, size = smallest[donor].pop(0)
        plan.moved[name] = empty
        smallest[empty].append((u, name, size))
        for counts, amount in ((plan.documents, 1), (plan.bytes, size)):
            counts[donor] -= amount
            counts[empty] += amount
        warnings.warn(
            f"none of the {sum(plan.documents.values())} documents falls into the {empty} split (val_share="
            f"{plan.shares.val}, test_share={plan.shares.test}): moved {name!r} there; more documents avoid this",
            stacklevel=2,
        )
