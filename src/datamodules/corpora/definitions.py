"""tokenizer.json files of others: what is checked before the library sees them (in a process apart: ``apart.py``).

An id of four thousand million would make the library, or us, ask for that much memory. Loading reads this one file, all
of whose contents are data.
"""

import json
from pathlib import Path
from typing import Any

from src.datamodules.corpora.apart import Apart
from src.datamodules.corpora.errors import CorpusError
from src.datamodules.corpora.files import open_regular, printable

LARGEST_FILE = 2**28
LARGEST_ID = 2**24
"""A vocabulary has ids below this, and at most four times as many and 65,536 ids as it has tokens."""


def read_definition(path: Path) -> str:
    """Return the text of a tokenizer.json; CorpusError if it cannot be read or is too large to be one."""
    try:
        with open_regular(path) as file:
            data = file.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise CorpusError(f"it is larger than {LARGEST_FILE} bytes")
        return data.decode()
    except (OSError, ValueError) as error:
        raise CorpusError(f"tokenizer {printable(path)} cannot be read: {error}") from error


def parse(definition: str) -> Apart:
    """Return the tokeniser; CorpusError if the definition is none, or has ids beyond all measure."""
    _check(definition)
    return Apart(definition)


def _check(definition: str) -> None:
    try:
        data = json.loads(definition)
    except RecursionError:
        raise CorpusError("JSON nested too deep to be read") from None
    except ValueError as error:
        raise CorpusError(f"it is not JSON ({error})") from None
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise CorpusError("it has no model")
    if data["model"].get("dropout"):
        raise CorpusError("its model has dropout, which makes tokens random: set it to null")
    vocabulary = data["model"].get("vocab")
    if isinstance(vocabulary, dict):
        ids: list[Any] = list(vocabulary.values())
    elif isinstance(vocabulary, list):  # of (token, score): ids are places in the list
        ids = list(range(len(vocabulary)))
    else:
        raise CorpusError("its model has no vocabulary")
    added = data.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise CorpusError("its added_tokens are not a list of tokens")
    check_ids(ids + [token.get("id") for token in added])


def check_ids(ids: list[Any]) -> None:
    """Raise CorpusError unless `ids` are integers that a vocabulary of as many tokens can have."""
    if not ids:
        raise CorpusError("it has no tokens")
    for number in ids:
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise CorpusError(f"{str(number)[:40]} is no token id")
    largest = max(ids)
    if largest >= LARGEST_ID or largest + 1 > 4 * len(ids) + 65536:
        raise CorpusError(f"its largest id is {largest}, but it has {len(ids)} tokens: that is no vocabulary")
