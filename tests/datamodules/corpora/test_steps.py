"""What a stranger's tokenizer.json may do to a text: patterns that take too long, and steps that lengthen it, are refused."""

import base64
import json
import time

import pytest
import tokenizers
from tokenizers import models

from src.datamodules.corpora import CorpusError, Tokenizer
from src.datamodules.corpora import steps as steps_module
from src.datamodules.corpora.patterns import MOST_LOOKS, MOST_WAYS, count_ways

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
TOO_LONG = {
    "large repetitions": r"[\s\S]{0,2000}[\s\S]{0,2000}(?=a)(?=b)",
    "middling repetitions": r".{0,50}.{0,50}b",
    "many options": "a?" * 30 + "b",
    "a repetition in a repetition": "(a+)+$",
    "an option in a repetition": "(?:a?){30}b",
    "alternatives in a repetition": r"(?:\w|\s|.)*(?=a)",
    "repetitions of repetitions": "a{0,40}{0,40}b",
    "a fixed one of a fixed one": "((.{30}){30}){30}",
    "all of the text, given back": r"[\s\S]*(?=a)(?=b)",
    "reluctantly": r"[\s\S]+?x",
    "in brackets": r"(?:[\s\S]+)b",
    "a class of everything": r"[\s\p{L}\p{P}]*(?!)",
    "a dot that flags make wide": r"(?m).*x",
    "looking ahead": r"(?![\s\S]*x)a",
    "letters thrice": r"\p{L}*\p{L}*\p{L}*1",
    "letters twice": r"\p{L}*\p{L}*1",
    "letters twice, in brackets": r"(?:\p{L}*\p{L}*|a)1",
    "letters twice, the second in brackets": r"\p{L}*(?:\p{L}*1)",
    "letters twice, and a condition": r"\p{L}+\p{L}+(?!a)",
    "all of a text in another script": r"[\p{Cyrillic}\s.]*\b\B",
    "all of a table of numbers": r"[\s\d]*\b\B",
    "punctuation and line ends": r"[\p{P}\p{N}\n]+x",
    "a class that is no blank, and one": r"(?:\p{Greek}\s)*x",
    "what is no letter": r"[^\p{L}]*x",
    "what is no blank but one": r"[^ \t\r\n]*x",
    "a blank and a backslash": r"[^\\s]*x",
    "many long ways": r".{0,20}.{0,20}[\s\S]{1000}x",
    "flags in the middle, which reach over what follows": r".{1,24}(?i)a|.{1,24}b",
    "a reference": r"(a)\1*",
    "a name": r"(?<n>a|b\g<n>)",
    "a comment": "(?x)a # )(\n",
    "deep": "(" * 5000 + ")" * 5000,
    "absence": "(?~a)",
    "open": "(",
    "closed": ")",
    "an open class": "[a",
    "long": "a" * 30_000,
}


@pytest.fixture
def definition() -> dict:
    backend = tokenizers.Tokenizer(models.WordPiece({letter: i for i, letter in enumerate("abx")}, unk_token="a"))
    backend.add_special_tokens(["<s>", "</s>"])
    return json.loads(backend.to_str())


def load(path, definition: dict) -> Tokenizer:
    path.write_text(json.dumps(definition))
    return Tokenizer.load(path)


@pytest.mark.parametrize("name", IN_USE)
def test_patterns_in_use_are_read(tmp_path, definition, name):
    split = {"type": "Split", "pattern": {"Regex": IN_USE[name]}, "behavior": "Isolated", "invert": False}
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split]}
    ways, looks, _ = count_ways(IN_USE[name])
    assert 1 <= ways <= MOST_WAYS / 10
    assert ways <= looks <= MOST_LOOKS / 10
    assert load(tmp_path / "t.json", definition).encode("a b").size


@pytest.mark.parametrize("section", ["normalizer", "pre_tokenizer"])
@pytest.mark.parametrize("name", TOO_LONG)
def test_patterns_that_take_too_long_are_refused(tmp_path, definition, name, section):
    pattern = {"Regex": TOO_LONG[name]}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    definition[section] = {"type": "Replace", "pattern": pattern, "content": ""} if section == "normalizer" else split
    with pytest.raises(CorpusError, match=r"t\.json .*its pattern .* may take too long, or is none: "):
        load(tmp_path / "t.json", definition)


BLANKS_AWAY = {
    "a string": {"type": "Replace", "pattern": {"String": " "}, "content": "_"},
    "a regular expression": {"type": "Replace", "pattern": {"Regex": r"\s"}, "content": ""},
    "bytes": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    "a sign for blanks": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": False},
}


@pytest.mark.parametrize("step", BLANKS_AWAY)
def test_words_are_long_where_a_step_before_has_taken_the_blanks_away(tmp_path, definition, step):
    """A pattern that gives back a word is refused there, and one that does not is none the worse."""
    first = BLANKS_AWAY[step]
    section, steps = ("normalizer", "normalizers") if first["type"] == "Replace" else ("pre_tokenizer", "pretokenizers")
    for pattern, refused in ((r"\S+\s", True), (r"\S+", False)):
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        if section == "normalizer":
            split = {"type": "Replace", "pattern": {"Regex": pattern}, "content": "x"}
        for order in ([first, split], [split, first]):
            definition[section] = {"type": "Sequence", steps: order}
            if refused and order[0] is first:
                with pytest.raises(CorpusError, match=rf"may take too long: {first['type']} before it may leave no"):
                    load(tmp_path / "t.json", definition)
            else:
                assert load(tmp_path / "t.json", definition).encode("a b").size


def test_patterns_are_counted_together(tmp_path, definition):
    split = {"type": "Split", "pattern": {"Regex": "a?b?c?d?e?"}, "behavior": "Isolated", "invert": False}
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split] * 20}
    with pytest.raises(CorpusError, match=r"t\.json .*640 ways to match all of its patterns; at most 500"):
        load(tmp_path / "t.json", definition)


def test_what_patterns_look_at_is_counted_together(tmp_path, definition):
    split = {"type": "Split", "pattern": {"Regex": r"a?b?[\s\S]{1000}"}, "behavior": "Isolated", "invert": False}
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split] * 5}
    with pytest.raises(
        CorpusError, match=r"t\.json .*look at up to 20,040 characters for one of a text; at most 20,000"
    ):
        load(tmp_path / "t.json", definition)


def test_a_pattern_that_is_read_is_fast(tmp_path, definition):
    """The worst that is allowed, on a text of one long line."""
    pattern = {"Regex": r".{0,20}.{0,20}\p{N}+x"}
    definition["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    tokenizer = load(tmp_path / "t.json", definition)
    began = time.perf_counter()
    tokenizer.encode("ab ab " * 5000)
    assert time.perf_counter() - began < 20


def charsmap(text: str) -> str:
    return base64.b64encode((0).to_bytes(4, "little") + text.encode() + b"\0").decode()


PREPEND = {"type": "Prepend", "prepend": "x" * 15}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
REFUSED = {
    "a long beginning": ("normalizer", [{"type": "Prepend", "prepend": "x" * 65}], "Prepend of its normalizer puts 65"),
    "beginnings": ("normalizer", [PREPEND] * 3, "Prepend of its normalizer make a text up to 4096 times"),
    "bytes of bytes": ("pre_tokenizer", [BYTES] * 5, "ByteLevel of its pre_tokenizer make a text up to 1024 times"),
    "a table": (
        "normalizer",
        [{"type": "Precompiled", "precompiled_charsmap": charsmap("x" * 65)}],
        "puts 65 characters",
    ),
    "doubled by a normal form": (
        "normalizer",
        [
            {"type": "Replace", "pattern": {"String": "e"}, "content": "\u00e9"},
            {"type": "NFD"},
            {"type": "Replace", "pattern": {"String": "\u0301"}, "content": "\u00e9"},
            {"type": "NFD"},
        ]
        * 3,
        "NFD of its normalizer make a text up to 1024 times",
    ),
    "doubled by small letters": (
        "normalizer",
        [{"type": "Replace", "pattern": {"String": "i"}, "content": "\u0130"}, {"type": "Lowercase"}] * 11,
        "Lowercase of its normalizer make a text up to 1024 times",
    ),
    "ligatures": (
        "normalizer",
        [{"type": "NFKD"}, {"type": "Prepend", "prepend": "x"}, {"type": "NFKC"}, {"type": "NFC"}],
        "NFKD, Prepend, NFKC, NFC|NFKD, Prepend, NFKC of its normalizer make a text up to 1",
    ),
    "no end": (
        "normalizer",
        [{"type": "Strip", "strip_left": True, "strip_right": True}] * 101,
        "102 steps around its model; at most 100",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_steps_that_lengthen_a_text_are_refused(tmp_path, definition, what):
    section, steps, named = REFUSED[what]
    definition[section] = {"type": "Sequence", "normalizers" if section == "normalizer" else "pretokenizers": steps}
    with pytest.raises(CorpusError, match=rf"t\.json .*{named}"):
        load(tmp_path / "t.json", definition)


def test_the_steps_of_models_in_use_are_read(tmp_path, definition):
    """ALBERT's and XLNet's: the longest that a table of SentencePiece puts in are 18 characters."""
    steps = [
        {"type": "Replace", "pattern": {"String": "``"}, "content": '"'},
        {"type": "NFKD"},
        {"type": "StripAccents"},
    ]
    steps += [{"type": "Lowercase"}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]
    definition["normalizer"] = {"type": "Sequence", "normalizers": steps}
    definition["pre_tokenizer"] = {"type": "Metaspace", "replacement": "x", "prepend_scheme": "always", "split": True}
    assert load(tmp_path / "t.json", definition).encode("A b").size
    steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap("x" * 18)})
    steps_module.check_steps(definition)


def test_steps_of_two_sections_multiply(tmp_path, definition):
    definition["normalizer"] = {"type": "Sequence", "normalizers": [PREPEND, PREPEND]}
    definition["pre_tokenizer"] = BYTES
    with pytest.raises(CorpusError, match=r"t\.json .*ByteLevel of its pre_tokenizer .* 1024 times"):
        load(tmp_path / "t.json", definition)


def test_tokens_that_are_added_count(tmp_path, definition):
    definition["normalizer"] = {"type": "Prepend", "prepend": "x" * 64}
    token = definition["added_tokens"][0] | {"special": False, "normalized": True, "content": "y" * 2**21}
    definition["added_tokens"].append(token | {"id": 5})
    with pytest.raises(CorpusError, match=r"t\.json .*of the tokens that are added; at most 67,108,864"):
        load(tmp_path / "t.json", definition)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("max_input_chars_per_word", 1001, "max_input_chars_per_word=1001: at most 1000"),
        ("continuing_subword_prefix", "#" * 65, "continuing_subword_prefix has 65 characters; at most 64"),
    ],
)
def test_the_words_of_word_piece_are_short(tmp_path, definition, key, value, named):
    definition["model"][key] = value
    with pytest.raises(CorpusError, match=rf"t\.json .*{named}"):
        load(tmp_path / "t.json", definition)
    definition["model"][key] = 1000 if isinstance(value, int) else "#" * 64
    load(tmp_path / "t.json", definition)


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
