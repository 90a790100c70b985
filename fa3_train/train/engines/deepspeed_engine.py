"""engine=deepspeed: ZeRO 0-3 under DeepSpeed's own engine. The only file that imports deepspeed.

Who does what: DeepSpeed partitions, reduces, clips, keeps fp32 masters of bf16 weights and writes
its own checkpoint; learning rate, data position, metrics and checkpoint commit are the loop's, as
for engine=torch. Activation checkpointing is the model's own (torch's), which works under every
stage, so DeepSpeed's reentrant one is not used.

The guard. DeepSpeed itself skips an update whose gradient norm is not finite (ZeRO >= 1 and bf16),
at the price of one host read per step that it makes anyway; the non-finite *loss* with finite
gradients, and fp32 at stage 0, are caught on the device by GuardedAdamW. DeepSpeed's FusedAdam
kernel has no such switch, so with `engine.optimizer=fused_adam` the loss is read on the host
before the update.

Start it with torchrun, with DeepSpeed's launcher (`deepspeed --module fa3_train ...`), or alone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fa3_train.train.config import ConfigError, TrainConfig
from fa3_train.train.data import Batch
from fa3_train.train.engines.base import BLOCKED, LOSS, NORM, Engine
from fa3_train.train.engines.optimizer import GuardedAdamW, decay_groups, sum_of_squares
from fa3_train.train.engines.world import World

__all__ = ["DeepSpeedEngine", "architectures", "deepspeed_config"]

_TAG = "deepspeed"  # name of the one folder inside our checkpoint folder


def deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`; needs no deepspeed, so a dry run can print it."""
    engine = config.engine
    bf16 = config.precision.compute == "bf16"
    if config.precision.params == "bf16":
        raise ConfigError(
            "engine=deepspeed keeps fp32 master weights: precision.params must be fp32, got bf16"
        )
    ours_clips = engine.zero_stage == 0 and not bf16  # see DeepSpeedEngine.step
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "overlap_comm": engine.overlap_comm,
        "contiguous_gradients": True,
    }
    if engine.zero_stage == 0:
        zero = {"stage": 0}
    if engine.offload_optimizer:
        if engine.zero_stage == 0:
            raise ConfigError("engine.offload_optimizer=true needs engine.zero_stage >= 1, got 0")
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.data.micro_batch,
        "gradient_accumulation_steps": config.grad_accum(world_size),
        # DeepSpeed knows no ranks that share a sequence, and checks the product.
        "train_batch_size": config.data.global_batch * config.context_ranks(world_size),
        "gradient_clipping": 0.0 if ours_clips else config.optimizer.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # it would build DeepSpeed's CPU Adam
        "bf16": {"enabled": bf16},
        "steps_per_print": 1 << 60,  # the run's own logger prints
        "wall_clock_breakdown": False,
    }
    if bf16 and config.precision.reduce == "fp32":
        result["communication_data_type"] = "fp32"
        if engine.zero_stage >= 1:
            result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result


class DeepSpeedEngine(Engine):
    """See the module docstring."""

    name = "deepspeed"
    bound_to = ("zero_stage", "compute")

    def __init__(self, config: TrainConfig, world: World) -> None:
        super().__init__(config, world)
        self._settings = deepspeed_config(config, world.size)
        self._ds = _import_deepspeed(config, world)

    def _setup(self, model: nn.Module) -> None:
        self.stage = self.config.engine.zero_stage
        self.bf16 = self.config.precision.compute == "bf16"
        self.model = model.to(self.world.device)
        self._numel = sum(p.numel() for p in model.parameters())
        names = dict(self.model.named_parameters())
        groups = decay_groups(names.items(), self.config.optimizer.weight_decay)
        self._guarded: GuardedAdamW | None = None
        if self.config.engine.optimizer == "fused_adam":
            optimizer = _fused_adam(groups, self.config, self.world)
        else:
            optimizer = self._guarded = GuardedAdamW(groups, self.config.optimizer)
        with _quiet():
            self.engine, *_ = self._ds.initialize(
                model=self.model,
                optimizer=optimizer,
                config=self._settings,
                dist_init_required=False,
            )
        self.engine.train()
        self._hyperparameters = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.engine.optimizer.param_groups
        ]

    def forward(self, batch: Batch) -> torch.Tensor:
        return self._call(self.engine, batch)

    def backward(self, loss: torch.Tensor, *, first: bool, last: bool) -> None:
        self.engine.backward(loss)  # divides by the accumulation itself
        if not last:
            self.engine.step()  # only counts the micro-batch

    def step(self, lr: float, status: torch.Tensor) -> torch.Tensor:
        self._reduce(status)
        loss_ok = torch.isfinite(status[LOSS])
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        norm = None
        if self.stage == 0 and not self.bf16:
            # DeepSpeed would clip without telling the norm, and would not look at it.
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            norm = sum_of_squares(gradients).sqrt()
        if self._guarded is not None:
            self._set_guard(status, norm)
            self.engine.step()
        else:
            self._step_unguarded(bool(loss_ok))
        reported = self.engine.get_global_grad_norm() if norm is None else norm
        status[NORM] = _as_norm(reported)
        status[BLOCKED] = self._block(status, status[NORM])
        return status

    def _set_guard(self, status: torch.Tensor, norm: torch.Tensor | None) -> None:
        assert self._guarded is not None
        if norm is None:
            # ZeRO clips by itself; its own check covers the norm.
            norm_ok = torch.ones((), device=self.world.device)
            self._guarded.guard(norm=None, blocked=self._block(status, norm_ok))
        else:
            self._guarded.guard(norm=norm, blocked=self._block(status, norm))

    def _step_unguarded(self, loss_ok: bool) -> None:
        if self.config.run.guard and (not loss_ok or bool(self._blocked)):
            self.engine.zero_grad()
            self.engine._global_grad_norm = float("inf")
            return
        self.engine.step()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> torch.Tensor:
        self.engine.eval()
        loss = self._call(self.engine, batch)
        self.engine.train()
        return loss

    def state_bytes(self) -> int:
        return self._numel * (14 if self.bf16 else 12)

    def save(self, folder: Path) -> None:
        with _quiet():
            self.engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)

    def load(self, folder: Path, written_by: int) -> None:
        if written_by == self.world.size or self._has_no_shards:
            self._load(folder, _TAG)
            return
        # ZeRO's files are cut for one number of ranks: rank 0 turns them into DeepSpeed's
        # universal layout, one file for each parameter and moment, which all of them then read.
        place = folder.parent.with_name(f".{folder.parent.name}.universal")
        failure = None
        if self.world.is_main:
            try:
                _make_universal(folder / _TAG, place / _TAG)
            except Exception as error:  # the other ranks wait for the answer
                failure = f"conversion to DeepSpeed's universal layout failed: {error!r}"
        failure = self.world.broadcast(failure)
        if failure is not None:
            raise RuntimeError(failure)
        self.engine._config.load_universal_checkpoint = True
        try:
            self._load(place, _TAG)
        finally:
            self.engine._config.load_universal_checkpoint = False
            self.world.gather(None)  # before the files go
            if self.world.is_main:
                shutil.rmtree(place, ignore_errors=True)

    def _load(self, folder: Path, tag: str) -> None:
        with _quiet():
            path, _ = self.engine.load_checkpoint(
                str(folder), tag=tag, load_lr_scheduler_states=False
            )
        if path is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint under {folder}")
        # The universal layout hands all groups the weight decay of the first, and all of them one
        # and the same step counter (which every group's update would count up).
        groups = self.engine.optimizer.param_groups
        for group, ours in zip(groups, self._hyperparameters, strict=True):
            group.update(ours)
        states = self._guarded.state.values() if self._guarded is not None else ()
        for state in states:
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].to(self.world.device, copy=True)

    @property
    def _has_no_shards(self) -> bool:
        """Whether every rank holds, and rank 0 alone writes, the whole optimizer state."""
        return self.stage == 0

    def full_weight(self, parameter: torch.Tensor) -> torch.Tensor:
        if self.stage < 3:
            return parameter
        with self._ds.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def describe(self) -> dict[str, Any]:
        return super().describe() | {
            "zero_stage": self.stage,
            "compute": self.config.precision.compute,
            "deepspeed": self._ds.__version__,
            "deepspeed_config": self._settings,
        }

    def close(self) -> None:
        self.engine.destroy()


def _make_universal(source: Path, target: Path) -> None:
    """DeepSpeed's own conversion, in this process."""
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    arguments = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,  # in this process: forks of one with a GPU context do not work
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with _quiet(), contextlib.redirect_stderr(io.StringIO()):  # progress bars
        ds_to_universal.main(arguments)


def _as_norm(value: Any) -> float | torch.Tensor:
    """DeepSpeed's norm as a number that is not finite when it found the gradients to be so (it
    says inf, or -1, or nothing)."""
    if value is None:
        return float("nan")
    if isinstance(value, torch.Tensor):
        value = value.detach().float().reshape(())
        return torch.where(value < 0, torch.inf, value)
    return float("inf") if value < 0 else float(value)


def _import_deepspeed(config: TrainConfig, world: World) -> Any:
    """Import deepspeed for this device and adopt the process group; ConfigError if missing."""
    if world.device.type == "cuda":
        listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(listed)
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"engine=deepspeed needs the package deepspeed (pip install deepspeed): {error}"
        ) from error
    # It calls a collective by a name that newer torch calls old; nothing for our user to do.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*deprecated")
    warnings.filterwarnings("ignore", message=".*reduce_scatter_tensor.*deprecated")
    if world.device.type == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce for CPUs at this point (half a minute
        # of C++, and ninja on PATH); gloo, which the process group has, does the same work.
        from deepspeed.ops import __compatible_ops__ as available
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

        available[ShareMemCommBuilder.NAME] = False
    with _quiet():
        deepspeed.init_distributed(
            dist_backend="nccl" if world.device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
        )
    return deepspeed


def architectures(listed: str | None) -> str:
    """TORCH_CUDA_ARCH_LIST for DeepSpeed's JIT builds, which read "9.0a" (what images for Hopper
    set) as a number and fail: without letters, "9.0" where nothing is listed."""
    return re.sub(r"(\d+\.\d+)[a-z]+", r"\1", listed) if listed else "9.0"


def _fused_adam(groups: list[dict[str, Any]], config: TrainConfig, world: World) -> Any:
    if world.device.type != "cuda":
        raise ConfigError("engine.optimizer=fused_adam needs a CUDA device, got run.device=cpu")
    from deepspeed.ops.adam import FusedAdam

    settings = config.optimizer
    return FusedAdam(
        groups,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        adam_w_mode=True,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Setup and checkpoints log and print dozens of lines, among them a warning that AdamW's
    subclass is untested with ZeRO (our tests compare it with one process); show errors only."""
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(logging.WARNING)
