"""A rank that is killed or stands still ends the run with its name; then it goes on with fewer."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from test_resume import rank_pids, steps_of, wait_for_step
from tiny_runs import launch, losses, spawn, torchrun, words

HERE = Path(__file__).resolve().parent

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


def test_killed(tmp_path):
    engine = ["engine=fsdp2", "run.eval_batches=0", "checkpoint.every=5"]
    arguments = words(tmp_path, *engine, "run.steps=100000", "engine.dead_s=3")
    process = spawn(torchrun(2, "-m", "fa3_train", *arguments))
    try:
        wait_for_step(tmp_path, 6, process)
        pids = rank_pids(process.pid)
        start = time.monotonic()
        os.kill(pids[1], signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert time.monotonic() - start < 30
    assert process.returncode != 0
    assert "fa3_train: rank 1 is dead or stopped" in output, output[-5000:]
    for pid in pids:
        assert not Path(f"/proc/{pid}").exists(), f"process {pid} is still there"
    (newest, *_) = steps_of(tmp_path)  # the same command on one rank goes on from there
    done = launch(["python", "-m", "fa3_train", *arguments, f"run.steps={newest + 2}"])
    assert done.returncode == 0, done.stderr[-5000:]
    assert max(losses(tmp_path)) == newest + 2


def test_standing_still(tmp_path):
    start = time.monotonic()
    command = torchrun(2, str(HERE / "stuck.py"), str(tmp_path), "engine=fsdp2", "engine.hang_s=3")
    done = launch(command, timeout=100)
    assert time.monotonic() - start < 60
    assert done.returncode != 0
    text = done.stdout + done.stderr
    assert "fa3_train: rank 1 hangs: it has not moved for" in text, text[-5000:]
    assert "It is in step 3, forward of micro-batch 0, at modules/layer.py" in text
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows if "loss" in row) == 2
