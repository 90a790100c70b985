"""Who this process is: rank, size, device, and the process group behind them.

`torchrun` and the `deepspeed` launcher both describe the job in RANK, LOCAL_RANK and WORLD_SIZE;
a process without them is a world of one. A CUDA world talks NCCL for device tensors and gloo for
host tensors, so that checkpoints can agree on things without touching the device's stream.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from fa3_train.train.config import ConfigError, TrainConfig

__all__ = ["World", "leave", "start_world", "stop_world"]


@dataclass(frozen=True)
class World:
    """Place of one process among the ranks."""

    rank: int
    local_rank: int  # among the processes of this machine; picks the GPU
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank. Small Python objects only."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=_host_group())
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=_host_group())
        return box[0]


_HOST_GROUP: Any = None


def _host_group() -> Any:
    """A gloo group over all ranks: pickled objects would go through GPU memory under NCCL."""
    global _HOST_GROUP
    if _HOST_GROUP is None and dist.get_backend() != "gloo":
        _HOST_GROUP = dist.new_group(backend="gloo")
    return _HOST_GROUP


def _launch_env() -> tuple[int, int, int]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    values = [os.environ.get(name) for name in names]
    if values[0] is None or values[2] is None:
        return 0, 0, 1
    try:
        rank, local_rank, size = (int(v or 0) for v in values)
    except ValueError:
        shown = ", ".join(f"{n}={v!r}" for n, v in zip(names, values, strict=True))
        raise ConfigError(f"the launcher's environment must hold integers, got {shown}") from None
    if not 0 <= rank < size:
        raise ConfigError(f"RANK must be in [0, WORLD_SIZE), got RANK={rank} WORLD_SIZE={size}")
    return rank, local_rank, size


def _pick_device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "run.device=cuda, but this torch sees no GPU "
            f"(torch {torch.__version__}, built for CUDA {torch.version.cuda})"
        )
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"local rank {local_rank} has no GPU of its own: {count} visible. "
            "Start at most one process per GPU"
        )
    return torch.device("cuda", local_rank)


def start_world(config: TrainConfig) -> World:
    """Join the job that the launcher described, or stand alone.

    A process group is made when there are several ranks, and always for engine=deepspeed.
    Raises ConfigError for a launcher environment or a device that cannot be used.
    """
    rank, local_rank, size = _launch_env()
    device = _pick_device(config.run.device, local_rank)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # Must stand before deepspeed is imported anywhere; it decides at import.
        os.environ["DS_ACCELERATOR"] = "cpu"
    needs_group = size > 1 or config.engine.name == "deepspeed"
    if needs_group and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        wait = timedelta(seconds=config.engine.timeout_s)
        if size > 1:
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=wait)
        else:  # no launcher, so no address to meet at
            for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
                os.environ.setdefault(name, value)  # DeepSpeed insists on them
            store = torch._C._distributed_c10d.HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=wait)
    return World(rank=rank, local_rank=local_rank, size=size, device=device)


def stop_world() -> None:
    """Leave the process group, if there is one."""
    global _HOST_GROUP
    _HOST_GROUP = None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process with `code`; the last line of a program, after everything is closed.

    One of several ranks ends without tearing down the interpreter. Threads of torch's gloo groups
    may still run then, and now and then C++ aborts ("terminate called without an active exception")
    a run that has saved everything: its launcher would report a failure.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
