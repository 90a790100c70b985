"""What a checkpoint is on disk, and how to tell a complete one from anything else.

    <checkpoint dir>/
      step_00000100/          complete: it has this name only after everything in it was synced
        manifest.json         step, engine, world size, config, progress; size and SHA-256 of files
        state/...             the engine's own files (torch DCP, or DeepSpeed's)
        rank_00000.pt         what belongs to one rank: random number generators, FP8 amax histories
      .step_00000200.partial  being written, or left over from a kill; never looked at
      .step_00000050.old      being deleted
      .step_00000100.universal  DeepSpeed's layout for another number of ranks, while one resumes

A kill at any moment leaves either the old set of complete checkpoints or the new one: the folder
is written under its partial name, all files and folders are fsynced, the manifest comes last, and
one rename makes it a checkpoint. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "CheckpointError",
    "Manifest",
    "commit",
    "complete",
    "digest_files",
    "flaw_of",
    "partial_path",
    "prune",
    "read_manifest",
    "remove_leftovers",
    "step_path",
]

FORMAT = 2
MANIFEST = "manifest.json"
_STEP = re.compile(r"step_(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read. Names the path, the reason and the values."""


@dataclass
class Manifest:
    """Contents of manifest.json."""

    step: int  # optimizer steps taken
    engine: dict[str, Any]  # Engine.describe() of the run that wrote it
    world_size: int
    parameters: dict[str, list[int]]  # name -> shape, to recognise another model's checkpoint
    config: dict[str, Any]
    progress: dict[str, Any]  # data position, tokens seen, logger's state
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # path -> bytes, sha256
    format: int = FORMAT


def step_path(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}"


def partial_path(directory: Path, step: int) -> Path:
    return directory / f".step_{step:08d}.partial"


def complete(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything that carries a checkpoint's name, newest first."""
    if not directory.is_dir():
        return []
    found = []
    for path in directory.iterdir():
        match = _STEP.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def read_manifest(path: Path) -> Manifest:
    """Raises CheckpointError when `path` is no checkpoint of this program and version."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    try:
        raw = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        inside = sorted(p.name for p in path.iterdir())[:4]
        raise CheckpointError(
            f"{path}: not a checkpoint of fa3_train: it has no {MANIFEST} (it has {inside})"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST}: unreadable: {error}") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        version = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise CheckpointError(
            f"{path} was written by another version of fa3_train: its format is {version!r}, "
            f"this one reads {FORMAT}"
        )
    try:
        return Manifest(**raw)
    except TypeError as error:
        raise CheckpointError(f"{path / MANIFEST}: {error}") from None


def files_under(folder: Path) -> list[str]:
    """Relative paths of all files but the manifest, sorted."""
    return sorted(
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p.is_file() and p.relative_to(folder) != Path(MANIFEST)
    )


def digest_files(folder: Path, names: Iterable[str], with_hash: bool) -> dict[str, dict[str, Any]]:
    """fsync each file and return its size (bytes) and SHA-256 (None when not wanted)."""
    result = {}
    for name in names:
        with open(folder / name, "rb+") as handle:
            os.fsync(handle.fileno())
            digest = hashlib.file_digest(handle, "sha256").hexdigest() if with_hash else None
            result[name] = {"bytes": os.fstat(handle.fileno()).st_size, "sha256": digest}
    return result


def flaw_of(path: Path, manifest: Manifest, names: Iterable[str], with_hash: bool) -> str | None:
    """What is wrong with those files of a checkpoint, or None."""
    for name in names:
        entry = manifest.files[name]
        try:
            size = (path / name).stat().st_size
        except FileNotFoundError:
            return f"{path}: {name} is missing"
        if size != entry["bytes"]:
            return f"{path}: {name} has {size} bytes, the manifest says {entry['bytes']}"
        if with_hash and entry["sha256"] is not None:
            with open(path / name, "rb") as handle:
                actual = hashlib.file_digest(handle, "sha256").hexdigest()
            if actual != entry["sha256"]:
                return f"{path}: SHA-256 of {name} is {actual[:12]}..., the manifest says " + (
                    f"{entry['sha256'][:12]}..."
                )
    return None


def commit(directory: Path, manifest: Manifest) -> Path:
    """Make the partial folder of `manifest.step` a checkpoint: manifest, fsync, rename."""
    partial, final = partial_path(directory, manifest.step), step_path(directory, manifest.step)
    with open(partial / MANIFEST, "w") as handle:
        json.dump(asdict(manifest), handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())
    for folder in [p for p in partial.rglob("*") if p.is_dir()] + [partial]:
        _sync_folder(folder)
    if final.exists():  # a torn one of the same step that resuming passed over
        _discard(final)
    os.rename(partial, final)
    _sync_folder(directory)
    return final


def prune(directory: Path, keep: int) -> None:
    """Delete all but the newest `keep`. A kill half-way leaves only names that nobody reads."""
    for _, path in complete(directory)[keep:]:
        _discard(path)


def remove_leftovers(directory: Path) -> None:
    """Delete what earlier kills left behind; only one run may use a folder at a time."""
    if directory.is_dir():
        for path in directory.iterdir():
            if path.name.startswith(".step_") and path.suffix in (".partial", ".old", ".universal"):
                shutil.rmtree(path, ignore_errors=True)


def _discard(path: Path) -> None:
    doomed = path.with_name(f".{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems refuse fsync of a folder; their rename is durable by itself.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
