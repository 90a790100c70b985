"""The curves' arithmetic, and its runs with a stand-in for the training process."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys

import pytest
import torch
from tiny_runs import one_thread  # noqa: F401 - autouse

from fa3_train import reference, reference_fp8
from fa3_train.bench import __main__ as cli
from fa3_train.bench import curves, curves_report, fp8_variants
from fa3_train.bench.curves import SUITES, difference, execute, judge, plan, seams
from fa3_train.bench.curves_report import Run, smoothed
from fa3_train.modules.attention import FlashAttention
from fa3_train.rotary import rope_tables
from fa3_train.train.compose import load

# A training process of 20 steps with a checkpoint after step 8: loss 5 / step + what argv adds.
FAKE = """
import json, sys, time
from pathlib import Path
folder, extra, slow = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "slow"
path = folder / "metrics.jsonl"
rows = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
start = 8 if rows else 0
rows = [r for r in rows if r.get("event") == "run" or r["step"] <= start]
path.write_text("".join(json.dumps(r) + chr(10) for r in rows))
with path.open("a") as out:
    def put(row):
        out.write(json.dumps(row) + chr(10))
        out.flush()
    put({"event": "run", "start_step": start, "gpu": "none"})
    for step in range(start + 1, 21):
        put({"step": step, "loss": 5 / step + extra, "grad_norm": 1.0, "step_ms": 2.0})
        if slow:
            time.sleep(0.05)
    put({"event": "eval", "step": 20, "val_loss": 1.0 + extra})
"""


def fake(tmp_path, series, seed, extra, *, kill_at=None, pace="fast"):
    folder = tmp_path / f"{series}{seed}"
    command = [sys.executable, "-c", FAKE, str(folder), str(extra), pace]
    return execute(Run(series, seed, command, folder, 20, kill_at))


def arguments(**changes):
    values = {"seeds": None, "series": None, "steps": None, "words": [], "limit": 60.0}
    return argparse.Namespace(**{**values, **changes})


def test_smoothed_means_of_what_is_there():
    losses = {1: 8.0, 2: 4.0, 3: 2.0, 4: 2.0}
    assert smoothed(losses, 2) == [(1, 8.0), (2, 6.0), (3, 3.0), (4, 2.0)]
    assert [y for _, y in smoothed(losses, 1)] == [8.0, 4.0, 2.0, 2.0]


def test_difference_is_judged_by_the_range_of_the_first():
    base = {1: 3.0, 2: 3.2, 3: 3.1}
    near = difference(base, {1: 3.05, 2: 3.25, 3: 3.15})
    assert near["within"] and math.isclose(near["difference"], 0.05, abs_tol=1e-12)
    far = difference(base, {1: 3.4, 2: 3.4, 3: 3.4})
    assert far["within"] is False and math.isclose(far["range_of_first"], 0.2)
    assert far["paired"] == pytest.approx({1: 0.4, 2: 0.2, 3: 0.3})
    assert difference({1: 3.0}, {1: 9.0})["within"] is None  # one seed has no range
    assert difference({}, {1: 9.0})["mean"] is None


def test_runs_are_read_and_judged(tmp_path):
    runs = [fake(tmp_path, "a", seed, 0.1 * seed) for seed in (1, 2, 3)]
    runs += [fake(tmp_path, "b", seed, 0.1 * seed + 0.5) for seed in (1, 2, 3)]
    assert not any(run.error for run in runs)
    first, second = judge(runs, 5)
    assert first["held_out"]["difference"] == 0 and first["training"]["within"]
    assert second["held_out"]["within"] is False
    assert second["held_out"]["difference"] == pytest.approx(0.5)
    result = {"judgement": [first, second], "seams": []}
    assert "| NO |" in curves_report.table(result)


def test_a_run_that_fails_says_how(tmp_path):
    folder = tmp_path / "x"
    command = [sys.executable, "-c", "import sys; sys.exit('out of luck')"]
    run = execute(Run("a", 1, command, folder, 20))
    assert "exit code 1" in run.error and "out of luck" in run.error
    short = fake(tmp_path, "b", 1, 0.0)
    short.steps = 30
    assert "20 of 30 steps" in execute(short).error


def test_a_run_that_takes_too_long_keeps_what_it_has(tmp_path):
    folder = tmp_path / "x"
    command = [sys.executable, "-c", FAKE, str(folder), "0.0", "slow"]
    run = execute(Run("a", 1, command, folder, 20, limit_s=0.6))
    assert re.fullmatch(r"stopped after 1 s, at step \d+", run.error)
    assert 0 < len(run.losses) < 20 and not judge([run], 5)[0]["seeds"]


def test_a_killed_run_is_compared_with_its_second_life(tmp_path):
    run = fake(tmp_path, "a", 1, 0.0, kill_at=12, pace="slow")
    assert run.error is None and run.resumed_after == 8
    (seam,) = seams([run])
    assert seam["killed_at"] >= 12 and seam["steps_taken_twice"] == seam["killed_at"] - 8
    assert seam["bitwise_equal"] == seam["steps_taken_twice"]
    run.before_kill[10] += 1e-3
    (seam,) = seams([run])
    assert seam["largest_difference"] == pytest.approx(1e-3)
    assert seam["bitwise_equal"] == seam["steps_taken_twice"] - 1
    record = curves_report.as_record(run)
    assert str(tmp_path) not in json.dumps(record["loss_before_kill"])


def test_a_run_that_ends_before_the_kill_is_an_error(tmp_path):
    run = fake(tmp_path, "a", 1, 0.0, kill_at=50)
    assert run.error is not None


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_plans_runs_that_the_configuration_takes(tmp_path, name):
    runs = plan(SUITES[name], arguments(steps=40), tmp_path)
    assert len({run.folder for run in runs}) == len(runs)
    for run in runs:
        module, *rest = run.command[2:]
        assert module in ("fa3_train", "fa3_train.bench.fp8_variants")
        words = rest[1:] if "variants" in module else rest
        config = load(words)
        assert config.run.steps == 40 and config.run.seed == run.seed
        if SUITES[name].kill:
            assert 1 < config.checkpoint.every < run.kill_at < 40
            assert 2 * config.checkpoint.every > 40
        else:
            assert not config.checkpoint.every and not config.checkpoint.save_last


def test_plan_takes_some_series_and_refuses_others(tmp_path):
    runs = plan(SUITES["fp8"], arguments(series=["fp8"], seeds=[7]), tmp_path)
    assert [(run.series, run.seed) for run in runs] == [("fp8", 7)]
    with pytest.raises(SystemExit, match="must be among"):
        plan(SUITES["fp8"], arguments(series=["fp9"]), tmp_path)


def test_results_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(curves, "execute", lambda run: fake(tmp_path, run.series, run.seed, 0.0))
    assert cli.main(["curves", "--suite", "backends", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("wrote") == 3
    result = json.loads((tmp_path / "out.json").read_text())
    assert len(result["runs"]) == 6 and len(result["runs"][0]["loss"]) == 20


def test_what_has_ended_is_on_disk_while_others_run(tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    seen = []

    def one_after_the_other(run):
        seen.append(len(json.loads(out.read_text())["runs"]) if out.exists() else 0)
        if run.seed == 3:
            raise KeyboardInterrupt
        return fake(tmp_path, run.series, run.seed, 0.0)

    monkeypatch.setattr(curves, "execute", one_after_the_other)
    with pytest.raises(KeyboardInterrupt):
        cli.main(["curves", "--suite", "backends", "--jobs", "1", "--out", str(out)])
    assert max(seen) >= 1
    kept = json.loads(out.read_text())["runs"]
    assert 2 <= len(kept) <= 4 and all(len(run["loss"]) == 20 for run in kept)


# ---- FP8 variants ----------------------------------------------------------------------------


def attention_inputs(dtype=torch.bfloat16):
    torch.manual_seed(0)
    cu = torch.tensor([0, 3, 3, 150], dtype=torch.int32)
    q, k, v = (torch.randn(150, h, 64, dtype=dtype).requires_grad_() for h in (2, 1, 1))
    return q, k, v, cu


@pytest.mark.parametrize("key", fp8_variants.VARIANTS)
def test_variants_are_attention_up_to_fp8(key):
    """Output and gradients against exact attention: off by what e4m3 costs, and by no more."""
    q, k, v, cu = attention_inputs()
    core = FlashAttention(64, precision="fp8", backend="reference")
    module = fp8_variants.VariantAttention(core, fp8_variants.VARIANTS[key])
    tables = rope_tables(64, 256)
    positions = torch.cat([torch.arange(3), torch.arange(147)]).int()
    out = module(q, k, v, cu_seqlens_q=cu, max_seqlen_q=147, rope=tables, position_ids=positions)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)

    turned = [reference_fp8.rotate(x.float(), *tables, position_ids=positions) for x in (q, k)]
    truth, _ = reference.attention(
        *turned, v.float(), causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu
    )
    wanted = torch.autograd.grad(truth, (q, k, v), dout.to(truth.dtype))
    assert 1e-3 < (out - truth).norm() / truth.norm() < 0.06
    for ours, exact in zip(grads, wanted, strict=True):
        assert (ours - exact).norm() / exact.norm() < 0.15


def test_a_scale_per_tensor_is_one_number():
    q, _, _, cu = attention_inputs(torch.float32)
    q = q.detach() * torch.tensor([1.0, 64.0])[:, None]
    for scales, distinct in (("tensor", 1), ("head", 2)):
        _, descale = fp8_variants.encode(q, scales, cu)
        assert descale.shape == (2, 150 // 128 + 3)
        assert len(descale.unique()) == distinct
    codes, descale = fp8_variants.encode(q, "head", cu)
    error = (codes.float() * descale[:, :1] - q).abs().amax((0, 2))
    assert (error <= q.abs().amax((0, 2)) * 2**-4).all()


def test_variants_replace_only_what_they_can():
    plain = FlashAttention(64, precision="bf16")
    with pytest.raises(ValueError, match="precision fp8"):
        fp8_variants.VariantAttention(plain, fp8_variants.VARIANTS["tensor"])
    window = FlashAttention(64, precision="fp8", window_size=8)
    with pytest.raises(ValueError, match="without a window"):
        fp8_variants.VariantAttention(window, fp8_variants.VARIANTS["tensor"])


def test_row_weighs_batches_by_their_labels():
    row = fp8_variants._row("x", [2.0, 3.0], [1.0, 1.0], [30, 10])
    assert row["loss"] == pytest.approx(2.25) and row["loss_minus_bf16"] == pytest.approx(1.25)
    assert row["perplexity"] == pytest.approx(math.exp(2.25))
    assert row["standard_error"] == pytest.approx(0.5)
