"""For torchrun: short runs with several ranks on a sequence, and the gradients of their first step.

    torchrun --nproc-per-node=4 context_runs.py FOLDER NAME,word,word NAME,word ...

FOLDER/NAME/gradients.pt gets {parameter: whole gradient}. The runs do not clip; with torch's engine
AdamW's first moment, which after one step is (1 - beta1) times the gradient, tells it, DeepSpeed is
asked before its step.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tiny_runs import config
from torch.distributed.tensor import DTensor

from fa3_train.train.engines import leave, start_world, stop_world
from fa3_train.train.loop import Trainer
from fa3_train.train.signals import StopSignal


def first_gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Take one step; the gradients it used."""
    engine: Any = trainer.engine
    names = list(engine.model.named_parameters())
    if engine.name == "deepspeed":
        from deepspeed.utils import safe_get_full_grad

        found, step = {}, engine.engine.step

        def look_first() -> None:
            if engine.engine.is_gradient_accumulation_boundary():
                found.update({n: safe_get_full_grad(p).detach().clone() for n, p in names})
            step()

        engine.engine.step = look_first
        trainer.advance()
        engine.engine.step = step
        return found
    trainer.advance()
    scale = 1 - trainer.config.optimizer.beta1
    moments = {n: engine.optimizer.state[p]["exp_avg"] for n, p in engine.named.items()}
    whole = {n: m.full_tensor() if isinstance(m, DTensor) else m for n, m in moments.items()}
    return {name: moment / scale for name, moment in whole.items()}


def run(folder: Path, words: list[str]) -> None:
    settings = config(folder, *words)
    with StopSignal() as stop:
        world = start_world(settings)
        trainer = Trainer(settings, world, stop)
        found = first_gradients(trainer)
        if world.is_main:
            torch.save(found, folder / "gradients.pt")
        trainer.run()


def main() -> None:
    for argument in sys.argv[2:]:
        name, *words = argument.split(",")
        run(Path(sys.argv[1]) / name, words)
    stop_world()


if __name__ == "__main__":
    main()
    leave(0)
