"""fp32 gradient accumulators in flat buckets, all-reduced while the backward still runs.

Why not torch's DistributedDataParallel: it accumulates and reduces in the parameters' dtype. With
bf16 working weights, eight micro-batches summed in bf16 lose the small gradients. Here each
parameter's bf16 gradient is added into its slice of an fp32 bucket as soon as autograd has made it
(and freed at once), and in the last micro-batch a full bucket starts its asynchronous all-reduce,
so communication overlaps the rest of the backward, as in DDP. One process uses the same buckets
without the all-reduce.

On CUDA, the modules with large weights (our linear maps, embedding and head, TransformerEngine's
linear maps) write the FP32 slice themselves, over it in a step's first micro-batch and adding in
the others (`fuse`, modules/accumulate.py): the gradient is never rounded to bf16, nor written and
read as such.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["GradientBuckets"]


@dataclass
class _Bucket:
    flat: torch.Tensor  # (elements,) fp32
    indices: list[int] = field(default_factory=list)  # parameters with a slice in it
    pending: int = 0
    work: Any = None


class GradientBuckets:
    """Accumulates the gradients of `named` parameters; `views[i]` is parameter i's fp32 gradient.

    Call `begin(first=, last=)` before each backward and `finish()` after the last one.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        world_size: int,
        bucket_bytes: int = 64 << 20,
    ) -> None:
        self.names = [name for name, _ in named]
        self.params = [param for _, param in named]
        self.world_size = world_size
        self.views: list[torch.Tensor] = [torch.empty(0)] * len(named)
        self.buckets: list[_Bucket] = []
        self._bucket_of: list[_Bucket] = []
        self._first = self._last = True
        self._paused = False
        self._seen: set[int] = set()  # parameters whose gradient has come in this backward
        self._fused_modules: list[Any] = []
        self._fused_weights: list[Any] = []
        self._fill_buckets(bucket_bytes)
        self._hooks = [
            param.register_post_accumulate_grad_hook(self._hook(index))
            for index, param in enumerate(self.params)
        ]

    @property
    def flats(self) -> list[torch.Tensor]:
        return [bucket.flat for bucket in self.buckets]

    def begin(self, *, first: bool, last: bool) -> None:
        """Announce the next backward: `first` overwrites, `last` starts the reductions."""
        self._first, self._last = first, last
        self._seen.clear()
        for bucket in self.buckets:
            bucket.pending, bucket.work = len(bucket.indices), None

    def finish(self) -> None:
        """Wait (on the stream, not on the host, under NCCL) for the mean over ranks."""
        for bucket in self.buckets:
            if bucket.pending:
                missing = [self.names[i] for i in bucket.indices if i not in self._seen]
                raise RuntimeError(
                    f"{len(missing)} parameters got no gradient in the last backward, the first: "
                    f"{missing[0] if missing else '?'}. Every parameter must take part in the loss"
                )
            if bucket.work is not None:
                bucket.work.wait()
                bucket.work = None
                if not self._averages(bucket.flat):
                    bucket.flat.div_(self.world_size)

    def fuse(self, model: nn.Module) -> None:
        """Let the modules of `model` that can write their weights' gradients into the buckets."""
        index_of = {id(param): index for index, param in enumerate(self.params)}
        holders = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
        for module in model.modules():
            if not hasattr(module, "fuse_wgrad_accumulation"):
                continue
            weights = [p for p in module.parameters(recurse=False) if p.dim() == 2]
            if not all(id(p) in index_of and holders[id(p)] == 1 for p in weights):
                continue  # frozen: no slice; tied: two gradients
            for weight in weights:
                index = index_of[id(weight)]
                shared: Any = weight
                shared.main_grad = self.views[index]
                shared.main_grad_ready = functools.partial(self._arrived, index)
                shared.grad_added_to_main_grad = False
                self._fused_weights.append(weight)
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]
            self._fused_modules.append(module)
        self.expect(first=True)

    def expect(self, *, first: bool) -> None:
        """Before a forward: whether its backward is the first of a step. TransformerEngine reads
        this in the forward, and casts weights to FP8 in the first micro-batch only."""
        for weight in self._fused_weights:
            weight.overwrite_main_grad = first
        for module in self._fused_modules:
            if hasattr(module, "first_microbatch"):
                module.first_microbatch = first

    def close(self) -> None:
        """Remove the hooks: parameter -> hook -> buckets -> parameter is a cycle through C++ that
        Python's collector does not see, and would keep weights and buckets on the device."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._unfuse()

    def pause(self) -> None:
        """Leave gradients in `param.grad` from now on (for the diagnosis of a bad step)."""
        self._paused = True
        self._unfuse()

    def _unfuse(self) -> None:
        for module in self._fused_modules:
            module.fuse_wgrad_accumulation = False
            if hasattr(module, "first_microbatch"):
                module.first_microbatch = None
        for weight in self._fused_weights:
            for name in ("main_grad", "main_grad_ready", "grad_added_to_main_grad"):
                delattr(weight, name)
        self._fused_modules.clear()
        self._fused_weights.clear()

    def _fill_buckets(self, bucket_bytes: int) -> None:
        # Reverse order: the last parameters' gradients come first in the backward.
        by_param: dict[int, _Bucket] = {}
        limit = bucket_bytes // 4
        run: list[int] = []
        size = 0
        for index in reversed(range(len(self.params))):
            numel = self.params[index].numel()
            if run and size + numel > limit:
                self._close(run, size, by_param)
                run, size = [], 0
            run.append(index)
            size += numel
        if run:
            self._close(run, size, by_param)
        self._bucket_of = [by_param[i] for i in range(len(self.params))]

    def _close(self, run: list[int], size: int, by_param: dict[int, _Bucket]) -> None:
        flat = torch.zeros(size, dtype=torch.float32, device=self.params[run[0]].device)
        bucket = _Bucket(flat, list(run))
        offset = 0
        for index in run:
            param = self.params[index]
            self.views[index] = flat[offset : offset + param.numel()].view(param.shape)
            offset += param.numel()
            by_param[index] = bucket
        self.buckets.append(bucket)

    def _hook(self, index: int) -> Any:
        def collect(param: torch.Tensor) -> None:
            if self._paused or param.grad is None:
                return
            view = self.views[index]
            if getattr(param, "grad_added_to_main_grad", False):
                # TransformerEngine has written the view; what lies in .grad is a dummy.
                param.grad_added_to_main_grad = False  # type: ignore[attr-defined]
            elif self._first:
                view.copy_(param.grad)
            else:
                view.add_(param.grad)
            param.grad = None
            self._arrived(index)

        return collect

    def _arrived(self, index: int) -> None:
        """Parameter `index`'s gradient of this backward is in its view."""
        bucket = self._bucket_of[index]
        bucket.pending -= 1
        self._seen.add(index)
        if bucket.pending == 0 and self._last and self.world_size > 1:
            op = dist.ReduceOp.AVG if self._averages(bucket.flat) else dist.ReduceOp.SUM
            bucket.work = dist.all_reduce(bucket.flat, op=op, async_op=True)

    @staticmethod
    def _averages(flat: torch.Tensor) -> bool:
        return flat.is_cuda  # gloo has no AVG
