"""engine=torch: one process, replicated (ddp) or sharded (fsdp2) data parallelism, in plain torch.

Precision. With compute=bf16 the forward and backward see bf16 parameters, never autocast: casts
happen once per step instead of at every use, the residual stream stays bf16, and our kernels and
TransformerEngine's modules get the dtype they want. The optimizer works on fp32 master weights
(precision.params=fp32, the default): FSDP2 keeps its shards in fp32 and gathers them as bf16;
one process and ddp keep a bf16 working copy that is refreshed after the update. Gradients are
accumulated and reduced in fp32 in all of these. With compute=fp32 there is one set of weights.

Bytes per parameter in one process, without activations: bf16 compute 2 + 4 (gradient) + 4
(master) + 8 (moments) = 18; fp32 compute 4 + 4 + 8 = 16. FSDP2 divides all but the layer at work
by the number of ranks.

Checkpoints are torch.distributed.checkpoint (DCP) folders with one flat dictionary, the same for
every strategy, so a run can continue in another strategy or at another world size.
"""

from __future__ import annotations

import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from fa3_train.train.config import ConfigError
from fa3_train.train.data import Batch
from fa3_train.train.engines.base import BLOCKED, NORM, Engine
from fa3_train.train.engines.gradients import GradientBuckets
from fa3_train.train.engines.optimizer import GuardedAdamW, decay_groups, sum_of_squares

__all__ = ["TorchEngine"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TorchEngine(Engine):
    """See the module docstring. `strategy` is "single", "ddp" or "fsdp2"."""

    name = "torch"
    async_save = True

    def _setup(self, model: nn.Module) -> None:
        precision = self.config.precision
        self.strategy = self.config.engine.strategy if self.world.size > 1 else "single"
        self.compute_dtype = _DTYPES[precision.compute]
        self.param_dtype = _DTYPES[precision.params]
        if precision.reduce == "bf16" and self.strategy != "fsdp2":
            raise ConfigError(
                "precision.reduce=bf16 is offered by engine.strategy=fsdp2 and engine=deepspeed; "
                f"strategy {self.strategy} accumulates and reduces in fp32"
            )
        if self.param_dtype == torch.bfloat16 and self.compute_dtype == torch.float32:
            raise ConfigError("precision.params=bf16 needs precision.compute=bf16, got fp32")
        on_meta = any(param.is_meta for param in model.parameters())
        self.model = model if on_meta else model.to(self.world.device)
        self.buckets: GradientBuckets | None = None
        # One process without a group saving for itself is what we mean; DCP warns each time.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        # The background writer runs collectives while the training thread runs others.
        background = self.config.checkpoint.async_save and self.world.size > 1
        self._writers = dist.new_group(backend="gloo") if background else None
        # Names come from before wrapping; a tied weight appears once, under its first name.
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        if self.strategy == "fsdp2":
            self._shard()
            if on_meta:  # each rank draws its own shards; DTensor makes them parts of one draw
                self.model.to_empty(device=self.world.device)
                cast(Any, self.model).init_weights()
            self.masters = [p for p in model.parameters() if p.requires_grad]
        else:
            self._replicate()
        self.named = dict(zip(names, self.masters, strict=True))
        self.working: list[torch.Tensor] = [p for p in model.parameters() if p.requires_grad]
        self._has_copy = self.masters[0] is not self.working[0]
        self.optimizer = GuardedAdamW(
            decay_groups(self.named.items(), self.config.optimizer.weight_decay),
            self.config.optimizer,
            fused=self.config.optimizer.fused,
        )
        if self._has_copy:
            pairs = zip(self.masters, self.working, strict=True)
            self.optimizer.keep_copies({master: copy.detach() for master, copy in pairs})
        if not self.config.optimizer.fused and self.config.run.guard:
            raise ConfigError(
                "optimizer.fused=false has no device-side guard: set run.guard=false too, "
                "or keep optimizer.fused=true (it exists on CPU and CUDA)"
            )

    def _shard(self) -> None:
        mesh = init_device_mesh(self.world.device.type, (self.world.size,))
        if self.param_dtype != torch.float32:
            _cast_parameters(self.model, self.param_dtype)
        policy = MixedPrecisionPolicy(
            param_dtype=self.compute_dtype,
            reduce_dtype=_DTYPES[self.config.precision.reduce],
            cast_forward_inputs=False,  # inputs are token numbers and our own bf16 activations
        )
        layers = _layers_of(self.model)
        for index, layer in enumerate(layers):
            # The backward needs the last layer first, so re-gathering it at once is wasted.
            reshard = self.config.engine.reshard_after_forward and index < len(layers) - 1
            fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
        if not self.config.model.tie_embeddings:
            # Groups of their own: the head's weight is gathered behind the layers, and its gradient
            # (with Llama 3's vocabulary 2 GB in fp32) reduced behind their backward.
            parts = cast(Any, self.model)
            for modules in (parts.embedding, [parts.norm, parts.head]):
                fully_shard(modules, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        fully_shard(self.model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)

    def _replicate(self) -> None:
        if self.strategy == "ddp":
            with torch.no_grad():  # every rank has built the same model; make it certain
                for tensor in self.model.state_dict().values():
                    if isinstance(tensor, torch.Tensor) and tensor.numel():
                        dist.broadcast(tensor, src=0)
        params = [p for p in self.model.parameters() if p.requires_grad]
        if self.compute_dtype == torch.float32 or self.param_dtype == torch.bfloat16:
            _cast_parameters(self.model, self.compute_dtype)
            self.masters = params
        else:
            self.masters = [nn.Parameter(p.detach().clone()) for p in params]
            _cast_parameters(self.model, self.compute_dtype)
        if self.masters[0] is not params[0] or self.strategy == "ddp":
            if self.param_dtype == torch.bfloat16:
                raise ConfigError(
                    "precision.params=bf16 with several processes needs engine.strategy=fsdp2"
                )
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            self.buckets = GradientBuckets(named, self.world.size)
            for master, view in zip(self.masters, self.buckets.views, strict=True):
                if master is not None and self.masters[0] is not params[0]:
                    master.grad = view
            if self.world.device.type == "cuda":  # on a CPU, products of two dtypes are slow
                self.buckets.fuse(self.model)

    # -- one step --------------------------------------------------------------------------

    def forward(self, batch: Batch) -> torch.Tensor:
        return self._call(self.model, batch)

    def backward(self, loss: torch.Tensor, *, first: bool, last: bool) -> None:
        if self.buckets is not None:
            self.buckets.begin(first=first, last=last)
        elif self.strategy == "fsdp2" and self.accumulation > 1:
            sharded = cast(Any, self.model)
            # What stays whole until the step's last micro-batch moves once, not once in each.
            if not self.config.engine.reshard_after_forward:
                sharded.set_reshard_after_backward(last)
            if not self.config.engine.reduce_each:
                sharded.set_requires_gradient_sync(last)
        if self.accumulation > 1:
            loss = loss / self.accumulation
        loss.backward()
        if self.buckets is not None:
            self.buckets.expect(first=last)

    @torch.no_grad()
    def step(self, lr: float, status: torch.Tensor) -> torch.Tensor:
        gradients = self._finish_gradients()
        squares = sum_of_squares(gradients)
        # Sharded: each rank adds its shard's squares. Replicated: all hold the same gradient.
        status[NORM] = squares if self.strategy == "fsdp2" else squares / self.world.size
        self._reduce(status)
        norm = status[NORM].sqrt()
        status[NORM] = norm
        blocked = self._block(status, norm)
        status[BLOCKED] = blocked
        self.optimizer.set_lr(lr)
        if self.config.optimizer.fused:
            self.optimizer.guard(norm=norm, blocked=blocked)
        elif self.optimizer.clip_norm > 0:
            scale = (self.optimizer.clip_norm / (norm + 1e-6)).clamp_(max=1.0)
            torch._foreach_mul_(gradients, scale)
        self.optimizer.step()  # refreshes the working copies too
        if not self._has_copy:
            self.optimizer.zero_grad(set_to_none=True)
        return status

    def _finish_gradients(self) -> list[torch.Tensor]:
        """Reduced gradients as local tensors; the masters' `.grad` refer to the same memory."""
        if self.buckets is None:
            return [_local(p.grad) for p in self.masters if p.grad is not None]
        self.buckets.finish()
        if not self._has_copy:
            for param, view in zip(self.masters, self.buckets.views, strict=True):
                param.grad = view
        return self.buckets.flats

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> torch.Tensor:
        self.model.eval()
        loss = self._call(self.model, batch)
        self.model.train()
        return loss

    def begin_diagnosis(self) -> None:
        if self.buckets is not None:
            self.buckets.pause()
        for param in self.working:
            param.grad = None

    def close(self) -> None:
        if self.buckets is not None:
            self.buckets.close()

    # -- checkpoint ------------------------------------------------------------------------

    def _state(self) -> dict[str, torch.Tensor]:
        """Flat name -> tensor, made of the live tensors themselves (DCP reads into them)."""
        state: dict[str, torch.Tensor] = {}
        for name, master in self.named.items():
            slots = self.optimizer.state[master]
            if not slots:  # before the first step
                zeros = torch.zeros_like(master, memory_format=torch.preserve_format)
                fused = self.config.optimizer.fused
                where = master.device if fused else torch.device("cpu")
                slots["step"] = torch.zeros((), dtype=torch.float32, device=where)
                slots["exp_avg"], slots["exp_avg_sq"] = zeros, zeros.clone()
            state[f"model.{name}"] = master.detach()
            for key in ("exp_avg", "exp_avg_sq", "step"):
                state[f"optimizer.{key}.{name}"] = slots[key]
        persistent = {n for n in self.model.state_dict() if n not in self.named}
        for name, buffer in self.model.named_buffers():
            if name in persistent:
                state[f"buffer.{name}"] = buffer
        return state

    def state_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._state().values())

    def save(self, folder: Path) -> None:
        state_dict_saver.save(self._state(), checkpoint_id=str(folder))

    def save_async(self, folder: Path) -> Future[Any]:
        response = state_dict_saver.async_save(
            self._state(), checkpoint_id=str(folder), process_group=self._writers
        )
        assert isinstance(response, Future)
        return response

    def load(self, folder: Path, written_by: int) -> None:  # DCP does not ask by how many
        state_dict_loader.load(self._state(), checkpoint_id=str(folder))
        if self._has_copy:
            with torch.no_grad():
                torch._foreach_copy_(self.working, list[torch.Tensor](self.masters))

    def rank_state(self) -> dict[str, torch.Tensor]:
        """TransformerEngine's amax histories (te_recipe=delayed): bytes of a size that varies."""
        return {
            name: value
            for name, value in self.model.state_dict().items()
            if name.endswith("._extra_state") and isinstance(value, torch.Tensor) and value.numel()
        }

    def load_rank_state(self, state: dict[str, torch.Tensor]) -> None:
        if state:
            self.model.load_state_dict(state, strict=False)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {
            "strategy": self.strategy,
            "compute": self.config.precision.compute,
            "masters": self.config.precision.params,
        }


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters to `dtype` in place; buffers (RoPE tables) keep theirs."""
    for param in model.parameters():
        if param.is_floating_point():
            param.data = param.data.to(dtype)


def _layers_of(model: nn.Module) -> list[nn.Module]:
    """The transformer layers: the children of `model.layers`."""
    layers = getattr(model, "layers", None)
    if layers is None or not len(list(layers.children())):
        raise ConfigError(
            f"engine.strategy=fsdp2 shards the children of model.layers, and "
            f"{type(model).__name__} has none"
        )
    return list(layers.children())
