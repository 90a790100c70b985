"""Folders that are built once per machine, whoever asks first.

A cache entry is a folder whose name carries a digest of everything that went into it.  It is
built in a temporary folder beside it and moved into place with one rename, so that a reader sees
all of it or nothing, also after a kill.  A lock file lets the other processes of a node wait for
the one that builds instead of doing the same work.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


def cache_folder(configured: str | None = None) -> Path:
    """`configured`, else $XDG_CACHE_HOME/fa3_train, else ~/.cache/fa3_train."""
    if configured:
        return Path(configured).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fa3_train"


def cached(entry: Path, build: Callable[[Path], None]) -> Path:
    """`entry`, filled by `build(folder)` unless it exists already."""
    if entry.is_dir():
        return entry
    entry.parent.mkdir(parents=True, exist_ok=True)
    with _locked(entry.with_name(entry.name + ".lock")):
        if entry.is_dir():  # somebody built it while we waited
            return entry
        work = Path(tempfile.mkdtemp(prefix=f".{entry.name}-", dir=entry.parent))
        try:
            build(work)
            work.chmod(0o755)  # mkdtemp makes it private
            os.rename(work, entry)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            if not entry.is_dir():  # on a file system without locks another one may have won
                raise
    return entry


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
