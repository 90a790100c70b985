"""Megatron-Core: a ``core_attention`` class, and a helper that puts it into a layer spec.

    from fa3_train.integrations import megatron
    spec = megatron.swap_core_attention(get_gpt_layer_with_transformer_engine_spec())
    model = GPTModel(config, transformer_layer_spec=spec, ...)

Megatron's core receives query (S, B, H, D) with this rank's heads, key and value with their own
fewer heads, and returns (S, B, H D). Packed batches come as (T, H, D) with ``packed_seq_params`` in
thd format and return (T, H D).

RoPE is applied before the core is called, which suits the 16-bit kernels. The FP8 path wants to own
it (RoPE, Hadamard and quantization are one pass), so :func:`fp8_self_attention` builds a
``SelfAttention`` that leaves the rotation to us; use it with models whose rotary embedding is
Megatron's own.

Megatron is imported only when these functions are called.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fa3_train.checks import require
from fa3_train.integrations._layout import readable
from fa3_train.integrations.policy import Policy
from fa3_train.ops import attention
from fa3_train.reference_fp8 import HEAD_DIMS, random_signs

__all__ = ["CoreAttention", "fp8_self_attention", "supports", "swap_core_attention"]

_policy = Policy("megatron")


def _mask_name(attn_mask_type: Any) -> str:
    """``AttnMaskType.padding_causal`` and its kin as a word."""
    return getattr(attn_mask_type, "name", str(attn_mask_type))


def supports(
    *,
    attn_mask_type: Any = "causal",
    attention_dropout: float = 0.0,
    context_parallel_size: int = 1,
    attention_bias: Tensor | None = None,
    attention_mask: Tensor | None = None,
    packed_seq_params: Any = None,
    softmax_type: str = "vanilla",
    seqlens: tuple[int, int] | None = None,
) -> str | None:
    """Reason why a core attention with these settings is not served, or None."""
    if attention_dropout:
        return f"attention_dropout: not served, got {attention_dropout}; set it to 0.0"
    if context_parallel_size > 1:
        return (
            "context_parallel_size: the core sees only its own keys, got "
            f"{context_parallel_size}; use fa3_train.integrations.context_parallel"
        )
    if attention_bias is not None:
        return "attention_bias: not served"
    if softmax_type not in ("vanilla", "learnable"):
        return f"softmax_type: must be 'vanilla' or 'learnable', got {softmax_type!r}"
    name = _mask_name(attn_mask_type)
    if name not in ("causal", "no_mask", "padding_causal", "padding", "causal_bottom_right"):
        return f"attn_mask_type: {name!r} is not served"
    if "padding" in name and packed_seq_params is None and attention_mask is not None:
        return f"attn_mask_type: {name!r} needs packed_seq_params, a padding mask is not served"
    if packed_seq_params is not None:
        layout = getattr(packed_seq_params, "qkv_format", None)
        if layout != "thd":
            return f"packed_seq_params.qkv_format: must be 'thd', got {layout!r}"
        for side in ("q", "kv"):
            cu = getattr(packed_seq_params, f"cu_seqlens_{side}", None)
            padded = getattr(packed_seq_params, f"cu_seqlens_{side}_padded", None)
            if padded is not None and padded is not cu:
                return f"packed_seq_params.cu_seqlens_{side}_padded: gaps are not served"
    elif name == "causal" and seqlens is not None and seqlens[0] != seqlens[1]:
        return (
            "attn_mask_type: 'causal' is aligned top-left for unequal lengths, ours bottom-right, "
            f"got {seqlens[0]} queries and {seqlens[1]} keys"
        )
    return None


class CoreAttention(nn.Module):
    """Megatron-Core's ``core_attention`` on these kernels.

    Args: those of ``megatron.core.transformer.dot_product_attention.DotProductAttention``.
        ``pg_collection`` gives the tensor-parallel group; only its size is used.

    What :func:`supports` refuses is an error; or, in the class that ``swap_core_attention`` makes
    for ``policy="warn"``, goes to the core that the spec had before.

    Raises:
        UnsupportedRequest: dropout, context parallelism and what else :func:`supports` names.
    """

    policy = _policy
    original_spec: Any = None
    rotates = False  # whether q and k arrive before RoPE

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self.attention_type = attention_type
        self.attention_dropout = (
            config.attention_dropout if attention_dropout is None else attention_dropout
        )
        self.softmax_scale = softmax_scale
        self.softmax_type = getattr(config, "softmax_type", "vanilla")
        original: nn.Module | None = None
        if self.original_spec is not None:
            original = _build(
                self.original_spec, config=config, layer_number=layer_number,
                attn_mask_type=attn_mask_type, attention_type=attention_type,
                attention_dropout=attention_dropout, softmax_scale=softmax_scale,
                cp_comm_type=cp_comm_type, pg_collection=pg_collection, **kwargs,
            )  # fmt: skip
        # Not a submodule: its parameters, if any, would appear twice.
        self.__dict__["_original"] = original
        reason = self._problem()
        if reason is not None and original is None:
            self.policy.refuse(reason)
        self.window_size = self._layer_window()
        self.softmax_offset: nn.Parameter | None = None
        if self.softmax_type == "learnable":
            ranks = 1 if pg_collection is None else pg_collection.tp.size()
            self.softmax_offset = nn.Parameter(
                torch.zeros(config.num_attention_heads // ranks, dtype=config.params_dtype)
            )

    def _problem(self, **call: Any) -> str | None:
        return supports(
            **{"attn_mask_type": self.attn_mask_type, **call},
            attention_dropout=self.attention_dropout,
            context_parallel_size=self.config.context_parallel_size,
            softmax_type=self.softmax_type,
        )

    def _layer_window(self) -> tuple[int, int]:
        """The sliding window, on the layers that have one (``window_attn_skip_freq``)."""
        window = getattr(self.config, "window_size", None)
        if window is None:
            return -1, -1
        skip = getattr(self.config, "window_attn_skip_freq", None)
        if isinstance(skip, int):
            windowed = self.layer_number % skip != 0
        elif skip is None:
            windowed = True
        else:
            windowed = bool(skip[self.layer_number - 1])
        return tuple(window) if windowed else (-1, -1)  # type: ignore[return-value]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        /,
        *,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """(S, B, H, D) to (S, B, H Dv), or packed (T, H, D) to (T, H Dv).

        ``attention_mask`` is not read with causal and full masks, as in Megatron's own fused cores.
        """
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        packed = packed_seq_params is not None
        reason = self._problem(
            attn_mask_type=mask_type,
            attention_bias=attention_bias,
            attention_mask=attention_mask,
            packed_seq_params=packed_seq_params,
            seqlens=None if packed else (query.shape[0], key.shape[0]),
        )
        if reason is not None:
            original = self.__dict__["_original"]
            fallback = None if original is None else lambda: original(
                query, key, value, attention_mask, attn_mask_type=attn_mask_type,
                attention_bias=attention_bias, packed_seq_params=packed_seq_params,
            )  # fmt: skip
            return self.policy.refuse(reason, fallback)
        causal = "causal" in _mask_name(mask_type)
        left, right = self.window_size
        options = {
            "softmax_scale": self.softmax_scale,
            "causal": causal,
            "window_size": (left, 0 if causal else right),
            "sink": self.softmax_offset,
        }
        if packed:
            p = packed_seq_params
            cu_q, cu_k = p.cu_seqlens_q, p.cu_seqlens_kv
            longest = (p.max_seqlen_q, p.max_seqlen_kv)
            if None in longest:
                longest = (int(cu_q.diff().max()), int(cu_k.diff().max()))
            q, k, v = readable(
                *(x.flatten(0, 1) if x.dim() == 4 else x for x in (query, key, value))
            )
            starts_q = cu_q.int()
            starts_k = starts_q if cu_k is cu_q else cu_k.int()
            lengths = (starts_q, starts_k, *map(int, longest))
            return self._attend(q, k, v, lengths, options).flatten(-2)
        q, k, v = readable(*(x.transpose(0, 1) for x in (query, key, value)))
        return self._attend(q, k, v, (), options).transpose(0, 1).flatten(-2)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, packed: tuple[Any, ...], options: dict[str, Any]
    ) -> Tensor:
        """(B, S, H, D), or (T, H, D) with ``packed``: cu_seqlens and longest lengths, q then k."""
        if packed:
            return attention.flash_attn_varlen_func(q, k, v, *packed, **options)
        return attention.flash_attn_func(q, k, v, **options)


def _attention_submodules(spec: Any) -> Any:
    layer = spec.submodules
    for path in ("self_attention.submodules",):
        for step in path.split("."):
            layer = getattr(layer, step, None)
    require(
        layer is not None and hasattr(layer, "core_attention"),
        "spec", "must be a transformer layer spec with self_attention.submodules", spec,
    )  # fmt: skip
    return layer


def _build(spec: Any, **arguments: Any) -> nn.Module:
    from megatron.core.transformer.spec_utils import build_module

    return build_module(spec, **{k: v for k, v in arguments.items() if v is not None})


def swap_core_attention(spec: Any, core: Any = CoreAttention, *, policy: str = "error") -> Any:
    """A copy of a transformer layer spec whose self-attention core is ours.

    Args:
        spec: what ``get_gpt_layer_local_spec`` or ``get_gpt_layer_with_transformer_engine_spec``
            return. It is not changed.
        policy: ``error``, or ``warn``: the spec's own core is built beside ours and runs, counted,
            what ours does not serve.
    """
    rule = Policy("megatron", policy)
    spec = copy.deepcopy(spec)
    submodules = _attention_submodules(spec)
    if rule.mode == "warn":
        require(
            not getattr(core, "rotates", False), "policy",
            "must be 'error' with a core that rotates q and k itself", repr(policy),
        )  # fmt: skip
        before = {"policy": rule, "original_spec": submodules.core_attention}
        core = type(core.__name__, (core,), before)
    submodules.core_attention = core
    return spec


class _Fp8Core(CoreAttention):
    """The core of :func:`fp8_self_attention`: q and k arrive not yet rotated.

    Args: those of :class:`CoreAttention`. The signs of the Hadamard transform are drawn from the
        layer's number and kept in the state.
    """

    rotates = True
    rotary: tuple[Tensor, Tensor] | None = None
    interleaved = False
    backend = "auto"

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if self.softmax_offset is not None:
            self.policy.refuse("softmax_type: 'learnable' is not served in FP8")
        channels = config.kv_channels or config.hidden_size // config.num_attention_heads
        require(
            channels in HEAD_DIMS,
            "config.kv_channels",
            f"must be from {HEAD_DIMS} in FP8",
            channels,
        )
        self.register_buffer("signs", random_signs(channels, self.layer_number))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, packed: tuple[Any, ...], options: dict[str, Any]
    ) -> Tensor:
        from fa3_train.ops import attention_fp8

        cos, sin = self.rotary if self.rotary is not None else (None, None)
        options = {k: x for k, x in options.items() if k != "sink"}
        options |= {
            "cos": cos, "sin": sin, "signs": self.signs.float(), "interleaved": self.interleaved,
            "backend": self.backend,
        }  # fmt: skip
        if packed:
            return attention_fp8.flash_attn_fp8_varlen_func(q, k, v, *packed, **options)
        return attention_fp8.flash_attn_fp8_func(q, k, v, **options)


def fp8_self_attention() -> type:
    """A subclass of Megatron's ``SelfAttention`` whose core does RoPE, Hadamard and FP8 in one.

    Use it as ``self_attention.module`` of a layer spec whose core is its own::

        attention = megatron.fp8_self_attention()
        spec = megatron.swap_core_attention(spec, attention.core)
        spec.submodules.self_attention.module = attention

    Forward in FP8 with block scales, backward in 16 bits (see ``fa3_train.flash_attn_fp8_func``);
    dense and packed batches, partial and interleaved rotations. Megatron's ``rotary_pos_emb`` must
    be one table for q and k.
    """
    from megatron.core.transformer.attention import SelfAttention

    class Fp8SelfAttention(SelfAttention):  # type: ignore[misc, valid-type]
        core = _Fp8Core

        def forward(self, hidden_states, attention_mask, *args, rotary_pos_emb=None, **kwargs):
            if rotary_pos_emb is not None:
                angles = rotary_pos_emb[0] if isinstance(rotary_pos_emb, tuple) else rotary_pos_emb
                half = angles.flatten(1).float()  # (S, D): Megatron repeats or interleaves halves
                interleaved = bool(self.config.rotary_interleaved)
                half = half[:, ::2] if interleaved else half[:, : half.shape[1] // 2]
                self.core_attention.rotary = (half.cos().contiguous(), half.sin().contiguous())
                self.core_attention.interleaved = interleaved
            return super().forward(
                hidden_states, attention_mask, *args, rotary_pos_emb=None, **kwargs
            )

    return Fp8SelfAttention
