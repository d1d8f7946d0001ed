"""Reading a tokenised corpus: flat token streams, cut into windows by arithmetic.

Each document is stored as BOS + tokens + EOS, documents in the order of the source. Window w of length T of a stream is

    tokens[w T : w T + T + 1]        inputs are its first T tokens, targets its last T

so windows overlap by one token and every token but the first is a target exactly once; the incomplete tail is dropped.

Training reads window w = permute(w mod W, W, key=(seed, w div W)) of the W there are: one permutation per epoch, and a
pure function of (seed, w), whatever was read before. Shapes: `n` windows, `T` tokens per window.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from src.datamodules.corpora.errors import CorpusError
from src.datamodules.corpora.integrity import (
    TOKENIZER,
    DamagedCorpusError,
    checked_meta,
    offsets_file,
    tokens_file,
)
from src.datamodules.corpora.splits import SPLITS
from src.datamodules.corpora.tokenizer import Tokenizer
from src.support.permutation import permute_array

EVALUATED = ("val", "test")
"""The splits on which anything is measured per byte."""
_COUNTED_AT_ONCE = 2**22


class TokenStream:
    """The tokens of one split, memory-mapped on first use. Pickles as a path, so that workers map the same pages.

    The files were checked when the corpus was opened; a copy in another process does not check them again.

    Attributes: `split`, `num_documents`, `num_tokens` (with BOS and EOS), `num_bytes` (UTF-8 length of the texts).
    """

    def __init__(self, folder: Path, split: str, documents: int, tokens: int, bytes: int) -> None:
        self.folder = folder
        self.split = split
        self.num_documents = documents
        self.num_tokens = tokens
        self.num_bytes = bytes

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStream, (self.folder, self.split, self.num_documents, self.num_tokens, self.num_bytes)

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """All tokens: uint16 or uint32 [num_tokens], read-only."""
        return self._map(tokens_file(self.split), self.num_tokens)

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """Where documents start, and the end of the last: int64 [num_documents + 1], read-only."""
        return self._map(offsets_file(self.split), self.num_documents + 1)

    def _map(self, file: str, length: int) -> np.ndarray:
        try:
            # Not np.load, which opens archives and, if told to, pickles too.
            array = np.lib.format.open_memmap(self.folder / file, mode="r")
        except ValueError as error:
            raise CorpusError(f"{self.folder / file} cannot be read: {error}") from error
        if array.shape != (length,):
            raise CorpusError(f"{self.folder / file} has changed since it was opened: its shape is {array.shape}")
        return np.asarray(array)

    def num_windows(self, length: int) -> int:
        """Return how many windows of `length` targets there are; CorpusError if there is none."""
        if length < 1:
            raise CorpusError(f"window length {length} is less than 1")
        count = (self.num_tokens - 1) // length
        if count < 1:
            raise CorpusError(
                f"the {self.split} split of {self.folder} holds {self.num_tokens} tokens, fewer than the {length + 1}"
                f" of one window of length {length}: use shorter windows, more text, or a larger share for this split"
            )
        return count

    def windows(self, indices: np.ndarray, length: int) -> np.ndarray:
        """Return windows `indices` (integers [n]) as int64 [n, length + 1].

        Raises IndexError for a window that does not exist, CorpusError if none does.
        """
        return self.tokens[self._positions(indices, length)].astype(np.int64)

    def segments(self, indices: np.ndarray, length: int) -> np.ndarray:
        """Return which document each token of the windows belongs to, counted from 0 in each: int32 [n, length + 1].

        Raises as `windows` does.
        """
        documents = np.searchsorted(self.offsets, self._positions(indices, length), side="right")
        return (documents - documents[:, :1]).astype(np.int32)

    def _positions(self, indices: np.ndarray, length: int) -> np.ndarray:
        count = self.num_windows(length)
        indices = np.asarray(indices, dtype=np.int64)
        if indices.ndim != 1:
            raise IndexError(f"window indices must be a list of integers, not of shape {indices.shape}")
        if indices.size and (indices.min() < 0 or indices.max() >= count):
            raise IndexError(
                f"windows {indices.min()} to {indices.max()} asked of the {self.split} split, which has {count} of"
                f" length {length}"
            )
        return indices[:, None] * length + np.arange(length + 1)


class Corpus:
    """A tokenised corpus on disk, as `prepare` leaves it; opens without the source it was made from.

    Opening checks the folder once, in bounded time (see `integrity`).

    Attributes: `path`, `name`, `fingerprint`, and `meta`, the plain contents of meta.json. Raises CorpusError if the
    folder is not a complete corpus, or holds other bytes than were written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.meta: dict[str, Any] = checked_meta(self.path)
        self.name: str = self.meta["name"]
        self.fingerprint: str = self.meta["fingerprint"]
        self._token_bytes: dict[str, int] = dict(self.meta.get("token_bytes", {}))
        self._streams = {split: TokenStream(self.path, split, **self.meta["splits"][split]) for split in SPLITS}

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokeniser the corpus was made with."""
        options = self.meta["tokenizer"]
        tokenizer = Tokenizer.load(self.path / TOKENIZER, options["bos"], options["eos"])
        for key in ("vocab_size", "bos_id", "eos_id"):
            if getattr(tokenizer, key) != options[key]:
                found = f"{TOKENIZER} has {key} {getattr(tokenizer, key)}, the tokens were made with {options[key]}"
                raise DamagedCorpusError(self.path, found)
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Size of the tokeniser's vocabulary: that of the file, not what meta.json says of it, which may ask for gigabytes."""
        return self.tokenizer.vocab_size

    def token_bytes(self, split: str) -> int:
        """Return for how many bytes of text the tokens of a split stand, by `Tokenizer.bytes_per_token`.

        From meta.json; counted where an earlier version has not written it.
        """
        if split not in self._token_bytes:
            stream, table = self.split(split), self.tokenizer.bytes_per_token
            starts = range(0, stream.num_tokens, _COUNTED_AT_ONCE)
            pieces = (stream.tokens[start : start + _COUNTED_AT_ONCE] for start in starts)
            self._token_bytes[split] = sum(int(table[piece].sum()) for piece in pieces)
        return self._token_bytes[split]

    def bytes_ratio(self, split: str) -> float:
        """Return the bytes of a split's texts over those that its tokens stand for: 1 if they are the text, byte for byte.

        A tokeniser that rewrites the text (lower case, a mark at the end of each word) has tokens whose bytes are not the
        text's; what is measured per byte of its tokens is divided by this.
        """
        stand_for = self.token_bytes(split)
        return self.split(split).num_bytes / stand_for if stand_for else 1.0

    def split(self, name: str) -> TokenStream:
        """Return the stream of split "train", "val" or "test"; CorpusError for another name."""
        if name not in self._streams:
            raise CorpusError(f"no split {name!r}; there are {', '.join(SPLITS)}")
        return self._streams[name]


def training_indices(num_windows: int, seed: int, start: int, count: int) -> np.ndarray:
    """Return which windows the training positions start..start + count - 1 read, of `num_windows`: int64 [count].

    Positions e W .. e W + W - 1 (W = num_windows) are epoch e, a permutation of all windows keyed by (seed, e).
    Raises ValueError if `start` or `count` is negative.
    """
    if start < 0 or count < 0:
        raise ValueError(f"start={start} and count={count} must not be negative")
    out = np.empty(count, dtype=np.int64)
    done = 0
    while done < count:
        epoch, first = divmod(start + done, num_windows)
        size = min(count - done, num_windows - first)
        positions = np.arange(first, first + size, dtype=np.int64)
        out[done : done + size] = permute_array(positions, num_windows, key=(seed, epoch))
        done += size
    return out


def training_windows(corpus: Corpus, seed: int, start: int, count: int, length: int) -> np.ndarray:
    """Return the windows at training positions start..start + count - 1: int64 [count, length + 1].

    A pure function of the corpus and the arguments; see `training_indices` for the order and the errors.
    """
    stream = corpus.split("train")
    return stream.windows(training_indices(stream.num_windows(length), seed, start, count), length)


def damage(path: Path) -> str | None:
    """Return what is wrong with the corpus in folder `path`, or None if it is whole; checks it as opening does."""
    try:
        checked_meta(path)
    except DamagedCorpusError as error:
        return error.problem
    return None
