"""Training loop against a bare PyTorch loop around the same model.

    python -m fa3_train.bench loop --rounds 10 --block 10 recipe=quickstart [key=value ...]

Ours is `Trainer.advance` with everything that a run has on: data loader, guard, step meter with its
attention samples, metrics.jsonl and the loggers of the recipe. The bare loop is what one writes in
a notebook: forward, backward, clip_grad_norm_, fused AdamW, zero_grad, on batches that already lie
on the device (in bf16 with fp32 master weights, as ours). Both see the same batches in the same
order from the same initial weights, and alternate in blocks, so that clocks, temperature and
neighbours hit both alike. A block ends with a device synchronisation.

The last losses are compared too: two loops that do different work cannot be compared by speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fa3_train.bench.tables import machine
from fa3_train.train.compose import load
from fa3_train.train.config import TrainConfig
from fa3_train.train.config_rules import check_combination
from fa3_train.train.data import Batch
from fa3_train.train.data.build import build_data
from fa3_train.train.engines import World, start_world, stop_world
from fa3_train.train.loop import Trainer, build_model
from fa3_train.train.schedule import learning_rate
from fa3_train.train.signals import StopSignal

# What a comparison of loops is not about.
_FIXED = ("checkpoint=none", "run.eval_batches=0", "logging.progress=off", "logging.plots=false")
WARMUP_BLOCKS = 1


class BareLoop:
    """The shortest loop that trains the same model the same way."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config = config
        torch.manual_seed(config.run.seed)
        self.model = build_model(config, world)
        self.params = list(self.model.parameters())
        self.masters = self.params
        if config.precision.compute == "bf16":
            self.masters = [torch.nn.Parameter(p.detach().clone()) for p in self.params]
            for param in self.params:
                param.data = param.data.bfloat16()
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.masters,
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def step(self, number: int, batches: list[Batch]) -> torch.Tensor:
        """One optimizer step; returns its mean loss, still on the device."""
        total = torch.zeros((), device=batches[0].tokens.device)
        for batch in batches:
            loss = self.model(
                batch.tokens,
                batch.labels,
                position_ids=batch.position_ids,
                cu_seqlens=batch.cu_seqlens,
                max_seqlen=batch.max_seqlen,
            )
            (loss / len(batches)).backward()
            total += loss.detach()
        if self.masters is not self.params:
            for master, param in zip(self.masters, self.params, strict=True):
                master.grad = param.grad.float()
                param.grad = None
        if self.config.optimizer.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.masters, self.config.optimizer.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, self.config)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.masters is not self.params:
            with torch.no_grad():
                torch._foreach_copy_(self.params, self.masters)
        return total / len(batches)


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(words: list[str], rounds: int, block: int) -> dict[str, Any]:
    """Alternates blocks of both loops; returns seconds per round, the ratio and last losses.

    Raises ConfigError for a configuration that is not for one process of engine=torch.
    """
    steps = (rounds + WARMUP_BLOCKS) * block
    with tempfile.TemporaryDirectory() as folder, StopSignal() as stop:
        config = load([*words, *_FIXED, f"run.steps={steps}", f"run.dir='{folder}'"])
        check_combination(config)
        if config.engine.name != "torch":
            raise SystemExit("bench loop: the bare loop is for engine=torch in one process")
        world = start_world(config)
        try:
            return _alternate(config, world, stop, rounds, block)
        finally:
            stop_world()


def _alternate(
    config: TrainConfig, world: World, stop: StopSignal, rounds: int, block: int
) -> dict[str, Any]:
    trainer = Trainer(config, world, stop)
    bare = BareLoop(config, world)
    data = build_data(config.data, vocab_size=config.model.vocab_size, seed=config.run.seed)
    accumulation = config.grad_accum(1)
    ours_s, bare_s, losses = [], [], []
    number = 0
    for round_ in range(rounds + WARMUP_BLOCKS):
        batches = [
            [next(data.train).to(world.device) for _ in range(accumulation)] for _ in range(block)
        ]

        def run_ours() -> float:
            trainer.meter.restart()
            _sync(world.device)
            begin = time.perf_counter()
            for _ in range(block):
                trainer.advance()
            _sync(world.device)
            return time.perf_counter() - begin

        def run_bare(batches: list[list[Batch]] = batches, first: int = number + 1) -> float:
            _sync(world.device)
            begin = time.perf_counter()
            for offset, step_batches in enumerate(batches):
                loss = bare.step(first + offset, step_batches)
            losses.append(float(loss))  # the host sync of a log line
            _sync(world.device)
            return time.perf_counter() - begin

        # Who goes first takes turns.
        if round_ % 2:
            took_ours, took_bare = run_ours(), run_bare()
        else:
            took_bare, took_ours = run_bare(), run_ours()
        number += block
        if round_ >= WARMUP_BLOCKS:
            ours_s.append(took_ours)
            bare_s.append(took_bare)
    trainer.logger.close()
    data.close()
    records = [
        json.loads(line)
        for line in (Path(config.run_dir()) / "metrics.jsonl").read_text().splitlines()
    ]
    ours_loss = [row["loss"] for row in records if "event" not in row][-1]
    tokens = block * config.tokens_per_step()
    ratios = [b / a for a, b in zip(ours_s, bare_s, strict=True)]
    return {
        "what": "loop",
        "machine": machine(),
        "recipe": config.recipe,
        "config": config.to_dict(),
        "block_steps": block,
        "ours_s": ours_s,
        "bare_s": bare_s,
        "ours_tokens_per_s": tokens / statistics.median(ours_s),
        "bare_tokens_per_s": tokens / statistics.median(bare_s),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios,
        "last_loss": {"ours": ours_loss, "bare": losses[-1]},
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", help="recipe=NAME key=value ..., as for fa3_train")
    parser.add_argument("--rounds", type=int, default=10, help="timed blocks of each loop")
    parser.add_argument("--block", type=int, default=10, help="steps in a block")
    parser.add_argument("--limit", type=float, help="exit 1 if ours is slower by more: 0.03")
    parser.add_argument("--out", help="write the result as JSON")


def main(args: argparse.Namespace) -> int:
    result = compare(args.words, args.rounds, args.block)
    result["command"] = args.command
    low, _, high = (*result["ratio_quartiles"], 0, 0)[:3]
    print(
        f"ours {result['ours_tokens_per_s']:,.0f} tok/s, bare {result['bare_tokens_per_s']:,.0f} "
        f"tok/s, ratio {result['ratio']:.4f} (quartiles {low:.4f} to {high:.4f}) over "
        f"{args.rounds} blocks of {args.block} steps on {result['machine'].get('gpu', 'CPU')}\n"
        f"last loss: ours {result['last_loss']['ours']:.6f}, bare {result['last_loss']['bare']:.6f}"
    )
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(args.limit is not None and result["ratio"] < 1 - args.limit)
