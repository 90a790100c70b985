"""Times, throughput and utilisation of each step, without stalling the device.

On a GPU every mark is a CUDA event in the stream of the step, and loss and norm are copied to
page-locked memory behind it. `flush()`, once per log interval, waits for the last step that it
reports; with `keep` it leaves the newest steps for the next time, and the device has those to work
on while the host reads, formats and writes. On the CPU a mark is the host clock.

What the times mean:
* `step_ms` runs from the end of the previous step to the end of this one, so that nothing between
  steps hides (logging too). `restart()` says that a pause (evaluation, checkpoint) is no step's.
* `data_ms` is how long the host waited for batches, always on the host's clock; it only costs
  step time when the device runs dry. The other phases are times in the stream. `other_ms` is the
  rest of the step.
* `attention_share` is (time between events around every attention core, forward and backward,
  recomputation included) / step_ms, sampled every `logging.attention_every` steps: between samples
  the model carries no hook. It is null between samples and under `engine.compile`, whose graphs
  the hooks would break.

Utilisation is defined in `flops.py`; without a known peak it is null.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fa3_train.models.config import ModelConfig
from fa3_train.train.config import TrainConfig
from fa3_train.train.flops import FORMULAS, peak_of, step_flops

PHASES = ("data", "forward", "backward", "optimizer")
_GIB = float(1 << 30)


class _HostClock:
    """Marks are seconds of the host's monotonic clock."""

    def mark(self) -> Any:
        return time.perf_counter()

    def ms(self, start: Any, end: Any) -> float:
        return float(end - start) * 1e3


class _StreamClock:
    """Marks are events in the current CUDA stream; read them only after a synchronisation."""

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end))


@dataclass
class _Step:
    """One step whose numbers have not been read yet."""

    number: int
    start: Any
    probed: bool
    end: Any = None
    phases: list[tuple[str, Any, Any]] = field(default_factory=list)
    attention: list[list[Any]] = field(default_factory=list)  # [start, end] of each core call
    data_ms: float = 0.0
    tokens: int = 0
    sum_sq: int = 0
    ready: Any = None  # event behind the copies of loss and norm
    loss: Tensor | float | None = None
    grad_norm: Tensor | float | None = None
    lr: float = 0.0


class StepMeter:
    """Collects a step's marks; `flush()` turns finished steps into records.

    Every rank makes the same calls. Records are the same on all ranks but for the times, which are
    the rank's own.
    """

    def __init__(
        self,
        config: TrainConfig,
        model_config: ModelConfig,
        *,
        device: torch.device,
        world_size: int = 1,
        model: nn.Module | None = None,
        tokens_seen: int = 0,
    ) -> None:
        self.config = config
        self.model_config = model_config
        self.device = device
        self.world_size = world_size
        self.tokens_seen = tokens_seen  # over all ranks, since the run's first step
        self._clock: Any = _StreamClock() if device.type == "cuda" else _HostClock()
        self.gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        self.peak = peak_of(self.gpu) if self.gpu else None
        self._probe: _AttentionProbe | None = None
        if model is not None and config.logging.attention_every and not config.engine.compile:
            self._probe = _AttentionProbe(model, self._clock.mark)
        self._last_end: Any = None
        self._current: _Step | None = None
        self._done: list[_Step] = []

    # ---- marks, called by the loop ----------------------------------------------------------

    def start_step(self, number: int) -> None:
        """Step `number` (from 1) begins."""
        every = self.config.logging.attention_every
        # The second step rather than the first, which pays for warm-up and autotuning.
        probed = self._probe is not None and number % every == 2 % every
        start = self._last_end if self._last_end is not None else self._clock.mark()
        self._current = _Step(number, start, probed)
        if probed and self._probe is not None:
            self._probe.attach(self._current.attention)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times one of PHASES; a phase may come several times in a step and its times add up."""
        step = self._running()
        if name == "data":
            begin = time.perf_counter()
            yield
            step.data_ms += (time.perf_counter() - begin) * 1e3
            return
        if name not in PHASES:
            raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {name!r}")
        start = self._clock.mark()
        yield
        step.phases.append((name, start, self._clock.mark()))

    def count(self, batch: Any) -> None:
        """Adds a batch's tokens and squared document lengths (host numbers of `Batch`)."""
        step = self._running()
        step.tokens += int(batch.num_tokens)
        step.sum_sq += int(batch.sum_sq_seqlen)

    def end_step(
        self, *, loss: Tensor | float, grad_norm: Tensor | float | None, lr: float
    ) -> None:
        """The step is over; `loss` and `grad_norm` may still be in flight on the device."""
        step = self._running()
        if step.probed and self._probe is not None:
            self._probe.detach()
        step.end = self._last_end = self._clock.mark()
        step.loss, step.grad_norm, step.lr = self._to_host(loss), self._to_host(grad_norm), lr
        if self.device.type == "cuda":
            step.ready = torch.cuda.Event()
            step.ready.record()
        self._done.append(step)
        self._current = None

    def restart(self) -> None:
        """The next step's time begins at its own start: what lies between is not a step's."""
        self._last_end = None

    # ---- records ----------------------------------------------------------------------------

    def flush(self, keep: int = 0) -> list[dict[str, Any]]:
        """Records of the steps since the last flush but for the newest `keep`. Waits for the last
        of them; collective over the ranks (on the host)."""
        count = len(self._done) - keep
        if count <= 0:
            return []
        steps, self._done = self._done[:count], self._done[count:]
        if steps[-1].ready is not None:
            steps[-1].ready.synchronize()
        own = torch.tensor([[s.tokens, s.sum_sq] for s in steps], dtype=torch.float64)
        memory = torch.tensor([self._peak_memory()], dtype=torch.float64)
        if self.world_size > 1 and dist.is_initialized():
            dist.all_reduce(own)
            dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        rows = []
        for step, (tokens, sum_sq) in zip(steps, own.tolist(), strict=True):
            loss, norm = _number(step.loss), _number(step.grad_norm)
            rows.append(self._record(step, loss, norm, tokens, sum_sq, memory.item()))
        return rows

    def describe(self) -> dict[str, Any]:
        """Facts that make the numbers readable: GPU, peaks with source, formulas, versions."""
        peak = self.peak
        return {
            "gpu": self.gpu or "CPU",
            "gpus": self.world_size,
            "peak_bf16_flops": peak.bf16 if peak else None,
            "peak_fp8_flops": peak.fp8 if peak else None,
            "peak_source": peak.source if peak else "peak not known: MFU is n/a",
            "formulas": FORMULAS,
            "attention_backend": self._attention_backend(),
            "parameters": self.model_config.num_parameters(),
            "matmul_parameters_N": self.model_config.matmul_parameters(),
            "tokens_per_step": self.config.tokens_per_step(),
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda,
            "fa3_train": _version("fa3_train"),
        }

    def _attention_backend(self) -> str:
        """What attention.backend=auto comes to for this model here."""
        from fa3_train.ops.attention import resolve_backend

        model = self.model_config
        if model.attention_precision == "fp8":
            return model.attention_backend
        options = ["varlen", "grad"]
        if model.num_heads != model.num_kv_heads:
            options.append("grouped")
        if model.window_size is not None:
            options.append("window_size")
        if model.softcap:
            options.append("softcap")
        bf16 = self.config.precision.compute == "bf16"
        return resolve_backend(
            model.attention_backend,
            self.device,
            torch.bfloat16 if bf16 else torch.float32,
            model.head_dim,
            options=tuple(options),
        )

    def _record(
        self, step: _Step, loss: float, norm: float, tokens: float, sum_sq: float, memory: float
    ) -> dict[str, Any]:
        ms = {name: 0.0 for name in PHASES}
        for name, start, end in step.phases:
            ms[name] += self._clock.ms(start, end)
        ms["data"] = step.data_ms
        total = self._clock.ms(step.start, step.end)
        seconds = total / 1e3
        gpus = self.world_size
        self.tokens_seen += int(tokens)
        flops = step_flops(self.model_config, tokens, sum_sq, self.config.data.seq_len)
        record: dict[str, Any] = {
            "step": step.number,
            "loss": loss,
            "lr": step.lr,
            "grad_norm": None if step.grad_norm is None else norm,
            "tokens": int(tokens),
            "tokens_total": self.tokens_seen,
            "tokens_per_s": tokens / seconds,
            "tokens_per_s_per_gpu": tokens / seconds / gpus,
            "step_ms": total,
            **{f"{name}_ms": ms[name] for name in PHASES},
            "other_ms": max(0.0, total - sum(ms.values())),
            "tflops_per_gpu": flops.causal / seconds / gpus / 1e12,
            "mfu_causal": self._fraction(flops.causal, seconds),
            "mfu_palm": self._fraction(flops.palm, seconds),
            "attention_share": self._attention_share(step, total),
            "peak_memory_gib": memory,
        }
        if flops.fp8:
            ideal = flops.ideal_seconds(self.peak, gpus) if self.peak else None
            record["mfu_causal_mixed"] = None if ideal is None else ideal / seconds
        if self.config.logging.hfu:
            record["hfu"] = self._fraction(flops.hardware, seconds)
        return record

    def _fraction(self, flops: float, seconds: float) -> float | None:
        return flops / seconds / self.world_size / self.peak.bf16 if self.peak else None

    def _attention_share(self, step: _Step, total_ms: float) -> float | None:
        calls = [pair for pair in step.attention if len(pair) == 2]
        if not calls:
            return None
        return float(sum(self._clock.ms(start, end) for start, end in calls) / total_ms)

    def _to_host(self, value: Tensor | float | None) -> Tensor | float | None:
        """A device scalar as page-locked memory that it is on its way to."""
        if not isinstance(value, Tensor) or value.device.type != "cuda":
            return value
        host = torch.empty((), dtype=value.dtype, pin_memory=True)
        return host.copy_(value.detach(), non_blocking=True)

    def _peak_memory(self) -> float:
        """GiB: allocated on the GPU since the start, or the process's largest resident size."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / _GIB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB

    def _running(self) -> _Step:
        if self._current is None:
            raise RuntimeError("start_step() comes before phase(), count() and end_step()")
        return self._current


class _Edge(torch.autograd.Function):
    """Identity on tensors that calls `ctx.record` when the backward passes it."""

    @staticmethod
    def forward(ctx: Any, record: Any, *tensors: Tensor) -> Any:
        ctx.record = record
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.record()
        return (None, *grads)


class _AttentionProbe:
    """Marks around every attention core of a model, while attached.

    The backward's marks are identity nodes on the core's output (passed first) and on its inputs
    (passed once all their gradients are there), so they work for any signature of the core.
    """

    def __init__(self, model: nn.Module, mark: Any) -> None:
        from fa3_train.modules import FlashAttention

        self._cores = [m for m in model.modules() if isinstance(m, FlashAttention)]
        self._mark = mark
        self._handles: list[Any] = []

    def attach(self, calls: list[list[Any]]) -> None:
        """Appends a [start, end] pair to `calls` for every forward and every backward."""
        for core in self._cores:
            open_calls: list[tuple[list[Any], list[Any]]] = []

            def before(_m: Any, args: Any, kwargs: Any, open_calls: Any = open_calls) -> Any:
                forward: list[Any] = []
                backward: list[Any] = []
                calls.extend((forward, backward))
                open_calls.append((forward, backward))
                args, kwargs = self._edge_inputs(args, kwargs, backward)
                forward.append(self._mark())
                return args, kwargs

            def after(_m: Any, _args: Any, _kw: Any, out: Any, open_calls: Any = open_calls) -> Any:
                forward, backward = open_calls.pop()
                forward.append(self._mark())
                return self._edge_output(out, backward)

            self._handles.append(core.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(core.register_forward_hook(after, with_kwargs=True))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _edge_inputs(self, args: Any, kwargs: Any, backward: list[Any]) -> tuple[Any, Any]:
        flat = [*args, *kwargs.values()]
        places = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and x.requires_grad]
        if places and torch.is_grad_enabled():
            marked = _Edge.apply(
                lambda: backward.append(self._mark()), *(flat[i] for i in places)
            )
            for place, tensor in zip(places, marked, strict=True):
                flat[place] = tensor
        return tuple(flat[: len(args)]), dict(zip(kwargs, flat[len(args) :], strict=True))

    def _edge_output(self, out: Any, backward: list[Any]) -> Any:
        if isinstance(out, Tensor):
            if not out.requires_grad:
                return out
            return _Edge.apply(lambda: backward.append(self._mark()), out)[0]
        if isinstance(out, tuple) and out:
            return (self._edge_output(out[0], backward), *out[1:])
        return out


def _number(value: Tensor | float | None) -> float:
    return float("nan") if value is None else float(value)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
