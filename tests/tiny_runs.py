"""Smallest runs that still have everything: two layers, grouped heads, documents, accumulation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fa3_train.train.compose import load
from fa3_train.train.config import TrainConfig

WORDS = (
    "run.device=cpu",
    "run.steps=6",
    "run.eval_batches=2",
    "schedule.warmup_steps=2",
    "logging=quiet",
    "logging.every=1",
    "logging.attention_every=0",
    "precision=fp32",
    "attention=sdpa",
    "data=random",
    "data.random_doc_len=20",
    "data.seq_len=32",
    "data.micro_batch=2",
    "data.global_batch=8",
    "model.vocab_size=96",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.head_dim=8",
    "model.ffn_hidden_size=64",
    "optimizer.clip_norm=0.3",  # below the usual norm here, so that clipping takes part
    "checkpoint.every=2",
    "checkpoint.keep=10",
)


@pytest.fixture(autouse=True)
def one_thread():
    """For modules that import it: threads only get into each other's way in matrices this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def words(folder: Path, *more: str) -> list[str]:
    """Command-line words of a tiny run in `folder`; later words win."""
    return [*WORDS, f"run.dir={folder}", *more]


def config(folder: Path, *more: str) -> TrainConfig:
    chosen: dict[str, str] = {}
    for word in words(folder, *more):
        key, value = word.split("=", 1)
        chosen.pop(key, None)
        chosen[key] = value
    return load([f"{key}={value}" for key, value in chosen.items()])


def records(folder: Path) -> dict[int, dict]:
    """step -> record of metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["step"]: row for row in rows if "loss" in row}


def losses(folder: Path) -> dict[int, tuple[float, float]]:
    """step -> (loss, gradient norm); JSON keeps every bit of a double."""
    return {step: (row["loss"], row["grad_norm"]) for step, row in records(folder).items()}


def evaluations(folder: Path) -> list[float]:
    """Validation losses in order."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["val_loss"] for row in rows if row.get("event") == "eval"]


def loss_tensor(folder: Path) -> torch.Tensor:
    rows = losses(folder)
    return torch.tensor([rows[step][0] for step in sorted(rows)], dtype=torch.float32)


def launch(command: list[str], *, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a command of this environment (`torchrun`, `deepspeed`, `python`) to its end."""
    return subprocess.run(
        [str(Path(sys.executable).parent / command[0]), *command[1:]],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(),
        check=False,
    )


def environment() -> dict[str, str]:
    """One thread a process, this checkout and this environment's tools first."""
    root = Path(__file__).resolve().parent.parent
    env = dict(os.environ)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    env["OMP_NUM_THREADS"] = "1"
    own = [str(root), str(root / "tests")]
    env["PYTHONPATH"] = os.pathsep.join([*own, *filter(None, [env.get("PYTHONPATH")])])
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    return env


def torchrun(count: int, *arguments: str) -> list[str]:
    """A torchrun command line on a free port of its own."""
    return ["torchrun", "--standalone", f"--nproc-per-node={count}", *arguments]


def spawn(command: list[str]) -> subprocess.Popen[str]:
    """Leave a command of this environment running; its output in one pipe."""
    return subprocess.Popen(
        [str(Path(sys.executable).parent / command[0]), *command[1:]],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
