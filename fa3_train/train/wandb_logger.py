"""Weights & Biases: the only file that imports wandb.

`logging.wandb=auto` goes online when this machine has a login and offline otherwise; offline runs
lie in <run.dir>/wandb and `wandb sync` uploads them later. A resumed run continues under the id in
the checkpoint.

The layout. wandb makes one section per name before the slash, sections in alphabetical order, a
panel per metric. The names below put the five panels that matter into the first section, each
against `tokens` or `step`; nothing needs to be clicked together.
"""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from fa3_train.train.config import ConfigError, TrainConfig

# Key of our record -> name in wandb. The first section is the dashboard.
PANELS = {
    "mfu_causal": "1_overview/mfu_causal",
    "tokens_per_s": "1_overview/tokens_per_s",
    "attention_share": "1_overview/attention_share",
    "loss": "1_overview/loss",
    "peak_memory_gib": "1_overview/peak_memory_gib",
    "val_loss": "1_overview/val_loss",
    "mfu_causal_mixed": "2_throughput/mfu_causal_mixed",
    "mfu_palm": "2_throughput/mfu_palm",
    "hfu": "2_throughput/hfu",
    "tflops_per_gpu": "2_throughput/tflops_per_gpu",
    "tokens_per_s_per_gpu": "2_throughput/tokens_per_s_per_gpu",
    "step_ms": "3_step_time/step_ms",
    "data_ms": "3_step_time/data_ms",
    "forward_ms": "3_step_time/forward_ms",
    "backward_ms": "3_step_time/backward_ms",
    "optimizer_ms": "3_step_time/optimizer_ms",
    "other_ms": "3_step_time/other_ms",
    "lr": "4_optimization/lr",
    "grad_norm": "4_optimization/grad_norm",
    "tokens_total": "tokens_total",
}


def resolve_mode(wanted: str) -> str:
    """`auto` -> "online" with a login (WANDB_API_KEY, WANDB_MODE or ~/.netrc), else "offline"."""
    login = _has_login()
    if wanted == "online" and not login:
        raise ConfigError(
            "logging.wandb=online needs a login: run `wandb login` or set WANDB_API_KEY, "
            "or use logging.wandb=offline"
        )
    if wanted != "auto":
        return wanted
    forced = os.environ.get("WANDB_MODE", "")
    if forced in ("offline", "online"):
        return forced
    if forced in ("disabled", "dryrun"):
        return "offline" if forced == "dryrun" else "off"
    return "online" if login else "offline"


def _has_login() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


class WandbLogger:
    """One wandb run. Build it on rank 0 only."""

    def __init__(
        self, config: TrainConfig, info: dict[str, Any], folder: Path, run_id: str | None
    ) -> None:
        import wandb

        self.mode = resolve_mode(config.logging.wandb)
        self._run = wandb.init(
            project=config.logging.wandb_project,
            name=config.run_name(),
            id=run_id,
            resume="allow" if self.mode == "online" else None,
            dir=str(folder),
            mode="offline" if self.mode == "offline" else "online",
            config={**config.to_dict(), "machine": info},
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
        self.id = str(self._run.id)
        self.folder = Path(self._run.dir).parent
        self._run.define_metric("step")
        for name in PANELS.values():
            summary = "min" if name.endswith("loss") else "last"
            self._run.define_metric(name, step_metric="step", summary=summary)

    def log(self, record: dict[str, Any]) -> None:
        """One step's record; keys without a value are left out."""
        named = {
            PANELS.get(key, f"5_other/{key}"): value
            for key, value in record.items()
            if value is not None and key not in ("step", "tokens", "event", "time")
            and isinstance(value, (int, float))
        }
        self._run.log({**named, "step": record["step"]})

    def close(self, failed: bool = False) -> None:
        self._run.finish(exit_code=1 if failed else 0)
