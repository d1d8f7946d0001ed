"""Text to token ids and back, with the number of text bytes that each token stands for.

`bytes_per_token` makes losses comparable between tokenisers:

    bits per byte = (sum over tokens of the negative log-likelihood) / ln 2 / (sum over tokens of bytes_per_token)

For byte-level tokenisers, ours and those of GPT-2 or Llama 3, the bytes of a document's tokens add up to its UTF-8
length exactly. Those of tokenisers that rewrite the text (a space put in front, Unicode normalisation) are off by what
they rewrite, which `Corpus.bytes_ratio` makes up for.
"""

import functools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from src.datamodules.corpora import apart
from src.datamodules.corpora.apart import Description
from src.datamodules.corpora.definitions import LARGEST_FILE, check_ids, parse, read_definition
from src.datamodules.corpora.errors import CorpusError
from src.datamodules.corpora.files import content_digest, printable

DEFAULT_VOCAB_SIZE = 4096
BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"
USUAL_BOS = (BOS, "<s>", "<bos>", "<|bos|>", "[BOS]", "<|startoftext|>", "<|endoftext|>", "[CLS]")
USUAL_EOS = (EOS, "</s>", "<eos>", "<|eos|>", "[EOS]", "<|endoftext|>", "[SEP]")

LONGEST_WORD = 1020
"""Bytes of a word that BPE is trained on. A multiple of 1, 2, 3 and 4: in most scripts, cuts are between characters."""

_PIECE_CHARACTERS = 2**20
_TRAINING_PIECE_CHARACTERS = 2**16


class Tokenizer:
    """A tokeniser with a beginning-of-sequence and an end-of-sequence token.

    `definition` is the text of a tokenizer.json of Hugging Face tokenizers; `bos` and `eos` are tokens in it. The text
    of a special token inside a document is encoded like any other text and never as that token.

    Attributes: `vocab_size` (largest id + 1), `bos`, `eos`, `bos_id`, `eos_id`, `definition`, and `bytes_per_token`,
    int64 [vocab_size], 0 for special tokens.
    """

    def __init__(self, definition: str, bos: str, eos: str) -> None:
        self.definition = definition
        self.bos, self.eos = bos, eos
        self._backend = parse(definition)
        description = self._backend.description
        ids = [*description.vocabulary.values(), *(index for index, _, _ in description.added)]
        check_ids(ids)  # again: the library may have given tokens other ids than the file
        self.vocab_size = max(ids) + 1
        self.bos_id, self.eos_id = description.vocabulary[bos], description.vocabulary[eos]
        self.bytes_per_token = _bytes_per_token(description, self.vocab_size)
        self.bytes_per_token[[self.bos_id, self.eos_id]] = 0
        self._ids_are_bytes = definition == _byte_definition()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the definition."""
        return Tokenizer, (self.definition, self.bos, self.eos)

    @classmethod
    def of_bytes(cls) -> "Tokenizer":
        """Return the tokeniser whose ids 0..255 are the UTF-8 bytes, with BOS 256 and EOS 257."""
        return cls(_byte_definition(), BOS, EOS)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train byte-level BPE on `texts`: BOS 0, EOS 1, then the 256 bytes, then merges. Deterministic.

        Words, which tokens do not cross, are cut after `LONGEST_WORD` bytes: text without spaces (DNA, base64, some
        scripts) is one word otherwise, and training takes time that grows with the square of its length. If such text
        is met, the tokeniser cuts it in the same places when it encodes; all other text is tokenised as without.

        Warns if the texts are too small for `vocab_size`; raises CorpusError if that leaves no room for the bytes, or if
        training takes too long (``apart.py``).
        """
        if vocab_size < 258:
            raise CorpusError(f"vocab_size={vocab_size} is too small for BPE: 256 bytes, BOS and EOS need 258")
        feed = _TrainingText(pre_tokenizers.ByteLevel(add_prefix_space=False))
        definition, size = apart.train(
            feed.pieces(texts), vocab_size, [BOS, EOS], lambda: LONGEST_WORD if feed.long_words else 0
        )
        if size < vocab_size:
            warnings.warn(
                f"the training text yields {size} tokens, fewer than vocab_size={vocab_size}",
                stacklevel=2,
            )
        return cls(definition, BOS, EOS)

    @classmethod
    def load(cls, path: str | Path, bos: str | None = None, eos: str | None = None) -> "Tokenizer":
        """Open a tokenizer.json; without `bos` and `eos`, look for the usual names (`USUAL_BOS`, `USUAL_EOS`).

        Raises CorpusError if the file cannot be read or has no such token; the message lists its special tokens.
        """
        definition = read_definition(Path(path))
        try:
            description = parse(definition).description
        except CorpusError as error:
            raise CorpusError(
                f"tokenizer {printable(path)} is not a tokenizer.json of Hugging Face tokenizers: {error}"
            ) from error

        vocabulary = description.vocabulary
        special = [token for _, token, is_special in description.added if is_special]

        def choose(option: str, given: str | None, usual: Sequence[str]) -> str:
            for name in usual if given is None else (given,):
                if name in vocabulary:
                    return name
            listing = " ".join(special[:20]) + (f" and {len(special) - 20} more" if len(special) > 20 else "")
            wanted = "none of the usual names" if given is None else f"no token {given!r}"
            raise CorpusError(
                f"tokenizer {printable(path)} has {wanted} for its {option.upper()} token: set data.{option}= to one of its special"
                f" tokens: {listing or 'it has none'}"
            )

        chosen = choose("bos", bos, USUAL_BOS), choose("eos", eos, USUAL_EOS)
        try:
            opened = cls(definition, *chosen)
        except CorpusError as error:
            raise CorpusError(f"tokenizer {printable(path)}: {error}") from error
        opened._backend.name = f"tokenizer {printable(path)}"
        return opened

    def save(self, path: str | Path) -> None:
        """Write the definition as a tokenizer.json."""
        Path(path).write_text(self.definition, encoding="utf-8")

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text` as int64 [tokens], without BOS and EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode each text, on all cores.

        Texts longer than 2^20 characters are encoded in pieces cut after a line, which bounds the memory they take.
        Raises CorpusError where that takes too long (``apart.py``).
        """
        if self._ids_are_bytes:
            return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]
        cut = [list(_pieces(text, _PIECE_CHARACTERS)) for text in texts]
        ids = iter(self._backend.encode_batch([piece for pieces in cut for piece in pieces]))
        return [np.concatenate([next(ids) for _ in pieces]) for pieces in cut]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; special tokens vanish, and bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(ids)


@dataclass(frozen=True)
class TokenizerOptions:
    """Which tokeniser a corpus gets.

    Args:
        kind: "bpe", trained on the train split; "bytes"; or the path of a tokenizer.json or of the folder holding one.
        vocab_size: for "bpe" only; None: 4096.
        bos, eos: for a tokenizer.json only: its tokens for these roles; None: looked for under the usual names.

    Raises CorpusError if `kind` is none of these or `vocab_size` is impossible. An option that `kind` ignores warns.
    """

    kind: str = "bpe"
    vocab_size: int | None = None
    bos: str | None = None
    eos: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("bpe", "bytes") and not self._exists():
            raise CorpusError(f"tokenizer {self.kind!r} is neither 'bpe' nor 'bytes' nor the path of a tokenizer.json")
        if self.kind == "bpe" and self.vocab_size is not None and self.vocab_size < 258:
            raise CorpusError(f"vocab_size={self.vocab_size} is too small for BPE: 256 bytes, BOS and EOS need 258")
        used = {"bpe": ["vocab_size"], "bytes": []}.get(self.kind, ["bos", "eos"])
        for option in ("vocab_size", "bos", "eos"):
            if getattr(self, option) is not None and option not in used:
                warnings.warn(f"tokenizer {self.kind!r} ignores {option}={getattr(self, option)!r}", stacklevel=3)

    @property
    def expected_vocab_size(self) -> int:
        """Return what the tokeniser will have; "bpe" ends up with less where the text is short."""
        return (self.vocab_size or DEFAULT_VOCAB_SIZE) if self.kind == "bpe" else self.build(list).vocab_size

    def identity(self) -> dict[str, Any]:
        """Return what decides the tokeniser, in plain values; a file counts by its content."""
        if self.kind == "bpe":
            return {"kind": "bpe", "vocab_size": self.vocab_size or DEFAULT_VOCAB_SIZE}
        if self.kind == "bytes":
            return {"kind": "bytes"}
        return {"kind": "file", "content": content_digest(self._file(), LARGEST_FILE), "bos": self.bos, "eos": self.eos}

    def build(self, training_texts: Callable[[], Iterable[str]]) -> Tokenizer:
        """Return the tokeniser; `training_texts` is called for "bpe" only."""
        if self.kind == "bpe":
            return Tokenizer.train(training_texts(), self.vocab_size or DEFAULT_VOCAB_SIZE)
        if self.kind == "bytes":
            return Tokenizer.of_bytes()
        return Tokenizer.load(self._file(), self.bos, self.eos)

    def _exists(self) -> bool:
        try:
            return self._file().is_file()
        except (OSError, ValueError, RuntimeError):  # a name that is too long or holds a NUL, an unknown ~user
            return False

    def _file(self) -> Path:
        path = Path(self.kind).expanduser()
        return path / "tokenizer.json" if path.is_dir() else path


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Bytes that Latin-1 prints stand for themselves; the others follow, in order, from U+0100 (GPT-2's convention).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if chr(byte) not in alphabet]
    return alphabet | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}


@functools.cache
def _byte_definition() -> str:
    backend = tokenizers.Tokenizer(models.BPE(vocab=_byte_alphabet(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens([BOS, EOS])
    return backend.to_str()


def _bytes_per_token(description: Description, vocab_size: int) -> np.ndarray:
    """Count the bytes of text behind each id: int64 [vocab_size]. Exact for byte-level vocabularies."""
    alphabet = _byte_alphabet()

    def size(token: str) -> int:
        if description.byte_level and all(character in alphabet for character in token):
            return len(token)
        if description.byte_fallback and len(token) == 6 and token.startswith("<0x"):
            return 1
        return len(token.replace("\u2581", " ").encode())  # SentencePiece's mark for a space

    counts = np.zeros(vocab_size, dtype=np.int64)
    for token, index in description.own.items():
        counts[index] = size(token)
    for index, content, special in description.added:
        counts[index] = 0 if special else len(content.encode())
    return counts


def _pieces(text: str, limit: int) -> Iterator[str]:
    """Cut `text` into pieces of at most `limit` characters, after the last line that fits."""
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1 or start + limit
        yield text[start:end]
        start = end
    yield text[start:]


class _TrainingText:
    """Feeds texts to the training of BPE, with long words cut. `long_words` tells whether there were any."""

    _LONG_BLANK = re.compile(rf"\s{{{LONGEST_WORD // 4}}}")

    def __init__(self, words: pre_tokenizers.ByteLevel) -> None:
        self._words = words
        self.long_words = False

    def pieces(self, texts: Iterable[str]) -> Iterator[str]:
        """Yield all of `texts` in pieces."""
        for text in texts:
            for piece in _pieces(text, _TRAINING_PIECE_CHARACTERS):
                # A quick test that ordinary text passes; a character has four bytes at most.
                suspicious = max(map(len, piece.split()), default=0) >= LONGEST_WORD // 4
                if suspicious or self._LONG_BLANK.search(piece):
                    yield from self._cut(piece)
                else:
                    yield piece

    def _cut(self, piece: str) -> Iterator[str]:
        start = 0
        for word, (begin, end) in self._words.pre_tokenize_str(piece):  # a character of `word` stands for one byte
            if len(word) <= LONGEST_WORD:
                continue
            self.long_words = True
            if begin > start:
                yield piece[start:begin]
            data = piece[begin:end].encode()
            while len(data) > LONGEST_WORD:
                cut = LONGEST_WORD
                while data[cut] & 0xC0 == 0x80:  # within a character
                    cut -= 1
                yield data[:cut].decode()
                data = data[cut:]
            yield data.decode()
            start = end
        if start < len(piece):
            yield piece[start:]
