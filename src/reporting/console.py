"""Says on the console what long work is at: a line that changes on a terminal, a line now and then everywhere else."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console

EVERY = 5.0  # seconds between two lines where there is no terminal


class Telling:
    """A context that is called with words about what is being done, as often as one likes.

    Args:
        console: where to.
        every: seconds between two lines where the console is no terminal; nothing is said of work that is done before.
    """

    def __init__(self, console: Console | None = None, every: float = EVERY):
        self.console = console or Console(highlight=False, markup=False)
        self.every, self.last = every, time.monotonic()
        self.status = self.console.status("") if self.console.is_terminal else None

    def __enter__(self) -> Telling:
        if self.status:
            self.status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.status:
            self.status.stop()

    def __call__(self, words: str) -> None:
        """Says it, unless something has just been said."""
        now = time.monotonic()
        if now - self.last < (0.1 if self.status else self.every):
            return
        self.last = now
        if self.status:
            self.status.update(words)
        else:
            self.console.print(f"{words} ...", soft_wrap=True)
