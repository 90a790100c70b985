"""RoPE, random-sign Hadamard and block quantization in one pass: autograd and public functions.

What is differentiable:

- :func:`rope` and ``rope_hadamard_quantize(quantize=False)``: exactly, also twice, for the
  gradient is the same op with ``inverse`` flipped;
- ``rope_hadamard_quantize(dequantize=True)``: the 16-bit value of the codes, its gradient passed
  straight through the rounding. For training against quantization outside of the attention op;
- codes and descales themselves: not. ``flash_attn_fp8_func`` is one autograd.Function that
  quantizes inside and brings its own gradient (:func:`gradient`).

Where the library cannot run (no Hopper GPU, other dtypes or head dims) plain PyTorch does the same,
fa3_train.reference_fp8; a named backend that cannot serve is an error.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from fa3_train import _lib, checks, reference_fp8
from fa3_train.checks import fail
from fa3_train.ops import hopper
from fa3_train.ops.backends import BACKENDS, BackendError
from fa3_train.ops.prep import HADAMARD, QUANTIZE, ROPE, check_dequantize, check_prep

_log = logging.getLogger("fa3_train.backend")


# ---- which implementation --------------------------------------------------------------------


def _hopper_problem(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda":
        return f"x: device must be a Hopper GPU, got {device}"
    problem = hopper.device_problem(device.index or 0)
    if problem:
        return f"x: {problem}"
    if dtype not in checks.HOPPER_DTYPES:
        return f"x: dtype must be torch.bfloat16 or torch.float16, got {dtype}"
    if head_dim % checks.HOPPER_HEAD_DIM_MULTIPLE or head_dim > checks.HOPPER_MAX_HEAD_DIM:
        return f"x: head_dim must be a multiple of 8 and at most 256, got {head_dim}"
    if not _lib.available():
        return f"library: {_lib.LIBRARY_NAME} is not built or not found"
    library = _lib.load()
    if not library.has("fa3_prep"):
        return f"library: {library.path} holds no fa3_prep ({library.build_info})"
    return None


@functools.cache
def _choose(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    checks.require(
        backend == "auto" or backend in BACKENDS,
        "backend",
        f"must be 'auto' or one of {list(BACKENDS)}",
        repr(backend),
    )
    if backend in ("sdpa", "reference"):  # torch's attention has no preprocessing of its own
        return "reference"
    problem = _hopper_problem(device, dtype, head_dim)
    if problem is None:
        if backend == "auto":
            _log.info("preprocess backend 'hopper' for %s, %s, D %d", device, dtype, head_dim)
        return "hopper"
    if backend == "hopper":
        if problem.startswith("library:"):
            _lib.load()  # raises LibraryNotFound, which says how to get one
        raise BackendError(f"backend='hopper': {problem}; backends that could: ['reference']")
    level = logging.INFO if device.type != "cuda" else logging.WARNING
    _log.log(level, "preprocess backend 'reference' (plain PyTorch), hopper: %s", problem)
    return "reference"


def _choose_constant(*request) -> str:
    return _choose(*request)


hopper.mark_constant(_choose_constant)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---- autograd --------------------------------------------------------------------------------


class _Transform(torch.autograd.Function):
    """Rotation and transform of up to three tensors; its gradient is itself, inverted."""

    @staticmethod
    def forward(ctx, stages, cos, sin, signs, position_ids, cu_seqlens, interleaved, inverse, *xs):
        ctx.save_for_backward(cos, sin, signs, position_ids, cu_seqlens)
        ctx.request = (stages, interleaved, inverse)
        ctx.set_materialize_grads(False)
        return tuple(
            torch.ops.fa3_train.prep(
                list(xs), stages, cos, sin, signs, position_ids, cu_seqlens, interleaved, inverse
            )
        )

    @staticmethod
    def backward(ctx, *grads):
        cos, sin, signs, position_ids, cu_seqlens = ctx.saved_tensors
        stages, interleaved, inverse = ctx.request
        there = [i for i, g in enumerate(grads) if g is not None]
        result: list[Tensor | None] = [None] * len(grads)
        if there:
            some = [grads[i] for i in there]
            request = ([stages[i] for i in there], cos, sin, signs, position_ids, cu_seqlens)
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                back = _Transform.apply(*request, interleaved, not inverse, *some)
            else:  # no second order asked for; dynamo cannot trace a Function inside a backward
                back = torch.ops.fa3_train.prep(some, *request, interleaved, not inverse)
            for i, g in zip(there, back, strict=True):
                result[i] = g
        return (*(None,) * 8, *result)


class _QuantizeStraightThrough(torch.autograd.Function):
    """x -> the 16-bit value of its codes; the rounding is not seen by the gradient."""

    @staticmethod
    def forward(
        ctx, x, stage, cos, sin, signs, position_ids, cu_seqlens, interleaved, block_size
    ):  # fmt: skip
        ctx.save_for_backward(cos, sin, signs, position_ids, cu_seqlens)
        ctx.request = (stage & ~QUANTIZE, interleaved)
        codes, descale = torch.ops.fa3_train.prep(
            [x], [stage | QUANTIZE], cos, sin, signs, position_ids, cu_seqlens, interleaved, False,
            block_size,
        )  # fmt: skip
        (out,) = torch.ops.fa3_train.dequantize([codes], [descale], cu_seqlens, block_size, x.dtype)
        return out

    @staticmethod
    def backward(ctx, grad):
        cos, sin, signs, position_ids, cu_seqlens = ctx.saved_tensors
        stage, interleaved = ctx.request
        if stage:
            (grad,) = torch.ops.fa3_train.prep(
                [grad], [stage], cos, sin, signs, position_ids, cu_seqlens, interleaved, True
            )
        return (grad, *(None,) * 8)


# ---- public ----------------------------------------------------------------------------------


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotate q and k by the angles of their positions, in one launch; differentiable.

    Args:
        q, k: (B, S, H, D) and (B, S, G, D), or packed (T, H, D), (T, G, D); any strides with a
            contiguous last dimension (views of one QKV product need no copy). D a multiple of 8.
        cos, sin: fp32 (positions, R / 2). The first R <= D elements of a head turn, in pairs
            (i, i + R / 2), or (2i, 2i + 1) with ``interleaved``.
        position_ids: int (T,), (S,) or (B, S); default 0, 1, ... from the start of each sequence
            (of each document with cu_seqlens). A position outside of the tables gives NaN.
        backend: ``auto``, ``hopper`` or ``reference``.

    Returns:
        The rotated q and k, contiguous, in their dtype; computed in fp32 and rounded once.

    Raises:
        ArgumentError: a rule broken, with argument, rule and value. BackendError.

    Su et al., RoFormer (arXiv 2104.09864), equation 34.
    """
    chosen = _choose_constant(backend, q.device, q.dtype, int(q.shape[-1]))
    stages = [ROPE, ROPE]
    if chosen == "hopper":
        return _Transform.apply(
            stages, cos, sin, None, position_ids, cu_seqlens, interleaved, False, q, k
        )
    check_prep([q, k], stages, cos, sin, None, position_ids, cu_seqlens, 128)
    turned = (
        reference_fp8.rope_hadamard(
            x, cos, sin, position_ids=position_ids, cu_seqlens=cu_seqlens, interleaved=interleaved,
            dtype=_wide(x),
        ).to(x.dtype)
        for x in (q, k)
    )  # fmt: skip
    return tuple(turned)  # type: ignore[return-value]


def rope_hadamard_quantize(
    x: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    signs: Tensor | None = None,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    block_size: int = 128,
    quantize: bool = True,
    dequantize: bool = False,
    hadamard: bool | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """RoPE, random signs and Hadamard, block quantization: each stage optional, one pass.

    Args:
        x: (B, S, H, D) or packed (T, H, D), bf16 or fp16; D = 64, 96, 128, 192 or 256.
            The transforms of 96 and 192 are block-diagonal, 3 x 32 and 3 x 64.
        cos, sin: as in :func:`rope`; None: no rotation.
        signs: (D,) of +1 and -1, the same for all heads that meet in a dot product.
        cu_seqlens: int32 (B + 1): x is packed, scale blocks and positions start anew per sequence.
        block_size: tokens per scale, 128 or 64.
        hadamard: default: signs are given. True without signs is the plain transform.
        quantize: False stops before it. dequantize: return the codes' 16-bit value instead.

    Returns:
        (codes e4m3 of the shape of x, descale fp32 (B, H, ceil(S / block)) or, packed,
        (H, T // block + B)); with ``quantize=False`` or ``dequantize`` one tensor like x. Codes and
        descale carry no gradient; ``dequantize`` passes it straight through (see the module).

    Raises:
        ArgumentError: a rule broken, with argument, rule and value. BackendError.

    FlashAttention-3 (arXiv 2407.08608), section 3.3.
    """
    mix = (signs is not None) if hadamard is None else hadamard
    stage = (ROPE if cos is not None or sin is not None else 0) | (HADAMARD if mix else 0)
    signs = signs if mix else None
    stage |= QUANTIZE if quantize else 0
    if dequantize and not quantize:
        fail("dequantize", "needs quantize=True", quantize)
    chosen = _choose_constant(backend, x.device, x.dtype, int(x.shape[-1]))
    where = (cos, sin, signs, position_ids, cu_seqlens, interleaved)
    if chosen == "reference":
        check_prep([x], [stage], cos, sin, signs, position_ids, cu_seqlens, block_size)
        return _by_reference(x, stage, *where, block_size, dequantize)
    if not quantize:
        return _Transform.apply([stage], *where, False, x)[0]
    if dequantize:
        return _QuantizeStraightThrough.apply(x, stage, *where, block_size)
    with torch.no_grad():
        codes, descale = torch.ops.fa3_train.prep([x], [stage], *where, False, block_size)
    return codes, descale


def _by_reference(
    x, stage, cos, sin, signs, position_ids, cu_seqlens, interleaved, block_size, dequantize
):
    wide = reference_fp8.rope_hadamard(
        x, cos if stage & ROPE else None, sin if stage & ROPE else None, signs,
        interleaved=interleaved, position_ids=position_ids, cu_seqlens=cu_seqlens,
        hadamard=bool(stage & HADAMARD), dtype=_wide(x),
    )  # fmt: skip
    if not stage & QUANTIZE:
        return wide.to(x.dtype)
    with torch.no_grad():
        codes, descale = reference_fp8.quantize_blocks(wide, block_size, cu_seqlens)
    if not dequantize:
        return codes, descale
    value = reference_fp8.dequantize_blocks(codes, descale, block_size, cu_seqlens, wide.dtype)
    return (wide + (value - wide).detach()).to(x.dtype)


def gradient(
    grads: Sequence[Tensor],
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    signs: Tensor | None = None,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    hadamard: bool | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """Gradients of the preprocessed tensors -> gradients of what went in, in one launch.

    Inverse Hadamard, signs, rotation by the opposite angle; quantization is straight-through.
    ``grads``: 16-bit, or fp32 (accumulators of a backward) with ``out_dtype`` 16-bit.
    """
    mix = (signs is not None) if hadamard is None else hadamard
    stage = (ROPE if cos is not None or sin is not None else 0) | (HADAMARD if mix else 0)
    signs = signs if mix else None
    dtype = grads[0].dtype if out_dtype is None else out_dtype
    chosen = _choose_constant(backend, grads[0].device, dtype, int(grads[0].shape[-1]))
    if stage == 0:
        return [g.to(dtype) for g in grads]
    stages = [stage] * len(grads)
    where = (cos, sin, signs, position_ids, cu_seqlens)
    if chosen == "hopper":
        return torch.ops.fa3_train.prep(list(grads), stages, *where, interleaved, True, 128, dtype)
    check_prep(grads, stages, *where, 128)
    return [
        reference_fp8.rope_hadamard_gradient(
            g, cos, sin, signs, interleaved=interleaved, position_ids=position_ids,
            cu_seqlens=cu_seqlens, hadamard=mix, dtype=_wide(g),
        ).to(dtype)
        for g in grads
    ]  # fmt: skip


def dequantize(
    codes: Sequence[Tensor],
    descales: Sequence[Tensor],
    *,
    cu_seqlens: Tensor | None = None,
    block_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> list[Tensor]:
    """Codes times their block's descale, in one launch for up to three tensors of one head dim.

    Exact in bf16 for descales of :func:`rope_hadamard_quantize` (4 significant bits each).
    """
    chosen = _choose_constant(backend, codes[0].device, dtype, int(codes[0].shape[-1]))
    if chosen == "hopper":
        return torch.ops.fa3_train.dequantize(
            list(codes), list(descales), cu_seqlens, block_size, dtype
        )
    check_dequantize(codes, descales, cu_seqlens, block_size, dtype)
    return [
        reference_fp8.dequantize_blocks(c, d, block_size, cu_seqlens).to(dtype)
        for c, d in zip(codes, descales, strict=True)
    ]


def preprocess_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    signs: Tensor | None = None,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Self-attention inputs for the FP8 kernel: q8, k8, v8 and their descales, without gradient.

    q and k are rotated, transformed and quantized, v only quantized; one launch when the tensors
    share their head dim. All (B, S, heads, D) or packed (T, heads, D).
    """
    stage = (ROPE if cos is not None or sin is not None else 0) | QUANTIZE
    stage |= HADAMARD if signs is not None else 0
    where = (cos, sin, signs, position_ids, cu_seqlens, interleaved)
    chosen = _choose_constant(backend, q.device, q.dtype, int(q.shape[-1]))
    with torch.no_grad():
        if chosen == "reference":
            check_prep([q, k], [stage] * 2, cos, sin, signs, position_ids, cu_seqlens, 128)
            check_prep([v], [QUANTIZE], None, None, None, None, cu_seqlens, 128)
            results = [_by_reference(x, stage, *where, 128, False) for x in (q, k)]
            results.append(_by_reference(v, QUANTIZE, *where, 128, False))
            (q8, sq), (k8, sk), (v8, sv) = results
            return q8, k8, v8, sq, sk, sv
        prep = torch.ops.fa3_train.prep
        if v.shape[-1] == q.shape[-1]:
            return tuple(prep([q, k, v], [stage, stage, QUANTIZE], *where, False))
        q8, k8, sq, sk = prep([q, k], [stage, stage], *where, False)
        v8, sv = prep([v], [QUANTIZE], None, None, None, None, cu_seqlens, False, False)
        return q8, k8, v8, sq, sk, sv
