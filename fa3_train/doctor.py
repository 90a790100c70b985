"""`python -m fa3_train.doctor`: what is here, and what each missing thing would need.

Nothing is changed and nothing trains. Exit code 0 when the default recipe can run here, 1 when a
required package is missing or broken. `--json` prints the same facts for a program.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One line: is it usable, what was found, and for what is missing the way to get it."""

    name: str
    ok: bool
    found: str
    need: str = ""
    required: bool = False


# Distribution, module, required, what it is for and how to get it.
_PACKAGES: tuple[tuple[str, str, bool, str], ...] = (
    ("hydra-core", "hydra", True, "configuration: pip install 'hydra-core>=1.3.2,<1.4'"),
    ("numpy", "numpy", True, "data: pip install numpy"),
    ("tokenizers", "tokenizers", True, "data from text: pip install tokenizers"),
    ("safetensors", "safetensors", True, "Hugging Face weights: pip install safetensors"),
    ("rich", "rich", True, "progress on a terminal: pip install rich"),
    ("matplotlib", "matplotlib", True, "plots (logging.plots): pip install matplotlib"),
    ("einops", "einops", True, "DeepSpeed's sequence parallelism: pip install einops"),
    ("wandb", "wandb", True, "logging.wandb: pip install 'wandb>=0.27,<0.30'"),
    ("deepspeed", "deepspeed", True, "engine=deepspeed: pip install 'deepspeed>=0.19,<0.20'"),
    ("tensorboard", "tensorboard", False, "logging.tensorboard=true: pip install tensorboard"),
    ("transformers", "transformers", False, "integrations.hf: pip install 'fa3_train[hf]'"),
    ("datasets", "datasets", False, "data=hf: pip install datasets"),
    (
        "transformer-engine",
        "transformer_engine",
        False,
        "linear=te: after torch, with nvcc, pip install --no-build-isolation 'fa3_train[te]'",
    ),
    ("megatron-core", "megatron", False, "integrations.megatron: pip install megatron-core"),
    ("flash-attn-3", "flash_attn_interface", False, "only to compare with: build FlashAttention-3"),
)


def examine() -> dict[str, list[Finding]]:
    """All findings by section, in print order."""
    return {
        "system": _system(),
        "torch and GPU": _torch(),
        "attention backends": _backends(),
        "packages": [_package(*row) for row in _PACKAGES],
        "to build the kernels": _tools(),
    }


def _system() -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        Finding("fa3_train", True, _version("fa3_train") or "run from a source folder"),
        Finding(
            "python",
            sys.version_info >= (3, 11),
            platform.python_version(),
            "Python 3.11 or newer",
            required=True,
        ),
        Finding("platform", True, f"{platform.system()} {platform.machine()}, {cores} CPU cores"),
    ]


def _torch() -> list[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return [Finding("torch", False, str(error), "pip install 'torch>=2.9'", required=True)]
    numbers = re.match(r"(\d+)\.(\d+)", torch.__version__)
    recent = numbers is not None and tuple(map(int, numbers.groups())) >= (2, 9)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    found = [
        Finding(
            "torch", recent, f"{torch.__version__} ({build})", "torch 2.9 or newer", required=True
        )
    ]
    if not torch.cuda.is_available():
        why = (
            "an NVIDIA GPU and its driver"
            if torch.version.cuda
            else "a CUDA build of torch, an NVIDIA GPU and its driver"
        )
        return [*found, Finding("GPU", False, "none visible", why)]
    from fa3_train.train.flops import peak_of

    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        major, minor = torch.cuda.get_device_capability(index)
        memory = torch.cuda.get_device_properties(index).total_memory / (1 << 30)
        peak = peak_of(name)
        text = f"{name}, sm_{major}{minor}, {memory:.0f} GiB, driver {_driver()}, "
        text += f"bf16 peak {peak.bf16 / 1e12:.1f} TFLOP/s" if peak else "peak not known: MFU n/a"
        found.append(Finding(f"GPU {index}", True, text))
    return found


def _backends() -> list[Finding]:
    try:
        import torch

        from fa3_train import _lib
        from fa3_train.ops.attention import resolve_backend
    except (ImportError, OSError) as error:
        return [Finding("all", False, str(error), "a working torch")]
    found = []
    try:
        library = _lib.load()
        found.append(Finding("kernel library", True, f"{library.path}: {library.build_info}"))
    except _lib.LibraryNotFound as error:
        need = str(error)
        found.append(Finding("kernel library", False, "not built", need[:1].upper() + need[1:]))
    except _lib.LibraryError as error:
        found.append(Finding("kernel library", False, "unusable", str(error)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for backend in ("hopper", "sdpa", "reference"):
        try:
            resolve_backend(
                backend, device, torch.bfloat16, 128, options=("varlen", "grouped", "grad")
            )
            found.append(Finding(backend, True, f"trains packed bf16 batches on {device.type}"))
        except (ValueError, RuntimeError) as error:
            found.append(Finding(backend, False, f"not on this {device.type}", str(error)))
    return found


def _package(name: str, module: str, required: bool, need: str) -> Finding:
    if importlib.util.find_spec(module) is None:
        purpose, remedy = need.split(": ", 1)
        return Finding(name, False, "not installed", f"{remedy} (for {purpose})", required)
    version = _version(name) or "version not stated"
    if module == "transformer_engine":
        return _transformer_engine(name, version)
    return Finding(name, True, version, required=required)


def _transformer_engine(name: str, version: str) -> Finding:
    from fa3_train.modules import te

    try:
        te.load()
    except (ImportError, RuntimeError) as error:
        return Finding(name, False, f"{version}, unusable here", str(error).splitlines()[0])
    return Finding(name, True, version)


def _tools() -> list[Finding]:
    wheel = importlib.util.find_spec("nvidia") is not None and _version("nvidia-cuda-nvcc")
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    release = _run([nvcc, "--version"], r"release ([\d.]+)") if nvcc else ""
    found = f"{nvcc} {release}" if nvcc else f"wheel {wheel}" if wheel else "not found"
    enough = not release or tuple(map(int, release.split(".")[:2])) >= (12, 8)
    return [
        Finding(
            "nvcc",
            bool(nvcc or wheel) and enough,
            found,
            "a CUDA toolkit from 12.8 on, or its compiler from wheels: pip install "
            "'fa3_train[build]'",
        ),
        _tool("C++ compiler", ("c++", "g++", "clang++"), "apt-get install g++, or the like"),
        _tool("cmake", ("cmake",), "pip install cmake (an install from source brings its own)"),
        _tool("ninja", ("ninja",), "pip install ninja; DeepSpeed's CPU op needs it on the PATH"),
    ]


def _tool(name: str, commands: Sequence[str], need: str) -> Finding:
    beside = os.path.dirname(sys.executable)  # an environment that is not activated
    for command in commands:
        path = shutil.which(command) or shutil.which(command, path=beside)
        if path:
            return Finding(name, True, path)
    return Finding(name, False, "not found", need)


def _driver() -> str:
    smi = shutil.which("nvidia-smi")
    query = ["--query-gpu=driver_version", "--format=csv,noheader"]
    return (smi and _run([smi, *query], r"([\d.]+)")) or "not known"


def _run(command: list[str], pattern: str) -> str:
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    match = re.search(pattern, text)
    return match.group(1) if match else ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def report(sections: dict[str, list[Finding]]) -> str:
    """The findings as text, missing things with their remedy on the next line."""
    lines = []
    for title, findings in sections.items():
        lines.append(title)
        for item in findings:
            mark = "ok" if item.ok else "MISSING" if item.required else "-"
            lines.append(f"  {mark:<8}{item.name:<19} {item.found}")
            if not item.ok and item.need:
                lines.append(f"{'':30}needs: {item.need}")
    return "\n".join(lines)


def main(
    argv: Sequence[str] | None = None,
    examine: Callable[[], dict[str, list[Finding]]] = examine,
) -> int:
    """Prints the report; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if unknown := [word for word in words if word != "--json"]:
        print(f"usage: python -m fa3_train.doctor [--json]; got {unknown[0]}", file=sys.stderr)
        return 2
    sections = examine()
    if words:
        facts: dict[str, Any] = {
            title: [asdict(item) for item in items] for title, items in sections.items()
        }
        print(json.dumps(facts, indent=1))
    else:
        print(report(sections))
    broken = [f.name for fs in sections.values() for f in fs if f.required and not f.ok]
    if broken and not words:
        print(f"\nthe default recipe cannot run here: {', '.join(broken)}")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
