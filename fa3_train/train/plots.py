"""Plots of a finished (or running) run, from its metrics.jsonl: loss.png and throughput.png.

`python -m fa3_train.train.plots runs/quickstart/metrics.jsonl` draws them again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def read_metrics(path: Path) -> tuple[dict[str, Any], Rows, Rows]:
    """(facts of the run, step records, evaluations) of a metrics.jsonl.

    A last line without a newline was cut by a kill and is left out; any other line that is not
    JSON raises ValueError with its number.
    """
    info: dict[str, Any] = {}
    steps: Rows = []
    evals: Rows = []
    text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from None
        event = row.get("event")
        if event == "run":
            info = row
        elif event == "eval":
            evals.append(row)
        elif event is None:
            steps.append(row)
    return info, steps, evals


def draw(path: Path) -> list[Path]:
    """Draws the plots beside `path`; returns their files. Nothing is drawn without a step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    info, steps, evals = read_metrics(path)
    if not steps:
        return []
    title = f"{info.get('name', path.parent.name)} on {info.get('gpus', 1)} x {info.get('gpu', '')}"

    def figure() -> tuple[Any, Any]:
        # Not pyplot: it would choose a backend for the whole process.
        fig = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
        FigureCanvasAgg(fig)
        axes = fig.add_subplot()
        axes.set_xlabel("step")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        return fig, axes

    fig, axes = figure()
    axes.plot(*_column(steps, "loss"), linewidth=1, label="training")
    if evals:
        axes.plot(*_column(evals, "val_loss"), marker="o", label="validation")
    axes.set_ylabel("loss, nats per token")
    axes.legend()
    loss = path.with_name("loss.png")
    fig.savefig(loss)

    fig, axes = figure()
    drawn = False
    for key in ("mfu_causal", "mfu_causal_mixed", "mfu_palm"):
        x, y = _column(steps, key)
        if x:
            axes.plot(x, [100 * v for v in y], linewidth=1, label=key)
            drawn = True
    if drawn:
        axes.set_ylabel("model FLOPs utilisation, %")
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower left")
        axes = axes.twinx()
        axes.set_ylim(bottom=0)
    axes.plot(*_column(steps, "tokens_per_s"), linewidth=1, color="tab:gray", alpha=0.6)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens / s (grey)" if drawn else "tokens / s")
    throughput = path.with_name("throughput.png")
    fig.savefig(throughput)
    return [loss, throughput]


def _column(rows: Rows, key: str) -> tuple[list[float], list[float]]:
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [x for x, _ in found], [y for _, y in found]


if __name__ == "__main__":
    for file in draw(Path(sys.argv[1])):
        print(file)
