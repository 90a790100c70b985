"""TransformerEngine: a ``DotProductAttention`` of ours, and ``patch(model)`` that puts it in place.

    from fa3_train.integrations import transformer_engine as te_swap
    model = te.TransformerLayer(...)
    te_swap.patch(model)                    # every DotProductAttention inside, in place

The replacement keeps the FP8 linears, norms and MLP of TransformerEngine: only the core attention
changes. It takes the constructor and forward arguments of ``te.DotProductAttention``, in its
layouts (sbhd, bshd, thd), and returns its flattened heads: (S, B, H Dv), (B, S, H Dv), (T, H Dv).

    causal               top-left in TransformerEngine. Ours is bottom-right: the same where every
                         sequence has as many queries as keys, refused otherwise
    causal_bottom_right  ours
    no_mask, padding     a window lies along the diagonal that ``bottom_right_diagonal`` names
    padding, padding_*   with cu_seqlens, or with the boolean padding mask (True = padding)
    window_size          as ours; None is unbounded
    qkv_layer, kv_layer  q, k and v as views of one tensor: what te.MultiheadAttention passes when
                         it neither rotates nor groups heads

The other way needs no patch: :func:`fa3_train.integrations.flash_attn.install` before
TransformerEngine is imported makes it find this library as FlashAttention-3 (set
``NVTE_FUSED_ATTN=0``, for it prefers cuDNN).

This file imports no TransformerEngine: patch() finds its modules by class name, so the layout and
mask rules are tested on machines where it does not import.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fa3_train.checks import require
from fa3_train.integrations import lengths
from fa3_train.integrations._layout import readable
from fa3_train.integrations.policy import Policy
from fa3_train.ops import attention

__all__ = ["DotProductAttention", "patch", "supports", "unpatch"]

_MASKS = ("no_mask", "causal", "causal_bottom_right")
_FORMATS = ("sbhd", "bshd", "thd")


def _split_mask(attn_mask_type: str) -> tuple[bool, str]:
    """(padding, the rest) of a mask name such as ``padding_causal``."""
    parts = attn_mask_type.replace(",", "_").split("_")
    padding = "padding" in parts
    rest = "_".join(p for p in parts if p != "padding") or "no_mask"
    return padding, rest


def _top_left(mask: str, window: tuple[int, int] | None, bottom_right: bool | None) -> bool:
    """Whether TransformerEngine would align this mask at the first query and key."""
    if mask == "no_mask":
        return bottom_right is False and window is not None and tuple(window) != (-1, -1)
    return mask == "causal"


def supports(
    *,
    attention_dropout: float = 0.0,
    attn_mask_type: str = "causal",
    qkv_format: str = "sbhd",
    core_attention_bias_type: str = "no_bias",
    alibi_slopes: Tensor | None = None,
    inference_params: Any = None,
    softmax_type: str = "vanilla",
    cp_size: int = 1,
    fp8_output: bool | None = False,
    return_max_logit: bool | None = False,
    num_splits: int | None = 1,
    pad_between_seqs: bool | None = None,
    score_mod: Any = None,
    window_size: tuple[int, int] | None = None,
    bottom_right_diagonal: bool | None = None,
    seqlens: tuple[int, int] | None = None,
    same_lengths: bool = True,
    **others: Any,
) -> str | None:
    """Reason why these arguments of ``te.DotProductAttention`` are not served, or None.

    Args:
        seqlens: (Sq, Sk) of dense inputs, for the alignment of masks.
        same_lengths: whether each sequence of a packed or padded batch has as many queries as keys.
        others: any further argument of its forward; what this file does not know must be off.
    """
    if attention_dropout != 0.0:
        return (
            f"attention_dropout: not served, got {attention_dropout} "
            "(TransformerLayer's default is 0.1: pass 0.0)"
        )
    if qkv_format not in _FORMATS:
        return f"qkv_format: must be one of {list(_FORMATS)}, got {qkv_format!r}"
    _, mask = _split_mask(attn_mask_type)
    if mask not in _MASKS:
        return f"attn_mask_type: {attn_mask_type!r} is not served"
    if _top_left(mask, window_size, bottom_right_diagonal):
        rule = f"attn_mask_type: {attn_mask_type!r} is aligned top-left, ours bottom-right; needs "
        if seqlens is not None and seqlens[0] != seqlens[1]:
            return rule + f"as many queries as keys, got {seqlens[0]} and {seqlens[1]}"
        if not same_lengths:
            return rule + "cu_seqlens_q and cu_seqlens_kv of equal lengths"
    if core_attention_bias_type != "no_bias" or alibi_slopes is not None:
        return f"core_attention_bias_type: must be 'no_bias', got {core_attention_bias_type!r}"
    if inference_params is not None:
        return "inference_params: decoding with a KV cache is not served"
    if softmax_type not in ("vanilla", "learnable"):
        return f"softmax_type: must be 'vanilla' or 'learnable', got {softmax_type!r}"
    if cp_size != 1:
        return f"cp_group: context parallelism inside the core is not served, got {cp_size} ranks"
    if fp8_output:
        return "fp8_output: the output is 16-bit"
    if return_max_logit:
        return "return_max_logit: not served"
    if num_splits not in (None, 0, 1):
        return f"num_splits: split-KV is not served, got {num_splits}"
    if pad_between_seqs and qkv_format != "thd":
        return f"pad_between_seqs: gaps between sequences need qkv_format='thd', got {qkv_format!r}"
    if score_mod is not None:
        return "score_mod: not served"
    for name, value in others.items():
        if value is not None and value is not False and name not in _IDLE:
            return f"{name}: not served, got {_brief(value)}"
    return None


# They decide nothing here: our backward is 16-bit always, and policies that differ are refused.
_IDLE = ("bf16_backward", "thd_attention_policy_dispatch")


def _brief(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:80]


def _unpack(q, k, v, qkv, kv, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v; or views of ``qkv`` (3 along ``dim``), or of ``kv`` (2 along ``dim``) beside q."""
    if qkv is not None:
        require(q is None and k is None and v is None, "qkv_layer", "must come alone", "more")
        require(qkv.shape[dim] == 3, "qkv_layer", f"must have 3 along {dim}", tuple(qkv.shape))
        return qkv.unbind(dim)  # type: ignore[return-value]
    if kv is not None:
        require(k is None and v is None, "kv_layer", "must come with query_layer alone", "more")
        require(kv.shape[dim] == 2, "kv_layer", f"must have 2 along {dim}", tuple(kv.shape))
        return (q, *kv.unbind(dim))
    return q, k, v


class DotProductAttention(nn.Module):
    """Drop-in for ``te.DotProductAttention``: same constructor arguments, forward and output.

    Args:
        num_attention_heads: heads per partition times tp_size, as there. kv_channels: head dim, or
            (qk, v). num_gqa_groups: key/value heads; default as many as query heads.
        softmax_type: ``vanilla`` or ``learnable`` (a sink logit per head, ``softmax_offset``).
        policy: ``error`` or ``warn`` (``original`` runs and the call is counted).
        backend: as in :func:`fa3_train.flash_attn_func`.
        original: the module that stands in under ``warn``.
    """

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        softcap: float = 0.0,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool | None = False,
        name: str | None = None,
        *,
        policy: str = "error",
        backend: str = "auto",
        original: nn.Module | None = None,
    ) -> None:
        super().__init__()
        groups = num_attention_heads if num_gqa_groups is None else num_gqa_groups
        require(
            groups % tp_size == 0, "num_gqa_groups", f"must divide by tp_size {tp_size}", groups
        )
        self.num_attention_heads = num_attention_heads // tp_size
        self.num_gqa_groups = groups // tp_size
        channels = (kv_channels, kv_channels) if isinstance(kv_channels, int) else kv_channels
        self.head_dim_qk, self.head_dim_v = channels
        self.attention_dropout = attention_dropout
        self.qkv_format = qkv_format
        self.attn_mask_type = attn_mask_type
        self.window_size = window_size
        self.bottom_right_diagonal = bottom_right_diagonal
        self.softcap = softcap
        self.softmax_scale = softmax_scale
        self.softmax_type = softmax_type
        self.return_max_logit = return_max_logit
        self.attention_type = attention_type
        self.layer_number = layer_number
        self.name = name
        self.cp_size = 1
        self.set_context_parallel_group(cp_group, cp_global_ranks, cp_stream, cp_comm_type)
        # TransformerEngine's modules set these on the core; FP8 never crosses our borders.
        self.output_quantizer_role = None
        self.grad_input_quantizer_role = None
        self.backend = backend
        self._policy = Policy("transformer_engine", policy)
        # Not a submodule: it must not appear twice in state dicts, nor be patched again.
        self.__dict__["_original"] = original
        self.softmax_offset: nn.Parameter | None = None
        if softmax_type == "learnable":
            given = None if original is None else getattr(original, "softmax_offset", None)
            self.softmax_offset = (
                given if given is not None else nn.Parameter(torch.zeros(self.num_attention_heads))
            )

    @property
    def original(self) -> nn.Module | None:
        """What this module replaced, or None."""
        return self.__dict__["_original"]

    def set_context_parallel_group(
        self, cp_group: Any, cp_global_ranks: Any, cp_stream: Any, cp_comm_type: str = "p2p"
    ) -> None:
        """TransformerEngine's hook; more than one rank is refused at the first forward."""
        self.cp_size = 1 if cp_group is None else cp_group.size()

    def get_qkv_quantization_capabilities(self) -> tuple[bool, bool]:
        """(float8 current scaling, mxfp8) that the core could take as input: neither."""
        return False, False

    def get_extra_state(self) -> Tensor:
        """TransformerEngine's modules keep FP8 state here: an empty one of their kind."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """FP8 state of the core that was replaced has no meaning here."""

    def forward(
        self,
        query_layer: Tensor | None = None,
        key_layer: Tensor | None = None,
        value_layer: Tensor | None = None,
        attention_mask: Tensor | tuple[Tensor, Tensor] | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        softcap: float | None = None,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        fast_zero_fill: bool = True,
        inference_params: Any = None,
        pad_between_seqs: bool | None = None,
        fp8_output: bool | None = False,
        num_splits: int | None = 1,
        score_mod: Any = None,
        qkv_layer: Tensor | None = None,
        kv_layer: Tensor | None = None,
        qkv_interleave_dim: int = -3,
        **kwargs: Any,
    ) -> Tensor:
        """te.DotProductAttention.forward. Query (S, B, H, D), (B, S, H, D) or (T, H, D).

        Args:
            qkv_layer, kv_layer: q, k, v or k, v in one tensor, side by side along dimension
                ``qkv_interleave_dim``.

        Raises:
            UnsupportedRequest: what :func:`supports` names, under policy ``error``.
        """
        layout = qkv_format or self.qkv_format
        mask_type = attn_mask_type or self.attn_mask_type
        token_dim = {"sbhd": 0, "bshd": 1}.get(layout)
        sides = window_size if window_size is not None else self.window_size
        diagonal = bottom_right_diagonal
        diagonal = self.bottom_right_diagonal if diagonal is None else diagonal
        given = query_layer, key_layer, value_layer
        query_layer, key_layer, value_layer = _unpack(
            *given, qkv_layer, kv_layer, qkv_interleave_dim
        )
        reason = supports(
            attention_dropout=self.attention_dropout if self.training else 0.0,
            attn_mask_type=mask_type,
            qkv_format=layout,
            core_attention_bias_type=core_attention_bias_type,
            alibi_slopes=alibi_slopes,
            inference_params=inference_params,
            softmax_type=self.softmax_type,
            cp_size=self.cp_size,
            fp8_output=fp8_output,
            return_max_logit=self.return_max_logit,
            num_splits=num_splits,
            pad_between_seqs=pad_between_seqs,
            score_mod=score_mod,
            window_size=sides,
            bottom_right_diagonal=diagonal,
            seqlens=None
            if token_dim is None
            else (query_layer.shape[token_dim], key_layer.shape[token_dim]),  # fmt: skip
            same_lengths=self._lengths_agree(
                layout, mask_type, attention_mask, cu_seqlens_q, cu_seqlens_kv
            ),
            **kwargs,
        )
        if reason is not None:
            original = self.original
            packed = {}  # an older core does not know these names
            if qkv_layer is not None or kv_layer is not None:
                packed = {"qkv_layer": qkv_layer, "kv_layer": kv_layer,
                          "qkv_interleave_dim": qkv_interleave_dim}  # fmt: skip
            return self._policy.refuse(
                reason,
                None
                if original is None
                else lambda: original(
                    *given, attention_mask, qkv_format, cu_seqlens_q,
                    cu_seqlens_kv, cu_seqlens_q_padded, cu_seqlens_kv_padded, max_seqlen_q,
                    max_seqlen_kv, attn_mask_type, window_size, bottom_right_diagonal, softcap,
                    checkpoint_core_attention, core_attention_bias_type, core_attention_bias,
                    alibi_slopes, fast_zero_fill, inference_params, pad_between_seqs, fp8_output,
                    num_splits=num_splits, score_mod=score_mod, **packed, **kwargs,
                ),
            )  # fmt: skip

        padding, rest = _split_mask(mask_type)
        causal = rest != "no_mask"
        left, right = (-1, -1) if sides is None else sides
        options = {
            "softmax_scale": self.softmax_scale,
            "causal": causal,
            "window_size": (left, 0 if causal else right),
            "softcap": self.softcap if softcap is None else softcap,
            "sink": None if self.softmax_offset is None else self.softmax_offset.flatten(),
            "backend": self.backend,
        }
        if layout == "sbhd":
            q, k, v = (x.transpose(0, 1) for x in (query_layer, key_layer, value_layer))
        else:
            q, k, v = query_layer, key_layer, value_layer
        q, k, v = readable(q, k, v)

        def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if layout == "thd":
                cu_q, cu_k = cu_seqlens_q, cu_seqlens_kv
                require(cu_q is not None, "cu_seqlens_q", "must be given with thd", None)
                cu_k = cu_q if cu_k is None else cu_k
                longest = (max_seqlen_q, max_seqlen_q if max_seqlen_kv is None else max_seqlen_kv)
                if None in longest:  # a synchronisation that the caller can save us
                    longest = (int(cu_q.diff().max()), int(cu_k.diff().max()))
                room_q, room_k = (
                    cu if padded is None else padded
                    for cu, padded in ((cu_q, cu_seqlens_q_padded), (cu_k, cu_seqlens_kv_padded))
                )
                return lengths.without_unused(
                    lambda q, k, v, cu_q, cu_k: attention.flash_attn_varlen_func(
                        q, k, v, cu_q, cu_k, *longest, **options
                    ),
                    q, k, v, room_q, room_k,
                    None if room_q is cu_q else lengths.of(cu_q),
                    None if room_k is cu_k else lengths.of(cu_k),
                )  # fmt: skip
            if padding:
                return self._padded(q, k, v, attention_mask, cu_seqlens_q, cu_seqlens_kv, options)
            return attention.flash_attn_func(q, k, v, **options)

        if checkpoint_core_attention and torch.is_grad_enabled():
            from torch.utils.checkpoint import checkpoint

            out = checkpoint(core, q, k, v, use_reentrant=False)
        else:
            out = core(q, k, v)
        if layout == "sbhd":
            out = out.transpose(0, 1)
        return out.flatten(-2)

    @staticmethod
    def _lengths_agree(layout, mask_type, attention_mask, cu_q, cu_k) -> bool:
        """Whether packed or padded sequences have as many queries as keys, for top-left masks."""
        padding, mask = _split_mask(mask_type)
        if mask == "causal_bottom_right" or not (padding or layout == "thd"):
            return True
        if cu_q is None and isinstance(attention_mask, tuple):
            real_q, real_k = ((~m).flatten(1).sum(1) for m in attention_mask)
            return torch.equal(real_q, real_k)
        return lengths.equal(cu_q, cu_k)

    @staticmethod
    def _padded(q, k, v, attention_mask, cu_q, cu_k, options) -> Tensor:
        """Dense rows whose tails are padding: pack, attend, scatter back into zeros."""
        (batch, sq), sk = q.shape[:2], k.shape[1]
        if cu_q is None:
            require(
                attention_mask is not None, "attention_mask",
                "or cu_seqlens_q must be given with a padding mask type", None,
            )  # fmt: skip
            pair = attention_mask if isinstance(attention_mask, tuple) else (attention_mask,) * 2
            real_q, real_k = (~m.reshape(batch, -1) for m in pair)
        else:
            cu_k = cu_q if cu_k is None else cu_k
            real_q, real_k = (
                torch.arange(s, device=q.device) < cu.diff()[:, None].long()
                for s, cu in ((sq, cu_q), (sk, cu_k))
            )
        lengths_q, lengths_k = real_q.sum(1), real_k.sum(1)
        cu_q, cu_k = lengths.cu_from_lengths(lengths_q), lengths.cu_from_lengths(lengths_k)
        where_q, where_k = (r.flatten().nonzero().flatten() for r in (real_q, real_k))
        out = attention.flash_attn_varlen_func(
            q.flatten(0, 1)[where_q], *(x.flatten(0, 1)[where_k] for x in (k, v)), cu_q, cu_k,
            int(lengths_q.max()), int(lengths_k.max()), **options,
        )  # fmt: skip
        return lengths.pad_input(out, where_q, batch, sq)


def _replacement(core: nn.Module, policy: str, backend: str) -> DotProductAttention:
    """Ours with the settings of a ``te.DotProductAttention``."""
    dropout = getattr(core, "attention_dropout", 0.0)
    return DotProductAttention(
        core.num_attention_heads,
        (core.hidden_size_per_attention_head_k, core.hidden_size_per_attention_head_v),
        core.num_gqa_groups_per_partition * getattr(core, "tp_size", 1),
        attention_dropout=dropout.p if isinstance(dropout, nn.Dropout) else dropout,
        qkv_format=core.qkv_format,
        attn_mask_type=core.attn_mask_type,
        window_size=core.window_size,
        bottom_right_diagonal=getattr(core, "bottom_right_diagonal", None),
        softcap=getattr(core, "softcap", 0.0),
        tp_size=getattr(core, "tp_size", 1),
        softmax_scale=core.softmax_scale,
        softmax_type=getattr(core, "softmax_type", "vanilla"),
        return_max_logit=getattr(core, "return_max_logit", False),
        attention_type=getattr(core, "attention_type", "self"),
        layer_number=core.layer_number,
        cp_group=getattr(core, "cp_group", None),
        name=getattr(core, "name", None),
        policy=policy,
        backend=backend,
        original=core,
    )


def _cores(model: nn.Module, kind: str) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "DotProductAttention" and (
                isinstance(child, DotProductAttention) == (kind == "ours")
            ):
                yield parent, name, child


def patch(model: nn.Module, *, policy: str = "error", backend: str = "auto") -> int:
    """Replace every ``te.DotProductAttention`` inside ``model``, in place; returns how many.

    Args:
        model: a ``te.TransformerLayer``, ``te.MultiheadAttention``, or anything that holds some.
        policy, backend: as in :class:`DotProductAttention`.

    Raises:
        ArgumentError: the model holds none, which is more likely a mistake than a wish.
    """
    count = 0
    for parent, name, core in _cores(model, "theirs"):
        replacement = _replacement(core, policy, backend)
        replacement.train(core.training)
        setattr(parent, name, replacement)
        count += 1
    require(count > 0, "model", "must hold a te.DotProductAttention", type(model).__name__)
    return count


def unpatch(model: nn.Module) -> int:
    """Put the original modules back; returns how many."""
    count = 0
    for parent, name, core in _cores(model, "ours"):
        if core.original is not None:
            setattr(parent, name, core.original)
            count += 1
    return count
