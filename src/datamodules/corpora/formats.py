"""Bytes to texts: compressed files, encodings, JSON lines and parquet, of files that may be damaged or hostile.

What is wrong with one row is returned in the row's place, as a CorpusError that the caller may raise or count; what is
wrong with a file is raised. Memory is bounded: a text has at most `MAX_DOCUMENT_BYTES`, and a compressed file that
expands beyond all measure is refused before it is read to its end.
"""

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from src.datamodules.corpora.errors import CorpusError
from src.datamodules.corpora.files import open_regular, printable
from src.datamodules.corpora.pages import Page, pages

PLAIN_EXTENSIONS = (
    *(".txt", ".text", ".md", ".rst", ".tex"),
    *(".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".jl", ".lean", ".sh"),
)
JSON_EXTENSIONS = (".jsonl", ".ndjson", ".json")
PARQUET_EXTENSIONS = (".parquet",)
KNOWN_EXTENSIONS = (*PLAIN_EXTENSIONS, *JSON_EXTENSIONS, *PARQUET_EXTENSIONS)
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

MAX_DOCUMENT_BYTES = 2**30
"""Longest text, in bytes."""
MAX_COMPRESSED_DOCUMENT_BYTES = 2**28
"""Longest text that is a whole compressed file: a few bytes can become this many, and four times as many as text."""
MAX_LINE_BYTES = 2**25
"""Longest line of JSON, in bytes: parsed, one of many small values takes thirty times the memory."""
MAX_COMPRESSED_LINE_BYTES = 2**24
"""The same in a compressed file, of which a few bytes can become this many."""
MAX_EXPANSION = 1000
"""A compressed file may become this many times its size, or `MAX_DOCUMENT_BYTES` if that is more."""
MAX_PAGE_BYTES = 2**28
MAX_PAGE_EXPANSION = 100
"""A page of a parquet file, which is in memory as a whole, has at most `MAX_PAGE_BYTES`, or so many times the file's size."""
MAX_ROWS = 2**20
MAX_ROWS_A_BYTE = 8
MAX_COLUMNS = 10_000
MAX_COLUMNS_OF_GROUPS = 10**6
"""Columns times groups of rows: Arrow looks at all columns for each group."""
"""A parquet file has at most `MAX_ROWS` rows, or so many for each of its bytes: rows of nothing take none, but time."""

_XZ_MEMORY = 2**29
_BATCH_ROWS = 64
_BATCH_BYTES = 2**26
_NUL_SHARE = 0.1
_UNDECODABLE_SHARE = 0.25
# UTF-32 first: its mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
_LONE_SURROGATES = re.compile("[\ud800-\udfff]")


class Row(NamedTuple):
    """One row of a file, counted from 1: its text, or what is wrong with it."""

    number: int
    text: str | CorpusError


def extension_of(name: str) -> str:
    """Return the extension that decides how a file is read, without that of a compression: ".txt" for "a.TXT.gz".

    Parquet is compressed inside, and read by seeking: ".parquet.gz" is an extension of its own.
    """
    lower = name.lower()
    compression = next((c for c in COMPRESSIONS if lower.endswith(c)), "")
    inner = Path(lower.removesuffix(compression)).suffix
    return inner + compression if compression and (not inner or inner in PARQUET_EXTENSIONS) else inner


def kind_of_file(name: str) -> str:
    """Return what to call files of this kind when they are counted: ".tar.gz", or that there is no extension."""
    compression = Path(name).suffix.lower()
    known = compression in COMPRESSIONS and not extension_of(name).endswith(compression)
    return extension_of(name) + (compression if known else "") or "without extension"


@contextlib.contextmanager
def open_text(path: Path) -> Iterator["io.BufferedReader[Any]"]:
    """Open a file for reading, decompressed as its name says; CorpusError if it is not regular or expands too far."""
    with open_regular(path) as file:
        suffix = path.suffix.lower()
        if suffix not in COMPRESSIONS:
            yield file
            return
        limit = max(MAX_DOCUMENT_BYTES, MAX_EXPANSION * os.fstat(file.fileno()).st_size)
        with io.BufferedReader(_Decompressed(_read_function(file, suffix), path, limit)) as stream:
            yield stream


def _read_function(file: BinaryIO, suffix: str) -> Callable[[int], bytes]:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=file).read
    if suffix == ".bz2":
        return _Streams(file, bz2.BZ2Decompressor).read
    if suffix == ".xz":
        # A header of a few bytes can ask for a dictionary of gigabytes.
        return _Streams(file, lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY)).read
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd").read


class _Decompressed(io.RawIOBase):
    """What `read` returns, up to `limit` bytes: more is a CorpusError, before it is held in memory."""

    def __init__(self, read: Callable[[int], bytes], path: Path, limit: int) -> None:
        self._read, self._path, self._limit = read, path, limit
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._read(len(buffer))
        self._count += len(data)
        if self._count > self._limit:
            raise CorpusError(
                f"{printable(self._path)} becomes more than {self._limit} bytes, over {MAX_EXPANSION} times its size,"
                " when decompressed: it is not read; decompress it yourself if it is meant to be like that"
            )
        buffer[: len(data)] = data
        return len(data)


class _Streams:
    """Reads compressed streams that follow each other in one file; EOFError if the last one is cut short."""

    def __init__(self, file: BinaryIO, make: Callable[[], Any]) -> None:
        self._file, self._make = file, make
        self._decompressor = make()
        self._begun = False

    def read(self, size: int) -> bytes:
        while True:
            compressed = b""
            if self._decompressor.eof:
                compressed = self._next_stream()
                if not compressed:
                    return b""
                self._decompressor = self._make()
            elif self._decompressor.needs_input:
                compressed = self._file.read(2**16)
                if not compressed and self._begun:
                    raise EOFError("the compressed data end before their end marker")
                if not compressed:
                    return b""  # an empty file
            self._begun = True
            data = self._decompressor.decompress(compressed, size)
            if data:
                return data

    def _next_stream(self) -> bytes:
        """Return the beginning of the stream that follows, after zeros that fill up a block, or nothing at the end."""
        found = self._decompressor.unused_data.lstrip(b"\0")
        while not found:
            block = self._file.read(2**16)
            if not block:
                return b""
            found = block.lstrip(b"\0")
        return found


def read_plain(path: Path) -> tuple[str | CorpusError, bool]:
    """Return the text of a plain file, or what is wrong with it, and whether bytes of it were replaced by U+FFFD."""
    place = printable(path)
    compressed = path.suffix.lower() in COMPRESSIONS
    limit = min(MAX_DOCUMENT_BYTES, MAX_COMPRESSED_DOCUMENT_BYTES) if compressed else MAX_DOCUMENT_BYTES
    with open_text(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        advice = "a file of plain text is one document: cut it, or write it as .jsonl"
        if compressed:
            advice += f"; decompressed, it may have {MAX_DOCUMENT_BYTES} bytes"
        return _too_long(place, limit, advice), False
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8")
    if encoding.startswith("utf-8") and data.count(0) > _NUL_SHARE * len(data):
        return CorpusError(
            f"{place}: {data.count(0) / len(data):.0%} of its bytes are NUL, so it is no UTF-8 text; if it is UTF-16 or"
            " UTF-32 without a byte order mark, convert it (iconv -f UTF-16LE -t UTF-8)"
        ), False
    try:
        return data.decode(encoding), False
    except UnicodeDecodeError:
        text = data.decode(encoding, "replace")
    if text.count("\ufffd") > _UNDECODABLE_SHARE * len(text) and len(text) > 1:
        return CorpusError(
            f"{place}: {text.count(chr(0xFFFD)) / len(text):.0%} of it cannot be decoded as {encoding.upper()}; if it"
            " is text in another encoding, convert it (iconv -f CP1251 -t UTF-8)"
        ), False
    return text, True


def read_json_lines(path: Path, text_of: Callable[[dict[str, Any], str], str]) -> Iterator[Row]:
    """Yield the rows of a file that holds one JSON object per line; `text_of` finds the text in one."""
    compressed = path.suffix.lower() in COMPRESSIONS
    limit = min(MAX_LINE_BYTES, MAX_COMPRESSED_LINE_BYTES) if compressed else MAX_LINE_BYTES
    advice = "if the file is one JSON array, write one object per line"
    if compressed:
        advice += f"; decompressed, a line may have {MAX_LINE_BYTES} bytes"
    name = printable(path)
    with open_text(path) as file:
        most = max(MAX_ROWS, MAX_ROWS_A_BYTE * path.stat().st_size)
        for number, line in enumerate(_lines(file, path, limit), start=1):
            if number > most:  # compressed, an empty one takes nothing but time
                raise CorpusError(f"{name} has more than {most} lines, out of all proportion to its size")
            if line is None:
                yield Row(number, _too_long(f"{name}:{number}", limit, advice))
            elif not line.isspace():
                yield Row(number, _text_of_line(line, f"{name}:{number}", text_of))


def _lines(file: io.BufferedReader, path: Path, limit: int) -> Iterator[bytes | str | None]:
    """Yield each line, or None for one that is too long to be held."""
    start = file.peek(4)[:4]
    encoding = next((encoding for mark, encoding in _MARKS if start.startswith(mark)), "utf-8")
    stream: Any = file
    if encoding not in ("utf-8", "utf-8-sig"):  # a line of these ends with more than one byte
        stream = io.TextIOWrapper(file, encoding=encoding, newline="\n")
    elif encoding == "utf-8-sig":
        file.read(len(codecs.BOM_UTF8))
    try:
        while line := stream.readline(limit + 1):
            if len(line) <= limit:
                yield line
                continue
            yield None
            while line and line[-1:] not in (b"\n", "\n"):
                line = stream.readline(2**20)
    except UnicodeDecodeError as error:
        raise CorpusError(f"{printable(path)} cannot be read as {encoding.upper()}: {error}") from None
    finally:
        if stream is not file:
            stream.detach()  # the file is closed by who opened it


def _text_of_line(line: bytes | str, place: str, text_of: Callable[[dict[str, Any], str], str]) -> str | CorpusError:
    try:
        row = json.loads(line if isinstance(line, str) else line.decode())
    except ValueError as error:
        return CorpusError(f"{place}: not JSON, which should hold one object per line ({error})")
    except RecursionError:
        return CorpusError(f"{place}: JSON nested too deep to be read")
    if not isinstance(row, dict):
        return CorpusError(f"{place}: a JSON {type(row).__name__}, not an object with a field of text")
    try:
        return text_of(row, place)
    except CorpusError as error:
        return error


def _too_long(place: str, limit: int, advice: str) -> CorpusError:
    return CorpusError(f"{place}: longer than {limit} bytes; {advice}")


def read_parquet(path: Path, choose: Callable[[Iterable[str]], str]) -> Iterator[Row]:
    """Yield the rows of one column of strings; `choose` picks its name. CorpusError if there is no such column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = printable(path)
    number = 0
    try:
        # Read page by page: a group of rows may be as large as the file.
        with open_regular(path) as file, pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20) as table:
            columns = len(table.schema)
            if columns > MAX_COLUMNS or columns * table.num_row_groups > MAX_COLUMNS_OF_GROUPS:
                raise CorpusError(
                    f"{place} has {columns} columns in {table.num_row_groups} groups of rows; at most {MAX_COLUMNS} columns are"
                    f" read, and {MAX_COLUMNS_OF_GROUPS} in all groups: write the column of texts anew, alone"
                )
            column = choose(table.schema_arrow.names)
            _check_column(table.schema_arrow, column, place)
            measure = _Measure(place, os.fstat(file.fileno()).st_size)
            groups = measure.pages(file, table, column)
            for group in range(table.num_row_groups):
                rows = _rows_at_once(file, table.metadata, group, column, groups[group])
                for batch in table.iter_batches(batch_size=rows, row_groups=[group], columns=[column]):
                    for value in _values(batch.column(0)):
                        number += 1
                        measure.row(value)
                        yield Row(number, _text_of_value(value, f"{place}:{number}"))
    except (pa.ArrowException, UnicodeDecodeError, TypeError) as error:
        raise CorpusError(f"{place} cannot be read as parquet: {error}") from error


class _Measure:
    """Holds a parquet file to what it may become, by what its pages say before they are read, and by what is read."""

    def __init__(self, place: str, size: int) -> None:
        self._place = place
        self._page = max(MAX_PAGE_BYTES, MAX_PAGE_EXPANSION * size)
        self._bytes = max(MAX_DOCUMENT_BYTES, MAX_EXPANSION * size)
        self._rows = max(MAX_ROWS, MAX_ROWS_A_BYTE * size)
        self._read_bytes = self._read_rows = 0

    def pages(self, file: BinaryIO, table: Any, column: str) -> list[list[Page]]:
        """Return the pages of a column by groups of rows; CorpusError if any of them, or all together, hold too much."""
        before = file.tell()
        paths = [table.schema.column(index).path for index in range(len(table.schema))]
        columns = [index for index, path in enumerate(paths) if path == column]
        if not columns:
            raise CorpusError(f"{self._place}: column {column!r} holds no values of its own")
        try:
            groups = pages(file, columns)
        except CorpusError as error:
            raise CorpusError(f"{self._place} cannot be read as parquet: {error}") from None
        file.seek(before)
        found = [page for group in groups for page in group]
        self._check("has a page of", max((page.size for page in found), default=0), self._page, "bytes")
        self._check("becomes", sum(page.size for page in found), self._bytes, "bytes")
        self._check("has", max(sum(page.values for page in found), table.metadata.num_rows), self._rows, "rows")
        return groups

    def row(self, value: str | bytes | UnicodeDecodeError | None) -> None:
        """Count what has been read: a text that stands once in a file may be that of many rows."""
        self._read_rows += 1
        self._read_bytes += len(value.object if isinstance(value, UnicodeDecodeError) else value or "")
        self._check("has", self._read_rows, self._rows, "rows")
        self._check("becomes", self._read_bytes, self._bytes, "bytes")

    def _check(self, has: str, found: int, most: int, what: str) -> None:
        if found > most:
            raise CorpusError(
                f"{self._place} {has} {found} {what}, out of all proportion to its size; at most {most} are read: write it"
                " anew without compression, or in parts, if it is meant to be like that"
            )


def _rows_at_once(file: BinaryIO, metadata: Any, group: int, column: str, own: list[Page]) -> int:
    """Return how many rows of a group can be in memory at a time.

    A long text that many rows repeat is stored once, in the column's dictionary, but would be in memory as often as a
    batch has rows; so would one of which each row repeats all but the end, where pages share beginnings. What else there is
    takes in the batch what it takes in the pages.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    described = metadata.row_group(group)
    if described.num_rows < 2:
        return 1
    # What is said of the columns is not asked for: of damaged files, Arrow aborts the process there.
    if sum(page.size for page in own) > MAX_DOCUMENT_BYTES:
        return 1
    if any(page.shares for page in own):
        return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, *(page.size for page in own))))
    stored = max((page.size for page in own if not page.values), default=0)
    if stored and not next((page.refers for page in own if page.values), True):
        # The first row would come without it. Writers begin with the dictionary; who does not has one to hide.
        return max(1, min(_BATCH_ROWS, _BATCH_BYTES // stored))
    # Read as a dictionary, the first row comes with all of it. All rows so would be slow where few are repeated: Arrow
    # would make one dictionary of them, and copy it for every batch.
    with pq.ParquetFile(
        file, metadata=metadata, pre_buffer=False, buffer_size=2**20, read_dictionary=[column]
    ) as probe:
        batch = next(probe.iter_batches(batch_size=1, row_groups=[group], columns=[column]), None)
    dictionary = getattr(batch.column(0), "dictionary", None) if batch is not None else None
    if dictionary is None or len(dictionary) == 0:
        return _BATCH_ROWS
    longest = pc.call_function("max", [pc.call_function("binary_length", [dictionary])]).as_py() or 0
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, longest)))


def _check_column(schema: Any, column: str, place: str) -> None:
    import pyarrow as pa

    if schema.names.count(column) > 1:
        raise CorpusError(f"{place}: {schema.names.count(column)} columns are called {column!r}: rename one of them")
    kind = schema.field(column).type
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    # An empty table written by pandas has no type at all.
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    tests += (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    if not any(test(values) for test in tests):
        raise CorpusError(f"{place}: column {column!r} holds {kind}, not strings")


def _values(column: Any) -> Iterator[str | bytes | UnicodeDecodeError | None]:
    """Yield the values of an array, one at a time; for strings that are not UTF-8, which Arrow does not check, the error."""
    for index in range(len(column)):
        try:
            yield column[index].as_py()
        except UnicodeDecodeError as error:
            yield error


def _text_of_value(value: str | bytes | UnicodeDecodeError | None, place: str) -> str | CorpusError:
    try:
        if isinstance(value, UnicodeDecodeError):
            raise value
        text = value.decode() if isinstance(value, bytes) else value or ""
    except UnicodeDecodeError as error:
        return CorpusError(f"{place}: not UTF-8 ({error.reason} at byte {error.start})")
    limit = min(MAX_DOCUMENT_BYTES, MAX_COMPRESSED_DOCUMENT_BYTES)
    return _too_long(place, limit, "cut it") if len(text) > limit else text


def valid_unicode(text: str) -> str:
    """Return `text` with lone surrogates, which JSON escapes can smuggle in and UTF-8 cannot hold, as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return _LONE_SURROGATES.sub("\ufffd", text)
    return text
