"""Public attention: dense and packed, differentiable in q, k, v, sink and through lse.

One call, start to end: rules (checks.py), backend (backends.py), then for ``hopper`` one
autograd.Function around ``torch.ops.fa3_train.attn_fwd`` and ``attn_bwd`` (hopper.py), which saves
q, k, v, out and lse and recomputes the probabilities (FlashAttention-2, section 3). Without a
gradient to track, the op is called bare.

What the backward cannot serve is refused before the forward runs, not hours later.

Conventions: masks are aligned bottom-right; window_size (left, right) is inclusive and -1 is
unbounded; lse is the natural logarithm, fp32, and counts the sink; a row that sees no key gives
out = 0 and lse = -inf (the sink with one).

Below the public functions are the primitives for context parallelism: :func:`attn_fwd` and
:func:`attn_bwd_accumulate` work on one block of keys, with lse in and out and fp32 gradient buffers
that are added to. :func:`attn_bwd` is the whole backward for code that has its own autograd.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fa3_train import checks, reference
from fa3_train.checks import AttentionShape
from fa3_train.ops import backends, hopper, sdpa
from fa3_train.ops.launch import Key, remember

__all__ = [
    "attn_bwd",
    "attn_bwd_accumulate",
    "attn_fwd",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "resolve_backend",
]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q, k, v, sink, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale, causal, window_left, window_right, softcap, deterministic,
    ):  # fmt: skip
        if cu_seqlens_k is None:  # see _kernels
            cu_seqlens_k = cu_seqlens_q
        out, lse = torch.ops.fa3_train.attn_fwd(
            q, k, v, cu_seqlens_q, cu_seqlens_k, sink, max_seqlen_q, max_seqlen_k,
            softmax_scale, causal, window_left, window_right, softcap,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse, sink, cu_seqlens_q, cu_seqlens_k)
        ctx.mask = (
            max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_left, window_right, softcap,
            deterministic,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, sink, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        dq, dk, dv, dsink = torch.ops.fa3_train.attn_bwd(
            dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, sink, *ctx.mask
        )
        return (dq, dk, dv, None if sink is None else dsink, *(None,) * 10)


def _kernels(
    q, k, v, sink, cu_seqlens_q, cu_seqlens_k, shape, scale, causal, left, right, softcap,
    deterministic, needs_grad,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if sink is not None:
        sink = sink.float().contiguous()
    lengths = (shape.seqlen_q, shape.seqlen_k)
    if needs_grad:
        if cu_seqlens_k is cu_seqlens_q:
            # Self-attention over packed rows. torch.compile refuses one tensor as two arguments of
            # an autograd.Function.
            cu_seqlens_k = None
        return _Attention.apply(
            q, k, v, sink, cu_seqlens_q, cu_seqlens_k, *lengths, scale, causal, left, right,
            softcap, deterministic,
        )  # fmt: skip
    return torch.ops.fa3_train.attn_fwd(
        q, k, v, cu_seqlens_q, cu_seqlens_k, sink, *lengths, scale, causal, left, right, softcap
    )


def _reference_dtype(dtype: torch.dtype) -> torch.dtype:
    """Wide enough for the inputs: fp32 for 16-bit tensors, fp64 for the others."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.float64


def _reference(q, k, v, sink, cu_seqlens_q, cu_seqlens_k, scale, left, right, softcap):
    out, lse = reference.attention(
        q, k, v, softmax_scale=scale, window_size=(left, right), softcap=softcap, sink=sink,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, dtype=_reference_dtype(q.dtype),
    )  # fmt: skip
    return out.to(q.dtype), lse.float()


def _tighten(shape: AttentionShape, left: int, right: int) -> tuple[int, int]:
    """Sides that reach past every key are no sides: the kernels without a window are faster."""
    if left >= 0 and left >= shape.seqlen_k - 1:
        left = -1
    if right >= 0 and right >= shape.seqlen_q - 1:
        right = -1
    return left, right


def _options(
    shape: AttentionShape, left: int, right: int, softcap: float, sink: Tensor | None,
    deterministic: bool, lse: bool, grad: bool,
) -> tuple[str, ...]:  # fmt: skip
    """What a request uses, in the order of ``backends.OPTIONS``. Causal alone is no window."""
    used = (
        lse, softcap != 0.0, sink is not None, left >= 0 or right > 0, deterministic, shape.varlen,
        shape.heads_q != shape.heads_k, grad,
    )  # fmt: skip
    return tuple(name for name, on in zip(backends.OPTIONS, used, strict=True) if on)


def _like_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inside ``torch.autocast`` q, k and v are cast as scaled_dot_product_attention's are."""
    kind = q.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    return q.to(dtype), k.to(dtype), v.to(dtype)


class _Request(NamedTuple):
    """A call after all rules and choices that do not depend on values in device memory."""

    shape: AttentionShape
    left: int
    right: int
    scale: float
    softcap: float
    backend: str


def _resolve(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
    window_size, softcap, sink, deterministic, return_lse, backend, needs_grad,
) -> _Request:  # fmt: skip
    shape = checks.attention_shape(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    left, right = _tighten(shape, *checks.resolve_window(causal, window_size))
    scale = checks.resolve_scale(softmax_scale, shape.head_dim_qk)
    softcap = checks.check_softcap(softcap)
    checks.check_sink(sink, shape, q.device)
    options = _options(shape, left, right, softcap, sink, deterministic, return_lse, needs_grad)
    chosen = backends.choose(
        backend, q.device, q.dtype, shape.head_dim_qk, shape.head_dim_v, options
    )
    return _Request(shape, left, right, scale, softcap, chosen)


_requests: dict[Key, _Request] = {}
_PLAIN = (Tensor, torch.nn.Parameter)


def _known(x: Tensor | None) -> Key | None:
    return None if x is None else (x.shape, x.dtype, x.device, type(x))


def _resolve_known(*request) -> _Request:
    """:func:`_resolve`, remembered: a training step repeats its requests, the rules take longer
    than the launch. Only for eager calls on plain tensors, whose sizes are numbers."""
    q, k, v, cu_seqlens_q, cu_seqlens_k, *rest = request
    if torch.compiler.is_compiling() or type(q) not in _PLAIN:
        return _resolve(*request)
    window_size, sink, others = rest[4], rest[6], (*rest[:6], *rest[7:])
    try:
        key = (
            *map(_known, (q, k, v, cu_seqlens_q, cu_seqlens_k, sink)),
            others,
            *map(type, others),  # a 1 does not pass for True
            *map(type, window_size),
            torch.are_deterministic_algorithms_enabled(),
        )
        known = _requests.get(key)
    except (TypeError, AttributeError):  # no tensor, a list: the rules will say
        return _resolve(*request)
    if known is None:
        return remember(_requests, key, _resolve(*request))
    checks.recheck_cu_seqlens(cu_seqlens_q, cu_seqlens_k, known.shape)
    return known


def _attention(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
    window_size, softcap, sink, deterministic, return_lse, backend,
):  # fmt: skip
    if isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor):
        q, k, v = _like_autocast(q, k, v)
        needs_grad = torch.is_grad_enabled() and (
            q.requires_grad
            or k.requires_grad
            or v.requires_grad
            or (sink is not None and sink.requires_grad)
        )
    else:
        needs_grad = False  # the rules will say what is wrong
    shape, left, right, scale, softcap, chosen = _resolve_known(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
        window_size, softcap, sink, deterministic, return_lse, backend, needs_grad,
    )  # fmt: skip
    if chosen == "hopper":
        out, lse = _kernels(
            q, k, v, sink, cu_seqlens_q, cu_seqlens_k, shape, scale, right == 0, left, right,
            softcap, deterministic, needs_grad,
        )  # fmt: skip
    elif chosen == "sdpa":
        if shape.varlen:
            return sdpa.varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, shape, scale, left, right)
        return sdpa.dense(q, k, v, scale, left, right)
    else:
        out, lse = _reference(
            q, k, v, sink, cu_seqlens_q, cu_seqlens_k, scale, left, right, softcap
        )
    return (out, lse) if return_lse else out


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sink: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over dense batches; differentiable in q, k, v, sink and, if returned, lse.

    Args:
        q: (B, Sq, H, D). k: (B, Sk, G, D), H a multiple of G. v: (B, Sk, G, E). Any strides with a
            contiguous last dimension; ``hopper`` needs 16-byte aligned addresses and strides.
        softmax_scale: multiplies q k^T; default 1 / sqrt(D).
        causal: query i sees keys j <= i + Sk - Sq. window_size: (left, right) keys beside that
            diagonal, inclusive, -1 unbounded.
        softcap: c > 0 turns scaled scores s into c tanh(s / c), before the mask.
        sink: (H), one learnable logit per head in the denominator, in units of scaled scores.
        deterministic: dq bitwise repeatable (out, dk and dv always are).
        return_lse: also return the log-sum-exp of each row.
        backend: ``auto``, ``hopper``, ``sdpa`` or ``reference``; see fa3_train.ops.backends.

    Returns:
        out (B, Sq, H, E) in the dtype of q; with ``return_lse`` also lse, fp32 (B, H, Sq).

    Raises:
        ArgumentError: a rule broken, with argument, rule and value. BackendError: the backend
        cannot serve this. LibraryNotFound: ``hopper`` without its library.

    FlashAttention-3 (arXiv 2407.08608), algorithms 1 and 2; backward as FlashAttention-2, alg. 2.
    """
    return _attention(
        q, k, v, None, None, None, None, softmax_scale, causal, window_size, softcap, sink,
        deterministic, return_lse, backend,
    )  # fmt: skip


def flash_attn_varlen_func(
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
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sink: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over sequences packed along the first dimension; none sees another.

    Args:
        q: (Tq, H, D). k: (Tk, G, D). v: (Tk, G, E).
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1), on the device of q: sequence b is rows
            cu[b] to cu[b + 1]. Empty sequences are fine. Rows from cu[B] on belong to no sequence:
            they are never read into another row's result; their own rows of out, lse and the
            gradients are undefined with ``hopper``, so let the last sequence cover any padding.
        max_seqlen_q, max_seqlen_k: Python ints, at least the longest sequence. Too small a value
            is caught where cu_seqlens can be read without a synchronisation (CPU), or with
            FA3_TRAIN_CHECK_CU_SEQLENS=1.

    The other arguments, the errors and the source are those of :func:`flash_attn_func`; masks align
    at the end of each sequence.

    Returns:
        out (Tq, H, E) in the dtype of q; with ``return_lse`` also lse, fp32 (H, Tq).
    """
    checks.require(cu_seqlens_q is not None, "cu_seqlens_q", "must be a tensor", None)
    return _attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
        window_size, softcap, sink, deterministic, return_lse, backend,
    )  # fmt: skip


def resolve_backend(
    backend: str,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim_qk: int,
    head_dim_v: int | None = None,
    *,
    options: tuple[str, ...] = (),
) -> str:
    """The backend that :func:`flash_attn_func` would use: ``hopper``, ``sdpa`` or ``reference``.

    ``options`` names what the calls will use, from ``fa3_train.ops.backends.OPTIONS`` (for example
    ``("varlen", "grad")``). Raises what the call itself would raise.
    """
    for name in options:
        checks.require(
            name in backends.OPTIONS, "options", f"must be from {backends.OPTIONS}", repr(name)
        )
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    ordered = tuple(name for name in backends.OPTIONS if name in options)
    return backends.choose(backend, device, dtype, head_dim_qk, head_dim_v, ordered)


@torch.no_grad()
def attn_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sink: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(out, lse) of one block of keys, outside autograd: the forward step of a ring.

    Blocks combine as out = sum_i exp(lse_i - lse) out_i with lse = logsumexp_i lse_i. Give the sink
    to one block only. Arguments and errors as :func:`flash_attn_func`.
    """
    return _attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
        window_size, softcap, sink, False, True, backend,
    )  # fmt: skip


@torch.no_grad()
def attn_bwd_accumulate(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    dlse: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sink: Tensor | None = None,
    dsink: Tensor | None = None,
    deterministic: bool = False,
    backend: str = "auto",
) -> None:
    """Add this block's share of the gradients to fp32 ``dq``, ``dk``, ``dv`` (and ``dsink``).

    Args:
        dout, out: (B, Sq, H, E) or (Tq, H, E); lse, dlse: (B, H, Sq) or (H, Tq) fp32. In a ring
            these belong to the combined result, while k and v are one block.
        dq, dk, dv: fp32, shaped as q, k, v; added to. dsink: fp32 (H), given iff sink is.

    The other arguments and errors are those of :func:`flash_attn_func`. ``sdpa`` cannot serve this.
    """
    shape = checks.attention_shape(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    left, right = _tighten(shape, *checks.resolve_window(causal, window_size))
    scale = checks.resolve_scale(softmax_scale, shape.head_dim_qk)
    softcap = checks.check_softcap(softcap)
    checks.check_sink(sink, shape, q.device)
    hopper.check_backward(shape, q, dout, out, lse, dlse)
    hopper.check_accumulators(q, k, v, sink, dq, dk, dv, dsink)
    options = _options(shape, left, right, softcap, sink, deterministic, True, True)
    chosen = backends.choose(
        backend, q.device, q.dtype, shape.head_dim_qk, shape.head_dim_v, options
    )
    if chosen == "hopper":
        torch.ops.fa3_train.attn_bwd_accumulate(
            dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k,
            None if sink is None else sink.float().contiguous(), dq, dk, dv, dsink,
            shape.seqlen_q, shape.seqlen_k, scale, right == 0, left, right, softcap, deterministic,
        )  # fmt: skip
        return
    grads = reference.attention_backward(
        dout, q, k, v, out, lse, dlse=dlse, softmax_scale=scale, window_size=(left, right),
        softcap=softcap, sink=sink, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        dtype=_reference_dtype(q.dtype),
    )  # fmt: skip
    for total, share in zip((dq, dk, dv, dsink), grads, strict=True):
        if total is not None and share is not None:
            total += share.to(total.dtype)


@torch.no_grad()
def attn_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the dtypes of q, k, v of a forward by :func:`attn_fwd` over all its keys.

    For frameworks that keep their own autograd. Arguments and errors as
    :func:`attn_bwd_accumulate`.
    """
    shape = checks.attention_shape(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    left, right = _tighten(shape, *checks.resolve_window(causal, window_size))
    scale = checks.resolve_scale(softmax_scale, shape.head_dim_qk)
    softcap = checks.check_softcap(softcap)
    hopper.check_backward(shape, q, dout, out, lse, None)
    options = _options(shape, left, right, softcap, None, deterministic, True, True)
    chosen = backends.choose(
        backend, q.device, q.dtype, shape.head_dim_qk, shape.head_dim_v, options
    )
    if chosen == "hopper":
        dq, dk, dv, _ = torch.ops.fa3_train.attn_bwd(
            dout, q, k, v, out, lse, None, cu_seqlens_q, cu_seqlens_k, None, shape.seqlen_q,
            shape.seqlen_k, scale, right == 0, left, right, softcap, deterministic,
        )  # fmt: skip
        return dq, dk, dv
    dq, dk, dv, _ = reference.attention_backward(
        dout, q, k, v, out, lse, softmax_scale=scale, window_size=(left, right), softcap=softcap,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, dtype=_reference_dtype(q.dtype),
    )  # fmt: skip
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
