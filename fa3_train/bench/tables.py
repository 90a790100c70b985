"""Result files: JSON with everything, a table for eyes, both from the same dictionary.

{"what": "attention", "command": ..., "machine": {...}, "ceilings": {...},
 "cells": [{"name", "group", "pass", "dtype", "flops", "peers": {name: {...} or {"skipped"}}}]}
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, str]:
    """GPU, driver, CUDA, torch, cuDNN: what a reader needs to compare numbers."""
    facts = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        version = torch.backends.cudnn.version() or 0
        facts["cudnn"] = f"{version // 10000}.{version // 100 % 100}.{version % 100}"
        facts["driver"] = _driver()
    facts["python"] = platform.python_version()
    return facts


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def geometric_mean(values: Iterable[float]) -> float:
    """exp(mean(log)); nan for none."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def rate(cell: dict[str, Any], peer: str) -> float | None:
    """TFLOP/s of ``peer`` in ``cell``, or None."""
    return cell["peers"].get(peer, {}).get("tflops")


def ratios(cells: list[dict[str, Any]], ours: str, peer: str) -> list[float]:
    """ours / peer over the cells where both ran."""
    pairs = [(rate(c, ours), rate(c, peer)) for c in cells]
    return [a / b for a, b in pairs if a and b]


def text_table(result: dict[str, Any]) -> str:
    """Rows are cells, columns TFLOP/s of each peer and the ratios to the first one."""
    cells = result["cells"]
    if not cells:
        return "no cells"
    peers = [p for p in result["peers"] if any(rate(c, p) for c in cells)]
    if not peers:
        return "nothing ran"
    first, others = peers[0], peers[1:]
    width = max(len(c["name"]) for c in cells) + 2
    wide = max(9, *(len(p) + 3 for p in peers))

    def columns(values: list[float | None], digits: int) -> str:
        return "".join(f"{v:{wide}.{digits}f}" if v else f"{'-':>{wide}}" for v in values)

    head = f"{'':{width}}{'pass':>8}" + "".join(f"{p:>{wide}}" for p in peers)
    lines = [head + "".join(f"{'/' + p:>{wide}}" for p in others) + f"{'spread':>8}"]
    for cell in cells:
        row = f"{cell['name']:{width}}{cell['pass']:>8}"
        row += columns([rate(cell, p) for p in peers], 1)
        row += columns([next(iter(ratios([cell], first, p)), None) for p in others], 3)
        spread = cell["peers"].get(first, {}).get("spread")
        lines.append(row + (f"{spread:8.1%}" if spread is not None else f"{'-':>8}"))
    lines.append("")
    for group, which in dict.fromkeys((c["group"], c["pass"]) for c in cells):
        members = [c for c in cells if (c["group"], c["pass"]) == (group, which)]
        rates = [[r for c in members if (r := rate(c, p))] for p in peers]
        against = [ratios(members, first, p) for p in others]
        row = f"{f'geomean {group}':{width}}{which:>8}"
        row += columns([geometric_mean(r) if r else None for r in rates], 1)
        lines.append(row + columns([geometric_mean(r) if r else None for r in against], 3))
    wrong = [
        f"{c['name']} {c['pass']}: {p}: {v['disagrees']}"
        for c in cells
        for p, v in c["peers"].items()
        if "disagrees" in v
    ]
    if wrong:
        lines += ["", "RESULTS THAT DISAGREE (not timed):", *wrong]
    if result.get("ceilings"):
        lines += ["", "ceilings: " + ", ".join(f"{k} {v}" for k, v in result["ceilings"].items())]
    return "\n".join(lines)


def skipped(result: dict[str, Any]) -> str:
    """Why peers are absent, one line per (peer, reason)."""
    reasons: dict[tuple[str, str], int] = {}
    for cell in result["cells"]:
        for peer, value in cell["peers"].items():
            if "skipped" in value:
                key = (peer, value["skipped"])
                reasons[key] = reasons.get(key, 0) + 1
    return "\n".join(f"{p}: {n} cells skipped: {why}" for (p, why), n in reasons.items())


def write_page(result: dict[str, Any], out: str | Path, body: str, title: str = "") -> list[Path]:
    """``out``.json: ``result``. ``out``.md: ``title``, command, machine, ``body``."""
    base = Path(out)
    base.parent.mkdir(parents=True, exist_ok=True)
    json_path, text_path = base.with_suffix(".json"), base.with_suffix(".md")
    json_path.write_text(json.dumps(result, indent=1) + "\n")
    facts = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    head = f"{title}\n\n" if title else ""
    text_path.write_text(f"{head}    {result['command']}\n\n{facts}\n\n{body}\n")
    return [json_path, text_path]


def add_cells(
    path: Path, result: dict[str, Any], cells: list[dict[str, Any]], key: Callable[[Any], Any]
) -> None:
    """Write ``result`` with ``cells``, and before them those of the file that they do not renew."""
    kept: list[dict[str, Any]] = []
    if path.exists():
        fresh = {key(cell) for cell in cells}
        kept = [cell for cell in json.loads(path.read_text())["cells"] if key(cell) not in fresh]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result | {"cells": kept + cells}, indent=1) + "\n")


def write(result: dict[str, Any], out: str) -> list[Path]:
    """``out``.json, ``out``.md and, if matplotlib is there, ``out``.png."""
    paths = write_page(
        result, out, f"```\n{text_table(result)}\n```\n\n{skipped(result)}",
        f"{result['what']}: TFLOP/s, median of {result['reps']} single calls, L2 flushed",
    )  # fmt: skip
    from fa3_train.bench import plot

    picture = plot.draw(result, Path(out).with_suffix(".png"))
    return [*paths, picture] if picture else paths
