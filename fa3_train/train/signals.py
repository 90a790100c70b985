"""SIGTERM and SIGUSR1 ask for a checkpoint and a clean exit; the loop obeys at a step boundary.

The handler only sets a flag. The loop puts the flag into the host vector that every step sums over
the ranks anyway, so all of them learn of it at the same step even when only one was signalled.
Further signals change nothing: a job manager signals the launcher and the ranks, and the launcher
passes it on, so a rank may well get two. (Way out of a hang: SIGKILL, which loses no checkpoint.)
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["StopSignal"]


class StopSignal:
    """Context manager; `received` is the signal's name once one has arrived, else None."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        # Python allows handlers only in the main thread; elsewhere the host program owns them.
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
