"""kill -9 with real processes; `python -m fa3_train.bench kills` is the long version of it."""

from __future__ import annotations

import json

import pytest
from tiny_runs import launch

pytestmark = pytest.mark.distributed


def test_kills_do_not_change_the_losses(tmp_path):
    out = tmp_path / "kills.json"
    words = ["run.steps=18", "data=random", "model.vocab_size=256"]
    done = launch(
        ["python", "-m", "fa3_train.bench", "kills", "--kills", "2", "--out", str(out), *words],
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert result["kills"] == 2 and len(result["reference"]) == 18
    assert result["losses_bitwise_equal"] and result["final_checkpoint_equal"]
