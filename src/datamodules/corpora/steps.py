"""What the steps of a stranger's tokenizer.json may do to a text: lengthen it a little, and take time that grows with it.

Steps follow each other, so what they do multiplies. Each is counted as by how much it can lengthen a text of one
character, because a text may consist of such, and is cut at the tokens that are added to the vocabulary.
"""

import base64
from collections.abc import Iterator
from typing import Any

from src.datamodules.corpora.errors import CorpusError
from src.datamodules.corpora.patterns import MOST_LOOKS, MOST_WAYS, count_ways

MOST_GROWTH = 8
"""A step that replaces a string puts at most this many times as long a one in its place ..."""
MOST_CONTENT = 64
"""... and one that replaces what a regular expression matches, which may be one character, or puts something in front,
at most so many characters."""
MOST_GROWTH_OF_ALL = 700
"""All steps together lengthen a text at most so many times; ALBERT's count as 648, by NFKD, a table and Metaspace."""
MOST_STEPS = 100
MOST_ADDED_CHARACTERS = 2**26
"""Tokens that are added pass through the normalizer too, all of them when a tokenizer.json is opened."""
LONGEST_WORD_PIECES = 1000
"""Characters of a word that WordPiece takes apart, in time that grows with their square; the library's default is 100."""

_GROWTH = {
    "ByteLevel": 4.0,  # bytes of a character
    "BertNormalizer": 3.0,  # spaces around it
    "Metaspace": 2.0,  # one before it
    "Lowercase": 2.0,  # of U+0130
    "NFC": 3.0,  # of U+FB2D
    "NFD": 4.0,  # of U+1FAF
    "NFKC": 18.0,  # of U+FDFA
    "NFKD": 18.0,
}
_SECTIONS = ("normalizer", "pre_tokenizer", "decoder")


def check_steps(definition: dict[str, Any]) -> None:
    """Check the model and the steps around it.

    Raises:
        CorpusError: some text would take too long, or fill the memory; the message names the step, and the most that can be used.
    """
    _check_model(definition["model"])
    steps = {section: list(_steps(definition.get(section))) for section in _SECTIONS}
    count = sum(map(len, steps.values()))
    if count > MOST_STEPS:
        raise CorpusError(f"it has {count} steps around its model; at most {MOST_STEPS} can be used")
    _check_patterns([pattern for section in _SECTIONS for pattern in _patterns(definition.get(section))])
    _check_words([*steps["normalizer"], *steps["pre_tokenizer"]])
    before = _check_growth("normalizer", steps["normalizer"])
    _check_growth("pre_tokenizer", steps["pre_tokenizer"], before)
    _check_growth("decoder", steps["decoder"])
    added = [token.get("content") for token in definition.get("added_tokens") or []]
    characters = before * sum(len(content) for content in added if isinstance(content, str))
    if characters > MOST_ADDED_CHARACTERS:
        raise CorpusError(
            f"its normalizer makes {characters:,.0f} characters of the tokens that are added; at most {MOST_ADDED_CHARACTERS:,} can be used"
        )


def _check_patterns(patterns: list[str]) -> None:
    ways = looks = 0
    for pattern in patterns:
        own = count_ways(pattern)
        ways, looks = ways + own[0], looks + own[1]
    if ways > MOST_WAYS:
        raise CorpusError(f"there are {ways:,} ways to match all of its patterns; at most {MOST_WAYS:,} are tried")
    if looks > MOST_LOOKS:
        raise CorpusError(
            f"its patterns look at up to {looks:,} characters for one of a text; at most {MOST_LOOKS:,} are looked at"
        )


def _check_words(steps: list[dict[str, Any]]) -> None:
    """Patterns may rely on it that words are short only where no step before them has taken the blanks away."""
    changed = None
    for step in steps:
        pattern = step.get("pattern")
        pattern = pattern.get("Regex") if isinstance(pattern, dict) else None
        if changed and isinstance(pattern, str) and count_ways(pattern)[2]:
            raise CorpusError(
                f"its pattern {pattern[:60]!r} may take too long: {changed} before it may leave no blanks between words, and then nothing"
                " that may fail can follow * or +"
            )
        changed = changed or (step["type"] if _changes_blanks(step) else None)


def _changes_blanks(step: dict[str, Any]) -> bool:
    if step["type"] == "Replace":
        pattern = step.get("pattern")
        string = pattern.get("String") if isinstance(pattern, dict) else pattern
        return not isinstance(string, str) or any(character.isspace() for character in string)
    return step["type"] in ("ByteLevel", "Metaspace", "Precompiled")


def _check_model(model: dict[str, Any]) -> None:
    longest = model.get("max_input_chars_per_word")
    if isinstance(longest, int) and longest > LONGEST_WORD_PIECES:
        raise CorpusError(f"its model's max_input_chars_per_word={longest}: at most {LONGEST_WORD_PIECES} can be used")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if isinstance(model.get(key), str) and len(model[key]) > MOST_CONTENT:
            raise CorpusError(f"its model's {key} has {len(model[key])} characters; at most {MOST_CONTENT} can be used")


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    """All mappings, at any depth, in order."""
    waiting = [node]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, dict):
            yield inner
        if isinstance(inner, dict | list):
            waiting += reversed(list(inner.values()) if isinstance(inner, dict) else inner)


def _steps(section: Any) -> Iterator[dict[str, Any]]:
    return (node for node in _nodes(section) if isinstance(node.get("type"), str))


def _patterns(section: Any) -> Iterator[str]:
    return (node["Regex"] for node in _nodes(section) if isinstance(node.get("Regex"), str))


def _check_growth(section: str, steps: list[dict[str, Any]], before: float = 1.0) -> float:
    """Return how many times as long the steps make a text, those before them counted in."""
    total, names, lowered = before, [], False
    for step in steps:
        growth = max(1.0, _growth(section, step))
        if step["type"] == "Lowercase" and not lowered:
            # A second one may meet what the steps between have put in, the first one what a text holds.
            growth, lowered = 1.0, True
        if growth > 1:
            total *= growth
            names.append(step["type"])
        if total > MOST_GROWTH_OF_ALL:
            raise CorpusError(
                f"{', '.join(dict.fromkeys(names))} of its {section} make a text up to {total:.0f} times as long; at most"
                f" {MOST_GROWTH_OF_ALL} times can be used"
            )
    return total


def _growth(section: str, step: dict[str, Any]) -> float:
    """Return how many times as long a step can make a text; CorpusError if that is beyond measure."""
    kind = step["type"]
    if kind == "Replace":
        return _growth_of_replace(section, step.get("pattern"), step.get("content"))
    if kind == "Prepend":
        length = len(step["prepend"]) if isinstance(step.get("prepend"), str) else 0
        if length > MOST_CONTENT:
            raise CorpusError(
                f"a Prepend of its {section} puts {length} characters in front; at most {MOST_CONTENT} can be used"
            )
        return 1.0 + length
    if kind == "Precompiled":
        return _growth_of_precompiled(section, step.get("precompiled_charsmap"))
    return _GROWTH.get(kind, 1.0) if section != "decoder" else 1.0  # decoders take away what these have added


def _growth_of_replace(section: str, pattern: Any, content: Any) -> float:
    if not isinstance(content, str):
        return 1.0  # which the library refuses
    string = pattern.get("String") if isinstance(pattern, dict) else pattern
    if isinstance(string, str):
        longest, growth = MOST_GROWTH * len(string), len(content) / max(len(string), 1)
    else:
        longest, growth = MOST_CONTENT, float(len(content))
    if len(content) > longest:
        raise CorpusError(
            f"a Replace of its {section} puts {len(content)} characters in the place of {str(string or pattern)[:40]!r};"
            f" at most {longest} can be used"
        )
    return growth


def _growth_of_precompiled(section: str, encoded: Any) -> float:
    """A table of SentencePiece: the size of an index, the index, and the texts that are put in, each with a zero at its end."""
    try:
        table = base64.b64decode(encoded, validate=True)
    except (ValueError, TypeError):
        return 1.0  # which the library refuses
    texts = table[4 + int.from_bytes(table[:4], "little") :]
    longest = max((len(text.decode(errors="replace")) for text in texts.split(b"\0")), default=0)
    if longest > MOST_CONTENT:
        raise CorpusError(
            f"a Precompiled of its {section} puts {longest} characters in the place of others; at most {MOST_CONTENT} can be used"
        )
    return float(longest)
