"""A NaN on one rank stops all ranks before the update, with the rank and the module named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_runs import launch, losses, torchrun

pytestmark = pytest.mark.distributed

RUNS = {
    "ddp": ["precision=bf16"],
    "fsdp2": ["engine=fsdp2"],
    "zero0": ["engine=deepspeed", "engine.zero_stage=0"],
    "zero1": ["engine=deepspeed", "engine.zero_stage=1", "precision=bf16"],
    "zero3": ["engine=deepspeed", "engine.zero_stage=3"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard")
    worker = Path(__file__).resolve().parent / "bad_steps.py"
    jobs = [",".join([name, *words]) for name, words in RUNS.items()]
    done = launch(torchrun(2, str(worker), str(folder), *jobs), timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_named_on_all_ranks(folder, name):
    texts = [(folder / name / f"error_{rank}.txt").read_text() for rank in (0, 1)]
    assert texts[0] == texts[1]
    pattern = (
        r"step 3: loss nan, .*First non-finite value: rank 1, micro-batch 0 \(loss nan\): "
        r"forward, output of layers\.0\.mlp .*has 1 NaN and 0 Inf"
    )
    assert re.match(pattern, texts[0]), texts[0]


@pytest.mark.parametrize("name", RUNS)
def test_nothing_was_updated(folder, name):
    """Resumed without the fault, the run is the one that never had it."""
    assert losses(folder / name) == losses(folder / f"{name}-whole")
    assert losses(folder / name).keys() == {1, 2, 3, 4, 5, 6}
