"""For torchrun: a run whose model is built on the meta device and drawn shard by shard."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_runs import config

from fa3_train.train import loop
from fa3_train.train.engines import leave, start_world, stop_world
from fa3_train.train.signals import StopSignal


def main() -> None:
    loop._born_sharded = lambda settings, world: True
    settings = config(Path(sys.argv[1]), "engine=fsdp2", "model.tie_embeddings=false")
    with StopSignal() as stop:
        trainer = loop.Trainer(settings, start_world(settings), stop)
    for name, param in trainer.engine.model.named_parameters():
        whole = param.full_tensor()
        copies = [torch.empty_like(whole) for _ in range(2)]
        dist.all_gather(copies, whole)
        assert torch.equal(*copies), name
        if whole.ndim == 2:
            assert 0.001 < whole.std() < 0.03, (name, whole.std())
        else:
            assert torch.equal(whole, torch.ones_like(whole)), name
    trainer.run()
    stop_world()


if __name__ == "__main__":
    main()
    leave(0)
