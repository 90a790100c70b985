"""Checkpoints: what is saved comes back bit by bit; what is wrong is said, and harms nothing."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import shutil
from collections import namedtuple

import pytest
import torch
from tiny_runs import config, losses, one_thread  # noqa: F401

from fa3_train.train import checkpoint as checkpoint_module
from fa3_train.train import checkpoint_files as files
from fa3_train.train.checkpoint import CheckpointError
from fa3_train.train.engines.torch_engine import TorchEngine
from fa3_train.train.loop import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 6 steps with checkpoints after 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    train(config(folder))
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    """The same run as if it had been killed after step 5, before its third checkpoint."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000006")
    return folder


def steps_of(folder) -> list[int]:
    return [step for step, _ in files.complete(folder / "checkpoints")]


def test_contents(finished):
    assert steps_of(finished) == [6, 4, 2]
    manifest = files.read_manifest(finished / "checkpoints" / "step_00000004")
    assert manifest.step == 4 and manifest.world_size == 1
    assert manifest.progress["data"]["samples"] == 4 * 8
    assert manifest.config["data"]["seq_len"] == 32
    on_disk = set(files.files_under(finished / "checkpoints" / "step_00000004"))
    assert set(manifest.files) == on_disk
    assert {"rank_00000.pt", "state/.metadata"} <= on_disk


def test_resume_is_bitwise(finished, copy):
    before = losses(finished)
    train(config(copy))
    assert losses(copy) == before
    assert steps_of(copy) == [6, 4, 2]


def test_bf16_resume_is_bitwise(tmp_path):
    train(config(tmp_path, "precision=bf16"))
    before = losses(tmp_path)
    for step in (4, 6):
        shutil.rmtree(tmp_path / "checkpoints" / f"step_{step:08d}")
    train(config(tmp_path, "precision=bf16"))
    assert losses(tmp_path) == before


def truncate(path):
    (path / "state" / "__0_0.distcp").write_bytes(b"x")


def flip(path):
    victim = path / "state" / "__0_0.distcp"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)


def lose(path):
    (path / "rank_00000.pt").unlink()


def garble(path):
    (path / "manifest.json").write_text("{")


def empty(path):
    for child in path.iterdir():
        shutil.rmtree(child) if child.is_dir() else child.unlink()


def older_format(path):
    raw = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(raw | {"format": 0}))


TORN = [
    (truncate, "has 1 bytes, the manifest says"),
    (flip, "SHA-256 of state/__0_0.distcp"),
    (lose, "rank_00000.pt is missing"),
    (garble, "manifest.json: unreadable"),
    (empty, "no manifest.json"),
    (older_format, "another version of fa3_train: its format is 0, this one reads 2"),
]


@pytest.mark.parametrize(("damage", "says"), TORN, ids=lambda x: getattr(x, "__name__", ""))
def test_torn_checkpoint(finished, copy, caplog, damage, says):
    newest = copy / "checkpoints" / "step_00000004"
    damage(newest)
    with pytest.raises(CheckpointError, match=says):
        train(config(copy, f"checkpoint.resume={newest}"))
    with caplog.at_level(logging.WARNING):
        train(config(copy))  # auto: takes step 2 and writes step 4 anew
    assert says in caplog.text
    assert losses(copy) == losses(finished)
    assert steps_of(copy) == [6, 4, 2]


def test_all_torn(copy):
    for _, path in files.complete(copy / "checkpoints"):
        truncate(path)
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        train(config(copy))
    assert steps_of(copy) == [4, 2]


def test_leftovers_are_ignored_and_removed(finished, copy):
    folder = copy / "checkpoints"
    shutil.copytree(folder / "step_00000004", folder / ".step_00000006.partial")
    (folder / ".step_00000006.partial" / "manifest.json").unlink()
    os.rename(folder / "step_00000002", folder / ".step_00000002.old")
    train(config(copy))
    assert losses(copy) == losses(finished)
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000004", "step_00000006"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model.ffn_hidden_size=128"], r"belongs to another model: parameter layers\.0\.mlp"),
        (["model.num_layers=1"], "belongs to another model: parameter layers.1"),
        (["data.seq_len=64"], "belongs to another stream: seq_len was 32 and is now 64"),
        (["run.seed=7"], "belongs to another stream: seed was"),
        (["engine=deepspeed"], "written by engine=torch, this run uses engine=deepspeed"),
    ],
)
def test_foreign_checkpoint(copy, words, says):
    before = {path: path.stat().st_mtime_ns for _, path in files.complete(copy / "checkpoints")}
    with pytest.raises(CheckpointError, match=says):
        train(config(copy, *words))
    assert before == {p: p.stat().st_mtime_ns for _, p in files.complete(copy / "checkpoints")}


def test_folder_of_something_else(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"weights")
    with pytest.raises(CheckpointError, match="no manifest.json .it has .*pytorch_model.bin"):
        train(config(tmp_path / "run", f"checkpoint.resume={tmp_path}"))
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        train(config(tmp_path / "run", f"checkpoint.resume={tmp_path / 'absent'}"))


def test_keep(tmp_path):
    train(config(tmp_path, "checkpoint.every=1", "checkpoint.keep=2"))
    assert steps_of(tmp_path) == [6, 5]


def test_never_starts_anew(finished, copy):
    train(config(copy, "checkpoint.resume=never", "run.steps=2", "schedule.warmup_steps=1"))
    assert losses(copy).keys() == {1, 2}


def test_no_space_is_seen_before_writing(copy, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(CheckpointError, match=r"no space .* 0\.0 MB free.*untouched: step"):
        train(config(copy))
    assert steps_of(copy) == [4, 2]


def test_write_failure_midway(copy):
    """A real failing write (the process may not write files of more than 64 kB)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(CheckpointError, match="failed while writing: rank 0: .*untouched"):
            train(config(copy))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert steps_of(copy) == [4, 2]
    assert not list((copy / "checkpoints").glob(".step*"))


def test_disk_full_names_the_cause(copy, monkeypatch):
    def full(self, folder):
        (folder / "half").write_bytes(b"x" * 100)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(TorchEngine, "save", full)
    with pytest.raises(CheckpointError, match="No space left on device.*untouched: step_00000004"):
        train(config(copy))
    assert steps_of(copy) == [4, 2]


def test_background_saves_are_the_same(finished, tmp_path):
    train(config(tmp_path, "checkpoint.async_save=true"))
    assert steps_of(tmp_path) == [6, 4, 2]
    assert losses(tmp_path) == losses(finished)
    for step in (4, 6):
        shutil.rmtree(tmp_path / "checkpoints" / f"step_{step:08d}")
    train(config(tmp_path, "checkpoint.async_save=true"))
    assert losses(tmp_path) == losses(finished)


def test_background_failure_is_raised(copy, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, "digest_files", fail)
    with pytest.raises(CheckpointError, match="while syncing: rank 0: OSError: .*Input/output"):
        train(config(copy, "checkpoint.async_save=true"))
    assert steps_of(copy) == [4, 2]


def test_random_state_round_trip():
    device = torch.device("cpu")
    state = checkpoint_module._rng_state(device)
    first = torch.rand(3)
    checkpoint_module._restore_rng(state, device)
    assert torch.equal(first, torch.rand(3))


def test_unhashed_checkpoints_are_checked_by_size(copy, finished):
    train(config(copy, "checkpoint.hash=false"))
    manifest = files.read_manifest(copy / "checkpoints" / "step_00000006")
    assert all(entry["sha256"] is None for entry in manifest.files.values())
    truncate(copy / "checkpoints" / "step_00000006")
    train(config(copy, "checkpoint.hash=false"))
    assert losses(copy) == losses(finished)
