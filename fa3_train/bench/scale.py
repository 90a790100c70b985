"""How training scales over GPUs: throughput, MFU, exposed communication, peak memory.

    python -m fa3_train.bench scale --out docs/results/scale.json

starts `torchrun` once for each number of GPUs (1, 2, 4, 8, as far as this machine has them) and
runs every cell there. Cells are Llama-3-8B's layers, fewer of them so that one GPU can hold what it
is compared with:

    8k_fsdp2, 8k_zero3       8,192 tokens a sequence, one sequence on a GPU in a forward: the batch
                             grows with the GPUs (weak scaling); `--accumulation` of them make
                             a step (recipe llama3_8b: 16 on 8 GPUs)
    128k_ulysses, 128k_ring  one sequence of 131,072 tokens over all GPUs (strong scaling), FSDP2
    loss_*                   the recipe tiny_gpu on text, always the same global batch: its losses
                             beside those of one GPU, where two runs show what atomics do by
                             themselves

Every cell is what `python -m fa3_train` runs (`Trainer`). *Efficiency* is tokens/s per GPU over
that on one GPU; on one GPU FSDP2 and context parallelism are plain training. *Exposed
communication* is the part of a step in which NCCL kernels run and no other kernel does, from the
profiler's records of two steps that are not timed; time in which a GPU waits for another counts,
because it looks the same; of the ranks the one with most of it. Times are rank 0's, medians over
the steps after the first `--skip`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from fa3_train.bench.tables import add_cells, machine
from fa3_train.bench.timing import release_memory
from fa3_train.train.compose import load
from fa3_train.train.config_rules import check_combination
from fa3_train.train.engines import World, leave, start_world, stop_world
from fa3_train.train.loop import Trainer
from fa3_train.train.signals import StopSignal

_START = time.monotonic()
_PROFILED = 2  # steps at the end that the profiler sees

_FIXED = [
    "checkpoint=none",
    "checkpoint.async_save=false",
    "logging=quiet",
    "logging.attention_every=0",
    "run.eval_batches=0",
    "run.gpus=0",
    "schedule.warmup_steps=5",
]
_LAYERS = ["recipe=llama3_8b", "data=random", "optimizer.lr=1e-4"]
_SHORT = [
    *_LAYERS,
    "data.seq_len=8192",
    "data.micro_batch=1",
    "model.activation_checkpointing=selective",
]
# The vocabulary shrinks with the number of layers: at its full size the head would be most of it.
_LONG = [
    *_LAYERS,
    "data.seq_len=131072",
    "data.micro_batch=1",
    "model.activation_checkpointing=selective",
    "model.vocab_size=16384",
    "parallel=context",
    "engine=fsdp2",
]
CELLS = {
    "8k_fsdp2": [*_SHORT, "engine=fsdp2"],
    "8k_zero3": [*_SHORT, "engine=deepspeed", "engine.zero_stage=3"],
    "128k_ulysses": [*_LONG, "parallel.method=ulysses"],
    "128k_ring": [*_LONG, "parallel.method=ring"],
    "loss_ddp": ["recipe=tiny_gpu"],
    "loss_fsdp2": ["recipe=tiny_gpu", "engine=fsdp2"],
    "loss_zero3": ["recipe=tiny_gpu", "engine=deepspeed", "engine.zero_stage=3"],
    "loss_ulysses": ["recipe=tiny_gpu", "engine=fsdp2", "parallel=context"],
    "loss_ring": ["recipe=tiny_gpu", "engine=fsdp2", "parallel=context", "parallel.method=ring"],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--gpus", nargs="+", type=int, help="default: 1, 2, 4, 8 as available")
    parser.add_argument("--layers", type=int, default=8, help="of the 8k cells")
    parser.add_argument("--long-layers", type=int, default=2, help="of the 128k cells")
    parser.add_argument("--accumulation", type=int, default=4, help="of the 8k cells")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--long-steps", type=int, default=7)
    parser.add_argument("--loss-steps", type=int, default=40)
    parser.add_argument("--skip", type=int, default=3, help="steps that no median counts")
    parser.add_argument("--attention", default="hopper", help="conf/attention option")
    parser.add_argument("--out", type=Path, help="JSON file; cells of earlier calls are kept")
    parser.add_argument("--words", nargs="*", default=[], help="more key=value for every cell")


def main(args: argparse.Namespace) -> int:
    if "RANK" in os.environ:
        return _worker(args)
    available = torch.cuda.device_count()
    gpus = args.gpus or [n for n in (1, 2, 4, 8) if n <= available]
    if available and max(gpus) > available:
        raise SystemExit(f"--gpus {max(gpus)}: this machine has {available}")
    failed = False
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]  # torchrun
    alone = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    for count in gpus:
        start = [*launcher, f"--nproc-per-node={count}"] if count > 1 else [sys.executable]
        command = [*start, "-m", "fa3_train.bench", *sys.argv[1:]]
        done = subprocess.run(command, check=False, env=alone if count == 1 else None)
        failed |= done.returncode != 0
    if args.out and args.out.exists():
        cells = json.loads(args.out.read_text())["cells"]
        print("\n\n".join(filter(None, [table(cells), loss_table(cells)])))
    return int(failed)


def _words(name: str, gpus: int, args: argparse.Namespace) -> list[str]:
    kind = name.split("_")[0]
    steps = {"8k": args.steps, "128k": args.long_steps, "loss": args.loss_steps}[kind]
    sizes = {
        "8k": [
            f"model.num_layers={args.layers}",
            f"data.global_batch={gpus * args.accumulation}",
        ],
        "128k": [f"model.num_layers={args.long_layers}", "data.global_batch=1"],
        "loss": [],
    }
    return [
        *_FIXED,
        *CELLS[name],
        f"attention={args.attention}",
        *sizes[kind],
        f"run.steps={steps}",
        f"logging.every={steps}",
        *args.words,
    ]


def _worker(args: argparse.Namespace) -> int:
    cells: list[dict[str, Any]] = []
    gpus = int(os.environ["WORLD_SIZE"])
    world: World | None = None
    for name in args.cells:
        words = _words(name, gpus, args)
        try:
            cell, world = _measure(words, args.skip)
        except Exception as error:  # the same on all ranks, or the launcher ends them
            traceback.print_exc()
            cell = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        cells.append({"cell": name, "gpus": gpus} | cell | {"words": words})
        if int(os.environ["RANK"]) == 0:
            print(_line(cells[-1]), flush=True)
            if args.out:  # now: a cell that hangs must not take the others with it
                _write(args, cells)
        release_memory()
    stop_world()
    leave(int(any("error" in cell for cell in cells)))


class _ProfiledTrainer(Trainer):
    """Records the kernels of the last steps."""

    kernels: list[tuple[str, int, int]]  # name, start and end in ns

    def _train(self) -> None:
        steps = self.config.run.steps
        while self.step < steps - _PROFILED:
            self.advance()
        self._read_statuses(drain=True)
        activities = [torch.profiler.ProfilerActivity.CUDA]
        if self.world.device.type == "cpu":
            activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profiler:
            while self.step < steps:
                self.advance()
            self._read_statuses(drain=True)
            if self.world.device.type == "cuda":
                torch.cuda.synchronize()
        results = profiler.profiler.kineto_results
        self.kernels = [
            (event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
            for event in results.events()
            if event.device_type() == torch.autograd.DeviceType.CUDA and event.duration_ns() > 0
        ]


def _measure(words: list[str], skip: int) -> tuple[dict[str, Any], World]:
    stop = StopSignal()  # not entered: a signal ends a benchmark
    with tempfile.TemporaryDirectory() as folder:
        latest = {word.split("=", 1)[0]: word for word in words}
        config = load([*latest.values(), f"run.dir={folder}"])
        world = start_world(config)
        check_combination(config, world.size)
        trainer = _ProfiledTrainer(config, world, stop)
        trainer.run()
        rows: list[dict[str, Any]] = []
        if world.is_main:
            lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
            rows = [row for row in map(json.loads, lines) if "loss" in row]
    own = communication(trainer.kernels)
    shares = [share for share in world.gather(own) if share is not None]
    result = _summary(rows[skip:-_PROFILED]) | {"losses": [row["loss"] for row in rows]}
    return result | _slowest(shares), world


def communication(kernels: list[tuple[str, int, int]]) -> dict[str, float] | None:
    """Shares of the time from the first to the last kernel: in NCCL's, and in those alone.

    `kernels`: (name, start, end). A kernel is NCCL's by its name; copies and fills count as the
    others. None without any kernel.
    """
    if not kernels:
        return None
    ours = _union([(a, b) for name, a, b in kernels if name.startswith("nccl")])
    others = _union([(a, b) for name, a, b in kernels if not name.startswith("nccl")])
    total = max(b for _, _, b in kernels) - min(a for _, a, _ in kernels)
    busy = sum(b - a for a, b in ours)
    hidden = _overlap(ours, others)
    idle = total - sum(b - a for a, b in _union(ours + others))
    return {
        "communication_share": busy / total,
        "exposed_share": (busy - hidden) / total,
        "idle_share": idle / total,
    }


def _union(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint spans in order that cover the same time."""
    result: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def _overlap(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> int:
    """Time that both lists of disjoint, ordered spans cover."""
    i = j = total = 0
    while i < len(a) and j < len(b):
        total += max(0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


def _slowest(shares: list[dict[str, float]]) -> dict[str, float]:
    """The rank with the most exposed communication."""
    return max(shares, key=lambda share: share["exposed_share"], default={})


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    keys = ("step_ms", "forward_ms", "backward_ms", "optimizer_ms", "tokens_per_s_per_gpu",
            "tflops_per_gpu", "mfu_causal")  # fmt: skip
    result: dict[str, Any] = {}
    if not rows:
        return result
    for key in keys:
        values = [row[key] for row in rows if row.get(key) is not None]
        result[key] = statistics.median(values) if values else None
    result["tokens_per_step"] = rows[-1]["tokens"]
    result["peak_memory_gib"] = rows[-1]["peak_memory_gib"]
    return result


def _line(cell: dict[str, Any]) -> str:
    head = f"{time.monotonic() - _START:5.0f} s  {cell['cell']:<13} {cell['gpus']} GPU"
    if "error" in cell:
        return f"{head}  {cell['error'][:200]}"
    return f"{head}  " + ", ".join(
        f"{key} {cell[key]:.4g}" for key in cell if isinstance(cell[key], float)
    )


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown: one row for each cell and number of GPUs."""
    cells = [c for c in cells if not c["cell"].startswith("loss")]
    if not cells:
        return ""
    alone = {c["cell"]: c.get("tokens_per_s_per_gpu") for c in cells if c["gpus"] == 1}
    alone.setdefault("128k_ring", alone.get("128k_ulysses"))  # the same thing on one GPU
    lines = [
        "| run | GPUs | step ms | tokens/s per GPU | efficiency | MFU | exposed communication | "
        "communication | idle | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in sorted(cells, key=lambda c: (list(CELLS).index(c["cell"]), c["gpus"])):
        if "error" in cell:
            lines.append(f"| {cell['cell']} | {cell['gpus']} | {cell['error'][:80]} |||||||||")
            continue
        one, here = alone.get(cell["cell"]), cell["tokens_per_s_per_gpu"]
        shares = [
            _percent(cell.get(key))
            for key in ("exposed_share", "communication_share", "idle_share")
        ]
        lines.append(
            f"| {cell['cell']} | {cell['gpus']} | {cell['step_ms']:.1f} | {here:,.0f} | "
            f"{_percent(here / one if one else None)} | {_percent(cell['mfu_causal'])} | "
            f"{' | '.join(shares)} | {cell['peak_memory_gib']:.1f} |"
        )
    return "\n".join(lines)


def loss_table(cells: list[dict[str, Any]]) -> str:
    """Markdown: losses of the `loss_*` cells beside the first such run on one GPU."""
    cells = [c for c in cells if c["cell"].startswith("loss") and c.get("losses")]
    cells.sort(key=lambda c: (c["gpus"], list(CELLS).index(c["cell"])))
    if not cells or cells[0]["gpus"] != 1:
        return ""
    one = cells[0]["losses"]
    lines = [
        f"| run | GPUs | loss of step 1 | of step {len(one)} | largest difference | mean |",
        "|---|---|---|---|---|---|",
    ]
    for cell in cells:
        apart = [abs(a - b) for a, b in zip(cell["losses"], one, strict=True)]
        lines.append(
            f"| {cell['cell']} | {cell['gpus']} | {cell['losses'][0]:.5f} | "
            f"{cell['losses'][-1]:.5f} | {max(apart):.1e} | {sum(apart) / len(apart):.1e} |"
        )
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1%}"


def _write(args: argparse.Namespace, cells: list[dict[str, Any]]) -> None:
    result = {"machine": machine(), "command": args.command, "skip": args.skip}
    add_cells(args.out, result, cells, lambda cell: (cell["cell"], cell["gpus"]))
