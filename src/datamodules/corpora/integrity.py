"""What a cache folder holds, and whether it still holds what was written.

meta.json lists each file with its size and a checksum of every `CHUNK_BYTES` of it, and has a checksum of its own.
Opening a corpus checks, once:

- meta.json whole, and that its counts agree with the sizes, headers, shapes and types of the arrays;
- of each file up to `CHECKED_CHUNKS` chunks (256 MiB): all of a smaller file, of a larger one the first, the last and
  a sample spread over the rest, which is the same each time. So at most 1.75 GiB are read, whatever the corpus's size;
- in the chunks that are read, that token ids are below the vocabulary's size and that documents' starts increase.

A checksum tells of accidents. Somebody who writes a corpus on purpose can write the checksums too: hence only files
with the names below are opened, only regular files that lie in the folder, and arrays never as pickles.
"""

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from src.datamodules.corpora.definitions import LARGEST_ID
from src.datamodules.corpora.errors import CorpusError
from src.datamodules.corpora.files import kind_of, open_regular, printable
from src.datamodules.corpora.splits import SPLITS

FORMAT = 2
"""Version of the files in a cache folder and of the rules by which they were made (which text is read, which split a
document goes to). It enters the fingerprint: what older rules made is built again, not misread."""

CHUNK_BYTES = 2**24
CHECKED_CHUNKS = 16

META = "meta.json"
TOKENIZER = "tokenizer.json"
_LARGEST_META = 2**26
_COUNTS = ("documents", "tokens", "bytes")


def tokens_file(split: str) -> str:
    """Name of the file with a split's tokens: uint16 or uint32 [num_tokens]."""
    return f"{split}.tokens.npy"


def offsets_file(split: str) -> str:
    """Name of the file with the starts of a split's documents and, last, their end: int64 [num_documents + 1]."""
    return f"{split}.offsets.npy"


FILES = frozenset({TOKENIZER, *map(tokens_file, SPLITS), *map(offsets_file, SPLITS)})


class DamagedCorpusError(CorpusError):
    """A folder that is not a whole corpus; `problem` says why, naming the file."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{printable(path)} is not a complete corpus: {problem}; prepare it again")
        self.problem = problem

    def __reduce__(self) -> tuple[Any, ...]:
        return CorpusError, (str(self),)


def token_type(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """Return the type that tokens are stored as."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Add sizes and checksums of the files in `folder`, write it all to meta.json, and make the disk keep it."""
    meta = meta | {"files": {name: _record(folder / name) for name in sorted(FILES)}}
    text = json.dumps(meta | {"checksum": _checksum(meta)}, indent=2) + "\n"
    (folder / META).write_text(text, encoding="utf-8")
    for name in (*sorted(FILES), META):
        sync(folder / name)
    sync(folder)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk: after a power cut they would be missing or empty."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems cannot do it for folders
            raise
    finally:
        os.close(descriptor)


def checked_meta(folder: Path) -> dict[str, Any]:
    """Return the contents of meta.json, after the check that the module describes; DamagedCorpusError if it fails."""
    try:
        meta = _read_meta(folder)
        for name in sorted(FILES):
            _check_file(folder, name, meta)
    except _Damage as damage:
        raise DamagedCorpusError(folder, str(damage)) from None
    except OSError as error:
        name = printable(error.filename or folder)
        raise DamagedCorpusError(folder, f"{name} cannot be read ({error.strerror})") from error
    return meta


class _Damage(Exception):
    pass


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise _Damage(problem)


def _open(folder: Path, name: str) -> BinaryIO:
    mode = os.lstat(folder / name).st_mode
    _require(not stat.S_ISLNK(mode), f"{name} is a link, which may lead anywhere")
    _require(stat.S_ISREG(mode), f"{name} is {kind_of(mode)}, not a regular file")
    return open_regular(folder / name)


def _read_meta(folder: Path) -> dict[str, Any]:
    with _open(folder, META) as file:
        text = file.read(_LARGEST_META + 1)
    _require(len(text) <= _LARGEST_META, f"{META} is larger than {_LARGEST_META} bytes")
    try:
        meta = json.loads(text)
        if meta["format"] != FORMAT:
            raise _Damage(f"its format is {meta['format']!r}, this program reads {FORMAT}")
        claimed = meta.pop("checksum")
        _check_shape(meta)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _Damage(f"{META} is damaged ({type(error).__name__}: {error})") from None
    _require(claimed == _checksum(meta), f"{META} is damaged: its checksum is another")
    return meta


def _check_shape(meta: dict[str, Any]) -> None:
    """Check that everything which is used of meta.json is there, of the right type, and possible."""
    names = set(meta["files"])
    _require(names == FILES, f"{META} lists the files {sorted(names)[:20]} instead of {sorted(FILES)}")
    for name, record in meta["files"].items():
        size, chunks = record["bytes"], record["chunks"]
        whole = _is_count(size) and isinstance(chunks, list) and len(chunks) == -(-size // CHUNK_BYTES)
        _require(whole, f"{META} is damaged: size and checksums of {name} do not agree")
    _require(set(meta["splits"]) == set(SPLITS), f"{META} is damaged: its splits are {sorted(meta['splits'])[:20]}")
    for split, counts in meta["splits"].items():
        whole = set(counts) == set(_COUNTS) and all(map(_is_count, counts.values()))
        _require(whole, f"{META} is damaged: counts of the {split} split")
    stand_for = meta.get("token_bytes", dict.fromkeys(SPLITS, 0))  # not written by earlier versions
    whole = set(stand_for) == set(SPLITS) and all(map(_is_count, stand_for.values()))
    _require(whole, f"{META} is damaged: its token_bytes are not a number for each split")
    tokenizer = meta["tokenizer"]
    size = tokenizer["vocab_size"]
    whole = _is_count(size) and 0 < size <= LARGEST_ID
    whole &= all(_is_count(tokenizer[key]) and tokenizer[key] < size for key in ("bos_id", "eos_id"))
    whole &= all(isinstance(value, str) for value in (tokenizer["bos"], tokenizer["eos"]))
    whole &= all(isinstance(meta[key], str) for key in ("name", "fingerprint"))
    _require(whole, f"{META} is damaged: name, fingerprint or tokenizer")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**60


def _check_file(folder: Path, name: str, meta: dict[str, Any]) -> None:
    record = meta["files"][name]
    with _open(folder, name) as file:
        size = os.fstat(file.fileno()).st_size
        _require(size == record["bytes"], f"{name} holds {size} bytes instead of {record['bytes']}")
        array = _array_of(file, name, meta) if name.endswith(".npy") else None
        for number in checked_chunks(len(record["chunks"]), meta["fingerprint"] + name):
            file.seek(number * CHUNK_BYTES)
            data = file.read(CHUNK_BYTES)
            where = f"{name}, bytes {number * CHUNK_BYTES} to {number * CHUNK_BYTES + len(data)}"
            _require(_digest(data) == record["chunks"][number], f"{where}: the contents are not what was written")
            if array is not None:
                array.check(data, number, where)


def checked_chunks(count: int, key: str) -> list[int]:
    """Return which of `count` chunks are checked: all, or the first, the last, and one of each part of the rest."""
    if count <= CHECKED_CHUNKS:
        return list(range(count))
    parts, inner = CHECKED_CHUNKS - 2, count - 2
    chosen = {0, count - 1}
    for part in range(parts):
        first, end = 1 + part * inner // parts, 1 + (part + 1) * inner // parts
        chosen.add(first + int(_digest(f"{key} {part}".encode()), 16) % (end - first))
    return sorted(chosen)


class _Array:
    """What an array should hold, checked piece by piece."""

    def __init__(self, header: int, dtype: np.dtype[Any], limit: int, increasing: bool) -> None:
        self.header, self.dtype, self.limit, self.increasing = header, dtype, limit, increasing

    def check(self, data: bytes, number: int, where: str) -> None:
        """Check the values in one chunk. Headers are a multiple of 64 bytes: no value lies in two chunks."""
        values = np.frombuffer(data, self.dtype, offset=self.header if number == 0 else 0)
        if not values.size:
            return
        if self.increasing:
            _require(bool((np.diff(values) > 0).all()), f"{where}: the starts of documents do not increase")
            _require(number > 0 or values[0] == 0, f"{where}: the first document does not start at 0")
        low, high = int(values.min()), int(values.max())
        _require(low >= 0 and high < self.limit, f"{where}: values {low} to {high}, not within 0 to {self.limit - 1}")


def _array_of(file: BinaryIO, name: str, meta: dict[str, Any]) -> _Array:
    """Check an array's header against the counts in meta.json; the header is read as plain values, never as a pickle."""
    split, kind, _ = name.split(".")
    counts, vocab_size = meta["splits"][split], meta["tokenizer"]["vocab_size"]
    tokens = kind == "tokens"
    dtype = np.dtype(token_type(vocab_size) if tokens else np.int64)
    shape = (counts["tokens"] if tokens else counts["documents"] + 1,)
    try:
        version = np.lib.format.read_magic(file)
        _require(version == (1, 0), f"{name} is a file of NumPy's format {version}")
        found = np.lib.format.read_array_header_1_0(file)
    except _Damage:
        raise
    except Exception as error:  # NumPy parses the header as Python, whose parsers fail in many ways
        raise _Damage(f"{name} does not begin as an array ({type(error).__name__})") from None
    _require(
        found == (shape, False, dtype),
        f"{name} holds {found[2]} of shape {found[0]}, {META} says {dtype} of shape {shape}",
    )
    header = file.tell()
    size = os.fstat(file.fileno()).st_size
    _require(size == header + shape[0] * dtype.itemsize, f"{name} holds {size} bytes, which is not its shape {shape}")
    _require(header % 64 == 0, f"{name} has a header of {header} bytes")
    if not tokens:
        file.seek(size - dtype.itemsize)
        end = int(np.frombuffer(file.read(dtype.itemsize), dtype)[0])
        _require(end == counts["tokens"], f"{name} ends at {end}, {META} says {counts['tokens']} tokens")
    return _Array(header, dtype, vocab_size if tokens else counts["tokens"] + 1, not tokens)


def _record(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        chunks = [_digest(data) for data in iter(lambda: file.read(CHUNK_BYTES), b"")]
        return {"bytes": file.tell(), "chunks": chunks}


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _checksum(meta: dict[str, Any]) -> str:
    return _digest(json.dumps(meta, sort_keys=True).encode())
