"""What the user asked for cannot be, or went wrong: errors whose message is all there is to know."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """The user asked for something that does not exist or cannot be; the message says what would be valid."""


class RunError(RuntimeError):
    """Something that went wrong in a run and of which the message says all there is to know: shown without a traceback."""


def suggest(word: str, known: Iterable[str]) -> str:
    """A clause that names the closest known word, if one is close, and lists all of them."""
    known = sorted(map(str, known))
    if not known:
        return "there are none"
    close = difflib.get_close_matches(word, known, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"There are: {', '.join(known)}"


def printable(text: object) -> str:
    """Text as a terminal and a log may show it, whoever has written it: control characters, new lines too, as Python writes them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))
