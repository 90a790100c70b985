"""Layouts, descriptors, fragments, masks and schedules of ``csrc/tile``, by brute force on the CPU.

The headers are compiled for the host (``tile_host.cpp``) and every function is compared with a
formula written here from the hardware's documentation or from the definition of the mask, over
every index or over many shapes. What the formulas themselves assume about the hardware is what the
GPU tests check.
"""

from __future__ import annotations

import ctypes
import itertools
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MASKS = {"none": 0, "causal": 1, "window": 2}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The host build of csrc/tile."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no host C++ compiler")
    target = tmp_path_factory.mktemp("tile") / "tile_host.so"
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-x", "c++"]
    source = Path(__file__).with_name("tile_host.cpp")
    command += [f"-I{ROOT / 'csrc'}", "-include", "type_traits", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(target))
    library.tile_offset_of.restype = ctypes.c_int64
    library.descriptor_of.restype = ctypes.c_uint64
    library.descriptor_whole.restype = ctypes.c_uint64
    return library


def ints(function: ctypes._NamedFuncPointer, *arguments: int, count: int = 2) -> tuple[int, ...]:
    """Calls a function that returns through `count` trailing int pointers."""
    out = [ctypes.c_int() for _ in range(count)]
    function(*arguments, *[ctypes.byref(x) for x in out])
    return tuple(x.value for x in out)


# ---- shared-memory layout ----------------------------------------------------------------------
@pytest.mark.parametrize("width", [128, 64, 32])
@pytest.mark.parametrize("elem_bytes", [1, 2, 4])
@pytest.mark.parametrize("rows", [8, 64, 112])
def test_tile_offset_is_the_documented_swizzle(
    host, width: int, elem_bytes: int, rows: int
) -> None:
    """TMA swizzle modes XOR the 16-byte chunk (of 8, 4 or 2) with address bits 7 and up."""
    cols = 2 * width // elem_bytes  # two slabs
    seen = set()
    for row, col in itertools.product(range(rows), range(cols)):
        slab, byte = divmod(col * elem_bytes, width)
        linear = slab * rows * width + row * width + byte
        chunk, pattern = linear // 16 % (width // 16), linear // 128 % (width // 16)
        expected = linear + 16 * ((chunk ^ pattern) - chunk)
        offset = host.tile_offset_of(width, elem_bytes, rows, row, col)
        assert offset == expected, (row, col)
        seen.add(offset)
    assert len(seen) == rows * cols  # nothing overlaps
    assert max(seen) < rows * cols * elem_bytes


def descriptor_fields(value: int) -> dict[str, int]:
    """wgmma matrix descriptor, as the PTX ISA lays it out."""
    return {
        "address": (value & 0x3FFF) << 4,
        "lbo": (value >> 16 & 0x3FFF) << 4,
        "sbo": (value >> 32 & 0x3FFF) << 4,
        "base": value >> 49 & 7,
        "mode": value >> 62,
        "rest": value & ((3 << 14) | (3 << 30) | (7 << 46) | (0x3FF << 52)),
    }


@pytest.mark.parametrize("width,mode", [(128, 1), (64, 2), (32, 3)])
def test_descriptor_fields(host, width: int, mode: int) -> None:
    generator = random.Random(0)
    for _ in range(2000):
        addr = generator.randrange(0, 232448, 1024)
        step = generator.randrange(0, 232448 - addr, 16)
        lbo = 16 * generator.randrange(1, 1 << 12)
        for function in (host.descriptor_of, host.descriptor_whole):
            fields = descriptor_fields(function(width, addr, lbo, step))
            assert fields == {
                "address": (addr + step) & 0x3FFFF,
                "lbo": lbo,
                "sbo": 8 * width,
                "base": 0,
                "mode": mode,
                "rest": 0,
            }


def fetch_address(fields: dict[str, int], width: int, mn_major: bool, mn: int, k: int) -> int:
    """Byte address at which the tensor core looks for 16-bit element (mn, k) of an operand.

    Core matrices are 8 x 16 bytes. K-major: rows of an 8-row group are `width` bytes apart, groups
    SBO apart. MN-major: `width` bytes of MN per k, 8 k per group, groups SBO apart, slabs LBO
    apart. The swizzle acts on the final address.
    """
    per_slab = width // 2
    if mn_major:
        linear = mn // per_slab * fields["lbo"] + k // 8 * fields["sbo"] + k % 8 * width
        linear += mn % per_slab * 2
    else:
        linear = mn // 8 * fields["sbo"] + mn % 8 * width + k * 2
    linear += fields["address"]
    mask = width // 16 - 1
    return linear ^ ((linear >> 7 & mask) << 4)


@pytest.mark.parametrize("width", [128, 64])
@pytest.mark.parametrize("rows,cols", [(64, 128), (128, 192), (80, 256)])
def test_descriptors_find_what_tma_wrote_k_major(host, width: int, rows: int, cols: int) -> None:
    """Q, K: element (row, col) is (mn, k); k-steps of 16 advance 32 bytes inside a slab."""
    base = 3 * 1024
    per_slab = width // 2
    for step in range(cols // 16):
        slab, inner = divmod(16 * step, per_slab)
        value = host.descriptor_of(width, base, 16, slab * rows * width + inner * 2)
        fields = descriptor_fields(value)
        for row, k in itertools.product(range(rows), range(16)):
            offset = host.tile_offset_of(width, 2, rows, row, 16 * step + k)
            assert fetch_address(fields, width, False, row, k) == base + offset


@pytest.mark.parametrize("width", [128, 64])
@pytest.mark.parametrize("rows,cols", [(128, 128), (96, 192), (64, 256), (112, 136), (128, 72)])
def test_descriptors_find_what_tma_wrote_mn_major(host, width: int, rows: int, cols: int) -> None:
    """V: row = key (k), column = mn; k-steps of 16 rows; slabs `rows * width` apart."""
    base = 5 * 1024
    for step in range(rows // 16):
        value = host.descriptor_of(width, base, rows * width, step * 16 * width)
        fields = descriptor_fields(value)
        for k, col in itertools.product(range(16), range(cols)):
            offset = host.tile_offset_of(width, 2, rows, 16 * step + k, col)
            assert fetch_address(fields, width, True, col, k) == base + offset


# ---- fragments ---------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [64, 80, 128, 256])
def test_accumulator_covers_the_tile_once(host, n: int) -> None:
    positions = {ints(host.acc_position, t, r) for t in range(128) for r in range(n // 2)}
    assert positions == set(itertools.product(range(64), range(n)))
    # PTX ISA, D fragment: row lane/4 of a warp's 16 (+8 for registers 2 and 3 of every four),
    # column 8 (r/4) + 2 (lane%4) + r%2
    assert ints(host.acc_position, 37, 6) == (16 + 5 // 4 + 8, 8 + 2 * (5 % 4))


def test_packed_accumulators_are_the_a_operand(host) -> None:
    """P needs no shuffle: word w of k-step j is accumulators 8 j + 2 w and the next one."""
    for t, j, w in itertools.product(range(128), range(8), range(4)):
        row, col = ints(host.a_position, t, j, w)
        assert ints(host.acc_position, t, 8 * j + 2 * w) == (row, col)
        assert ints(host.acc_position, t, 8 * j + 2 * w + 1) == (row, col + 1)
    covered = {
        (row, col + e)
        for t, j, w in itertools.product(range(128), range(8), range(4))
        for row, col in [ints(host.a_position, t, j, w)]
        for e in (0, 1)
    }
    assert covered == set(itertools.product(range(64), range(128)))


def test_stmatrix_places_accumulators_row_major(host) -> None:
    """Emulates stmatrix.x4: lane 8 i + r addresses row r of matrix i; lane l holds row l/4, columns
    2 (l%4) and the next, of matrix i in register i."""
    for warp, j in itertools.product(range(4), range(8)):
        for matrix, lane in itertools.product(range(4), range(32)):
            source = ints(host.acc_position, 32 * warp + lane, 8 * j + 2 * matrix)
            row, chunk = ints(host.stmatrix_position, 32 * warp + 8 * matrix + lane // 4, j)
            assert source == (row, 8 * chunk + 2 * (lane % 4))


# ---- masks -------------------------------------------------------------------------------------
def visible(mask: str, sq: int, sk: int, left: int, right: int, i: int, j: int) -> bool:
    """The definition in csrc/fa3_train.h."""
    if mask == "none":
        return True
    if mask == "causal":
        left, right = -1, 0
    shift = sk - sq
    return (left < 0 or j >= i + shift - left) and (right < 0 or j <= i + shift + right)


def mask_cases() -> list[tuple[str, int, int, int, int]]:
    generator = random.Random(1)
    shapes = [
        (1, 1),
        (5, 0),
        (0, 7),
        (113, 203),
        (203, 113),
        (64, 64),
        (129, 300),
        (300, 7),
        (40, 128),
    ]
    cases = [(mask, *shape, -1, -1) for mask in ("none", "causal") for shape in shapes]
    for shape in shapes:
        for left, right in [(0, 0), (-1, 3), (17, -1), (50, 0), (0, 60), (1000, 1000), (33, 31)]:
            cases.append(("window", *shape, left, right))
    for _ in range(40):
        shape = generator.randrange(1, 330), generator.randrange(0, 330)
        cases.append(("window", *shape, generator.randrange(-1, 200), generator.randrange(-1, 200)))
    return cases


@pytest.mark.parametrize("mask,sq,sk,left,right", mask_cases())
def test_mask_bounds_and_block_ranges(
    host, mask: str, sq: int, sk: int, left: int, right: int
) -> None:
    keys = []
    for i in range(sq):
        seen = [j for j in range(sk) if visible(mask, sq, sk, left, right, i, j)]
        begin, end = ints(host.row_bounds, MASKS[mask], sq, sk, left, right, i)
        assert seen == list(range(max(begin, 0), max(end, 0))), i
        keys.append(seen)
    out = (ctypes.c_int * 4)()
    for block_n, rows in [(64, 64), (128, 128), (80, 192), (112, 64)]:
        for row in range(0, sq, rows):
            host.block_ranges(MASKS[mask], sq, sk, left, right, row, rows, block_n, out)
            visit, clear = set(range(out[0], out[1])), set(range(out[2], out[3]))
            tile = keys[row : row + rows]
            needed = {j // block_n for seen in tile for j in seen}
            assert needed <= visit  # no key is missed
            if needed:
                assert visit == set(range(min(needed), max(needed) + 1))  # and no block for nothing
            for n in visit & clear:  # unmasked: every row sees every key of the block
                whole = set(range(n * block_n, (n + 1) * block_n))
                assert all(whole <= set(seen) for seen in tile)
            for n in visit - clear:  # and no block is masked without need
                whole = set(range(n * block_n, (n + 1) * block_n))
                full_tile = len(tile) == rows and all(whole <= set(seen) for seen in tile)
                assert not full_tile


# ---- schedule ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "tiles,heads,section", [(1, 1, 1), (7, 12, 4), (5, 10, 4), (16, 3, 8), (3, 9, 9)]
)
def test_longest_first_visits_every_tile_once(host, tiles: int, heads: int, section: int) -> None:
    order = [ints(host.tile_at, i, tiles, heads, section) for i in range(tiles * heads)]
    assert set(order) == set(itertools.product(range(tiles), range(heads)))
    assert len(order) == len(set(order))
    for first in range(
        0, heads, section
    ):  # a section is contiguous, and falls from its last query tile
        width = min(section, heads - first)
        part = order[first * tiles : first * tiles + width * tiles]
        assert {head for _, head in part} == set(range(first, first + width))
        assert [m for m, _ in part] == sorted((m for m, _ in part), reverse=True)


def test_snake_is_a_permutation_of_every_round(host) -> None:
    for ctas in (1, 2, 5, 132):
        for round_ in range(5):
            indices = [host.snake_index(round_, cta, ctas) for cta in range(ctas)]
            assert sorted(indices) == list(range(round_ * ctas, (round_ + 1) * ctas))
    # falling costs: no block of threads is given the dearer tile of both rounds
    assert [host.snake_index(0, c, 4) + host.snake_index(1, c, 4) for c in range(4)] == [7] * 4


def test_heads_per_section(host) -> None:
    budget = 32 << 20
    for group, exponent in itertools.product((1, 4, 8), range(12, 27)):
        for kv_bytes in (1 << exponent, (1 << exponent) + 3, 3 << exponent):
            heads = host.section_heads(ctypes.c_int64(kv_bytes), group, ctypes.c_int64(budget))
            kv_heads = heads // group
            assert heads % group == 0 and kv_heads & (kv_heads - 1) == 0
            assert kv_heads == 1 or kv_heads * kv_bytes <= budget
            assert 2 * kv_heads * kv_bytes > budget
    assert host.section_heads(ctypes.c_int64(0), 4, ctypes.c_int64(budget)) > 0  # no keys: must end


def test_ring_phase_flips_at_every_wrap(host) -> None:
    for stages, steps in itertools.product((1, 2, 3), range(12)):
        stage, phase = ctypes.c_uint32(), ctypes.c_uint32()
        host.ring_after(stages, steps, ctypes.byref(stage), ctypes.byref(phase))
        assert (stage.value, phase.value) == (steps % stages, steps // stages % 2)


# ---- generated wgmma wrappers ------------------------------------------------------------------
def test_generated_wgmma_wrappers_name_every_register_once(tmp_path: Path) -> None:
    target = tmp_path / "wgmma_shapes.cuh"
    subprocess.run([sys.executable, str(ROOT / "csrc/ptx/gen_wgmma.py"), str(target)], check=True)
    text = target.read_text()
    blocks = re.findall(
        r"static FA3_DEVICE void (\w+)\(float \(&d\)\[(\d+)\], (.*?)\) \{(.*?)\n  \}", text, re.S
    )
    assert len(blocks) >= 4 * 3 * 10
    shapes = set()
    for name, registers, _, body in blocks:
        count = int(registers)
        shape = re.search(r"m64n(\d+)k(\d+)\.f32\.(\w+)\.(\w+)", body)
        assert shape and int(shape[1]) == 2 * count and shape[3] == shape[4]
        assert shape[2] == ("32" if shape[3] == "e4m3" else "16")
        shapes.add((shape[3], int(shape[1]), name))
        outputs = [int(x) for x in re.findall(r'"[=+]f"\(d\[(\d+)\]\)', body)]
        assert outputs == list(range(count))
        listed = re.search(r'"\{([%\d, ]+)\}, ', body)
        assert listed and [int(x[1:]) for x in listed[1].split(", ")] == list(range(count))
        used = [int(x) for x in re.findall(r"%(\d+)", body)]
        inputs = len(re.findall(r'"[rln]"\(', body))
        assert sorted(set(used)) == list(range(count + inputs)) and len(used) == count + inputs
        assert ('"=f"' in body) == name.endswith("_zero")
        assert ("setp.ne" in body) == name.endswith("_zero")
    assert len(shapes) == len(blocks)
