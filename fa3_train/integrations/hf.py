"""Hugging Face transformers: ``attn_implementation="fa3_train"``.

    from fa3_train.integrations import hf
    hf.register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="fa3_train")

Two registrations are needed and both are made: the attention function, and a mask function under
the same name. Without the second, transformers passes no mask at all and padding would silently be
attended to. We register the mask function of its own flash-attention path: it hands over the 2-D
padding mask or nothing, and causality, windows and documents stay the kernel's business.

Conventions that are translated here:
    layout          (B, H, S, D) in, (B, S, H, D) out; transposes are views
    sliding window  w counts the query's own position: keys i - w + 1 .. i, so (w - 1, 0 or w - 1)
    sinks           ``s_aux``, one logit per head (GPT-OSS)
    packing         ``cu_seq_lens_q``/``_k``, or ``position_ids`` that restart inside a row
    padding         rows without their padding are packed, the result is scattered back into zeros
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fa3_train.checks import require
from fa3_train.integrations import lengths
from fa3_train.integrations._layout import readable
from fa3_train.integrations.policy import Policy
from fa3_train.ops import attention

__all__ = ["attention_forward", "register", "supports"]

NAME = "fa3_train"

_policy = Policy("hf")
_backend = "auto"

# Arguments of some model's attention that change the result and that no kernel here knows.
_REFUSED = ("head_mask", "position_bias", "alibi", "block_table", "score_mod", "block_mask")


def supports(
    *,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    output_attentions: bool = False,
    **kwargs: Any,
) -> str | None:
    """Reason why a call with these arguments is not served, or None."""
    if dropout:
        return f"dropout: attention dropout is not served, got {dropout}"
    if output_attentions:
        return "output_attentions: the attention matrix is never formed"
    if attention_mask is not None and attention_mask.dim() != 2:
        return (
            "attention_mask: must be a 2-D padding mask or None, got shape "
            f"{tuple(attention_mask.shape)}"
        )
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            return f"{name}: not served"
    return None


def _window(sliding_window: int | None, causal: bool, keys: int) -> tuple[int, int]:
    if sliding_window is None or keys <= sliding_window:
        return -1, -1
    return sliding_window - 1, 0 if causal else sliding_window - 1


def _find_documents(position_ids: Tensor) -> tuple[Tensor, int] | None:
    """(cu_seqlens, longest) of the rows of (B, S) joined end to end; None if no position restarts
    inside a row."""
    position_ids = position_ids.reshape(-1, position_ids.shape[-1])
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    # A jump ahead counts as well: transformers' own masks are made so.
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not bool(starts[:, 1:].any()):
        return None
    first = starts.flatten().nonzero().flatten()
    end = first.new_tensor([position_ids.numel()])
    cu = torch.cat([first, end]).to(torch.int32)
    return cu, int(cu.diff().max())


def _find_padding(mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """(positions of real tokens in the flattened mask, cu_seqlens, longest)."""
    mask = mask.bool()
    real = mask.sum(-1)
    return mask.flatten().nonzero().flatten(), lengths.cu_from_lengths(real), int(real.max())


_documents, _padding = lengths.Remembered(_find_documents), lengths.Remembered(_find_padding)


def _packed(q, k, v, cu_q, cu_k, max_q, max_k, options) -> Tensor:
    """q (B, Sq, H, D), k, v (B, Sk, Hkv, D) as one row of documents."""
    out = attention.flash_attn_varlen_func(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_q, cu_k, max_q, max_k, **options
    )
    return out.view(*q.shape[:2], *out.shape[1:])


def _padded(q, k, v, mask, options) -> Tensor:
    """``mask`` (B, Sk), nonzero where a token is real; queries are its last Sq columns."""
    (batch, sq), sk = q.shape[:2], k.shape[1]
    where_k, cu_k, max_k = _padding(mask)
    if sq == sk:
        where_q, cu_q, max_q = where_k, cu_k, max_k
    else:
        where_q, cu_q, max_q = _find_padding(mask[:, -sq:])
    out = attention.flash_attn_varlen_func(
        q.flatten(0, 1)[where_q], k.flatten(0, 1)[where_k], v.flatten(0, 1)[where_k],
        cu_q, cu_k, max_q, max_k, **options,
    )  # fmt: skip
    full = out.new_zeros(batch * sq, *out.shape[1:])
    return full.index_copy(0, where_q, out).view(batch, sq, *out.shape[1:])


def _working_dtype(module: nn.Module, query: Tensor) -> torch.dtype:
    """Adapters (PEFT) upcast norms, and fp32 queries arrive in a 16-bit model: go back to 16."""
    if query.dtype != torch.float32 or torch.is_autocast_enabled(query.device.type):
        return query.dtype
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            return layer.weight.dtype
    return query.dtype


def _eager(module, query, key, value, attention_mask, scaling, sliding_window, softcap, dropout,
           causal, s_aux):  # fmt: skip
    """What ``policy="warn"`` runs: plain attention with the weights in sight."""
    sq, sk = query.shape[2], key.shape[2]
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    offset = torch.arange(sk, device=query.device) - (
        torch.arange(sq, device=query.device)[:, None] + sk - sq
    )
    left, right = _window(sliding_window, causal, sk)
    right = 0 if causal else right
    hidden = torch.zeros(sq, sk, dtype=torch.bool, device=query.device)
    if left >= 0:
        hidden |= offset < -left
    if right >= 0:
        hidden |= offset > right
    if attention_mask is not None and attention_mask.dim() == 2:
        hidden = hidden | ~attention_mask.bool()[:, None, None, :]
    elif attention_mask is not None:
        scores = (
            scores.masked_fill(~attention_mask, float("-inf"))
            if attention_mask.dtype == torch.bool
            else scores + attention_mask
        )
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    if s_aux is not None:
        column = s_aux.view(1, -1, 1, 1).expand(scores.shape[0], -1, sq, 1)
        scores = torch.cat([scores, column.to(scores.dtype)], -1)
    weights = torch.softmax(scores.float(), -1).to(query.dtype)[..., :sk]
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function transformers calls: query (B, H, Sq, D), key and value (B, Hkv, Sk, D).

    Args:
        attention_mask: None, or (B, Sk) with nonzero for real tokens.
        sliding_window: total width, the query's own key included. s_aux: (H) sink logits.
        position_ids: (B, Sq) or (1, Sq); a restart inside a row begins a new document.
        kwargs: ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_length_q``, ``max_length_k`` of an
            already packed row; ``deterministic``; others are ignored unless :func:`supports`
            refuses them.

    Returns:
        (B, Sq, H, Dv), and None: the weights are never formed.

    Raises:
        UnsupportedRequest: see :func:`supports` and the policy given to :func:`register`.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    reason = supports(attention_mask=attention_mask, dropout=dropout, **kwargs)
    if reason is not None:
        return _policy.refuse(
            reason,
            lambda: _eager(
                module, query, key, value, attention_mask, scaling, sliding_window, softcap,
                dropout, causal, s_aux,
            ),
        )  # fmt: skip
    dtype = _working_dtype(module, query)
    q, k, v = readable(*(x.to(dtype).transpose(1, 2) for x in (query, key, value)))
    sq, sk = q.shape[1], k.shape[1]
    options = {
        "softmax_scale": scaling,
        "causal": causal,
        "window_size": _window(sliding_window, causal, sk),
        "softcap": softcap or 0.0,
        "sink": s_aux,
        "deterministic": bool(kwargs.get("deterministic")),
        "backend": _backend,
    }
    cu_q = kwargs.get("cu_seq_lens_q")
    if cu_q is not None:
        cu_k = kwargs.get("cu_seq_lens_k", cu_q)
        longest = kwargs.get("max_length_q"), kwargs.get("max_length_k")
        for name, x in (("max_length_q", longest[0]), ("max_length_k", longest[1])):
            require(x is not None, name, "must come with cu_seq_lens_q", x)
        return _packed(q, k, v, cu_q.int(), cu_k.int(), *map(int, longest), options), None
    if attention_mask is not None:
        return _padded(q, k, v, attention_mask, options), None
    # Three rows of positions (images) say nothing about documents.
    if position_ids is not None and position_ids.dim() <= 2 and sq == sk and sq > 1:
        documents = _documents(position_ids)
        if documents is not None and position_ids.shape[-1] == sq:
            cu, longest = documents
            if position_ids.numel() != q.shape[0] * sq:  # (1, S) for a whole batch
                row = cu[:-1]
                cu = torch.cat([row + b * sq for b in range(q.shape[0])] + [cu[-1:] * q.shape[0]])
            return _packed(q, k, v, cu.int(), cu.int(), longest, longest, options), None
    return attention.flash_attn_func(q, k, v, **options), None


def register(name: str = NAME, *, policy: str = "error", backend: str = "auto") -> str:
    """Make ``attn_implementation=name`` known to transformers; returns the name.

    Args:
        name: must not contain ``flash``, for transformers treats such names as packages to look
            for. DeepSpeed's Ulysses wraps whatever is registered: register first, then give it
            the same name as ``core_attn_implementation``.
        policy: ``error`` or ``warn`` (plain attention, counted) for what is not served.
        backend: as in :func:`fa3_train.flash_attn_func`.

    Raises:
        ImportError: transformers is not installed. ArgumentError: bad name or policy.
    """
    global _policy, _backend
    require("flash" not in name, "name", "must not contain 'flash'", repr(name))
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    _policy, _backend = Policy("hf", policy), backend
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, flash_attention_mask)
    return name
