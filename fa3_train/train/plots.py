"""Plots of a finished (or running) run, from its metrics.jsonl: loss.png and throughput.png.

    python -m fa3_train.train.plots runs/quickstart/metrics.jsonl               draw them again
    python -m fa3_train.train.plots runs/quickstart/metrics.jsonl docs/results/quickstart
        write docs/results/quickstart_loss.png, quickstart_throughput.png and quickstart.json
"""

from __future__ import annotations

import json
import statistics
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


def draw(path: Path, prefix: str | None = None) -> list[Path]:
    """Draws loss and throughput beside `path`, or as <prefix>_loss.png and so on.

    Returns the files; nothing is drawn without a step.
    """
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
    loss = path.with_name("loss.png") if prefix is None else Path(f"{prefix}_loss.png")
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
    throughput = loss.with_name(loss.name.replace("loss.png", "throughput.png"))
    fig.savefig(throughput)
    return [loss, throughput]


def _column(rows: Rows, key: str) -> tuple[list[float], list[float]]:
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [x for x, _ in found], [y for _, y in found]


def digest(path: Path) -> dict[str, Any]:
    """A run in a page: facts, evaluations, loss of every step, medians of the other columns."""
    info, steps, evals = read_metrics(path)
    medians = {}
    for key in sorted({key for row in steps for key in row} - {"step", "loss", "time", "lr"}):
        values = _column(steps, key)[1]
        if values and key not in ("tokens_total", "grad_norm"):
            medians[key] = statistics.median(values)
    config = info.pop("config", {})
    return {
        "command": f"python -m fa3_train recipe={config.get('recipe')}",
        "run": {key: value for key, value in info.items() if key not in ("event", "time")},
        "config": config,
        "training_s": sum(row["step_ms"] for row in steps) / 1e3,
        "step_ms_min": min((row["step_ms"] for row in steps), default=None),
        "medians": medians,
        "evaluations": [{"step": row["step"], "val_loss": row["val_loss"]} for row in evals],
        "loss": [row["loss"] for row in steps],
    }


def main(words: list[str]) -> int:
    """METRICS [PREFIX]; returns the exit code."""
    if len(words) not in (1, 2):
        print(__doc__, file=sys.stderr)
        return 2
    source = Path(words[0])
    files = draw(source, words[1] if len(words) == 2 else None)
    if len(words) == 2:
        target = Path(f"{words[1]}.json")
        target.write_text(json.dumps(digest(source), indent=1) + "\n", encoding="utf-8")
        files.append(target)
    for file in files:
        print(file)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
