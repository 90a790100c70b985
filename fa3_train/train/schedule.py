"""Learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from fa3_train.train.config import TrainConfig

__all__ = ["learning_rate"]


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step `step` (1-based) of `config.run.steps`.

    Warm-up is linear and reaches the peak at step `warmup_steps` (with 0 it starts there). After
    it: `constant`; `linear` and `cosine` fall to `min_ratio * lr` at the last step; `wsd` stays at
    the peak and falls linearly over the last `decay_fraction` of all steps.
    """
    schedule, peak, total = config.schedule, config.optimizer.lr, config.run.steps
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.name == "constant":
        return peak
    start = schedule.warmup_steps
    if schedule.name == "wsd":
        start = max(start, total - round(schedule.decay_fraction * total))
    if step <= start:
        return peak
    progress = min(1.0, (step - start) / max(1, total - start))
    if schedule.name == "cosine":
        fall = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        fall = 1.0 - progress
    return peak * (schedule.min_ratio + (1.0 - schedule.min_ratio) * fall)
