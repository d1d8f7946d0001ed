"""How much the pages of a parquet file hold, as the pages themselves say.

Arrow sets memory aside as the header of each page says, before it reads the page. What the file's footer says of all of
them together need not be true, so the headers are read here first, without what follows them. They, and the footer, are
in the compact protocol of Thrift, of which a few lines are enough.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from src.datamodules.corpora.errors import CorpusError

LARGEST_FOOTER = 2**26
_LARGEST_HEADER = 2**24  # Arrow's own limit; the shortest and longest text of a page may be in it
_USUAL_HEADER = 2**12
_DELTA_BYTE_ARRAY = 7
_DICTIONARIES = (2, 8)

# Which fields are read, by their numbers and kinds in parquet.thrift: of the footer, and of the header of a page.
_I32, _I64 = 5, 6
_COLUMN = {5: _I64, 7: _I64, 9: _I64, 11: _I64}
_VALUES, _COMPRESSED, _FIRST_DATA, _DICTIONARY = _COLUMN
_FOOTER = {4: [{1: [{3: _COLUMN}]}]}
_HEADER = {1: _I32, 2: _I32, 3: _I32, 5: {1: _I32, 2: _I32}, 8: {1: _I32, 4: _I32}}
_DATA = {0: (5, 2), 3: (8, 4)}  # kinds of pages with values: the fields of their own header, and of the encoding in it


@dataclass(frozen=True)
class Page:
    """One page: bytes in memory, values in it (0 for a dictionary), and how they are encoded (a number of the format's)."""

    size: int
    values: int
    encoding: int | None

    @property
    def shares(self) -> bool:
        """Whether a value can stand for more than its bytes: it may begin as the one before it."""
        return self.encoding == _DELTA_BYTE_ARRAY

    @property
    def refers(self) -> bool:
        """Whether its values are places in a dictionary."""
        return self.encoding in _DICTIONARIES


def pages(file: BinaryIO, columns: list[int]) -> list[list[Page]]:
    """Return the pages of some columns, by groups of rows. Headers are held to what the format says exactly.

    Where Arrow would make something of a header all the same, it need not be the same that is made of it here.

    Raises:
        CorpusError: the footer or a header cannot be read, or pages are named several times.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        groups = [list(_chunks(group, columns)) for group in _footer(file, size).get(4, ())]
        # Each group has pages of its own: a few, named again and again, would be read for ever.
        if sum(length for group in groups for _, length, _ in group) > size * len(columns):
            raise CorpusError(f"the pages of its groups of rows, by its footer, have more than the file's {size} bytes")
        return [[page for chunk in group for page in _pages(file, *chunk)] for group in groups]
    except CorpusError:
        raise
    except (LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CorpusError(f"its footer, or the header of a page, cannot be read ({error})") from None


def _footer(file: BinaryIO, size: int) -> dict[int, Any]:
    file.seek(max(0, size - 8))
    length = int.from_bytes(file.read(4), "little")
    if not 0 < length <= min(LARGEST_FOOTER, size - 8):
        raise ValueError(f"a footer of {length} bytes; at most {LARGEST_FOOTER}")
    file.seek(size - 8 - length)
    return _Compact(file.read(length)).struct(_FOOTER)


def _chunks(group: dict[int, Any], columns: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield where the pages of columns begin, how many bytes they have, and how many values."""
    for column in columns:
        found = group[1][column][3]
        begin, dictionary = found[_FIRST_DATA], found.get(_DICTIONARY, 0)
        begin = dictionary if 0 < dictionary < begin else begin
        if min(begin, found[_COMPRESSED], found[_VALUES]) < 0:
            raise ValueError("a negative place or number")
        yield begin, found[_COMPRESSED], found[_VALUES]


def _pages(file: BinaryIO, begin: int, length: int, values: int) -> Iterator[Page]:
    place, seen = begin, 0
    while place < begin + length and seen < values:
        header, own = _header(file, place)
        data, encoding = _DATA.get(header[1], (None, None))
        if data is None:
            page = Page(header[2], 0, None)
        else:
            page = Page(header[2], header[data][1], header[data].get(encoding))
        if min(page.size, page.values, header[3]) < 0:
            raise ValueError("a negative number")
        yield page
        place, seen = place + own + header[3], seen + page.values


def _header(file: BinaryIO, place: int) -> tuple[dict[int, Any], int]:
    """Return the header of a page, and its length."""
    for most in (_USUAL_HEADER, _LARGEST_HEADER):
        file.seek(place)
        reader = _Compact(file.read(most))
        try:
            return reader.struct(_HEADER), reader.place
        except IndexError:
            if most == _LARGEST_HEADER or len(reader.data) < most:
                raise
    raise AssertionError


class _Compact:
    """Reads values of Thrift's compact protocol; IndexError where the data end before them."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def struct(self, wanted: dict[int, Any]) -> dict[int, Any]:
        """The fields that are wanted, by number; others are passed over."""
        found: dict[int, Any] = {}
        number = 0
        while kind := self.byte():
            number = number + (kind >> 4) if kind >> 4 else self.integer(16)
            if number in found or not -(2**15) <= number < 2**15:
                raise ValueError(f"field {number}, again or out of range")
            if number in wanted:
                found[number] = self.value(kind & 15, wanted[number])
            else:
                self.skip(kind & 15)
        return found

    def value(self, kind: int, wanted: Any) -> Any:
        """A struct if `wanted` is a mapping, a list if it is a list, else a whole number of that kind."""
        if isinstance(wanted, dict) and kind == 12:
            return self.struct(wanted)
        if isinstance(wanted, list) and kind == 9:
            count, inner = self.list_head()
            return [self.value(inner, wanted[0]) for _ in range(count)]
        if wanted == kind:
            return self.integer(32 if kind == _I32 else 64)
        raise TypeError(f"a value of kind {kind} where another should be")

    def skip(self, kind: int) -> None:
        """Passes over a value: true and false have no bytes, a byte and a floating number as many as they say."""
        if kind in (4, 5, 6):
            self.number()
        elif kind in (3, 7, 8):
            self.take({3: 1, 7: 8}.get(kind) or self.number())
        elif kind in (9, 10):
            count, inner = self.list_head()
            for _ in range(count):
                self.skip(3 if inner in (1, 2) else inner)
        elif kind == 11:
            count = self.number()
            kinds = self.byte() if count else 0
            for _ in range(count):
                self.skip(3 if kinds >> 4 in (1, 2) else kinds >> 4)
                self.skip(3 if kinds & 15 in (1, 2) else kinds & 15)
        elif kind == 12:
            self.struct({})
        elif kind not in (1, 2):
            raise TypeError(f"a value of kind {kind}, which does not exist")

    def list_head(self) -> tuple[int, int]:
        """How many values a list has, and their kind."""
        head = self.byte()
        return (head >> 4 if head >> 4 < 15 else self.number()), head & 15

    def byte(self) -> int:
        self.place += 1
        return self.data[self.place - 1]

    def take(self, count: int) -> bytes:
        if self.place + count > len(self.data):
            raise IndexError("it ends within a value")
        self.place += count
        return self.data[self.place - count : self.place]

    def number(self) -> int:
        """A number that is not negative, seven bits a byte."""
        found = 0
        for shift in range(0, 70, 7):
            byte = self.byte()
            found |= (byte & 127) << shift
            if byte < 128:
                return found
        raise ValueError("a number of more than ten bytes")

    def integer(self, bits: int) -> int:
        """A number with its sign in the last bit."""
        found = self.number()
        if found >= 2**bits:
            raise ValueError(f"a number of more than {bits} bits")
        return (found >> 1) ^ -(found & 1)
