"""The Hopper kernels as ``torch.ops.fa3_train.*``: registration, allocation, one ctypes call each.

Ops (CUDA implementation and fake; the fake runs the same checks, so tracing refuses what eager
refuses):

    attn_fwd             q, k, v -> out, lse
    attn_bwd             dout, q, k, v, out, lse -> dq, dk, dv, dsink ((0,) without a sink)
    attn_bwd_accumulate  the same, added into given fp32 dq, dk, dv (and dsink): for rings

They have no autograd formula of their own: ``ops.attention`` wraps them in one autograd.Function,
which costs about half of what the ``custom_op`` decorator does per call. They are what a selective
checkpointing policy lists (``torch.ops.fa3_train.attn_fwd.default``) and what profilers show.

The library allocates nothing and never synchronises: torch allocates results and workspace here,
on the current stream, so CUDA graphs capture every op.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fa3_train import _lib, checks
from fa3_train.checks import AttentionShape
from fa3_train.ops.launch import (  # the other ops find some of these here
    Key,
    Plan,
    address,
    call,
    mark_constant,
    meta,
    pointer,
    remember,
    stream_of,
    strided,
)

__all__ = ["call", "mark_constant", "pointer", "stream_of", "strided"]

DTYPE_CODES = {torch.bfloat16: _lib.BF16, torch.float16: _lib.FP16}

_library = torch.library.Library("fa3_train", "FRAGMENT")

_MASK_SCHEMA = (
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, bool causal, "
    "SymInt window_left, SymInt window_right, float softcap"
)
_BWD_INPUTS = (
    "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? sink"
)
_library.define(
    "attn_fwd(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    f"Tensor? sink, {_MASK_SCHEMA}, int options=0) -> (Tensor, Tensor)"
)
_library.define(
    f"attn_bwd({_BWD_INPUTS}, {_MASK_SCHEMA}, bool deterministic, int options=0) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"attn_bwd_accumulate({_BWD_INPUTS}, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, "
    f"Tensor(d!)? dsink, {_MASK_SCHEMA}, bool deterministic, int options=0) -> ()"
)


def check_request(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    sink: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> AttentionShape:
    """All rules of an attention call on the kernels, for implementation and fake alike."""
    shape = checks.attention_shape(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    checks.check_hopper_head_dims(shape.head_dim_qk, shape.head_dim_v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.check_hopper_tensor(name, x)
    checks.check_sink(sink, shape, q.device)
    if sink is not None:
        checks.require(sink.dtype == torch.float32, "sink", "must be torch.float32", sink.dtype)
        checks.require(sink.is_contiguous(), "sink", "must be contiguous", sink.stride())
    return shape


@functools.cache
def device_problem(index: int) -> str | None:
    """Why device ``index`` cannot run the kernels, or None."""
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) == (9, 0):
        return None
    name = torch.cuda.get_device_name(index)
    return f"the kernels need a Hopper GPU (sm_90), {name} is sm_{major}{minor}"


def _require_device(q: Tensor) -> None:
    problem = device_problem(q.device.index)
    if problem:
        raise _lib.Unsupported(f"q: {problem}")


def _fill_common(
    params, shape: AttentionShape, dtype: torch.dtype, softmax_scale: float, causal: bool,
    window_left: int, window_right: int, softcap: float,
) -> None:  # fmt: skip
    params.softmax_scale, params.softcap = softmax_scale, softcap
    params.dtype = DTYPE_CODES[dtype]
    params.batch = shape.batch
    params.seqlen_q, params.seqlen_k = shape.seqlen_q, shape.seqlen_k
    if shape.varlen:
        params.total_q, params.total_k = shape.total_q, shape.total_k
    params.heads_q, params.heads_k = shape.heads_q, shape.heads_k
    params.head_dim_qk, params.head_dim_v = shape.head_dim_qk, shape.head_dim_v
    params.window_left = window_left
    params.window_right = 0 if causal else window_right


@dataclass(frozen=True, slots=True)
class _Known:
    """What one key of the memory holds; no plan where there is nothing to launch."""

    shape: AttentionShape
    plan: Plan | None


_FORWARD_POINTERS = (
    "q.ptr", "k.ptr", "v.ptr", "out.ptr", "lse", "cu_seqlens_q", "cu_seqlens_k", "sink",
)  # fmt: skip
_BACKWARD_POINTERS = (
    "q.ptr", "k.ptr", "v.ptr", "out.ptr", "dout.ptr", "dq.ptr", "dk.ptr", "dv.ptr",
    "dq_accum.ptr", "dk_accum.ptr", "dv_accum.ptr", "lse", "dlse", "cu_seqlens_q", "cu_seqlens_k",
    "sink", "dsink",
)  # fmt: skip
_forwards: dict[Key, _Known] = {}
_backwards: dict[Key, _Known] = {}


def recheck(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    shape: AttentionShape, dtypes: tuple[torch.dtype, ...] = checks.HOPPER_DTYPES,
) -> None:  # fmt: skip
    """The rules that a known key does not settle: addresses, and values where they are read."""
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % checks.ALIGNMENT_BYTES:
        for name, x in (("q", q), ("k", k), ("v", v)):
            checks.check_hopper_tensor(name, x, dtypes)
    checks.recheck_cu_seqlens(cu_seqlens_q, cu_seqlens_k, shape)


def _attn_fwd(
    q, k, v, cu_seqlens_q, cu_seqlens_k, sink, max_seqlen_q, max_seqlen_k,
    softmax_scale, causal, window_left, window_right, softcap, options=0,
):  # fmt: skip
    key = (
        meta(q), meta(k), meta(v), meta(cu_seqlens_q), meta(cu_seqlens_k), meta(sink),
        max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_left, window_right, softcap,
        options,
    )  # fmt: skip
    known = _forwards.get(key)
    if known is None:
        shape = check_request(q, k, v, cu_seqlens_q, cu_seqlens_k, sink, max_seqlen_q, max_seqlen_k)
        _require_device(q)
    else:
        shape = known.shape
        recheck(q, k, v, cu_seqlens_q, cu_seqlens_k, shape)
    out = q.new_empty(shape.out_shape)
    lse = q.new_empty(shape.lse_shape, dtype=torch.float32)
    addresses = (
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr(),
        address(cu_seqlens_q), address(cu_seqlens_k), address(sink),
    )  # fmt: skip
    if known is None:
        plan = None
        if not shape.empty:
            params = _lib.AttnFwdParams(*(strided(x) for x in (q, k, v, out)))
            _fill_common(
                params, shape, q.dtype, softmax_scale, causal, window_left, window_right, softcap
            )
            params.options = options
            plan = Plan("fa3_attn_fwd", params, q.device, _FORWARD_POINTERS, addresses)
        known = remember(_forwards, key, _Known(shape, plan))
    if known.plan is None:
        # Rows that belong to no sequence have no kernel to write them.
        return out.zero_(), lse.fill_(float("-inf"))
    known.plan.launch(*addresses)
    return out, lse


def _attn_fwd_fake(
    q, k, v, cu_seqlens_q, cu_seqlens_k, sink, max_seqlen_q, max_seqlen_k,
    softmax_scale, causal, window_left, window_right, softcap, options=0,
):  # fmt: skip
    shape = check_request(q, k, v, cu_seqlens_q, cu_seqlens_k, sink, max_seqlen_q, max_seqlen_k)
    return q.new_empty(shape.out_shape), q.new_empty(shape.lse_shape, dtype=torch.float32)


def check_backward(
    shape: AttentionShape, q: Tensor, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None
) -> None:
    """Shapes and dtypes of what the backward gets beside q, k and v."""
    for name, x in (("dout", dout), ("out", out)):
        if tuple(x.shape) != shape.out_shape:
            checks.fail(name, f"must be {shape.out_shape}", tuple(x.shape))
        if x.dtype != q.dtype:
            checks.fail(name, f"dtype must be that of q ({q.dtype})", x.dtype)
    for name, y in (("lse", lse), ("dlse", dlse)):
        if y is None:
            continue
        if tuple(y.shape) != shape.lse_shape:
            checks.fail(name, f"must be {shape.lse_shape}", tuple(y.shape))
        if y.dtype != torch.float32:
            checks.fail(name, "dtype must be torch.float32", y.dtype)


def _kernel_ready(x: Tensor) -> Tensor:
    """``x``, copied only if TMA cannot read it: autograd hands out expanded gradients."""
    aligned = x.data_ptr() % checks.ALIGNMENT_BYTES == 0
    return (
        x
        if aligned and checks.layout_problem(x) is None
        else x.clone(memory_format=torch.contiguous_format)
    )


def _backward_request(
    dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, sink, max_seqlen_q, max_seqlen_k,
    softmax_scale, causal, window_left, window_right, softcap, deterministic, options, accums,
) -> tuple[Key, _Known | None, AttentionShape]:  # fmt: skip
    """The key of a backward, what is known under it, and its sizes after all checks."""
    key = (
        meta(dout), meta(q), meta(k), meta(v), meta(out), meta(lse), meta(dlse),
        meta(cu_seqlens_q), meta(cu_seqlens_k), meta(sink), max_seqlen_q, max_seqlen_k,
        softmax_scale, causal, window_left, window_right, softcap, deterministic, options,
        *map(meta, accums),
    )  # fmt: skip
    known = _backwards.get(key)
    if known is not None:
        recheck(q, k, v, cu_seqlens_q, cu_seqlens_k, known.shape)
        return key, known, known.shape
    shape = check_request(q, k, v, cu_seqlens_q, cu_seqlens_k, sink, max_seqlen_q, max_seqlen_k)
    check_backward(shape, q, dout, out, lse, dlse)
    _require_device(q)
    return key, None, shape


def _launch_backward(
    key, known, shape, dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, sink, dsink,
    grads, accums, softmax_scale, causal, window_left, window_right, softcap, deterministic,
    options,
) -> None:  # fmt: skip
    addresses = (
        *(x.data_ptr() for x in (q, k, v, out, dout)), *(address(x) for x in (*grads, *accums)),
        lse.data_ptr(), address(dlse), address(cu_seqlens_q), address(cu_seqlens_k),
        address(sink), address(dsink),
    )  # fmt: skip
    if known is None:
        null = _lib.Tensor()
        views = [strided(x) for x in (q, k, v, out, dout)]
        views += [null if x is None else strided(x) for x in (*grads, *accums)]
        params = _lib.AttnBwdParams(*views)
        _fill_common(
            params, shape, q.dtype, softmax_scale, causal, window_left, window_right, softcap
        )
        params.deterministic = int(deterministic)
        params.options = options
        plan = Plan("fa3_attn_bwd", params, q.device, _BACKWARD_POINTERS, addresses)
        known = remember(_backwards, key, _Known(shape, plan))
    known.plan.launch(*addresses)


def _attn_bwd(
    dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, sink, max_seqlen_q, max_seqlen_k,
    softmax_scale, causal, window_left, window_right, softcap, deterministic, options=0,
):  # fmt: skip
    dout, out, lse = _kernel_ready(dout), _kernel_ready(out), lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    key, known, shape = _backward_request(
        dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, sink, max_seqlen_q,
        max_seqlen_k, softmax_scale, causal, window_left, window_right, softcap, deterministic,
        options, (),
    )  # fmt: skip
    grads = [x.new_empty(x.shape) for x in (q, k, v)]
    dsink = q.new_empty(0 if sink is None else sink.shape[0], dtype=torch.float32)
    if shape.empty or shape.total_k == 0:
        return (*(g.zero_() for g in grads), _dsink_without_keys(dsink, sink, out, dout, lse, dlse))
    _launch_backward(
        key, known, shape, dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, sink,
        None if sink is None else dsink, grads, (None, None, None),
        softmax_scale, causal, window_left, window_right, softcap, deterministic, options,
    )  # fmt: skip
    return (*grads, dsink)


def _dsink_without_keys(dsink, sink, out, dout, lse, dlse):
    """dsink when no key exists: out is 0 and lse is the sink, so only dlse reaches it."""
    if sink is None or dlse is None or dlse.numel() == 0:
        return dsink.zero_()
    heads = dlse.dim() - 2
    return dlse.sum([d for d in range(dlse.dim()) if d != heads])


def backward_into(
    dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale,
    causal, window_left, window_right, softcap, deterministic, grads,
) -> None:  # fmt: skip
    """attn_bwd whose results go into ``grads``, three given views in the dtype of q."""
    dout, out, lse = _kernel_ready(dout), _kernel_ready(out), lse.contiguous()
    # As part of the key the views stand where fp32 accumulators would: nothing else differs.
    key, known, shape = _backward_request(
        dout, q, k, v, out, lse, None, cu_seqlens_q, cu_seqlens_k, None, max_seqlen_q,
        max_seqlen_k, softmax_scale, causal, window_left, window_right, softcap, deterministic, 0,
        grads,
    )  # fmt: skip
    if shape.empty or shape.total_k == 0:
        for grad in grads:
            grad.zero_()
        return
    if known is None:
        for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
            checks.check_hopper_tensor(name, grad)
    _launch_backward(
        key, known, shape, dout, q, k, v, out, lse, None, cu_seqlens_q, cu_seqlens_k, None, None,
        grads, (None, None, None), softmax_scale, causal, window_left, window_right, softcap,
        deterministic, 0,
    )  # fmt: skip


def _attn_bwd_fake(
    dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, sink, max_seqlen_q, max_seqlen_k,
    softmax_scale, causal, window_left, window_right, softcap, deterministic, options=0,
):  # fmt: skip
    shape = check_request(q, k, v, cu_seqlens_q, cu_seqlens_k, sink, max_seqlen_q, max_seqlen_k)
    check_backward(shape, q, dout, out, lse, dlse)
    grads = [x.new_empty(x.shape) for x in (q, k, v)]
    return (*grads, q.new_empty(0 if sink is None else sink.shape[0], dtype=torch.float32))


def check_accumulators(q, k, v, sink, dq, dk, dv, dsink) -> None:
    """fp32 buffers shaped as what they are the gradients of."""
    pairs = [("dq", dq, q), ("dk", dk, k), ("dv", dv, v)]
    if (dsink is None) != (sink is None):
        checks.fail("dsink", "must be given iff sink is", dsink is not None)
    if sink is not None:
        pairs.append(("dsink", dsink, sink))
    for name, x, like in pairs:
        if x.shape != like.shape:
            checks.fail(name, f"must be {tuple(like.shape)}", tuple(x.shape))
        if x.dtype != torch.float32:
            checks.fail(name, "dtype must be torch.float32", x.dtype)


def _attn_bwd_accumulate(
    dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, sink, dq, dk, dv, dsink,
    max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_left, window_right, softcap,
    deterministic, options=0,
):  # fmt: skip
    dout, out, lse = _kernel_ready(dout), _kernel_ready(out), lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    key, known, shape = _backward_request(
        dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, sink, max_seqlen_q,
        max_seqlen_k, softmax_scale, causal, window_left, window_right, softcap, deterministic,
        options, (dq, dk, dv),
    )  # fmt: skip
    check_accumulators(q, k, v, sink, dq, dk, dv, dsink)
    for name, x in (("dq", dq), ("dk", dk), ("dv", dv)):
        checks.check_hopper_tensor(name, x, (torch.float32,))
    if shape.empty or shape.total_k == 0:
        if dsink is not None:
            dsink += _dsink_without_keys(torch.empty_like(dsink), sink, out, dout, lse, dlse)
        return
    share = None if dsink is None else torch.empty_like(dsink, dtype=torch.float32)
    _launch_backward(
        key, known, shape, dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, sink, share,
        (None, None, None), (dq, dk, dv),
        softmax_scale, causal, window_left, window_right, softcap, deterministic, options,
    )  # fmt: skip
    if dsink is not None:
        dsink += share


def _attn_bwd_accumulate_fake(
    dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, sink, dq, dk, dv, dsink,
    max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_left, window_right, softcap,
    deterministic, options=0,
):  # fmt: skip
    shape = check_request(q, k, v, cu_seqlens_q, cu_seqlens_k, sink, max_seqlen_q, max_seqlen_k)
    check_backward(shape, q, dout, out, lse, dlse)
    check_accumulators(q, k, v, sink, dq, dk, dv, dsink)


for _name, _impl, _fake in (
    ("attn_fwd", _attn_fwd, _attn_fwd_fake),
    ("attn_bwd", _attn_bwd, _attn_bwd_fake),
    ("attn_bwd_accumulate", _attn_bwd_accumulate, _attn_bwd_accumulate_fake),
):
    _library.impl(_name, _impl, "CUDA")
    torch.library.register_fake(f"fa3_train::{_name}", _fake, lib=_library)


_ANY_ADDRESS = 1 << 12


@functools.cache
def backward_problem(
    dtype: torch.dtype,
    head_dim_qk: int,
    head_dim_v: int,
    grouped: bool,
    varlen: bool,
    windowed: bool,
    capped: bool,
    sink: bool,
    deterministic: bool,
) -> str | None:
    """Why the library cannot differentiate such a forward, or None. Asked before the forward runs.

    The library's own workspace query is the judge: it refuses what no backward kernel serves.
    """
    params = _lib.AttnBwdParams()
    params.dtype = DTYPE_CODES[dtype]
    params.batch, params.seqlen_q, params.seqlen_k = 1, 128, 128
    if varlen:
        params.total_q = params.total_k = 128
        # The query reads no memory, but what is packed or has a sink it tells by the pointers.
        params.cu_seqlens_q = params.cu_seqlens_k = _ANY_ADDRESS
    if sink:
        params.sink = params.dsink = _ANY_ADDRESS
    params.heads_q, params.heads_k = (2, 1) if grouped else (1, 1)
    params.head_dim_qk, params.head_dim_v = head_dim_qk, head_dim_v
    params.softmax_scale = 1.0
    params.softcap = 1.0 if capped else 0.0
    params.window_left, params.window_right = (1, 0) if windowed else (-1, -1)
    params.deterministic = int(deterministic)
    try:
        _lib.load().workspace("fa3_attn_bwd", params)
    except _lib.Unsupported as error:
        return str(error)
    return None
