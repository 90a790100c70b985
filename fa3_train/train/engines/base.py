"""The engine protocol: what the loop needs from whoever drives forward, backward and update.

An engine owns the model on its device, the optimizer and their state; it knows nothing of data,
metrics or files' names. One optimizer step is

    for each micro-batch:  loss = forward(batch);  backward(loss, first=, last=)
    step(lr, status)

`status` is one small fp32 vector on the device (slots below). `step` all-reduces loss and gradient
norm in it together, one collective for both. The host never waits for it inside the step; the loop
reads it later (status.py).

The guard: when the mean loss or the norm is not finite, the update is switched off on the device
in that same step, and stays off (`BLOCKED`), because the host, which runs ahead, has already queued
further steps when it learns of it. So whenever the loop stops, parameters and optimizer state are
those before the bad step.
"""

from __future__ import annotations

import abc
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from fa3_train.train.config import TrainConfig
from fa3_train.train.data import Batch
from fa3_train.train.engines.world import World

if TYPE_CHECKING:
    from fa3_train.train.context import ContextParallel

__all__ = ["BLOCKED", "LOSS", "NORM", "STATUS_SIZE", "Engine"]

# Slots of the status vector. On entry to `step` a rank's own contribution to a sum over ranks,
# on return the agreed value.
LOSS = 0  # mean loss of the step's micro-batches, already divided by the number of ranks
NORM = 1  # global gradient norm before clipping; filled by the engine
BLOCKED = 2  # > 0: the update was switched off; filled by the engine
STATUS_SIZE = 3


class Engine(abc.ABC):
    """Base of the engines. `model` is the bare module (for hooks and counting)."""

    name: ClassVar[str]
    async_save: ClassVar[bool] = False  # save_async is available
    # Parts of `describe()` that a checkpoint must share with the run that loads it.
    bound_to: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config = config
        self.world = world
        self.accumulation = config.grad_accum(world.size)
        self.model: nn.Module
        self.shapes: dict[str, list[int]] = {}  # of all parameters, as the model was built
        self.context: ContextParallel | None = None  # where ranks share sequences
        self._blocked = torch.zeros((), dtype=torch.bool, device=world.device)

    def setup(self, model: nn.Module) -> None:
        """Take over `model` (fp32 parameters): place, wrap, shard, build the optimizer."""
        # Before any wrapping: ZeRO-3 leaves empty tensors in the model.
        self.shapes = {name: list(param.shape) for name, param in model.named_parameters()}
        self._setup(model)

    @abc.abstractmethod
    def _setup(self, model: nn.Module) -> None:
        """The engine's part of `setup`."""

    @abc.abstractmethod
    def forward(self, batch: Batch) -> torch.Tensor:
        """Mean loss over the labels of one micro-batch (on the device), with its graph."""

    @abc.abstractmethod
    def backward(self, loss: torch.Tensor, *, first: bool, last: bool) -> None:
        """Accumulate gradients of loss / accumulation; `last` also starts their reduction."""

    @abc.abstractmethod
    def step(self, lr: float, status: torch.Tensor) -> torch.Tensor:
        """Reduce `status`, clip and update unless blocked; returns the agreed status vector."""

    @abc.abstractmethod
    def evaluate(self, batch: Batch) -> torch.Tensor:
        """Mean loss of one micro-batch without a graph."""

    @abc.abstractmethod
    def state_bytes(self) -> int:
        """Bytes that a checkpoint of all ranks together takes, roughly."""

    @abc.abstractmethod
    def save(self, folder: Path) -> None:
        """Write model and optimizer state; collective, every rank its part, into one folder."""

    def save_async(self, folder: Path) -> Future[Any]:
        """Copy the state aside and write it in the background; the future holds an error."""
        raise NotImplementedError(f"engine={self.name} cannot save in the background")

    @abc.abstractmethod
    def load(self, folder: Path, written_by: int) -> None:
        """Read what `save` wrote on `written_by` ranks, be they as many as now or not; collective.
        """

    def full_weight(self, parameter: torch.Tensor) -> torch.Tensor:
        """The whole of one of `model`'s parameters; collective where it is sharded."""
        return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter

    def rank_state(self) -> dict[str, torch.Tensor]:
        """Small state of this rank alone that `save` leaves out; belongs to the same world size."""
        return {}

    def load_rank_state(self, state: dict[str, torch.Tensor]) -> None:  # noqa: B027  (optional)
        """Take back what `rank_state` returned."""

    def describe(self) -> dict[str, Any]:
        """What a reader of the run's config wants to know about the engine."""
        return {"engine": self.name, "world_size": self.world.size, "accum": self.accumulation}

    def begin_diagnosis(self) -> None:  # noqa: B027  (optional)
        """The run is over; forward and backward are called again under hooks to find out why."""

    def close(self) -> None:  # noqa: B027  (optional)
        """Release what outlives the object (hooks, handles)."""

    # -- shared pieces ---------------------------------------------------------------------

    def _call(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        if self.context is not None:
            self.context.enter(batch)
        loss: torch.Tensor = module(
            batch.tokens,
            batch.labels,
            position_ids=batch.position_ids,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
        )
        return loss

    def _reduce(self, status: torch.Tensor) -> None:
        if self.world.size > 1:
            dist.all_reduce(status)

    def _block(self, status: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Fold loss and norm of this step into the sticky flag; returns it (0-dim bool)."""
        if self.config.run.guard:
            bad = ~(torch.isfinite(status[LOSS]) & torch.isfinite(norm))
            self._blocked = self._blocked | bad
        return self._blocked
