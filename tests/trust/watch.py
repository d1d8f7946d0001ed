"""Watches what a piece of code does to the machine: what it starts, what it imports, and what it writes where."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STARTS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "subprocess.Popen",
    "pty.spawn",
)
STARTS += (
    "socket.connect",
    "socket.bind",
    "ctypes.dlopen",
    "webbrowser.open",
    "os.kill",
    "os.putenv",
    "shutil.unpack_archive",
)
CHANGES = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
)
CHANGES += ("shutil.rmtree", "shutil.move", "shutil.copyfile", "os.utime")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_watching: list[tuple[Path, list[str]]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    allowed, seen = _watching[-1]
    if event in STARTS:
        seen.append(f"{event}{arguments[:2]}")
    elif event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING):
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else os.devnull
        elsewhere = not Path(os.path.realpath(path)).is_relative_to(allowed)
        if elsewhere and path != os.devnull and "__pycache__" not in path:
            seen.append(f"{event}({path})")


sys.addaudithook(_hook)  # for as long as the process; silent unless something is watched


class TooSlow(BaseException):
    """A case took longer than anything sensible can."""


def _too_slow(*_: object) -> None:
    raise TooSlow


@contextmanager
def watched(folder: Path, seconds: int = 30) -> Iterator[list[str]]:
    """Whatever is started, or changed outside ``folder``, goes into the list; and it must not take longer than ``seconds``."""
    seen: list[str] = []
    _watching.append((folder.resolve(), seen))
    before = signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(seconds)
    try:
        yield seen
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        _watching.pop()
