"""Where documents come from: the interpreter's own standard library, or text files of any common kind.

A source yields `Document(name, text)` in the same order each time. Names are POSIX paths relative to the source, with
`:row` appended for formats that hold many documents, so that they are the same on every machine. Texts are valid
Unicode (undecodable bytes and lone surrogates become U+FFFD) with line endings as in the file; blank documents are left
out.
"""

import contextlib
import fnmatch
import gzip
import hashlib
import json
import os
import platform
import re
import sysconfig
import warnings
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from src.datamodules.corpora.errors import CorpusError

CONTENT_HASH_LIMIT = 256 * 2**20
"""Sources up to this many bytes are fingerprinted by content, larger ones by name, size and modification time."""

PLAIN_EXTENSIONS = (
    *(".txt", ".text", ".md", ".rst", ".tex"),
    *(".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".jl", ".lean", ".sh"),
)
JSON_EXTENSIONS = (".jsonl", ".ndjson", ".json")
PARQUET_EXTENSIONS = (".parquet",)
_KNOWN_EXTENSIONS = (*PLAIN_EXTENSIONS, *JSON_EXTENSIONS, *PARQUET_EXTENSIONS)
_LONE_SURROGATES = re.compile("[\ud800-\udfff]")


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

    def parsing_options(self) -> dict[str, Any]:
        """Return the options that change how a file is read, in plain values: they enter the fingerprint."""
        return {}

    def documents(self) -> Iterator[Document]:
        """Yield every document that is not blank. Raises CorpusError if a file cannot be read or all are blank."""
        files = self.files()
        found = False
        for name, path in files:
            with _reading(path):
                for document in self.parse(name, path):
                    if not document.text or document.text.isspace():
                        continue
                    found = True
                    yield Document(document.name, valid_unicode(document.text))
        self.finish()
        if not found:
            raise CorpusError(f"source {self.name!r}: none of its {len(files)} file(s) holds any text")

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

        found = [(name, path) for name, path in walk_files(root, self._SKIPPED_FOLDERS) if wanted(Path(name).parts)]
        if not found:
            raise CorpusError(
                f"the standard library at {root} holds no *.py files; use TextFiles with text of your own"
            )
        return found

    def parse(self, name: str, path: Path) -> Iterator[Document]:
        """Yield the file as one document, if it is UTF-8."""
        try:
            yield Document(name, path.read_bytes().decode())
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

    One document per file: plain text (`PLAIN_EXTENSIONS`), decoded as UTF-8. One document per row: JSON lines
    (`.jsonl`, `.ndjson`, `.json`) and `.parquet`; these are called `file:row`, rows counted from 1. Any but parquet may
    be gzipped (`.txt.gz`). Hidden files and folders (`.git`) are not read.

    Args:
        path: the file or folder.
        extensions: read only these, such as [".py"]; unknown ones are read as plain text. None: all known ones.
        pattern: read only files whose name or relative path matches this shell pattern, such as "chunk_*".
        text_field: field or column that holds the text; with the default, "content" is read where there is no "text".
        skip_bad: skip JSON lines that cannot be used, with one warning that counts them, instead of stopping there.
        name: label of the cache folder; None: the file's or folder's name.

    Raises CorpusError here if `path` does not exist, and while reading if no file fits, a file cannot be read, a line
    is not a JSON object, or the text field is missing or holds no text.
    """

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
        self.path = Path(path).expanduser()
        if not self.path.exists():
            raise CorpusError(f"path={str(path)!r} does not exist (looked for {self.path.absolute()})")
        if isinstance(extensions, str) or (extensions is not None and len(extensions) == 0):
            raise CorpusError(f'extensions={extensions!r} is not a list such as [".txt", ".md"]')
        chosen = _KNOWN_EXTENSIONS if extensions is None else extensions
        self.extensions = tuple("." + extension.lower().lstrip(".").removesuffix(".gz") for extension in chosen)
        self.pattern = pattern
        self.text_field = text_field
        self.skip_bad = skip_bad
        label = name if name is not None else self.path.resolve().name.split(".")[0]
        self.name = re.sub(r"[^A-Za-z0-9_-]+", "_", label).strip("_") or "text"
        self.root = self.path if self.path.is_dir() else None
        self._reset()

    def files(self) -> list[tuple[str, Path]]:
        """Return the files that fit; CorpusError, with what is there instead, if none does."""
        self._reset()
        found = list(walk_files(self.path)) if self.path.is_dir() else [(self.path.name, self.path)]
        fitting = [(name, path) for name, path in found if self._fits(name)]
        if not fitting:
            there = Counter(_extension(name) or "no extension" for name, _ in found)
            listing = ", ".join(f"{count} x {extension}" for extension, count in there.most_common(10)) or "no files"
            raise CorpusError(
                f"{self.path} holds nothing to read: extensions read are {' '.join(self.extensions)} (each also with"
                f" .gz, except .parquet), pattern {self.pattern!r}; found {listing}"
            )
        return fitting

    def parse(self, name: str, path: Path) -> Iterator[Document]:
        """Yield the file's documents, according to its extension."""
        extension = _extension(name)
        if extension in PARQUET_EXTENSIONS:
            yield from self._parse_parquet(name, path)
        elif extension in JSON_EXTENSIONS:
            yield from self._parse_json_lines(name, path)
        else:
            with _open_binary(path) as file:
                data = file.read()
            try:
                yield Document(name, data.decode("utf-8-sig"))
            except UnicodeDecodeError:
                self._repaired.append(name)
                yield Document(name, data.decode("utf-8-sig", "replace"))

    def finish(self) -> None:
        """Warn of skipped lines and repaired files."""
        if self._bad:
            self.warn_once(f"skipped {len(self._bad)} bad line(s), the first at {self._bad[0]}")
        if self._repaired:
            self.warn_once(
                f"{len(self._repaired)} file(s) are not UTF-8, such as {self._repaired[0]}: bytes that cannot be"
                " decoded became U+FFFD"
            )

    def describe(self) -> dict[str, Any]:
        """Return the kind of source and its options."""
        options = {"extensions": list(self.extensions), "pattern": self.pattern}
        return {"kind": "text files", "path": str(self.path), **options, **self.parsing_options()}

    def parsing_options(self) -> dict[str, Any]:
        """Return the options that decide how a row becomes a document."""
        return {"text_field": self.text_field, "skip_bad": self.skip_bad}

    def _reset(self) -> None:
        self._bad: list[str] = []
        self._repaired: list[str] = []

    def _fits(self, name: str) -> bool:
        matches = fnmatch.fnmatchcase(name, self.pattern) or fnmatch.fnmatchcase(name.rsplit("/", 1)[-1], self.pattern)
        return matches and _extension(name) in self.extensions

    def _parse_json_lines(self, name: str, path: Path) -> Iterator[Document]:
        with _open_binary(path) as file:
            for number, line in enumerate(file, start=1):
                if line.isspace():
                    continue
                try:
                    text = self._text_of_line(line, f"{path}:{number}")
                except CorpusError as error:
                    if not self.skip_bad:
                        raise CorpusError(f"{error}; skip_bad=True skips such lines") from None
                    self._bad.append(str(error))
                    continue
                yield Document(f"{name}:{number}", text)

    def _text_of_line(self, line: bytes, place: str) -> str:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CorpusError(f"{place}: not JSON, which should hold one object per line ({error})") from None
        if not isinstance(row, dict):
            raise CorpusError(f"{place}: a JSON {type(row).__name__}, not an object with the field {self.text_field!r}")
        text = row[self._field_among(row, place)]
        if text is None:
            return ""
        if not isinstance(text, str):
            raise CorpusError(f"{place}: field {self.text_field!r} holds {type(text).__name__}, not text")
        return text

    def _parse_parquet(self, name: str, path: Path) -> Iterator[Document]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as file:
                column = self._field_among(file.schema_arrow.names, str(path))
                kind = file.schema_arrow.field(column).type
                values = kind.value_type if pa.types.is_dictionary(kind) else kind
                if not (pa.types.is_string(values) or pa.types.is_large_string(values)):
                    raise CorpusError(f"{path}: column {column!r} holds {kind}, not strings")
                row = 0
                for batch in file.iter_batches(batch_size=1024, columns=[column]):
                    for text in batch.column(0).to_pylist():
                        row += 1
                        yield Document(f"{name}:{row}", text or "")
        except pa.ArrowException as error:
            raise CorpusError(f"{path} cannot be read as parquet: {error}") from error

    def _field_among(self, fields: Iterable[str], place: str) -> str:
        fields = list(fields)
        for field in (self.text_field, "content") if self.text_field == "text" else (self.text_field,):
            if field in fields:
                return field
        raise CorpusError(
            f"{place}: no field {self.text_field!r}; text_field can be one of {', '.join(fields) or 'none'}"
        )


def walk_files(root: Path, skipped_folders: Collection[str] = ()) -> Iterator[tuple[str, Path]]:
    """Yield (relative POSIX path, path) of the files below `root`, sorted by relative path.

    Left out: hidden files, and folders that are hidden or called one of `skipped_folders`, with all that they hold.
    Links to folders are followed, each real folder is entered once, so a link to a parent does not loop.
    """
    found: list[tuple[str, Path]] = []
    entered: set[str] = set()

    def fail(error: OSError) -> None:
        raise CorpusError(f"folder {error.filename} cannot be read: {error.strerror}") from error

    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skipped_folders)
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        found.extend((path.relative_to(root).as_posix(), path) for path in paths)
    yield from sorted(found)


def fingerprint_files(files: Iterable[tuple[str, Path]], options: dict[str, Any]) -> str:
    """Hash names and contents of `files` and the `options` to 32 hexadecimal digits.

    The location of the files does not enter, so a moved folder keeps its fingerprint. Above `CONTENT_HASH_LIMIT` bytes
    in total, size and modification time stand for the content: a copy then needs `cp -p` to be recognised.
    """
    entries: list[tuple[str, Path, os.stat_result]] = []
    for name, path in files:
        with _reading(path):
            entries.append((name, path, path.stat()))
    by_content = sum(stat.st_size for _, _, stat in entries) <= CONTENT_HASH_LIMIT
    total = hashlib.blake2b(json.dumps([by_content, options], sort_keys=True).encode(), digest_size=16)
    for name, path, stat in entries:
        if by_content:
            with _reading(path), path.open("rb") as file:
                evidence = hashlib.file_digest(file, "blake2b").hexdigest()
        else:
            evidence = f"{stat.st_size} {stat.st_mtime_ns}"
        total.update(json.dumps([name, evidence]).encode())
    return total.hexdigest()


def valid_unicode(text: str) -> str:
    """Return `text` with lone surrogates, which JSON escapes can smuggle in and UTF-8 cannot hold, as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return _LONE_SURROGATES.sub("\ufffd", text)
    return text


def _extension(name: str) -> str:
    return Path(name.lower().removesuffix(".gz")).suffix


def _open_binary(path: Path) -> IO[bytes]:
    opener: Callable[..., Any] = gzip.open if path.name.lower().endswith(".gz") else open
    return opener(path, "rb")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what the system says of an unreadable or corrupt file into a CorpusError that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"{path} cannot be read: {error}") from error
