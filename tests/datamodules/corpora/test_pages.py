"""Parquet files that would become far more than they are: refused by what their pages say, before Arrow reads any."""

import random
import string
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from src.datamodules.corpora import CorpusError, TextFiles, formats, pages
from src.datamodules.corpora.pages import Page


def texts(source: TextFiles) -> dict[str, str]:
    return dict(source.documents())


def test_texts_that_repeat_the_beginnings_of_others(tmp_path, monkeypatch):
    """Stored by what is new in them, they are not all in memory at once."""
    monkeypatch.setattr(formats, "_BATCH_BYTES", 2**21)
    table = pa.table({"text": ["a" * 2**20 + str(i) for i in range(64)]})
    options: Any = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", **options)
    del table
    before, peak, count = pa.total_allocated_bytes(), 0, 0
    for _ in TextFiles(tmp_path).documents():
        count, peak = count + 1, max(peak, pa.total_allocated_bytes() - before)
    assert count == 64
    assert peak < 16 * 2**20


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False}, {"data_page_version": "2.0"}])
def test_pages_that_expand_beyond_measure(tmp_path, monkeypatch, options):
    monkeypatch.setattr(formats, "MAX_PAGE_BYTES", 2**20)
    table = pa.table({"n": [1, 2], "text": ["a" * 2**20, "b"]})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", **options)
    with pytest.raises(CorpusError, match=r"a\.parquet has a page of \d+ bytes, .* at most 1048576 are read"):
        texts(TextFiles(tmp_path))
    pq.write_table(table.slice(1), tmp_path / "a.parquet", compression="zstd", **options)
    assert texts(TextFiles(tmp_path)) == {"a.parquet:1": "b"}


@pytest.mark.parametrize("text", [None, "a"])
def test_rows_of_next_to_nothing(tmp_path, text):
    table = pa.table({"text": pa.array([text] * (2**20 + 1), pa.string())})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"a\.parquet has 1048577 rows, .* at most 1048576 are read"):
        next(iter(TextFiles(tmp_path).documents()))


def test_a_text_that_too_many_rows_repeat(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_DOCUMENT_BYTES", 2**20)
    pq.write_table(pa.table({"text": ["a" * 2**16] * 40}), tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(CorpusError, match=r"a\.parquet becomes \d+ bytes, out of all proportion"):
        texts(TextFiles(tmp_path))


def test_groups_of_rows_that_name_the_same_pages(tmp_path):
    """A footer of a few bytes a group would have them read as often as it likes."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["".join(random.Random(0).choices(string.printable, k=30_000))]}), path)
    metadata = pq.read_metadata(path)
    for _ in range(5):
        metadata.append_row_groups(pq.read_metadata(path))
    whole = path.read_bytes()
    metadata.write_metadata_file(tmp_path / "footer")
    footer = (tmp_path / "footer").read_bytes()[4:]
    (tmp_path / "footer").unlink()
    path.write_bytes(whole[: len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")] + footer)
    with pytest.raises(
        CorpusError, match=r"a\.parquet cannot be read as parquet: the pages .* have more than the file"
    ):
        texts(TextFiles(tmp_path))


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"\x15\x00\x05\x02\x0a\x00\x00", "field 1, again"),
        (b"\x16\x00\x00", "kind 6 where another"),
        (b"\x15\x80\x80\x80\x80\x20\x00", "more than 32 bits"),
        (b"\x05\x82\x80\x08\x00\x00", "more than 16 bits"),
        (b"\x15" + b"\x80" * 10 + b"\x00", "more than ten bytes"),
        (b"\xcf", "kind 15, which does not exist"),
    ],
)
def test_headers_of_pages_are_read_in_one_way(data, named):
    """Each of them is another number to Arrow than to a reader that is as patient in another way."""
    with pytest.raises((ValueError, TypeError), match=named):
        pages._Compact(data).struct({1: 5})


def test_a_dictionary_behind_a_page_without_it(tmp_path):
    """The first row says nothing of the texts that the others stand for; a row of each page may be all of one."""
    pq.write_table(pa.table({"text": ["a", "b", "c"]}), tmp_path / "a.parquet")
    own = [Page(100 << 20, 0, None), Page(5, 1, 0), Page(9, 63, 8)]
    with (tmp_path / "a.parquet").open("rb") as file, pq.ParquetFile(file) as table:
        assert formats._rows_at_once(file, table.metadata, 0, "text", own) == 1
        assert formats._rows_at_once(file, table.metadata, 0, "text", own[::2]) > 1
