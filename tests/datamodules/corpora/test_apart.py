"""What a stranger's tokenizer.json may do to a text: one that takes too long, or too much memory, ends in an error."""

import json
import os
import random
import signal
import threading

import numpy as np
import pytest
import tokenizers
from tokenizers import models

from src.datamodules.corpora import CorpusError, TextFiles, Tokenizer, TokenizerOptions, apart, prepare

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
END = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
IN_USE = {
    "GPT-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "Llama 3": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + END,
    "Qwen": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + END,
    "GPT-4o": rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + END,
    "DeepSeek-V3": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    + END,
    "DeepSeek-Coder": r"\s?[A-Za-zµÀ-ÖØ-öø-ƺ]+",
    "BLOOM": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "CLIP": r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    "Kimi": rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^\p{{Han}}]]+{CONTRACTIONS}?|\s+",
    "digits by threes": r"(?=(\d{3})+(?!\d))",
    "ours": ".{1020}",
    "blanks": " {2,}",
    "possessive": r"[^\r\n\p{L}]?+\p{L}++|\s++$",
    "the rest": r"a[\s\S]+",
    "blanks before something": "[ \t\u3000\n]+x|" r"\p{Zs}+x|[[:space:]]+x| +x|\s*x",
    "a word and what follows it": r"\p{Cyrillic}+\p{P}*|[^\s\p{L}]+\s*",
    "flags where an alternative begins": r"(?i)a|(?i)b+",
    "sentences of a script": r"[\p{Cyrillic}\s.]+",
}
HANG = {
    "a repetition in a repetition": (r"(a+)+$", ("a" * 60 + "b ") * 1000),
    "an interval that is repeated": (r"a{0,1}+" * 5 + "b", ("a" * 90 + " b ") * 100),
    "what seems to be in a class": (r"[^\C-[](?:(?:a+a+)+b)]]", ("a" * 60 + " ") * 1000),
    "code points": (r"(?:\x{" + " ".join(["61"] * 1000) + "}){1000}[bc]", ("a" * 100_000 + " ") * 3 + " bc"),
    "all of the text, given back": (r"[\s\S]*(?=a)(?=b)", "ab " * 100_000),
    "letters twice": (r"\p{L}*\p{L}*1", ("a" * 30_000 + " 1") * 3),
}


@pytest.fixture
def definition() -> dict:
    backend = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate("abx")}, []))
    backend.add_special_tokens(["<s>", "</s>"])
    return json.loads(backend.to_str())


@pytest.fixture
def impatient(monkeypatch):
    """Half a second, and little more for a long text."""
    monkeypatch.setattr(apart, "PATIENCE", 0.5)
    monkeypatch.setattr(apart, "SECONDS_PER_MB", 0.5)


def load(path, definition: dict) -> Tokenizer:
    path.write_text(json.dumps(definition))
    return Tokenizer.load(path)


def split_by(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize("name", IN_USE)
def test_patterns_in_use_are_read(tmp_path, definition, name):
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split_by(IN_USE[name])]}
    assert load(tmp_path / "t.json", definition).encode("a b").size


@pytest.mark.parametrize(
    ("name", "section"), [*((name, "pre_tokenizer") for name in HANG), ("letters twice", "normalizer")]
)
def test_patterns_that_take_too_long_end_in_an_error(tmp_path, definition, name, section, impatient):
    pattern, text = HANG[name]
    replace = {"type": "Replace", "pattern": {"Regex": pattern}, "content": ""}
    definition[section] = replace if section == "normalizer" else split_by(pattern)
    tokenizer = load(tmp_path / "t.json", definition)
    with pytest.raises(
        CorpusError,
        match=r"t\.json cannot encode the text .*(it takes more than \d s for a text of [\d,]+ char|retry-limit)",
    ):
        tokenizer.encode(text)
    assert tokenizer.encode("x").size  # another process does it


def test_a_corpus_that_cannot_be_tokenised_names_the_tokeniser(tmp_path, definition, impatient):
    definition["pre_tokenizer"] = split_by("(a+)+$")
    load(tmp_path / "mine.json", definition)
    (tmp_path / "texts").mkdir()
    for i in range(20):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"{i} " + ("a" * 60 + "b ") * 100)
    with pytest.raises(CorpusError, match=r"mine\.json cannot encode the text .it takes more than"):
        prepare(TextFiles(tmp_path / "texts"), TokenizerOptions(str(tmp_path / "mine.json")), tmp_path / "corpora")
    assert not list((tmp_path / "corpora").glob("*/train*"))


def test_one_very_long_token(tmp_path, impatient):
    """A Unigram model follows it from every letter on."""
    vocabulary = [["<unk>", 0.0], ["<s>", -1.0], ["</s>", -1.0], ["a", -1.0], ["a" * 100_000, -50.0]]
    backend = tokenizers.Tokenizer(models.Unigram([tuple(pair) for pair in vocabulary], 0, False))
    backend.add_special_tokens(["<s>", "</s>"])
    tokenizer = load(tmp_path / "t.json", json.loads(backend.to_str()))
    with pytest.raises(CorpusError, match=r"it takes more than [01] s for a text of 200,000 characters"):
        tokenizer.encode("a" * 200_000)


@pytest.mark.parametrize("section", ["normalizer", "added"])
def test_steps_that_multiply_a_text_end_in_an_error(tmp_path, definition, section, monkeypatch):
    """In the normalizer when a text is encoded; tokens that are added pass through it when the file is opened."""
    monkeypatch.setattr(apart, "MOST_BYTES", 1 << 30)
    apart._process().end()
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
    definition["normalizer"] = {"type": "Sequence", "normalizers": [replace] * 5}
    if section == "added":
        token = definition["added_tokens"][0] | {"special": False, "normalized": True, "content": "a" * 100}
        definition["added_tokens"].append(token | {"id": 5})
    with pytest.raises(
        CorpusError, match=r"the tokenizers library ended with status -6; did it want more than 1,024 MiB"
    ):
        load(tmp_path / "t.json", definition).encode("a" * 100)
    apart._process().end()


def test_training_has_a_time_too(monkeypatch):
    """Words that all differ are a symbol for each of their letters."""
    monkeypatch.setattr(apart, "PATIENCE", 0.5)
    monkeypatch.setattr(apart, "TRAINING_SECONDS_PER_MB", 0.3)
    numbers = random.Random(0)
    words = ["".join(numbers.choices("abcdefghij", k=200)) for _ in range(20_000)]
    with pytest.raises(
        CorpusError, match=r"a tokeniser cannot be trained on the texts \(it takes more than \d s for each MB"
    ):
        Tokenizer.train(words, 4000)
    assert Tokenizer.train(["some words", "more words"] * 50, 270).encode("words").size


def test_texts_that_cannot_be_read_end_the_training(definition):
    def texts():
        yield "some words"
        raise CorpusError("t.txt cannot be read")

    with pytest.raises(CorpusError, match=r"t\.txt cannot be read"):
        Tokenizer.train(texts(), 300)
    assert Tokenizer.train(["some words"] * 50, 262).encode("words").size


def test_tokens_without_end_are_refused(tmp_path, definition):
    """Each within the limits of the process, all of them beyond ours."""
    definition["normalizer"] = {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 16}
    tokenizer = load(tmp_path / "t.json", definition)
    assert tokenizer.encode("a" * 100).size == 1600
    with pytest.raises(CorpusError, match=r"it makes more than 265536 tokens of it, out of all proportion"):
        tokenizer.encode("a" * 100_000)


def test_a_file_with_a_hole_is_not_hashed(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CorpusError, match=r"tokenizer\.json is larger than \d+ bytes"):
        TokenizerOptions(str(tmp_path)).identity()


def test_templates_do_not_repeat_a_text(tmp_path, definition):
    text = {"Sequence": {"id": "A", "type_id": 0}}
    pair = [text, {"Sequence": {"id": "B", "type_id": 0}}]
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [text] * 9,
        "pair": pair,
        "special_tokens": {},
    }
    assert len(load(tmp_path / "t.json", definition).encode("a")) == 1


def test_the_process_may_end_at_any_moment(tmp_path, definition):
    """It is started again; nobody hears of it unless it was at work."""
    tokenizer = load(tmp_path / "t.json", definition)
    before = tokenizer.encode("abx")
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV):
        running = apart._process()._running
        assert running is not None
        os.kill(running.pid, number)
        running.wait()
        assert np.array_equal(tokenizer.encode("abx"), before)


def test_many_tokenisers_and_threads_at_once(tmp_path, definition):
    """More than the process keeps; answers are not mixed up."""
    many = []
    for i in range(12):
        definition["model"]["vocab"] = {letter: i + j for j, letter in enumerate("abx")}
        many.append(load(tmp_path / f"{i}.json", definition))
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if many[i].encode("abx").tolist() != [i, i + 1, i + 2] and i < 10:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_answer_that_was_not_waited_for_is_not_the_next_ones(tmp_path, definition, monkeypatch):
    """An interrupt (Ctrl-C in a notebook) leaves it in the pipe."""
    tokenizer = load(tmp_path / "t.json", definition)

    def interrupted(*_: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(apart, "_exactly", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokenizer.encode("a")
    assert len(tokenizer.encode("a b x")) == 3
