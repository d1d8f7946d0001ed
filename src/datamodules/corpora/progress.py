"""Lines about work that takes long: one every few seconds, also while a library does not return."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

Progress = Callable[[str], None]

_log = logging.getLogger(__name__)
_SHORTEST_WAIT = 0.5


def say(line: str) -> None:
    """Log a line; where nobody has set up logging, as in a script or notebook, write it to stderr."""
    if _log.hasHandlers():
        _log.info(line)
    elif sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more
            print(line, file=sys.stderr, flush=True)


class Heartbeat:
    """Reports what is being done whenever `seconds` have passed without a line.

    `progress` is called from a thread too, because training a tokeniser is one call that may take minutes.
    """

    def __init__(self, progress: Progress, seconds: float) -> None:
        self._progress, self._seconds = progress, seconds
        self._doing: Callable[[], str] | None = None
        self._last = time.monotonic()
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._beat, name="progress of a corpus", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def say(self, line: str, doing: Callable[[], str] | None = None) -> None:
        """Report `line` now, and from now on what `doing` returns whenever it is time for a line."""
        with self._lock:
            self._doing = doing
            self._last = time.monotonic()
        self._progress(line)

    def doing(self, doing: Callable[[], str]) -> None:
        """Report what `doing` returns whenever it is time for a line, and nothing now."""
        with self._lock:
            self._doing = doing

    def _beat(self) -> None:
        while not self._end.wait(max(_SHORTEST_WAIT, self._last + self._seconds - time.monotonic())):
            with self._lock:
                doing = self._doing if time.monotonic() - self._last >= self._seconds else None
                self._last = time.monotonic() if doing else self._last
            if doing is not None:
                with contextlib.suppress(Exception):  # a line that cannot be printed ends no work
                    self._progress(doing())
