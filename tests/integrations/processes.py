"""Start a function in several gloo processes; return what each returned, or raise."""

from __future__ import annotations

import io
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _entry(rank: int, ranks: int, port: int, function: Callable, args: tuple, queue: Any) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks), DS_ACCELERATOR="cpu",
    )  # fmt: skip
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
        # As bytes: torch would pass tensors by shared memory of a process that is about to end.
        packed = io.BytesIO()
        torch.save(function(rank, ranks, *args), packed)
        queue.put((rank, packed.getvalue(), None))
    except Exception:
        queue.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run(ranks: int, function: Callable, *args: Any, timeout: float = 120.0) -> list[Any]:
    """``function(rank, ranks, *args)`` in ``ranks`` processes; its results in rank order."""
    context = mp.get_context("spawn")
    queue = context.Queue()
    port = _free_port()
    processes = [
        context.Process(target=_entry, args=(r, ranks, port, function, args, queue), daemon=True)
        for r in range(ranks)
    ]
    for p in processes:
        p.start()
    try:
        results = [queue.get(timeout=timeout) for _ in range(ranks)]
    finally:
        for p in processes:
            p.join(10)
            if p.is_alive():
                p.kill()
    for rank, _, error in results:
        assert error is None, f"rank {rank}:\n{error}"
    results.sort(key=lambda result: result[0])
    return [torch.load(io.BytesIO(packed), weights_only=False) for _, packed, _ in results]
