"""What watching a run costs: step times with all logging on, and with none, in one run.

    python -m fa3_train.bench logging --out docs/results/logging recipe=tiny_gpu [key=value ...]

One `Trainer`; blocks of steps alternate between two states. "on" is everything that a run can have:
events around the phases of every step, a sample of the attention share, metrics.jsonl, wandb
offline, TensorBoard and a line of text, at the recipe's `logging.every`. "off" has no meter and no
logger: nothing is recorded, read back or written. A block begins and ends with a device
synchronisation, so what logging does on the host counts as far as the device has to wait for it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fa3_train.bench.tables import machine
from fa3_train.train.compose import load
from fa3_train.train.config_rules import check_combination
from fa3_train.train.engines import start_world, stop_world
from fa3_train.train.loop import Trainer
from fa3_train.train.signals import StopSignal

_FIXED = (
    "checkpoint=none", "run.eval_batches=0", "logging=full", "logging.wandb=offline",
    "logging.progress=plain",
)  # fmt: skip


class _Blind:
    """Stands where the meter and the logger stand, and does nothing."""

    tokens_seen = 0

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def flush(self) -> list[dict[str, Any]]:
        return []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def measure(words: list[str], rounds: int) -> dict[str, Any]:
    """Seconds of every block in both states; a block is a whole number of log intervals."""
    with tempfile.TemporaryDirectory() as folder, StopSignal() as stop:
        config = load([*_FIXED, *words, f"run.dir={folder}", "run.steps=1000000"])
        world = start_world(config)
        check_combination(config, world.size)
        every = config.logging.every
        # A block holds one sample of the attention share, as dense as it ever gets.
        if config.logging.attention_every % every:
            raise SystemExit(
                "bench logging: logging.attention_every must be a multiple of logging.every, got "
                f"{config.logging.attention_every} and {every}"
            )
        block = config.logging.attention_every or every
        trainer = Trainer(config, world, stop)
        seeing = (trainer.meter, trainer.logger)
        blind: Any = _Blind()
        seconds: dict[str, list[float]] = {"on": [], "off": []}

        def run_block(state: str) -> float:
            trainer.meter, trainer.logger = seeing if state == "on" else (blind, blind)
            trainer.meter.restart()
            _synchronize(world.device)
            begin = time.perf_counter()
            for _ in range(block):
                if not trainer.advance():
                    raise SystemExit("bench logging: told to stop before it was done")
            _synchronize(world.device)
            return time.perf_counter() - begin

        with contextlib.redirect_stdout(io.StringIO()):
            run_block("on")  # compiles, allocates, opens files
            for index in range(rounds):
                for state in ("on", "off") if index % 2 else ("off", "on"):
                    seconds[state].append(run_block(state))
            trainer.meter, trainer.logger = seeing
            for part in (trainer.logger, trainer.data, trainer.checkpointer, trainer.engine):
                part.close()
    cost = [on / off - 1 for on, off in zip(seconds["on"], seconds["off"], strict=True)]
    return {
        "what": "logging", "machine": machine(), "recipe": config.recipe, "block_steps": block,
        "every": every, "seconds": seconds, "cost": statistics.median(cost), "costs": cost,
        "step_ms": 1e3 * statistics.median(seconds["on"]) / block,
    }  # fmt: skip


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def text(result: dict[str, Any]) -> str:
    """One line."""
    low, high = min(result["costs"]), max(result["costs"])
    return (
        f"{result['recipe']}: logging costs {result['cost']:.2%} of a step of "
        f"{result['step_ms']:.1f} ms ({low:.2%} to {high:.2%} over {len(result['costs'])} pairs of "
        f"blocks of {result['block_steps']} steps, a log line every {result['every']})"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", help="recipe=NAME key=value ..., as for fa3_train")
    parser.add_argument("--rounds", type=int, default=6, help="pairs of blocks")
    parser.add_argument("--out", help="path without suffix: writes .json")


def main(args: argparse.Namespace) -> int:
    result = measure(args.words, args.rounds)
    stop_world()
    result["command"] = args.command
    print(text(result))
    if args.out:
        out = Path(f"{args.out}.json")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    return 0
