"""For torchrun: runs in which rank 1 alone computes a NaN in step 3, then the same without it.

    torchrun --nproc-per-node=2 bad_steps.py FOLDER NAME,word,word NAME,word ...

The error's text of rank r goes to FOLDER/NAME/error_r.txt; the second run resumes the first.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tiny_runs import config

from fa3_train.train import loop
from fa3_train.train.config import TrainConfig
from fa3_train.train.engines import World, leave, start_world, stop_world
from fa3_train.train.guard import NonFiniteError
from fa3_train.train.signals import StopSignal

BUILD = loop.build_model


def build_bad(settings: TrainConfig, world: World):
    """Two micro-batches a step on each rank: the fifth call in training is step 3."""
    model = BUILD(settings, world)
    calls = 0

    def count(module, args):
        nonlocal calls
        calls += module.training

    def poison(module, args, output):
        if world.rank == 1 and calls >= 5:
            output = output.clone()
            output.view(-1)[7] = float("nan")
        return output

    model.register_forward_pre_hook(count)
    model.layers[0].mlp.register_forward_hook(poison)
    return model


def main() -> None:
    folder = Path(sys.argv[1])
    for argument in sys.argv[2:]:
        name, *words = argument.split(",")
        settings = config(folder / name, *words, "checkpoint.every=1")
        with StopSignal() as stop:
            world = start_world(settings)
            loop.build_model = build_bad
            try:
                loop.Trainer(settings, world, stop).run()
            except NonFiniteError as error:
                (folder / name / f"error_{world.rank}.txt").write_text(str(error))
            loop.build_model = BUILD
            loop.Trainer(settings, world, stop).run()
            loop.Trainer(config(folder / f"{name}-whole", *words), world, stop).run()
    stop_world()


if __name__ == "__main__":
    main()
    leave(0)
