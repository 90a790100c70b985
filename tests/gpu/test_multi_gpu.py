"""Several GPUs, NCCL: attention over all of them beside one; a rank that is lost. Needs two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_runs import environment, launch, torchrun

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "distributed"))
from test_resume import rank_pids, steps_of, wait_for_step  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU or none"),
]


def test_attention_over_all_gpus_is_that_of_one():
    ranks = 1 << (torch.cuda.device_count().bit_length() - 1)
    done = launch(torchrun(ranks, str(HERE / "context_worker.py")), timeout=180)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert done.stdout.count(": ok;") >= 24, done.stdout


def all_losses(folder: Path) -> dict[int, list[float]]:
    """step -> its loss in every life of the run."""
    found: dict[int, list[float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "loss" in row:
            found.setdefault(row["step"], []).append(row["loss"])
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_the_run_which_goes_on_with_one_gpu(tmp_path, number):
    """Two GPUs share sequences by a ring; rank 1 is killed or stopped while the other waits in an
    NCCL kernel. One GPU continues, with the losses that the two had."""
    words = [
        "recipe=tiny_gpu", "data=random", "model.num_layers=2", "engine=fsdp2", "run.steps=100000",
        "data.global_batch=8", "run.eval_batches=0", "logging=quiet", "logging.every=1",
        "checkpoint.every=20", "checkpoint.async_save=false", "engine.dead_s=5", "run.gpus=0",
        f"run.dir={tmp_path}",
    ]  # fmt: skip
    command = torchrun(2, "-m", "fa3_train", *words, "parallel.context=2", "parallel.method=ring")
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *command[1:]],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        wait_for_step(tmp_path, 26, process)
        pids = rank_pids(process.pid)
        start = time.monotonic()
        os.kill(pids[1], number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "fa3_train: rank 1 is dead or stopped" in output, output[-5000:]
    assert time.monotonic() - start < 30
    before = {step: rows[-1] for step, rows in all_losses(tmp_path).items()}
    (newest, *_) = steps_of(tmp_path)
    assert newest >= 20
    done = launch(["python", "-m", "fa3_train", *words, f"run.steps={newest + 6}"])
    assert done.returncode == 0, done.stderr[-5000:]
    after = {step: rows[-1] for step, rows in all_losses(tmp_path).items()}
    again = [step for step in range(newest + 1, newest + 7) if step in before]
    assert again
    for step in again:
        assert after[step] == pytest.approx(before[step], rel=2e-3), step
