"""Reading the step's status vector on the host without stopping the device.

On CUDA the vector is copied into page-locked memory behind an event, and read `LAG` steps later:
by then it has normally arrived, and the device still has the steps in between to work on. The lag
is a fixed number of steps, not "whenever it is there", because every rank must learn of a bad step
at the same step. On CPU there is nothing to overlap and the lag is 0.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from fa3_train.train.data import Batch
from fa3_train.train.engines.base import BLOCKED, LOSS, NORM, STATUS_SIZE

__all__ = ["LAG", "StatusReader", "StepStatus"]

LAG = 2


@dataclass
class StepStatus:
    """What all ranks agreed on in one step; `batches` are this rank's micro-batches of it."""

    step: int
    loss: float
    norm: float
    blocked: bool
    batches: list[Batch]


class StatusReader:
    """A queue of status vectors in flight."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.lag = LAG if self._cuda else 0
        self._flying: deque[tuple[int, torch.Tensor, Any, list[Batch]]] = deque()
        self._free: list[torch.Tensor] = []

    def push(self, step: int, status: torch.Tensor, batches: list[Batch]) -> None:
        event = None
        if self._cuda:
            host = self._free.pop() if self._free else torch.empty(STATUS_SIZE).pin_memory()
            host.copy_(status, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            status = host
        self._flying.append((step, status, event, batches))

    def pop(self, *, all_of_them: bool = False) -> list[StepStatus]:
        """Statuses that are `lag` steps old (or everything, which waits for the device)."""
        ready = []
        while len(self._flying) > (0 if all_of_them else self.lag):
            step, status, event, batches = self._flying.popleft()
            if event is not None:
                event.synchronize()
            values = status.tolist()
            if self._cuda:
                self._free.append(status)
            ready.append(
                StepStatus(
                    step=step,
                    loss=values[LOSS],
                    norm=values[NORM],
                    blocked=values[BLOCKED] > 0,
                    batches=batches,
                )
            )
        return ready
