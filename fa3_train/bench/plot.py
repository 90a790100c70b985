"""Draw a result file: one panel per group and mask, TFLOP/s over the cells, one line per peer."""

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, help="result files (.json)")


def main(args: argparse.Namespace) -> int:
    for path in args.files:
        result = json.loads(path.read_text())
        print(tables.text_table(result))
        picture = draw(result, path.with_suffix(".png"))
        if picture:
            print(f"wrote {picture}")
    return 0
