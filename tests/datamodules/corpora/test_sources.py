import gzip
import json
import os
import sysconfig
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from src.datamodules.corpora import CorpusError, PythonSource, TextFiles, files, sources


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(source: sources.Source) -> dict[str, str]:
    documents = list(source.documents())
    assert len({name for name, _ in documents}) == len(documents)
    return dict(documents)


class TestPythonSource:
    def test_the_library_of_this_interpreter(self):
        documents = texts(PythonSource())
        names = list(documents)
        assert names == sorted(names)
        assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= documents.keys()
        assert documents["argparse.py"] == Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes().decode()
        assert 5e6 < sum(map(len, documents.values())) < 25e6
        folders = {part for name in names for part in name.split("/")[:-1]}
        assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        assert not any("_sysconfigdata" in name for name in names)

    def test_what_is_left_out(self, tmp_path, monkeypatch):
        for name in ("b.py", "a/z.py", "a/B.py", "test.py"):
            write(tmp_path / name, "x = 1\n")
        skipped = [
            "test/t.py",
            "a/tests/t.py",
            "site-packages/p.py",
            "dist-packages/p.py",
            "__pycache__/c.py",
            "notes.txt",
        ]
        for name in [*skipped, "_sysconfigdata__linux.py", "sitecustomize.py", "config-3.11-x/python-config.py"]:
            write(tmp_path / name, "x = 1\n")
        write(tmp_path / "empty.py", "")
        write(tmp_path / "blank.py", " \n\n")
        write(tmp_path / "latin1.py", "# caf\u00e9".encode("latin-1"))
        write(tmp_path / "latin2.py", b"\xff")
        monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
        source = PythonSource()
        with pytest.warns(UserWarning, match=r"skipped 2 file\(s\)") as record:
            assert list(texts(source)) == ["a/B.py", "a/z.py", "b.py", "test.py"]
        assert len(record) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a second pass repeats no warning
            list(source.documents())

    def test_no_library(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path / "none"))
        with pytest.raises(CorpusError, match="none"):
            list(PythonSource().documents())


class TestPlainText:
    def test_folder(self, tmp_path):
        for name in ("z.txt", "sub/a.md", "sub/deep/b.py", "C.TXT", ".hidden.txt", ".git/x.txt", "no.bin", "none"):
            write(tmp_path / name, f"text of {name}")
        assert texts(TextFiles(tmp_path)) == {
            n: f"text of {n}" for n in ("C.TXT", "sub/a.md", "sub/deep/b.py", "z.txt")
        }
        assert list(texts(TextFiles(tmp_path))) == ["C.TXT", "sub/a.md", "sub/deep/b.py", "z.txt"]

    def test_single_file(self, tmp_path):
        assert texts(TextFiles(write(tmp_path / "one.txt", "hello"))) == {"one.txt": "hello"}

    def test_gzipped(self, tmp_path):
        write(tmp_path / "a.txt.gz", gzip.compress("zipped é".encode()))
        assert texts(TextFiles(tmp_path)) == {"a.txt.gz": "zipped é"}

    def test_extensions_and_pattern(self, tmp_path):
        for name in ("a.txt", "b.py", "c.log", "sub/part_1.txt", "sub/part_2.log"):
            write(tmp_path / name, "x")
        assert list(texts(TextFiles(tmp_path, extensions=["log", ".PY"]))) == ["b.py", "c.log", "sub/part_2.log"]
        assert list(texts(TextFiles(tmp_path, pattern="part_*"))) == ["sub/part_1.txt"]
        assert list(texts(TextFiles(tmp_path, pattern="sub/*"))) == ["sub/part_1.txt"]

    def test_text_is_kept_to_the_byte(self, tmp_path):
        content = "a\r\nb\rc\n\0 \u2028 \U0001f600 e\u0301"
        assert texts(TextFiles(write(tmp_path / "a.txt", content)))["a.txt"] == content
        assert texts(TextFiles(write(tmp_path / "bom.txt", b"\xef\xbb\xbfhi")))["bom.txt"] == "hi"

    def test_undecodable_bytes_are_replaced(self, tmp_path):
        write(tmp_path / "a.txt", b"caf\xe9 ok")
        write(tmp_path / "b.txt", "fine")
        with pytest.warns(UserWarning, match=r"1 file\(s\) are not UTF-8, such as a.txt"):
            assert texts(TextFiles(tmp_path)) == {"a.txt": "caf\ufffd ok", "b.txt": "fine"}

    def test_links(self, tmp_path):
        write(tmp_path / "elsewhere/a.txt", "a")
        write(tmp_path / "root/b.txt", "b")
        (tmp_path / "root/link").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "root/loop").symlink_to(tmp_path / "root")
        assert list(texts(TextFiles(tmp_path / "root"))) == ["b.txt", "link/a.txt"]


class TestRows:
    def test_json_lines(self, tmp_path):
        rows = [{"text": "one"}, {"text": ""}, {"content": "two"}, {"text": None}, {"text": "three", "content": "no"}]
        content = "\n".join(map(json.dumps, rows)) + "\n\n" + json.dumps({"text": "last\nline"})
        expected = {":1": "one", ":3": "two", ":5": "three", ":7": "last\nline"}
        for name in ("a.jsonl", "b.json", "c.ndjson"):
            assert texts(TextFiles(write(tmp_path / name, content))) == {name + row: t for row, t in expected.items()}
        zipped = write(tmp_path / "d.jsonl.gz", gzip.compress(content.encode()))
        assert texts(TextFiles(zipped)) == {"d.jsonl.gz" + row: t for row, t in expected.items()}

    def test_lone_surrogates_are_replaced(self, tmp_path):
        path = write(tmp_path / "a.jsonl", r'{"text": "x\ud800y \ud83d\ude00"}')
        assert texts(TextFiles(path)) == {"a.jsonl:1": "x\ufffdy \U0001f600"}

    def test_text_field(self, tmp_path):
        path = write(tmp_path / "a.jsonl", '{"body": "b", "content": "c", "text": "t"}')
        assert texts(TextFiles(path, text_field="body")) == {"a.jsonl:1": "b"}
        with pytest.raises(CorpusError, match=r"a\.jsonl:1: no field 'story'.*body, content, text"):
            texts(TextFiles(path, text_field="story"))

    @pytest.mark.parametrize(
        ("line", "complaint"),
        [
            ("{broken", "not JSON"),
            ("[1, 2]", "a JSON list, not an object"),
            ('{"title": "x", "body": "y"}', "no field 'text'.*title, body"),
            ('{"text": 5}', "holds int, not text"),
            (b'{"text": "\xff"}', "not JSON"),
        ],
    )
    def test_bad_line(self, tmp_path, line, complaint):
        line = line if isinstance(line, bytes) else line.encode()
        path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n' + line + b'\n{"text": "fine"}\n' + line)
        with pytest.raises(CorpusError, match=f"a.jsonl:2: .*{complaint}.*skip_bad=True"):
            texts(TextFiles(path))
        with pytest.warns(UserWarning, match=r"skipped 2 bad line\(s\), the first at .*a\.jsonl:2"):
            assert texts(TextFiles(path, skip_bad=True)) == {"a.jsonl:1": "good", "a.jsonl:3": "fine"}

    @pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
    def test_parquet(self, tmp_path, kind):
        values = [None if i == 1 else f"row {i}" for i in range(3000)]
        table = pa.table({"id": list(range(3000)), "text": pa.array(values).cast(kind)})
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=700)
        documents = texts(TextFiles(tmp_path / "a.parquet"))
        assert len(documents) == 2999
        assert documents["a.parquet:1"] == "row 0"
        assert documents["a.parquet:3000"] == "row 2999"
        assert "a.parquet:2" not in documents

    def test_parquet_columns(self, tmp_path):
        pq.write_table(pa.table({"content": ["c"], "n": [1]}), tmp_path / "a.parquet")
        assert texts(TextFiles(tmp_path)) == {"a.parquet:1": "c"}
        with pytest.raises(CorpusError, match=r"no field 'body'.*content, n"):
            texts(TextFiles(tmp_path, text_field="body"))
        with pytest.raises(CorpusError, match="column 'n' holds int64, not strings"):
            texts(TextFiles(tmp_path, text_field="n"))


class TestErrors:
    def test_missing_path(self, tmp_path):
        with pytest.raises(CorpusError, match=r"nowhere.* does not exist"):
            TextFiles(tmp_path / "nowhere")

    def test_nothing_to_read_says_what_is_there(self, tmp_path):
        for name in ("a.bin", "b.bin", "c.pdf", "LICENSE"):
            write(tmp_path / name, "x")
        with pytest.raises(CorpusError, match=r"\.txt .*\.jsonl.*found 2 x \.bin, 1 x ") as error:
            texts(TextFiles(tmp_path))
        assert "1 x .pdf" in str(error.value)
        assert "1 x no extension" in str(error.value)
        with pytest.raises(CorpusError, match=r"found 1 x .bin"):
            texts(TextFiles(tmp_path / "a.bin"))

    def test_empty_folder(self, tmp_path):
        with pytest.raises(CorpusError, match="found no files"):
            texts(TextFiles(tmp_path))

    def test_only_blank_documents(self, tmp_path):
        write(tmp_path / "a.txt", "\n \n")
        with pytest.raises(CorpusError, match="holds any text"):
            texts(TextFiles(tmp_path))

    def test_unreadable(self, tmp_path):
        (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
        with pytest.raises(CorpusError, match=r"a\.txt cannot be read"):
            texts(TextFiles(tmp_path))
        with pytest.raises(CorpusError, match=r"a\.txt cannot be read"):
            TextFiles(tmp_path).fingerprint()

    @pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.parquet"])
    def test_corrupt(self, tmp_path, name):
        write(tmp_path / name, b"not what it says")
        with pytest.raises(CorpusError, match=f"{name} cannot be read"):
            texts(TextFiles(tmp_path))

    def test_truncated_gzip(self, tmp_path):
        write(tmp_path / "a.jsonl.gz", gzip.compress(os.urandom(5000))[:2000])
        with pytest.raises(CorpusError):
            texts(TextFiles(tmp_path, skip_bad=True))

    @pytest.mark.parametrize("extensions", [".txt", []])
    def test_extensions_is_a_list(self, tmp_path, extensions):
        with pytest.raises(CorpusError, match="is not a list"):
            TextFiles(tmp_path, extensions=extensions)


class TestFingerprint:
    @pytest.fixture
    def root(self, tmp_path):
        write(tmp_path / "root/a.txt", "aaa")
        write(tmp_path / "root/b/c.jsonl", '{"text": "x"}')
        return tmp_path / "root"

    def test_is_stable_and_moves_with_the_folder(self, root):
        before = TextFiles(root).fingerprint()
        assert TextFiles(root).fingerprint() == before
        assert TextFiles(root.rename(root.with_name("moved"))).fingerprint() == before

    def test_changes_with_content_names_and_parsing(self, root):
        seen = {TextFiles(root).fingerprint(), TextFiles(root, text_field="body").fingerprint()}
        seen.add(TextFiles(root, skip_bad=True).fingerprint())
        seen.add(TextFiles(root, pattern="*.txt").fingerprint())
        write(root / "a.txt", "aab")
        seen.add(TextFiles(root).fingerprint())
        (root / "a.txt").rename(root / "aa.txt")  # still the first
        seen.add(TextFiles(root).fingerprint())
        write(root / "new.txt", "n")
        seen.add(TextFiles(root).fingerprint())
        assert len(seen) == 7

    def test_ignores_files_that_are_not_read(self, root):
        before = TextFiles(root).fingerprint()
        write(root / "x.bin", "noise")
        os.utime(root / "a.txt", ns=(1, 1))
        assert TextFiles(root).fingerprint() == before

    def test_large_sources_count_by_size_and_time(self, root, monkeypatch):
        by_content = TextFiles(root).fingerprint()
        monkeypatch.setattr(files, "CONTENT_HASH_LIMIT", 15)
        os.utime(root / "a.txt", ns=(1, 1))
        before = TextFiles(root).fingerprint()
        assert before != by_content
        write(root / "a.txt", "bbb")
        os.utime(root / "a.txt", ns=(1, 1))
        assert TextFiles(root).fingerprint() == before
        os.utime(root / "a.txt", ns=(1, 2))
        assert TextFiles(root).fingerprint() != before


def test_cache_label(tmp_path):
    assert TextFiles(write(tmp_path / "My data (v1).jsonl", "x")).name == "My_data_v1"
    assert TextFiles(tmp_path, name="pile").name == "pile"
    assert PythonSource().name == "python"
