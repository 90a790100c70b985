"""A rank that dies or stands still ends the run, with its name, instead of hanging everyone.

Collectives wait: when one rank is gone, the others stand in a kernel or a socket until a timeout of
minutes, and then every one of them reports itself. Here a thread on each rank puts a sign of life
into the job's key-value store every second: a number that counts up, how far the main thread is,
and whether it waits for others. Rank 0 compares them, the others look after rank 0:

    dead     no new sign of life for `engine.dead_s` seconds (killed, stopped, its machine gone)
    hanging  the main thread has not moved for `engine.hang_s` seconds and waits for nobody, while
             others do wait. Who waits is seen in the main thread's own stack: its innermost frames
             are in torch.distributed or in a wait for the device
    failed   an exception that was raised on some rank alone; it says so itself

The first to know writes the verdict into the store; every rank reads it there and leaves at once
with code 1. A process that was stopped (SIGSTOP) and belongs to the same launcher is killed,
because a launcher's SIGTERM does not reach it. Within phases that one rank may do alone for long
(setup, the first step, evaluation, checkpoints, closing logs) the limit is `engine.timeout_s`.

Not seen: a device that hangs while all hosts wait for it looks the same on every rank; after
`engine.timeout_s` the run ends with the position of each.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, cast

import torch.distributed as dist

from fa3_train.train.engines.world import World, leave

__all__ = ["Beat", "Judge", "Watch"]

_PERIOD_S = 1.0
# Frames in which a thread waits for other ranks or for the device.
_WAITS = re.compile(r"torch/distributed/|deepspeed/comm/|torch/cuda/(streams|__init__)\.py")
# What gloo, NCCL and the store say when another process is gone.
_SECONDARY = re.compile(
    r"gloo|NCCL|TCPStore|closed by peer|Connection re(set|fused)|Broken pipe|recvValue|sendBytes",
    re.IGNORECASE,
)
_runs = 0  # of this process: keys of one run must not be taken for those of the next


@dataclass
class Beat:
    """A rank's sign of life."""

    number: int = 0  # counts up with every beat
    count: int = 0  # counts up when the main thread reports progress
    state: str = "busy"  # or "waiting", "slow" (may take long)
    what: str = "starting"
    where: str = ""  # innermost frame of our own code
    host: str = ""
    pid: int = 0
    parent: int = 0

    def __str__(self) -> str:
        place = f", at {self.where}" if self.where else ""
        return f"{self.what}{place} (process {self.pid} on {self.host})"


@dataclass
class _Seen:
    beat: Beat
    alive_at: float  # when a new number was seen, by the judge's own clock
    moved_at: float


@dataclass
class Judge:
    """Finds the rank that holds up the others. Pure: beats and times in, a verdict out."""

    hang_s: float
    dead_s: float
    timeout_s: float
    seen: dict[int, _Seen] = field(default_factory=dict)

    def look(self, rank: int, beat: Beat, now: float) -> None:
        """`beat` is what the store holds for `rank` at time `now` (seconds)."""
        last = self.seen.get(rank)
        if last is None:
            self.seen[rank] = _Seen(beat, now, now)
            return
        if beat.number != last.beat.number:
            last.alive_at = now
        if (beat.count, beat.state) != (last.beat.count, last.beat.state):
            last.moved_at = now
        last.beat = beat

    def verdict(self, now: float) -> tuple[int, str] | None:
        """(rank, sentence) as soon as there is one to blame; rank -1 when all are stuck."""
        for rank, s in sorted(self.seen.items()):
            silent = now - s.alive_at
            if silent > self.dead_s:
                return rank, (
                    f"rank {rank} is dead or stopped: no sign of life for {silent:.0f} s. "
                    f"It was last in {s.beat}"
                )
        still = {r: s for r, s in self.seen.items() if now - s.moved_at > self.hang_s}
        waiting = [r for r, s in still.items() if s.beat.state == "waiting"]
        blamed = [r for r, s in still.items() if s.beat.state == "busy"]
        blamed += [
            r for r, s in still.items()
            if s.beat.state == "slow" and now - s.moved_at > self.timeout_s
        ]  # fmt: skip
        ahead = max((s.beat.count for s in still.values()), default=0)
        blamed = [r for r in blamed if waiting or still[r].beat.count < ahead]
        if blamed:
            rank = min(blamed, key=lambda r: (still[r].beat.count, r))
            s = still[rank]
            return rank, (
                f"rank {rank} hangs: it has not moved for {now - s.moved_at:.0f} s while "
                f"{len(still) - 1} others wait. It is in {s.beat}"
            )
        if self.seen and all(now - s.moved_at > self.timeout_s for s in self.seen.values()):
            places = "; ".join(f"rank {r}: {s.beat}" for r, s in sorted(self.seen.items())[:16])
            return -1, f"no rank has moved for {self.timeout_s:.0f} s, all wait. {places}"
        return None


class Watch:
    """The thread of one rank, and what its main thread tells it. Off in a world of one, and where
    `hang_s` is 0: every call is then free."""

    def __init__(
        self, world: World, *, hang_s: float = 0, dead_s: float = 0, timeout_s: float = 0
    ) -> None:
        global _runs
        _runs += 1
        self.world = world
        self.on = world.size > 1 and hang_s > 0
        self._beat = Beat(host=socket.gethostname(), pid=os.getpid(), parent=os.getppid())
        self._closing = threading.Event()
        self._main = threading.main_thread().ident
        self._judge = Judge(hang_s, dead_s, timeout_s)
        self._prefix = f"fa3_train/watch/{_runs}"
        self._warming_up = True
        if self.on:
            # A connection of its own: the main thread may block in one for minutes.
            self._store = cast(Any, dist.distributed_c10d._get_default_store()).clone()
            self._put()
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()

    # -- called by the main thread ---------------------------------------------------------

    def at(self, what: str) -> None:
        """The main thread has got to `what`."""
        self._beat.what = what
        self._beat.count += 1

    def warmed_up(self) -> None:
        """The first step is done. Until here kernels may be compiled, by one rank longer than by
        another, and the longer limit holds."""
        self._warming_up = False

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the main thread waits for other ranks."""
        yield from self._in("waiting")

    @contextlib.contextmanager
    def slowly(self, what: str) -> Iterator[None]:
        """Inside, this rank may do something alone that takes long."""
        self.at(what)
        yield from self._in("slow")

    def _in(self, state: str) -> Iterator[None]:
        before, self._beat.state = self._beat.state, state
        try:
            yield
        finally:
            self._beat.state = before
            self._beat.count += 1

    def close(self) -> None:
        """The run is over on all ranks (collective): nobody is missed from now on."""
        if not self.on:
            return
        with self.waiting():
            self.world.gather(None)
        self._closing.set()
        self._thread.join(5)

    def failed(self, error: BaseException) -> None:
        """An exception ends this rank. Does not return where several ranks run: it prints, tells
        the others and leaves. A broken connection is put down to who is found dead."""
        if not self.on:
            return
        text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if isinstance(error, (RuntimeError, OSError)) and _SECONDARY.search(str(error)):
            # The thread leaves with the verdict as soon as there is one.
            time.sleep(self._judge.dead_s + 10 * _PERIOD_S)
        traceback.print_exception(error)
        sys.stderr.flush()
        self._end(f"rank {self.world.rank} failed in {self._beat}: {text}", culprit=None)

    # -- the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing.wait(_PERIOD_S):
            try:
                self._put()
                if self._store.check([f"{self._prefix}/verdict"]):
                    self._obey(self._store.get(f"{self._prefix}/verdict").decode())
                self._look()
            except (dist.DistError, RuntimeError, OSError) as error:
                if self._closing.wait(2 * _PERIOD_S):
                    return
                reason = (str(error).splitlines() or [""])[0]
                self._say(f"rank 0 or its launcher is dead: their store is gone ({reason})")
                os._exit(1)

    def _put(self) -> None:
        self._beat.number += 1
        beat = Beat(**vars(self._beat))
        frame = sys._current_frames().get(self._main or 0)
        beat.where, waits = _position(frame)
        if waits and beat.state == "busy":
            beat.state = "waiting"
        if self._warming_up and beat.state == "busy":
            beat.state = "slow"
        self._store.set(self._key(self.world.rank), json.dumps(vars(beat)))

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/{rank}"

    def _look(self) -> None:
        ranks = range(self.world.size) if self.world.is_main else range(1)
        keys = [self._key(rank) for rank in ranks]
        if not self._store.check(keys):
            return  # somebody is not here yet: the rendezvous has its own timeout
        now = time.monotonic()
        for rank, raw in zip(ranks, self._store.multi_get(keys), strict=True):
            self._judge.look(rank, Beat(**json.loads(raw)), now)
        verdict = self._judge.verdict(now)
        if verdict is None or (not self.world.is_main and verdict[0] != 0):
            return
        rank, text = verdict
        self._end(text, culprit=self._judge.seen[rank].beat if rank >= 0 else None)

    def _end(self, text: str, culprit: Beat | None) -> None:
        with contextlib.suppress(dist.DistError, RuntimeError, OSError):
            written = self._store.compare_set(f"{self._prefix}/verdict", "", text)
            if written.decode() != text:  # another rank was first
                self._obey(written.decode())
        self._say(text)
        mine = self._beat
        if culprit and (culprit.host, culprit.parent) == (mine.host, mine.parent):
            with contextlib.suppress(OSError):
                os.kill(culprit.pid, signal.SIGKILL)
        time.sleep(2 * _PERIOD_S)  # for the others to read it: the store may end with this process
        leave(1) if threading.current_thread() is threading.main_thread() else os._exit(1)

    def _obey(self, text: str) -> None:
        if self.world.local_rank == 0:
            self._say(text)
        sys.stderr.flush()
        os._exit(1)

    def _say(self, text: str) -> None:
        again = "Start the same command again to continue from the newest checkpoint"
        print(f"fa3_train: {text}. The run ends. {again}", file=sys.stderr, flush=True)


def _position(frame: FrameType | None) -> tuple[str, bool]:
    """(innermost frame of this package, whether the innermost frames are a wait)."""
    waits, depth = False, 0
    while frame is not None:
        name = frame.f_code.co_filename
        waits = waits or (depth < 4 and bool(_WAITS.search(name)))
        if "fa3_train" in name:
            short = name.rsplit("fa3_train", 1)[1].lstrip("/")
            return f"{short}:{frame.f_lineno}", waits
        frame, depth = frame.f_back, depth + 1
    return "", waits
