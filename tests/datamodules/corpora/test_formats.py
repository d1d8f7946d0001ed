"""Files as strangers leave them: compressed, in other encodings, damaged, or no files at all."""

import bz2
import contextlib
import gzip
import json
import lzma
import os
import random
import signal
import socket
import string
import subprocess
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from src.datamodules.corpora import CorpusError, TextFiles, TokenizerOptions, formats, prepare


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(source: TextFiles) -> dict[str, str]:
    return dict(source.documents())


@pytest.fixture(autouse=True)
def deadline():
    """A read that blocks fails, instead of holding up the tests."""

    def late(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class TestCompression:
    @pytest.mark.parametrize("suffix", COMPRESS)
    def test_text_and_rows(self, tmp_path, suffix):
        write(tmp_path / f"a.txt{suffix}", COMPRESS[suffix]("zipped é\r\n".encode()))
        write(tmp_path / f"b.jsonl{suffix}", COMPRESS[suffix](b'{"text": "one"}\n{"text": "two"}\n'))
        rows = {f"b.jsonl{suffix}:1": "one", f"b.jsonl{suffix}:2": "two"}
        assert texts(TextFiles(tmp_path)) == {f"a.txt{suffix}": "zipped é\r\n"} | rows

    @pytest.mark.parametrize("suffix", COMPRESS)
    def test_large_files_and_several_streams(self, tmp_path, suffix):
        text = "".join(random.Random(0).choices(string.ascii_letters + "\n", k=300_000))
        halves = [COMPRESS[suffix](part.encode()) for part in (text[:200_000], text[200_000:])]
        assert texts(TextFiles(write(tmp_path / f"a.txt{suffix}", b"".join(halves)))) == {f"a.txt{suffix}": text}

    @pytest.mark.parametrize("suffix", [".bz2", ".xz"])
    def test_zeros_that_fill_up_a_block(self, tmp_path, suffix):
        path = write(tmp_path / f"a.txt{suffix}", COMPRESS[suffix](b"one ") + bytes(512) + COMPRESS[suffix](b"two"))
        assert texts(TextFiles(path)) == {path.name: "one two"}

    @pytest.mark.parametrize("skip_bad", [False, True])
    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    @pytest.mark.parametrize("suffix", COMPRESS)
    def test_damage(self, tmp_path, suffix, name, skip_bad):
        whole = COMPRESS[suffix](b'{"text": "' + os.urandom(5000).hex().encode() + b'"}')
        for damaged in (whole[: len(whole) // 2], whole[:-3], b"not what it says", whole[:50] + whole[60:]):
            path = write(tmp_path / f"{name}{suffix}", damaged)
            with pytest.raises(CorpusError, match=f"{name}{suffix}"):
                texts(TextFiles(path, skip_bad=skip_bad))

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    @pytest.mark.parametrize("suffix", COMPRESS)
    def test_a_file_that_expands_beyond_measure(self, tmp_path, monkeypatch, suffix, name):
        monkeypatch.setattr(formats, "MAX_DOCUMENT_BYTES", 2**20)
        monkeypatch.setattr(formats, "MAX_EXPANSION", 50)
        path = write(tmp_path / f"{name}{suffix}", COMPRESS[suffix](b'{"text": "a"}\n' * 2**18))
        with pytest.raises(CorpusError, match=rf"{name}{suffix} becomes more than \d+ bytes|longer than 1048576"):
            texts(TextFiles(path))

    @pytest.mark.parametrize("suffix", COMPRESS)
    def test_a_document_that_is_a_compressed_file_is_shorter(self, tmp_path, monkeypatch, suffix):
        """One character beyond the common ones makes four bytes of every other one."""
        assert formats.MAX_COMPRESSED_DOCUMENT_BYTES == 2**28
        monkeypatch.setattr(formats, "MAX_COMPRESSED_DOCUMENT_BYTES", 2**16)
        text = "\U0001f600" + "a " * 2**15
        path = write(tmp_path / f"a.txt{suffix}", COMPRESS[suffix](text.encode()))
        with pytest.raises(
            CorpusError, match=r"a\.txt\.\w+: longer than 65536 bytes; .*cut it.*; decompressed, it may"
        ):
            texts(TextFiles(path))
        assert texts(TextFiles(write(tmp_path / "a.txt", text))) == {"a.txt": text}

    def test_an_xz_header_that_asks_for_gigabytes(self, tmp_path):
        filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 2**20}]
        data = bytearray(lzma.compress(b"text", filters=filters))
        data[12 + 4] = 40  # the dictionary's size: 4 GiB
        import zlib

        data[20:24] = zlib.crc32(data[12:20]).to_bytes(4, "little")
        with pytest.raises(CorpusError, match=r"a\.txt\.xz cannot be read: .*[Mm]emory"):
            texts(TextFiles(write(tmp_path / "a.txt.xz", bytes(data))))

    def test_parquet_is_compressed_inside(self, tmp_path):
        write(tmp_path / "a.parquet.gz", gzip.compress(b"x"))
        write(tmp_path / "b.txt", "text")
        source = TextFiles(tmp_path)
        assert texts(source) == {"b.txt": "text"}
        assert "1 .parquet.gz" in source.summary()


class TestEncodings:
    TEXT = 'line é\r\n日本 🙂 "\n'

    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
    def test_a_byte_order_mark_is_believed(self, tmp_path, encoding):
        path = write(tmp_path / "a.txt", self.TEXT.encode(encoding))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert texts(TextFiles(path)) == {"a.txt": self.TEXT}
            lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in ("ćĊ", "zwei 🙂"))
            path = write(tmp_path / "b.jsonl", lines.encode(encoding))
            assert texts(TextFiles(path)) == {"b.jsonl:1": "ćĊ", "b.jsonl:2": "zwei 🙂"}

    @pytest.mark.parametrize("mark", ["ff fe", "fe ff"])
    def test_both_orders_of_bytes(self, tmp_path, mark):
        encoding = {"ff fe": "utf-16-le", "fe ff": "utf-16-be"}[mark]
        assert texts(TextFiles(write(tmp_path / "a.txt", bytes.fromhex(mark) + self.TEXT.encode(encoding)))) == {
            "a.txt": self.TEXT
        }

    @pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
    def test_without_a_mark_it_is_refused(self, tmp_path, encoding):
        write(tmp_path / "a.txt", ("Plain words. " * 5).encode(encoding))
        write(tmp_path / "b.txt", "fine")
        with pytest.raises(CorpusError, match=r"a\.txt: \d+% of its bytes are NUL.*UTF-16.*iconv.*skip_bad"):
            texts(TextFiles(tmp_path))
        with pytest.warns(UserWarning, match=r"skipped 1 bad .*a\.txt"):
            assert texts(TextFiles(tmp_path, skip_bad=True)) == {"b.txt": "fine"}

    def test_other_encodings_become_no_rubbish(self, tmp_path):
        path = write(tmp_path / "a.txt", "Все счастливые семьи похожи друг на друга".encode("cp1251"))
        with pytest.raises(CorpusError, match=r"a\.txt: \d+% of it cannot be decoded as UTF-8.*iconv"):
            texts(TextFiles(path))

    def test_a_line_cut_within_a_character(self, tmp_path):
        path = write(tmp_path / "a.jsonl", '{"text": "🙂"}'.encode("utf-16")[:-1])
        with pytest.raises(CorpusError, match=r"a\.jsonl"):
            texts(TextFiles(path))


class TestLines:
    @pytest.mark.parametrize("bad", ["[" * 100_000, '{"a":' * 100_000, '{"text": ' + "1" * 5000 + "}", "{" + "\0" * 9])
    def test_lines_that_json_cannot_read(self, tmp_path, bad):
        path = write(tmp_path / "a.jsonl", '{"text": "good"}\n' + bad + '\n{"text": "fine"}\n')
        with pytest.raises(CorpusError, match=r"a\.jsonl:2: .*skip_bad=True"):
            texts(TextFiles(path))
        with pytest.warns(UserWarning, match=r"skipped 1 bad line\(s\), the first at .*a\.jsonl:2"):
            assert texts(TextFiles(path, skip_bad=True)) == {"a.jsonl:1": "good", "a.jsonl:3": "fine"}

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
    def test_a_line_longer_than_any_text(self, tmp_path, monkeypatch, encoding):
        monkeypatch.setattr(formats, "MAX_DOCUMENT_BYTES", 1000)
        monkeypatch.setattr(formats, "MAX_LINE_BYTES", 1000)
        content = '{"text": "good"}\n["' + "x" * 5000 + '"]\n{"text": "fine"}\n'
        path = write(tmp_path / "a.jsonl", content.encode(encoding))
        with pytest.raises(CorpusError, match=r"a\.jsonl:2: longer than 1000 bytes.*one object per line"):
            texts(TextFiles(path))
        with pytest.warns(UserWarning, match="skipped 1 bad"):
            assert texts(TextFiles(path, skip_bad=True)) == {"a.jsonl:1": "good", "a.jsonl:3": "fine"}
        with pytest.raises(CorpusError, match=r"b\.txt: longer than 1000 bytes.*\.jsonl"):
            texts(TextFiles(write(tmp_path / "b.txt", "x" * 1001)))

    @pytest.mark.parametrize("suffix", [".gz", ".zst"])
    def test_a_compressed_line_is_shorter(self, tmp_path, suffix):
        """A few bytes can become many small values, which take thirty times the memory of what they are written in."""
        line = b'{"text": "' + b"a" * 2**24 + b'"}\n'
        path = write(tmp_path / f"a.jsonl{suffix}", COMPRESS[suffix](line))
        with pytest.raises(CorpusError, match=rf"a\.jsonl\{suffix}:1: longer than 16777216 bytes; .*may have 33554432"):
            texts(TextFiles(path))

    def test_a_line_of_empty_objects(self, tmp_path):
        path = write(tmp_path / "a.jsonl", b'{"text": "a", "x": [' + b"{}," * (2**25 // 3) + b"{}]}\n")
        with pytest.raises(CorpusError, match=r"a\.jsonl:1: longer than 33554432 bytes"):
            texts(TextFiles(path))


class TestParquet:
    @staticmethod
    def strings(values: list[bytes | None]) -> pa.Array:
        """Strings that Arrow has not checked."""
        binary = pa.array(values, pa.binary())
        return pa.Array.from_buffers(pa.string(), len(values), binary.buffers())

    @pytest.mark.parametrize("kind", ["string", "binary", "dictionary"])
    def test_rows_that_are_not_utf8(self, tmp_path, kind):
        values = [b"good", b"caf\xe9", None, b"fine", b"\xff"] + [b"more"] * 2000
        column = self.strings(values)
        column = {"string": column, "binary": pa.array(values, pa.binary())}.get(kind, column)
        if kind == "dictionary":
            numbers = pa.array([None if value is None else i for i, value in enumerate(values)], pa.int32())
            column = pa.DictionaryArray.from_arrays(numbers, self.strings([value or b"" for value in values]))
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
        with pytest.raises(CorpusError, match=r"a\.parquet:2: not UTF-8 .*skip_bad=True"):
            texts(TextFiles(tmp_path))
        with pytest.warns(UserWarning, match=r"skipped 2 bad .*a\.parquet:2"):
            found = texts(TextFiles(tmp_path, skip_bad=True))
        assert list(found.items())[:3] == [("a.parquet:1", "good"), ("a.parquet:4", "fine"), ("a.parquet:6", "more")]
        assert len(found) == 2002

    @pytest.mark.parametrize(
        "kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
    )
    def test_a_long_text_that_many_rows_repeat(self, tmp_path, monkeypatch, kind):
        """Stored once, it is not in memory as often as there are rows."""
        monkeypatch.setattr(formats, "_BATCH_BYTES", 2**21)
        text = "a" * 2**20
        column = (
            pa.array([text, "b"] * 64).cast(pa.binary()) if kind == pa.binary() else pa.array([text, "b"] * 64, kind)
        )
        table = pa.table({"n": list(range(128)), "text": column})
        pq.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=True)
        del column, table
        before, peak = pa.total_allocated_bytes(), 0
        for row in TextFiles(tmp_path).documents():
            assert row.text in (text, "b")
            peak = max(peak, pa.total_allocated_bytes() - before)
        assert peak < 10 * 2**20

    def test_empty_tables_are_no_obstacle(self, tmp_path):
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
        pq.write_table(pa.table({"text": pa.array([], pa.null())}), tmp_path / "b.parquet")
        pq.write_table(pa.table({"text": ["x"]}), tmp_path / "c.parquet")
        assert texts(TextFiles(tmp_path)) == {"c.parquet:1": "x"}

    @pytest.mark.parametrize(
        "column", [pa.array([["a"]]), pa.array([{"text": "a"}]), pa.array([1.5]), pa.array([True]), pa.array([[b"a"]])]
    )
    def test_other_columns(self, tmp_path, column):
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
        with pytest.raises(CorpusError, match=r"a\.parquet: column 'text' holds .*, not strings"):
            texts(TextFiles(tmp_path))

    def test_two_columns_of_one_name(self, tmp_path):
        table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
        pq.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(CorpusError, match=r"a\.parquet: 2 columns are called 'text'"):
            texts(TextFiles(tmp_path))

    def test_a_folder_called_parquet(self, tmp_path):
        (tmp_path / "data.parquet").mkdir()
        pq.write_table(pa.table({"text": ["x"]}), tmp_path / "data.parquet" / "part-0.parquet")
        assert texts(TextFiles(tmp_path)) == {"data.parquet/part-0.parquet:1": "x"}
        assert texts(TextFiles(tmp_path / "data.parquet")) == {"part-0.parquet:1": "x"}

    def test_any_damage_is_a_corpus_error(self, tmp_path):
        pq.write_table(pa.table({"text": [f"row {i}" for i in range(500)], "n": list(range(500))}), tmp_path / "good")
        whole = (tmp_path / "good").read_bytes()
        numbers = random.Random(0)
        for _ in range(300):
            data = bytearray(whole)
            for _ in range(numbers.choice([1, 2, 8])):
                data[numbers.choice([numbers.randrange(len(data)), len(data) - 1 - numbers.randrange(700)])] = (
                    numbers.randrange(256)
                )
            path = write(tmp_path / "a.parquet", bytes(data[: numbers.choice([len(data)] * 3 + [len(data) // 2])]))
            with contextlib.suppress(CorpusError):
                texts(TextFiles(path))


class TestMutations:
    def test_rows_of_json(self, tmp_path):
        """Whatever is done to a file, it is read or refused with its name; with `skip_bad` only whole files are."""
        numbers = random.Random(0)
        rows = [json.dumps({"id": i, "text": f"text {i} é 🙂", "more": [{"a": None}]}) for i in range(20)]
        outcomes = [0, 0]
        for _ in range(300):
            data = bytearray("\n".join(rows).encode(numbers.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16"])))
            for _ in range(numbers.choice([1, 3])):
                place = numbers.randrange(len(data))
                data[place : place + numbers.choice([0, 1, 40])] = numbers.choices(b'0{}[]"\\,:\xff\0\n', k=1)
            suffix = numbers.choice(["", "", *COMPRESS])
            path = write(tmp_path / f"a.jsonl{suffix}", COMPRESS.get(suffix, bytes)(bytes(data)))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for skip_bad in (False, True):
                    try:
                        outcomes[skip_bad] += len(texts(TextFiles(path, skip_bad=skip_bad))) > 10
                    except CorpusError as error:
                        assert "a.jsonl" in str(error) or "none of its 1 file" in str(error)  # noqa: PT017
        assert outcomes[0] < 200 < outcomes[1]


class TestSpecialFiles:
    @pytest.fixture
    def folder(self, tmp_path, monkeypatch) -> Path:
        write(tmp_path / "in/a.txt", "text")
        os.mkfifo(tmp_path / "in/pipe.txt")
        os.mkfifo(tmp_path / "in/pipe.parquet")
        (tmp_path / "in/null.jsonl").symlink_to("/dev/zero")
        monkeypatch.chdir(tmp_path / "in")  # names of sockets are short
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("socket.md")
        (tmp_path / "in/folder.txt").mkdir()
        return tmp_path / "in"

    def test_are_left_out_with_one_message(self, folder):
        source = TextFiles(folder)
        with pytest.warns(UserWarning, match="left out 4 pipes, sockets or devices, such as null.jsonl") as record:
            assert texts(source) == {"a.txt": "text"}
        assert len(record) == 1
        assert source.summary() == "reading 1 .txt; left out 4 special file(s)"
        source.fingerprint()

    @pytest.mark.parametrize("name", ["pipe.txt", "socket.md", "null.jsonl", "pipe.parquet"])
    def test_are_refused_by_name(self, folder, name):
        with pytest.raises(
            CorpusError, match=rf"{name}.* is a (named pipe|socket|device), neither a file nor a folder"
        ):
            TextFiles(folder / name)

    def test_a_pipe_that_takes_the_place_of_a_file(self, folder):
        source = TextFiles(folder / "a.txt")
        (folder / "a.txt").unlink()
        os.mkfifo(folder / "a.txt")
        for read in (source.fingerprint, lambda: texts(source)):
            with pytest.raises(CorpusError, match=r"a\.txt"):
                read()

    def test_nothing_else_there(self, folder):
        (folder / "a.txt").unlink()
        with pytest.raises(CorpusError, match="holds nothing to read.*4 are no regular files"):
            texts(TextFiles(folder))

    @pytest.mark.parametrize("path", ["~nobody-of-this-name/x", "a\0b", "x" * 5000, "a.txt/b"])
    def test_paths_that_cannot_be(self, folder, path):
        with pytest.raises(CorpusError, match="path="):
            TextFiles(path)


class TestLinksThatLeadOut:
    def test_are_followed_and_told_once(self, tmp_path):
        write(tmp_path / "home/id_rsa", "secret")
        write(tmp_path / "home/more/b.txt", "more")
        write(tmp_path / "in/own.txt", "text")
        (tmp_path / "in/a.txt").symlink_to(tmp_path / "home/id_rsa")
        (tmp_path / "in/folder").symlink_to("../home/more")
        (tmp_path / "in/inner.md").symlink_to("own.txt")
        source = TextFiles(tmp_path / "in")
        with pytest.warns(UserWarning, match=r"^2 links lead out of the folder, such as a\.txt") as record:
            found = texts(source)
        assert found == {"a.txt": "secret", "folder/b.txt": "more", "own.txt": "text"}
        assert len(record) == 1
        (tmp_path / "in/folder").unlink()
        with pytest.warns(UserWarning, match=r"^1 link leads out of the folder, such as a\.txt"):
            texts(TextFiles(tmp_path / "in"))

    def test_a_folder_that_is_a_link_itself_is_no_way_out(self, tmp_path):
        write(tmp_path / "real/b.txt", "text")
        (tmp_path / "real/c.md").symlink_to("b.txt")
        (tmp_path / "in").symlink_to("real")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert texts(TextFiles(tmp_path / "in")) == {"b.txt": "text"}

    def test_the_system_is_left_out(self, tmp_path):
        """Neither the environment of this process, nor folders without an end."""
        write(tmp_path / "in/own.txt", "text")
        (tmp_path / "in/environment.txt").symlink_to("/proc/self/environ")
        (tmp_path / "in/again.txt").symlink_to("environment.txt")
        (tmp_path / "in/kernel").symlink_to("/sys/kernel")
        (tmp_path / "in/processes").symlink_to("/proc")
        (tmp_path / "in/devices.txt").symlink_to("/dev")
        source = TextFiles(tmp_path / "in")
        with pytest.warns(
            UserWarning, match=r"left out 5 .*, such as \S+: .* links into /proc, /sys or /dev"
        ) as record:
            assert texts(source) == {"own.txt": "text"}
        assert len(record) == 1
        assert source.summary() == "reading 1 .txt; left out 5 special file(s)"


class TestWhatIsLeftOut:
    def test_is_said_by_extension(self, tmp_path):
        for name in ("a.md", "b.md", "c.txt", "d.png", "e.png", "f.tar.gz", "g.zip", "h", ".hidden", "i.txt.bz2"):
            write(tmp_path / name, bz2.compress(b"x") if name.endswith("bz2") else name)
        source = TextFiles(tmp_path)
        lines = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepare(source, TokenizerOptions("bytes"), tmp_path.with_name("cache"), progress=lines.append)
        (line,) = [line for line in lines if "reading" in line]
        assert "reading 2 .md, 2 .txt; left out 2 .png, 1 .tar.gz, 1 .zip, 1 without extension, 1 hidden" in line

    def test_one_file_under_many_names_is_read_once(self, tmp_path):
        write(tmp_path / "in/b/real.txt", "text")
        (tmp_path / "in/a.txt").symlink_to("b/real.txt")
        (tmp_path / "in/aa").symlink_to("b")
        os.link(tmp_path / "in/b/real.txt", tmp_path / "in/b/twin.txt")
        source = TextFiles(tmp_path / "in")
        assert texts(source) == {"b/real.txt": "text"}
        assert source.summary() == "reading 1 .txt; left out 2 link(s) to files already listed"

    def test_the_folder_itself_comes_before_links_to_it(self, tmp_path):
        write(tmp_path / "in/z/a.txt", "text")
        (tmp_path / "in/a").symlink_to("z")
        (tmp_path / "in/m").mkdir()
        (tmp_path / "in/m/up").symlink_to("..")
        assert texts(TextFiles(tmp_path / "in")) == {"z/a.txt": "text"}

    def test_deep_folders(self, tmp_path):
        folder = os.open(tmp_path, os.O_RDONLY)
        for _ in range(1100):
            os.mkdir("d", dir_fd=folder)
            inner = os.open("d", os.O_RDONLY, dir_fd=folder)
            os.close(folder)
            folder = inner
        os.close(os.open("a.txt", os.O_CREAT | os.O_WRONLY, dir_fd=folder))
        os.close(folder)
        write(tmp_path / "b.txt", "text")
        try:
            assert texts(TextFiles(tmp_path)) == {"b.txt": "text"}
        finally:  # Python's own way to remove a tree calls itself for every level
            subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)

    def test_names_of_links_count_where_the_file_s_own_does_not_fit(self, tmp_path):
        """As in the cache of a download: content under a hash, and a link with the real name."""
        write(tmp_path / "in/blobs/0123abcd", "text")
        (tmp_path / "in/snapshots").mkdir()
        (tmp_path / "in/snapshots/train.txt").symlink_to("../blobs/0123abcd")
        assert texts(TextFiles(tmp_path / "in")) == {"snapshots/train.txt": "text"}


@pytest.mark.parametrize("asked", ["/proc/self/pagemap", "/proc/self", "link to a file", "link to a folder"])
def test_what_is_of_the_system_is_nobodys_text(tmp_path, asked):
    """Also where the path itself leads there: it would be read to an end that it has not, and what it holds kept."""
    path = tmp_path / "corpus.txt"
    if asked.startswith("link"):
        path.symlink_to("/proc/self/pagemap" if asked.endswith("file") else "/proc/self")
    else:
        path = Path(asked)
    with pytest.raises(
        CorpusError, match=r"(corpus\.txt|self) lies in /proc, /sys, /dev|pagemap holds nothing to read"
    ):
        TextFiles(path, extensions=[".txt"]).fingerprint()
    if "pagemap" in asked or asked.endswith("file"):
        with pytest.raises(CorpusError, match="lies in /proc, /sys, /dev"):
            TokenizerOptions(str(path)).identity()


def test_an_extension_says_more_than_how_it_is_compressed(tmp_path):
    with pytest.raises(CorpusError, match=r"name the kind of text too"):
        TextFiles(write(tmp_path / "a.txt", "x").parent, extensions=[".gz"])


def test_empty_lines_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_ROWS", 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n" * 10**6))
    with pytest.raises(CorpusError, match=r"a\.jsonl\.gz has more than \d+ lines, out of all proportion"):
        list(TextFiles(tmp_path).documents())


def test_many_columns(tmp_path, monkeypatch):
    table = pa.table({"text": ["a"], **{f"c{i}": [1] for i in range(9)}})
    pq.write_table(pa.concat_tables([table] * 9), tmp_path / "a.parquet", row_group_size=1)
    assert len(list(TextFiles(tmp_path).documents())) == 9
    monkeypatch.setattr(formats, "MAX_COLUMNS_OF_GROUPS", 50)
    with pytest.raises(CorpusError, match=r"a\.parquet has 10 columns in 9 groups of rows; at most"):
        list(TextFiles(tmp_path).documents())


@pytest.mark.parametrize("name", [b"caf\xe9.txt", b"\xff\xfe.jsonl", b"new\nline.txt"])
def test_names_that_are_not_utf8(tmp_path, name):
    (tmp_path / "in").mkdir()
    for i, other in enumerate([name, b"b.txt", b"c.txt", b"d.txt"]):
        content = f"text {i}" if not name.endswith(b"jsonl") or i else '{"text": "text 0"}\n{bad'
        Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/" + other)).write_text(content)
    source = TextFiles(tmp_path / "in", skip_bad=True)
    for document in source.documents():
        (document.name + document.text).encode()
        assert document.name.isprintable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        corpus = prepare(source, TokenizerOptions("bytes"), tmp_path / "cache", val_share=0.3, test_share=0.3)
        assert prepare(source, TokenizerOptions("bytes"), tmp_path / "cache", val_share=0.3, test_share=0.3).meta == (
            corpus.meta
        )
    assert sum(split["documents"] for split in corpus.meta["splits"].values()) == 4


def test_a_folder_whose_name_is_not_utf8(tmp_path):
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    for i in range(9):
        write(root / f"{i}.txt", f"text {i}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        corpus = prepare(TextFiles(root), TokenizerOptions("bytes"), tmp_path / "cache")
    assert corpus.path.name.isascii()
    json.dumps(corpus.meta, ensure_ascii=False).encode()
