"""What a machine lacks is said, with a count; it never turns into a silent pass.

Tests marked ``gpu`` need a Hopper GPU and the compiled library, ``build`` needs nvcc. Without them
they are skipped and the summary says how many and why. ``FA3_TRAIN_REQUIRE_GPU=1`` makes the
absence an error instead, for machines that are supposed to have both.
"""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path

import pytest

_skipped: dict[str, list[str]] = {}

# Before torch loads: the workers of pytest-xdist would each take all cores for their references,
# and wait for one another. With 7 of them on 8 cores a test of 1 s took 9.
if _workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    _share = max(1, len(os.sched_getaffinity(0)) // _workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(_share))
    os.environ.setdefault("MKL_NUM_THREADS", str(_share))


@functools.cache
def gpu_problem() -> str | None:
    """Why ``gpu`` tests cannot run here, or None."""
    import torch

    from fa3_train import _lib

    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        return f"{torch.cuda.get_device_name()} is sm_{major}{minor}, not sm_90"
    if not _lib.available():
        return f"no compiled library at {', '.join(map(str, _lib.search_paths()))}"
    return None


@functools.cache
def build_problem() -> str | None:
    """Why ``build`` tests cannot run here, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    if shutil.which("nvcc") or (Path(home) / "bin" / "nvcc").is_file():
        return None
    return "no nvcc on PATH or under CUDA_HOME"


def pytest_collection_modifyitems(config, items) -> None:
    del config
    for item in items:
        for mark, problem in (("gpu", gpu_problem), ("build", build_problem)):
            if item.get_closest_marker(mark) is None:
                continue
            reason = problem()
            if reason is None:
                continue
            if mark == "gpu" and os.environ.get("FA3_TRAIN_REQUIRE_GPU") == "1":
                raise pytest.UsageError(f"FA3_TRAIN_REQUIRE_GPU=1, but: {reason}")
            _skipped.setdefault(f"{mark}: {reason}", []).append(item.nodeid)
            item.add_marker(pytest.mark.skip(reason=f"{mark}: {reason}"))


def pytest_terminal_summary(terminalreporter) -> None:
    for reason, names in _skipped.items():
        terminalreporter.write_line(f"{len(names)} tests did not run, {reason}", yellow=True)
