import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

import src
from src.datamodules.corpora import (
    SPLITS,
    Corpus,
    CorpusError,
    TextFiles,
    Tokenizer,
    TokenizerOptions,
    integrity,
    prepare,
    progress,
    store,
)
from src.datamodules.corpora.corpus import damage
from src.datamodules.corpora.splits import SplitShares, content_key

ROOT = Path(src.__file__ or "").parents[1]
BPE = TokenizerOptions("bpe", vocab_size=300)
BYTES = TokenizerOptions("bytes")


def silent(_: str) -> None:
    pass


def contents(corpus: Corpus) -> dict[str, list[int]]:
    return {split: corpus.split(split).tokens.tolist() for split in SPLITS}


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


class TestContent:
    @pytest.mark.parametrize("options", [BPE, BYTES])
    def test_documents_are_stored_in_order_between_bos_and_eos(self, folder, tmp_path, options):
        corpus = prepare(TextFiles(folder), options, tmp_path / "cache", val_share=0.2, test_share=0.1)
        shares = SplitShares(0.2, 0.1)
        tokenizer = corpus.tokenizer
        expected = {split: [] for split in SPLITS}
        for _, text in TextFiles(folder).documents():
            expected[shares.of(content_key(text))].append(text)
        for split in SPLITS:
            stream = corpus.split(split)
            assert stream.num_documents == len(expected[split]) == len(stream.offsets) - 1
            assert stream.num_tokens == len(stream.tokens) == stream.offsets[-1]
            assert stream.num_bytes == sum(len(text.encode()) for text in expected[split])
            assert tokenizer.bytes_per_token[stream.tokens].sum() == stream.num_bytes
            for i, text in enumerate(expected[split]):
                document = stream.tokens[stream.offsets[i] : stream.offsets[i + 1]]
                assert document.tolist() == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        assert sum(map(len, expected.values())) == 80

    def test_files(self, folder, tmp_path):
        corpus = prepare(TextFiles(folder), BPE, tmp_path / "cache")
        assert corpus.path == tmp_path / "cache" / f"texts-{corpus.fingerprint}"
        names = {f"{split}.{kind}.npy" for split in SPLITS for kind in ("tokens", "offsets")}
        assert {path.name for path in corpus.path.iterdir()} == names | {"tokenizer.json", "meta.json"}
        assert np.load(corpus.path / "train.tokens.npy").dtype == np.uint16
        assert np.load(corpus.path / "train.offsets.npy").dtype == np.int64
        meta = json.loads((corpus.path / "meta.json").read_text())
        assert meta["source"]["kind"] == "text files"
        assert meta["libraries"]["tokenizers"] == tokenizers.__version__
        assert meta["tokenizer"]["vocab_size"] == corpus.vocab_size == 300
        assert sum(split["documents"] for split in meta["splits"].values()) == 80
        assert tokenizers.Tokenizer.from_file(str(corpus.path / "tokenizer.json")).get_vocab_size() == 300

    def test_tokeniser_is_trained_on_the_train_split_only(self, folder, tmp_path, monkeypatch):
        seen = []
        train = Tokenizer.train
        monkeypatch.setattr(Tokenizer, "train", lambda texts, size: train(seen.extend(texts) or seen, size))
        prepare(TextFiles(folder), BPE, tmp_path / "cache", val_share=0.2, test_share=0.2)
        shares = SplitShares(0.2, 0.2)
        assert seen == [t for _, t in TextFiles(folder).documents() if shares.of(content_key(t)) == "train"]

    def test_large_corpora_train_it_on_a_sample(self, folder, tmp_path, monkeypatch):
        seen = []
        train = Tokenizer.train
        monkeypatch.setattr(Tokenizer, "train", lambda texts, size: train(seen.extend(texts) or seen, size))
        corpus = prepare(TextFiles(folder), BPE, tmp_path / "whole")
        everything = len(seen)
        monkeypatch.setattr(store, "TOKENIZER_TRAINING_BYTES", corpus.split("train").num_bytes // 2)
        seen.clear()
        prepare(TextFiles(folder), BPE, tmp_path / "half")
        assert 0.25 * everything < len(seen) < 0.75 * everything

    def test_wide_vocabularies_take_four_bytes(self, folder, tmp_path):
        vocab = {chr(i): i for i in range(0x21, 0x300)}
        vocab |= {f"filler{i}": 0x300 + i for i in range(2**16)}
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
        backend.add_special_tokens(["<s>", "</s>"])
        backend.save(str(tmp_path / "tokenizer.json"))
        corpus = prepare(TextFiles(folder), TokenizerOptions(str(tmp_path)), tmp_path / "cache")
        stream = corpus.split("train")
        assert stream.tokens.dtype == np.uint32
        assert stream.tokens[0] == corpus.tokenizer.bos_id > 2**16
        assert corpus.tokenizer.bytes_per_token[stream.tokens].sum() == stream.num_bytes

    @pytest.mark.parametrize("written", [True, False])
    def test_inexact_tokeniser_warns_at_every_opening(self, folder, tmp_path, written, monkeypatch):
        backend = tokenizers.Tokenizer(models.WordLevel({"layer": 0, "canon": 1, "?": 2}, unk_token="?"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
        backend.add_special_tokens(["<s>", "</s>"])
        backend.save(str(tmp_path / "tokenizer.json"))
        if not written:  # as earlier versions left it

            def without(folder, meta):
                integrity.write_meta(folder, {key: value for key, value in meta.items() if key != "token_bytes"})

            monkeypatch.setattr(store, "write_meta", without)
        for _ in range(2):
            with pytest.warns(UserWarning, match="does not reproduce the text byte for byte"):
                corpus = prepare(TextFiles(folder), TokenizerOptions(str(tmp_path)), tmp_path / "cache")
            assert ("token_bytes" in corpus.meta) == written
            for split in SPLITS:
                stream = corpus.split(split)
                stand_for = corpus.tokenizer.bytes_per_token[stream.tokens].sum()
                assert corpus.bytes_ratio(split) == pytest.approx(stream.num_bytes / stand_for)

    def test_exact_tokenisers_do_not_warn(self, folder, tmp_path, recwarn):
        for options in (BPE, TokenizerOptions("bytes")):
            for _ in range(2):
                corpus = prepare(TextFiles(folder), options, tmp_path / "cache")
                assert {corpus.bytes_ratio(split) for split in SPLITS} == {1.0}
        assert not [warning for warning in recwarn if "byte for byte" in str(warning.message)]

    def test_batches_bound_the_memory(self, folder, tmp_path, monkeypatch):
        whole = prepare(TextFiles(folder), BPE, tmp_path / "whole")
        sizes = []
        encode = Tokenizer.encode_batch

        def spy(self, texts):
            sizes.append(sum(map(len, texts)))
            return encode(self, texts)

        monkeypatch.setattr(Tokenizer, "encode_batch", spy)
        monkeypatch.setattr(store, "_BATCH_CHARACTERS", 1000)
        pieces = prepare(TextFiles(folder), BPE, tmp_path / "pieces")
        longest = max(len(text) for _, text in TextFiles(folder).documents())
        assert len(sizes) > 5
        assert max(sizes) < 1000 + longest
        assert contents(pieces) == contents(whole)

    def test_progress(self, folder, tmp_path, capsys):
        lines = []
        prepare(TextFiles(folder), BYTES, tmp_path / "cache", progress=lines.append)
        assert [line.split()[0] for line in lines] == ["preparing", "80", "tokenising", lines[-1].split()[0]]
        assert "reading 50 .txt, 1 .jsonl" in lines[0]
        assert "bytes per token" in lines[-1]
        prepare(TextFiles(folder), BYTES, tmp_path / "quiet")
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize("phase", ["listing", "reading", "training", "tokenising", "writing", "checking"])
    def test_every_phase_says_how_far_it_is(self, folder, tmp_path, monkeypatch, phase):
        """Also while one call does not return."""
        monkeypatch.setattr(store, "_PROGRESS_SECONDS", 0.1)
        monkeypatch.setattr(progress, "_SHORTEST_WAIT", 0.1)
        owner, name = {
            "listing": (TextFiles, "files"),
            "reading": (TextFiles, "finish"),
            "training": (Tokenizer, "train"),
            "tokenising": (Tokenizer, "encode_batch"),
            "writing": (store, "write_meta"),
            "checking": (store, "Corpus"),
        }[phase]
        if phase == "checking":
            prepare(TextFiles(folder), BPE, tmp_path / "cache")
        act = getattr(owner, name)

        def slowly(*args):
            args = (list(args[0]), args[1]) if phase == "training" else args  # the texts are read, nothing is done yet
            time.sleep(0.5)
            return act(*args)

        monkeypatch.setattr(owner, name, slowly)
        lines = []
        prepare(TextFiles(folder), BPE, tmp_path / "cache", progress=lines.append)
        expected = {
            "listing": "listing and hashing the files of texts",
            "reading": "read 80 documents",
            "training": "training the tokeniser: ",
            "tokenising": "tokenised 0",
            "writing": "writing 0 MB",
            "checking": f"checking {tmp_path}",
        }
        assert sum(line.startswith(expected[phase]) for line in lines) >= 2
        assert "progress of a corpus" not in {thread.name for thread in threading.enumerate()}

    def test_a_line_that_cannot_be_printed_ends_nothing(self, monkeypatch):
        monkeypatch.setattr(progress, "_SHORTEST_WAIT", 0.01)
        with progress.Heartbeat(lambda line: print(1 / 0) if line == "late" else None, 0.01) as heart:
            heart.say("first", doing=lambda: "late")
            time.sleep(0.1)
            assert heart._thread.is_alive()

    def test_lines_appear_where_nobody_has_set_up_logging(self, folder, tmp_path):
        program = (
            "import sys; from src.datamodules.corpora import TextFiles, TokenizerOptions, prepare\n"
            "prepare(TextFiles(sys.argv[1]), TokenizerOptions('bpe', vocab_size=300), sys.argv[2])"
        )
        command = [sys.executable, "-c", program, str(folder), str(tmp_path / "cache")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert [line.split()[0] for line in run.stderr.splitlines()][:3] == ["preparing", "80", "tokenising"]


class TestIdenticalDocuments:
    """No text that is held out is trained on under another name, or in a file of another format."""

    @staticmethod
    def texts_of(corpus: Corpus, split: str) -> set[str]:
        stream = corpus.split(split)
        starts = stream.offsets
        pieces = [stream.tokens[starts[i] + 1 : starts[i + 1] - 1] for i in range(stream.num_documents)]
        return {" ".join(corpus.tokenizer.decode(piece).split()) for piece in pieces}

    def check(self, corpus: Corpus) -> None:
        sides = [self.texts_of(corpus, split) for split in SPLITS]
        assert all(sides)
        assert sum(map(len, sides)) == len(set.union(*sides))

    def test_rows(self, tmp_path):
        rows = [json.dumps({"text": f"text number {i % 60}"}) for i in range(600)]
        (tmp_path / "rows.jsonl").write_text("\n".join(rows))
        with pytest.warns(UserWarning, match=r"540 of 600 documents \(90%\) repeat"):
            corpus = prepare(TextFiles(tmp_path / "rows.jsonl"), BYTES, tmp_path / "cache")
        self.check(corpus)
        assert corpus.meta["duplicate_documents"] == 540
        assert sum(split["documents"] for split in corpus.meta["splits"].values()) == 600

    def test_files_in_other_dress(self, tmp_path):
        root = tmp_path / "texts"
        (root / "sub").mkdir(parents=True)
        for i in range(40):
            text = f"text\nnumber {i}\n"
            (root / f"{i}.txt").write_text(text)
            (root / "sub" / f"{i}.txt.gz").write_bytes(gzip.compress(text.encode()))
            (root / f"windows{i}.txt").write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
            (root / f"wide{i}.txt").write_text(text, encoding="utf-16")
            (root / f"link{i}.txt").symlink_to(f"{i}.txt")
            os.link(root / f"{i}.txt", root / "sub" / f"hard{i}.txt")
        lines = [json.dumps({"text": f"text\nnumber {i}"}) for i in range(40)]
        (root / "rows.jsonl").write_text("\n".join(lines))
        lines = []
        with pytest.warns(UserWarning, match="160 of 200 documents"):
            corpus = prepare(
                TextFiles(root), BYTES, tmp_path / "cache", val_share=0.2, test_share=0.2, progress=lines.append
            )
        self.check(corpus)
        assert "left out 80 link(s) to files already listed" in lines[0]


class TestCache:
    def test_second_call_tokenises_nothing(self, folder, tmp_path, monkeypatch):
        first = prepare(TextFiles(folder), BPE, tmp_path / "cache")
        for method in ("encode_batch", "train"):
            monkeypatch.setattr(Tokenizer, method, lambda *_: pytest.fail("tokenised again"))
        second = prepare(TextFiles(folder), BPE, tmp_path / "cache")
        assert second.path == first.path
        assert contents(second) == contents(first)

    def test_a_change_makes_a_new_folder(self, folder, tmp_path):
        def path(options=BYTES, val_share=0.05, test_share=0.05) -> Path:
            return prepare(
                TextFiles(folder), options, tmp_path / "cache", val_share=val_share, test_share=test_share
            ).path

        seen = [
            path(),
            path(BPE),
            path(TokenizerOptions("bpe", vocab_size=301)),
            path(val_share=0.2),
            path(test_share=0.2),
        ]
        (folder / "note00.txt").write_text("changed")
        seen.append(path())
        (folder / "note00.txt").rename(folder / "renamed.txt")
        seen.append(path())
        assert len(set(seen)) == len(seen) == len(folders(tmp_path / "cache"))

    def test_source_may_move(self, folder, tmp_path):
        first = prepare(TextFiles(folder, name="x"), BYTES, tmp_path / "cache")
        moved = folder.rename(tmp_path / "moved")
        assert prepare(TextFiles(moved, name="x"), BYTES, tmp_path / "cache").path == first.path

    @pytest.mark.parametrize("harm", ["truncate", "grow", "remove", "garbage", "empty", "no tokenizer"])
    def test_damage_is_noticed_and_repaired(self, folder, tmp_path, harm):
        corpus = prepare(TextFiles(folder), BYTES, tmp_path / "cache")
        before = contents(corpus)
        tokens, meta = corpus.path / "train.tokens.npy", corpus.path / "meta.json"
        if harm == "truncate":
            tokens.write_bytes(tokens.read_bytes()[:-10])
        elif harm == "grow":
            tokens.write_bytes(tokens.read_bytes() + b"x")
        elif harm == "remove":
            tokens.unlink()
        elif harm == "garbage":
            meta.write_text("{")
        elif harm == "empty":
            meta.write_text("[]")
        else:
            (corpus.path / "tokenizer.json").unlink()
        with pytest.warns(UserWarning, match=r"is damaged: .*building it again"):
            repaired = prepare(TextFiles(folder), BYTES, tmp_path / "cache")
        assert repaired.path == corpus.path
        assert contents(repaired) == before
        assert folders(tmp_path / "cache") == [corpus.path.name]

    def test_failed_build_leaves_nothing(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(Tokenizer, "encode_batch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(TextFiles(folder), BYTES, tmp_path / "cache")
        assert folders(tmp_path / "cache") == []

    def test_source_that_changes_meanwhile(self, folder, tmp_path):
        def change(_: str) -> None:
            (folder / "note01.txt").write_text(f"changed {os.urandom(4).hex()}")

        with pytest.raises(CorpusError, match="changed while they were read"):
            prepare(TextFiles(folder, extensions=[".txt"]), BYTES, tmp_path / "cache", progress=change)
        assert folders(tmp_path / "cache") == []

    def test_cache_inside_the_source(self, folder):
        with pytest.raises(CorpusError, match=r"cache_dir=.* lies in "):
            prepare(TextFiles(folder), BYTES, folder / "cache")
        assert not (folder / "cache").exists()

    def test_impossible_shares_and_too_few_documents(self, folder, tmp_path):
        with pytest.raises(CorpusError, match=r"val_share=0.9"):
            prepare(TextFiles(folder), BYTES, tmp_path / "cache", val_share=0.9, test_share=0.2)
        with pytest.raises(CorpusError, match=r"1 document\(s\)"):
            prepare(TextFiles(folder / "note00.txt"), BYTES, tmp_path / "cache")
        assert folders(tmp_path / "cache") == []

    def test_few_documents(self, folder, tmp_path):
        with pytest.warns(UserWarning, match="moved"):
            corpus = prepare(TextFiles(folder, pattern="note0[138].txt"), BYTES, tmp_path / "cache")
        assert [corpus.split(split).num_documents for split in SPLITS] == [1, 1, 1]
        assert len(corpus.meta["moved_to_fill_a_split"]) == 2


class TestProcesses:
    def test_another_build_finishes_first(self, folder, tmp_path):
        """The inner call stands for another process that overtakes this one at its start."""
        inner: list[Corpus] = []

        def overtake(_: str) -> None:
            if not inner:
                inner.append(prepare(TextFiles(folder), BYTES, tmp_path / "cache", progress=silent))
                os.utime(inner[0].path / "meta.json", ns=(1, 1))

        outer = prepare(TextFiles(folder), BYTES, tmp_path / "cache", progress=overtake)
        assert outer.path == inner[0].path
        assert (outer.path / "meta.json").stat().st_mtime_ns == 1  # the first one stayed
        assert folders(tmp_path / "cache") == [outer.path.name]

    def test_damaged_folder_appears_during_the_build(self, folder, tmp_path):
        expected = prepare(TextFiles(folder), BYTES, tmp_path / "other")

        def leave_ruins(_: str) -> None:
            ruins = tmp_path / "cache" / expected.path.name
            ruins.mkdir(exist_ok=True)
            (ruins / "meta.json").write_text("{}")

        corpus = prepare(TextFiles(folder), BYTES, tmp_path / "cache", progress=leave_ruins)
        assert contents(corpus) == contents(expected)
        assert folders(tmp_path / "cache") == [corpus.path.name]

    PROGRAM = """
import sys, time
from pathlib import Path
from src.datamodules.corpora import TextFiles, TokenizerOptions, prepare

folder, cache, me, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
lines = []

def wait_for_the_others(line):
    lines.append(line)
    if len(lines) == 1:
        (Path(cache).parent / f"began.{me}").touch()
        limit = time.monotonic() + 60
        while len(list(Path(cache).parent.glob("began.*"))) < count and time.monotonic() < limit:
            time.sleep(0.001)

corpus = prepare(TextFiles(folder), TokenizerOptions("bpe", vocab_size=300), cache, progress=wait_for_the_others)
print(corpus.path, len(lines), corpus.split("train").tokens.astype(int).sum())
"""

    @pytest.mark.parametrize("damaged", [False, True])
    def test_processes_that_build_at_once(self, folder, tmp_path, damaged):
        cache = tmp_path / "cache"
        if damaged:
            corpus = prepare(TextFiles(folder), BPE, cache)
            (corpus.path / "val.tokens.npy").write_bytes(b"")
        command = [sys.executable, "-W", "ignore", "-c", self.PROGRAM, str(folder), str(cache)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        running = [
            subprocess.Popen([*command, str(i), "3"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for i in range(3)
        ]
        outputs = [process.communicate(timeout=100) for process in running]
        assert [process.returncode for process in running] == [0, 0, 0], outputs
        assert len({out for out, _ in outputs}) == 1
        path, lines, checksum = outputs[0][0].decode().split()
        assert int(lines) >= 3  # each of them built
        assert folders(cache) == [Path(path).name]
        assert damage(Path(path)) is None
        assert Corpus(path).split("train").tokens.astype(int).sum() == int(checksum)

    def test_killed_build(self, folder, tmp_path):
        program = (
            "import os, sys\n"
            "from src.datamodules.corpora import TextFiles, TokenizerOptions, Tokenizer, prepare\n"
            "Tokenizer.encode_batch = lambda *_: os.kill(os.getpid(), 9)\n"
            "prepare(TextFiles(sys.argv[1]), TokenizerOptions('bytes'), sys.argv[2])"
        )
        cache = tmp_path / "cache"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        run = subprocess.run([sys.executable, "-c", program, str(folder), str(cache)], env=environment, check=False)
        assert run.returncode == -signal.SIGKILL
        (left,) = cache.iterdir()
        assert left.name.startswith(".")
        corpus = prepare(TextFiles(folder), BYTES, cache)
        assert folders(cache) == sorted([left.name, corpus.path.name])  # it may still be at work
        (corpus.path / "meta.json").unlink()
        for path in [*left.iterdir(), left]:
            os.utime(path, (1, 1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepare(TextFiles(folder), BYTES, cache)
        assert folders(cache) == [corpus.path.name]
