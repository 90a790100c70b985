"""Context parallelism in a run: which ranks share a sequence, and what each of them holds of it.

Ranks that follow one another share a sequence, so that a group stays inside a machine where it can:
rank = data-parallel rank * context + context rank. All of a group read the same micro-batch and
keep their share of its tokens, labels and positions; the borders of the documents stay those of the
whole row. Norms, products and loss work on single tokens and need to know nothing; attention is
wrapped from outside (`install`), so the model stays the one of a single process.

    ulysses  a run of T/P tokens; q, k and v travel so that a rank has all tokens of H/P heads
    ring     two chunks (zig-zag); k and v travel around
    gather   two chunks (zig-zag); all k and v on every rank, the one for sliding windows

What makes the result that of one process: the loss is the mean over all labels of the global batch
(each rank's mean counts by its labels), and gradients are averaged over all ranks, as they are for
data parallelism. So FSDP2 and ZeRO shard over all ranks, data-parallel and context alike.

The group has a communicator of its own: on that of the engine, exchanges would queue behind weights
that are being gathered for later layers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fa3_train.modules import FlashAttention
from fa3_train.train.config import TrainConfig
from fa3_train.train.data import Batch
from fa3_train.train.engines.world import World

__all__ = ["ContextParallel"]


class ContextParallel:
    """The context group of this rank. `size` 1: no group, and nothing is changed anywhere."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.size = config.context_ranks(world.size)
        self.method = config.context_method(self.size) if self.size > 1 else "none"
        self.rank = world.rank % self.size
        self.dp_rank, self.dp_size = world.rank // self.size, world.size // self.size
        self.group: Any = None
        self._deepspeed = config.engine.name == "deepspeed"
        self._ulysses: Any = None  # DeepSpeed's, made at the first call
        self._borders: tuple[int, ...] = ()
        if self.size > 1:
            for number in range(self.dp_size):  # every rank takes part in making every group
                group = dist.new_group(range(number * self.size, (number + 1) * self.size))
                if number == self.dp_rank:
                    self.group = group

    # -- data ------------------------------------------------------------------------------

    def shard(self, batch: Batch) -> Batch:
        """This rank's share of a packed row on the host. Counts stay those of the whole row."""
        if self.size == 1:
            return batch
        take = self._run_of if self.method == "ulysses" else self._zigzag
        return dataclasses.replace(
            batch,
            tokens=take(batch.tokens),
            labels=take(batch.labels),
            position_ids=take(batch.position_ids),
            borders=tuple(batch.cu_seqlens.tolist()),
        )

    def _run_of(self, x: torch.Tensor) -> torch.Tensor:
        return x.chunk(self.size)[self.rank].clone()  # a view would keep the whole row alive

    def _zigzag(self, x: torch.Tensor) -> torch.Tensor:
        from fa3_train.integrations.context_parallel import zigzag_shard

        return zigzag_shard(x, self.rank, self.size, 0)

    # -- model -----------------------------------------------------------------------------

    def install(self, model: nn.Module) -> None:
        """Wrap every attention core of `model`; names and parameters stay."""
        if self.size == 1:
            return
        for core in model.modules():
            if isinstance(core, FlashAttention):
                # On the instance: hooks (FSDP's, the meter's) go on seeing the core itself.
                run = {"ulysses": self._exchange_heads, "ring": self._ring, "gather": self._gather}
                setattr(core, "forward", functools.partial(run[self.method], core, core.forward))  # noqa: B010

    def enter(self, batch: Batch) -> None:
        """The next forward, and the backward of it, are of `batch`."""
        self._borders = batch.borders

    def _exchange_heads(
        self, core: FlashAttention, inner: Any, q: Any, k: Any, v: Any, **options: Any
    ) -> torch.Tensor:
        from fa3_train.integrations import ulysses

        if self._deepspeed and core.precision == "bf16":
            return self._through_deepspeed(core, q, k, v, **options)
        q, k, v = ulysses.to_heads(q, k, v, self.group)
        # Positions are needed where the core itself rotates (fp8); those of the whole row follow
        # from the documents.
        options["position_ids"] = None
        if len(self._borders) == 2:  # one document: dense kernels need no plan of lengths
            rope = options.get("rope")
            out = inner(*(x.unsqueeze(0) for x in (q, k, v)), rope=rope).squeeze(0)
        else:
            out = inner(q, k, v, **options)
        return ulysses.to_tokens(out, self.group)

    def _through_deepspeed(
        self, core: FlashAttention, q: Any, k: Any, v: Any, *, cu_seqlens_q: Any, max_seqlen_q: int
    ) -> torch.Tensor:
        if self._ulysses is None:
            from fa3_train.integrations.deepspeed import UlyssesAttention

            self._ulysses = UlyssesAttention(self.group)
        lengths: dict[str, Any] = {}
        if len(self._borders) > 2:
            for side in "qk":
                lengths[f"cu_seqlens_{side}"] = cu_seqlens_q
                lengths[f"max_seqlen_{side}"] = max_seqlen_q
        out: torch.Tensor = self._ulysses(
            *(x.unsqueeze(0) for x in (q, k, v)),
            **lengths,
            softmax_scale=core.softmax_scale,
            causal=core.causal,
            window_size=core.window,
            softcap=core.softcap,
            deterministic=core.deterministic,
            backend=core.backend,
        )
        return out.squeeze(0)

    def _ring(
        self, core: FlashAttention, inner: Any, q: Any, k: Any, v: Any, **options: Any
    ) -> torch.Tensor:
        from fa3_train.integrations.context_parallel import ring_attention

        return ring_attention(q, k, v, self.group, cu_seqlens=self._borders, **_settings(core))

    def _gather(
        self, core: FlashAttention, inner: Any, q: Any, k: Any, v: Any, **options: Any
    ) -> torch.Tensor:
        from fa3_train.integrations.context_parallel import gather_attention

        return gather_attention(
            q, k, v, self._borders, self.group, window_size=core.window, **_settings(core)
        )

    def describe(self) -> dict[str, Any]:
        """What a reader of the run's config wants to know."""
        return {"context": self.size, "context_method": self.method, "dp_size": self.dp_size}


def _settings(core: FlashAttention) -> dict[str, Any]:
    return {
        "softmax_scale": core.softmax_scale,
        "deterministic": core.deterministic,
        "backend": core.backend,
    }
