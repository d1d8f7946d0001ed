"""How a value is written in Hydra's override grammar, and a word on the command line of a shell."""

from __future__ import annotations

import re
import shlex
from functools import lru_cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from src.support.errors import ConfigError


def as_override(value: Any) -> str:
    """A value as Hydra's override grammar writes it, so that composing gives it back: any text, whatever is in it.

    Only ``1e-3`` is written as the number that everybody means by it: YAML 1.1 reads it as text, for want of a point.

    Raises:
        ConfigError: a mapping has a key that the grammar has no way to write.
    """
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        return "[" + ",".join(as_override(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{_as_key(key)}:{as_override(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str) and not _is_plain(value):
        return QuotedString(literal(value), Quote.single).with_quotes()
    return str(value)


def literal(value: Any) -> Any:
    """A value as OmegaConf must be given it to keep it: text that looks like an interpolation is none, and stays as it is."""
    if isinstance(value, str):
        # Backslashes before an interpolation are doubled, and one more says that it is none.
        return re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + r"\${", value)
    if isinstance(value, list | tuple):
        return [literal(item) for item in value]
    return {key: literal(item) for key, item in value.items()} if isinstance(value, dict) else value


def quoted(word: str) -> str:
    """A word as a shell takes it: ``"canon.positions=''"`` is easier to read than what shlex makes of it."""
    return f'"{word}"' if "'" in word and not re.search(r'["$`\\!]', word) else shlex.quote(word)


@lru_cache(maxsize=4096)
def _is_plain(text: str) -> bool:
    """Whether a word needs no quotes: it has nothing special in it, and is read as text and not as a number, true or null."""
    if re.fullmatch(r"[+-]?[0-9]+[eE][+-]?[0-9]+", text):
        return True
    if not re.fullmatch(r"[A-Za-z0-9_./+-]+", text):
        return False
    try:
        read = OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        return False
    return isinstance(read, str) and read == text


@lru_cache(maxsize=4096)
def _as_key(key: Any) -> str:
    """A key of a mapping: the grammar has no quotes there, and backslashes for some characters."""
    written = re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", key) if isinstance(key, str) else as_override(key)
    try:
        if OverridesParser.create().parse_override(f"key={{{written}:1}}").value() == {key: 1}:
            return written
    except HydraException:
        pass
    raise ConfigError(f"{key!r}: such a key cannot be written on a command line")
