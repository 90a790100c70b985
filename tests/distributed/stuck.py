"""For torchrun: a run in which rank 1 stands still in the forward of step 3."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tiny_runs import config

from fa3_train.train import loop
from fa3_train.train.config import TrainConfig
from fa3_train.train.engines import World, leave

BUILD = loop.build_model


def build_stuck(settings: TrainConfig, world: World):
    model = BUILD(settings, world)
    calls = 0

    def stand_still(module, args):
        nonlocal calls
        calls += module.training
        if world.rank == 1 and calls == 5:  # two micro-batches a step
            time.sleep(600)

    model.layers[1].mlp.register_forward_pre_hook(stand_still)
    return model


if __name__ == "__main__":
    loop.build_model = build_stuck
    leave(loop.run(config(Path(sys.argv[1]), *sys.argv[2:])))
