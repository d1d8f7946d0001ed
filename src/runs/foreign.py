"""Reads files that somebody else may have written, changed or damaged: the one door for records of runs, configurations and manifests.

Only regular files are opened, up to a size; JSON and YAML are UTF-8 and plain data, of bounded depth, and have the shape that a schema
says, whose numbers are bounded too (``schema.py``). Whatever is wrong ends in an ``Unreadable`` whose message says what, never in another
exception, an endless wait or a full memory.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

MOST_BYTES = 16 << 20  # of a record; real ones have some thousand
MOST_YAML_BYTES = 1 << 20  # YAML takes two hundred times its size while it is read
MOST_EVENTS = 100_000  # of YAML: values, and where lists and mappings begin and end
DEEPEST = 64  # containers in containers; real ones have some five
MOST_ALIASES = 100  # of YAML
LONGEST_NUMBER = 400  # characters; YAML's numbers to the base of sixty take quadratic time
LONGEST_NUMBER_AS_KEY = (
    6  # characters; the hash of a larger one can be chosen, and a mapping of keys with one hash takes quadratic time
)
MOST_TOLD = 3  # mistakes of one file that a message names

Kind = TypeVar("Kind")
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same rules, and ten times as fast with libyaml
# What JSON or YAML in UTF-8 may hold of characters that are no text: escapes, delete, and the second set of control characters.
_SUSPICIOUS = re.compile(rb"\\[^\"/\\n]|\x7f|\xc2[\x80-\x9f]")
_RESOLVER = yaml.resolver.Resolver()
_NUMBERS = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp")}
_NO_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class Unreadable(ValueError):
    """A file is not what it should be; the message says why."""


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a regular file.

    Raises:
        FileNotFoundError: there is none.
        Unreadable: it is a pipe, a folder or the like, too large, or may not be read.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except (OSError, ValueError) as error:
        raise Unreadable(getattr(error, "strerror", None) or str(error)) from error
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise Unreadable("no regular file")
        if about.st_size > most:
            raise Unreadable(f"larger than {most:,} bytes")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(most + 1)[:most]
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from error
    finally:
        os.close(descriptor)


def read_json(path: Path, schema: TypeAdapter[Kind], most: int = MOST_BYTES) -> Kind:
    """A JSON file that has the shape of a schema; names and messages in it are text that a terminal may be given.

    Raises:
        FileNotFoundError: there is none.
        Unreadable: it is something else.
    """
    content = read_bytes(path, most)
    try:
        # Given bytes, json would look for UTF-16 and UTF-32 too, in which the search for suspicious bytes below finds nothing.
        found = json.loads(content.decode("utf-8-sig"))
    except RecursionError:
        raise Unreadable("nested too deep") from None
    except UnicodeDecodeError as error:
        raise Unreadable(f"no JSON in UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise Unreadable(f"no JSON: {clean_text(str(error))[:200]}") from None
    if content.count(b"[") + content.count(b"{") > DEEPEST:
        _check_depth(found)
    return shaped(_clean(found) if _SUSPICIOUS.search(content) else found, schema)


def read_yaml(path: Path, most: int = MOST_YAML_BYTES) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        FileNotFoundError: there is none.
        Unreadable: it is something else.
    """
    content = read_bytes(path, most)
    if not content.strip():
        raise Unreadable("empty")
    try:
        text = content.decode()
        _check_events(text)
        found = yaml.load(text, Loader=_LOADER)
        if _SUSPICIOUS.search(content):
            found = _clean(found)
    except Unreadable:
        raise
    except RecursionError:
        raise Unreadable("nested too deep") from None
    except (yaml.YAMLError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        raise Unreadable(f"no YAML: {clean_text(' '.join(str(error).split()))[:200]}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise Unreadable("no mapping from names to values")
    return found


def shaped(content: Any, schema: TypeAdapter[Kind]) -> Kind:
    """The content, if it has the shape of a schema.

    Raises:
        Unreadable: it has not; the message names the first keys that are wrong.
    """
    try:
        return schema.validate_python(content)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        told = [f"{'.'.join(map(str, p['loc'])) or 'the file'}: {_said(p['msg'])}" for p in problems[:MOST_TOLD]]
        more = f"; and {len(problems) - MOST_TOLD} more" if len(problems) > MOST_TOLD else ""
        raise Unreadable(clean_text("; ".join(told))[:400] + more) from None
    except RecursionError:
        raise Unreadable("nested too deep") from None


def clean_text(text: str) -> str:
    """Text without what would steer a terminal or cannot be written as UTF-8."""
    return _NO_TEXT.sub("\ufffd", text)


def _said(message: str) -> str:
    return message[:1].lower() + message[1:]


def _clean(node: Any, known: dict[int, Any] | None = None) -> Any:
    """The same with clean texts. What YAML's aliases name several times is looked at once: its copies could be millions."""
    known = {} if known is None else known
    if isinstance(node, str):
        return clean_text(node)
    if not isinstance(node, dict | list):
        return node
    if id(node) not in known:
        if isinstance(node, list):
            known[id(node)] = own = []
            own += [_clean(item, known) for item in node]
        else:
            known[id(node)] = own = {}
            own |= {_clean(key, known): _clean(value, known) for key, value in node.items()}
    return known[id(node)]


def _check_depth(node: Any) -> None:
    level = [node]
    for _ in range(DEEPEST + 1):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise Unreadable("nested too deep")


def _check_events(text: str) -> None:
    """Walks through a YAML text without building anything: the parser in C would end the process where nesting is too deep."""
    aliases = 0
    parents: list[bool | None] = []  # of each collection that is open, whether a key comes next; None for a list
    for number, event in enumerate(yaml.parse(text, Loader=_LOADER)):
        if number > MOST_EVENTS:
            raise Unreadable(f"more than {MOST_EVENTS:,} values")
        if isinstance(event, yaml.CollectionEndEvent):
            parents.pop()
            continue
        if not isinstance(event, yaml.NodeEvent):
            continue
        is_key = bool(parents and parents[-1])
        if parents and parents[-1] is not None:
            parents[-1] = not is_key
        if isinstance(event, yaml.AliasEvent):
            aliases += 1
            if aliases > MOST_ALIASES:
                raise Unreadable("too many aliases")
        elif (tag := getattr(event, "tag", None)) is not None:  # it would make a merge key, or a number, of any text
            raise Unreadable(f"tags ({clean_text(tag)[:100]}) are not read")
        elif isinstance(event, yaml.ScalarEvent):
            _check_scalar(event, is_key)
        else:
            if is_key:
                raise Unreadable("a key that is no name")
            parents.append(True if isinstance(event, yaml.MappingStartEvent) else None)
            if len(parents) > DEEPEST:
                raise Unreadable("nested too deep")


def _check_scalar(event: yaml.ScalarEvent, is_key: bool) -> None:
    value: str = event.value
    if not event.implicit[0]:  # in quotes: a text
        return
    if value == "<<":
        raise Unreadable("merge keys (<<) are not read")
    longest = LONGEST_NUMBER_AS_KEY if is_key else LONGEST_NUMBER
    if len(value) > longest and _RESOLVER.resolve(yaml.ScalarNode, value, (True, False)) in _NUMBERS:
        raise Unreadable("a number as a key" if is_key else "a number of too many digits")
