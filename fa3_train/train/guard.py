"""Which module made the loss or the gradient non-finite: found by a second pass under hooks.

The training step itself carries no hooks and no host reads; it only switches the update off on the
device (engines/base.py). When the loop learns of that, it calls `diagnose` with the micro-batches
of the bad step. Parameters are still those before the step, so forward and backward reproduce it:

- forward hooks look at each module's output in the order of execution; the first non-finite one is
  the culprit, and since inner modules finish before outer ones it is the innermost;
- hooks on the tensors that modules read and return look at gradients in the order of the backward;
  the first non-finite one was made by the backward of the innermost module that reads this tensor
  (of an operation between modules, where none does);
- parameter gradients are looked at last, for an overflow in a weight gradient alone; and they count
  last, because reductions carry one rank's NaN to all the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fa3_train.train.data import Batch
from fa3_train.train.engines.base import Engine

__all__ = ["NonFiniteError", "diagnose"]


class NonFiniteError(RuntimeError):
    """Loss or gradient of a step is NaN or infinite; the optimizer step was not taken."""


@dataclass
class _Finding:
    rank: int
    micro_batch: int
    where: str
    own: bool  # seen in the rank's own activations, not in a gradient that may be a reduced one

    @property
    def order(self) -> tuple[bool, int, int]:
        return not self.own, self.micro_batch, self.rank


def diagnose(engine: Engine, batches: list[Batch], step: int, loss: float, norm: float) -> str:
    """Repeat the bad step's forward and backward on all ranks (collective); the error's text.

    `batches`: this rank's micro-batches of optimizer step `step`; `loss`, `norm`: what the step
    reported.
    """
    engine.begin_diagnosis()
    probe = _Probe(engine.model)
    losses: list[float] = []
    findings: list[_Finding] = []
    with probe, torch.compiler.set_stance("force_eager"):
        for index, batch in enumerate(batches):
            probe.start()
            value = engine.forward(batch)
            losses.append(float(value.detach()))
            last = index == len(batches) - 1
            # Every rank runs every backward, whatever it found: they hold collectives.
            engine.backward(value, first=index == 0, last=last)
            where = probe.verdict()
            if where is not None:
                findings.append(_Finding(engine.world.rank, index, where, True))
            elif (where := probe.bad_parameter_gradient()) is not None:
                findings.append(_Finding(engine.world.rank, index, where, False))
    reports = engine.world.gather((losses, findings))
    shown = f"step {step}: loss {loss!r}, gradient norm {norm!r}"
    kept = f"The optimizer step was not taken: the parameters are those after step {step - 1}."
    everything = [finding for _, rank_findings in reports for finding in rank_findings]
    if everything:
        first = min(everything, key=lambda finding: finding.order)
        its_loss = reports[first.rank][0][first.micro_batch]
        return (
            f"{shown}. First non-finite value: rank {first.rank}, micro-batch "
            f"{first.micro_batch} (loss {its_loss!r}): {first.where}. {kept}"
        )
    return (
        f"{shown}. A second pass over the same batches on {len(reports)} rank(s) was finite "
        "everywhere, so the value did not come from the model's arithmetic alone: suspect a race, "
        f"a kernel that reads memory it was not given, or the hardware. {kept}"
    )


class _Probe:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._handles: list[Any] = []
        self.start()

    def start(self) -> None:
        self._forward: str | None = None
        self._gradient: str | None = None
        self._readers: dict[int, str] = {}  # id of a tensor -> innermost module that reads it
        self._makers: dict[int, str] = {}  # ... that returned it
        self._alive: list[torch.Tensor] = []  # so that ids stay unique

    def __enter__(self) -> _Probe:
        for name, module in self.model.named_modules():
            label = f"{name or '(model)'} ({type(module).__name__})"
            self._handles.append(module.register_forward_pre_hook(self._before(label)))
            self._handles.append(module.register_forward_hook(self._after(label)))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()

    def verdict(self) -> str | None:
        """The first thing that went wrong in this rank's activations since `start`, or None."""
        return self._forward or self._gradient

    def _before(self, label: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._forward is None:
                for key, param in module.named_parameters(recurse=False):
                    flaw = _flaw(param)
                    if flaw:
                        self._forward = f"parameter {key} of {label} {flaw}"
                        return
            for tensor in _tensors(args):
                if self._watch(tensor):
                    self._readers[id(tensor)] = label

        return hook

    def _after(self, label: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for tensor in _tensors(output):
                flaw = _flaw(tensor) if self._forward is None else None
                if flaw:
                    self._forward = f"forward, output of {label} {flaw}"
                if self._watch(tensor):
                    self._makers.setdefault(id(tensor), label)

        return hook

    def _watch(self, tensor: torch.Tensor) -> bool:
        """Hook the tensor's gradient, once; False for one that gets none."""
        if not tensor.requires_grad:
            return False
        if id(tensor) not in self._readers and id(tensor) not in self._makers:
            self._alive.append(tensor)
            tensor.register_hook(self._on_gradient(id(tensor)))
        return True

    def _on_gradient(self, key: int) -> Any:
        def hook(gradient: torch.Tensor) -> None:
            if self._gradient is None:
                flaw = _flaw(gradient)
                if flaw and key in self._readers:
                    reader = self._readers[key]
                    self._gradient = f"backward of {reader}: gradient of its input {flaw}"
                elif flaw:
                    maker = self._makers[key]
                    self._gradient = f"backward: the gradient that reaches {maker} {flaw}"

        return hook

    def bad_parameter_gradient(self) -> str | None:
        """A parameter whose gradient, as it lies there now, is not finite."""
        for name, param in self.model.named_parameters():
            flaw = _flaw(param.grad) if param.grad is not None else None
            if flaw:
                return f"backward: gradient of parameter {name} {flaw}"
        return None


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


@torch.no_grad()
def _flaw(tensor: torch.Tensor) -> str | None:
    """ "has 3 NaN and 0 Inf among 64 elements", or None for a finite (or integer) tensor."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return None
    nans, infs = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    if nans + infs == 0:
        return None
    return f"has {nans} NaN and {infs} Inf among {tensor.numel()} elements"
