"""Orders of the FP8 forward by brute force on the CPU: Vt, packed P, columns of O, key ranges.

The headers are compiled for the host (``fp8_host.cpp``). What moves data on the GPU (ldmatrix,
prmt, stmatrix, the fragments of wgmma) is written out here from the PTX ISA, so that the maps are
checked against the hardware's documentation and not against themselves.
"""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNBOUNDED = 1 << 29
BLOCK = 128


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no host C++ compiler")
    target = tmp_path_factory.mktemp("fp8") / "fp8_host.so"
    source = Path(__file__).with_name("fp8_host.cpp")
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-x", "c++"]
    subprocess.run([*command, f"-I{ROOT / 'csrc'}", str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def prmt(a: int, b: int, selector: int) -> int:
    """prmt.b32: the bytes of {b, a} that the nibbles of the selector name."""
    data = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    return int.from_bytes(bytes(data[(selector >> (4 * i)) & 7] for i in range(4)), "little")


def ldmatrix_x4_trans(row_bytes: list[bytes]) -> list[list[int]]:
    """[lane][matrix]: row_bytes[lane] are the 16 bytes at the address of ``lane``."""
    registers = []
    for lane in range(32):
        column, pair = lane // 4, lane % 4
        words = []
        for matrix in range(4):
            halves = [row_bytes[8 * matrix + 2 * pair + i][2 * column :][:2] for i in range(2)]
            words.append(int.from_bytes(halves[0] + halves[1], "little"))
        registers.append(words)
    return registers


def stmatrix_x4(registers: list[list[int]]) -> list[bytes]:
    """The 16 bytes that land at the address of each lane."""
    out = [bytearray(16) for _ in range(32)]
    for lane in range(32):
        for matrix in range(4):
            row, at = 8 * matrix + lane // 4, 4 * (lane % 4)
            out[row][at : at + 4] = registers[lane][matrix].to_bytes(4, "little")
    return [bytes(x) for x in out]


def test_transposer_writes_vt_in_the_declared_order(host) -> None:
    rng = random.Random(0)
    v = [bytes(rng.randrange(256) for _ in range(16)) for _ in range(32)]  # 32 keys x 16 columns
    loaded = ldmatrix_x4_trans(v)
    even, odd = host.even_bytes(), host.odd_bytes()
    stored = stmatrix_x4(
        [
            [prmt(x[0], x[1], even), prmt(x[0], x[1], odd), prmt(x[2], x[3], even),
             prmt(x[2], x[3], odd)]
            for x in loaded
        ]
    )  # fmt: skip
    vt = [bytearray(32) for _ in range(16)]
    for lane in range(32):
        at = host.transposer_byte_of(lane)
        vt[host.transposer_row_of(lane)][at : at + 16] = stored[lane]
    for row in range(16):
        for position in range(32):
            key = 16 * (position // 16) + host.vt_key_of(position % 16)
            assert vt[row][position] == v[key][host.vt_column_of(row)], (row, position)


def test_orders_are_permutations(host) -> None:
    assert sorted(host.vt_key_of(i) for i in range(16)) == list(range(16))
    assert sorted(host.vt_column_of(i) for i in range(16)) == list(range(16))
    used = [host.p_register_of(w, b) for w in range(4) for b in range(4)]
    assert sorted(used) == list(range(16))
    used = [host.o_register_of(h, i) for h in range(2) for i in range(4)]
    assert sorted(used) == list(range(8))


def test_packed_scores_are_the_a_operand(host) -> None:
    """8-bit A fragment (PTX ISA, wgmma .m64nNk32): word w, byte b of thread t is row
    16 (t / 32) + (t % 32) / 4 + 8 (w % 2), column 16 (w / 2) + 4 (t % 4) + b."""
    for thread in range(128):
        for word in range(4):
            for byte in range(4):
                row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (word % 2)
                position = 16 * (word // 2) + 4 * (thread % 4) + byte
                register = host.p_register_of(word, byte)
                assert host.acc_row_of(thread, register) == row
                key = 16 * (position // 16) + host.vt_key_of(position % 16)
                assert host.acc_col_of(thread, register) == key, (thread, word, byte)


def test_four_neighbouring_columns_of_o_lie_in_one_thread(host) -> None:
    for thread in range(128):
        for half in range(2):
            for i in range(4):
                register = host.o_register_of(half, i)
                row = 16 * (thread // 32) + thread % 32 // 4 + 8 * half
                assert host.acc_row_of(thread, register) == row
                column = host.vt_column_of(host.acc_col_of(thread, register))
                assert column == 4 * (thread % 4) + i


def test_two_stores_of_a_warp_never_meet_in_a_bank(host) -> None:
    """stmatrix writes 8 rows of 16 bytes per phase: all 32 banks under the swizzle of Vt."""
    for matrix in range(4):
        banks = set()
        for lane in range(8 * matrix, 8 * matrix + 8):
            row, byte = host.transposer_row_of(lane), host.transposer_byte_of(lane)
            banks.add((byte ^ ((row & 7) << 4)) % 128)
        assert len(banks) == 8


def sees(i: int, j: int, len_q: int, len_k: int, left: int, right: int) -> bool:
    middle = i + len_k - len_q
    return j < len_k and middle - left <= j <= middle + right


def test_key_ranges_are_those_of_the_mask(host) -> None:
    rng = random.Random(1)
    windows = [
        (UNBOUNDED, UNBOUNDED),
        (UNBOUNDED, 0),
        (100, 0),
        (63, 64),
        (0, 200),
        (300, UNBOUNDED),
    ]
    out = (ctypes.c_int * 6)()
    for trial in range(300):
        len_q, len_k = rng.choice([1, 64, 129, 300, 513]), rng.choice([0, 1, 127, 128, 300, 640])
        left, right = windows[trial % len(windows)]
        rows = rng.choice([64, 192])
        row = rng.randrange(0, len_q + rows, 64)
        host.key_ranges(row, rows, len_q, len_k, left, right, out)
        begin, end, block_begin, block_end, whole_begin, whole_end = out
        mine = range(row, min(row + rows, len_q))
        seen = [j for j in range(len_k) if any(sees(i, j, len_q, len_k, left, right) for i in mine)]
        case = (len_q, len_k, left, right, row, rows)
        if not seen:
            assert block_begin >= block_end, case
            continue
        assert (begin, end) == (seen[0], seen[-1] + 1), case
        assert block_begin == begin // BLOCK and block_end == -(-end // BLOCK), case
        for n in range(block_begin, block_end):
            keys = range(n * BLOCK, (n + 1) * BLOCK)
            every = range(row, row + rows)  # rows past the end count: their scores are computed too
            unmasked = all(
                sees(i, j, len_q, len_k, left, right) for i in (every[0], every[-1]) for j in keys
            )
            assert (whole_begin <= n < whole_end) == unmasked, (case, n)
