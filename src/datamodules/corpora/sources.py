"""Where documents come from: the interpreter's own standard library, or text files of any common kind.

A source yields `Document(name, text)` in the same order each time. Names are POSIX paths relative to the source, with
`:row` appended for formats that hold many documents, so that they are the same on every machine. Texts are valid
Unicode (undecodable bytes and lone surrogates become U+FFFD) with line endings as in the file; blank documents are left
out.
"""

import fnmatch
import platform
import re
import stat
import sysconfig
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from src.datamodules.corpora.errors import CorpusError
from src.datamodules.corpora.files import (
    Listing,
    fingerprint_files,
    kind_of,
    leads_out,
    open_regular,
    printable,
    reading,
    single_file,
    unique_files,
    walk_files,
)
from src.datamodules.corpora.formats import (
    COMPRESSIONS,
    JSON_EXTENSIONS,
    KNOWN_EXTENSIONS,
    PARQUET_EXTENSIONS,
    Row,
    extension_of,
    kind_of_file,
    read_json_lines,
    read_parquet,
    read_plain,
    valid_unicode,
)

LONGEST_PATTERN = 1000


class Document(NamedTuple):
    """One text and the name that identifies it within its source."""

    name: str
    text: str


class Source(ABC):
    """Documents in a fixed order. A subclass lists its files and parses one of them."""

    name: str
    """Short label, a prefix of the cache folder's name."""
    root: Path | None = None
    """Folder that is read as a whole, if there is one: a cache must not lie inside it."""

    def __init__(self) -> None:
        self._issued: set[str] = set()

    @abstractmethod
    def files(self) -> list[tuple[str, Path]]:
        """Return (name, path) of every file, sorted by name. Raises CorpusError if there is none."""

    @abstractmethod
    def parse(self, name: str, path: Path) -> Iterator[Document]:
        """Yield the documents of one file."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the source in plain values, for people who read a cache's meta.json."""

    @abstractmethod
    def finish(self) -> None:
        """Warn of what `parse` had to leave out or repair since `documents` began."""

    def summary(self) -> str:
        """Return one line that says what `files` found and what is left out; empty if there is nothing to say."""
        return ""

    def parsing_options(self) -> dict[str, Any]:
        """Return the options that change how a file is read, in plain values: they enter the fingerprint."""
        return {}

    def documents(self) -> Iterator[Document]:
        """Yield every document that is not blank. Raises CorpusError if a file cannot be read or all are blank."""
        files = self.files()
        found = False
        for name, path in files:
            with reading(path):
                for document in self.parse(name, path):
                    if not document.text or document.text.isspace():
                        continue
                    found = True
                    yield Document(document.name, valid_unicode(document.text))
        self.finish()
        if not found:
            raise CorpusError(
                f"source {self.name!r}: none of its {len(files)} file(s) holds any text; the first is {files[0][1]}"
            )

    def fingerprint(self) -> str:
        """Return a hash of everything that decides the documents: file names and contents, and how they are parsed."""
        return fingerprint_files(self.files(), self.parsing_options())

    def warn_once(self, message: str) -> None:
        """Warn, unless this source has issued the same message before: a build reads its documents several times."""
        if message not in self._issued:
            self._issued.add(message)
            warnings.warn(message, stacklevel=3)


class PythonSource(Source):
    """The standard library of the running interpreter: 10 to 15 MB of Python, at hand wherever this project runs.

    Left out: installed packages; test suites, which distributions package differently; and what the build of one
    machine wrote (`_sysconfigdata*`, `config-*`, `sitecustomize`). Python versions and distributions still differ, and
    so do their fingerprints. Files that are not UTF-8 are skipped with one warning.
    """

    config_name = "python_source"

    name = "python"
    _SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
    _MACHINE_FILES = ("_sysconfigdata*", "sitecustomize.py", "usercustomize.py")

    def __init__(self) -> None:
        super().__init__()
        self._undecodable = 0

    def files(self) -> list[tuple[str, Path]]:
        """Return the library's *.py files; CorpusError if this interpreter keeps them elsewhere, in a zip file say."""
        self._undecodable = 0
        root = Path(sysconfig.get_path("stdlib"))

        def wanted(parts: tuple[str, ...]) -> bool:
            *folders, file = parts
            if any(folder.startswith("config-") for folder in folders):
                return False
            return file.endswith(".py") and not any(fnmatch.fnmatchcase(file, p) for p in self._MACHINE_FILES)

        entries, _ = walk_files(root, self._SKIPPED_FOLDERS)
        found = unique_files(entry for entry in entries if wanted(Path(entry.name).parts)).files
        if not found:
            raise CorpusError(
                f"the standard library at {root} holds no *.py files; use TextFiles with text of your own"
            )
        return found

    def parse(self, name: str, path: Path) -> Iterator[Document]:
        """Yield the file as one document, if it is UTF-8."""
        with open_regular(path) as file:
            data = file.read()
        try:
            yield Document(name, data.decode())
        except UnicodeDecodeError:
            self._undecodable += 1

    def finish(self) -> None:
        """Warn of the files that are not UTF-8."""
        if self._undecodable:
            self.warn_once(f"skipped {self._undecodable} file(s) of the standard library that are not UTF-8")

    def describe(self) -> dict[str, Any]:
        """Return the kind of source and the interpreter's version."""
        return {"kind": "python standard library", "python": platform.python_version()}


class TextFiles(Source):
    """A text file, or every text file in a folder and the folders below it.

    One document per file: plain text (`PLAIN_EXTENSIONS`: .txt, .md, .rst, .tex and code), decoded as UTF-8, or as
    UTF-16 or UTF-32 if it begins with their byte order mark. One document per row: JSON lines (`.jsonl`, `.ndjson`,
    `.json`) and `.parquet`; these are called `file:row`, rows counted from 1. Any but parquet may be compressed
    (`.txt.gz`, `.bz2`, `.xz`, `.zst`). Hidden files and folders (`.git`) are not read, nor is what is no regular file
    (pipes, sockets, devices) or lies, through links, in /proc, /sys or /dev; a file that has several names, through
    links, is read once. Links that lead out of the folder are followed, with a warning that counts them.

    Args:
        path: the file or folder.
        extensions: read only these, such as [".py"]; unknown ones are read as plain text. None: all known ones.
        pattern: read only files whose name or relative path matches this shell pattern, such as "chunk_*".
        text_field: field or column that holds the text; with the default, "content" is read where there is no "text".
        skip_bad: skip lines, rows and plain files that cannot be used, with one warning that counts them, instead of
            stopping there.
        name: label of the cache folder; None: the file's or folder's name.

    Raises CorpusError here if `path` does not exist or is neither file nor folder, and while reading if no file fits, a
    file cannot be read or is no text, a line is not a JSON object, or the text field is missing or holds no text.
    """

    config_name = "text_files"

    def __init__(
        self,
        path: str | Path,
        *,
        extensions: Sequence[str] | None = None,
        pattern: str = "*",
        text_field: str = "text",
        skip_bad: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.path = _existing(path)
        if isinstance(extensions, str) or (extensions is not None and len(extensions) == 0):
            raise CorpusError(f'extensions={extensions!r} is not a list such as [".txt", ".md"]')
        chosen = KNOWN_EXTENSIONS if extensions is None else extensions
        self.extensions = tuple(_without_compression("." + extension.lower().lstrip(".")) for extension in chosen)
        if len(pattern) > LONGEST_PATTERN:  # Python's own reading of one takes time that grows with its square
            raise CorpusError(f"pattern: {len(pattern)} characters; at most {LONGEST_PATTERN}")
        self.pattern = pattern
        self.text_field = text_field
        self.skip_bad = skip_bad
        label = name if name is not None else self.path.resolve().name.split(".")[0]
        self.name = re.sub(r"[^A-Za-z0-9_-]+", "_", label).strip("_")[:100] or "text"
        self.root = self.path if self.path.is_dir() else None
        self._listing = Listing([])
        self._reset()

    def files(self) -> list[tuple[str, Path]]:
        """Return the files that fit; CorpusError, with what is there instead, if none does."""
        self._reset()
        with reading(self.path):
            entries, hidden = walk_files(self.path) if self.path.is_dir() else ([single_file(self.path)], 0)
        # Of a file's names, one that fits: caches of downloads keep content under a hash, and links with real names.
        listing = unique_files(entry for entry in entries if self._fits(entry.name))
        rest = unique_files(entry for entry in entries if not self._fits(entry.name))
        listing.hidden = hidden
        listing.special = sorted([*listing.special, *rest.special])
        listing.other = Counter(kind_of_file(name) for name, _ in rest.files)
        if not listing.files:
            there = Counter(extension_of(entry.name) or "no extension" for entry in entries)
            found = ", ".join(f"{count} x {extension}" for extension, count in there.most_common(10)) or "no files"
            raise CorpusError(
                f"{printable(self.path)} holds nothing to read: extensions read are {' '.join(self.extensions)} (each"
                f" but .parquet also with {' '.join(COMPRESSIONS)}), pattern {self.pattern!r}; found {found}"
                + (f", of which {len(listing.special)} are no regular files" if listing.special else "")
            )
        self._listing = listing
        return listing.files

    def parse(self, name: str, path: Path) -> Iterator[Document]:
        """Yield the file's documents, according to its extension."""
        extension = extension_of(path.name)
        if extension in PARQUET_EXTENSIONS:
            yield from self._usable(name, read_parquet(path, lambda fields: self._field_among(fields, printable(path))))
        elif extension in JSON_EXTENSIONS:
            yield from self._usable(name, read_json_lines(path, self._text_of))
        else:
            text, repaired = read_plain(path)
            self._repaired.note(name, repaired)
            for document in self._usable(name, [Row(1, text)]):
                yield Document(name, document.text)

    def finish(self) -> None:
        """Warn of skipped lines, repaired files, and files that are no files."""
        if self._bad.count:
            self.warn_once(f"skipped {self._bad.count} bad line(s), the first at {self._bad.first}")
        if self._repaired.count:
            self.warn_once(
                f"{self._repaired.count} file(s) are not UTF-8, such as {self._repaired.first}: bytes that cannot be"
                " decoded became U+FFFD"
            )
        if special := self._listing.special:
            self.warn_once(
                f"left out {len(special)} pipes, sockets or devices, such as {special[0]}: not regular files, or links"
                " into /proc, /sys or /dev"
            )
        outside = [name for name, path in self._listing.linked if leads_out(path, self.path)]
        if outside:
            self.warn_once(
                f"{len(outside)} {'links lead' if len(outside) > 1 else 'link leads'} out of the folder, such as"
                f" {outside[0]}: what is there is read as text of this corpus"
            )

    def summary(self) -> str:
        """Return what is read and what is left out, counted by extension."""
        kinds = Counter(extension_of(path.name) or "without extension" for _, path in self._listing.files)
        read = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        left_out = self._listing.left_out()
        return f"reading {read}" + (f"; left out {left_out}" if left_out else "")

    def describe(self) -> dict[str, Any]:
        """Return the kind of source and its options."""
        options = {"extensions": list(self.extensions), "pattern": self.pattern}
        return {"kind": "text files", "path": printable(self.path), **options, **self.parsing_options()}

    def parsing_options(self) -> dict[str, Any]:
        """Return the options that decide how a row becomes a document."""
        return {"text_field": self.text_field, "skip_bad": self.skip_bad}

    def _reset(self) -> None:
        self._bad = _Tally()
        self._repaired = _Tally()

    def _fits(self, name: str) -> bool:
        matches = fnmatch.fnmatchcase(name, self.pattern) or fnmatch.fnmatchcase(name.rsplit("/", 1)[-1], self.pattern)
        return matches and extension_of(name) in self.extensions

    def _usable(self, name: str, rows: Iterable[Row]) -> Iterator[Document]:
        for number, text in rows:
            if not isinstance(text, CorpusError):
                yield Document(f"{name}:{number}", text)
            elif self.skip_bad:
                self._bad.note(str(text))
            else:
                raise CorpusError(f"{text}; skip_bad=True skips such lines")

    def _text_of(self, row: dict[str, Any], place: str) -> str:
        text = row[self._field_among(row, place)]
        if text is None:
            return ""
        if not isinstance(text, str):
            raise CorpusError(f"{place}: field {self.text_field!r} holds {type(text).__name__}, not text")
        return text

    def _field_among(self, fields: Iterable[str], place: str) -> str:
        fields = list(fields)
        for field in (self.text_field, "content") if self.text_field == "text" else (self.text_field,):
            if field in fields:
                return field
        listed = ", ".join(printable(field) for field in fields[:20]) + (" ..." if len(fields) > 20 else "")
        raise CorpusError(f"{place}: no field {self.text_field!r}; text_field can be one of {listed or 'none'}")


class _Tally:
    """Counts what happened, and keeps the first: a list of all could be as long as the corpus."""

    def __init__(self) -> None:
        self.count, self.first = 0, ""

    def note(self, what: str, happened: bool = True) -> None:
        if happened:
            self.first = self.first or what
            self.count += 1


def _existing(path: str | Path) -> Path:
    """Return `path`, which is a file or folder, with `~` expanded; CorpusError if it is anything else."""
    try:
        expanded = Path(path).expanduser()
        mode = expanded.stat().st_mode
    except FileNotFoundError:
        raise CorpusError(f"path={str(path)!r} does not exist (looked for {expanded.absolute()})") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise CorpusError(f"path={str(path)!r} cannot be read: {error}") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise CorpusError(f"path={str(path)!r} is {kind_of(mode)}, neither a file nor a folder: it is not read")
    return expanded


def _without_compression(extension: str) -> str:
    for compression in COMPRESSIONS:
        extension = extension.removesuffix(compression)
    if extension in ("", "."):
        raise CorpusError(
            "extensions: name the kind of text too, as in .txt.gz; compressed files of a kind are read with it"
        )
    return extension
