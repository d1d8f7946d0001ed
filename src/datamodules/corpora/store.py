"""Tokenise once: a source becomes a folder of memory-mapped arrays, found again by its fingerprint.

    <cache_dir>/<name>-<fingerprint>/
        {train,val,test}.tokens.npy     uint16 (uint32 above 65536 tokens), documents as BOS + tokens + EOS
        {train,val,test}.offsets.npy    int64, where documents start; last, their end
        tokenizer.json                  opens with Hugging Face tokenizers
        meta.json                       source, options, counts, for how many bytes the tokens stand, sizes and checksums
                                        of the files, library versions

The fingerprint hashes the options and the source's files (`fingerprint_files`), so a change of either makes a new
folder. A folder is built under a temporary name beside its place, written through to the disk and renamed: it is there
whole or not at all. It is checked whenever it is opened (`integrity`).
Processes that build at the same time do the same work, and the first to finish wins.
"""

import contextlib
import hashlib
import json
import platform
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from src.datamodules.corpora.corpus import EVALUATED, Corpus
from src.datamodules.corpora.errors import CorpusError
from src.datamodules.corpora.integrity import (
    FORMAT,
    TOKENIZER,
    DamagedCorpusError,
    offsets_file,
    sync,
    token_type,
    tokens_file,
    write_meta,
)
from src.datamodules.corpora.progress import Heartbeat, Progress, say
from src.datamodules.corpora.sources import Document, Source
from src.datamodules.corpora.splits import SPLITS, SplitPlan, SplitShares, content_key, hash_unit, plan_splits
from src.datamodules.corpora.tokenizer import Tokenizer, TokenizerOptions

TOKENIZER_TRAINING_BYTES = 256 * 2**20
"""A BPE is trained on documents of the train split chosen by a second hash of their text: about this much at most."""

_BATCH_CHARACTERS = 2**21
_PROGRESS_SECONDS = 5.0
_ABANDONED_SECONDS = 24 * 3600
_SAFE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,149}")


def prepare(
    source: Source,
    tokenizer: TokenizerOptions,
    cache_dir: str | Path,
    *,
    val_share: float = 0.05,
    test_share: float = 0.05,
    progress: Progress = say,
) -> Corpus:
    """Return the corpus of `source`, tokenised and written under `cache_dir` unless it is there already.

    Args:
        source: where the documents come from.
        tokenizer: which tokeniser to make or open.
        cache_dir: folder of all prepared corpora; created if missing; not inside the folder that the source reads.
        val_share, test_share: expected shares of the documents, by a hash of their text (see `splits`).
        progress: called with a line of text at the start, every five seconds, and at the end of a build; from a thread
            of its own while a library call does not return.

    Raises CorpusError if the source cannot be read, holds fewer than three distinct texts or changes meanwhile, or if an
    option is impossible. A damaged folder is rebuilt with a warning that names the file. Warns whenever the tokens stand for
    other bytes than the text has (see `Corpus.bytes_ratio`).
    """
    shares = SplitShares(val_share, test_share)
    cache_dir = Path(cache_dir).expanduser()
    if not _SAFE_NAME.fullmatch(source.name):
        raise CorpusError(
            f"source name {source.name!r} must be letters, digits, '_', '-' and '.': it becomes a folder's name"
        )
    if source.root is not None and cache_dir.resolve().is_relative_to(source.root.resolve()):
        raise CorpusError(f"cache_dir={str(cache_dir)!r} lies in {source.root}, which is read as text: choose another")
    with Heartbeat(progress, _PROGRESS_SECONDS) as heart:
        heart.doing(lambda: f"listing and hashing the files of {source.name}")
        fingerprint = _fingerprint(source, tokenizer, shares)
        target = cache_dir / f"{source.name}-{fingerprint}"
        if target.exists():
            heart.doing(lambda: f"checking {target}")
            try:
                return _told(_opened(target, fingerprint))
            except DamagedCorpusError as error:
                warnings.warn(f"cached corpus {target} is damaged: {error.problem}; building it again", stacklevel=2)
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise CorpusError(f"cache_dir={str(cache_dir)!r} is a file, not a folder") from None
        _remove_abandoned(cache_dir, target.name)
        with _temporary_folder(cache_dir, target.name) as folder:
            _build(folder, source, tokenizer, shares, fingerprint=fingerprint, heart=heart)
            if _fingerprint(source, tokenizer, shares) != fingerprint:
                raise CorpusError(f"the files of source {source.name!r} changed while they were read: prepare it again")
            _install(folder, target, fingerprint)
        return _told(_opened(target, fingerprint))


def corpus_identity(
    source: Source, tokenizer: TokenizerOptions, *, val_share: float = 0.05, test_share: float = 0.05
) -> dict[str, str]:
    """Return name and fingerprint of the corpus that `prepare` would return, without preparing it.

    Reads the files, or only their sizes and times where they are many (`fingerprint_files`); a file that this process
    has read for this before, and that has not changed since, is not read again. Raises CorpusError as `prepare` does.
    """
    return {
        "corpus": source.name,
        "fingerprint": _fingerprint(source, tokenizer, SplitShares(val_share, test_share)),
    }


def _opened(target: Path, fingerprint: str) -> Corpus:
    corpus = Corpus(target)
    if corpus.fingerprint != fingerprint:
        raise DamagedCorpusError(target, f"meta.json is that of another corpus, {corpus.fingerprint}")
    _ = corpus.tokenizer  # held against meta.json before anything is as large as that says
    return corpus


def _told(corpus: Corpus) -> Corpus:
    """The corpus; whoever opens it is told if its tokens stand for other bytes than its text has."""
    text = sum(corpus.split(split).num_bytes for split in EVALUATED)
    tokens = sum(map(corpus.token_bytes, EVALUATED))
    if tokens != text:
        warnings.warn(
            f"the tokeniser of {corpus.path} does not reproduce the text byte for byte: its tokens of the validation and test texts"
            f" stand for {tokens} bytes, the texts have {text}; bits per byte are those of the texts, by the ratio of each split",
            stacklevel=3,
        )
    return corpus


def _fingerprint(source: Source, tokenizer: TokenizerOptions, shares: SplitShares) -> str:
    parts = {
        "format": FORMAT,
        "source": source.fingerprint(),
        "tokenizer": tokenizer.identity(),
        "shares": [float(shares.val), float(shares.test)],
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()


def _build(
    folder: Path,
    source: Source,
    options: TokenizerOptions,
    shares: SplitShares,
    *,
    fingerprint: str,
    heart: Heartbeat,
) -> None:
    """Fill `folder` with the files of a corpus. Reads the source two or three times and holds one batch at a time."""
    began = time.monotonic()
    read = _Counter()
    heart.say(
        f"preparing corpus {source.name}-{fingerprint}: {source.summary() or 'reading'}",
        doing=lambda: f"read {read.documents} documents, {read.megabytes:.0f} MB",
    )
    plan = plan_splits(read.count(source.documents()), shares)
    total = sum(plan.bytes.values())
    tokenizer = _make_tokenizer(source, options, plan, heart)
    tokenizer.save(folder / TOKENIZER)
    counts, token_bytes = _write_tokens(folder, source, plan, tokenizer, heart)
    tokens = sum(split["tokens"] for split in counts.values())
    meta = {
        "format": FORMAT,
        "name": source.name,
        "fingerprint": fingerprint,
        "source": source.describe(),
        "shares": {"val": shares.val, "test": shares.test},
        "moved_to_fill_a_split": plan.moved_names,
        "duplicate_documents": plan.duplicates,
        "tokenizer": {
            **options.identity(),
            "vocab_size": tokenizer.vocab_size,
            **{"bos": tokenizer.bos, "eos": tokenizer.eos, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id},
        },
        "splits": counts,
        "token_bytes": token_bytes,
        "libraries": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("numpy", "tokenizers", "pyarrow")},
        },
    }
    heart.doing(lambda: f"writing {total / 1e6:.0f} MB of text through to the disk")
    write_meta(folder, meta)
    heart.say(f"{tokens} tokens, {total / tokens:.2f} bytes per token, in {time.monotonic() - began:.1f} s")


class _Counter:
    """How much of a source has been read."""

    def __init__(self) -> None:
        self.documents = self.characters = 0

    @property
    def megabytes(self) -> float:
        return self.characters / 1e6

    def count(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            self.documents += 1
            self.characters += len(document.text)
            yield document


def _make_tokenizer(source: Source, options: TokenizerOptions, plan: SplitPlan, heart: Heartbeat) -> Tokenizer:
    read = _Counter()
    amount = min(plan.bytes["train"], TOKENIZER_TRAINING_BYTES) / 1e6
    training = f", trained on {amount:.1f} MB" if options.kind == "bpe" else ""
    began = time.monotonic()
    heart.say(
        f"{sum(plan.documents.values())} documents, {sum(plan.bytes.values()) / 1e6:.1f} MB; tokeniser {options.kind}"
        + training,
        doing=lambda: (
            f"training the tokeniser: {read.megabytes:.0f} of {amount:.0f} MB read, {time.monotonic() - began:.0f} s"
        ),
    )
    return options.build(lambda: (text for _, text in read.count(_training_documents(source, plan))))


def _training_documents(source: Source, plan: SplitPlan) -> Iterator[Document]:
    keep = TOKENIZER_TRAINING_BYTES / max(plan.bytes["train"], 1)
    for document in source.documents():
        key = content_key(document.text)
        if plan.of(key) == "train" and (keep >= 1 or hash_unit(key, "tokenizer") < keep):
            yield document


def _write_tokens(
    folder: Path, source: Source, plan: SplitPlan, tokenizer: Tokenizer, heart: Heartbeat
) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Write the token and offset files; return the counts of documents, tokens and bytes of each split, and for how many
    bytes its tokens stand."""
    dtype = token_type(tokenizer.vocab_size)
    total = sum(plan.bytes.values())
    counts = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}
    token_bytes = dict.fromkeys(SPLITS, 0)

    def done() -> str:
        return f"tokenised {sum(split['bytes'] for split in counts.values()) / 1e6:.0f} of {total / 1e6:.0f} MB"

    heart.say(f"tokenising {total / 1e6:.1f} MB with {tokenizer.vocab_size} tokens", doing=done)
    with contextlib.ExitStack() as stack:
        writers = {split: stack.enter_context(_SplitWriter(folder, split, dtype)) for split in SPLITS}
        for batch in _batches(source.documents()):
            for (_, text), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch]), strict=True):
                split = plan.of(content_key(text))
                writers[split].append(np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]]))
                counts[split]["documents"] += 1
                counts[split]["tokens"] += len(ids) + 2
                counts[split]["bytes"] += len(text.encode())
                token_bytes[split] += int(tokenizer.bytes_per_token[ids].sum())
    return counts, token_bytes


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _SplitWriter:
    """Appends documents to the token and offset files of one split."""

    def __init__(self, folder: Path, split: str, dtype: type[np.unsignedinteger[Any]]) -> None:
        self._tokens = _ArrayWriter(folder / tokens_file(split), dtype)
        self._offsets = _ArrayWriter(folder / offsets_file(split), np.int64)

    def __enter__(self) -> "_SplitWriter":
        self._offsets.append(np.array([0]))
        return self

    def __exit__(self, *_: object) -> None:
        self._tokens.close()
        self._offsets.close()

    def append(self, document: np.ndarray) -> None:
        self._tokens.append(document)
        self._offsets.append(np.array([self._tokens.length]))


class _ArrayWriter:
    """Writes a .npy file of one dimension in pieces: NumPy pads the header, so the length can be filled in last."""

    def __init__(self, path: Path, dtype: type[np.integer[Any]]) -> None:
        self.length = 0
        self._dtype = np.dtype(dtype)
        self._file = path.open("wb", buffering=2**20)
        self._header_end = self._write_header()

    def append(self, values: np.ndarray) -> None:
        self._file.write(values.astype(self._dtype).tobytes())
        self.length += len(values)

    def close(self) -> None:
        with self._file:
            self._file.seek(0)
            if self._write_header() != self._header_end:
                raise RuntimeError(f"NumPy wrote headers of different lengths to {self._file.name}")

    def _write_header(self) -> int:
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()


@contextlib.contextmanager
def _temporary_folder(cache_dir: Path, name: str) -> Iterator[Path]:
    """Make a folder beside its future place, on the same file system, and remove what is left of it in the end."""
    # Not tempfile.mkdtemp: its mode 0o700 would stay and hide a shared cache from other users.
    folder = cache_dir / f".{name}.{secrets.token_hex(4)}.tmp"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _install(folder: Path, target: Path, fingerprint: str) -> None:
    """Rename `folder` to `target`; a complete corpus that another process put there stays, a damaged one gives way."""
    for _ in range(10):
        try:
            folder.rename(target)
        except OSError:
            if not target.exists():
                raise
        else:
            sync(target.parent)
            return
        with contextlib.suppress(DamagedCorpusError):
            _opened(target, fingerprint)
            return
        with _temporary_folder(target.parent, target.name) as aside, contextlib.suppress(OSError):
            target.rename(aside / "damaged")
    raise CorpusError(f"damaged corpus {target} cannot be replaced: remove it by hand")


def _remove_abandoned(cache_dir: Path, name: str) -> None:
    """Remove what killed builds left behind: temporary folders of this corpus that nothing has written to for a day."""
    for folder in cache_dir.glob(f".{name}.*.tmp"):
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in [folder, *folder.iterdir()])
            if time.time() - newest > _ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
