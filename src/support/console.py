"""What is printed on the console: text of whatever origin as it is, and what long work is at.

On a terminal that is a line that changes, and everywhere else a line now and then.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.table import Table
from rich.text import Text

from src.support.errors import printable

EVERY = 5.0  # seconds between two lines where there is no terminal


def plain_console() -> Console:
    """A console on which brackets and colons mean nothing: names in them may be links, colours or mistakes of rich's markup."""
    return Console(highlight=False, markup=False, emoji=False)


def print_cells(title: str, columns: list[str], rows: list[list[str]], left: int = 1, wrapped: bool = True) -> None:
    """Prints a table whose words may be anybody's.

    Args:
        title: above it.
        columns: their headings.
        rows: a cell for each column.
        left: how many columns, from the first, hold words and stand on the left; the others hold numbers.
        wrapped: whether words may be broken into lines.
    """
    table = Table(title=printable(title), title_justify="left" if left > 1 else "center")
    for i, column in enumerate(columns):
        table.add_column(printable(column), justify="left" if i < left else "right", no_wrap=i < left and not wrapped)
    for row in rows:
        table.add_row(*map(printable, row))
    plain_console().print(table)


class Telling:
    """A context that is called with words about what is being done, as often as one likes.

    Args:
        console: where to.
        every: seconds between two lines where the console is no terminal; nothing is said of work that is done before.
    """

    def __init__(self, console: Console | None = None, every: float = EVERY):
        self.console = console or plain_console()
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
        self.last, words = now, printable(words)
        if self.status:
            self.status.update(Text(words))  # of a string it would read markup, whatever the console does
        else:
            self.console.print(f"{words} ...", soft_wrap=True)


def duration(seconds: float) -> str:
    """Such as 42 s, 12 min, 3.5 h, 2.1 days."""
    for limit, unit, name in ((100, 1, "s"), (100 * 60, 60, "min"), (72 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}" if name != "h" else f"{seconds / unit:.1f} h"
    return f"{seconds / 86_400:.1f} days"
