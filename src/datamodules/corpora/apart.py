"""Tokenizers of the Hugging Face library, at work in a process of their own (``tokenizer_process.py``).

What a tokenizer.json holds may come from anybody, and what its regular expressions and steps do to a text cannot be told
by looking at them. So they have time in proportion to the text, and a limited memory; one that wants more is an error.
"""

import atexit
import contextlib
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src.datamodules.corpora.errors import CorpusError
from src.datamodules.corpora.tokenizer_process import LENGTHS

PATIENCE = 30.0
"""Seconds of computing that every request may take; a large tokenizer is opened in two or three ..."""
SECONDS_PER_MB = 10.0
"""... and as many more for a million characters, of which the library takes about one."""
MOST_BYTES = 8 << 30
"""Memory of the process. Text is sent in parts of a few million characters, and a token takes some 100 bytes."""
TRAINING_SECONDS_PER_MB = 3.0
"""Of text that a tokenizer is trained on; ordinary text takes a tenth. Words that all differ, and are long, take more."""
MOST_TOKENS_A_BYTE = 2
"""Of a text. One of bytes has one; a normalizer that writes out what is in a character needs a few more."""
MOST_CHARACTERS = 2**22
"""Texts of a request, unless a single one is longer."""


@dataclass(frozen=True)
class Description:
    """What a tokenizer is, in plain values.

    Attributes: `vocabulary` and `own` are token -> id, with and without tokens that were added; `added` are
    (id, token, whether it is a special one); `byte_level` and `byte_fallback` say how bytes are written as tokens.
    """

    vocabulary: dict[str, int]
    own: dict[str, int]
    added: list[tuple[int, str, bool]]
    byte_level: bool
    byte_fallback: bool


class Apart:
    """A tokenizer that works in the other process.

    Args:
        definition: the text of its tokenizer.json.

    Raises CorpusError if the library refuses it, takes too long or wants too much memory, then and in all methods.
    """

    def __init__(self, definition: str) -> None:
        self.name = "the tokeniser"  # in messages
        self._definition = definition
        self._key = hashlib.sha256(definition.encode(errors="surrogatepass")).hexdigest()
        answer, _ = self._open()
        self.description = Description(**answer)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, int64 [tokens], without special tokens."""
        found: list[np.ndarray] = []
        for part in _parts(texts):
            size = sum(map(len, part))
            most = MOST_TOKENS_A_BYTE * sum(len(text.encode(errors="replace")) for text in part) + 65536
            answer, ids = self._ask(f"{self.name} cannot encode the text", size, texts=part, most=most)
            ends = np.cumsum(answer["lengths"])
            found += np.split(np.frombuffer(ids, dtype=np.int32).astype(np.int64), ends[:-1])
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; special tokens vanish."""
        numbers = [int(token) for token in ids]
        return self._ask(f"{self.name} cannot decode its tokens", len(numbers), ids=numbers)[0]["text"]

    def _open(self) -> tuple[dict[str, Any], bytes]:
        request = {"key": self._key, "definition": self._definition}
        return _process().ask(request, "it is refused", len(self._definition))

    def _ask(self, what: str, size: int, **request: Any) -> tuple[dict[str, Any], bytes]:
        answer, data = _process().ask({"key": self._key, **request}, what, size)
        if answer.get("unknown"):  # others have been opened since, or the process is another one
            self._open()
            answer, data = _process().ask({"key": self._key, **request}, what, size)
        return answer, data


def train(texts: Iterable[str], vocab_size: int, special_tokens: list[str], cut: Callable[[], int]) -> tuple[str, int]:
    """Return the definition of byte-level BPE trained on `texts`, and how many tokens it has.

    `cut()` is asked after the last text: after how many bytes words are cut, 0 for none. Raises CorpusError like `Apart`.
    """
    options = {"vocab_size": vocab_size, "special_tokens": special_tokens}

    def more() -> Iterator[dict[str, Any]]:
        for part in _batched(texts):
            yield {"texts": part, "seconds": TRAINING_SECONDS_PER_MB * sum(map(len, part)) / 1e6}
        yield {"texts": [], "seconds": 0.0, "cut": cut()}

    found, _ = _process().ask({"train": options}, "a tokeniser cannot be trained on the texts", 0, more())
    return found["definition"], found["size"]


class _Process:
    """The process, which is started when it is first asked, and again after it has ended."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None

    def ask(
        self, request: dict[str, Any], what: str, size: int, more: Iterable[dict[str, Any]] = ()
    ) -> tuple[dict[str, Any], bytes]:
        """Return an answer and the bytes that come with it; CorpusError, which begins with `what`, if there is none.

        The request is about `size` characters or tokens, which decides how long it may take; `more` follows it.
        """
        seconds = PATIENCE + SECONDS_PER_MB * size / 1e6
        with self._lock:
            running = self._started()
            assert running.stdin is not None
            assert running.stdout is not None
            try:
                for part in itertools.chain([request | {"seconds": seconds}], more):
                    text = json.dumps(part).encode()
                    running.stdin.write(LENGTHS.pack(len(text), 0) + text)
                    running.stdin.flush()
                sizes = LENGTHS.unpack(_exactly(running.stdout, LENGTHS.size))
                answer, data = (_exactly(running.stdout, size) for size in sizes)
            except (OSError, EOFError):
                code = self.end()
                why = (
                    f"the tokenizers library ended with status {code}; did it want more than {MOST_BYTES >> 20:,} MiB?"
                )
                if code == -signal.SIGPROF:
                    why = f"it takes more than {seconds:.0f} s for a text of {size:,} characters"
                    if more:
                        why = f"it takes more than {TRAINING_SECONDS_PER_MB:.0f} s for each MB: many long words that all differ"
                raise CorpusError(f"{what} ({why})") from None
            except BaseException:  # an interrupt: an answer that is read later would be that of another request
                self.end()
                raise
        found = json.loads(answer)
        if "error" in found:
            raise CorpusError(f"{what} ({found['error']})")
        return found, data

    def _started(self) -> subprocess.Popen[bytes]:
        if self._running is None or self._running.poll() is not None:
            script = Path(__file__).with_name("tokenizer_process.py")
            self._running = subprocess.Popen(
                [sys.executable, "-P", str(script), str(MOST_BYTES)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # where the library tells of its panics
            )
        return self._running

    def end(self) -> int | None:
        """End the process, if there is one; return its exit status."""
        running, self._running = self._running, None
        if running is None:
            return None
        for pipe in (running.stdin, running.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # pyright: ignore[reportOptionalMemberAccess]
        try:
            return running.wait(timeout=2)
        except subprocess.TimeoutExpired:
            running.kill()
            return running.wait()


_current = _Process()


def _process() -> _Process:
    global _current  # noqa: PLW0603 - one for each process of ours: a fork must not read its parent's answers
    if _current.owner != os.getpid():
        _current = _Process()
    return _current


@atexit.register
def _end() -> None:
    if _current.owner == os.getpid():
        _current.end()


def _exactly(pipe: Any, size: int) -> bytes:
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= 2**20:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _parts(texts: Sequence[str]) -> list[list[str]]:
    parts: list[list[str]] = []
    size = 0
    for text in texts:
        if not parts or size + len(text) > MOST_CHARACTERS:
            parts.append([])
            size = 0
        parts[-1].append(text)
        size += len(text)
    return parts
