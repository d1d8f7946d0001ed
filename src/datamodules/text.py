"""Real text as a LightningDataModule: tokenised once, read for ever (``corpora/``)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from src.datamodules.base import StreamDataModule
from src.datamodules.corpora import (
    SPLITS,
    Corpus,
    Source,
    TokenizerOptions,
    TokenStream,
    corpus_identity,
    prepare,
    training_indices,
)
from src.support.permutation import permute_array

# Keys of the permutations that pick evaluation windows.
_SPREAD = {"val": 1, "test": 2}


@dataclass(frozen=True)
class TextWindows:
    """The windows of a corpus: a ``WindowSource``. Every token but the first of a window is a target.

    Args:
        streams: the tokens of each split.
        window: tokens in a window.
        seed: of the order of training windows.
        limits: most windows of each evaluation split; None for all.
        isolate: number the documents of a window, to keep them apart.
    """

    streams: dict[str, TokenStream]
    window: int
    seed: int
    limits: dict[str, int | None]
    isolate: bool = False

    def windows(self, split: str, first: int, count: int) -> dict[str, NDArray[Any]]:
        """See ``WindowSource.windows``."""
        stream, length = self.streams[split], self.window - 1
        total = stream.num_windows(length)
        if split == "train":
            indices = training_indices(total, self.seed, first, count)
        else:
            # Spread over the split: its first windows would be its alphabetically first documents.
            indices = permute_array(np.arange(first, first + count), total, key=_SPREAD[split])
        batch = {"tokens": stream.windows(indices, length)}
        return batch | {"segments": stream.segments(indices, length)} if self.isolate else batch

    def num_windows(self, split: str) -> int | None:
        """See ``WindowSource.num_windows``."""
        total, limit = self.streams[split].num_windows(self.window - 1), self.limits.get(split)
        return total if limit is None else min(limit, total)


class TextDataModule(StreamDataModule):
    """Cuts a corpus into windows of consecutive tokens, which overlap by one: every token is a target exactly once.

    Documents are stored as <bos> text <eos> and concatenated; windows ignore their boundaries unless ``isolate``. Training reads
    all windows in an order that is a keyed permutation of its own in every epoch.

    Args:
        source: where the documents come from, see ``src.datamodules.corpora``; or what makes it out of ``path``.
        window: tokens in a window; one fewer is predicted.
        batch_size: windows per optimizer step, over all ranks and accumulated micro-batches.
        cache_dir: where tokenised corpora are kept.
        tokenizer: ``bpe`` (trained on the training documents), ``bytes``, or the path of a ``tokenizer.json``.
        tokenizer_size: vocabulary of ``bpe``; None for its default.
        bos: token that begins a document, of a ``tokenizer.json``; None: looked for under the usual names.
        eos: token that ends a document, likewise.
        val_share: share of the documents held out for validation; identical documents are on one side.
        test_share: share of the documents held out for the test.
        val_windows: validation windows, spread over the split; None for all.
        test_windows: test windows, likewise.
        eval_batch_size: windows per evaluation batch, of one rank.
        isolate: keep documents apart within a window.
        num_workers: processes that prepare batches.
        seed: of the order of training windows.
        path: the file or folder to be read, for sources that need one.
    """

    config_name = "text_windows"

    def __init__(
        self,
        source: Source | Callable[[str], Source],
        *,
        window: int,
        batch_size: int,
        cache_dir: str,
        tokenizer: str = "bpe",
        tokenizer_size: int | None = None,
        val_share: float = 0.05,
        test_share: float = 0.05,
        val_windows: int | None = None,
        test_windows: int | None = None,
        eval_batch_size: int = 32,
        isolate: bool = False,
        num_workers: int = 0,
        seed: int = 0,
        path: str | None = None,
        bos: str | None = None,
        eos: str | None = None,
    ):
        super().__init__(window, batch_size, eval_batch_size, num_workers)
        for name, limit in (("val_windows", val_windows), ("test_windows", test_windows)):
            if limit is not None and limit < 1:
                raise ValueError(f"data.{name}={limit}: at least 1, or null for all")
        if not 0 <= seed < 2**64:
            raise ValueError(f"data.seed={seed}: a number from 0 to 2^64 - 1")
        if not isinstance(source, Source):
            if path is None:
                raise ValueError("data.path: must name a file or folder of text")
            source = source(path)
        self.documents, self.isolate, self.seed = source, isolate, seed
        self.cache_dir = Path(cache_dir)
        # The size is of bpe alone; the others bring their own.
        size = tokenizer_size if tokenizer == "bpe" else None
        self.options = TokenizerOptions(tokenizer, vocab_size=size, bos=bos, eos=eos)
        self.val_share, self.test_share = val_share, test_share
        self.limits = {"val": val_windows, "test": test_windows}

    def prepare_data(self) -> None:
        """Tokenises the corpus unless it is in the cache; Lightning calls this on one process of each node."""
        _ = self.corpus

    @cached_property
    def corpus(self) -> Corpus:
        """The tokenised corpus. Processes that ask at once all end up with the same one."""
        return prepare(
            self.documents, self.options, self.cache_dir, val_share=self.val_share, test_share=self.test_share
        )

    def expected_fingerprint(self) -> dict[str, Any]:
        """Name and fingerprint of the corpus that would be prepared from the files as they are now, without preparing it.

        They are those of ``fingerprint()`` unless files, tokenizer or shares have changed.
        """
        return dict(corpus_identity(self.documents, self.options, val_share=self.val_share, test_share=self.test_share))

    @cached_property
    def source(self) -> TextWindows:
        """The corpus's windows."""
        streams = {split: self.corpus.split(split) for split in SPLITS}
        return TextWindows(streams, self.window, self.seed, self.limits, self.isolate)

    @property
    def vocab_size(self) -> int:
        """The tokeniser's."""
        return self.corpus.vocab_size

    @property
    def expected_vocab_size(self) -> int:
        """What the tokeniser is asked to have."""
        return self.options.expected_vocab_size

    def fingerprint(self) -> dict[str, Any]:
        """The corpus's own, which covers every document and the tokeniser, and how it is cut."""
        splits = {split: dict(self.corpus.meta["splits"][split]) for split in SPLITS}
        words = hashlib.blake2b(self.corpus.tokenizer.definition.encode(), digest_size=8).hexdigest()
        found = {
            "corpus": self.corpus.name,
            "fingerprint": self.corpus.fingerprint,
            "seed": self.seed,
            "splits": splits,
        }
        return found | {"tokenizer": words}
