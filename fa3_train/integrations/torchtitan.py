"""torchtitan: its ``inner_attention`` module on these kernels, and the op for selective recompute.

    from fa3_train.integrations import torchtitan as titan
    titan.use_in(model_config)                          # every layer's inner_attention
    # activation checkpointing: subclass SelectiveAC
    def get_save_ops(self): return super().get_save_ops() | titan.save_ops()

The module has the forward of torchtitan's ``VarlenAttention``: q, k, v (B, L, N, H), packed
documents in ``attention_masks`` (a VarlenMetadata: cu_seq_q, cu_seq_k, max_q, max_k), output
(B, L, N, H). Without metadata the rows of the batch are whole sequences.

torchtitan builds modules from nested ``Config`` dataclasses; :func:`inner_attention` makes such a
class from its own base, so that it composes with its converters. Nothing of torchtitan is imported
before that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fa3_train.checks import require
from fa3_train.integrations.policy import Policy
from fa3_train.ops import attention

__all__ = ["inner_attention", "save_ops", "supports", "use_in", "varlen_attention"]

_policy = Policy("torchtitan")


def supports(
    *, attention_masks: Any = None, window_size: tuple[int, int] = (-1, 0), **kwargs: Any
) -> str | None:
    """Reason why a call of ``inner_attention`` is not served, or None."""
    if attention_masks is not None and not hasattr(attention_masks, "cu_seq_q"):
        return (
            "attention_masks: must be a VarlenMetadata or None, got "
            f"{type(attention_masks).__name__} (flex block masks are not served)"
        )
    if kwargs.get("block_table") is not None:
        return "block_table: paged KV caches are not served"
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
    """q (B, L, N, H), k and v (B, L, Nkv, H) to (B, L, N, Hv).

    Args:
        attention_masks: cu_seq_q, cu_seq_k, max_q, max_k over the B L tokens joined end to end.
        out_transform: torchtitan's epilogue; called with out (B L, N, Hv) and lse (B L, N).
    """
    reason = supports(attention_masks=attention_masks, window_size=window_size)
    if reason is not None:
        _policy.refuse(reason)
    b, length = q.shape[:2]
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
        out, lse = result
        out, lse = out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)
    else:
        m = attention_masks
        result = attention.flash_attn_varlen_func(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), m.cu_seq_q.int(), m.cu_seq_k.int(),
            int(m.max_q), int(m.max_k), **options,
        )  # fmt: skip
        if out_transform is None:
            return result.view(b, length, *result.shape[1:])
        out, lse = result[0], result[1].transpose(0, 1)
    out = out_transform(out, lse)
    return out.view(b, length, *out.shape[1:])


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
        class Config(base.Config):  # type: ignore[name-defined, misc]
            pass

        def __init__(self, config: Any) -> None:
            # Not the base's: it would activate another flash attention for the whole process.
            super(base, self).__init__()
            self.window_size = config.window_size

        def forward(
            self, q: Tensor, k: Tensor, v: Tensor, *, attention_masks: Any = None,
            scale: float | None = None, out_transform: Any = None, **kwargs: Any,
        ) -> Tensor:  # fmt: skip
            reason = supports(attention_masks=attention_masks, **kwargs)
            if reason is not None:
                _policy.refuse(reason)
            return varlen_attention(
                q, k, v, attention_masks, scale=scale, window_size=self.window_size,
                out_transform=out_transform,
            )  # fmt: skip

    return Fa3Attention


def use_in(model_config: Any, base: type | None = None) -> int:
    """Set ``inner_attention`` of every layer's attention config to ours; returns how many.

    Args:
        model_config: a torchtitan model config with ``layers[i].attention.inner_attention``.
    """
    module = inner_attention(base)
    count = 0
    layers = model_config.layers
    for layer in layers.values() if isinstance(layers, dict) else layers:
        old = layer.attention.inner_attention
        new = module.Config()
        if hasattr(old, "window_size"):
            new.window_size = old.window_size
        layer.attention.inner_attention = new
        count += 1
    require(count > 0, "model_config", "must have layers", count)
    return count
