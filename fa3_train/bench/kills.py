"""kill -9 at random moments, resume, and compare with a run that nobody killed, bit for bit.

    python -m fa3_train.bench kills --kills 20 --out docs/results/resume_kills.json [key=value ...]

A reference process trains to the end. Then the same run is started in another folder and killed,
again and again, with SIGKILL to the whole process group: every second time while a checkpoint is
being written (its partial folder exists), otherwise after a random number of further steps; both
plus a random delay. The last life runs to the end. It must hold, in the bits of the doubles in
metrics.jsonl: every loss and gradient norm that any life ever logged is that of the reference, no
step is missing, and the final checkpoint's tensors have the reference's hashes.

The default is a tiny model on the CPU with a checkpoint every 3 steps, so that kills hit saves.
Words change it; `--ranks 2` starts torchrun.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fa3_train.bench.tables import machine
from fa3_train.train import checkpoint_files as files

TINY = {
    "run.device": "cpu",
    "run.threads": "1",
    "run.steps": "240",
    "run.eval_batches": "0",
    "logging": "quiet",
    "logging.every": "1",
    "logging.attention_every": "0",
    "precision": "fp32",
    "data": "stdlib",
    "data.seq_len": "64",
    "data.micro_batch": "2",
    "data.global_batch": "4",
    "model.num_layers": "2",
    "model.hidden_size": "64",
    "model.num_heads": "4",
    "model.num_kv_heads": "2",
    "model.head_dim": "16",
    "model.ffn_hidden_size": "128",
    "checkpoint.every": "3",
    "checkpoint.keep": "2",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--out", type=Path)
    parser.add_argument("words", nargs="*", help="key=value, as on the command line of a run")


def main(args: argparse.Namespace) -> int:
    words = TINY | dict(word.split("=", 1) for word in args.words)
    steps = int(words["run.steps"])
    dice = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        reference, victim = Path(scratch) / "reference", Path(scratch) / "victim"
        began = time.monotonic()
        _finish(_start(reference, words, args.ranks), reference)
        seconds = time.monotonic() - began
        print(f"reference: {steps} steps in {seconds:.1f} s", flush=True)
        truth = _rows(reference)
        lives = []
        for number in range(args.kills):
            process = _start(victim, words, args.ranks)
            life = _kill(process, victim, number, args.kills, steps, dice)
            life["wrong_rows"] = _wrong(_rows(victim), truth)
            lives.append(life)
            print(f"kill {number + 1}: {life}", flush=True)
            if not life["killed"]:
                break
        _finish(_start(victim, words, args.ranks), victim)
        final = _rows(victim)
        result = {
            "machine": machine(),
            "command": args.command,
            "words": words,
            "ranks": args.ranks,
            "steps": steps,
            "kills": sum(life["killed"] for life in lives),
            "kills_during_a_save": sum(life["during_save"] for life in lives),
            "losses_bitwise_equal": final == truth,
            "rows_that_ever_differed": sum(life["wrong_rows"] for life in lives),
            "final_checkpoint_equal": _hashes(victim) == _hashes(reference),
            "lives": lives,
            "reference": [[step, *values] for step, values in sorted(truth.items())],
        }
    for key in ("kills", "kills_during_a_save", "losses_bitwise_equal", "final_checkpoint_equal"):
        print(f"{key:<24} {result[key]}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    passed = (
        result["kills"] == args.kills
        and result["losses_bitwise_equal"]
        and result["final_checkpoint_equal"]
        and not result["rows_that_ever_differed"]
    )
    return 0 if passed else 1


def _start(folder: Path, words: dict[str, str], ranks: int) -> subprocess.Popen[bytes]:
    arguments = [f"{key}={value}" for key, value in words.items()] + [f"run.dir={folder}"]
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.log", "ab") as log:
        return subprocess.Popen(
            [*launcher, "fa3_train", *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, killed as one
        )


def _finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    if process.wait() != 0:
        raise RuntimeError(
            f"run in {folder} exited with {process.returncode}:\n"
            + (folder / "output.log").read_text()[-3000:]
        )


def _kill(
    process: subprocess.Popen[bytes],
    folder: Path,
    number: int,
    kills: int,
    steps: int,
    dice: random.Random,
) -> dict[str, Any]:
    """Wait for the chosen moment, kill the group, and say what was hit."""
    before = _last_step(folder)
    target = before + dice.randint(0, max(1, 2 * (steps - 2 * kills) // (2 * kills)))
    at_save = number % 2 == 0
    # Startup is among the moments too: a target already reached kills some way into it.
    delay = dice.uniform(0.0, 0.05) if at_save or target > before else dice.uniform(0.5, 4.0)
    while process.poll() is None:
        reached = _last_step(folder) >= target
        if reached and (not at_save or _partials(folder)):
            break
        time.sleep(0.002)
    time.sleep(delay)
    partial = _partials(folder)
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10  # ranks under torchrun die a moment after it
    while alive and _group_lives(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return {
        "killed": alive,
        "last_step_logged": _last_step(folder),
        "during_save": bool(alive and (partial or _partials(folder))),
        "newest_checkpoint": next((s for s, _ in files.complete(folder / "checkpoints")), None),
    }


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _partials(folder: Path) -> list[str]:
    return [path.name for path in (folder / "checkpoints").glob(".step_*.partial")]


def _rows(folder: Path) -> dict[int, tuple[float, float]]:
    """step -> (loss, gradient norm) of every whole line; a kill may cut the last one short."""
    rows = {}
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "loss" in row:
            rows[row["step"]] = (row["loss"], row["grad_norm"])
    return rows


def _last_step(folder: Path) -> int:
    return max(_rows(folder), default=0)


def _wrong(rows: dict[int, tuple[float, float]], truth: dict[int, tuple[float, float]]) -> int:
    return sum(truth.get(step) != values for step, values in rows.items())


def _hashes(folder: Path) -> dict[str, Any]:
    _, newest = files.complete(folder / "checkpoints")[0]
    manifest = files.read_manifest(newest)
    return {name: entry for name, entry in manifest.files.items() if name.endswith(".distcp")}
