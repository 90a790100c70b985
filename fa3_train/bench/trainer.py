"""Whole training runs, one after the other: engines x linears on the sizes that people train.

    python -m fa3_train.bench trainer --engines torch --linears torch te_fp8 \\
        --backends sdpa hopper --steps 20 --out docs/results/trainer_gpu.json [key=value ...]

Each cell is what `python -m fa3_train recipe=...` runs (`Trainer`, on text), so it measures
everything that a user gets. Numbers are medians over the steps after the first `--skip`; losses are
of the first and the last step. A cell that fails is recorded with its error, and the exit code says
so. On CUDA, one step of each run of engine=torch is taken with synchronisation forbidden
(torch.cuda.set_sync_debug_mode), which proves that the loop never waits for the device inside a
step. Cells of one engine share a process; several processes (torchrun) measure several ranks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch

from fa3_train.bench.tables import add_cells, machine
from fa3_train.bench.timing import release_memory
from fa3_train.train.compose import load
from fa3_train.train.config_rules import check_combination
from fa3_train.train.engines import World, start_world, stop_world
from fa3_train.train.loop import Trainer
from fa3_train.train.signals import StopSignal

SIZES = {
    "tiny_gpu": ["recipe=tiny_gpu"],
    # Four layers of Llama 3.1 8B between its real embedding and head, which fit one GPU with
    # fp32 masters and moments; sequences of 8k tokens.
    "llama3_8b_layers": [
        "recipe=llama3_8b",
        "engine=torch",
        "model.num_layers=4",
        "model.activation_checkpointing=none",
        "data.global_batch=2",
        "optimizer.lr=1e-4",
        "run.gpus=0",
        "checkpoint.async_save=false",
    ],
}
ENGINES = {
    "torch": ["engine=torch"],
    "deepspeed": ["engine=deepspeed", "engine.zero_stage=1"],
    "deepspeed_fused_adam": [
        "engine=deepspeed",
        "engine.zero_stage=1",
        "engine.optimizer=fused_adam",
    ],
}
_FIXED = ["checkpoint=none", "run.eval_batches=0", "schedule.warmup_steps=5", "logging=quiet"]
_MEDIANS = (
    "step_ms",
    "forward_ms",
    "backward_ms",
    "optimizer_ms",
    "data_ms",
    "tokens_per_s",
    "tflops_per_gpu",
    "mfu_causal",
    "mfu_causal_mixed",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["torch", "deepspeed"])
    parser.add_argument("--linears", nargs="+", default=["torch", "te_fp8"])
    parser.add_argument("--backends", nargs="+", default=["sdpa"], help="attention.backend")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--skip", type=int, default=5, help="steps that no median counts")
    parser.add_argument("--out", type=Path, help="JSON file; cells of earlier calls are kept")
    parser.add_argument("words", nargs="*", help="key=value, as on the command line of a run")


def main(args: argparse.Namespace) -> int:
    cells: list[dict[str, Any]] = []
    world: World | None = None
    for size, linear, backend, engine in itertools.product(
        args.sizes, args.linears, args.backends, args.engines
    ):
        name = {"size": size, "engine": engine, "linear": linear, "backend": backend}
        words = [*SIZES[size], *ENGINES[engine], *_FIXED]
        words += [f"linear={linear}", f"attention={backend}"]
        words += [f"run.steps={args.steps}", f"logging.every={args.steps}", *args.words]
        try:
            cell, world = _measure(words, args.skip)
        except Exception as error:  # the other cells are worth having
            traceback.print_exc()
            cell = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        cells.append(name | {"words": words} | cell)
        if world is None or world.is_main:
            print(_line(cells[-1]), flush=True)
            if args.out:  # now: a cell that hangs must not take the others with it
                _write(args, cells)
        release_memory()
    stop_world()
    return int(any("error" in cell for cell in cells))


class _CheckedTrainer(Trainer):
    """Takes one step with device synchronisation forbidden, where the engine promises it."""

    sync_free: bool | None = None

    def advance(self) -> bool:
        checked = self.world.device.type == "cuda" and self.engine.name == "torch"
        if not checked or self.step != self.config.run.steps // 2:
            return super().advance()
        torch.cuda.set_sync_debug_mode("error")
        try:
            went_on = super().advance()
            self.sync_free = True
            return went_on
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _measure(words: list[str], skip: int) -> tuple[dict[str, Any], World]:
    with tempfile.TemporaryDirectory() as folder, StopSignal() as stop:
        config = load([*_last_wins(words), f"run.dir={folder}"])
        world = start_world(config)
        check_combination(config, world.size)
        trainer = _CheckedTrainer(config, world, stop)
        trainer.run()
        rows = []
        if world.is_main:
            lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
            rows = [row for row in map(json.loads, lines) if "loss" in row]
    return _summary(rows, skip) | {"no_host_sync_in_step": trainer.sync_free}, world


def _last_wins(words: list[str]) -> list[str]:
    return list({word.split("=", 1)[0]: word for word in words}.values())


def _summary(rows: list[dict[str, Any]], skip: int) -> dict[str, Any]:
    steady = rows[skip:]
    result: dict[str, Any] = {"steps": len(rows)}
    if not steady:
        return result
    for key in _MEDIANS:
        values = [row[key] for row in steady if row.get(key) is not None]
        if values:
            result[key] = statistics.median(values)
    shares = [row["attention_share"] for row in rows if row.get("attention_share") is not None]
    result["attention_share"] = shares[-1] if shares else None
    result["tokens_per_step"] = statistics.median(row["tokens"] for row in steady)
    result["peak_memory_gib"] = rows[-1]["peak_memory_gib"]
    result["loss_first"], result["loss_last"] = rows[0]["loss"], rows[-1]["loss"]
    result["losses"] = [row["loss"] for row in rows]
    return result


def _line(cell: dict[str, Any]) -> str:
    columns = {"size": 16, "engine": 20, "linear": 6, "backend": 9}
    head = " ".join(f"{cell[key]:<{width}}" for key, width in columns.items())
    if "error" in cell:
        return f"{head} {cell['error'][:150]}"
    mfu = cell.get("mfu_causal")
    return (
        f"{head} {cell['step_ms']:8.1f} ms  {cell['tokens_per_s']:9,.0f} tok/s  "
        f"{cell['tflops_per_gpu']:6.1f} TFLOP/s  mfu {'n/a' if mfu is None else f'{mfu:.1%}'}  "
        f"{cell['peak_memory_gib']:.1f} GiB  loss {cell['loss_first']:.3f} -> "
        f"{cell['loss_last']:.3f}  sync-free {cell['no_host_sync_in_step']}"
    )


def _write(args: argparse.Namespace, cells: list[dict[str, Any]]) -> None:
    result = {"machine": machine(), "command": args.command, "skip": args.skip}
    add_cells(args.out, result, cells, lambda cell: tuple(cell["words"]))
