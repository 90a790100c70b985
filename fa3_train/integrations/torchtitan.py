"""torchtitan: its ``inner_attention`` module on these kernels, and the op for selective recompute.

    from fa3_train.integrations import torchtitan as titan
    model_registry("8B", attn_backend="varlen", converters=[titan.converter().Config()])
    titan.use_in(model_config)                          # the same on a config that is there already
    # activation checkpointing: subclass SelectiveAC
    def get_save_ops(self): return super().get_save_ops() | titan.save_ops()

The module has the forward of torchtitan's ``VarlenAttention``: q, k, v (T, N, H), or (B, L, N, H)
in its earlier versions; packed documents in ``attention_masks`` (a VarlenMetadata: cu_seq_q,
cu_seq_k, max_q, max_k); output shaped as q. As there, tensors that are not 16-bit are cast to bf16
and the output is cast back. Four dimensions without metadata are whole sequences.

torchtitan builds modules from nested ``Config`` dataclasses; :func:`inner_attention` makes such a
class from its own base, so that everything that asks for a VarlenAttention (masks, sharding) finds
one. Nothing of torchtitan is imported before that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fa3_train.checks import require
from fa3_train.integrations._layout import readable
from fa3_train.integrations.policy import Policy
from fa3_train.ops import attention

__all__ = ["converter", "inner_attention", "save_ops", "supports", "use_in", "varlen_attention"]

_policy = Policy("torchtitan")


def supports(
    *,
    attention_masks: Any = None,
    window_size: tuple[int, int] = (-1, 0),
    enable_gqa: bool = False,
    dimensions: int = 3,
    **kwargs: Any,
) -> str | None:
    """Reason why a call of ``inner_attention`` is not served, or None.

    Args:
        enable_gqa: of no consequence here, head counts may always differ. dimensions: those of q.
        kwargs: further arguments of a forward; what this file does not know must be None.
    """
    if dimensions not in (3, 4):
        return f"q: must be (T, N, H) or (B, L, N, H), got {dimensions} dimensions"
    if attention_masks is None and dimensions == 3:
        return "attention_masks: must be a VarlenMetadata with packed tokens (T, N, H), got None"
    if attention_masks is not None and not hasattr(attention_masks, "cu_seq_q"):
        return (
            "attention_masks: must be a VarlenMetadata or None, got "
            f"{type(attention_masks).__name__} (flex block masks are not served)"
        )
    for name, value in kwargs.items():
        if value is not None:
            return f"{name}: not served, got {type(value).__name__}"
    return None


def save_ops() -> set[Any]:
    """Ops whose outputs selective activation checkpointing should keep: the attention forward.

    Recomputing it costs as much as running it; its output and lse are 1/H-th of its work.
    """
    import fa3_train.ops.hopper  # noqa: F401  (defines the ops)

    ops = torch.ops.fa3_train
    found = {ops.attn_fwd.default}
    if hasattr(ops, "attn_fp8_fwd"):
        found.add(ops.attn_fp8_fwd.default)
    return found


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_masks: Any = None,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, 0),
    out_transform: Callable[[Tensor, Tensor], Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """q (T, N, H) or (B, L, N, H), k and v likewise with Nkv heads; the output is shaped as q.

    Args:
        attention_masks: cu_seq_q, cu_seq_k, max_q, max_k over all tokens joined end to end.
        out_transform: torchtitan's epilogue; called with out (T, N, Hv) and lse (T, N), fp32.
    """
    reason = supports(attention_masks=attention_masks, window_size=window_size, dimensions=q.dim())
    if reason is not None:
        _policy.refuse(reason)
    lead = q.shape[:-2]
    q, k, v = readable(q, k, v)
    options = {
        "softmax_scale": scale,
        "causal": window_size[1] == 0,
        "window_size": window_size,
        "return_lse": out_transform is not None,
        "backend": backend,
    }
    if attention_masks is None:
        result = attention.flash_attn_func(q, k, v, **options)
        if out_transform is None:
            return result
        out, lse = result[0].flatten(0, -3), result[1].transpose(1, 2).flatten(0, 1)
    else:
        m = attention_masks
        result = attention.flash_attn_varlen_func(
            *(x.flatten(0, -3) for x in (q, k, v)), m.cu_seq_q.int(), m.cu_seq_k.int(),
            int(m.max_q), int(m.max_k), **options,
        )  # fmt: skip
        if out_transform is None:
            return result.view(*lead, *result.shape[1:])
        out, lse = result[0], result[1].transpose(0, 1)
    out = out_transform(out, lse)
    return out.view(*lead, *out.shape[1:])


def inner_attention(base: type | None = None) -> type:
    """torchtitan's ``inner_attention`` module class on these kernels.

    Args:
        base: torchtitan's ``VarlenAttention``; imported when not given. Our class derives from it,
            so that code which asks ``isinstance`` to decide on masks does the right thing.

    Raises:
        ImportError: torchtitan is not installed.
    """
    if base is None:
        from torchtitan.models.common.attention import VarlenAttention as base  # type: ignore

    class Fa3Attention(base):  # type: ignore[misc, valid-type]
        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(base.Config):  # type: ignore[name-defined, misc]
            backend: str = "auto"
            policy: str = "error"

        def __init__(self, config: Any) -> None:
            self._policy = Policy("torchtitan", config.policy)
            if self._policy.mode == "warn":
                super().__init__(config)  # activates torch's flash attention, to fall back to
            else:  # which would do so for the whole process
                super(base, self).__init__()
            self.window_size = config.window_size
            self.backend = config.backend

        # torchtitan's sharding names the arguments of its VarlenAttention.forward.
        def forward(
            self, q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, *, attention_masks: Any = None,
            scale: float | None = None, out_transform: Any = None, **kwargs: Any,
        ) -> Tensor:  # fmt: skip
            reason = supports(attention_masks=attention_masks, dimensions=q_TNH.dim(), **kwargs)
            if reason is not None:
                theirs = super().forward
                return self._policy.refuse(
                    reason,
                    lambda: theirs(
                        q_TNH, k_TNH, v_TNH, attention_masks=attention_masks, scale=scale,
                        out_transform=out_transform, **kwargs,
                    ),
                )  # fmt: skip
            wide = q_TNH.dtype
            narrow = wide if wide in (torch.bfloat16, torch.float16) else torch.bfloat16
            out = varlen_attention(
                q_TNH.to(narrow), k_TNH.to(narrow), v_TNH.to(narrow), attention_masks,
                scale=scale, window_size=self.window_size, backend=self.backend,
                out_transform=None
                if out_transform is None
                else lambda out, lse: out_transform(out.to(wide), lse),
            )  # fmt: skip
            return out.to(wide)

    return Fa3Attention


def use_in(
    model_config: Any, base: type | None = None, *, backend: str = "auto", policy: str = "error"
) -> int:
    """Set ``inner_attention`` of every layer's attention config to ours; returns how many.

    Args:
        model_config: a torchtitan model config with ``layers[i].attention.inner_attention``; its
            other settings, sharding among them, are taken over.
        backend: as in :func:`fa3_train.flash_attn_func`.
        policy: ``error``, or ``warn``: the base's forward runs and the call is counted.

    Raises:
        ArgumentError: no such layers. UnsupportedRequest: a layer's attention is not a varlen one,
            so that torchtitan would make other masks (choose ``attn_backend="varlen"``).
    """
    module = inner_attention(base)
    base_config = module.__mro__[1].Config  # type: ignore[attr-defined]
    count = 0
    layers = model_config.layers
    for layer in layers.values() if isinstance(layers, dict) else layers:
        old = layer.attention.inner_attention
        if not isinstance(old, base_config):
            _policy.refuse(
                f"inner_attention: must be a varlen attention, got {type(old).__qualname__}"
            )
        settings = {f.name: getattr(old, f.name) for f in dataclasses.fields(base_config)}
        layer.attention.inner_attention = module.Config(
            **settings, backend=backend, policy=Policy("torchtitan", policy).mode
        )
        count += 1
    require(count > 0, "model_config", "must have layers", count)
    return count


def converter() -> type:
    """A torchtitan ``ModelConfigConverter`` class that does :func:`use_in`.

    For ``model_registry(..., attn_backend="varlen", converters=[converter().Config()])``.

    Raises:
        ImportError: torchtitan is not installed.
    """
    from torchtitan.protocols.model import ModelConfigConverter  # type: ignore

    class Fa3Converter(ModelConfigConverter):  # type: ignore[misc, valid-type]
        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(ModelConfigConverter.Config):  # type: ignore[name-defined, misc]
            backend: str = "auto"
            policy: str = "error"

        def __init__(self, config: Any) -> None:
            self.config = config

        def convert(self, model_config: Any) -> Any:
            use_in(model_config, backend=self.config.backend, policy=self.config.policy)
            return model_config

    return Fa3Converter
