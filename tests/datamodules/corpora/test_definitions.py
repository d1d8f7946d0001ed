"""tokenizer.json files of strangers."""

import contextlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

import src
from src.datamodules.corpora import CorpusError, Tokenizer, TokenizerOptions, definitions

ROOT = Path(src.__file__ or "").parents[1]


class TestForeignDefinitions:
    @pytest.fixture
    def definition(self) -> dict[str, Any]:
        backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
        backend.add_special_tokens(["<s>", "</s>"])
        return json.loads(backend.to_str())

    @staticmethod
    def load(path: Path, definition: object) -> Tokenizer:
        path.write_text(definition if isinstance(definition, str) else json.dumps(definition))
        return Tokenizer.load(path)

    @pytest.mark.parametrize("largest", [2**32 - 1, 2**31, 2**24, 65536 + 17, 2**64, 10**400])
    @pytest.mark.parametrize("place", ["vocab", "added"])
    def test_one_huge_id(self, tmp_path, definition, largest, place, monkeypatch):
        if place == "vocab":
            definition["model"]["vocab"]["b"] = largest
        else:
            definition["added_tokens"][0]["id"] = largest
        monkeypatch.setattr(np, "zeros", lambda *_, **__: pytest.fail("it was to be refused before"))
        with pytest.raises(
            CorpusError, match=r"t\.json .*its largest id is \d+, but it has 4 tokens|t\.json.*not JSON"
        ):
            self.load(tmp_path / "t.json", definition)

    def test_gaps_are_no_fault(self, tmp_path, definition):
        definition["model"]["vocab"]["b"] = 60_000
        assert self.load(tmp_path / "t.json", definition).vocab_size >= 60_001

    @pytest.mark.parametrize("number", [-1, 1.5, "1", None, True, [], 1e400])
    def test_ids_that_are_none(self, tmp_path, definition, number):
        definition["model"]["vocab"]["b"] = number
        with pytest.raises(CorpusError, match=r"t\.json .*is no token id"):
            self.load(tmp_path / "t.json", definition)

    @pytest.mark.parametrize(
        "definition",
        [
            *("", "{", "[]", "null", '"x"', "{}", "[" * 10**5, '{"model":' * 10**5, "1" * 5000, "\0"),
            *('{"model": {}}', '{"model": {"vocab": {}}}', '{"model": {"vocab": 5}}'),
            '{"model": {"vocab": {"a": 0}}, "added_tokens": 5}',
        ],
    )
    def test_what_is_no_tokenizer(self, tmp_path, definition):
        with pytest.raises(CorpusError, match=r"t\.json"):
            self.load(tmp_path / "t.json", definition)

    def test_tokens_are_not_random(self, tmp_path, definition):
        definition["model"]["dropout"] = 0.1
        with pytest.raises(CorpusError, match=r"t\.json .*dropout"):
            self.load(tmp_path / "t.json", definition)

    def test_bytes_without_an_end(self, tmp_path, monkeypatch):
        monkeypatch.setattr(definitions, "LARGEST_FILE", 1000)
        with pytest.raises(CorpusError, match=r"t\.json cannot be read: .*larger than 1000 bytes"):
            self.load(tmp_path / "t.json", " " * 1001)
        os.mkfifo(tmp_path / "pipe.json")
        with pytest.raises(CorpusError, match=r"pipe\.json.*named pipe"):
            Tokenizer.load(tmp_path / "pipe.json")

    @pytest.mark.parametrize("kind", ["~nobody-of-this-name/t.json", "a\0b", "x" * 5000])
    def test_paths_that_cannot_be(self, kind):
        with pytest.raises(CorpusError, match="nor the path"):
            TokenizerOptions(kind)

    def test_nothing_else_is_opened(self, tmp_path, definition):
        """In a process of its own, because a hook stays for ever."""
        definition["model"] |= {"vocab_file": "/etc/passwd", "merges_file": "/etc/passwd"}
        (tmp_path / "t.json").write_text(json.dumps(definition))
        code = (
            "import sys; from src.datamodules.corpora import Tokenizer\n"
            "Tokenizer.of_bytes()\n"
            "seen = []\n"
            "sys.addaudithook(lambda event, args: seen.append((event, str(args[0]) if args else '')))\n"
            "Tokenizer.load(sys.argv[1])\n"
            "bad = ('exec', 'import', 'os.', 'subprocess.', 'socket.', 'pickle.', 'marshal.', 'ctypes.', 'compile')\n"
            "print([e for e in seen if e[0] == 'open' and not e[1].isdigit() or e[0].startswith(bad)])"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "t.json")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == str([("open", str(tmp_path / "t.json"))])

    def test_mutations(self, tmp_path, capfd):
        """Any change of a definition gives a tokeniser or a CorpusError that names the file."""
        numbers = random.Random(0)
        originals = [json.dumps(each) for each in every_kind_of_definition()]
        refused = 0
        for _ in range(400):
            mutated = mutate(numbers.choice(originals), numbers)
            (tmp_path / "t.json").write_bytes(mutated)
            try:
                tokenizer = Tokenizer.load(tmp_path / "t.json")
            except CorpusError as error:
                assert "t.json" in str(error)  # noqa: PT017
                refused += 1
                continue
            assert tokenizer.vocab_size < 2**17
            with contextlib.suppress(CorpusError):
                tokenizer.decode(tokenizer.encode("abc word a <s> é\n" * 3))
        assert 100 < refused < 400
        assert capfd.readouterr().err == ""  # where the library would tell of its panics


def every_kind_of_definition() -> list[dict[str, Any]]:
    """One definition of each of the library's models, with steps of many kinds around it."""
    letters = {letter: i for i, letter in enumerate("abcdefghij")}
    bpe = tokenizers.Tokenizer(
        models.BPE(vocab=letters | {"ab": 10, "abc": 11}, merges=[("a", "b"), ("ab", "c")], byte_fallback=True)
    )
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "_")])  # pyright: ignore
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()  # pyright: ignore
    bpe.enable_truncation(5)
    bpe.enable_padding()
    words = tokenizers.Tokenizer(models.WordLevel(letters | {"word": 10}, unk_token="a"))
    split = pre_tokenizers.Split(tokenizers.Regex("[a-z]{3}"), "isolated")
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), split])  # pyright: ignore
    pieces = tokenizers.Tokenizer(models.WordPiece(letters | {"##a": 10}, unk_token="a"))
    pieces.normalizer, pieces.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()  # pyright: ignore
    pieces.post_processor = processors.TemplateProcessing(single="[A] $A", special_tokens=[("[A]", 1)])  # pyright: ignore
    unigram = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0), ("▁a", -1.5)], 0, True))
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()  # pyright: ignore
    for backend in (bpe, words, pieces, unigram):
        backend.add_special_tokens(["<s>", "</s>"])
    return [json.loads(backend.to_str()) for backend in (bpe, words, pieces, unigram)]


def mutate(definition: str, numbers: random.Random) -> bytes:
    """Replace, remove or add values of a definition, and at times its characters."""
    values = [None, True, -1, 0, 1, 2**24, 2**32 - 1, 2**63, "", "a", "\ud800", "\0", [], {}, [["a", 1.0]], "x" * 999]
    values += [-0.5, "(a+)+$", "[", "Sequence", "ByteLevel", "Unigram", "BPE", 1e308]
    data = json.loads(definition)
    for _ in range(numbers.choice([1, 1, 2])):
        parent = data
        while True:
            key = numbers.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
            inner = parent[key]
            if not isinstance(inner, dict | list) or not inner or numbers.random() < 0.3:
                break
            parent = inner
        if numbers.random() < 0.2:
            del parent[key]
        else:
            parent[key] = numbers.choice(values)
        if not data:
            break
    text = bytearray(json.dumps(data).encode())
    if numbers.random() < 0.2:
        place = numbers.randrange(len(text))
        text[place : place + numbers.choice([0, 1, 9])] = numbers.choices(b'0123456789{}[]"\\,:\xff e-', k=1)
    return bytes(text)
