"""Real launchers, two ranks: stop, kill, resume; another world size; one signalled rank."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import launch, loss_tensor, losses, spawn, torchrun, words

from fa3_train.numerics import AGREEMENT, assert_as_good, relative_rms_error
from fa3_train.train import checkpoint_files as files

pytestmark = pytest.mark.distributed

ENGINES = {
    "fsdp2": (torchrun(2, "-m", "fa3_train"), ["engine=fsdp2"]),
    "ddp": (torchrun(2, "-m", "fa3_train"), ["precision=bf16"]),
    "zero2": (
        ["deepspeed", "--num_accelerators", "2", "--module", "fa3_train"],
        ["engine=deepspeed", "engine.zero_stage=2", "precision=bf16"],
    ),
    "zero3": (torchrun(2, "-m", "fa3_train"), ["engine=deepspeed", "engine.zero_stage=3"]),
}


def run(name: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    launcher, chosen = ENGINES[name]
    arguments = {w.split("=")[0]: w for w in words(folder, *chosen, *more)}
    extra = ["--master_port", str(29600 + os.getpid() % 300)] if launcher[0] == "deepspeed" else []
    return launch([launcher[0], *extra, *launcher[1:], *arguments.values()])


def steps_of(folder: Path) -> list[int]:
    return [step for step, _ in files.complete(folder / "checkpoints")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """name -> a finished run of 6 steps with checkpoints after 2, 4, 6; made when first asked."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            done = run(name, made[name])
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return made[name]

    return get


def cut_copy(source: Path, folder: Path) -> Path:
    """The run as a kill after its step-2 checkpoint left it, with a half-written next one."""
    shutil.copytree(source, folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000006")
    newest = folder / "checkpoints" / "step_00000004"
    newest.rename(folder / "checkpoints" / ".step_00000004.partial")
    return folder


@pytest.mark.parametrize("name", ENGINES)
def test_resume_is_bitwise(finished, tmp_path, name):
    folder = cut_copy(finished(name), tmp_path / "run")
    done = run(name, folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert losses(folder) == losses(finished(name))
    assert steps_of(folder) == [6, 4, 2]
    assert done.stdout.count("metrics.jsonl") == 1  # rank 0 alone speaks


@pytest.mark.parametrize("strategy", ["single", "ddp-fp32"])
def test_sharded_checkpoint_continues_elsewhere(finished, tmp_path, strategy):
    """DCP reshards: an FSDP2 checkpoint of two ranks goes on in one process, and as replicas."""
    folder = cut_copy(finished("fsdp2"), tmp_path / "run")
    arguments = words(folder)
    count = {"single": 1, "ddp-fp32": 2}[strategy]
    launcher = ["python", "-m", "fa3_train"] if count == 1 else torchrun(2, "-m", "fa3_train")
    done = launch([*launcher, *arguments])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    truth = loss_tensor(finished("fsdp2")).double()
    assert_as_good(loss_tensor(folder), truth, what="same", name="loss")


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_zero_continues_on_another_world_size(finished, tmp_path, name):
    """Two ranks' ZeRO files, by way of DeepSpeed's universal layout, in one process."""
    folder = cut_copy(finished(name), tmp_path / "run")
    arguments = {w.split("=")[0]: w for w in words(folder, *ENGINES[name][1])}
    done = launch(["python", "-m", "fa3_train", *arguments.values()])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert steps_of(folder) == [6, 4, 2]
    assert not list((folder / "checkpoints").glob(".*"))
    ours, truth = loss_tensor(folder), loss_tensor(finished(name)).double()
    if name == "zero3":
        assert_as_good(ours, truth, what="same", name="loss")
    else:  # bf16: the same sums in another order are rounded otherwise
        assert relative_rms_error(ours, truth) < AGREEMENT / 10


def test_zero_refuses_another_stage(finished, tmp_path):
    folder = cut_copy(finished("zero3"), tmp_path / "run")
    done = run("zero3", folder, "engine.zero_stage=2")
    assert done.returncode != 0
    assert "was written with zero_stage=3, this run has zero_stage=2" in done.stderr


def test_torn_checkpoint_of_another_rank_is_seen_by_all(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished("fsdp2"), folder)
    victim = folder / "checkpoints" / "step_00000006" / "state" / "__1_0.distcp"
    data = bytearray(victim.read_bytes())
    data[100] ^= 255
    victim.write_bytes(data)
    done = run("fsdp2", folder)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "passing over a torn checkpoint" in done.stdout + done.stderr
    assert losses(folder) == losses(finished("fsdp2"))


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} in {folder}; exit code {process.poll()}")


def rank_pids(launcher: int) -> list[int]:
    """Children of the launcher that run the training, in order of their RANK."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            environ = dict(
                item.split("=", 1)
                for item in (entry / "environ").read_text().split("\0")
                if "=" in item
            )
        except (OSError, ValueError):
            continue
        if parent == launcher and "RANK" in environ:
            found[int(environ["RANK"])] = int(entry.name)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_signal_to_one_rank_stops_all(tmp_path):
    """Only rank 1 gets SIGUSR1; both save after the same step and exit with 0."""
    arguments = words(tmp_path, "engine=fsdp2", "run.steps=100000", "checkpoint.every=0")
    process = spawn(torchrun(2, "-m", "fa3_train", *arguments))
    try:
        wait_for_step(tmp_path, 3, process)
        pids = rank_pids(process.pid)
        assert len(pids) == 2
        os.kill(pids[1], signal.SIGUSR1)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, output[-5000:]
    (step,) = steps_of(tmp_path)
    assert max(losses(tmp_path)) == step >= 3
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert any(json.loads(line).get("event") == "checkpoint" for line in lines)
