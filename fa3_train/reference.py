"""The truth, and PyTorch at low precision: what every kernel is judged against. torch only.

Two forward functions of the same mathematics:

- :func:`attention` evaluates the definition in fp64 (or any wide dtype), one sequence and one
  key/value head at a time, so that memory stays at (heads per group) * Sq * Sk numbers;
- :func:`attention_emulated` evaluates it as plain PyTorch code in bf16 or fp16 would, scores and
  probabilities rounded on the way. Its error is the unit in numerics.py.

Both are differentiable by autograd, in lse and sink too. :func:`attention_backward` is the explicit
gradient from a *given* out and lse (FlashAttention-2, section 3.1, algorithm 2): what a ring over
key blocks needs, where out and lse belong to all blocks while k and v are one block's.

Definition, for query i and key j of one sequence, shift = Sk - Sq (masks are bottom-right aligned):

    s_ij = scale * q_i . k_j;  with softcap c: s_ij = c * tanh(s_ij / c)
    j is visible to i  iff  i + shift - left <= j <= i + shift + right   (a side of -1: no bound)
    l_i = sum over visible j of exp(s_ij), plus exp(sink_h) if there is a sink
    out_i = sum_j exp(s_ij) v_j / l_i,  lse_i = log l_i (natural)

A row that sees no key gives out = 0 and lse = -inf (lse = sink_h with a sink).

Shape letters as in checks.py: B, S, T, H query heads, G key/value heads, D, E = head dim of v.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Gradients(NamedTuple):
    """Gradients of q, k, v and sink (None without one), shaped as those."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dsink: Tensor | None


def visible(
    seqlen_q: int,
    seqlen_k: int,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    device: torch.device | str | None = None,
) -> Tensor:
    """Bool (Sq, Sk): which key each query sees. Causal is a right side of 0."""
    left, right = window_size
    if causal:
        right = 0
    i = torch.arange(seqlen_q, device=device)[:, None] + (seqlen_k - seqlen_q)
    j = torch.arange(seqlen_k, device=device)[None, :]
    mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if left >= 0:
        mask &= j >= i - left
    if right >= 0:
        mask &= j <= i + right
    return mask


def _sequences(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> Iterator[tuple[int | None, slice, slice]]:
    """(batch index or None, rows of q, rows of k) of each sequence; reads cu_seqlens (a sync)."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        for b in range(q.shape[0]):
            yield b, slice(0, q.shape[1]), slice(0, k.shape[1])
        return
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(ends_q) - 1):
        yield None, slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])


def _rows(x: Tensor, batch: int | None, rows: slice) -> Tensor:
    return x[rows] if batch is None else x[batch, rows]


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    """q (group, Sq, D), k (Sk, D) -> scaled and capped scores (group, Sq, Sk)."""
    s = torch.matmul(q, k.transpose(-1, -2)) * scale
    return softcap * torch.tanh(s / softcap) if softcap else s


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One sequence, one group: q (group, Sq, D), k (Sk, D), v (Sk, E), sink (group) or None.

    Returns out (group, Sq, E) and lse (group, Sq). Rows without keys stay free of NaN in the
    gradient as well, hence the ``where`` around every division and logarithm.
    """
    s = _scores(q, k, scale, softcap).masked_fill(~mask, -math.inf)
    s = s if sink is None else torch.cat([s, sink[:, None, None].expand(*s.shape[:2], 1)], -1)
    if s.shape[-1] == 0:  # zeros and -inf that autograd still connects to q and v
        return torch.matmul(s, v), s.sum(-1) - math.inf
    m = s.detach().amax(-1, keepdim=True)
    m = torch.where(m.isneginf(), 0.0, m)
    p = torch.exp(s - m)
    total = p.sum(-1, keepdim=True)
    some = total > 0
    safe = torch.where(some, total, 1.0)
    out = torch.matmul(p[..., : k.shape[0]], v) / safe
    lse = torch.where(some, m + torch.log(safe), -math.inf)
    return out, lse[..., 0]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Attention by its definition, in ``dtype``; differentiable.

    Args:
        q: (B, Sq, H, D), or (T, H, D) with cu_seqlens. k: (B, Sk, G, D). v: (B, Sk, G, E).
        softmax_scale: default 1 / sqrt(D). sink: (H), in units of scaled scores.
        cu_seqlens_q, cu_seqlens_k: int (B + 1); rows beyond the last entry give out 0, lse -inf.

    Returns:
        out (B, Sq, H, E) or (T, H, E); lse (B, H, Sq) or (H, T). Both in ``dtype``.
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    heads, groups = q.shape[-2], k.shape[-2]
    size = heads // groups
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    sink = None if sink is None else sink.to(dtype)
    outs, lses = [], []
    end = 0
    with torch.autocast(q.device.type, enabled=False):
        for batch, rows_q, rows_k in _sequences(q, k, cu_seqlens_q, cu_seqlens_k):
            q_i, k_i, v_i = (
                _rows(q, batch, rows_q),
                _rows(k, batch, rows_k),
                _rows(v, batch, rows_k),
            )
            mask = visible(q_i.shape[0], k_i.shape[0], causal, window_size, q.device)
            parts = []
            for g in range(groups):
                h = slice(g * size, (g + 1) * size)
                parts.append(
                    _attend(
                        q_i[:, h].transpose(0, 1), k_i[:, g], v_i[:, g], mask, scale, softcap,
                        None if sink is None else sink[h],
                    )
                )  # fmt: skip
            outs.append(torch.cat([o for o, _ in parts]).transpose(0, 1))
            lses.append(torch.cat([lse for _, lse in parts]))
            end = rows_q.stop
    if cu_seqlens_q is None:
        if not outs:
            nothing = q.sum() + k.sum() + v.sum()  # 0, and autograd still connects the results
            out = q.new_zeros(*q.shape[:-1], v.shape[-1]) + nothing
            return out, q.new_zeros(0, heads, q.shape[1]) + nothing
        return torch.stack(outs), torch.stack(lses)
    rest = q.shape[0] - end
    outs.append(q.new_zeros(rest, heads, v.shape[-1]))
    lses.append(q.new_full((heads, rest), -math.inf))
    return torch.cat(outs), torch.cat(lses, dim=-1)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    dlse: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Gradients:
    """The gradient from a given ``out`` and ``lse``, explicit, in ``dtype``.

        delta_i = dout_i . out_i - dlse_i;  p_ij = exp(s_ij - lse_i);  dv_j = sum_i p_ij dout_i
        ds_ij = p_ij (dout_i . v_j - delta_i) [times 1 - (s_ij / softcap)^2]
        dq_i = scale sum_j ds_ij k_j;  dk_j = scale sum_i ds_ij q_i
        dsink_h = -sum_i exp(sink_h - lse_i) delta_i

    ``out`` and ``lse`` may come from more keys than ``k`` holds (ring attention): the result is
    then the share of these keys. Shapes as in :func:`attention`; dlse as lse.
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    groups = k.shape[-2]
    size = q.shape[-2] // groups
    q, k, v, out, dout, lse = (x.to(dtype) for x in (q, k, v, out, dout, lse))
    sink = None if sink is None else sink.to(dtype)
    dlse = None if dlse is None else dlse.to(dtype)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dsink = None if sink is None else torch.zeros_like(sink)
    with torch.autocast(q.device.type, enabled=False):
        for batch, rows_q, rows_k in _sequences(q, k, cu_seqlens_q, cu_seqlens_k):
            at_q, at_k = (rows_q, rows_k) if batch is None else ((batch, rows_q), (batch, rows_k))
            q_i, k_i, v_i, out_i, dout_i = q[at_q], k[at_k], v[at_k], out[at_q], dout[at_q]
            at_lse = (slice(None), rows_q) if batch is None else batch
            lse_i = lse[at_lse]
            dlse_i = None if dlse is None else dlse[at_lse]
            mask = visible(q_i.shape[0], k_i.shape[0], causal, window_size, q.device)
            for g in range(groups):
                h = slice(g * size, (g + 1) * size)
                qh, doh = q_i[:, h].transpose(0, 1), dout_i[:, h].transpose(0, 1)
                delta = (doh * out_i[:, h].transpose(0, 1)).sum(-1)
                if dlse_i is not None:
                    delta = delta - dlse_i[h]
                lse_h = lse_i[h]
                safe = torch.where(lse_h.isneginf(), 0.0, lse_h)
                s = _scores(qh, k_i[:, g], scale, softcap)
                p = torch.exp(s - safe[..., None]).masked_fill(~mask, 0.0)
                ds = p * (torch.matmul(doh, v_i[:, g].transpose(0, 1)) - delta[..., None])
                if softcap:
                    ds = ds * (1 - (s / softcap) ** 2)
                dq[at_q][:, h] = scale * torch.matmul(ds, k_i[:, g]).transpose(0, 1)
                dk[at_k][:, g] = scale * torch.einsum("hij,hid->jd", ds, qh)
                dv[at_k][:, g] = torch.einsum("hij,hid->jd", p, doh)
                if sink is not None and dsink is not None:
                    dsink[h] -= (torch.exp(sink[h, None] - lse_h) * delta).sum(-1)
    return Gradients(dq, dk, dv, dsink)


def attention_emulated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sink: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The textbook formula in ``dtype`` (default: that of q), as plain PyTorch code gives it.

    Scores are rounded to ``dtype`` after q k^T, the probabilities after softmax, the result after
    P v; sums inside each step are fp32, as the libraries do. Differentiable, with gradients rounded
    at the same places; dk and dv of a group are summed over heads that were each rounded.

    Returns:
        out in ``dtype``; lse in fp32 from the rounded scores. Shapes as :func:`attention`.
    """
    dtype = dtype or q.dtype
    scale = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    heads, size = q.shape[-2], q.shape[-2] // k.shape[-2]
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    k, v = k.repeat_interleave(size, -2), v.repeat_interleave(size, -2)
    outs, lses = [], []
    end = 0
    with torch.autocast(q.device.type, enabled=False):
        for batch, rows_q, rows_k in _sequences(q, k, cu_seqlens_q, cu_seqlens_k):
            q_i = _rows(q, batch, rows_q).transpose(0, 1)
            k_i, v_i = (_rows(x, batch, rows_k).transpose(0, 1) for x in (k, v))
            mask = visible(q_i.shape[1], k_i.shape[1], causal, window_size, q.device)
            s = _scores(q_i, k_i, scale, softcap).masked_fill(~mask, -math.inf)
            if sink is not None:
                s = torch.cat([s, sink.to(dtype)[:, None, None].expand(*s.shape[:2], 1)], -1)
            dead = s.detach().isneginf().all(-1, keepdim=True)
            p = torch.softmax(s.masked_fill(dead, 0.0), dim=-1).masked_fill(dead, 0.0)
            outs.append(torch.matmul(p[..., : k_i.shape[1]], v_i).transpose(0, 1))
            finite = s.masked_fill(dead, 0.0).float()
            lse = torch.logsumexp(finite, -1) if s.shape[-1] else finite.new_zeros(s.shape[:2])
            lses.append(lse.masked_fill(dead[..., 0], -math.inf))
            end = rows_q.stop
    if cu_seqlens_q is None:
        return torch.stack(outs), torch.stack(lses)
    rest = q.shape[0] - end
    outs.append(q.new_zeros(rest, heads, v.shape[-1]))
    lses.append(torch.full((heads, rest), -math.inf, device=q.device))
    return torch.cat(outs), torch.cat(lses, dim=-1)


def attention_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dlse: Tensor | None = None,
    sink: Tensor | None = None,
    emulated: bool = False,
    **options,
) -> tuple[Tensor, Tensor, Gradients]:
    """out, lse and gradients through autograd.

    fp64 by default; ``emulated=True`` goes through :func:`attention_emulated` in the dtype of q.
    ``options``: the keywords of :func:`attention`. dlse entries at infinite lse are ignored.
    """
    wide = q.dtype if emulated else torch.float64
    leaves = [x.detach().to(wide).requires_grad_() for x in (q, k, v)]
    sink = None if sink is None else sink.detach().to(wide).requires_grad_()
    function = attention_emulated if emulated else attention
    out, lse = function(*leaves, sink=sink, **options)
    results, seeds = [out], [dout.to(out.dtype)]
    if dlse is not None:
        results.append(torch.where(lse.isfinite(), lse, 0.0))
        seeds.append(dlse.to(lse.dtype))
    inputs = [*leaves, *([] if sink is None else [sink])]
    grads = torch.autograd.grad(results, inputs, seeds, allow_unused=True)
    full = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]
    return (
        out.detach(),
        lse.detach(),
        Gradients(full[0], full[1], full[2], None if sink is None else full[3]),
    )
