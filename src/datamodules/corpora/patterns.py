"""Regular expressions of a stranger's tokenizer.json: only those are used whose work grows with the text, not with its powers.

The library matches by trying, one way after another, at every character of a text, and cannot be interrupted. So what a
pattern may hold is what those of GPT-2, Llama 3, GPT-4o, Qwen and DeepSeek hold, and a little more:

- bounded repetitions and alternatives, as long as there are at most `MOST_WAYS` ways to go through all patterns at one
  character: `[^a]?\\p{N}{1,3}` has 2 times 3; these times the length of what they match are at most `MOST_LOOKS`;
- `*` and `+` of a character or a class, at most `MOST_UNBOUNDED` of them one after another, and two only where nothing
  that may fail follows the second: it would be tried again for all that both can give back. Those of a class that holds
  blanks and anything else, which may match all of a text in some script, only at the very end, where nothing makes them
  give back;
- no repetition of what has repetitions or alternatives in it, unless it is optional (`?`);
- no references back, recursion, conditions, comments, or flags but i, m and s, and these only where a group, or an
  alternative, begins: in the middle of one they would reach over all alternatives that follow.

Anything that cannot be read so is refused.
"""

import functools
import re
from dataclasses import dataclass, replace

import tokenizers
from tokenizers import pre_tokenizers

from src.datamodules.corpora.errors import CorpusError

MOST_WAYS = 500
MOST_LOOKS = 20_000
"""Characters that are looked at to go all ways through all patterns, at one character of a text without long words."""
MOST_UNBOUNDED = 2
LONGEST_REPEAT = 1024
"""Our own tokenisers cut words after 1020 bytes (`tokenizer.LONGEST_WORD`)."""
LONGEST_PATTERN = 20_000

_ATOM = re.compile(
    r"\\[pPxo]\{[^{}]*\}|\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}|\\[^0-9kgQEcCMRXK]|[^\\()\[|*+?]", re.DOTALL
)
_INTERVAL = re.compile(r"\{(\d{0,9})(?:(,)(\d{0,9}))?\}")
_OPENING = re.compile(r"\?(?:[ims]*(?:-[ims]*)?:|<?[=!]|>)|(?!\?)")
_FLAGS = re.compile(r"\(\?[ims]*(?:-[ims]*)?\)")
_ANCHORS = ("^", "$", r"\b", r"\B", r"\A", r"\z", r"\Z", r"\G", r"\y", r"\Y")
_LOOKS = ("?=", "?!", "?<=", "?<!")
# Those of Unicode; the library's \s does not match the separators of ASCII, which Python calls blank.
_BLANKS = "".join(
    character for character in map(chr, range(0x3001)) if character.isspace() and not "\x1c" <= character <= "\x1f"
)
_ONLY_BLANKS = re.compile(
    rf"\\p\{{(?:Z[slp]?|White_Space|Space)\}}|\\[srntfv]|[{_BLANKS}]|\[(?:\\[srntfv]|[{_BLANKS}]|\[:(?:space|blank):\])+\]"
)


@dataclass
class _Part:
    """What matching a part of a pattern can cost."""

    ways: int = 1  # to go through it, unbounded repetitions counted once
    length: int = 0  # of the longest match, likewise
    unbounded: int = 0
    wide: bool = False  # it holds an unbounded repetition of a class of blanks and other characters
    retried: bool = False  # in it, something that may fail follows an unbounded repetition
    sure: bool = True  # it never fails: it also matches nothing
    fixed: bool = True  # it has one way only
    atoms: frozenset[str] = frozenset()  # the characters and classes in it

    @property
    def looks(self) -> int:
        return self.ways * max(self.length, 1)


def count_ways(pattern: str) -> tuple[int, int, bool]:
    """Return how many ways there are through a pattern at one character, and how many characters are looked at on all of them.

    And whether something that may fail follows a `*` or `+` in it: then the time grows with the square of the longest word.

    Raises:
        CorpusError: it can take too long.
    """
    try:
        if len(pattern) > LONGEST_PATTERN:
            raise _Refused(f"it is longer than {LONGEST_PATTERN} characters")
        reader = _Reader(pattern)
        part = reader.alternatives()
        if reader.place < len(pattern):
            raise _Refused("a bracket is closed that was not opened")
        _check_counts(part)
    except (_Refused, RecursionError) as error:
        reason = str(error) if isinstance(error, _Refused) else "it is nested too deep"
        raise CorpusError(f"its pattern {pattern[:60]!r} may take too long, or is none: {reason}") from None
    return part.ways, part.looks, part.retried


def _check_counts(part: _Part) -> None:
    if part.ways > MOST_WAYS:
        raise _Refused(f"there are {part.ways:,} ways to match it; at most {MOST_WAYS:,} are tried")
    if part.looks > MOST_LOOKS:
        raise _Refused(
            f"there are {part.ways:,} ways to match it, and up to {part.length:,} characters are looked at on each; at most"
            f" {MOST_LOOKS:,} are in all"
        )


class _Refused(Exception):
    pass


class _Reader:
    """Reads a pattern once, from left to right."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.place = pattern, 0

    def alternatives(self) -> _Part:
        """Sequences with | between them."""
        parts = [self.sequence()]
        while self.pattern[self.place : self.place + 1] == "|":
            self.place += 1
            parts.append(self.sequence())
        return _Part(
            ways=sum(part.ways for part in parts),
            length=max(part.length for part in parts),
            unbounded=max(part.unbounded for part in parts),
            wide=any(part.wide for part in parts),
            retried=any(part.retried for part in parts),
            sure=any(part.sure for part in parts),
            fixed=len(parts) == 1 and parts[0].fixed,
            atoms=frozenset().union(*(part.atoms for part in parts)),
        )

    def sequence(self) -> _Part:
        """What follows each other."""
        whole = _Part()
        if flags := _FLAGS.match(self.pattern, self.place):
            self.place = flags.end()
        while self.place < len(self.pattern) and self.pattern[self.place] not in "|)":
            part = self.repeated()
            if whole.wide:
                raise _Refused("* or + of what matches blanks and other characters may only stand at the end")
            if (whole.unbounded >= 2 and not part.sure) or (whole.unbounded and part.retried):
                raise _Refused("after two of * and + only what matches nothing too may follow")
            whole = _Part(
                whole.ways * part.ways,
                whole.length + part.length,
                whole.unbounded + part.unbounded,
                part.wide,
                whole.retried or part.retried or (whole.unbounded > 0 and not part.sure),
                whole.sure and part.sure,
                whole.fixed and part.fixed,
                whole.atoms | part.atoms,
            )
            if whole.unbounded > MOST_UNBOUNDED:
                raise _Refused(f"more than {MOST_UNBOUNDED} of * and + follow each other")
            if whole.length > 2 * LONGEST_REPEAT:
                raise _Refused(f"it matches {whole.length:,} characters at once; at most {2 * LONGEST_REPEAT:,}")
            _check_counts(whole)
        return whole

    def repeated(self) -> _Part:
        """A character, class or group, and how often."""
        part = self.one()
        least, most = self.quantifier()
        if (least, most) == (1, 1):
            return part
        if not part.fixed and (most is None or most > 1):
            raise _Refused("what is repeated has repetitions or alternatives in it")
        if most is None:
            if least > LONGEST_REPEAT:
                raise _Refused(f"a repetition of {least}; at most {LONGEST_REPEAT}")
            return _Part(
                length=part.length * max(least, 1),
                unbounded=part.unbounded + 1,
                wide=_is_wide(part.atoms),
                sure=least == 0 or part.sure,
                fixed=False,
                atoms=part.atoms,
            )
        if max(least, most) * max(part.length, 1) > LONGEST_REPEAT:
            raise _Refused(f"a repetition of {most}; of all in it at most {LONGEST_REPEAT}")
        ways = part.ways * max(most - least, 0) + part.ways if least else part.ways * most + 1
        return _Part(
            ways,
            part.length * most,
            part.unbounded,
            part.wide,
            part.retried,
            sure=least == 0 or part.sure,
            fixed=part.fixed and least == most,
            atoms=part.atoms,
        )

    def quantifier(self) -> tuple[int, int | None]:
        """Least and most times; None for any number."""
        found = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(self.pattern[self.place : self.place + 1])
        interval = _INTERVAL.match(self.pattern, self.place)
        if found is not None:
            self.place += 1
        elif interval and (interval[1] or interval[3]):
            self.place = interval.end()
            least = int(interval[1] or 0)
            found = least, (least if not interval[2] else int(interval[3]) if interval[3] else None)
        else:
            return 1, 1
        following = self.pattern[self.place : self.place + 1]
        if following in ("?", "+") and not (interval and found != (0, 1)):
            self.place += 1  # lazy or possessive
            following = self.pattern[self.place : self.place + 1]
        if following in ("*", "+", "?") or _INTERVAL.match(self.pattern, self.place):
            raise _Refused("a repetition of a repetition")
        return found

    def one(self) -> _Part:
        """A character, class or group."""
        character = self.pattern[self.place]
        if character == "[":
            start, self.place = self.place, _end_of_class(self.pattern, self.place)
            return _Part(length=1, sure=False, atoms=frozenset({self.pattern[start : self.place]}))
        if character == "(":
            return self.group()
        found = _ATOM.match(self.pattern, self.place)
        if found is None:
            raise _Refused(f"{self.pattern[self.place : self.place + 3]!r} is not allowed here")
        self.place = found.end()
        if found[0] in _ANCHORS:
            return _Part(sure=False)
        return _Part(length=1, sure=False, atoms=frozenset({found[0]}))

    def group(self) -> _Part:
        """What is in brackets."""
        opening = _OPENING.match(self.pattern, self.place + 1)
        if opening is None:
            raise _Refused(f"{self.pattern[self.place : self.place + 4]!r} is not allowed")
        self.place = opening.end()
        part = self.alternatives()
        if self.pattern[self.place : self.place + 1] != ")":
            raise _Refused("a bracket is not closed")
        self.place += 1
        if part.wide and opening[0] in _LOOKS:
            raise _Refused("looking around for * or + of what matches blanks and other characters")
        return replace(part, sure=False) if opening[0] in _LOOKS else part


def _end_of_class(pattern: str, start: int) -> int:
    """Return where a class in square brackets ends, with those in it."""
    depth, place = 0, start
    while place < len(pattern):
        character = pattern[place]
        if character == "\\":
            place += 1
        elif character == "[":
            depth += 1
            # A bracket that closes right after the opening one, or the ^, is a character of the class.
            place += pattern[place + 1 : place + 2] == "^"
            place += pattern[place + 1 : place + 2] == "]"
        elif character == "]":
            depth -= 1
            if depth == 0:
                return place + 1
        place += 1
    raise _Refused("a class is not closed")


def _is_wide(atoms: frozenset[str]) -> bool:
    """Whether atoms match blanks and other characters, together.

    What other characters a class matches is not asked: there are many scripts, and any of them may be the text's. So of
    those that match a blank, only a few are known to match nothing else.
    """
    return any(map(_matches_blank, atoms)) and not all(map(_ONLY_BLANKS.fullmatch, atoms))


@functools.lru_cache(maxsize=4096)
def _matches_blank(atom: str) -> bool:
    """Whether an atom matches any blank, as the library itself says."""
    try:
        # Flags stand elsewhere in the pattern: a dot may match the end of a line, a letter its other case.
        split = pre_tokenizers.Split(tokenizers.Regex(f"(?im:{atom})"), "removed")
    except Exception as error:  # the binding raises bare Exception
        raise _Refused(f"{atom[:40]!r} cannot be read ({error})") from None
    return any(not split.pre_tokenize_str(character) for character in _BLANKS)
