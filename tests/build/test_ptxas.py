"""What the compiler did to the kernels: spills, serialized wgmma, ignored setmaxnreg, instructions.

None of these fail a build, and each costs a large part of the speed: ptxas only remarks on them.
The tests bring ``build/`` (or ``$FA3_TRAIN_BUILD_DIR``) up to date and read the remarks that
``csrc/keep_log.py`` kept beside the objects. The tests on machine code need a ``cuobjdump``
(CUDA toolkit, or the one inside the triton wheel).
"""

from __future__ import annotations

import collections
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Kernels that run wgmma in their main loop. Everything else is bound by memory.
HOT = re.compile(r"attn_fwd_kernel|bwd_fused|bwd_keys|bwd_queries|fp8_fwd")

pytestmark = [pytest.mark.build, pytest.mark.timeout(1800)]


@dataclass
class Remarks:
    """What ptxas said of one kernel."""

    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    registers: int = 0
    codes: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def build_dir() -> Path:
    """An up-to-date build."""
    target = Path(os.environ.get("FA3_TRAIN_BUILD_DIR", ROOT / "build"))
    configure = ["cmake", "-S", str(ROOT), "-B", str(target), "-DFA3_REQUIRE_CUDA=ON"]
    if not (target / "CMakeCache.txt").exists() and shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", str(target), "-j", "2"], check=True)
    return target


def parse(text: str) -> dict[str, Remarks]:
    """Remarks by (mangled) kernel name."""
    kernels: dict[str, Remarks] = {}
    current = None
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            current = kernels.setdefault(found[1], Remarks())
        elif found := re.search(r"\((C7\d{3})\).*?(?:in function '(\w+)'|$)", line):
            target = kernels.setdefault(found[2], Remarks()) if found[2] else current
            assert target is not None, line
            target.codes.append(line.strip())
        elif current is not None:
            if found := re.search(r"(\d+) bytes stack frame, (\d+) .*?, (\d+) ", line):
                current.stack, current.spill_stores, current.spill_loads = map(int, found.groups())
            if found := re.search(r"Used (\d+) registers", line):
                current.registers = int(found[1])
    return kernels


@pytest.fixture(scope="session")
def remarks(build_dir: Path) -> dict[str, Remarks]:
    logs = list(build_dir.rglob("*.o.ptxas"))
    kernels: dict[str, Remarks] = {}
    for log in logs:
        kernels.update(parse(log.read_text()))
    hot = [name for name in kernels if HOT.search(name)]
    assert len(hot) >= 40, f"{len(hot)} hot kernels in {len(logs)} logs: is this the whole library?"
    return kernels


def test_the_parser_sees_what_it_looks_for() -> None:
    """On a log that has one of everything: a parser that finds nothing must not pass."""
    name = "_Z15attn_fwd_kernelv"
    text = (
        f"ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
        f"serialized due to non wgmma instructions defining accumulator registers of a wgmma "
        f"between start and end of the pipeline stage in function '{name}'\n"
        f"ptxas info    : Compiling entry function '{name}' for 'sm_90a'\n"
        f"ptxas info    : Function properties for {name}\n"
        "    24 bytes stack frame, 40 bytes spill stores, 64 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 16 barriers\n"
    )
    found = parse(text)[name]
    assert (found.stack, found.spill_stores, found.spill_loads) == (24, 40, 64)
    assert found.registers == 168 and len(found.codes) == 1


def test_no_spills_in_hot_kernels(remarks: dict[str, Remarks]) -> None:
    spilling = {
        name: (r.spill_stores, r.spill_loads)
        for name, r in remarks.items()
        if HOT.search(name) and (r.spill_stores or r.spill_loads or r.stack)
    }
    assert not spilling


def test_wgmma_is_not_serialized_and_setmaxnreg_not_ignored(remarks: dict[str, Remarks]) -> None:
    """C7510, C7511, C7514, C7515: serialized; C7508: setmaxnreg ignored; C7519: fence injected."""
    noted = {name: r.codes for name, r in remarks.items() if r.codes}
    assert not noted


# ---- machine code ------------------------------------------------------------------------------
def find_cuobjdump() -> str | None:
    if found := shutil.which("cuobjdump"):
        return found
    if spec := importlib.util.find_spec("triton"):
        for location in spec.submodule_search_locations or []:
            candidate = Path(location) / "backends/nvidia/bin/cuobjdump"
            if candidate.is_file():
                return str(candidate)
    return None


def sass(build_dir: Path, stem: str) -> dict[str, str]:
    """Machine code by kernel name of one object file of the library."""
    tool = find_cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump")
    objects = list(build_dir.rglob(f"{stem}.cu.o"))
    assert len(objects) == 1, (stem, objects)
    done = subprocess.run(
        [tool, "-sass", str(objects[0])], check=True, capture_output=True, text=True
    )
    parts = re.split(r"\n\s*Function : (\w+)\n", done.stdout)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


# (tile, keys, dim of q and k, columns of O with the eight of ones): the tile table of
# csrc/attn/fwd_traits.cuh, written down a second time.
FORWARD_TILES = [
    ("d64", 128, 64, 72),
    ("d96", 128, 96, 96),
    ("d128", 128, 128, 136),
    ("d192x128", 112, 192, 128),
    ("d192", 96, 192, 192),
    ("d256", 64, 256, 256),
]


@pytest.mark.parametrize("tile,block_n,dim_qk,columns", FORWARD_TILES)
def test_forward_machine_code(
    build_dir: Path, tile: str, block_n: int, dim_qk: int, columns: int
) -> None:
    """S = Q K is dim_qk / 16 instructions of 64 x block_n, P V is block_n / 16 of 64 x columns."""
    kernels = sass(build_dir, f"fwd_{tile}_bf16")
    assert len(kernels) == 4  # none, causal, window, softcap
    for name, code in kernels.items():
        assert not re.search(r"\b(LDL|STL)\b", code), f"{name}: local memory"
        assert len(re.findall(r"\bUSETMAXREG\b", code)) == 2, name
        assert re.search(r"\bUTMALDG\.4D\b", code), name
        shapes = collections.Counter(re.findall(r"\bHGMMA\.64x(\d+)x16\b", code))
        assert set(map(int, shapes)) == {block_n, columns}, (name, shapes)
        products_qk, products_pv = dim_qk // 16, block_n // 16
        if block_n != columns:
            assert shapes[str(block_n)] % products_qk == 0, (name, shapes)
            assert shapes[str(columns)] % products_pv == 0, (name, shapes)
        # S once more than there are loop bodies (the first block), P V likewise (the last)
        bodies = sum(shapes.values()) / (products_qk + products_pv) - 1
        assert bodies in (2, 3, 4), (name, shapes)
