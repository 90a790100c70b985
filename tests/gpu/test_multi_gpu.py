"""Several GPUs, NCCL: attention over all of them beside one. Needs at least two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import launch, torchrun

HERE = Path(__file__).resolve().parent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU or none"),
]


def test_attention_over_all_gpus_is_that_of_one():
    ranks = 1 << (torch.cuda.device_count().bit_length() - 1)
    done = launch(torchrun(ranks, str(HERE / "context_worker.py")), timeout=180)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert done.stdout.count(": ok;") >= 24, done.stdout
