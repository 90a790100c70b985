"""The bare loop of `bench loop` trains the same model: a comparison of speeds is one of equals."""

from __future__ import annotations

import json

import pytest

from fa3_train.bench import loop
from fa3_train.bench.__main__ import main

TINY = [
    "run.device=cpu",
    "attention=sdpa",
    "data=random",
    "data.random_doc_len=20",
    "data.seq_len=32",
    "data.micro_batch=2",
    "model.vocab_size=96",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.head_dim=8",
    "model.ffn_hidden_size=64",
    "logging.wandb=off",
]


def test_both_loops_reach_the_same_loss(monkeypatch):
    result = loop.compare([*TINY, "data.global_batch=2"], rounds=2, block=3)
    assert len(result["ours_s"]) == len(result["bare_s"]) == 2
    assert result["ratio"] > 0 and result["ours_tokens_per_s"] > 0
    loss = result["last_loss"]
    # Nine steps from the same weights on the same batches; only the norms' weight decay differs.
    assert loss["ours"] == pytest.approx(loss["bare"], abs=1e-4)


def test_command_line_writes_a_result(tmp_path, capsys):
    out = tmp_path / "loop.json"
    words = ["loop", "--rounds", "1", "--block", "1", "--out", str(out), "--limit", "0.999"]
    assert main([*words, *TINY, "data.global_batch=2"]) == 0
    result = json.loads(out.read_text())
    assert result["command"].startswith("python -m fa3_train.bench loop") and result["config"]
    assert "ratio" in capsys.readouterr().out
    words[-1] = "-1000000"  # ours would have to be a million times faster
    assert main([*words, *TINY, "data.global_batch=2"]) == 1
