"""Several tiny runs in one launch (starting processes costs more than training): for torchrun.

    torchrun --nproc-per-node=2 many_runs.py FOLDER NAME,word,word NAME,word ...

Each NAME becomes a run in FOLDER/NAME, all in one process group.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tiny_runs import config

from fa3_train.train.engines import leave, start_world, stop_world
from fa3_train.train.loop import Trainer
from fa3_train.train.signals import StopSignal


def main() -> None:
    folder = Path(sys.argv[1])
    for argument in sys.argv[2:]:
        name, *words = argument.split(",")
        settings = config(folder / name, *words)
        with StopSignal() as stop:
            Trainer(settings, start_world(settings), stop).run()
    stop_world()


if __name__ == "__main__":
    main()
    leave(0)
