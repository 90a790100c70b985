"""The ``sdpa`` backend: torch's scaled_dot_product_attention behind this project's conventions.

Three conventions differ and are bridged here. torch wants (B, H, S, D); its ``is_causal`` is
aligned top-left, ours bottom-right; and a query without keys is undefined there, 0 here.

Rows without keys are the first ``Sq - Sk - right`` ones of a sequence (the left side of a window
never empties a row). They are cut off before the call and come back as zeros; what is left of a
causal call with Sq > Sk is square, so torch's fast causal path serves it too.

Packed sequences (varlen), from fast to slow:

1. CUDA, bf16/fp16, one head dim up to 256: ``torch.nn.attention.varlen``, a FlashAttention-2;
2. otherwise one call per document, documents of equal lengths batched into one: needs the lengths
   on the host, one device synchronisation per ``cu_seqlens`` tensor (remembered on the tensor);
3. inside ``torch.compile``, where lengths cannot be read: one masked call over the packed row,
   quadratic in its length.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fa3_train.checks import AttentionShape
from fa3_train.ops.launch import mark_constant
from fa3_train.reference import visible


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int) -> Tensor:
    """q (B, Sq, H, D), k (B, Sk, G, D), v (B, Sk, G, E) -> (B, Sq, H, E)."""
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    dead = _rows_without_keys(seqlen_q, seqlen_k, right)
    if dead >= seqlen_q:
        return _zeros(q, v)
    alive = q[:, dead:] if dead else q
    mask, is_causal = None, False
    if left < 0 and right == 0 and alive.shape[1] == seqlen_k:
        is_causal = True
    elif left >= 0 or right >= 0:
        mask = visible(alive.shape[1], seqlen_k, False, (left, right), q.device)
    out = F.scaled_dot_product_attention(
        alive.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=_grouped(q, k),
    ).transpose(1, 2)
    return F.pad(out, (0, 0, 0, 0, dead, 0)) if dead else out


def _grouped(q: Tensor, k: Tensor) -> bool:
    # A branch, not the comparison's value: with dynamic shapes that would be no bool.
    if q.shape[-2] != k.shape[-2]:  # noqa: SIM103
        return True
    return False


def _rows_without_keys(seqlen_q: int, seqlen_k: int, right: int) -> int:
    if seqlen_k == 0:
        return seqlen_q
    return max(0, seqlen_q - seqlen_k - right) if right >= 0 else 0


def _zeros(q: Tensor, v: Tensor) -> Tensor:
    """Zeros shaped as the output, connected to q so that backward gives zeros, not an error."""
    return torch.matmul(q[..., :0], q.new_zeros(0, v.shape[-1]))


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    shape: AttentionShape,
    scale: float,
    left: int,
    right: int,
) -> Tensor:
    """q (Tq, H, D), k (Tk, G, D), v (Tk, G, E), cu_seqlens (B + 1) -> (Tq, H, E)."""
    if shape.total_q == 0 or shape.total_k == 0 or shape.batch == 0:
        return _zeros(q, v)
    if _flash_varlen_serves(q, shape):
        return _flash_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, shape, scale, left, right)
    if torch.compiler.is_compiling():
        return _masked_row(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, left, right)
    return _by_document(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, left, right)


@functools.cache
def _gqa_of_varlen_attn() -> str | None:
    """Does torch's varlen attention (torch >= 2.10) serve here, and does it know ``enable_gqa``:
    "knows", "repeat", or None where it cannot serve."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    if "window_size" not in parameters or "scale" not in parameters:
        return None
    return "knows" if "enable_gqa" in parameters else "repeat"


@mark_constant
def _gqa_constant() -> str | None:
    # A plain value: torch.compile cannot take a function as an assumed constant.
    return _gqa_of_varlen_attn()


def _flash_varlen_serves(q: Tensor, shape: AttentionShape) -> bool:
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16)
        and shape.head_dim_qk == shape.head_dim_v
        and shape.head_dim_qk <= 256
        and shape.head_dim_qk % 8 == 0
        and _gqa_constant() is not None
    )


def _flash_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, shape, scale, left, right) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options = {"scale": scale, "window_size": (left, right)}
    if shape.heads_q != shape.heads_k:
        if _gqa_constant() == "knows":
            options["enable_gqa"] = True
        else:  # the older signature refuses unequal heads: pay for copies of k and v
            size = shape.heads_q // shape.heads_k
            k, v = k.repeat_interleave(size, 1), v.repeat_interleave(size, 1)
    out: Any = varlen_attn(
        q, k, v, cu_seqlens_q, cu_seqlens_k, shape.seqlen_q, shape.seqlen_k, **options
    )  # fmt: skip
    return out


def host_offsets(cu_seqlens: Tensor) -> list[int]:
    """The entries on the host; remembered on the tensor until it is written to."""
    if cu_seqlens.device.type == "cpu" or cu_seqlens.is_inference():
        return cu_seqlens.tolist()
    known = getattr(cu_seqlens, "_fa3_train_offsets", None)
    if known is None or known[0] != cu_seqlens._version:
        known = (cu_seqlens._version, cu_seqlens.tolist())
        cu_seqlens._fa3_train_offsets = known  # type: ignore[attr-defined]
    return known[1]


def _by_document(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, left, right) -> Tensor:
    """One call per distinct pair of lengths.

    ``split`` and one ``cat`` rather than slices: the backward of a slice writes a tensor of the
    whole row per document, that of ``split`` writes the row once.
    """

    def pieces(x: Tensor, offsets: list[int]) -> tuple[list[int], list[Tensor]]:
        lengths = [b - a for a, b in zip(offsets, offsets[1:], strict=False)]
        parts = list(x.split([*lengths, x.shape[0] - offsets[-1]]))
        return lengths, parts

    offsets_q, offsets_k = host_offsets(cu_seqlens_q), host_offsets(cu_seqlens_k)
    lengths_q, parts_q = pieces(q, offsets_q)
    lengths_k, parts_k = pieces(k, offsets_k)
    _, parts_v = pieces(v, offsets_k)
    groups: dict[tuple[int, int], list[int]] = {}
    for i, lengths in enumerate(zip(lengths_q, lengths_k, strict=True)):
        groups.setdefault(lengths, []).append(i)
    results: list[Tensor] = [_zeros(part, v) for part in parts_q[-1:]] * len(parts_q)
    for members in groups.values():
        q_i, k_i, v_i = (
            torch.stack([parts[i] for i in members])
            if len(members) > 1
            else parts[members[0]][None]
            for parts in (parts_q, parts_k, parts_v)
        )
        batch = dense(q_i, k_i, v_i, scale, left, right)
        for i, out in zip(members, batch.unbind(0), strict=True):
            results[i] = out
    return torch.cat(results)


def _masked_row(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, left, right) -> Tensor:
    """The packed row as one sequence under a block-diagonal mask; no lengths on the host."""

    def place(total: int, cu: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.arange(total, device=cu.device, dtype=torch.int32)
        document = torch.searchsorted(cu[1:].contiguous(), t, right=True)
        return t, document

    t_q, doc_q = place(q.shape[0], cu_seqlens_q)
    t_k, doc_k = place(k.shape[0], cu_seqlens_k)
    batch = cu_seqlens_q.shape[0] - 1
    last = doc_q.clamp(max=batch - 1)  # rows beyond the last sequence look at it, then see nothing
    # Distance of each query from the end of its sequence, counted in keys: bottom-right alignment.
    at = (t_q - cu_seqlens_q[last + 1] + cu_seqlens_k[last + 1])[:, None]
    mask = (doc_q[:, None] == doc_k[None, :]) & (doc_q[:, None] < batch)
    if left >= 0:
        mask = mask & (t_k[None, :] >= at - left)
    if right >= 0:
        mask = mask & (t_k[None, :] <= at + right)
    alive = mask.any(1)
    # A row that sees nothing is given everything and then overwritten: no NaN in its gradient.
    mask = mask | ~alive[:, None]
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        scale=scale,
        enable_gqa=_grouped(q, k),
    )[0].transpose(0, 1)
    return out.masked_fill(~alive[:, None, None], 0.0)
