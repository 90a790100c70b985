"""One decoder layer: x + attention(norm(x)), then x + mlp(norm(x)) (pre-norm, Llama)."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fa3_train.modules.attention import SelfAttention
from fa3_train.modules.linear import build_norm_mlp
from fa3_train.modules.rope import Rope

CHECKPOINTING = ("none", "selective", "full")


class TransformerLayer(nn.Module):
    """A Llama decoder layer that can be used alone in any model.

        layer = TransformerLayer(4096, 14336, num_heads=32, num_kv_heads=8)
        y = layer(x)                                              # x (B, S, hidden), causal
        y = layer(x, cu_seqlens=cu, max_seqlen=longest)           # x (T, hidden), documents packed

    Args:
        hidden_size, ffn_hidden_size: widths of the residual stream and of the SwiGLU.
        num_heads, num_kv_heads, head_dim: grouped-query attention; head_dim defaults to
            hidden_size // num_heads, num_kv_heads to num_heads.
        max_seq_len, rope_theta, rope_scaling: length and frequencies of the RoPE table; or `rope`,
            one `Rope` shared between layers.
        norm_eps, qk_norm, causal, window_size, softcap: see `SelfAttention` and `FlashAttention`.
        linear: "torch", "te" (TransformerEngine's fused modules) or "te_fp8" (with FP8 GEMMs).
            te_fp8 needs the number of tokens to be a multiple of 16.
        te_recipe: FP8 scaling of te_fp8: "current", "delayed" or "block".
        precision: "bf16" or "fp8", of the attention alone; see `FlashAttention`.
        backend: "auto", "hopper", "sdpa" or "reference".
        activation_checkpointing: "none"; "full" keeps only the layer's input and runs the layer
            again in the backward; "selective" keeps the attention's output as well, so that
            everything but the attention is run again.
        seed: of the Hadamard signs (precision="fp8").

    Parameters take torch's default dtype and device. Raises ValueError for an impossible option;
    ImportError or RuntimeError where TransformerEngine is asked for and missing or unusable.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        max_seq_len: int = 8192,
        rope_theta: float = 10_000.0,
        rope_scaling: dict[str, Any] | None = None,
        rope: Rope | None = None,
        norm_eps: float = 1e-5,
        qk_norm: bool = False,
        causal: bool = True,
        window_size: int | None = None,
        softcap: float = 0.0,
        deterministic: bool = False,
        linear: str = "torch",
        te_recipe: str = "current",
        precision: str = "bf16",
        backend: str = "auto",
        activation_checkpointing: str = "none",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if activation_checkpointing not in CHECKPOINTING:
            raise ValueError(
                f"activation_checkpointing must be one of {', '.join(CHECKPOINTING)}, "
                f"got {activation_checkpointing!r}"
            )
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(
                    "hidden_size must be a multiple of num_heads where head_dim is not given, "
                    f"got {hidden_size} and {num_heads}"
                )
            head_dim = hidden_size // num_heads
        self.linear = linear
        self.te_recipe = te_recipe
        self.activation_checkpointing = activation_checkpointing
        if rope is None:
            rope = Rope(head_dim, max_seq_len, theta=rope_theta, scaling=rope_scaling)
        self.attention = SelfAttention(
            hidden_size, num_heads, num_kv_heads or num_heads, head_dim, rope=rope,
            norm_eps=norm_eps, qk_norm=qk_norm, linear=linear, causal=causal,
            window_size=window_size, softcap=softcap, deterministic=deterministic,
            precision=precision, backend=backend, seed=seed,
        )
        self.mlp = build_norm_mlp(linear, hidden_size, ffn_hidden_size, norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        *,
        position_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> torch.Tensor:
        """x (B, S, hidden), or packed (T, hidden) with cu_seqlens (N + 1,) int32 and max_seqlen.

        `position_ids`, int (B, S) or (T,), default to 0, 1, ... in each sequence or document.
        """
        arguments = (x, position_ids, cu_seqlens, max_seqlen)
        if self.activation_checkpointing == "none" or not torch.is_grad_enabled():
            return self._run(*arguments)
        extra: dict[str, Any] = {}
        if self.activation_checkpointing == "selective":
            extra["context_fn"] = _keep_attention
        # The layer draws no random numbers: there is no generator state to put back.
        return checkpoint(
            self._run, *arguments, use_reentrant=False, preserve_rng_state=False, **extra
        )

    def _run(
        self,
        x: torch.Tensor,
        position_ids: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        max_seqlen: int | None,
    ) -> torch.Tensor:
        # Inside of what checkpointing runs again: torch restores its own autocast there, but not
        # TransformerEngine's.
        with self._precision():
            packing: dict[str, Any] = {
                "position_ids": position_ids, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen,
            }  # fmt: skip
            if self.linear != "torch":
                x = x + self.attention(x, **packing)
                return x + self.mlp(x)
            # Each norm hands on what it has read: its kernel adds the branch before it, and in the
            # backward the gradient that comes down the residual stream.
            y, x = self.attention.qkv.norm(x, with_stream=True)
            y, x = self.mlp.norm(x, self.attention(y, normed=True, **packing), with_stream=True)
            return x + self.mlp(y, normed=True)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.linear != "te_fp8":
            return contextlib.nullcontext()
        from fa3_train.modules import te

        # A model opens one region around all its layers: amax bookkeeping then runs once.
        if te.in_autocast():
            return contextlib.nullcontext()
        return te.autocast(self.linear, self.te_recipe)


# The operators whose results "selective" keeps: ours, and those behind torch's attention. By name,
# because torch registers some of them only when they are first used.
_ATTENTION_OPERATORS = frozenset(
    {
        "fa3_train::attn_fwd",
        "fa3_train::attn_fp8_fwd",
        "fa3_train::ring_fwd",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "torch_attn::_varlen_attn",
    }
)


def is_attention(operator: Any) -> bool:
    """Whether a torch operator computes attention."""
    schema = getattr(operator, "_schema", None)
    return schema is not None and schema.name in _ATTENTION_OPERATORS


def _keep_attention() -> tuple[Any, Any]:
    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if is_attention(operator):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
