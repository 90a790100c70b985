"""What `bench curves` writes of its runs: the JSON record, the table, the plot with its bands."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Run:
    """One training run of a series and what it left behind."""

    series: str
    seed: int
    command: list[str]
    folder: Path
    steps: int
    kill_at: int | None = None
    limit_s: float = 3600.0
    info: dict[str, Any] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    evals: dict[int, float] = field(default_factory=dict)
    step_ms: float | None = None
    before_kill: dict[int, float] = field(default_factory=dict)
    resumed_after: int | None = None
    error: str | None = None


def smoothed(losses: dict[int, float], window: int) -> list[tuple[int, float]]:
    """(step, mean of the `window` losses up to it)."""
    steps = sorted(losses)
    values = [losses[s] for s in steps]
    total, result = 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        result.append((steps[i], total / min(i + 1, window)))
    return result


def tail(losses: dict[int, float], count: int) -> float:
    """Mean of the last `count` losses."""
    last = sorted(losses)[-count:]
    return statistics.fmean(losses[s] for s in last) if last else float("nan")


def table(result: dict[str, Any]) -> str:
    """The result for eyes: Markdown."""
    lines = [
        "| | seeds | held-out loss | minus first | range of first | within | "
        "last training losses | minus first | range of first | within |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for number, row in enumerate(result["judgement"]):
        cells = [row["series"], str(row["seeds"])]
        for kind in ("held_out", "training"):
            d = row[kind] if number else {"mean": row[kind]["mean"]}
            cells += [_number(d["mean"]), _number(d.get("difference"), "+.4f")]
            cells += [_number(d.get("range_of_first")), _yes(d.get("within"))]
        lines.append("| " + " | ".join(cells) + " |")
    for row in result["judgement"][1:]:
        pairs = row["held_out"].get("paired") or {}
        shown = ", ".join(f"{value:+.4f}" for value in pairs.values())
        lines.append(f"\nHeld-out loss of {row['series']} minus first, seed by seed: {shown}.")
    for seam in result["seams"]:
        lines.append(
            f"\n{seam['series']}: killed at step {seam['killed_at']}, resumed after step "
            f"{seam['resumed_after']}; {seam['steps_taken_twice']} steps were taken twice, "
            f"{seam['bitwise_equal']} of them with the same bits; largest difference "
            f"{_number(seam['largest_difference'], '.1e')} (loss changes by "
            f"{_number(seam['usual_change_from_step_to_step'], '.1e')} from step to step)."
        )
    return "\n".join(lines)


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def _yes(value: bool | None) -> str:
    return "-" if value is None else ("yes" if value else "NO")


def as_record(run: Run) -> dict[str, Any]:
    """A run in the result file, without the paths of this machine."""
    import torch

    packages = str(Path(torch.__file__).parent.parent)
    words = [w.replace(packages, "...") for w in run.command[2:] if not w.startswith("run.dir=")]
    return {
        "series": run.series,
        "seed": run.seed,
        "command": "python -m " + " ".join(words),
        "text": str(run.info.get("data")).replace(packages, "..."),
        "parameters": run.info.get("parameters"),
        "tokens_per_step": run.info.get("tokens_per_step"),
        "step_ms": run.step_ms,
        "loss": [round(run.losses[s], 5) for s in sorted(run.losses)],
        "held_out": run.evals,
        "killed_at": run.kill_at,
        "resumed_after": run.resumed_after,
        "loss_before_kill": {s: v for s, v in run.before_kill.items() if s in _overlap(run)},
        "error": run.error,
    }


def _overlap(run: Run) -> set[int]:
    return {s for s in run.before_kill if s > (run.resumed_after or 0)}


def draw(title: str, runs: list[Run], window: int, path: Path) -> None:
    """Bands over the seeds, and below the distance of each series from the first one's mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, height_ratios=(2, 1), sharex=True)
    good = [run for run in runs if not run.error]
    base: dict[int, float] = {}
    for number, name in enumerate(dict.fromkeys(run.series for run in good)):
        mine = [r for r in good if r.series == name]
        lines = [dict(smoothed(r.losses, window)) for r in mine]
        steps = [s for s in sorted(lines[0]) if s >= window]
        mean = {s: statistics.fmean(line[s] for line in lines) for s in steps}
        low = [min(line[s] for line in lines) for s in steps]
        high = [max(line[s] for line in lines) for s in steps]
        color = f"C{number}"
        seeds = f", {len(mine)} seeds" if len(mine) > 1 else ""
        upper.plot(steps, [mean[s] for s in steps], color=color, label=f"{name}{seeds}", lw=1.3)
        upper.fill_between(steps, low, high, color=color, alpha=0.25, linewidth=0)
        evals = [(s, statistics.fmean(r.evals[s] for r in mine)) for s in sorted(mine[0].evals)]
        if evals:
            upper.plot(*zip(*evals[1:], strict=True), "o", ms=3, color=color)
        base = base or mean
        around = [s for s in steps if s in base]
        lower.plot(around, [mean[s] - base[s] for s in around], color=color, lw=1.3)
        if number == 0 and len(mine) > 1:
            below = [a - base[s] for a, s in zip(low, steps, strict=True)]
            above = [b - base[s] for b, s in zip(high, steps, strict=True)]
            lower.fill_between(steps, below, above, color=color, alpha=0.25, linewidth=0)
        for run in mine:
            if run.resumed_after is not None:
                for axis in (upper, lower):
                    axis.axvline(run.resumed_after, color=color, lw=0.8, ls=":")
                    axis.axvline(max(run.before_kill), color=color, lw=0.8, ls="--")
    upper.set_title(title, fontsize=10)
    upper.set_ylabel(f"loss, mean of {window} steps (dots: held out)")
    lower.set_ylabel("minus mean of the first")
    lower.set_xlabel("step (dashed: killed, dotted: resumed from)" if any(
        run.resumed_after for run in good) else "step")  # fmt: skip
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
    upper.legend(fontsize=8)
    figure.savefig(path)


def write_json(result: dict[str, Any], out: str) -> Path:
    """OUT.json, whole or not at all."""
    path = Path(out).with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(result, indent=1) + "\n")
    return fresh.replace(path)


def write(result: dict[str, Any], runs: list[Run], out: str) -> list[Path]:
    """OUT.json, OUT.md, OUT.png."""
    base = Path(out)
    paths = [write_json(result, out), base.with_suffix(".md"), base.with_suffix(".png")]
    facts = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    paths[1].write_text(
        f"{result['title']}\n\n    {result['command']}\n\n{facts}\n\n{table(result)}\n"
    )
    gpu = result["machine"].get("gpu", "CPU")
    draw(f"{result['title']} ({gpu})", runs, result["window"], paths[2])
    return paths
