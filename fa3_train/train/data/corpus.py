"""Where text comes from: the Python standard library, files, or a Hugging Face data set.

A corpus is a list of files (or rows) that yields documents as strings, and a key that changes with
its content.  The default one is the source and documentation text of the standard library of the
running interpreter: 11 to 13 MB of real text on every machine, with nothing to download.
"""

from __future__ import annotations

import glob
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")
# Up to this many bytes the key covers the content of the files; beyond, their size and time of
# change, because reading a terabyte at every start is no option.
_HASH_CONTENT_BYTES = 256 << 20
_TEST_FOLDERS = {"test", "tests", "idle_test"}  # not shipped by every distribution


class Corpus(Protocol):
    """Documents as text, in a fixed order."""

    name: str

    def key(self) -> str:
        """Hex digest of the content."""
        ...

    def documents(self) -> Iterator[str]: ...


class FileCorpus:
    """Text files (one document each) and .jsonl files (one document a line)."""

    def __init__(self, name: str, files: list[Path], root: Path, text_field: str = "text") -> None:
        self.name = name
        self.files = files
        self.root = root
        self.text_field = text_field

    def key(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        stats = [file.stat() for file in self.files]
        whole = sum(s.st_size for s in stats) <= _HASH_CONTENT_BYTES
        digest.update(f"{self.text_field}\0{whole}".encode())
        for file, stat in zip(self.files, stats, strict=True):
            digest.update(f"\0{file.relative_to(self.root)}\0{stat.st_size}\0".encode())
            if whole:
                digest.update(hashlib.blake2b(file.read_bytes()).digest())
            else:
                digest.update(str(stat.st_mtime_ns).encode())
        return digest.hexdigest()

    def documents(self) -> Iterator[str]:
        for file in self.files:
            if file.suffix == ".jsonl":
                yield from self._lines(file)
            else:
                yield _decode(file.read_bytes(), file)

    def _lines(self, file: Path) -> Iterator[str]:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)[self.text_field]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{file}:{number}: expected a JSON object with the key "
                        f"{self.text_field!r} (data.text_field): {type(error).__name__}: {error}"
                    ) from error
                if not isinstance(text, str):
                    raise ValueError(
                        f"{file}:{number}: {self.text_field!r} must be a string, "
                        f"got {type(text).__name__}"
                    )
                yield text


def _decode(content: bytes, file: Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 text: byte {error.start} is {content[error.start]:#04x}; "
            "convert it, or narrow data.path to the text files"
        ) from error


class StdlibCorpus(FileCorpus):
    """Sources and documentation of the running interpreter's standard library, without tests."""

    def __init__(self) -> None:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [
            file
            for file in sorted(root.rglob("*"))
            if file.suffix in (".py", ".rst", ".txt") and self._wanted(file.relative_to(root))
        ]
        if not files:
            raise ValueError(f"data.kind=stdlib: no .py file under {root}; use data.kind=text")
        super().__init__(f"Python standard library ({root})", files, root)

    @staticmethod
    def _wanted(relative: Path) -> bool:
        folders = relative.parts[:-1]
        installed = any(part in ("site-packages", "dist-packages") for part in folders)
        return not installed and not _TEST_FOLDERS.intersection(folders)

    def documents(self) -> Iterator[str]:
        for file in self.files:
            # A handful of old modules declare another encoding than UTF-8: Latin-1 reads any byte.
            content = file.read_bytes()
            try:
                yield content.decode("utf-8")
            except UnicodeDecodeError:
                yield content.decode("latin-1")


def text_corpus(path: str, text_field: str = "text") -> FileCorpus:
    """The files of a folder (recursively, by suffix), of a glob, or one file.

    Raises ValueError when there is none, with what was looked for.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        files = [f for f in root.rglob("*") if f.is_file() and f.suffix in TEXT_SUFFIXES]
        if not files:
            raise ValueError(
                f"data.path={path!r}: the folder holds no file ending in {', '.join(TEXT_SUFFIXES)}"
                " (a glob such as 'folder/**/*.c' takes any ending)"
            )
        base = root
    else:
        files = [Path(f) for f in glob.glob(str(root), recursive=True) if Path(f).is_file()]
        if not files:
            raise ValueError(f"data.path={path!r}: no such file or folder, and no file matches it")
        base = Path(root.anchor or ".")
        files = [f if f.is_relative_to(base) else f.absolute() for f in files]
    return FileCorpus(f"text files ({path})", sorted(files), base, text_field)


class HuggingFaceCorpus:
    """Rows of a `datasets` data set: the only importer of that package.

    Raises ImportError when `datasets` is not installed, ValueError for a missing column.
    """

    def __init__(self, path: str, config: str | None, split: str, text_field: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                f"data.kind=hf needs the package datasets (pip install datasets): {error}"
            ) from error
        self.name = f"Hugging Face data set {path} [{split}]"
        self.text_field = text_field
        self._rows: Any = datasets.load_dataset(path, config, split=split)
        columns = list(self._rows.column_names)
        if text_field not in columns:
            raise ValueError(
                f"data.text_field={text_field!r} is not a column of {path}: it has "
                f"{', '.join(columns)}"
            )

    def key(self) -> str:
        identity = f"{self.text_field}\0{self._rows._fingerprint}"
        return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()

    def documents(self) -> Iterator[str]:
        for row in self._rows:
            yield row[self.text_field]
