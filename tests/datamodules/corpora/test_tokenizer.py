import hashlib
import json
import os
import pickle
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

import src
from src.datamodules.corpora import CorpusError, Tokenizer, TokenizerOptions
from src.datamodules.corpora import tokenizer as module

ROOT = Path(src.__file__ or "").parents[1]
TRAINING = [f"def function_{i}(self, x):\n    return self.layers[{i}](x)  # naïve 🙂\n" for i in range(200)]
NASTY = [
    "",
    "\0",
    "\0\0a\x01\x7f\x80\xa0\xad",
    "line\r\nline\rline\n\n\n\t  indented   \n",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈",
    "e\u0301 é \u1e9b\u0323 ﬁ Å",
    "\u2028\u2029\ufeff\ufffd\ufffe\uffff\U0010ffff",
    "עברית العربية 日本語 ไทย",
    "<|begin_of_text|>plain<|end_of_text|><|begin_of_text|>",
    " leading and trailing ",
    "▁ ▁▁ Ġ Ċ <0x0A>",
    b"broken \xff\xc3 bytes \xf0\x9f".decode(errors="replace"),
    "x" * 5000,
]


@pytest.fixture(scope="module", params=["bpe", "bytes", "file"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    if request.param == "bytes":
        return Tokenizer.of_bytes()
    trained = Tokenizer.train(TRAINING, 400)
    if request.param == "bpe":
        return trained
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained.save(path)
    return Tokenizer.load(path)


def test_a_decoder_that_fails_is_a_corpus_error():
    """The library panics on it: what it raises is no Exception."""
    definition = json.loads(Tokenizer.of_bytes().definition)
    definition["decoder"] = {"type": "Strip", "content": "e", "start": 2**63, "stop": 2**63}
    tokenizer = Tokenizer(json.dumps(definition), module.BOS, module.EOS)
    with pytest.raises(CorpusError, match="the tokeniser cannot decode its tokens"):
        tokenizer.decode(tokenizer.encode("the tree"))


def check_exact(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert tokenizer.bytes_per_token[ids].sum() == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert not np.isin(ids, [tokenizer.bos_id, tokenizer.eos_id]).any()


class TestExactness:
    @pytest.mark.parametrize("text", NASTY)
    def test_nasty_text(self, tokenizer, text):
        check_exact(tokenizer, text)

    @settings(max_examples=150, deadline=None)
    @given(text=st.text(st.characters(exclude_categories=["Cs"])))
    def test_any_text(self, tokenizer, text):
        check_exact(tokenizer, text)

    def test_special_tokens_stand_for_no_bytes(self, tokenizer):
        assert tokenizer.bytes_per_token.shape == (tokenizer.vocab_size,)
        assert tokenizer.bytes_per_token[[tokenizer.bos_id, tokenizer.eos_id]].tolist() == [0, 0]
        assert np.count_nonzero(tokenizer.bytes_per_token == 0) == 2

    def test_batch_equals_single(self, tokenizer):
        for ids, text in zip(tokenizer.encode_batch(NASTY), NASTY, strict=True):
            assert np.array_equal(ids, tokenizer.encode(text))

    def test_long_texts_are_encoded_in_pieces(self, tokenizer, monkeypatch):
        sizes = []
        encode = tokenizer._backend.encode_batch

        def spy(texts):
            sizes.extend(map(len, texts))
            return encode(texts)

        monkeypatch.setattr(module, "_PIECE_CHARACTERS", 100)
        texts = ["".join(TRAINING), "y" * 250, "", "\n" * 150, "z" * 100]
        with monkeypatch.context() as patched:
            patched.setattr(tokenizer._backend, "encode_batch", spy)
            batch = tokenizer.encode_batch(texts)
        for ids, text in zip(batch, texts, strict=True):
            assert tokenizer.bytes_per_token[ids].sum() == len(text.encode())
            assert tokenizer.decode(ids) == text
        assert not sizes or max(sizes) == 100


def test_pieces_end_with_lines():
    assert list(module._pieces("ab\ncd\nefghijk\nl", 7)) == ["ab\ncd\n", "efghijk", "\nl"]
    assert list(module._pieces("abc", 3)) == ["abc"]
    assert list(module._pieces("", 3)) == [""]


class TestBytes:
    def test_ids_are_the_official_ones(self):
        tokenizer = Tokenizer.of_bytes()
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (258, 256, 257)
        assert tokenizer.encode("aé\0").tolist() == [97, 0xC3, 0xA9, 0]
        assert tokenizer.bytes_per_token.tolist() == [1] * 256 + [0, 0]

    def test_shortcut_equals_hugging_face(self):
        tokenizer = Tokenizer.of_bytes()
        assert tokenizer._ids_are_bytes
        every = [*NASTY, "".join(map(chr, range(0x300)))]
        shortcut = tokenizer.encode_batch(every)
        tokenizer._ids_are_bytes = False
        assert all(np.array_equal(a, b) for a, b in zip(shortcut, tokenizer.encode_batch(every), strict=True))


class TestTraining:
    def test_layout_of_the_vocabulary(self):
        tokenizer = Tokenizer.train(TRAINING, 300)
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (300, 0, 1)
        assert (tokenizer.bytes_per_token[2:258] == 1).all()
        assert (tokenizer.bytes_per_token[258:] > 1).all()
        assert len(tokenizer.encode(TRAINING[0])) < len(TRAINING[0].encode())

    def test_is_deterministic(self):
        code = (
            "import json, sys; from src.datamodules.corpora import Tokenizer\n"
            "print(Tokenizer.train(json.load(sys.stdin), 400).definition.encode().hex())"
        )
        environment = {**os.environ, "PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code]
        texts = json.dumps(TRAINING).encode()
        run = subprocess.run(command, input=texts, env=environment, capture_output=True, check=True)
        assert bytes.fromhex(run.stdout.decode()).decode() == Tokenizer.train(iter(TRAINING), 400).definition

    def test_small_text_warns(self):
        with pytest.warns(UserWarning, match="fewer than vocab_size=5000"):
            tokenizer = Tokenizer.train(["abab"], 5000)
        assert tokenizer.vocab_size < 5000

    def test_too_small_vocabulary(self):
        with pytest.raises(CorpusError, match="vocab_size=257"):
            Tokenizer.train(TRAINING, 257)


class TestTextWithoutSpaces:
    """One word of any length takes training a time that grows with its square: words are cut."""

    DNA = "".join(random.Random(0).choices("ACGT", k=30_000))

    @staticmethod
    def spy_on_training(monkeypatch) -> list[str]:
        fed: list[str] = []
        pieces = module._TrainingText.pieces
        monkeypatch.setattr(
            module._TrainingText, "pieces", lambda *args: (fed.append(piece) or piece for piece in pieces(*args))
        )
        return fed

    @pytest.mark.parametrize(
        "text",
        [
            DNA,
            "日本語" * 3000,
            "🙂" * 2000,
            "é" * 3000,
            " " * 9000 + "\n" * 9000,
            "=" * 5000,
            "1" * 5000 + " a b",
            "aé日🙂" * 999,
        ],
        ids=["dna", "cjk", "emoji", "accents", "blanks", "rule", "digits", "mixed"],
    )
    def test_training_sees_bounded_words(self, monkeypatch, text):
        text = f"Some words, {text} and  more.\n"
        fed = self.spy_on_training(monkeypatch)
        trained = Tokenizer.train([text, "as usual"], 300)
        monkeypatch.undo()
        assert "".join(fed) == text + "as usual"
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        assert max(len(word) for piece in fed for word, _ in words.pre_tokenize_str(piece)) <= module.LONGEST_WORD
        ids = trained.encode(text)
        assert trained.decode(ids) == text
        assert trained.bytes_per_token[ids].sum() == len(text.encode())

    def test_encoding_cuts_in_the_same_places(self, tmp_path):
        trained = Tokenizer.train([self.DNA], 1000)
        cuts = [trained.encode(self.DNA[i : i + 1020]) for i in range(0, len(self.DNA), 1020)]
        assert np.array_equal(trained.encode(self.DNA), np.concatenate(cuts))
        trained.save(tmp_path / "tokenizer.json")
        backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert backend.encode(self.DNA, add_special_tokens=False).ids == trained.encode(self.DNA).tolist()

    def test_ordinary_text_is_tokenised_as_before(self):
        texts = [*TRAINING, "x" * 1020, " " * 1021 + "y", "word " * 5000, "日本" * 170]
        definition = Tokenizer.train(texts, 400).definition
        assert hashlib.blake2b(definition.encode(), digest_size=8).hexdigest() == "1da28b3c42bafabc"
        cut = Tokenizer.train([*texts, "q" * 1021], 400)
        assert '"Split"' in cut.definition
        same = json.loads(definition) | {"pre_tokenizer": json.loads(cut.definition)["pre_tokenizer"]}
        capped = Tokenizer(json.dumps(same), cut.bos, cut.eos)
        plain = Tokenizer(definition, cut.bos, cut.eos)
        for text in [*texts, *NASTY[:-1]]:
            assert np.array_equal(capped.encode(text), plain.encode(text))


class TestExistingTokenizers:
    @staticmethod
    def save(path: Path, special: list[str], vocab: dict[str, int] | None = None) -> Path:
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab or {"a": 0, "b": 1}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
        backend.add_special_tokens(special)
        backend.enable_truncation(3)
        backend.enable_padding()
        backend.save(str(path))
        return path

    @pytest.mark.parametrize(
        ("special", "bos", "eos"),
        [
            (["<s>", "</s>"], "<s>", "</s>"),
            (["<|endoftext|>"], "<|endoftext|>", "<|endoftext|>"),
            (["[CLS]", "[SEP]"], "[CLS]", "[SEP]"),
            (["<|end_of_text|>", "<|begin_of_text|>", "<s>"], "<|begin_of_text|>", "<|end_of_text|>"),
        ],
    )
    def test_usual_names(self, tmp_path, special, bos, eos):
        tokenizer = Tokenizer.load(self.save(tmp_path / "t.json", special))
        assert (tokenizer.bos, tokenizer.eos) == (bos, eos)
        assert tokenizer.bos_id == 2 + special.index(bos)

    def test_given_names(self, tmp_path):
        path = self.save(tmp_path / "t.json", ["<start>", "<stop>", "</s>"])
        tokenizer = Tokenizer.load(path, bos="<start>", eos="<stop>")
        assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 3)
        ordinary = Tokenizer.load(path, bos="a", eos="<stop>")
        assert ordinary.bytes_per_token.tolist() == [0, 1, 0, 0, 0]
        with pytest.raises(CorpusError, match=r"none of the usual names for its BOS.*data\.bos=.*<start> <stop> </s>"):
            Tokenizer.load(path)
        with pytest.raises(CorpusError, match=r"no token '<end>' for its EOS.*data\.eos="):
            Tokenizer.load(path, bos="<start>", eos="<end>")

    def test_truncation_and_padding_are_switched_off(self, tmp_path):
        tokenizer = Tokenizer.load(self.save(tmp_path / "t.json", ["<s>", "</s>"]))
        assert [len(ids) for ids in tokenizer.encode_batch(["ab" * 10, "a"])] == [20, 1]

    def test_sentencepiece_style(self, tmp_path):
        """Llama 2's kind: a mark for spaces, bytes as a last resort; the space put in front counts as a byte."""
        vocab = {"<unk>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4, "é": 5, **{f"<0x{i:02X}>": 6 + i for i in range(256)}}
        merges = [("▁", "a")]
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(steps)  # pyright: ignore
        backend.decoder = decoders.Sequence(  # pyright: ignore
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        backend.add_special_tokens(["<unk>", "<s>", "</s>"])
        backend.save(str(tmp_path / "t.json"))
        tokenizer = Tokenizer.load(tmp_path / "t.json")
        assert tokenizer.bytes_per_token[:8].tolist() == [0, 1, 1, 1, 2, 2, 1, 1]
        text = "ab a é🙂"
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.bytes_per_token[ids].sum() == len(text.encode()) + 1

    def test_unreadable(self, tmp_path):
        with pytest.raises(CorpusError, match="cannot be read"):
            Tokenizer.load(tmp_path / "none.json")
        (tmp_path / "t.json").write_text('{"model": 1}')
        with pytest.raises(CorpusError, match=r"t\.json is not a tokenizer\.json"):
            Tokenizer.load(tmp_path / "t.json")


class TestOptions:
    def test_kinds(self, tmp_path):
        texts = []
        trained = TokenizerOptions("bpe", vocab_size=270).build(lambda: texts.append("used") or TRAINING)
        assert trained.vocab_size == 270
        assert TokenizerOptions("bytes").build(lambda: pytest.fail("bytes need no training")).vocab_size == 258
        trained.save(tmp_path / "tokenizer.json")
        for kind in (str(tmp_path), str(tmp_path / "tokenizer.json")):
            opened = TokenizerOptions(kind).build(lambda: pytest.fail("a file needs no training"))
            assert opened.definition == trained.definition
        assert texts == ["used"]

    def test_identity(self, tmp_path):
        assert TokenizerOptions().identity() == TokenizerOptions("bpe", vocab_size=4096).identity()
        Tokenizer.of_bytes().save(tmp_path / "tokenizer.json")
        before = TokenizerOptions(str(tmp_path)).identity()
        assert before == TokenizerOptions(str(tmp_path / "tokenizer.json")).identity()
        Tokenizer.train(TRAINING, 300).save(tmp_path / "tokenizer.json")
        assert TokenizerOptions(str(tmp_path)).identity() != before

    def test_unknown_kind(self, tmp_path):
        with pytest.raises(CorpusError, match="'unigram' is neither 'bpe' nor 'bytes' nor the path"):
            TokenizerOptions("unigram")
        with pytest.raises(CorpusError, match="nor the path"):
            TokenizerOptions(str(tmp_path))

    def test_ignored_options_warn(self, tmp_path):
        with pytest.warns(UserWarning, match="'bytes' ignores vocab_size=300"):
            TokenizerOptions("bytes", vocab_size=300)
        with pytest.warns(UserWarning, match="'bpe' ignores eos='x'"):
            TokenizerOptions("bpe", eos="x")
        Tokenizer.of_bytes().save(tmp_path / "tokenizer.json")
        with pytest.warns(UserWarning, match="ignores vocab_size=300"):
            TokenizerOptions(str(tmp_path), vocab_size=300)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            TokenizerOptions(str(tmp_path), bos="x", eos="y")

    def test_small_vocabulary(self):
        with pytest.raises(CorpusError, match="vocab_size=100"):
            TokenizerOptions(vocab_size=100)


def test_pickles(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    for text in NASTY:
        assert np.array_equal(copy.encode(text), tokenizer.encode(text))
    assert (copy.bos_id, copy.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_saved_file_opens_with_hugging_face(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert backend.encode(TRAINING[0], add_special_tokens=False).ids == tokenizer.encode(TRAINING[0]).tolist()
    assert backend.token_to_id(tokenizer.eos) == tokenizer.eos_id


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("setting", [None, "true"])
def test_forked_process_can_tokenise(setting):
    """A worker forked after the threads started neither warns nor hangs, nor reads the answers of its parent."""
    code = (
        "import os; from src.datamodules.corpora import Tokenizer\n"
        "texts = ['some words ' * 50] * 200\n"
        "tokenizer = Tokenizer.train(texts, 260)\n"
        "before = len(tokenizer.encode_batch(texts))\n"
        "child = os.fork()\n"
        "number = len(tokenizer.encode_batch(texts[:200 - 7 * (child == 0)]))\n"
        "if child == 0: os._exit(before - number)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), number)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"} | {"PYTHONPATH": str(ROOT)}
    environment |= {"TOKENIZERS_PARALLELISM": setting} if setting else {}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, timeout=60, check=True
    )
    assert run.stderr.decode() == ""
    assert run.stdout.decode().split() == ["7", "200"]
