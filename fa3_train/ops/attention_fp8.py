"""FP8 attention as one differentiable function of 16-bit q, k, v.

    q, k -> RoPE (with cos, sin) -> random-sign Hadamard (with signs) -> e4m3, one descale per block
    v    ->                                                           -> e4m3, one descale per block
    FP8 forward (ops/fp8.py) -> out, lse

The backward runs in 16 bits, quantization counting as the identity (straight-through). At which
point it differentiates is ``gradient``:

``"inputs"`` (default): at the 16-bit q, k, v that came in (rotated again if need be), with out and
lse of the FP8 forward. Scores are then exact, and what quantization costs is only what it did to
lse: on normal data 0.8 % of dq and dk and 0.5 % of dv, where e4m3 rounding of q and k alone moves
every probability by 4 %. The catch: the rows of P sum to exp(true lse - FP8 lse) instead of 1, so
scores must be moderate. From a standard deviation of about 3 on, "codes" is the better one.

``"codes"``: at the dequantized tensors. A descale has 4 significant bits, as a code has, so their
product is exact in bf16 and fp16: the probabilities that the backward recomputes are those of the
forward up to the rounding of its own sums. The error is that of the scores, 4 to 5 % on normal
data, bounded on any. Half the memory is kept between the passes. dq and dk belong to the rotated
basis; the inverse preprocessing (Hadamard, then RoPE by the opposite angle) brings them back.

docs/preprocess.md has both beside each other on sharper and on outlier data.

(FlashAttention-3, arXiv 2407.08608, section 3.3. The paper quantizes per block; its released code
scales per head.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fa3_train import _lib, checks, reference, reference_fp8
from fa3_train.checks import AttentionShape
from fa3_train.ops import backends, fp8, fp8_eager, preprocess
from fa3_train.ops.attention import _PLAIN, _like_autocast, _reference_dtype, _tighten
from fa3_train.ops.launch import Key, meta, remember

__all__ = ["flash_attn_fp8_func", "flash_attn_fp8_varlen_func"]

# Head dims that the preprocessing has kernels for.
HEAD_DIMS = reference_fp8.HEAD_DIMS
BACKENDS = ("hopper", "reference")
GRADIENTS = ("inputs", "codes")


class _Call(NamedTuple):
    """What does not change between forward and backward; no tensors."""

    lengths: tuple[int, int]
    scale: float
    left: int
    right: int
    interleaved: bool
    two_level: bool
    gradient: str
    backend: str


def _positions(
    position_ids: Tensor | None, cu_seqlens: Tensor | None, interleaved: bool
) -> dict[str, Any]:
    return {
        "position_ids": position_ids, "cu_seqlens": cu_seqlens, "interleaved": interleaved,
    }  # fmt: skip


def _quantize(
    q, k, v, cos, sin, signs, position_ids, cu_q, cu_k, call: _Call
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codes and descales of q, k, v: in one pass where q and k are laid out alike."""
    if call.backend == "reference":
        where = _positions(position_ids, cu_q, call.interleaved)
        q8, sq = reference_fp8.rope_hadamard_quantize(q, cos, sin, signs, **where)
        where["cu_seqlens"] = cu_k
        k8, sk = reference_fp8.rope_hadamard_quantize(k, cos, sin, signs, **where)
        v8, sv = reference_fp8.quantize_blocks(v.float(), cu_seqlens=cu_k)
        return q8, k8, v8, sq, sk, sv
    turn = (preprocess.ROPE if cos is not None else 0) | (
        preprocess.HADAMARD if signs is not None else 0
    )
    rotated = turn | preprocess.QUANTIZE

    def run(tensors, stages, cu_seqlens):
        return torch.ops.fa3_train.prep(
            tensors, stages, cos, sin, signs, position_ids, cu_seqlens, call.interleaved, False,
            fp8.SCALE_BLOCK, None,
        )  # fmt: skip

    if fp8_eager.alike(q, k, cu_q, cu_k):
        return run([q, k, v], [rotated, rotated, preprocess.QUANTIZE], cu_q)
    q8, sq = run([q], [rotated], cu_q)
    k8, v8, sk, sv = run([k, v], [rotated, preprocess.QUANTIZE], cu_k)
    return q8, k8, v8, sq, sk, sv


def _attend(q8, k8, v8, sq, sk, sv, cu_q, cu_k, call: _Call, dtype: torch.dtype):
    if call.backend == "reference":
        out, lse = reference_fp8.attention_fp8(
            q8, k8, v8, sq, sk, sv, softmax_scale=call.scale, window_size=(call.left, call.right),
            cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, two_level=call.two_level,
        )  # fmt: skip
        return out.to(dtype), lse.float()
    return torch.ops.fa3_train.attn_fp8_fwd(
        q8, k8, v8, sq, sk, sv, cu_q, cu_k, *call.lengths, call.scale, call.right == 0, call.left,
        call.right, call.two_level, dtype,
    )  # fmt: skip


def _unrotate(dq, dk, cos, sin, signs, position_ids, cu_q, cu_k, call: _Call, dtype: torch.dtype):
    """Gradients of the rotated q and k -> gradients of q and k, in ``dtype``."""
    if cos is None and signs is None:
        return dq.to(dtype), dk.to(dtype)
    if call.backend == "reference":
        where = _positions(position_ids, cu_q, call.interleaved)
        dq = reference_fp8.rope_hadamard_gradient(dq, cos, sin, signs, **where)
        where["cu_seqlens"] = cu_k
        dk = reference_fp8.rope_hadamard_gradient(dk, cos, sin, signs, **where)
        return dq.to(dtype), dk.to(dtype)
    stages = (preprocess.ROPE if cos is not None else 0) | (
        preprocess.HADAMARD if signs is not None else 0
    )

    def run(tensors, cu_seqlens):
        return torch.ops.fa3_train.prep(
            tensors, [stages] * len(tensors), cos, sin, signs, position_ids, cu_seqlens,
            call.interleaved, True, fp8.SCALE_BLOCK, dtype,
        )  # fmt: skip

    if fp8_eager.alike(dq, dk, cu_q, cu_k):
        return run([dq, dk], cu_q)
    return run([dq], cu_q)[0], run([dk], cu_k)[0]


def _rotate(q, k, cos, sin, position_ids, cu_seqlens, call: _Call) -> tuple[Tensor, Tensor]:
    """q and k turned by RoPE, 16-bit."""
    if call.backend == "reference":
        where = _positions(position_ids, cu_seqlens, call.interleaved)
        turned = (reference_fp8.rotate(x.float(), cos, sin, **where).to(x.dtype) for x in (q, k))
        return tuple(turned)  # type: ignore[return-value]
    return tuple(
        torch.ops.fa3_train.prep(
            [q, k], [preprocess.ROPE] * 2, cos, sin, None, position_ids, cu_seqlens,
            call.interleaved, False, fp8.SCALE_BLOCK, None,
        )
    )  # fmt: skip


def _values(codes, cu_q, cu_k, call: _Call, dtype: torch.dtype):
    """What codes and descales stand for: fp32 in the emulation, 16-bit (exact in bf16) on a GPU."""
    q8, k8, v8, sq, sk, sv = codes
    if call.backend == "reference":
        return tuple(
            reference_fp8.dequantize_blocks(x, s, cu_seqlens=cu)
            for x, s, cu in ((q8, sq, cu_q), (k8, sk, cu_k), (v8, sv, cu_k))
        )

    def run(codes, descales, cu_seqlens):
        return torch.ops.fa3_train.dequantize(
            codes, descales, cu_seqlens, fp8.SCALE_BLOCK, dtype
        )  # fmt: skip

    if fp8_eager.alike(q8, k8, cu_q, cu_k):
        return run([q8, k8, v8], [sq, sk, sv], cu_q)
    return (*run([q8], [sq], cu_q), *run([k8, v8], [sk, sv], cu_k))


class _AttentionFp8(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cos, sin, signs, position_ids, cu_q, cu_k, call: _Call, eager):
        # None: the same as cu_q. torch.compile refuses one tensor as two arguments.
        cu_k = cu_q if cu_k is None else cu_k
        if call.gradient == "codes":
            codes = _quantize(q, k, v, cos, sin, signs, position_ids, cu_q, cu_k, call)
            out, lse = _attend(*codes, cu_q, cu_k, call, q.dtype)
            kept: tuple[Tensor, ...] = codes
        else:
            kept = (q, k, v)
            out, lse = _forward(q, k, v, cos, sin, signs, position_ids, cu_q, cu_k, call, eager)
        ctx.save_for_backward(out, lse, cos, sin, signs, position_ids, cu_q, cu_k, *kept)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        out, lse, cos, sin, signs, position_ids, cu_q, cu_k, *kept = ctx.saved_tensors
        call, dtype = ctx.call, out.dtype
        if dout is None:
            dout = torch.zeros_like(out)
        if call.gradient == "codes":
            q, k, v = _values(kept, cu_q, cu_k, call, dtype)
        else:
            q, k, v = kept
            signs = None  # q and k were rotated only
            if cos is not None:
                q, k = _rotate(q, k, cos, sin, position_ids, cu_q, call)
        if call.backend == "reference":
            dq, dk, dv, _ = reference.attention_backward(
                dout, q, k, v, out, lse, dlse=dlse, softmax_scale=call.scale,
                window_size=(call.left, call.right), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
                dtype=_reference_dtype(dtype),
            )  # fmt: skip
        else:
            dq, dk, dv, _ = torch.ops.fa3_train.attn_bwd(
                dout, q, k, v, out, lse, dlse, cu_q, cu_k, None, *call.lengths, call.scale,
                call.right == 0, call.left, call.right, 0.0, False,
            )  # fmt: skip
        dq, dk = _unrotate(dq, dk, cos, sin, signs, position_ids, cu_q, cu_k, call, dtype)
        return (dq, dk, dv.to(dtype), *(None,) * 8)


def _choose(backend: str, q: Tensor, shape: AttentionShape, needs_grad: bool) -> str:
    """``hopper`` or ``reference``: torch's own attention has no FP8 with descales."""
    if backend == "sdpa":
        raise backends.BackendError(
            "backend='sdpa': torch's scaled_dot_product_attention has no FP8; backends that could: "
            f"{list(BACKENDS)}"
        )
    # return_lse is in every FP8 call (the backward needs it); it also rules sdpa out for 'auto'.
    grouped = shape.heads_q != shape.heads_k
    on = (
        ("return_lse", True), ("varlen", shape.varlen), ("grouped", grouped), ("grad", needs_grad),
    )  # fmt: skip
    chosen = backends.choose(
        backend, q.device, q.dtype, shape.head_dim_qk, shape.head_dim_v,
        tuple(name for name, used in on if used),
    )  # fmt: skip
    if chosen == "hopper":
        library = _lib.load()
        for entry in ("fa3_attn_fp8_fwd", "fa3_prep"):
            if not library.has(entry):
                raise backends.BackendError(
                    f"backend='hopper': {library.path} holds no {entry} ({library.build_info}); "
                    "backends that could: ['reference']"
                )
    return chosen


def _check_preprocessing(q, k, cos, sin, signs, interleaved, position_ids, cu_q, cu_k) -> None:
    """Rules for what turns q and k; the preprocessing checks the shapes of its tables itself."""
    head_dim = q.shape[-1]
    checks.require(
        head_dim in HEAD_DIMS, "q", f"head_dim must be one of {HEAD_DIMS} for FP8", head_dim
    )
    checks.require(
        (cos is None) == (sin is None), "sin", "must be given iff cos is", sin is not None
    )
    if signs is not None:
        checks.require(
            tuple(signs.shape) == (head_dim,), "signs", f"must be ({head_dim},)", tuple(signs.shape)
        )
    if cos is None:
        checks.require(position_ids is None, "position_ids", "needs cos and sin", "a tensor")
        checks.require(not interleaved, "interleaved", "needs cos and sin", interleaved)
        return
    # One table of positions serves q and k: with other lengths it would be a guess which is meant.
    checks.require(
        q.shape[:-2] == k.shape[:-2],
        "k",
        "with cos and sin, q and k must hold the same tokens; for others apply "
        "rope_hadamard_quantize to each and call torch.ops.fa3_train.attn_fp8_fwd",
        f"{tuple(k.shape)} beside q {tuple(q.shape)}",
    )
    if cu_q is not None and cu_q is not cu_k:
        checks.require(
            cu_q.data_ptr() == cu_k.data_ptr(),
            "cu_seqlens_k",
            "must be cu_seqlens_q itself when cos and sin are given",
            "another tensor",
        )


def _resolve(
    q, k, v, cu_q, cu_k, cos, sin, signs, position_ids, max_q, max_k, softmax_scale, causal,
    interleaved, window_size, two_level, gradient, backend, needs_grad,
) -> tuple[AttentionShape, _Call]:  # fmt: skip
    """All rules and choices of a call that do not depend on values in device memory."""
    shape = checks.attention_shape(q, k, v, cu_q, cu_k, max_q, max_k)
    left, right = _tighten(shape, *checks.resolve_window(causal, window_size))
    scale = checks.resolve_scale(softmax_scale, shape.head_dim_qk)
    checks.require(scale > 0, "softmax_scale", "must be positive for FP8", scale)
    checks.require(
        isinstance(two_level, bool), "two_level", "must be True or False", repr(two_level)
    )
    checks.require(
        gradient in GRADIENTS, "gradient", f"must be one of {list(GRADIENTS)}", repr(gradient)
    )
    fp8.check_head_dim(shape)
    _check_preprocessing(q, k, cos, sin, signs, interleaved, position_ids, cu_q, cu_k)
    call = _Call(
        (shape.seqlen_q, shape.seqlen_k), scale, left, right, interleaved, two_level, gradient,
        _choose(backend, q, shape, needs_grad),
    )  # fmt: skip
    return shape, call


class _Known(NamedTuple):
    """What one key of the memory holds: sizes, choices, and the launches of an eager call."""

    shape: AttentionShape
    call: _Call
    eager: fp8_eager.EagerForward | None


_resolved: dict[Key, _Known] = {}


def _resolve_known(*request) -> tuple[_Call, fp8_eager.EagerForward | None]:
    """:func:`_resolve`, remembered as in ops/attention.py: eager calls on plain tensors only."""
    tensors, others = request[:9], request[9:]
    q, k, v, cu_q, cu_k = tensors[:5]
    if torch.compiler.is_compiling() or type(q) not in _PLAIN:
        return _resolve(*request)[1], None
    try:
        # q and k packed alike is a rule about the very tensor, not about its sizes.
        same = cu_q is cu_k or (cu_k is not None and cu_q.data_ptr() == cu_k.data_ptr())
        key = (
            *map(meta, tensors), type(k), type(v), same, others, *map(type, others),
            *map(type, others[5]),
        )  # fmt: skip
        known = _resolved.get(key)
    except (TypeError, AttributeError):  # no tensor, a list: the rules will say
        return _resolve(*request)[1], None
    if known is None:
        shape, call = _resolve(*request)
        eager = None
        if call.backend == "hopper":
            eager = fp8_eager.eager_forward(tensors, shape, call)
        known = remember(_resolved, key, _Known(shape, call, eager))
    else:
        checks.recheck_cu_seqlens(cu_q, cu_k, known.shape)
    return known.call, known.eager


def _forward(q, k, v, cos, sin, signs, position_ids, cu_q, cu_k, call: _Call, eager):
    """out, lse."""
    if eager is not None and fp8_eager.unwatched(q, k, v):
        return eager.run(q, k, v, cos, sin, signs, position_ids, cu_q)
    codes = _quantize(q, k, v, cos, sin, signs, position_ids, cu_q, cu_k, call)
    return _attend(*codes, cu_q, cu_k, call, q.dtype)


def _attention_fp8(
    q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale, causal, cos, sin, signs, interleaved,
    position_ids, window_size, two_level, gradient, return_lse, backend,
):  # fmt: skip
    needs_grad = False
    if isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor):
        q, k, v = _like_autocast(q, k, v)
        needs_grad = torch.is_grad_enabled() and (
            q.requires_grad or k.requires_grad or v.requires_grad
        )
    call, eager = _resolve_known(
        q, k, v, cu_q, cu_k, cos, sin, signs, position_ids, max_q, max_k, softmax_scale, causal,
        interleaved, window_size, two_level, gradient, backend, needs_grad,
    )  # fmt: skip
    if needs_grad:
        other = None if cu_k is cu_q else cu_k
        out, lse = _AttentionFp8.apply(
            q, k, v, cos, sin, signs, position_ids, cu_q, other, call, eager
        )
    else:
        out, lse = _forward(q, k, v, cos, sin, signs, position_ids, cu_q, cu_k, call, eager)
    return (out, lse) if return_lse else out


def flash_attn_fp8_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    signs: Tensor | None = None,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    two_level: bool = True,
    gradient: str = "inputs",
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``flash_attn_func`` with both products in FP8; differentiable in q, k, v and lse.

    Args:
        q: (B, Sq, H, D) bf16 or fp16; k, v: (B, Sk, G, D), H a multiple of G; D one of 64, 96, 128,
            192, 256.
        softmax_scale: positive; default 1 / sqrt(D). causal, window_size: as in flash_attn_func.
        cos, sin: fp32 (positions, R / 2): apply RoPE to q and k first (then Sq must equal Sk).
        signs: (D,) of +-1: multiply q and k by them and transform by Hadamard, which spreads
            outliers and keeps the scores (fa3_train.modules.RopeHadamardQuantize holds a set).
        interleaved: RoPE pairs (2i, 2i + 1) instead of (i, i + R / 2).
        position_ids: int32 (B, Sq); default 0, 1, ...
        two_level: sum P V in FP32 across key blocks. False is up to 5 % faster and loses up to half
            of the result on long contexts whose V has a mean (docs/fp8.md).
        gradient: where the 16-bit backward differentiates: ``inputs`` or ``codes`` (see module).
        backend: ``auto``, ``hopper`` or ``reference`` (an emulation, any device).

    Returns:
        out (B, Sq, H, D) in the dtype of q; with ``return_lse`` also lse, fp32 (B, H, Sq), natural
        log, -inf for a row without keys.

    Raises:
        ArgumentError: a rule broken, with argument, rule and value. BackendError: the backend
        cannot serve this. LibraryNotFound: ``hopper`` without its library.
    """
    return _attention_fp8(
        q, k, v, None, None, None, None, softmax_scale, causal, cos, sin, signs, interleaved,
        position_ids, window_size, two_level, gradient, return_lse, backend,
    )  # fmt: skip


def flash_attn_fp8_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    signs: Tensor | None = None,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    two_level: bool = True,
    gradient: str = "inputs",
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`flash_attn_fp8_func` over sequences packed along the first dimension.

    q (Tq, H, D), k and v (Tk, G, D), cu_seqlens int32 (B + 1) as in ``flash_attn_varlen_func``;
    position_ids int32 (Tq), default 0, 1, ... in each sequence. With cos and sin, q and k must be
    packed alike: pass the same tensor as cu_seqlens_q and cu_seqlens_k. No scale block crosses a
    sequence.

    Returns:
        out (Tq, H, D); with ``return_lse`` also lse, fp32 (H, Tq).
    """
    checks.require(cu_seqlens_q is not None, "cu_seqlens_q", "must be a tensor", None)
    return _attention_fp8(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, cos,
        sin, signs, interleaved, position_ids, window_size, two_level, gradient, return_lse,
        backend,
    )  # fmt: skip
