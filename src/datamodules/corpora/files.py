"""The files of a source: listed in a fixed order, opened only if they are regular files, fingerprinted by content.

A folder may hold anything: pipes that would block for ever, devices, links in a circle, one file under many names,
names that are not UTF-8. Listing and opening are the two places where all of these are met, and both are here.
"""

import contextlib
import hashlib
import io
import json
import lzma
import os
import stat
import time
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from src.datamodules.corpora.errors import CorpusError

CONTENT_HASH_LIMIT = 256 * 2**20
"""Sources up to this many bytes are fingerprinted by content, larger ones by name, size and modification time."""

_SETTLED_NANOSECONDS = 2 * 10**9
_MOST_DIGESTS = 100_000
_digests: dict[tuple[str | int, ...], str] = {}

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


# What lies here is no file of anybody: settings and secrets of this process, and of the machine. Shared memory is.
_OF_THE_SYSTEM = ("/proc", "/sys", "/dev")
_SHARED_MEMORY = "/dev/shm"


class Entry(NamedTuple):
    """A name found in a folder; `linked` tells that it is a link or was reached through one, `status` its target's."""

    name: str
    path: Path
    status: os.stat_result | None
    linked: bool


@dataclass
class Listing:
    """What a source reads, and what it leaves out.

    Attributes: `files`, (name, path) sorted by name; `linked`, those of them that are links or were reached through
    one; `other`, how many names of each extension are left out; `special`, the names that are neither file nor folder
    or are links into /proc, /sys or /dev; `twins`, further names of files already listed; `hidden`, hidden names.
    """

    files: list[tuple[str, Path]]
    other: Counter[str] = field(default_factory=Counter)
    special: list[str] = field(default_factory=list)
    twins: int = 0
    hidden: int = 0
    linked: list[tuple[str, Path]] = field(default_factory=list)

    def left_out(self) -> str:
        """Return what is left out, in words; an empty text if nothing is."""
        parts = [f"{count} {extension}" for extension, count in self.other.most_common(12)]
        rest = sum(count for _, count in self.other.most_common()[12:])
        parts += [f"{rest} of other kinds"] if rest else []
        parts += [f"{len(self.special)} special file(s)"] if self.special else []
        parts += [f"{self.twins} link(s) to files already listed"] if self.twins else []
        parts += [f"{self.hidden} hidden"] if self.hidden else []
        return ", ".join(parts)


def printable(name: str | Path) -> str:
    """Return `name` as valid Unicode in one line: a file system may hold any bytes, a log and meta.json may not."""
    text = os.fspath(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def walk_files(root: Path, skipped_folders: Collection[str] = ()) -> tuple[list[Entry], int]:
    """Return what lies below `root` and is no folder, and how many hidden names are left out.

    Left out: hidden files, and folders that are hidden or called one of `skipped_folders`, with all that they hold.
    Links to folders are followed after all real folders, and each real folder is entered once: a link to a parent does
    not loop, and a link beside its target does not take its target's place. Folders of the system that a link leads to
    are not entered: their names stand for them.
    """
    if _is_of_the_system(root):
        raise CorpusError(f"folder {printable(root)} lies in {', '.join(_OF_THE_SYSTEM)}: it is nobody's")
    entries: list[Entry] = []
    entered: set[tuple[int, int]] = set()
    hidden = 0
    folders, links = [(root, False)], []  # not os.walk, which calls itself for every level of a deep tree
    while folders or links:
        if not folders:
            links.sort(reverse=True)
            folders.append(links.pop())
        folder, linked = folders.pop()
        if linked and _is_of_the_system(folder):
            entries.append(_entry(folder, root, linked))
            continue
        with _listing(folder) as (status, items):
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            for item in items:
                if item.name.startswith("."):
                    hidden += 1
                elif not item.is_dir():
                    entries.append(_entry(folder / item.name, root, linked))
                elif item.name not in skipped_folders:
                    (links if item.is_symlink() else folders).append((folder / item.name, linked or item.is_symlink()))
    return entries, hidden


@contextlib.contextmanager
def _listing(folder: Path) -> Iterator[tuple[os.stat_result, list[os.DirEntry[str]]]]:
    try:
        with os.scandir(folder) as items:
            yield folder.stat(), list(items)
    except OSError as error:
        raise CorpusError(f"folder {printable(folder)} cannot be read: {error.strerror}") from error


def _entry(path: Path, root: Path, linked: bool) -> Entry:
    try:
        status = path.stat()
    except OSError:
        status = None  # a link to nothing, say: opening it will tell
    return Entry(path.relative_to(root).as_posix(), path, status, linked or path.is_symlink())


def _is_of_the_system(path: Path) -> bool:
    target = os.path.realpath(path)
    return not _lies_in(target, _SHARED_MEMORY) and any(_lies_in(target, folder) for folder in _OF_THE_SYSTEM)


def _lies_in(target: str, folder: str) -> bool:
    return target == folder or target.startswith(folder.rstrip("/") + "/")


def leads_out(path: Path, root: Path) -> bool:
    """Whether a path below `root` stands, through links, for one that is not."""
    return not _lies_in(os.path.realpath(path), os.path.realpath(root))


def single_file(path: Path) -> Entry:
    """Return the entry of a file that is read by itself."""
    return Entry(path.name, path, path.stat(), False)


def unique_files(entries: Iterable[Entry]) -> Listing:
    """Return the regular files among `entries`, each real file under one name, and the special ones.

    Of several names of one file the first in sorted order stays, one that is no link before one that is.
    """
    chosen: dict[tuple[Any, ...], Entry] = {}
    special: list[str] = []
    twins = 0
    for entry in sorted(entries, key=lambda entry: (entry.linked, entry.name)):
        status = entry.status
        regular = status is None or stat.S_ISREG(status.st_mode)
        if not regular or (entry.linked and _is_of_the_system(entry.path)):
            special.append(printable(entry.name))
            continue
        # Some file systems number no files: there, names are all there is.
        known = status is not None and status.st_ino
        key = (status.st_dev, status.st_ino) if status is not None and known else (entry.name,)
        twins += key in chosen
        chosen.setdefault(key, entry)
    files = sorted((entry.name, entry.path) for entry in chosen.values())
    linked = sorted((printable(entry.name), entry.path) for entry in chosen.values() if entry.linked)
    return Listing([(printable(name), path) for name, path in files], special=special, twins=twins, linked=linked)


def kind_of(mode: int) -> str:
    """Return what a file that is not regular is, in words."""
    return next((word for test, word in _KINDS if test(mode)), "a special file")


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file for reading; CorpusError for anything else, which might block for ever or act when opened."""

    def check(mode: int) -> None:
        if not stat.S_ISREG(mode):
            raise CorpusError(f"{printable(path)} is {kind_of(mode)}, not a regular file")

    if _is_of_the_system(path):
        raise CorpusError(f"{printable(path)} lies in {', '.join(_OF_THE_SYSTEM)}: it is no file of anybody's")

    check(os.stat(path).st_mode)
    # A pipe may have taken the file's place since: without O_NONBLOCK, opening it would wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = os.fdopen(os.open(path, flags), "rb")
    try:
        check(os.fstat(file.fileno()).st_mode)
    except CorpusError:
        file.close()
        raise
    return file


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the system says of an unreadable or corrupt file into a CorpusError that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise CorpusError(f"{printable(path)} cannot be read: {error}") from error
    except MemoryError as error:
        raise CorpusError(f"{printable(path)} cannot be read: there is not enough memory for it") from error


def content_digest(path: Path, most: int | None = None) -> str:
    """Return a hash of a file's content; CorpusError if it cannot be read, or has more than `most` bytes.

    A file that this process has hashed before, and that has the same path, inode, size and times, is not read again.
    """
    with reading(path), open_regular(path) as file:
        status = os.fstat(file.fileno())
        if most is not None and status.st_size > most:
            raise CorpusError(f"{printable(path)} is larger than {most} bytes")
        times = (status.st_mtime_ns, status.st_ctime_ns)
        key = (os.fspath(path), status.st_dev, status.st_ino, status.st_size, *times)
        if key not in _digests:
            began = time.time_ns()
            digest = hashlib.file_digest(file, "blake2b").hexdigest()
            # A file written a moment ago may be written again without a change of its times, which are that coarse.
            if began - max(times) < _SETTLED_NANOSECONDS:
                return digest
            if len(_digests) >= _MOST_DIGESTS:
                _digests.clear()
            _digests[key] = digest
        return _digests[key]


def fingerprint_files(files: Iterable[tuple[str, Path]], options: dict[str, Any]) -> str:
    """Hash names and contents of `files` and the `options` to 32 hexadecimal digits.

    The location of the files does not enter, so a moved folder keeps its fingerprint. Above `CONTENT_HASH_LIMIT` bytes
    in total, size and modification time stand for the content: a copy then needs `cp -p` to be recognised.
    """
    entries: list[tuple[str, Path, os.stat_result]] = []
    for name, path in files:
        with reading(path):
            entries.append((name, path, path.stat()))
    by_content = sum(status.st_size for _, _, status in entries) <= CONTENT_HASH_LIMIT
    total = hashlib.blake2b(json.dumps([by_content, options], sort_keys=True).encode(), digest_size=16)
    for name, path, status in entries:
        evidence = content_digest(path) if by_content else f"{status.st_size} {status.st_mtime_ns}"
        total.update(json.dumps([name, evidence]).encode())
    return total.hexdigest()
