"""GPU time of single calls, several competitors side by side.

Every round calls each competitor once, so that drifts of clock and temperature hit all alike.
Before a call the L2 cache is overwritten; then a short spin keeps the GPU busy until the host has
queued the call, so that the events around it see kernels only and no launch gap.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

L2_FLUSH_BYTES = 128 << 20  # 2.5 times the 50 MB L2 of an H100
MAX_SPIN_MS = 3.0
HEAD_START_MS = 5.0
LONG_CALL_MS = 50.0  # needs no warm-up beyond its first call
BUDGET_MS = 600.0  # for the repetitions of one call of one cell
MIN_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """Milliseconds over the repetitions of one competitor."""

    median_ms: float
    min_ms: float
    quartile_low_ms: float
    quartile_high_ms: float
    reps: int
    host_ms: float = 0.0  # until the call returns to Python, the GPU being idle

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        return (self.quartile_high_ms - self.quartile_low_ms) / self.median_ms


def summarize(samples_ms: list[float], host_ms: float = 0.0) -> Timing:
    """Median, minimum and quartiles of at least one sample."""
    if len(samples_ms) == 1:
        low = high = samples_ms[0]
    else:
        low, _, high = statistics.quantiles(samples_ms, n=4, method="inclusive")
    median = statistics.median(samples_ms)
    return Timing(median, min(samples_ms), low, high, len(samples_ms), host_ms)


def rounds(reps: int, call_ms: float) -> int:
    """``reps``, or what fits into the budget if that is less, but at least three."""
    return max(min(reps, MIN_ROUNDS), min(reps, int(BUDGET_MS / max(call_ms, 1e-3))))


class Timer:
    """Owns the flush buffer and the calibration of the spin."""

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self.device = torch.device(device)
        self._flush = torch.empty(L2_FLUSH_BYTES // 4, dtype=torch.int32, device=self.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1000)
        start.record()
        torch.cuda._sleep(10_000_000)
        end.record()
        torch.cuda.synchronize()
        self._cycles_per_ms = 10_000_000 / start.elapsed_time(end)

    def _once(self, call: Callable[[], object]) -> tuple[float, float]:
        """Milliseconds until the host is free, and until the GPU is done."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        host = time.perf_counter() - begin
        torch.cuda.synchronize()
        return host * 1e3, (time.perf_counter() - begin) * 1e3

    def measure(self, calls: Mapping[str, Callable[[], object]], reps: int) -> dict[str, Timing]:
        """Time each call ``reps`` times, interleaved; long calls fewer times (:func:`rounds`).

        Args:
            calls: name -> what to time; its GPU work goes to the current stream.
        """
        spin, hosts, longest = {}, {}, 0.0
        for name, call in calls.items():
            host, total = self._once(call)
            if total < LONG_CALL_MS:
                for _ in range(3):  # warm-up of clocks and allocator, and a fair host time
                    again, total = self._once(call)
                    host = min(host, again)
            longest, hosts[name] = max(longest, total), host
            spin[name] = int(min(MAX_SPIN_MS, 1.5 * host + 0.03) * self._cycles_per_ms)
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in calls}
        # The host must never catch up: no synchronisation inside the loop, and a head start. (With
        # one per round, the first competitor of each round was charged some 50 us of launch gap.)
        torch.cuda._sleep(int(HEAD_START_MS * self._cycles_per_ms))
        for _ in range(rounds(reps, longest)):
            for name, call in calls.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._flush.zero_()
                torch.cuda._sleep(spin[name])
                start.record()
                call()
                end.record()
                events[name].append((start, end))
        torch.cuda.synchronize()
        return {
            name: summarize([start.elapsed_time(end) for start, end in pairs], hosts[name])
            for name, pairs in events.items()
        }


def release_memory() -> None:
    """Between two measurements: what is no longer used goes back to the device; a new peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
