"""Who is blamed when a run stands still: the judge alone, with beats and times made up."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from fa3_train.train.watch import Beat, Judge, _position

HANG, DEAD, TIMEOUT = 40.0, 15.0, 600.0


class Run:
    """Beats of some ranks over time; each second every living one sends its state again."""

    def __init__(self, ranks: int) -> None:
        self.judge = Judge(HANG, DEAD, TIMEOUT)
        self.now = 0.0
        self.beats = {r: Beat(state="busy", what="step 1", pid=100 + r) for r in range(ranks)}
        self.silent: set[int] = set()

    def set(self, rank: int, **values) -> None:
        self.beats[rank] = replace(self.beats[rank], **values)

    def step(self, *ranks: int) -> None:
        for rank in ranks:
            self.set(rank, count=self.beats[rank].count + 1)

    def pass_time(self, seconds: float):
        """The first verdict within the next `seconds`, and after how many it came."""
        for second in range(int(seconds)):
            self.now += 1
            for rank, beat in self.beats.items():
                if rank not in self.silent:
                    self.beats[rank] = replace(beat, number=beat.number + 1)
                self.judge.look(rank, self.beats[rank], self.now)
            verdict = self.judge.verdict(self.now)
            if verdict is not None:
                return verdict, second + 1
        return None, seconds


def test_nobody_is_blamed_while_ranks_move():
    run = Run(4)
    for _ in range(30):
        run.step(0, 1, 2, 3)
        assert run.pass_time(30)[0] is None


def test_a_silent_rank_is_dead():
    run = Run(3)
    assert run.pass_time(20)[0] is None
    run.silent.add(2)
    (rank, text), after = run.pass_time(60)
    assert rank == 2 and "rank 2 is dead or stopped" in text and "process 102" in text
    assert after <= DEAD + 2


@pytest.mark.parametrize("state", ["waiting", "busy"])
def test_the_one_that_is_behind_hangs(state):
    """Others wait in a collective, or (launches run ahead of the device) are further on."""
    run = Run(3)
    run.pass_time(5)
    run.step(0, 2)
    run.set(0, state=state)
    run.set(2, state=state)
    run.set(1, what="step 2, forward of micro-batch 0", where="modules/mlp.py:7")
    (rank, text), after = run.pass_time(100)
    assert rank == 1 and "rank 1 hangs" in text
    assert "step 2, forward of micro-batch 0, at modules/mlp.py:7" in text
    assert HANG < after <= HANG + 2 < 60


def test_all_at_the_same_place_is_a_long_step_until_the_timeout():
    run = Run(2)
    verdict, after = run.pass_time(900)
    assert verdict is not None and verdict[0] == -1
    assert TIMEOUT < after < TIMEOUT + 5
    assert "rank 0: step 1" in verdict[1] and "rank 1: step 1" in verdict[1]


def test_a_slow_phase_has_the_longer_limit():
    run = Run(2)
    run.set(0, state="slow", what="checkpoint of step 5")
    run.step(1)
    run.set(1, state="waiting")
    (rank, text), after = run.pass_time(900)
    assert rank == 0 and "checkpoint of step 5" in text
    assert TIMEOUT < after < TIMEOUT + 5


def test_where_the_main_thread_is():
    where, waits = _position(sys._getframe())
    assert not waits  # this file is no part of the package, pytest's frames neither
    assert where == "" or ":" in where
    frame = compile("import sys\nframe = sys._getframe()", "/x/torch/distributed/c10d.py", "exec")
    names: dict = {}
    exec(frame, names)
    assert _position(names["frame"])[1]
