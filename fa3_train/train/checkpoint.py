"""Saving and resuming: collective over ranks, atomic, never at the expense of the last good one.

`Checkpointer.save` is the whole procedure in one call. `save_async` splits it so that training goes
on: the state is copied aside at once; the files are written, then synced and hashed, by background
threads; the loop asks `local_done` at each step, and calls `advance` when all ranks are done
(checkpoint_files.py has the layout on disk).

Every rank must see the same folder. Errors are raised on all ranks with the same text, so no rank
is left waiting in a collective.
"""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from fa3_train.train import checkpoint_files as files
from fa3_train.train.checkpoint_files import CheckpointError, Manifest
from fa3_train.train.config import TrainConfig
from fa3_train.train.engines.base import Engine

__all__ = ["CheckpointError", "Checkpointer", "Manifest"]

log = logging.getLogger(__name__)


@dataclass
class _Pending:
    """A background save: first its files are written, then synced and hashed."""

    manifest: Manifest
    future: Future[Any]
    digesting: bool = False


class Checkpointer:
    """Checkpoints of one run in `config.checkpoint_dir()`."""

    def __init__(self, config: TrainConfig, engine: Engine) -> None:
        self.config = config
        self.engine = engine
        self.world = engine.world
        self.directory = Path(config.checkpoint_dir()).absolute()
        self.keep = config.checkpoint.keep
        self._known_good: set[int] = set()
        self._pending: _Pending | None = None
        self._thread: ThreadPoolExecutor | None = None

    # -- writing ---------------------------------------------------------------------------

    def save(self, step: int, progress: dict[str, Any]) -> Path | None:
        """Write the checkpoint of `step` (steps taken so far); its folder, or None when this run
        has written or loaded that one already.

        `progress` must be JSON-able and the same on all ranks. Raises CheckpointError (no space,
        I/O error, folder not shared); earlier checkpoints are untouched then.
        """
        self.finish()
        if step in self._known_good:
            return None
        manifest = self._prepare(step, progress)
        partial = files.partial_path(self.directory, step)
        self._everywhere("writing", lambda: self.engine.save(partial / "state"))
        parts = self._everywhere("syncing", lambda: self._digest(partial))
        return self._commit(manifest, parts)

    def save_async(self, step: int, progress: dict[str, Any]) -> None:
        """Begin a background save. An earlier one still under way is finished first."""
        self.finish()
        if step in self._known_good:
            return
        manifest = self._prepare(step, progress)
        folder = files.partial_path(self.directory, step) / "state"
        futures = self._everywhere_local(lambda: self.engine.save_async(folder))
        self._pending = _Pending(manifest, futures)

    def newest(self) -> Path | None:
        """The newest checkpoint on disk."""
        found = files.complete(self.directory)
        return found[0][1] if found else None

    @property
    def saving(self) -> bool:
        return self._pending is not None

    def local_done(self) -> bool:
        """This rank's part of the current phase of a background save is done (or failed)."""
        return self._pending is not None and self._pending.future.done()

    def advance(self) -> Path | None:
        """All ranks are `local_done`: go to the next phase. The folder when it was the last."""
        pending = self._pending
        assert pending is not None
        partial = files.partial_path(self.directory, pending.manifest.step)
        phase = "syncing" if pending.digesting else "writing"
        try:
            result = self._everywhere(phase, pending.future.result)
        except CheckpointError:
            self._pending = None
            raise
        if not pending.digesting:
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            pending.future = self._thread.submit(self._digest, partial)
            pending.digesting = True
            return None
        self._pending = None
        return self._commit(pending.manifest, result)

    def finish(self) -> Path | None:
        """Complete a background save, if there is one; collective, blocks the host."""
        path = None
        while self._pending is not None:
            path = self.advance()
        return path

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    def _prepare(self, step: int, progress: dict[str, Any]) -> Manifest:
        partial = files.partial_path(self.directory, step)

        def make_folder() -> None:
            if self.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
                (partial / "state").mkdir(parents=True)
                self._check_space(step)

        self._everywhere("preparing", make_folder)
        self._everywhere("preparing", lambda: self._write_rank_file(partial))
        return Manifest(
            step=step,
            engine=self.engine.describe(),
            world_size=self.world.size,
            parameters=self.engine.shapes,
            config=self.config.to_dict(),
            progress=progress,
        )

    def _check_space(self, step: int) -> None:
        needed, free = self.engine.state_bytes(), shutil.disk_usage(self.directory).free
        if needed > free:
            raise CheckpointError(
                f"no space for the checkpoint of step {step}: it needs about "
                f"{needed / 1e6:,.1f} MB and {self.directory} has {free / 1e6:,.1f} MB free"
            )

    def _write_rank_file(self, partial: Path) -> None:
        if not partial.is_dir():
            raise CheckpointError(
                f"{partial} was made by rank 0 and rank {self.world.rank} does not see it: "
                "checkpoint.dir must be on a file system that all ranks share"
            )
        state = {"rng": _rng_state(self.world.device), "engine": self.engine.rank_state()}
        torch.save(state, partial / f"rank_{self.world.rank:05d}.pt")

    def _digest(self, partial: Path) -> dict[str, dict[str, Any]]:
        mine = files.files_under(partial)[self.world.rank :: self.world.size]
        return files.digest_files(partial, mine, self.config.checkpoint.hash)

    def _commit(self, manifest: Manifest, parts: list[dict[str, dict[str, Any]]]) -> Path:
        for part in parts:
            manifest.files |= part

        def rename() -> None:
            if self.world.is_main:
                files.commit(self.directory, manifest)
                files.prune(self.directory, self.keep)

        self._everywhere("committing", rename)
        self._known_good.add(manifest.step)
        return files.step_path(self.directory, manifest.step)

    def _everywhere(self, what: str, action: Callable[[], Any]) -> list[Any]:
        """Run `action` on every rank; its results in rank order, or one error on all of them."""
        result, failure = None, None
        try:
            result = action()
        except (Exception, CheckpointException) as error:  # the other ranks must hear of any
            failure = f"rank {self.world.rank}: {_reason(error)}"
            log.debug("checkpoint: %s failed", what, exc_info=True)
        outcomes = self.world.gather((result, failure))
        failures = [text for _, text in outcomes if text is not None]
        if failures:
            self._give_up(what, failures[0])
        return [value for value, _ in outcomes]

    def _everywhere_local(self, action: Callable[[], Any]) -> Any:
        """As `_everywhere`, for a result that cannot travel; this rank's own is returned."""
        box: list[Any] = []
        self._everywhere("writing", lambda: box.append(action()))
        return box[0]

    def _give_up(self, what: str, failure: str) -> None:
        kept = [path.name for _, path in files.complete(self.directory)]
        if self.world.is_main:
            files.remove_leftovers(self.directory)
        state = f"untouched: {', '.join(kept)}" if kept else "there was no earlier one"
        raise CheckpointError(
            f"checkpoint in {self.directory} failed while {what}: {failure} "
            f"(earlier checkpoints {state})"
        )

    # -- reading ---------------------------------------------------------------------------

    def resume(self) -> Manifest | None:
        """Load what `checkpoint.resume` names; None when there is nothing to resume.

        `auto` takes the newest checkpoint that is complete and intact, passing over torn ones
        with a warning; a path must be intact. Raises CheckpointError for a foreign checkpoint or
        one that this engine and world size cannot load.
        """
        wanted = self.config.checkpoint.resume
        if self.world.is_main:
            files.remove_leftovers(self.directory)
        if wanted == "never":
            return None
        if wanted != "auto":
            path = Path(wanted).absolute()
            manifest, flaw = self._inspect(path)
            if flaw is not None:
                raise CheckpointError(flaw)
            return self._load(path, manifest)
        names = self.world.broadcast([str(path) for _, path in files.complete(self.directory)])
        for name in names:
            manifest, flaw = self._inspect(Path(name))
            if flaw is None:
                return self._load(Path(name), manifest)
            log.warning("passing over a torn checkpoint: %s", flaw)
        if names:
            raise CheckpointError(
                f"none of the {len(names)} checkpoints in {self.directory} is intact; the reasons "
                "are above. Use checkpoint.resume=never to start anew in another checkpoint.dir"
            )
        return None

    def _inspect(self, path: Path) -> tuple[Manifest | None, str | None]:
        """Manifest and the first flaw that any rank found; each rank hashes its share."""
        manifest, flaw = None, None
        try:
            manifest = files.read_manifest(path)
            mine = sorted(manifest.files)[self.world.rank :: self.world.size]
            flaw = files.flaw_of(path, manifest, mine, self.config.checkpoint.hash)
        except CheckpointError as error:
            flaw = str(error)
        flaws = [text for text in self.world.gather(flaw) if text is not None]
        return manifest, flaws[0] if flaws else None

    def _load(self, path: Path, manifest: Manifest | None) -> Manifest:
        assert manifest is not None
        self._check_fits(path, manifest)
        try:
            self.engine.load(path / "state", manifest.world_size)
            if manifest.world_size == self.world.size:
                self._load_rank_file(path)
        except (Exception, CheckpointException) as error:
            raise CheckpointError(f"{path}: cannot be loaded: {_reason(error)}") from error
        if path.parent == self.directory:
            self._known_good.add(manifest.step)
        return manifest

    def _load_rank_file(self, path: Path) -> None:
        file = path / f"rank_{self.world.rank:05d}.pt"
        state = torch.load(file, weights_only=True, map_location="cpu")
        _restore_rng(state["rng"], self.world.device)
        self.engine.load_rank_state(state["engine"])

    def _check_fits(self, path: Path, manifest: Manifest) -> None:
        theirs, ours = manifest.engine, self.engine.describe()
        if theirs.get("engine") != ours["engine"]:
            raise CheckpointError(
                f"{path} was written by engine={theirs.get('engine')}, this run uses "
                f"engine={ours['engine']}: their files differ. Set engine.name accordingly"
            )
        if manifest.parameters != self.engine.shapes:
            raise CheckpointError(
                f"{path} belongs to another model: "
                + _first_difference(manifest.parameters, self.engine.shapes)
            )
        for key in self.engine.bound_to:
            if theirs.get(key) != ours.get(key):
                raise CheckpointError(
                    f"{path} was written with {key}={theirs.get(key)}, this run has "
                    f"{key}={ours.get(key)}"
                )


def _first_difference(theirs: dict[str, list[int]], ours: dict[str, list[int]]) -> str:
    for name in [*ours, *theirs]:
        if theirs.get(name) != ours.get(name):
            return (
                f"parameter {name} has shape {theirs.get(name, 'absent')} there and "
                f"{ours.get(name, 'absent')} here"
            )
    return "parameters come in another order"


def _reason(error: BaseException) -> str:
    """The innermost cause in one line; DCP wraps the errors of all ranks into one."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, wrapped = next(iter(failures.items()))
        inner = wrapped[0] if isinstance(wrapped, tuple) else wrapped
        return f"on rank {rank}: {_reason(inner)}"
    if isinstance(error, CheckpointError):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _rng_state(device: torch.device) -> dict[str, Any]:
    kind, keys, position, has_gauss, cached = cast(tuple[Any, ...], np.random.get_state())
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_rng(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
