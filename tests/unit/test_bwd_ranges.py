"""Block ranges, tile order and layouts of the backward, from the C++ the kernels compile, by
brute force.

A host compiler builds csrc/attn/bwd_ranges.h and csrc/tile/layout.cuh into a small library; the
tests compare it with definitions: which pairs a mask shows, who must have added before whom, which
element a register holds. What the kernels do with these numbers is tests/gpu/test_attn_bwd.py.
"""

from __future__ import annotations

import ctypes
import itertools
import random
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
UNBOUNDED = 1 << 29

SOURCE = """
#include "attn/bwd_ranges.h"
using namespace fa3;
extern "C" {
void query_range(int bm, int bn, int shift, int left, int right, int n, int num, int* out) {
  const BlockRange r = query_blocks({bm, bn}, {shift, left, right}, n, num);
  out[0] = r.begin; out[1] = r.end;
}
void key_range(int bm, int bn, int shift, int left, int right, int m, int num, int* out) {
  const BlockRange r = key_blocks({bm, bn}, {shift, left, right}, m, num);
  out[0] = r.begin; out[1] = r.end;
}
int first(int start, int b, int block) { return first_block(start, b, block); }
int packed(int total, int batch, int block) { return packed_blocks(total, batch, block); }
int count(int heads, int blocks, int section, int descending) {
  return tile_count({heads, blocks, section, descending});
}
void name(int heads, int blocks, int section, int descending, int index, int* out) {
  const TileName t = tile_name({heads, blocks, section, descending}, index);
  out[0] = t.key_block; out[1] = t.head;
}
int slot(int r) { return statistics_slot(r); }
int owned(int i, int owner, int owners) { return owned_row_block(i, owner, owners); }
void state(unsigned long long s, unsigned* out) {
  out[0] = DqState::expected(s); out[1] = DqState::arrivals(s);
  out[2] = DqState::closed(s); out[3] = DqState::tickets(s);
}
unsigned long long step_of(int i) {
  return i == 0 ? DqState::kArrival : i == 1 ? DqState::kClosed : DqState::kTicket;
}
int max_tokens() { return kMaxTokens; }
int row(int t, int r) { return acc_row(t, r); }
int col(int t, int r) { return acc_col(t, r); }
unsigned offset(int rows, int r, int c) { return tile_offset<128, 2>(rows, r, c); }
}
"""


@pytest.fixture(scope="module")
def lib(tmp_path_factory) -> ctypes.CDLL:
    if COMPILER is None:
        pytest.skip("no host C++ compiler")
    folder = tmp_path_factory.mktemp("bwd_ranges")
    source, target = folder / "ranges.cpp", folder / "ranges.so"
    source.write_text(SOURCE)
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(source), "-o", str(target)], check=True)
    loaded = ctypes.CDLL(str(target))
    loaded.step_of.restype = ctypes.c_uint64
    loaded.state.argtypes = [ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint)]
    return loaded


def pair(function, *arguments: int) -> tuple[int, int]:
    out = (ctypes.c_int * 2)()
    function(*arguments, out)
    return out[0], out[1]


def visible(i: int, j: int, shift: int, left: int, right: int) -> bool:
    return i + shift - left <= j <= i + shift + right


def masks() -> list[tuple[int, int, int, int]]:
    """(Sq, Sk, left, right) with every kind of bound, lengths around block edges."""
    rng = random.Random(1)
    sides = [
        (UNBOUNDED, 0),
        (UNBOUNDED, UNBOUNDED),
        (30, 0),
        (0, 0),
        (17, 90),
        (UNBOUNDED, 45),
        (200, 3),
    ]
    lengths = [1, 15, 16, 17, 31, 32, 33, 63, 64, 100]
    shapes = [(rng.choice(lengths), rng.choice(lengths)) for _ in range(25)] + [(100, 1), (1, 100)]
    return [(a, b, *side) for (a, b), side in itertools.product(shapes, sides)]


BLOCKS = [
    (16, 32),
    (32, 32),
    (24, 16),
    (32, 20),
]  # scaled down: 64 x 128, 128 x 128, 96 x 64, 128 x 80


@pytest.mark.parametrize("bm,bn", BLOCKS)
def test_ranges_cover_every_visible_pair_and_agree(lib, bm: int, bn: int) -> None:
    """No visible pair is outside a range, and both directions name the same (m, n) pairs."""
    for sq, sk, left, right in masks():
        num_m, num_n, shift = -(-sq // bm), -(-sk // bn), sk - sq
        by_keys = set()
        for n in range(num_n):
            begin, end = pair(lib.query_range, bm, bn, shift, left, right, n, num_m)
            assert begin >= 0 and end <= num_m
            by_keys |= {(m, n) for m in range(begin, end)}
        by_queries = set()
        for m in range(num_m):
            begin, end = pair(lib.key_range, bm, bn, shift, left, right, m, num_n)
            assert begin >= 0 and end <= num_n
            by_queries |= {(m, n) for n in range(begin, end)}
        assert by_keys == by_queries, (sq, sk, left, right)
        for i, j in itertools.product(range(sq), range(sk)):
            if visible(i, j, shift, left, right):
                assert (i // bm, j // bn) in by_keys, (sq, sk, left, right, i, j)


def test_ranges_are_tight_without_a_left_bound(lib) -> None:
    """Causal: a block is visited iff it shows a pair, padding rows and keys counted as real."""
    bm, bn = 16, 32
    for sq, sk in [(64, 64), (64, 96), (96, 64), (33, 70)]:
        num_m, num_n, shift = -(-sq // bm), -(-sk // bn), sk - sq
        for n in range(num_n):
            begin, end = pair(lib.query_range, bm, bn, shift, UNBOUNDED, 0, n, num_m)
            for m in range(num_m):
                shows = any(
                    visible(i, j, shift, UNBOUNDED, 0)
                    for i in range(m * bm, (m + 1) * bm)
                    for j in range(n * bn, (n + 1) * bn)
                )
                assert shows == (begin <= m < end)


@pytest.mark.parametrize("descending", [0, 1])
@pytest.mark.parametrize(
    "heads,blocks,section", [(1, 1, 1), (6, 5, 4), (8, 3, 8), (7, 9, 2), (3, 4, 1)]
)
def test_tile_order_names_each_tile_once(lib, heads, blocks, section, descending) -> None:
    total = lib.count(heads, blocks, section, descending)
    names = [pair(lib.name, heads, blocks, section, descending, i) for i in range(total)]
    assert sorted(names) == sorted(itertools.product(range(blocks), range(heads)))
    for head in range(heads):
        order = [n for n, h in names if h == head]
        assert order == sorted(order, reverse=bool(descending))


@pytest.mark.parametrize("workers", [1, 2, 5, 13])
def test_ordered_sums_never_deadlock(lib, workers: int) -> None:
    """The queue, simulated: a free worker takes the next tile and adds block by block in turn.

    Turn of tile n at query block m: its rank among key_range(m), in the direction of the order. The
    simulation must end, with every query block added to by exactly its key blocks, in rank order.
    """
    rng = random.Random(2)
    bm, bn = 16, 32
    for sq, sk, left, right in rng.sample(masks(), 40):
        num_m, num_n, shift, heads = -(-sq // bm), -(-sk // bn), sk - sq, 3
        descending = int(right != UNBOUNDED)
        section = rng.choice([1, 2, 4])
        total = lib.count(heads, num_n, section, descending)
        turns = {(h, m): [] for h in range(heads) for m in range(num_m)}
        queue = iter(range(total))
        running: list[tuple[int, int, list[int]] | None] = [None] * workers
        finished = 0
        while finished < total:
            progress = False
            for w in rng.sample(range(workers), workers):
                if running[w] is None:
                    index = next(queue, None)
                    if index is None:
                        continue
                    n, h = pair(lib.name, heads, num_n, section, descending, index)
                    begin, end = pair(lib.query_range, bm, bn, shift, left, right, n, num_m)
                    running[w] = (n, h, list(range(begin, end)))
                    progress = True
                n, h, rest = running[w]
                if rest:
                    begin, end = pair(lib.key_range, bm, bn, shift, left, right, rest[0], num_n)
                    turn = end - 1 - n if descending else n - begin
                    if len(turns[h, rest[0]]) == turn:
                        turns[h, rest.pop(0)].append(n)
                        progress = True
                if not rest:
                    running[w] = None
                    finished += 1
                    progress = True
            assert progress, f"deadlock: {(sq, sk, left, right, section, workers)}"
        for (_, m), order in turns.items():
            begin, end = pair(lib.key_range, bm, bn, shift, left, right, m, num_n)
            expected = list(range(begin, end))
            assert order == (expected[::-1] if descending else expected)


def dq_state(lib, state: int) -> tuple[int, ...]:
    """(expected, arrivals, closed, tickets)"""
    out = (ctypes.c_uint * 4)()
    lib.state(state, out)
    return tuple(out)


def test_dq_state_counts_do_not_run_into_each_other(lib) -> None:
    """Up to the most key tiles that a row block can meet, closed or not."""
    arrival, closed, ticket = (lib.step_of(i) for i in range(3))
    most = -(-lib.max_tokens() // 128)
    for tiles, drawn, arrived, shut in [
        (most, most, most, 1),
        (most, 0, 0, 1),
        (most, most, most - 1, 0),
        (1, 1, 1, 0),
        (0, 0, 0, 0),
    ]:
        state = tiles + drawn * ticket + arrived * arrival + shut * closed
        assert state < 1 << 64
        assert dq_state(lib, state) == (tiles, arrived, shut, drawn)


@pytest.mark.parametrize("owners", [1, 3, 132])
def test_row_blocks_have_one_owner_each(lib, owners: int) -> None:
    for total in (1, 5, 31, 4096):
        share = -(-total // (4 * owners)) * 4
        seen = [lib.owned(i, o, owners) for o in range(owners) for i in range(share)]
        assert sorted(r for r in seen if r < total) == list(range(total))
        for o in range(owners):  # ascending: the first one past the end ends the share
            mine = [lib.owned(i, o, owners) for i in range(share + 1)]
            assert mine == sorted(mine) and mine[-1] >= total


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_every_row_block_is_finished_once(lib, workers: int, seed: int) -> None:
    """The protocol of bwd_dq.cuh in any order of events: workers draw tickets, add in turn, count
    arrivals; finishers look through their own share, and close it when their worker is done.

    The first to arrive stores, all others add after it; nobody waits for a worker that has not
    begun; a row block is finished when it is complete, by one finisher, and all are in the end.
    """
    rng = random.Random(seed)
    arrival, closed, ticket = (lib.step_of(i) for i in range(3))
    rows, tiles = 9, 12
    visits = [rng.sample(range(rows), rng.randint(1, rows)) for _ in range(tiles)]
    state = [sum(r in v for v in visits) for r in range(rows)]
    stored, added, finished = [0] * rows, [0] * rows, [0] * rows
    queue = list(range(tiles))

    def worker(own: list[int]):
        while queue:
            for r in visits[queue.pop(0)]:
                before, state[r] = state[r], state[r] + ticket
                first = dq_state(lib, before)[3] == 0
                yield True
                while not first and dq_state(lib, state[r])[1] == 0:
                    yield False
                assert first == (stored[r] == 0)
                stored[r] += first
                added[r] += not first
                yield True
                expected, arrived, shut, _ = dq_state(lib, state[r])
                state[r] += arrival
                if shut and arrived + 1 == expected:
                    own.append(r)
                yield True

    def finisher(me: int, own: list[int], done: list[bool]):
        share = [lib.owned(i, me, workers) for i in range(4 * rows)]
        share = [r for r in share if r < rows and state[r] > 0]
        while True:
            was_done = done[me]
            found = [r for r in share if dq_state(lib, state[r])[0] == dq_state(lib, state[r])[1]]
            if was_done:
                for r in share:
                    state[r] += closed
                share = []
            while own:
                found.append(own.pop())
            for r in found:
                expected, arrived, *_ = dq_state(lib, state[r])
                assert expected == arrived == stored[r] + added[r]
                finished[r] += 1
            share = [r for r in share if r not in found]
            if was_done:
                return
            yield bool(found)

    done = [False] * workers
    owns: list[list[int]] = [[] for _ in range(workers)]
    running = {("worker", w): worker(owns[w]) for w in range(workers)}
    running |= {("finisher", w): finisher(w, owns[w], done) for w in range(workers)}
    for _ in range(100_000):
        if not running:
            break
        name = rng.choice(list(running))
        if next(running[name], None) is None:
            del running[name]
            if name[0] == "worker":
                done[name[1]] = True
    assert not running, "somebody waits for ever"
    assert finished == [int(any(r in v for v in visits)) for r in range(rows)]


def test_packed_blocks_do_not_overlap(lib) -> None:
    rng = random.Random(3)
    for block in (64, 96, 128):
        for _ in range(200):
            lengths = [
                rng.choice([0, 0, 1, block - 1, block, block + 1, 3 * block, 777]) for _ in range(9)
            ]
            start, used = 0, 0
            for b, length in enumerate(lengths):
                first = lib.first(start, b, block)
                assert first >= used
                used = first + -(-length // block)
                start += length
            assert used <= lib.packed(start, len(lengths), block)


def test_statistics_slots_put_a_threads_columns_together(lib) -> None:
    """Registers 8k .. 8k + 7 need columns 16k + {2q, 2q+1, 8+2q, 9+2q}: 16 bytes."""
    for rows in (64, 96, 128):
        assert sorted(lib.slot(r) for r in range(rows)) == list(range(rows))
    for quad, k in itertools.product(range(4), range(8)):
        columns = [lib.col(quad, 8 * k + i) for i in (0, 1, 4, 5)]
        assert [lib.slot(c) for c in columns] == [16 * k + 4 * quad + i for i in range(4)]


@pytest.mark.parametrize("dim", [64, 96, 128])
def test_fragment_order_of_dq_covers_the_block(lib, dim: int) -> None:
    """Vector i of thread t of piece g: each element of the row block once."""
    block_m = 128 if dim == 64 else 64
    seen = set()
    for g in range(2):
        columns = 64 if dim % 64 == 0 or g == 0 else dim % 64
        for i, t in itertools.product(range(columns // 8), range(128)):
            for r in range(4 * i, 4 * i + 4):
                row, col = lib.row(t, r), lib.col(t, r)
                row, col = (row + 64 * g, col) if dim == 64 else (row, col + 64 * g)
                assert (row, col) not in seen
                seen.add((row, col))
                # where the kernel's bulk reduction puts it: piece, vector, thread, element
                flat = g * 64 * 64 + (i * 128 + t) * 4 + (r - 4 * i)
                assert flat < block_m * dim
    assert seen == set(itertools.product(range(block_m), range(dim)))


def test_transposed_ds_store_is_a_k_major_tile(lib) -> None:
    """stmatrix.trans of dS^T fragments: bwd_fused's addresses against the swizzled tile.

    The instruction stores 8 x 8 matrix i (register i of all lanes) at the rows that lanes
    8i .. 8i + 7
    point to; transposed, element (row a, column b) goes to the row of lane 8i + b, position a.
    """
    block_m, block_n = 64, 128
    tile = {}
    for g, warp, k in itertools.product(range(2), range(4), range(block_m // 16)):

        def lane_address(lane: int, g=g, warp=warp, k=k) -> int:
            row = 8 * (lane >> 4) + (lane & 7)
            chunk = (2 * warp + ((lane >> 3) & 1)) ^ (lane & 7)
            return g * block_m * 128 + (16 * k + row) * 128 + chunk * 16

        for i, lane, half in itertools.product(range(4), range(32), range(2)):
            register = 8 * k + 2 * i + half  # packed word i of this k-step, low or high half
            key = 64 * g + lib.row(32 * warp + lane, register)
            query = lib.col(32 * warp + lane, register)
            a, b = lane // 4, 2 * (lane % 4) + half
            tile[query, key] = lane_address(8 * i + b) + 2 * a
    assert len(tile) == block_m * block_n
    for (query, key), address in tile.items():
        assert address == lib.offset(block_m, query, key)
