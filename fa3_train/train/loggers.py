"""Where a run's numbers go: terminal, metrics.jsonl, wandb, TensorBoard, plots. Rank 0 only.

metrics.jsonl is the record that everything else can be rebuilt from. Its lines are
    {"event": "run", ...}         once per start: config, GPU, peak, formulas
    {"step": n, "loss": ...}      every step (keys: metrics.py)
    {"event": "eval" | "checkpoint" | ..., "step": n, ...}
A number that is not known or not finite is null. On resume at step k the lines of later steps,
which the resumed run will write again, are dropped, and so is a line that a kill cut short. A fresh
run in a used folder sets the old file aside as metrics.<n>.jsonl.

On a terminal rich draws one live line; elsewhere (its live display would print only its last
state) a plain line comes every `logging.every` steps.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from fa3_train.train.config import ConfigError, TrainConfig

Record = dict[str, Any]
METRICS_FILE = "metrics.jsonl"


class RunLogger:
    """Takes the records of `StepMeter.flush()` and events; on ranks other than 0 it does nothing.

    Args:
        run_info: facts for the first line, from `StepMeter.describe()` and the engine.
        start_step: steps already done (a resumed run), 0 for a fresh one.
        state: what `state()` returned when the checkpoint was written.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_info: Record,
        *,
        rank: int = 0,
        start_step: int = 0,
        state: Record | None = None,
    ) -> None:
        self.config = config
        self._active = rank == 0
        self._wandb: Any = None
        self._tensorboard: Any = None
        self._state = dict(state or {})
        if not self._active:
            return
        self.folder = Path(config.run_dir())
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics = self.folder / METRICS_FILE
        prepare_metrics(self.metrics, start_step)
        _write_config(config, self.folder / "config.yaml")
        self._file = self.metrics.open("a", encoding="utf-8")
        self._view = _make_view(config, start_step)
        facts = {"event": "run", "name": config.run_name(), "start_step": start_step, **run_info}
        self._write({**facts, "config": config.to_dict()})
        if config.logging.wandb != "off":
            from fa3_train.train.wandb_logger import WandbLogger, resolve_mode

            if resolve_mode(config.logging.wandb) != "off":
                self._wandb = WandbLogger(
                    config, run_info, self.folder, self._state.get("wandb_id")
                )
                self._state["wandb_id"] = self._wandb.id
        if config.logging.tensorboard:
            self._tensorboard = _tensorboard(self.folder / "tensorboard")
        for line in header(config, run_info, start_step):
            self._view.message(line)

    def log(self, records: list[Record]) -> None:
        """Records of consecutive steps, oldest first."""
        if not self._active or not records:
            return
        for record in records:
            clean = self._write(record)
            if self._wandb is not None:
                self._wandb.log(clean)
            self._to_tensorboard(clean)
        self._view.steps(records)

    def event(self, name: str, *, step: int, **values: Any) -> None:
        """Something that happened after `step`: evaluation, checkpoint, stop."""
        if not self._active:
            return
        clean = self._write({"event": name, "step": step, **values})
        if self._wandb is not None:
            self._wandb.log(clean)
        self._to_tensorboard(clean)
        shown = "  ".join(f"{key} {_short(value)}" for key, value in values.items())
        self._view.message(f"step {step}  {name}  {shown}".rstrip())

    def message(self, text: str) -> None:
        """A line for the person at the terminal only."""
        if self._active:
            self._view.message(text)

    def state(self) -> Record:
        """What a checkpoint keeps, so that a resumed run continues the same wandb run."""
        return dict(self._state)

    def close(self, failed: bool = False) -> dict[str, str]:
        """Finishes the files and draws the plots; returns what lies where."""
        if not self._active:
            return {}
        self._view.close()
        self._file.close()
        paths = {"metrics": str(self.metrics)}
        if self.config.logging.plots:
            from fa3_train.train.plots import draw

            for path in draw(self.metrics):
                paths["plot" if path.stem == "loss" else path.stem] = str(path)
        if self._tensorboard is not None:
            self._tensorboard.close()
            paths["tensorboard"] = str(self.folder / "tensorboard")
        if self._wandb is not None:
            self._wandb.close(failed)
            paths["wandb"] = str(self._wandb.folder)
            if self._wandb.mode == "offline":
                paths["wandb"] += "  (offline; upload with `wandb sync`)"
        return paths

    def _write(self, row: Record) -> Record:
        clean = {key: _finite(value) for key, value in row.items()}
        clean["time"] = round(time.time(), 3)
        self._file.write(json.dumps(clean, allow_nan=False) + "\n")
        self._file.flush()
        return clean

    def _to_tensorboard(self, clean: Record) -> None:
        if self._tensorboard is None:
            return
        for key, value in clean.items():
            if key not in ("step", "event", "time") and isinstance(value, (int, float)):
                self._tensorboard.add_scalar(key, value, clean["step"])


def prepare_metrics(path: Path, start_step: int) -> None:
    """Makes `path` ready to be continued after `start_step`; see the module docstring.

    The rewritten file replaces the old one in one rename, so a kill leaves one of the two.
    """
    if not path.exists():
        return
    if start_step == 0:
        number = 1
        while (aside := path.with_name(f"metrics.{number}.jsonl")).exists():
            number += 1
        path.rename(aside)
        return
    kept: list[str] = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{path} is not a metrics file: line {number}: {error}; move it away or choose "
                "another run.dir"
            ) from None
        if row.get("event") == "run" or row.get("step", 0) <= start_step:
            kept.append(line)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def header(config: TrainConfig, info: Record, start_step: int) -> list[str]:
    """The lines that a run opens with."""
    peak = info.get("peak_bf16_flops")
    gpus = int(info.get("gpus", 1))
    lines = [
        f"{config.run_name()}: {config.description}" if config.description else config.run_name(),
        f"{info.get('parameters', 0):,} parameters, {gpus} x {info.get('gpu', '?')}, "
        f"engine {config.engine.name}, attention "
        f"{info.get('attention_backend', config.attention.backend)}, "
        f"{config.attention.precision}, linear {config.linear}",
        f"{config.tokens_per_step():,} tokens a step ({config.data.micro_batch} x "
        f"{config.data.seq_len} x {gpus} x {config.grad_accum(gpus)} accumulation), "
        f"{config.run.steps} steps",
        f"mfu_causal against {peak / 1e12:.1f} TFLOP/s bf16 ({info.get('peak_source')})"
        if peak
        else "mfu_causal n/a: the peak of this device is not in the table",
        f"writing to {config.run_dir()}",
    ]
    if config.run.gpus and config.run.gpus != gpus:
        lines.append(
            f"note: {config.recipe} was sized for {config.run.gpus} GPUs and runs on {gpus}: "
            "its speed is not comparable with the recipe's figures"
        )
    if start_step:
        lines.append(f"resumed after step {start_step}")
    return lines


def step_line(records: list[Record], total: int) -> str:
    """One plain line for an interval: loss of its last step, rates over all of it."""
    last = records[-1]
    ms = sum(r["step_ms"] for r in records)
    count = len(records)

    def mean(key: str) -> float:
        return float(sum(r[key] for r in records)) / count

    share = next((r["attention_share"] for r in reversed(records) if r["attention_share"]), None)
    parts = [
        f"step {last['step']:>{len(str(total))}}/{total}",
        f"loss {last['loss']:.4f}",
        f"lr {last['lr']:.2e}",
    ]
    if last["grad_norm"] is not None:
        parts.append(f"norm {last['grad_norm']:.3g}")
    parts += [
        f"{sum(r['tokens'] for r in records) / ms * 1e3:,.0f} tok/s",
        f"{mean('tflops_per_gpu'):.3g} TFLOP/s/GPU",
        f"mfu_causal {_percent(_rate(records, 'mfu_causal'))}",
        f"{ms / count:.0f} ms (data {mean('data_ms'):.0f} fwd {mean('forward_ms'):.0f} "
        f"bwd {mean('backward_ms'):.0f} opt {mean('optimizer_ms'):.0f})",
    ]
    if share is not None:
        parts.append(f"attention {_percent(share)}")
    parts.append(f"{last['peak_memory_gib']:.2f} GiB")
    return "  ".join(parts)


def short_line(records: list[Record]) -> str:
    """The interval for a live line beside a progress bar: what fits a terminal of 100 columns."""
    ms = sum(r["step_ms"] for r in records)
    share = next((r["attention_share"] for r in reversed(records) if r["attention_share"]), None)
    parts = [
        f"loss {records[-1]['loss']:.3f}",
        f"{sum(r['tokens'] for r in records) / ms * 1e3:,.0f} tok/s",
        f"mfu {_percent(_rate(records, 'mfu_causal'))}",
        f"{ms / len(records):.0f} ms",
    ]
    return "  ".join(parts if share is None else [*parts, f"attn {100 * share:.0f}%"])


class _PlainView:
    def __init__(self, total: int) -> None:
        self._total = total

    def steps(self, records: list[Record]) -> None:
        print(step_line(records, self._total), flush=True)

    def message(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        pass


class _SilentView(_PlainView):
    def steps(self, records: list[Record]) -> None:
        pass

    def message(self, text: str) -> None:
        pass


class _RichView(_PlainView):
    """A progress bar with the last interval's numbers; messages scroll above it."""

    def __init__(self, total: int, done: int) -> None:
        super().__init__(total)
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=16),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
        )
        self._task = self._progress.add_task("", total=total, completed=done)
        self._progress.start()

    def steps(self, records: list[Record]) -> None:
        done = records[-1]["step"]
        self._progress.update(self._task, completed=done, description=short_line(records))

    def message(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


def _make_view(config: TrainConfig, done: int) -> _PlainView:
    wanted = config.logging.progress
    if wanted == "off":
        return _SilentView(config.run.steps)
    if wanted == "rich" or (wanted == "auto" and sys.stdout.isatty()):
        return _RichView(config.run.steps, done)
    return _PlainView(config.run.steps)


def _tensorboard(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


def _write_config(config: TrainConfig, path: Path) -> None:
    from fa3_train.train.plan import resolved_yaml

    path.write_text(resolved_yaml(config) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """`value` as JSON can hold it: null for a number that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _rate(records: list[Record], key: str) -> float | None:
    """Mean of a rate over time; None when it is not known."""
    if any(r.get(key) is None for r in records):
        return None
    ms = sum(r["step_ms"] for r in records)
    return float(sum(r[key] * r["step_ms"] for r in records) / ms)


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.1f}%"


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
