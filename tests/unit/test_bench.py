"""The bench's arithmetic and honesty, without a GPU."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fa3_train import reference
from fa3_train.bench import __main__ as cli
from fa3_train.bench import attention, cells, error, peers, peers_fp8, plot, tables, timing
from fa3_train.bench.cells import Cell


def cell(**changes) -> Cell:
    values = {
        "group": "g", "name": "c", "batch": 2, "seqlen": 64, "heads": 4, "kv_heads": 2,
        "head_dim": 16, "head_dim_v": 16, "causal": False,
    }  # fmt: skip
    return Cell(**{**values, **changes})


class TestFlops:
    def test_dense(self):
        assert cell().flops("fwd") == 4 * 2 * 4 * 64 * 64 * 16
        assert cell(causal=True).flops("fwd") == cell().flops("fwd") / 2
        assert cell().flops("bwd") == 2.5 * cell().flops("fwd")
        assert cell().flops("fwdbwd") == 3.5 * cell().flops("fwd")

    def test_two_head_dims(self):
        assert cell(head_dim=192, head_dim_v=128).flops("fwd") == 2 * 2 * 4 * 64 * 64 * 320

    def test_packed_is_the_sum(self):
        assert cell(lengths=(10, 54)).flops("fwd") == 2 * 4 * (10**2 + 54**2) * 32

    @pytest.mark.parametrize("window", [(3, 0), (0, 2), (5, 5), (-1, 3), (70, 2)])
    def test_window_counts_visible_keys(self, window):
        seen = int(reference.visible(64, 64, False, window).sum())
        assert cell(window=window).flops("fwd") == 2 * 2 * 4 * seen * 32

    def test_paper_grid(self):
        grid = cells.paper()
        assert len(grid) == 36
        assert {c.batch * c.seqlen for c in grid} == {16384}
        assert {c.heads * c.head_dim for c in grid} == {2048}


def test_document_lengths():
    lengths = cells.document_lengths(32768, 8192)
    assert sum(lengths) == 32768 and max(lengths) <= 8192 and len(lengths) > 10
    assert lengths == cells.document_lengths(32768, 8192)


def test_select():
    assert len(attention.select("paper", None)) == 36
    assert len(attention.select("paper", ["d128 causal"])) == 6
    assert [c.name for c in attention.select("paper", ["d64 full S512"])] == ["d64 full S512"]
    assert len(attention.select("paper", ["S512", "S1024"])) == 12
    assert attention.select("paper", ["S51"]) == []
    assert len(attention.select("ablation", ["all"])) == 1


def test_summarize():
    t = timing.summarize([4.0, 1.0, 2.0, 3.0, 100.0])
    assert (t.median_ms, t.min_ms, t.quartile_low_ms, t.quartile_high_ms) == (3.0, 1.0, 2.0, 4.0)
    assert t.spread == pytest.approx(2 / 3)
    assert timing.summarize([2.0]).spread == 0.0


def test_long_calls_are_repeated_less():
    assert timing.rounds(20, 1.0) == 20
    assert timing.rounds(20, 100.0) == 6
    assert timing.rounds(20, 5000.0) == 3
    assert timing.rounds(1, 5000.0) == 1


class Stub(peers.Peer):
    def __init__(self, name, factor=1.0, why=None, error=None):
        self.name, self.factor, self.why, self.error = name, factor, why, error

    def missing(self):
        return self.why

    def forward(self, cell, x, q, k, v):
        if self.error:
            raise self.error
        out, _ = reference.attention(q, k, v, causal=cell.causal, dtype=torch.float32)
        return out.to(q.dtype) * self.factor


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *a: None)


@pytest.mark.parametrize("which", ["fwd", "bwd", "fwdbwd"])
def test_a_wrong_peer_is_named_and_not_timed(no_gpu, which):
    c = cell(causal=True)
    x = peers.make_inputs(c, torch.float32, torch.device("cpu"))
    candidates = [
        Stub("ours"), Stub("same"), Stub("wrong", 1.05), Stub("nan", math.nan),
        Stub("absent", why="not installed"), Stub("broken", error=RuntimeError("no kernel\nx")),
    ]  # fmt: skip
    calls, report = attention.build_calls(candidates, c, x, which)
    assert list(calls) == ["ours", "same"]
    assert len(calls["same"]()) == (1 if which == "fwd" else 3)
    assert report["wrong"]["disagrees"].startswith("relative RMS difference 5.0")
    assert "disagrees" in report["nan"]
    assert report["absent"] == {"skipped": "not installed"}
    assert report["broken"] == {"skipped": "RuntimeError: no kernel"}


def test_the_first_peer_has_no_privilege():
    x = torch.randn(100)
    results = {"ours": (x * 1.5,), "fa3": (x,), "cudnn": (x * 1.001,)}
    found = attention.odd_ones(results, 0.02)
    assert list(found) == ["ours"] and found["ours"].endswith("to fa3")
    # two that differ: nobody knows which, neither is timed
    assert set(attention.odd_ones({"a": (x,), "b": (-x,)}, 0.02)) == {"a", "b"}
    assert attention.odd_ones({"a": (x,)}, 0.02) == {}
    both = {"a": (x, x), "b": (x, x), "c": (x, x * math.nan)}
    assert list(attention.odd_ones(both, 0.02)) == ["c"]


def test_math_peer_is_the_definition():
    c = cell(causal=True)
    x = peers.make_inputs(c, torch.float32, torch.device("cpu"))
    out = peers.Standard().forward(c, x, x.q, x.k, x.v)
    expected, _ = reference.attention(x.q, x.k, x.v, causal=True)
    torch.testing.assert_close(out, expected.float())


def test_peers_say_why_they_cannot():
    packed = cell(lengths=(10, 54))
    assert peers.Cudnn().problem(packed, "fwd") == "no packed sequences"
    assert peers.Fa2().problem(cell(softcap=3.0), "fwd") == "option not available"
    big = cell(batch=1, seqlen=16384, heads=32)
    assert peers.Standard().problem(big, "fwd") == "scores need 48 GiB"
    assert "--fa3-library" in peers.Fa3().missing()
    with pytest.raises(ValueError, match="--peers: must be from"):
        peers.make_peers(["fa5"])
    with pytest.raises(ValueError, match="--peers with --dtype fp8: must be from"):
        peers_fp8.make_peers_fp8(["fa2"])
    cudnn = peers_fp8.make_peers_fp8(["cudnn"])[0]
    assert cudnn.problem(packed, "fwd") == "no packed sequences here"
    assert cudnn.missing() is None or "nvidia-cudnn-frontend" in cudnn.missing()


def test_error_rows_over_draws():
    """Means of every column, extremes and standard error of the RMSE; one draw stays as it is."""
    rows = [{"name": "x", "rmse": r, "relative": 2 * r} for r in (1.0, 2.0, 6.0)]
    row = error.mean_row(rows)
    assert (row["name"], row["rmse"], row["relative"]) == ("x", 3.0, 6.0)
    assert (row["rmse_low"], row["rmse_high"], row["rmse_draws"]) == (1.0, 6.0, [1.0, 2.0, 6.0])
    assert row["rmse_standard_error"] == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))
    assert error.mean_row(rows[:1]) == rows[0]


def result():
    def row(name, causal, ours, fa3):
        values = {"ours": {"tflops": ours, "spread": 0.01}, "fa3": {"tflops": fa3}}
        if fa3 is None:
            values["fa3"] = {"skipped": "too big"}
        return {
            "name": name, "group": "d64", "pass": "fwd", "causal": causal, "flops": 1.0,
            "peers": values,
        }  # fmt: skip

    return {
        "what": "attention", "command": "x", "dtype": "bf16", "reps": 3, "peers": ["ours", "fa3"],
        "machine": {"gpu": "G", "torch": "2", "cuda": "13"}, "ceilings": {},
        "cells": [row("a S1", False, 400.0, 200.0), row("b S2", False, 100.0, 200.0),
                  row("c S3", True, 50.0, None)],
    }  # fmt: skip


def test_table_and_geometric_means():
    text = tables.text_table(result())
    mean = next(line for line in text.splitlines() if line.startswith("geomean d64"))
    # ours over all three cells, the ratio over the two where both ran: 2 * 0.5 = 1
    assert mean.split()[3:] == [f"{(400 * 100 * 50) ** (1 / 3):.1f}", "200.0", "1.000"]
    assert tables.skipped(result()) == "fa3: 1 cells skipped: too big"


def test_disagreement_is_loud():
    r = result()
    r["cells"][0]["peers"]["fa3"] = {"disagrees": "relative RMS difference 1.00e+00"}
    assert "RESULTS THAT DISAGREE" in tables.text_table(r)


def test_files(tmp_path):
    pytest.importorskip("matplotlib")
    paths = tables.write(result(), str(tmp_path / "deep" / "run"))
    assert [p.suffix for p in paths] == [".json", ".md", ".png"]
    assert json.loads(paths[0].read_text()) == result()
    assert paths[2].stat().st_size > 1000
    assert cli.main(["plot", str(paths[0])]) == 0


def test_no_matplotlib_is_a_note(tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.draw(result(), tmp_path / "x.png") is None
    assert "matplotlib is not installed" in capsys.readouterr().out


def test_command_line(capsys):
    with pytest.raises(SystemExit) as info:
        cli.main(["attention", "--help"])
    assert info.value.code == 0
    assert "--fa3-library" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert cli.main(["attention"]) == 2
