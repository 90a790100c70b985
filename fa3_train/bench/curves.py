"""Training curves side by side: what an attention does to the loss, against the noise of seeds.

    python -m fa3_train.bench curves --suite backends --out docs/results/curves_backends
    python -m fa3_train.bench curves --suite fp8 --jobs 3 --out docs/results/curves_fp8
    python -m fa3_train.bench curves --suite ablation --out docs/results/curves_ablation
    python -m fa3_train.bench curves --suite deepspeed --out docs/results/curves_deepspeed

backends   a tiny Llama, 300 steps: our kernels beside torch's attention, 3 seeds each
fp8        100M parameters, 1,000 steps: BF16 beside FP8 attention, 3 seeds each
ablation   the same for 300 steps without Hadamard, without block scales, without both
emulated   4M parameters, 300 steps, on a CPU: BF16, FP8 and the variants of the ablation
deepspeed  100M, 2,000 steps of ZeRO 1 with DeepSpeed's FusedAdam, BF16 and FP8; each run is killed
           with SIGKILL past its middle and resumed from its checkpoint

Each run is a process of its own: `python -m fa3_train ...`, the command that a user types (the
ablation, which the product does not offer, replaces the attention modules first: `fp8_variants`).
`--jobs` of them share the GPU: a model this small leaves it idle between its kernels.

A seed draws weights and the order of the data; held-out text is the same for all. What is judged:
the difference of two series' means against the range of the first series over its seeds, for the
held-out loss and for the mean of the last training losses. Series of one seed pair up (same
weights, same data), so paired differences are given too.

Text: sources of the standard library (tiny), of the installed torch (100M; some 40 MB, so that
no text repeats within 2,000 steps). Results: OUT.json with every loss, OUT.md, OUT.png.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fa3_train.bench.curves_report import Run, as_record, table, tail, write, write_json
from fa3_train.bench.fp8_variants import VARIANTS
from fa3_train.train.plots import read_metrics

_POLL_S = 0.1
_FIXED = (
    "logging=quiet",
    "logging.attention_every=0",
    "run.gpus=0",
    "checkpoint=none",
    "checkpoint.every=0",  # recipes set it, and theirs comes after the group's
)
_TINY = (
    "recipe=quickstart",
    "precision=bf16",
    "data.seq_len=512",
    "run.steps=300",
    "run.eval_every=100",
    "run.eval_batches=16",
)
_100M = (
    "recipe=tiny_gpu",
    "data=text",
    "data.bpe_vocab_size=8192",
    "data.seq_len=2048",
    "data.micro_batch=2",
    "data.global_batch=2",
    "optimizer.lr=6e-4",
    "run.eval_every=250",
    "run.eval_batches=32",
)
_SMALL_STEPS = (
    "run.steps=2000",
    "data.micro_batch=1",
    "data.global_batch=1",
    "optimizer.lr=3e-4",
    "run.eval_every=500",
)
_HOPPER = ("attention=hopper",)
_EMULATED = ("attention=fp8", "attention.backend=reference")
_FP8 = ("attention=fp8", "attention.backend=hopper")
# Their gradient is taken at the codes; the product's at its 16-bit inputs.
_ABLATED = ("block_hadamard", "block", "tensor_hadamard", "tensor")


@dataclass(frozen=True)
class Series:
    """One line of the plot: runs that differ in their seed alone."""

    name: str
    words: tuple[str, ...]
    variant: str | None = None  # key of fp8_variants.VARIANTS that replaces the attention


@dataclass(frozen=True)
class Suite:
    """Series that are compared with the first of them."""

    title: str
    words: tuple[str, ...]
    series: tuple[Series, ...]
    seeds: int = 3
    kill: bool = False


SUITES = {
    "backends": Suite(
        "tiny Llama, bf16: torch's attention and ours",
        _TINY,
        (Series("sdpa", ("attention=sdpa",)), Series("hopper", _HOPPER)),
    ),
    "fp8": Suite(
        "100M Llama: BF16 and FP8 attention",
        (*_100M, "run.steps=1000"),
        (Series("bf16", (*_HOPPER, "checkpoint.export_hf=true")), Series("fp8", _FP8)),
    ),
    "ablation": Suite(
        "100M Llama: FP8 attention without its remedies",
        (*_100M, "run.steps=300"),
        (
            Series("bf16", _HOPPER),
            Series("fp8, the product", _FP8),
            *(Series(VARIANTS[v].name, _FP8, v) for v in _ABLATED),
        ),
        seeds=1,
    ),
    "emulated": Suite(
        "tiny Llama on a CPU: FP8 attention by its exact emulation",
        (
            "recipe=quickstart",
            "precision=bf16",
            "run.device=cpu",
            "run.threads=1",
            "data.micro_batch=4",
            "data.global_batch=4",
            "run.steps=300",
            "run.eval_every=100",
            "run.eval_batches=16",
        ),
        (
            Series("bf16", ("attention=sdpa",)),
            Series("fp8, the product", _EMULATED),
            *(Series(VARIANTS[v].name, _EMULATED, v) for v in _ABLATED),
        ),
    ),
    "deepspeed": Suite(
        "100M Llama, DeepSpeed ZeRO 1 + FusedAdam: killed and resumed",
        (*_100M, *_SMALL_STEPS, "engine=deepspeed", "engine.optimizer=fused_adam"),
        # Deterministic, so that the second life can be held against the first bit by bit. The
        # FP8 attention has no such mode: its dQ is added with atomics.
        (Series("bf16", (*_HOPPER, "attention.deterministic=true")), Series("fp8", _FP8)),
        seeds=1,
        kill=True,
    ),
}


# ---- runs ------------------------------------------------------------------------------------


def text_of_torch() -> str:
    """Glob, quoted for the command line, of the installed torch's Python sources.

    Without torch.testing: generated tables, one file of which would be half of the held-out text.
    """
    import torch

    return f"'{Path(torch.__file__).parent}/[!t]*/**/*.py'"


def hundred_million() -> list[str]:
    """Words of the 100M runs, for who continues with their weights."""
    return [*_100M, *_FIXED, f"data.path={text_of_torch()}"]


def plan(suite: Suite, args: argparse.Namespace, work: Path) -> list[Run]:
    """All runs, seed by seed, so that the series of a seed run under the same conditions."""
    seeds = args.seeds or list(range(1, suite.seeds + 1))
    chosen = [s for s in suite.series if not args.series or s.name in args.series]
    if not chosen:
        names = [s.name for s in suite.series]
        raise SystemExit(f"--series: must be among {names}, got {args.series}")
    runs = []
    for seed in seeds:
        for number, series in enumerate(chosen):
            words = dict(
                word.split("=", 1) for word in (*suite.words, *_FIXED, *series.words, *args.words)
            )
            if words.get("data") == "text":
                words.setdefault("data.path", text_of_torch())
            if args.steps:
                words["run.steps"] = str(args.steps)
            folder = work / f"{number}_seed{seed}"
            words |= {"run.seed": str(seed), "run.dir": str(folder)}
            steps = int(words["run.steps"])
            kill_at = None
            if suite.kill:
                # One checkpoint, at the middle; the kill comes later, so that steps are repeated.
                words |= {"checkpoint": "default", "checkpoint.every": str(steps // 2 + 1)}
                words |= {"checkpoint.save_last": "false", "checkpoint.keep": "1"}
                kill_at = steps // 2 + max(2, steps // 20)
            line = [f"{key}={value}" for key, value in words.items()]
            module = ["fa3_train"]
            if series.variant:
                module = ["fa3_train.bench.fp8_variants", series.variant]
            command = [sys.executable, "-m", *module, *line]
            runs.append(Run(series.name, seed, command, folder, steps, kill_at, args.limit))
    return runs


def execute(run: Run) -> Run:
    """Train, kill and resume as planned; read the metrics, also of a run that failed.

    Errors end up in `run.error`.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    metrics = run.folder / "metrics.jsonl"
    deadline = time.monotonic() + run.limit_s
    try:
        if run.kill_at is not None:
            _train(run, deadline, kill_at=run.kill_at)
            run.before_kill = _losses(read_metrics(metrics)[1])
        _train(run, deadline)
        if run.kill_at is not None:
            run.resumed_after = _resumed_after(metrics)
    except (OSError, ValueError, RuntimeError) as error:
        run.error = str(error)
    if metrics.exists():
        _read(run, metrics)
    if run.error is None and len(run.losses) != run.steps:
        run.error = f"{len(run.losses)} of {run.steps} steps are in {metrics}"
    outcome = run.error or f"loss {tail(run.losses, 50):.4f}, {run.step_ms:.1f} ms a step"
    print(f"{run.series}, seed {run.seed}: {outcome}", flush=True)
    return run


def _read(run: Run, metrics: Path) -> None:
    run.info, steps, evals = read_metrics(metrics)
    run.losses = _losses(steps)
    run.evals = {row["step"]: row["val_loss"] for row in evals}
    late = [row["step_ms"] for row in steps[len(steps) // 5 :]]
    run.step_ms = statistics.median(late) if late else None


def _train(run: Run, deadline: float, kill_at: int | None = None) -> None:
    """One life of the process. RuntimeError where it does not end as it should."""
    log = run.folder / "output.log"
    with log.open("ab") as stream:
        process = subprocess.Popen(
            run.command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    late = reached = False
    while process.poll() is None and not (late or reached):
        time.sleep(_POLL_S)
        late = time.monotonic() > deadline
        reached = kill_at is not None and _last_step(run.folder) >= kill_at
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    if process.wait() == -signal.SIGKILL and reached:
        return
    if late:
        raise RuntimeError(f"stopped after {run.limit_s:.0f} s, at step {_last_step(run.folder)}")
    if process.returncode != 0 or kill_at is not None:
        text = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"exit code {process.returncode}: {' '.join(run.command)}\n{text}")


def _last_step(folder: Path) -> int:
    """Newest step in the metrics; looks at the end of the file alone."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 8192))
        found = re.findall(rb'\{"step": (\d+), "loss"', stream.read())
    return int(found[-1]) if found else 0


def _losses(rows: list[dict[str, Any]]) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows}


def _resumed_after(metrics: Path) -> int | None:
    """Step after which the last life began."""
    starts = []
    for line in metrics.read_text().splitlines():
        row = json.loads(line)
        if row.get("event") == "run":
            starts.append(row["start_step"])
    return int(starts[-1]) if starts else None


# ---- judging ---------------------------------------------------------------------------------


def judge(runs: list[Run], window: int) -> list[dict[str, Any]]:
    """A row per series: its final losses, and the difference to the first series."""
    series = list(dict.fromkeys(run.series for run in runs))
    rows: list[dict[str, Any]] = []
    finals: dict[str, dict[str, dict[int, float]]] = {}
    for name in series:
        mine = [r for r in runs if r.series == name and r.error is None]
        finals[name] = {
            "held_out": {r.seed: r.evals[max(r.evals)] for r in mine if r.evals},
            "training": {r.seed: tail(r.losses, window) for r in mine},
        }
        row: dict[str, Any] = {"series": name, "seeds": len(mine)}
        for kind in ("held_out", "training"):
            row[kind] = difference(finals[series[0]][kind], finals[name][kind])
        times = [r.step_ms for r in mine if r.step_ms]
        row["step_ms"] = min(times) if times else None
        rows.append(row)
    return rows


def difference(base: dict[int, float], other: dict[int, float]) -> dict[str, Any]:
    """Means of two series by seed, their difference, and the range of the first over its seeds.

    `within` is None where the first series has fewer than two seeds: there is no range.
    """
    if not base or not other:
        return {"mean": None}
    mean, mine = statistics.fmean(base.values()), statistics.fmean(other.values())
    spread = max(base.values()) - min(base.values()) if len(base) > 1 else None
    return {
        "mean": mine,
        "by_seed": other,
        "difference": mine - mean,
        "paired": {seed: other[seed] - base[seed] for seed in other if seed in base},
        "range_of_first": spread,
        "within": None if spread is None else abs(mine - mean) <= spread,
    }


def seams(runs: list[Run]) -> list[dict[str, Any]]:
    """Of each killed run: the steps that both lives took, loss by loss."""
    rows = []
    for run in runs:
        if run.kill_at is None or run.error:
            continue
        after = run.resumed_after or 0
        both = [s for s in run.before_kill if s > after and s in run.losses]
        gaps = [abs(run.before_kill[s] - run.losses[s]) for s in both]
        jumps = [abs(run.losses[s] - run.losses[s - 1]) for s in run.losses if s - 1 in run.losses]
        rows.append(
            {
                "series": run.series,
                "killed_at": max(run.before_kill, default=0),
                "resumed_after": after,
                "steps_taken_twice": len(both),
                "bitwise_equal": sum(g == 0 for g in gaps),
                "first_difference": gaps[0] if gaps else None,
                "largest_difference": max(gaps, default=None),
                "usual_change_from_step_to_step": statistics.median(jumps) if jumps else None,
            }
        )
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 1 2 3, or 1")
    parser.add_argument("--series", nargs="+", help="only these; the first is compared with")
    parser.add_argument("--steps", type=int, help="instead of the suite's")
    parser.add_argument("--jobs", type=int, default=3, help="runs that share the device")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds that a run may take")
    parser.add_argument("--work", type=Path, help="keep the run folders here")
    parser.add_argument("--out", help="write OUT.json, OUT.md and OUT.png")
    parser.add_argument("words", nargs="*", help="key=value, as on the command line of a run")


def summary(
    suite: Suite, runs: list[Run], args: argparse.Namespace, facts: dict[str, str]
) -> dict[str, Any]:
    """The result file of these runs."""
    window = min(50, max(1, runs[0].steps // 5))
    return {
        "what": "curves",
        "suite": args.suite,
        "title": suite.title,
        "command": args.command,
        "machine": facts,
        "window": window,
        "judgement": judge(runs, window),
        "seams": seams(runs),
        "runs": [as_record(run) for run in runs],
    }


def main(args: argparse.Namespace) -> int:
    from fa3_train.bench.tables import machine

    suite = SUITES[args.suite]
    work = args.work or Path(tempfile.mkdtemp(prefix="curves-"))
    facts = machine()
    try:
        planned = plan(suite, args, work)
        done: dict[int, Run] = {}
        with ThreadPoolExecutor(args.jobs) as pool:
            futures = {pool.submit(execute, run): at for at, run in enumerate(planned)}
            for future in as_completed(futures):
                done[futures[future]] = future.result()
                runs = [done[at] for at in sorted(done)]
                if args.out:  # now: what ends this process must not take these with it
                    write_json(summary(suite, runs, args, facts), args.out)
    finally:
        if args.work is None:
            shutil.rmtree(work, ignore_errors=True)
    result = summary(suite, runs, args, facts)
    print(table(result))
    if args.out:
        for path in write(result, runs, args.out):
            print(f"wrote {path}")
    failed = [run for run in runs if run.error]
    for run in failed:
        print(f"FAILED: {run.series}, seed {run.seed}: {run.error}", file=sys.stderr)
    return int(bool(failed))
