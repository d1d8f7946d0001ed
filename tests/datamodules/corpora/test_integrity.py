"""A corpus whose bytes are not those that were written, by accident or on purpose."""

import json
import os
import pickle
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.datamodules.corpora import (
    SPLITS,
    Corpus,
    CorpusError,
    TextFiles,
    Tokenizer,
    TokenizerOptions,
    integrity,
    prepare,
)

BYTES = TokenizerOptions("bytes")


@pytest.fixture
def corpus(folder, tmp_path) -> Corpus:
    return prepare(TextFiles(folder), BYTES, tmp_path / "cache", val_share=0.2, test_share=0.2)


def forge(path: Path, change: Any = lambda meta: None) -> None:
    """Writes meta.json anew, with a right checksum, as somebody would who means to deceive."""
    meta = json.loads((path / "meta.json").read_text())
    meta.pop("checksum")
    for name, record in meta["files"].items():
        if (path / name).is_file():
            record |= integrity._record(path / name)
    change(meta)
    (path / "meta.json").write_text(json.dumps(meta | {"checksum": integrity._checksum(meta)}))


class TestWrongBytes:
    @pytest.mark.parametrize("file", sorted(integrity.FILES))
    @pytest.mark.parametrize("harm", ["zeros", "one bit at the end", "one byte in the middle", "one bit at the start"])
    def test_of_the_right_size(self, corpus, folder, tmp_path, file, harm):
        path = corpus.path / file
        data = bytearray(path.read_bytes())
        if harm == "zeros":
            data[len(data) // 14 :] = bytes(len(data) - len(data) // 14)
        else:
            place = {"end": -1, "middle": len(data) // 2, "start": 0}[harm.split()[-1]]
            data[place] ^= 1 if "bit" in harm else 0xFF
        path.write_bytes(data)
        with pytest.raises(CorpusError, match=f"not a complete corpus: {file}"):
            Corpus(corpus.path)
        with pytest.warns(UserWarning, match=rf"is damaged: {file}.*building it again"):
            again = prepare(TextFiles(folder), BYTES, tmp_path / "cache", val_share=0.2, test_share=0.2)
        assert again.path == corpus.path
        assert Corpus(corpus.path).meta["files"] == corpus.meta["files"]

    @pytest.mark.parametrize("value", [258, 65535])
    def test_ids_beyond_the_vocabulary(self, corpus, value):
        tokens = np.load(corpus.path / "val.tokens.npy")
        tokens[len(tokens) // 2] = value
        np.save(corpus.path / "val.tokens.npy", tokens)
        forge(corpus.path)
        with pytest.raises(CorpusError, match=rf"val\.tokens\.npy.*{value}, not within 0 to 257"):
            Corpus(corpus.path)

    @pytest.mark.parametrize("harm", ["swapped", "negative", "beyond", "not from 0"])
    def test_starts_of_documents(self, corpus, harm):
        offsets = np.load(corpus.path / "train.offsets.npy")
        if harm == "swapped":
            offsets[[3, 4]] = offsets[[4, 3]]
        else:
            offsets[0 if harm != "beyond" else -2] = {"negative": -1, "beyond": offsets[-1] + 5, "not from 0": 1}[harm]
        np.save(corpus.path / "train.offsets.npy", offsets)
        forge(corpus.path)
        with pytest.raises(CorpusError, match=r"train\.offsets\.npy"):
            Corpus(corpus.path)


class TestMeta:
    @pytest.mark.parametrize("key", ["documents", "tokens", "bytes"])
    def test_changed_counts(self, corpus, key):
        meta = json.loads((corpus.path / "meta.json").read_text())
        meta["splits"]["train"][key] -= 1
        (corpus.path / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(CorpusError, match=r"meta\.json is damaged: its checksum"):
            Corpus(corpus.path)

    @pytest.mark.parametrize(
        ("keys", "value", "complaint"),
        [
            (("splits", "train", "tokens"), 7, r"train\..* meta\.json says"),
            (("splits", "train", "documents"), 7, r"train\.offsets\.npy .* meta\.json says"),
            (("splits", "val", "tokens"), -1, "counts of the val split"),
            (("splits", "val", "tokens"), True, "counts of the val split"),
            (("splits", "val", "bytes"), 10**400, "counts of the val split"),
            (("splits", "val", "extra"), 1, "counts of the val split"),
            (("splits", "more"), {}, "its splits are"),
            (("tokenizer", "vocab_size"), 10**6, r"tokens\.npy holds uint16"),
            (("tokenizer", "vocab_size"), 200, "name, fingerprint or tokenizer"),
            (("tokenizer", "vocab_size"), 10**30, "name, fingerprint or tokenizer"),
            (("tokenizer", "vocab_size"), 2**24 + 1, "name, fingerprint or tokenizer"),
            (("token_bytes",), 5, "is damaged"),
            (("token_bytes", "val"), -1, "its token_bytes are not a number"),
            (("token_bytes", "more"), 1, "its token_bytes are not a number"),
            (("tokenizer", "bos_id"), 258, "name, fingerprint or tokenizer"),
            (("tokenizer", "bos"), None, "name, fingerprint or tokenizer"),
            (("name",), 5, "name, fingerprint or tokenizer"),
            (("files", "../../secret"), {"bytes": 0, "chunks": []}, "lists the files"),
            (("files", "/etc/passwd"), {"bytes": 0, "chunks": []}, "lists the files"),
            (("files", "tokenizer.json", "bytes"), 10**15, "tokenizer.json do not agree"),
            (("files", "tokenizer.json", "chunks"), None, "tokenizer.json do not agree"),
            (("files",), [], "lists the files"),
        ],
    )
    def test_forged(self, corpus, keys, value, complaint):
        def change(meta: dict[str, Any]) -> None:
            *path, last = keys
            for key in path:
                meta = meta[key]
            meta[last] = value

        forge(corpus.path, change)
        with pytest.raises(CorpusError, match=complaint):
            Corpus(corpus.path)

    @pytest.mark.parametrize("text", ["[" * 100_000, "null", "[]", "{}", '{"format": 2}', "1" * 5000, "\0", "\ud800"])
    def test_that_is_none(self, corpus, text):
        (corpus.path / "meta.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(CorpusError, match=r"meta\.json|format"):
            Corpus(corpus.path)

    def test_that_has_no_end(self, corpus, monkeypatch):
        monkeypatch.setattr(integrity, "_LARGEST_META", 1000)
        with pytest.raises(CorpusError, match=r"meta\.json is larger than 1000 bytes"):
            Corpus(corpus.path)

    def test_of_another_corpus(self, corpus, folder, tmp_path):
        """A folder that was renamed or copied over another one's place."""
        (folder / "note00.txt").write_text("other text")
        other = prepare(TextFiles(folder), BYTES, tmp_path / "other", val_share=0.2, test_share=0.2)
        corpus.path.rename(tmp_path / "cache" / other.path.name)
        with pytest.warns(UserWarning, match=f"that of another corpus, {corpus.fingerprint}"):
            again = prepare(TextFiles(folder), BYTES, tmp_path / "cache", val_share=0.2, test_share=0.2)
        assert again.meta["splits"] == other.meta["splits"]

    def test_mutations(self, corpus):
        """Whatever is changed in a forged meta.json or in a header, the answer is a corpus or a CorpusError."""
        numbers = random.Random(0)
        whole = {file: (corpus.path / file).read_bytes() for file in ("meta.json", "val.offsets.npy", "val.tokens.npy")}
        refused = 0
        for _ in range(300):
            file = numbers.choice(list(whole))
            data = bytearray(whole[file])
            for _ in range(numbers.choice([1, 1, 3])):
                place = numbers.randrange(len(data) if file == "meta.json" else 128)
                data[place : place + numbers.choice([0, 1, 1, 5])] = numbers.choices(b'0123456789{}[]"\\, xO', k=1)
            (corpus.path / file).write_bytes(data)
            if file != "meta.json":
                forge(corpus.path)
            try:
                Corpus(corpus.path).split("val").tokens.sum()
            except CorpusError:
                refused += 1
            for name, content in whole.items():
                (corpus.path / name).write_bytes(content)
        assert refused > 200


class TestForeignFiles:
    @pytest.mark.parametrize("file", ["meta.json", "tokenizer.json", "val.tokens.npy"])
    @pytest.mark.parametrize("kind", ["link to the same", "link out", "pipe", "folder"])
    def test_only_regular_files_of_the_folder_are_opened(self, corpus, tmp_path, file, kind):
        path = corpus.path / file
        path.rename(tmp_path / "away")
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(tmp_path / "away" if kind == "link to the same" else "/etc/passwd")
        with pytest.raises(CorpusError, match=f"{file} is a (link|named pipe|folder)"):
            Corpus(corpus.path)

    @pytest.mark.parametrize("content", ["objects", "pickle", "archive", "header", "version", "fortran"])
    def test_arrays_are_never_pickles(self, corpus, tmp_path, content, monkeypatch):
        monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
        path = corpus.path / "val.tokens.npy"
        tokens = np.load(path)
        if content == "objects":
            np.save(path, np.array([{}] * len(tokens), dtype=object), allow_pickle=True)
        elif content == "pickle":
            path.write_bytes(pickle.dumps(tokens))
        elif content == "archive":
            with path.open("wb") as file:
                np.savez(file, tokens)
        elif content == "version":
            with path.open("wb") as file:
                np.lib.format.write_array(file, tokens, version=(3, 0))
        elif content == "fortran":
            np.save(path, np.asfortranarray(tokens.reshape(1, -1)))
        else:
            path.write_bytes(path.read_bytes()[:10] + b"(" * 110 + path.read_bytes()[120:])
        forge(corpus.path)
        with pytest.raises(CorpusError, match=r"val\.tokens\.npy"):
            Corpus(corpus.path)

    @pytest.mark.parametrize("other", ["larger", "swapped"])
    def test_a_tokenizer_that_is_another(self, corpus, other):
        if other == "larger":
            Tokenizer.train(["some text"] * 9, 260).save(corpus.path / "tokenizer.json")
        else:
            definition = json.loads((corpus.path / "tokenizer.json").read_text())
            first, second = definition["added_tokens"]
            first["content"], second["content"] = second["content"], first["content"]
            (corpus.path / "tokenizer.json").write_text(json.dumps(definition))
        forge(corpus.path)
        with pytest.raises(CorpusError, match=r"tokenizer\.json has (vocab_size|bos_id)"):
            _ = Corpus(corpus.path).tokenizer

    def test_a_vocabulary_that_only_meta_json_has_builds_no_model(self, corpus, folder):
        """Tokens as uint32 and new checksums: nothing but the tokenizer.json speaks against it."""
        for split in ("train", "val", "test"):
            path = corpus.path / f"{split}.tokens.npy"
            tokens = np.load(path).astype(np.uint32)
            with path.open("wb") as file:
                np.lib.format.write_array(file, tokens, version=(1, 0))
        forge(corpus.path, lambda meta: meta["tokenizer"].update(vocab_size=2**24))
        with pytest.raises(
            CorpusError, match=r"tokenizer\.json has vocab_size \d+, the tokens were made with 16777216"
        ):
            _ = Corpus(corpus.path).vocab_size
        with pytest.warns(UserWarning, match=r"is damaged: tokenizer\.json has vocab_size .*building it again"):
            again = prepare(TextFiles(folder), BYTES, corpus.path.parent, val_share=0.2, test_share=0.2)
        assert again.vocab_size == 258

    def test_names_stay_in_the_cache(self, folder, tmp_path):
        source = TextFiles(folder, name="../../outside")
        assert "/" not in source.name
        source.name = "../outside"
        with pytest.raises(CorpusError, match=r"'\.\./outside' must be letters"):
            prepare(source, BYTES, tmp_path / "cache")
        assert not list(tmp_path.glob("outside*"))

    def test_a_file_where_the_cache_should_be(self, folder, tmp_path):
        (tmp_path / "cache").write_text("x")
        with pytest.raises(CorpusError, match="cache_dir=.* is a file"):
            prepare(TextFiles(folder), BYTES, tmp_path / "cache")


class TestBounds:
    def test_large_files_are_sampled(self):
        assert integrity.checked_chunks(0, "k") == []
        assert integrity.checked_chunks(16, "k") == list(range(16))
        for count in (17, 18, 100, 10**6):
            chosen = integrity.checked_chunks(count, "k")
            assert len(chosen) == len(set(chosen)) == 16
            assert chosen == integrity.checked_chunks(count, "k")
            assert (chosen[0], chosen[-1]) == (0, count - 1)
            assert np.diff(chosen).max() < count / 5
        assert integrity.checked_chunks(100, "k") != integrity.checked_chunks(100, "other")

    def test_no_more_is_read(self, corpus, tmp_path, monkeypatch):
        monkeypatch.setattr(integrity, "CHUNK_BYTES", 256)
        forge(corpus.path)
        tokens = corpus.path / "train.tokens.npy"
        count = -(-tokens.stat().st_size // 256)
        chosen = integrity.checked_chunks(count, corpus.fingerprint + tokens.name)
        assert count > 16
        whole = tokens.read_bytes()
        for chunk in range(count):
            data = bytearray(whole)
            data[chunk * 256 + 200 if chunk < count - 1 else -1] ^= 1
            tokens.write_bytes(data)
            if chunk in chosen:
                with pytest.raises(CorpusError, match=f"train.tokens.npy, bytes {chunk * 256} to"):
                    Corpus(corpus.path)
            else:
                Corpus(corpus.path)
        tokens.write_bytes(whole)
        Corpus(corpus.path)

    def test_once_per_open_and_not_in_data_workers(self, corpus, folder, tmp_path, monkeypatch):
        checks = []
        check = integrity._check_file
        monkeypatch.setattr(integrity, "_check_file", lambda *args: checks.append(args[1]) or check(*args))
        opened = prepare(TextFiles(folder), BYTES, tmp_path / "cache", val_share=0.2, test_share=0.2)
        assert sorted(checks) == sorted(integrity.FILES)
        for copy in (pickle.loads(pickle.dumps(opened)), pickle.loads(pickle.dumps(opened.split("train")))):
            stream = copy.split("train") if isinstance(copy, Corpus) else copy
            assert len(stream.tokens) == stream.num_tokens
            assert len(stream.offsets) == stream.num_documents + 1
        assert sorted(checks) == sorted(integrity.FILES)


def test_files_are_on_the_disk_before_they_get_their_name(folder, tmp_path, monkeypatch):
    """Otherwise a power cut leaves a folder with the right name and empty files."""
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(descriptor: int) -> None:
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def record_rename(path: Path, target: Path) -> Path:
        events.append(("rename", Path(target).name))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    corpus = prepare(TextFiles(folder), BYTES, tmp_path / "cache")
    moved = events.index(("rename", corpus.path.name))
    before = {name for _, name in events[:moved]}
    assert integrity.FILES | {"meta.json"} <= before
    assert any(name.endswith(".tmp") for name in before)
    assert events[moved + 1 :] == [("fsync", "cache")]


def test_every_split_is_checked(corpus):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(Corpus(corpus.path).split(split).num_tokens for split in SPLITS)
