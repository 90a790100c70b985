"""The FP8 forward kernel as ``torch.ops.fa3_train.attn_fp8_fwd``: rules, registration, one call.

The op takes e4m3 q, k, v with one FP32 descale per :data:`SCALE_BLOCK` tokens and head (element
value = code * descale) and returns a 16-bit result and its log-sum-exp:

    dense    q (B, Sq, H, D), k, v (B, Sk, G, D); descale (B, heads, ceil(S / 128))
    varlen   q (Tq, H, D), k, v (Tk, G, D); descale (heads, T // 128 + B): token t of sequence b in
             block cu[b] // 128 + b + (t - cu[b]) // 128, so that no block crosses a sequence

Non-finite input surfaces as NaN in the output: a NaN code, or a descale that is NaN, infinite or
negative, in every row that uses it. ``FA3_TRAIN_CHECK_FP8=1`` finds it earlier, at the price of a
device synchronisation per call: the error names the tensor and the place.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from fa3_train import _lib, checks
from fa3_train.checks import AttentionShape
from fa3_train.ops import hopper
from fa3_train.ops.launch import Key, Plan, address, meta, remember

FP8_DTYPE = torch.float8_e4m3fn
SCALE_BLOCK = 128  # tokens per descale
HEAD_DIM_MULTIPLE = 16  # 16-byte rows
CHECK_VARIABLE = "FA3_TRAIN_CHECK_FP8"

_library = torch.library.Library("fa3_train", "FRAGMENT")
_library.define(
    "attn_fp8_fwd(Tensor q, Tensor k, Tensor v, Tensor q_descale, Tensor k_descale, "
    "Tensor v_descale, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, float softmax_scale, bool causal, SymInt window_left, "
    "SymInt window_right, bool two_level, ScalarType out_dtype, int options=0) "
    "-> (Tensor, Tensor)"
)


def descale_shape(shape: AttentionShape, query: bool) -> tuple[int, ...]:
    """Shape of the descale tensor of q (``query``) or of k and v."""
    heads = shape.heads_q if query else shape.heads_k
    if shape.varlen:
        total = shape.total_q if query else shape.total_k
        return (heads, total // SCALE_BLOCK + shape.batch)
    length = shape.seqlen_q if query else shape.seqlen_k
    return (shape.batch, heads, (length + SCALE_BLOCK - 1) // SCALE_BLOCK)


def check_head_dim(shape: AttentionShape) -> None:
    """Head dims that the FP8 kernels take: a multiple of 16 up to 256, the same for q, k and v."""
    d = shape.head_dim_qk
    if d % HEAD_DIM_MULTIPLE or d > checks.HOPPER_MAX_HEAD_DIM:
        checks.fail(
            "q",
            f"head_dim must be a multiple of {HEAD_DIM_MULTIPLE} and at most "
            f"{checks.HOPPER_MAX_HEAD_DIM} for FP8",
            d,
        )
    if shape.head_dim_v != d:
        checks.fail("v", f"head_dim must be that of q ({d}) for FP8", shape.head_dim_v)


def check_request(
    q: Tensor, k: Tensor, v: Tensor, q_descale: Tensor, k_descale: Tensor, v_descale: Tensor,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int, max_seqlen_k: int,
    out_dtype: torch.dtype,
) -> AttentionShape:  # fmt: skip
    """All rules of the op, for implementation and fake alike."""
    shape = checks.attention_shape(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    check_head_dim(shape)
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.check_hopper_tensor(name, x, (FP8_DTYPE,))
    for name, x in (("q", q_descale), ("k", k_descale), ("v", v_descale)):
        check_descale(f"{name}_descale", x, descale_shape(shape, name == "q"), q.device)
    checks.require(
        out_dtype in checks.HOPPER_DTYPES, "out_dtype", f"must be one of {checks.HOPPER_DTYPES}",
        out_dtype,
    )  # fmt: skip
    return shape


def check_descale(name: str, x: Tensor, expected: tuple[int, ...], device: torch.device) -> None:
    """Shape, dtype, device and contiguity of a descale tensor."""
    if tuple(x.shape) != expected:
        checks.fail(
            name, f"must be {expected}: one per head and {SCALE_BLOCK} tokens", tuple(x.shape)
        )
    if x.dtype != torch.float32:
        checks.fail(name, "dtype must be torch.float32", x.dtype)
    if x.device != device:
        checks.fail(name, f"device must be that of q ({device})", x.device)
    if not x.is_contiguous():
        checks.fail(name, "must be contiguous", f"stride {x.stride()}")


def check_values(name: str, x: Tensor, descale: Tensor, cu_seqlens: Tensor | None) -> None:
    """No NaN code, no descale that is negative or not finite. Synchronises with the device.

    In a packed tensor only the blocks and rows of sequences are looked at: the others may hold
    anything.
    """
    used = torch.ones(descale.shape[-1], dtype=torch.bool)
    rows = x.shape[-3]
    if cu_seqlens is not None:
        used[:] = False
        cu = cu_seqlens.tolist()
        rows = cu[-1]
        for b, (start, end) in enumerate(zip(cu, cu[1:], strict=False)):
            first = start // SCALE_BLOCK + b
            used[first : first + math.ceil((end - start) / SCALE_BLOCK)] = True
    bad = ~(descale.cpu() >= 0) | descale.cpu().isinf()
    bad &= used
    if bad.any():
        at = tuple(int(i) for i in bad.nonzero()[0])
        checks.fail(
            f"{name}_descale", "must be finite and at least 0",
            f"{descale[at].item()} at {at}, {int(bad.sum())} such in all",
        )  # fmt: skip
    codes = x.narrow(-3, 0, rows).view(torch.uint8)
    nan = (codes & 0x7F) == 0x7F
    if nan.any():
        at = tuple(int(i) for i in nan.nonzero()[0])
        checks.fail(name, "must hold no NaN", f"NaN at {at}, {int(nan.sum())} in all")


def checks_values() -> bool:
    """Whether the environment asks for :func:`check_all_values`."""
    return os.environ.get(CHECK_VARIABLE) == "1"


def check_all_values(
    q: Tensor, k: Tensor, v: Tensor, q_descale: Tensor, k_descale: Tensor, v_descale: Tensor,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
) -> None:  # fmt: skip
    """:func:`check_values` of all three, where ``FA3_TRAIN_CHECK_FP8=1`` asks for it."""
    if not checks_values():
        return
    check_values("q", q, q_descale, cu_seqlens_q)
    check_values("k", k, k_descale, cu_seqlens_k)
    check_values("v", v, v_descale, cu_seqlens_k)


_POINTERS = (
    "q.ptr", "k.ptr", "v.ptr", "out.ptr", "q_descale", "k_descale", "v_descale", "lse",
    "cu_seqlens_q", "cu_seqlens_k",
)  # fmt: skip
_forwards: dict[Key, tuple[AttentionShape, Plan | None]] = {}


def make_plan(
    shape, q, k, v, out, softmax_scale, causal, window_left, window_right, two_level, options,
    addresses,
) -> Plan | None:  # fmt: skip
    if shape.empty:
        return None
    params = _lib.AttnFp8FwdParams(*(hopper.strided(x) for x in (q, k, v, out)))
    params.softmax_scale = softmax_scale
    params.out_dtype = hopper.DTYPE_CODES[out.dtype]
    params.batch = shape.batch
    params.seqlen_q, params.seqlen_k = shape.seqlen_q, shape.seqlen_k
    if shape.varlen:
        params.total_q, params.total_k = shape.total_q, shape.total_k
    params.heads_q, params.heads_k = shape.heads_q, shape.heads_k
    params.head_dim_qk, params.head_dim_v = shape.head_dim_qk, shape.head_dim_v
    params.window_left = window_left
    params.window_right = 0 if causal else window_right
    params.two_level = int(two_level)
    params.options = options
    return Plan("fa3_attn_fp8_fwd", params, q.device, _POINTERS, addresses)


def _attn_fp8_fwd(
    q, k, v, q_descale, k_descale, v_descale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, softmax_scale, causal, window_left, window_right, two_level, out_dtype, options=0,
):  # fmt: skip
    key = (
        *map(meta, (q, k, v, q_descale, k_descale, v_descale, cu_seqlens_q, cu_seqlens_k)),
        max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_left, window_right, two_level,
        out_dtype, options,
    )  # fmt: skip
    known = _forwards.get(key)
    if known is None:
        shape = check_request(
            q, k, v, q_descale, k_descale, v_descale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
            max_seqlen_k, out_dtype,
        )  # fmt: skip
        problem = hopper.device_problem(q.device.index)
        if problem:
            raise _lib.Unsupported(f"q: {problem}")
    else:
        shape = known[0]
        hopper.recheck(q, k, v, cu_seqlens_q, cu_seqlens_k, shape, (FP8_DTYPE,))
    check_all_values(q, k, v, q_descale, k_descale, v_descale, cu_seqlens_q, cu_seqlens_k)
    out = q.new_empty(shape.out_shape, dtype=out_dtype)
    lse = q.new_empty(shape.lse_shape, dtype=torch.float32)
    addresses = (
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), q_descale.data_ptr(),
        k_descale.data_ptr(), v_descale.data_ptr(), lse.data_ptr(), address(cu_seqlens_q),
        address(cu_seqlens_k),
    )  # fmt: skip
    if known is None:
        plan = make_plan(
            shape, q, k, v, out, softmax_scale, causal, window_left, window_right, two_level,
            options, addresses,
        )  # fmt: skip
        known = remember(_forwards, key, (shape, plan))
    if known[1] is None:
        return out.zero_(), lse.fill_(float("-inf"))
    known[1].launch(*addresses)
    return out, lse


def _attn_fp8_fwd_fake(
    q, k, v, q_descale, k_descale, v_descale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, softmax_scale, causal, window_left, window_right, two_level, out_dtype, options=0,
):  # fmt: skip
    shape = check_request(
        q, k, v, q_descale, k_descale, v_descale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, out_dtype,
    )  # fmt: skip
    return (
        q.new_empty(shape.out_shape, dtype=out_dtype),
        q.new_empty(shape.lse_shape, dtype=torch.float32),
    )


_library.impl("attn_fp8_fwd", _attn_fp8_fwd, "CUDA")
torch.library.register_fake("fa3_train::attn_fp8_fwd", _attn_fp8_fwd_fake, lib=_library)
