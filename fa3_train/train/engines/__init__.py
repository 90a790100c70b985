"""Engines: who drives forward, backward and update. One file each; deepspeed is imported only in
its own."""

from __future__ import annotations

from fa3_train.train.config import TrainConfig
from fa3_train.train.engines.base import Engine
from fa3_train.train.engines.world import World, leave, start_world, stop_world

__all__ = ["Engine", "World", "create_engine", "leave", "start_world", "stop_world"]


def create_engine(config: TrainConfig, world: World) -> Engine:
    """The engine that `engine.name` names; call `setup(model)` next."""
    if config.engine.name == "deepspeed":
        from fa3_train.train.engines.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(config, world)
    from fa3_train.train.engines.torch_engine import TorchEngine

    return TorchEngine(config, world)
