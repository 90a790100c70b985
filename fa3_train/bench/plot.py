"""Draw a result file: lines over the cells for attention, bars for layers and training steps."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from fa3_train.bench import tables


def draw(result: dict[str, Any], path: Path) -> Path | None:
    """Write ``path`` (png); None, with a printed note, where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print(f"no plot: matplotlib is not installed; `plot {path.with_suffix('.json')}` draws it")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[tuple[str, str, bool], list[dict[str, Any]]] = {}
    for cell in result["cells"]:
        panels.setdefault((cell["group"], cell["pass"], cell["causal"]), []).append(cell)
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6.5 * columns, 3.4 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, ((group, which, causal), cells) in zip(axes.flat, panels.items(), strict=False):
        names = [c["name"].split()[-1] if c["group"].startswith("d") else c["name"] for c in cells]
        for peer in result["peers"]:
            points = [(i, tables.rate(c, peer)) for i, c in enumerate(cells)]
            points = [(i, y) for i, y in points if y]
            if points:
                style = {"linewidth": 2.5, "zorder": 3} if peer == "ours" else {"linewidth": 1.2}
                axis.plot(*zip(*points, strict=True), marker="o", label=peer, **style)
        axis.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=8)
        axis.set_title(f"{group} {which} {'causal' if causal else 'full'}", fontsize=10)
        axis.set_ylabel("TFLOP/s")
        axis.set_ylim(bottom=0, top=1.05 * axis.get_ylim()[1])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    facts = result["machine"]
    figure.suptitle(
        f"{result['what']} {result['dtype']}, {facts.get('gpu', 'no GPU')}, CUDA {facts['cuda']}, "
        f"torch {facts['torch']}, driver {facts.get('driver', '-')}",
        fontsize=10,
    )
    # tight_layout measures no suptitle: leave it 0.35 inch at the top.
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / (3.4 * rows)))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def bars(result: dict[str, Any]) -> tuple[str, dict[str, dict[str, float]]]:
    """What a layer or e2e result shows: the unit, and {group: {variant: value}}."""
    groups: dict[str, dict[str, float]] = {}
    if result["what"] == "e2e":
        for cell in result["cells"]:
            name = f"{cell['engine']}, {cell['linear']}\n{cell['seqlen'] // 1024}k"
            rows = cell.get("variants", {}).items()
            groups[name] = {v: row["tokens_per_s"] for v, row in rows if "step_ms" in row}
        return "tokens/s", groups
    saves = result["suite"] == "backends"
    for cell in result["cells"]:
        rows = {v: row for v, row in cell["variants"].items() if "fwd" in row}
        for which, label in (("fwd", "forward"), ("fwdbwd", "step")):
            name = f"{cell['size']} {cell['seqlen'] // 1024}k\n{label}"
            if saves and "fa2" in rows:
                base = rows["fa2"][which]["ms"]
                groups[name] = {
                    v: 100 * (1 - row[which]["ms"] / base) for v, row in rows.items() if v != "fa2"
                }
            elif not saves:
                groups[name] = {v: row[which]["tflops"] for v, row in rows.items()}
    return ("% of time saved against FlashAttention-2" if saves else "TFLOP/s"), groups


def draw_bars(result: dict[str, Any], path: Path) -> Path | None:
    """Write ``path`` (png) for a layer or e2e result; None where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print(f"no plot: matplotlib is not installed; `plot {path.with_suffix('.json')}` draws it")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    unit, groups = bars(result)
    names = list(dict.fromkeys(v for group in groups.values() for v in group))
    figure, axis = plt.subplots(figsize=(max(6.5, 1.3 * len(groups)), 3.8))
    width = 0.8 / max(1, len(names))
    for i, variant in enumerate(names):
        points = [
            (place + i * width, group[variant])
            for place, group in enumerate(groups.values())
            if variant in group
        ]
        axis.bar(*zip(*points, strict=True), width=width, label=variant)
    places = [g + 0.4 - width / 2 for g in range(len(groups))]
    axis.set_xticks(places, list(groups), fontsize=8)
    axis.set_ylabel(unit)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    facts = result["machine"]
    axis.set_title(
        f"{result['what']}, {facts.get('gpu', 'no GPU')}, CUDA {facts['cuda']}, torch "
        f"{facts['torch']}, driver {facts.get('driver', '-')}", fontsize=9,
    )  # fmt: skip
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, help="result files (.json)")


def main(args: argparse.Namespace) -> int:
    for path in args.files:
        result = json.loads(path.read_text())
        if result["what"] in ("layer", "e2e"):
            picture = draw_bars(result, path.with_suffix(".png"))
        else:
            print(tables.text_table(result))
            picture = draw(result, path.with_suffix(".png"))
        if picture:
            print(f"wrote {picture}")
    return 0
