"""Command line: `python -m fa3_train recipe=NAME key=value ...`.

Order of a run: words -> typed config -> combinations judged -> machine judged -> loop. Everything
up to the loop costs a second and touches no device, so a mistake never waits for a GPU. Under
torchrun every rank goes through the same checks and rank 0 speaks.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence

from fa3_train.train.compose import DEFAULT_RECIPE, groups, load, recipes
from fa3_train.train.config import ConfigError, TrainConfig
from fa3_train.train.config_rules import check_combination, check_machine, machine_complaints

USAGE = """\
usage: python -m fa3_train [recipe=NAME] [group=OPTION ...] [key=value ...]

  python -m fa3_train                                    train the default recipe, {default}
  python -m fa3_train recipe=llama3_8b dryrun=true       print what a run would be; needs no GPU
  torchrun --nproc-per-node=8 -m fa3_train recipe=llama3_8b data=text data.path='corpus/*.jsonl'
  python -m fa3_train recipe=tiny_gpu attention.backend=sdpa linear=te_fp8 run.steps=50
  python -m fa3_train --recipes                          list the recipes
  python -m fa3_train.doctor                             what this machine has and lacks

groups (conf/<group>/<option>.yaml):
{groups}

keys: every line that dryrun=true prints, e.g. data.seq_len=8192 optimizer.lr=1e-4;
      fa3_train/train/config.py documents them.
Recipes in ./recipes of the working folder are found too.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (2 for a wrong configuration)."""
    words = list(sys.argv[1:] if argv is None else argv)
    # DeepSpeed's launcher appends this; the environment says the same.
    words = [w for w in words if not re.fullmatch(r"--local[_-]rank=\d+", w)]
    rank = int(os.environ.get("RANK", "0"))
    # Read by OpenMP when torch loads. Threads that spin while they wait made a CPU run 4 times
    # slower on 2 cores that other processes used as well.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        if {"-h", "--help"} & set(words):
            print(help_text())
            return 0
        if "--version" in words:
            from fa3_train import __version__

            print(__version__)
            return 0
        if "--recipes" in words:
            print(recipe_table())
            return 0
        return run(load(words), rank)
    except ConfigError as error:
        if rank == 0:
            print(f"fa3_train: {error}", file=sys.stderr)
        return 2


def run(config: TrainConfig, rank: int = 0) -> int:
    """Checks `config`, then prints its plan (dryrun) or trains. Raises ConfigError."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if config.dryrun:
        from fa3_train.train import plan

        world_size = plan.plan_world(config, launched)
        check_combination(config, world_size)
        if rank == 0:
            print(plan.describe(config, world_size))
            for note in machine_complaints(config, _device(config)):
                print(f"note        {note}")
        return 0
    check_combination(config, launched)
    check_machine(config, _device(config))
    # What the package logs (which attention backend, and why) belongs beside the run's own lines.
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("fa3_train").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    from fa3_train.train.loop import run as train

    return train(config) or 0


def _device(config: TrainConfig) -> str:
    """The kind of device that this run gets here: "cpu" or "cuda"; creates no CUDA context."""
    if config.run.device == "cpu":
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def recipe_table() -> str:
    """One line per recipe: name, description, and the file of a recipe of the user's own."""
    found = recipes()
    width = max(len(name) for name in found)
    lines = []
    for name, item in sorted(found.items()):
        mark = " (default)" if name == DEFAULT_RECIPE else ""
        origin = "" if item.shipped else f"  [{item.path}]"
        lines.append(f"{name:<{width}}  {item.description}{mark}{origin}")
    return "\n".join(lines)


def help_text() -> str:
    lines = [f"  {group:<12} {', '.join(options)}" for group, options in groups().items()]
    return USAGE.format(default=DEFAULT_RECIPE, groups="\n".join(lines))
