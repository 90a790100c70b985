"""AdamW whose clipping and "do not update" both happen inside the fused kernel.

Torch's fused AdamW reads two device scalars that exist for loss scaling: it divides every gradient
by `grad_scale`, and when `found_inf` is 1 it leaves parameters, moments and step count as they
are. Clipping is a division of all gradients by max(1, norm / limit), so it needs no pass over the
gradients of its own; and a non-finite norm turns the update off on the device, in the same step,
without the host having to look.

Where the engine keeps 16-bit copies of the weights on a GPU, a kernel of ours does the same update
and writes the copies with it (_adamw_triton.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fa3_train.train.config import OptimizerSection

__all__ = ["GuardedAdamW", "decay_groups", "sum_of_squares"]


def decay_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Two parameter groups: matrices decay, vectors (norm weights, biases) do not."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for _, param in named:
        if param.requires_grad:
            (decay if param.ndim >= 2 else plain).append(param)
    groups = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def sum_of_squares(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of squares of all elements as an fp32 scalar on their device; a non-finite element
    makes it non-finite."""
    norms = torch.stack(torch._foreach_norm(list(tensors), 2, dtype=torch.float32))
    return torch.dot(norms, norms)


class GuardedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW (decoupled decay, arXiv 1711.05101) with a device-side guard.

    `guard(...)` sets what the next `step()` does; without a call to it, `step()` is torch's own.
    """

    def __init__(self, groups: Any, settings: OptimizerSection, *, fused: bool = True) -> None:
        super().__init__(
            groups,
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=fused,
        )
        self.clip_norm = settings.clip_norm
        self.grad_scale: torch.Tensor | None = None
        self.found_inf: torch.Tensor | None = None
        self._copies: dict[nn.Parameter, torch.Tensor] = {}

    def guard(self, *, norm: torch.Tensor | None, blocked: torch.Tensor) -> None:
        """Prepare the next step. `norm`: global gradient norm for clipping (None: no clipping);
        `blocked`: 0-dim bool on the device, True to leave everything unchanged."""
        self.found_inf = blocked.to(torch.float32)
        self.grad_scale = None
        if norm is not None and self.clip_norm > 0:
            # The 1e-6 is that of torch.nn.utils.clip_grad_norm_, and keeps parity with it.
            self.grad_scale = ((norm + 1e-6) / self.clip_norm).clamp_(min=1.0)

    def keep_copies(self, copies: dict[nn.Parameter, torch.Tensor]) -> None:
        """From now on `step()` also writes each parameter into its copy (of another dtype)."""
        self._copies = copies

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if not self._own_kernel():
            result: float | None = super().step(closure)
            if self._copies:
                torch._foreach_copy_(
                    list(self._copies.values()), list[torch.Tensor](self._copies)
                )
            return result
        from fa3_train.train.engines import _adamw_triton

        steps = [self.state[p]["step"] for g in self.param_groups for p in g["params"]]
        torch._foreach_add_(steps, 1.0)
        if self.found_inf is not None:
            torch._foreach_sub_(steps, [self.found_inf] * len(steps))
        for group in self.param_groups:
            betas = group["betas"]
            for param in group["params"]:
                _adamw_triton.update(
                    param, param.grad, self.state[param], self._copies.get(param),
                    scale=self.grad_scale, blocked=self.found_inf, lr=group["lr"], betas=betas,
                    log2_betas=(math.log2(betas[0]), math.log2(betas[1])), eps=group["eps"],
                    weight_decay=group["weight_decay"],
                )  # fmt: skip
        return None

    def _own_kernel(self) -> bool:
        """Copies on a GPU, and the state that torch's first step makes."""
        return bool(self._copies) and all(
            p.is_cuda
            and p.is_contiguous()
            and p.grad is not None
            and p.grad.is_contiguous()
            and p in self.state
            and "step" in self.state[p]
            and self.state[p]["step"].is_cuda
            for group in self.param_groups
            for p in group["params"]
        )

    def set_lr(self, lr: float) -> None:
        for group in self.param_groups:
            group["lr"] = lr
