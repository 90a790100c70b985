"""Causal or full self-attention straight on the product of a QKV projection, RoPE included.

    qkv (.., H + 2 G, D), heads [q; k; v]  ->  out (.., H, D)

Beside :func:`flash_attn_func` after :func:`rope` this saves memory traffic and memory:

- q and k are rotated where they lie, so no second copy of them is kept for the backward;
- the backward writes dq, dk and dv as columns of one dqkv, and turns the first two back in place:
  the gradient that the projection's backward reads is complete without a concatenation.

With ``fp8`` the forward is that of ``flash_attn_fp8_func``: codes of the rotated and transformed q
and k, and of v, live only until the kernel has read them. The backward is the 16-bit one at the
rotated q and k and at v (``gradient="inputs"`` there).

**The product is consumed**: ``qkv`` holds rotated q and k afterwards. That is sound where nobody
else looks at it (the output of a linear map is not needed for the map's own gradient), which is why
this is called by :class:`fa3_train.modules.SelfAttention` on what it has just made, and nowhere
else. Only for the ``hopper`` backend, eager; under ``torch.compile`` the layer takes the other way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fa3_train import _lib, checks
from fa3_train.ops import fp8 as fp8_ops
from fa3_train.ops import hopper
from fa3_train.ops.launch import Key, Plan, address, meta, remember, strided
from fa3_train.ops.prep import HADAMARD, QUANTIZE, ROPE, check_prep

_MASK = "float softmax_scale, bool causal, int window_left, int window_right, float softcap"
hopper._library.define(
    "rotate_packed(Tensor(a!) qkv, int heads, Tensor cos, Tensor sin, Tensor? position_ids, "
    "Tensor? cu_seqlens, bool inverse) -> ()"
)
hopper._library.define(
    "attn_bwd_packed(Tensor dout, Tensor qkv, int heads, int kv_heads, Tensor out, Tensor lse, "
    f"Tensor? cu_seqlens, int max_seqlen, {_MASK}, bool deterministic) -> Tensor"
)

_turns: dict[Key, Plan] = {}
_POINTERS = (
    "tensors.0.x.ptr", "tensors.0.out.ptr", "cos", "sin", "position_ids", "cu_seqlens",
)  # fmt: skip


def split(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """Views q (.., H, D), k and v (.., G, D) of the packed heads."""
    return qkv.split((heads, kv_heads, kv_heads), dim=-2)


def _turn_plan(qkv: Tensor, heads, cos, sin, position_ids, cu_seqlens, inverse) -> Plan:
    turned = qkv[..., :heads, :]
    check_prep([turned], [ROPE], cos, sin, None, position_ids, cu_seqlens, 128)
    checks.check_hopper_tensor("qkv", turned)
    params = _lib.PrepParams()
    params.tensors[0] = _lib.PrepTensor(strided(turned), strided(turned), None, heads, 1, 0, 0)
    params.num_tensors, params.head_dim = 1, qkv.shape[-1]
    if cu_seqlens is not None:
        params.batch, params.total = cu_seqlens.shape[0] - 1, qkv.shape[0]
    else:
        params.batch, params.seqlen = (qkv.shape[0] if qkv.dim() == 4 else 1), qkv.shape[-3]
    params.positions, params.rotary_dim = cos.shape[0], 2 * cos.shape[1]
    params.inverse, params.block_size = int(inverse), 128
    params.in_dtype = params.out_dtype = hopper.DTYPE_CODES[qkv.dtype]
    return Plan("fa3_prep", params, qkv.device, _POINTERS)


def _rotate_packed(qkv, heads, cos, sin, position_ids, cu_seqlens, inverse):
    if qkv.numel() == 0:
        return
    if position_ids is not None:
        position_ids = position_ids.to(torch.int32).expand(qkv.shape[:-2]).contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    key = (meta(qkv), heads, *map(meta, (cos, sin, position_ids, cu_seqlens)), inverse)
    plan = _turns.get(key)
    if plan is None:
        plan = remember(
            _turns, key, _turn_plan(qkv, heads, cos, sin, position_ids, cu_seqlens, inverse)
        )
    plan.launch(
        qkv.data_ptr(), qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), address(position_ids),
        address(cu_seqlens),
    )  # fmt: skip


def _attn_bwd_packed(
    dout, qkv, heads, kv_heads, out, lse, cu_seqlens, max_seqlen, softmax_scale, causal,
    window_left, window_right, softcap, deterministic,
):  # fmt: skip
    dqkv = torch.empty_like(qkv)
    q, k, v = split(qkv, heads, kv_heads)
    hopper.backward_into(
        dout, q, k, v, out, lse, cu_seqlens, cu_seqlens, max_seqlen,
        max_seqlen, softmax_scale, causal, window_left, window_right, softcap, deterministic,
        split(dqkv, heads, kv_heads),
    )  # fmt: skip
    return dqkv


hopper._library.impl("rotate_packed", _rotate_packed, "CUDA")
hopper._library.impl("attn_bwd_packed", _attn_bwd_packed, "CUDA")


class _Call(NamedTuple):
    """What does not change between forward and backward; no tensors."""

    heads: int
    kv_heads: int
    max_seqlen: int
    scale: float
    causal: bool
    left: int
    right: int
    softcap: float
    deterministic: bool
    fp8: bool
    two_level: bool

    @property
    def mask(self) -> tuple[float, bool, int, int, float]:
        return self.scale, self.causal, self.left, self.right, self.softcap


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, signs, position_ids, cu_seqlens, call: _Call):
        where = (cos, sin, position_ids, cu_seqlens, call)
        if call.fp8:
            out, lse = _run_fp8(qkv, signs, *where)
            _turn(qkv, *where)  # for the backward
        else:
            out, lse = _run(qkv, *where)
        ctx.save_for_backward(qkv, out, lse, cos, sin, position_ids, cu_seqlens)
        ctx.call = call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        qkv, out, lse, cos, sin, position_ids, cu_seqlens = ctx.saved_tensors
        call: _Call = ctx.call
        dqkv = torch.ops.fa3_train.attn_bwd_packed(
            dout, qkv, call.heads, call.kv_heads, out, lse, cu_seqlens, call.max_seqlen,
            *call.mask, call.deterministic,
        )  # fmt: skip
        _turn(dqkv, cos, sin, position_ids, cu_seqlens, call, inverse=True)
        return dqkv, None, None, None, None, None, None


def _turn(qkv, cos, sin, position_ids, cu_seqlens, call: _Call, inverse: bool = False) -> None:
    """q and k of ``qkv`` rotated in place."""
    if cos is not None:
        torch.ops.fa3_train.rotate_packed(
            qkv, call.heads + call.kv_heads, cos, sin, position_ids, cu_seqlens, inverse
        )


def _run_fp8(qkv, signs, cos, sin, position_ids, cu_seqlens, call: _Call) -> tuple[Tensor, Tensor]:
    turned = QUANTIZE | (ROPE if cos is not None else 0) | (HADAMARD if signs is not None else 0)
    codes = torch.ops.fa3_train.prep(
        list(split(qkv, call.heads, call.kv_heads)), [turned, turned, QUANTIZE], cos, sin, signs,
        position_ids, cu_seqlens, False, False, fp8_ops.SCALE_BLOCK, None,
    )  # fmt: skip
    return torch.ops.fa3_train.attn_fp8_fwd(
        *codes, cu_seqlens, cu_seqlens, call.max_seqlen, call.max_seqlen, call.scale, call.causal,
        call.left, call.right, call.two_level, qkv.dtype,
    )  # fmt: skip


def _run(qkv, cos, sin, position_ids, cu_seqlens, call: _Call) -> tuple[Tensor, Tensor]:
    _turn(qkv, cos, sin, position_ids, cu_seqlens, call)
    q, k, v = split(qkv, call.heads, call.kv_heads)
    return torch.ops.fa3_train.attn_fwd(
        q, k, v, cu_seqlens, cu_seqlens, None, call.max_seqlen, call.max_seqlen, *call.mask
    )


def packed_attention(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    fp8: bool = False,
    signs: Tensor | None = None,
    two_level: bool = True,
) -> Tensor:
    """Attention of packed heads ``qkv``, which is overwritten; differentiable in ``qkv``.

    Args:
        qkv: (B, S, H + 2 G, D) or, with ``cu_seqlens``, (T, H + 2 G, D); bf16 or fp16.
        heads, kv_heads: H and G.
        cos, sin: fp32 (positions, R / 2), or None for no rotation; position_ids: int32 (T) or
            (B, S), default 0, 1, ... in each sequence.
        fp8: both products of the forward in FP8, with signs and two_level as in
            ``flash_attn_fp8_func``; no softcap then.

    The other arguments are those of ``flash_attn_func`` and ``flash_attn_varlen_func``.

    Returns:
        out (.., H, D). Raises ArgumentError as those functions do.
    """
    checks.require(
        qkv.shape[-2] == heads + 2 * kv_heads, "qkv", f"must hold {heads} + 2 x {kv_heads} heads",
        tuple(qkv.shape),
    )  # fmt: skip
    q, k, v = split(qkv, heads, kv_heads)
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    shape = checks.attention_shape(q, k, v, *lengths)
    left, right = checks.resolve_window(causal, window_size)
    if left >= shape.seqlen_k - 1:
        left = -1
    call = _Call(
        heads, kv_heads, shape.seqlen_q, checks.resolve_scale(softmax_scale, shape.head_dim_qk),
        right == 0, left, right, checks.check_softcap(softcap), deterministic, fp8, two_level,
    )  # fmt: skip
    checks.require(not (fp8 and softcap), "softcap", "must be 0 with fp8", softcap)
    checks.require(fp8 or signs is None, "signs", "are for fp8 only", "a tensor")
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _PackedAttention.apply(qkv, cos, sin, signs, position_ids, cu_seqlens, call)
    where = (cos, sin, position_ids, cu_seqlens, call)
    return (_run_fp8(qkv, signs, *where) if fp8 else _run(qkv, *where))[0]
