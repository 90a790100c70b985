"""``torch.ops.fa3_train.prep`` and ``.dequantize``: rules, registration, one ctypes call each.

    prep        xs, stages -> outs, then the descales of those with QUANTIZE
    dequantize  codes, descales -> 16-bit

Each serves up to three tensors of one head dim in one launch. ``stages`` has a bit mask per tensor:
ROPE, HADAMARD, QUANTIZE. With ``inverse`` prep is the gradient: rotation and transform are
orthogonal, so it is their inverse. Fakes run the same checks: tracing refuses what eager refuses.

As with attention (ops/launch.py), checks and the struct of a call are remembered per layout and
options; a repeated call allocates its results and sets pointers.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fa3_train import _lib, checks, reference_fp8
from fa3_train.checks import fail
from fa3_train.ops import hopper
from fa3_train.ops.launch import Key, Plan, address, meta, remember

ROPE, HADAMARD, QUANTIZE = 1, 2, 4
MAX_TENSORS = 3
BLOCK_SIZES = (64, 128)
E4M3 = torch.float8_e4m3fn

_DTYPE_CODES = {**hopper.DTYPE_CODES, torch.float32: _lib.FP32, E4M3: _lib.E4M3}

hopper._library.define(
    "prep(Tensor[] xs, int[] stages, Tensor? cos, Tensor? sin, Tensor? signs, "
    "Tensor? position_ids, Tensor? cu_seqlens, bool interleaved, bool inverse, "
    "int block_size=128, ScalarType? out_dtype=None, int options=0) -> Tensor[]"
)
hopper._library.define(
    "dequantize(Tensor[] codes, Tensor[] descales, Tensor? cu_seqlens, int block_size, "
    "ScalarType dtype) -> Tensor[]"
)


# ---- rules -----------------------------------------------------------------------------------


def _check_tensors(name: str, xs: Sequence[Tensor], cu_seqlens: Tensor | None) -> None:
    if not 1 <= len(xs) <= MAX_TENSORS:
        fail(name, f"must be 1 to {MAX_TENSORS} tensors", len(xs))
    first = xs[0]
    for i, x in enumerate(xs):
        label = f"{name}[{i}]"
        if x.dim() not in ((3,) if cu_seqlens is not None else (3, 4)):
            layout = "(total, heads, head_dim)" if cu_seqlens is not None else "(.., S, H, D)"
            fail(label, f"must be {layout}", tuple(x.shape))
        if x.dtype != first.dtype:
            fail(label, f"dtype must be that of {name}[0] ({first.dtype})", x.dtype)
        if x.device != first.device:
            fail(label, f"device must be that of {name}[0] ({first.device})", x.device)
        if x.shape[:-2] != first.shape[:-2] or x.shape[-1] != first.shape[-1]:
            expected = f"{tuple(first.shape[:-2])} x heads x {first.shape[-1]}"
            fail(label, f"must be {expected}, as {name}[0]", tuple(x.shape))
    if cu_seqlens is not None:
        checks.check_cu_seqlens("cu_seqlens", cu_seqlens, first.device, first.shape[0], None)


def _check_rotation(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> None:
    if cos is None or sin is None:
        fail("cos" if cos is None else "sin", "cos and sin must be given together", None)
    assert cos is not None and sin is not None
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 2 or table.shape != cos.shape:
            fail(name, "must be (positions, rotary_dim / 2), cos and sin alike", tuple(table.shape))
        if table.dtype != torch.float32:
            fail(name, "dtype must be torch.float32 (16 bits cannot hold an angle)", table.dtype)
        if table.device != x.device:
            fail(name, f"device must be that of the data ({x.device})", table.device)
    if not 1 <= cos.shape[1] <= x.shape[-1] // 2:
        fail("cos", f"must have 1 to {x.shape[-1] // 2} columns (head_dim / 2)", cos.shape[1])


def _check_positions(x: Tensor, position_ids: Tensor | None, cos: Tensor | None) -> None:
    if position_ids is None:
        tokens = x.shape[-3]
        if cos is not None and not isinstance(tokens, torch.SymInt) and cos.shape[0] < tokens:
            fail("cos", f"must have a row for each of the {tokens} tokens", cos.shape[0])
        return
    if position_ids.shape not in (x.shape[:-2], x.shape[-3:-2]):
        fail("position_ids", f"must be {tuple(x.shape[:-2])}", tuple(position_ids.shape))
    if position_ids.dtype not in (torch.int32, torch.int64):
        fail("position_ids", "dtype must be torch.int32 or torch.int64", position_ids.dtype)
    if position_ids.device != x.device:
        fail("position_ids", f"device must be that of the data ({x.device})", position_ids.device)


def _check_signs(x: Tensor, signs: Tensor | None) -> None:
    if signs is None:
        return
    if tuple(signs.shape) != (x.shape[-1],):
        fail("signs", f"must be ({x.shape[-1]},), one +1 or -1 per element", tuple(signs.shape))
    if not signs.dtype.is_floating_point:
        fail("signs", "must have a floating dtype", signs.dtype)
    if signs.device != x.device:
        fail("signs", f"device must be that of the data ({x.device})", signs.device)


def check_prep(xs, stages, cos, sin, signs, position_ids, cu_seqlens, block_size) -> None:
    _check_tensors("xs", xs, cu_seqlens)
    if len(stages) != len(xs):
        fail("stages", f"must have one entry per tensor ({len(xs)})", len(stages))
    for i, stage in enumerate(stages):
        if not 1 <= stage <= ROPE | HADAMARD | QUANTIZE:
            fail(f"stages[{i}]", "must be a mask of ROPE=1, HADAMARD=2, QUANTIZE=4", stage)
        if stage & (HADAMARD | QUANTIZE) and xs[i].shape[-1] not in reference_fp8.HEAD_DIMS:
            rule = f"head_dim must be one of {reference_fp8.HEAD_DIMS} with Hadamard or quantize"
            fail(f"xs[{i}]", rule, xs[i].shape[-1])
    if any(stage & ROPE for stage in stages):
        _check_rotation(xs[0], cos, sin)
        # Packed sequences start at 0: how far they reach is in device memory.
        _check_positions(xs[0], position_ids, None if cu_seqlens is not None else cos)
    _check_signs(xs[0], signs)
    if block_size not in BLOCK_SIZES:
        fail("block_size", f"must be one of {BLOCK_SIZES}", block_size)


def _descale_shape(x: Tensor, block_size: int, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    if cu_seqlens is not None:
        return (x.shape[-2], x.shape[0] // block_size + cu_seqlens.shape[0] - 1)
    return (*x.shape[:-3], x.shape[-2], -(-x.shape[-3] // block_size))


# ---- the ops ---------------------------------------------------------------------------------


Results = list[tuple[tuple[int, ...], torch.dtype]]


def result_layout(xs, stages, cu_seqlens, block_size, out_dtype) -> Results:
    """Shapes and dtypes of what prep returns: outs, then the descales of the quantized."""
    outs: Results = []
    descales: Results = []
    for x, stage in zip(xs, stages, strict=True):
        if stage & QUANTIZE:
            outs.append((tuple(x.shape), E4M3))
            descales.append((_descale_shape(x, block_size, cu_seqlens), torch.float32))
        else:
            outs.append((tuple(x.shape), out_dtype))
    return outs + descales


def _fill_shape(params: _lib.PrepParams, x: Tensor, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        params.batch, params.total = cu_seqlens.shape[0] - 1, x.shape[0]
    else:
        params.batch, params.seqlen = (x.shape[0] if x.dim() == 4 else 1), x.shape[-3]
    params.head_dim = x.shape[-1]


def _kernel_ready(x: Tensor) -> Tensor:
    """``x``, copied only if the kernels cannot read it: 16-byte strides, contiguous last dim."""
    if x.data_ptr() % checks.ALIGNMENT_BYTES == 0 and checks.layout_problem(x) is None:
        return x
    return x.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True, slots=True)
class _Known:
    """What one key of the memory holds; no plan where there is nothing to launch."""

    ready: bool  # the kernels can read such strides, given aligned addresses
    results: Results
    plan: Plan | None


_preps: dict[Key, _Known] = {}
_dequantizations: dict[Key, _Known] = {}


def _recheck(xs: Sequence[Tensor], cu_seqlens: Tensor | None) -> None:
    """The rules that a known key does not settle: entries of cu_seqlens, where they are read."""
    if cu_seqlens is not None:
        checks.check_cu_seqlens("cu_seqlens", cu_seqlens, xs[0].device, xs[0].shape[0], None)


def _misaligned(xs: Sequence[Tensor]) -> bool:
    bits = 0
    for x in xs:
        bits |= x.data_ptr()
    return bits % checks.ALIGNMENT_BYTES != 0


def _tensor_pointers(count: int) -> tuple[str, ...]:
    fields = ("x.ptr", "out.ptr", "descale")
    return tuple(f"tensors.{i}.{field}" for i in range(count) for field in fields)


def make_plan(
    xs, stages, cos, cu_seqlens, interleaved, inverse, block_size, out_dtype, options, results
) -> Plan | None:
    if xs[0].numel() == 0:
        return None
    params = _lib.PrepParams()
    for i, (x, stage) in enumerate(zip(xs, stages, strict=True)):
        out = torch.empty(results[i][0], dtype=results[i][1], device="meta")
        params.tensors[i] = _lib.PrepTensor(
            hopper.strided(x), hopper.strided(out), None, x.shape[-2],
            int(bool(stage & ROPE)), int(bool(stage & HADAMARD)), int(bool(stage & QUANTIZE)),
        )  # fmt: skip
    if any(stage & ROPE for stage in stages):
        params.positions, params.rotary_dim = cos.shape[0], 2 * cos.shape[1]
    params.num_tensors = len(xs)
    _fill_shape(params, xs[0], cu_seqlens)
    params.interleaved, params.inverse = int(interleaved), int(inverse)
    params.in_dtype, params.out_dtype = _DTYPE_CODES[xs[0].dtype], _DTYPE_CODES[out_dtype]
    params.block_size, params.options = block_size, options
    pointers = (*_tensor_pointers(len(xs)), "cos", "sin", "signs", "position_ids", "cu_seqlens")
    return Plan("fa3_prep", params, xs[0].device, pointers)


def _prep(
    xs, stages, cos, sin, signs, position_ids, cu_seqlens, interleaved, inverse, block_size=128,
    out_dtype=None, options=0,
):  # fmt: skip
    key = (
        *stages, *map(meta, xs), meta(cos), meta(sin), meta(signs), meta(position_ids),
        meta(cu_seqlens), interleaved, inverse, block_size, out_dtype, options,
    )  # fmt: skip
    known = _preps.get(key)
    if known is None:
        check_prep(xs, stages, cos, sin, signs, position_ids, cu_seqlens, block_size)
        dtype = xs[0].dtype if out_dtype is None else out_dtype
        ready = all(checks.layout_problem(x) is None for x in xs)
        layout = result_layout(xs, stages, cu_seqlens, block_size, dtype)
        plan = None
        if ready:
            plan = make_plan(
                xs, stages, cos, cu_seqlens, interleaved, inverse, block_size, dtype, options,
                layout,
            )  # fmt: skip
        known = remember(_preps, key, _Known(ready, layout, plan))
    else:
        _recheck(xs, cu_seqlens)
    if not known.ready or _misaligned(xs):
        return _prep(
            [_kernel_ready(x) for x in xs], stages, cos, sin, signs, position_ids, cu_seqlens,
            interleaved, inverse, block_size, out_dtype, options,
        )  # fmt: skip
    results = [xs[0].new_empty(shape, dtype=kind) for shape, kind in known.results]
    if known.plan is None:
        for descale in results[len(xs) :]:
            descale.fill_(1.0)
        return results
    pointers = []
    scales = len(xs)
    for x, out, stage in zip(xs, results, stages, strict=False):
        pointers += [x.data_ptr(), out.data_ptr(), 0]
        if stage & QUANTIZE:
            pointers[-1] = results[scales].data_ptr()
            scales += 1
    used = functools.reduce(operator.or_, stages)
    kept: list[Tensor | None] = [
        None
    ] * 4  # cos, sin, signs, position_ids as the kernels read them, until the launch
    if used & ROPE:
        kept[:2] = cos.contiguous(), sin.contiguous()
        if position_ids is not None:
            kept[3] = kernel_ids(position_ids, xs[0])
    if used & HADAMARD and signs is not None:
        kept[2] = signs.float().contiguous()
    known.plan.launch(*pointers, *map(address, kept), address(cu_seqlens))
    return results


def kernel_ids(position_ids: Tensor, x: Tensor) -> Tensor:
    """int32, one per token: as given, or converted."""
    if position_ids.dtype == torch.int32 and position_ids.shape == x.shape[:-2]:
        return position_ids.contiguous()
    return position_ids.to(torch.int32).expand(x.shape[:-2]).contiguous()


def _prep_fake(
    xs, stages, cos, sin, signs, position_ids, cu_seqlens, interleaved, inverse, block_size=128,
    out_dtype=None, options=0,
):  # fmt: skip
    check_prep(xs, stages, cos, sin, signs, position_ids, cu_seqlens, block_size)
    dtype = xs[0].dtype if out_dtype is None else out_dtype
    layout = result_layout(xs, stages, cu_seqlens, block_size, dtype)
    return [xs[0].new_empty(shape, dtype=kind) for shape, kind in layout]


def check_dequantize(codes, descales, cu_seqlens, block_size, dtype) -> None:
    _check_tensors("codes", codes, cu_seqlens)
    if len(descales) != len(codes):
        fail("descales", f"must be one per tensor ({len(codes)})", len(descales))
    for i, (x, d) in enumerate(zip(codes, descales, strict=True)):
        if x.dtype != E4M3:
            fail(f"codes[{i}]", f"dtype must be {E4M3}", x.dtype)
        shape = _descale_shape(x, block_size, cu_seqlens)
        if tuple(d.shape) != shape:
            fail(f"descales[{i}]", f"must be {shape}", tuple(d.shape))
        if d.dtype != torch.float32:
            fail(f"descales[{i}]", "dtype must be torch.float32", d.dtype)
    if dtype not in checks.HOPPER_DTYPES:
        fail("dtype", f"must be one of {list(checks.HOPPER_DTYPES)}", dtype)
    if block_size not in BLOCK_SIZES:
        fail("block_size", f"must be one of {BLOCK_SIZES}", block_size)


def _plan_dequantize(codes, cu_seqlens, block_size, dtype, results) -> Plan | None:
    if codes[0].numel() == 0:
        return None
    params = _lib.PrepParams()
    for i, x in enumerate(codes):
        out = torch.empty(results[i][0], dtype=dtype, device="meta")
        params.tensors[i] = _lib.PrepTensor(
            hopper.strided(x), hopper.strided(out), None, x.shape[-2], 0, 0, 0
        )
    params.num_tensors = len(codes)
    _fill_shape(params, codes[0], cu_seqlens)
    params.in_dtype, params.out_dtype = _lib.E4M3, _DTYPE_CODES[dtype]
    params.block_size = block_size
    pointers = (*_tensor_pointers(len(codes)), "cu_seqlens")
    return Plan("fa3_prep", params, codes[0].device, pointers)


def _dequantize(codes, descales, cu_seqlens, block_size, dtype):
    key = (*map(meta, codes), *map(meta, descales), meta(cu_seqlens), block_size, dtype)
    known = _dequantizations.get(key)
    if known is None:
        check_dequantize(codes, descales, cu_seqlens, block_size, dtype)
        ready = all(checks.layout_problem(x) is None for x in codes)
        results: Results = [(tuple(x.shape), dtype) for x in codes]
        plan = _plan_dequantize(codes, cu_seqlens, block_size, dtype, results) if ready else None
        known = remember(_dequantizations, key, _Known(ready, results, plan))
    else:
        _recheck(codes, cu_seqlens)
    if not known.ready or _misaligned(codes):
        ready_codes = [_kernel_ready(x) for x in codes]
        return _dequantize(ready_codes, descales, cu_seqlens, block_size, dtype)
    outs = [codes[0].new_empty(shape, dtype=kind) for shape, kind in known.results]
    if known.plan is None:
        return outs
    scales = [d.contiguous() for d in descales]
    pointers = []
    for x, out, scale in zip(codes, outs, scales, strict=True):
        pointers += [x.data_ptr(), out.data_ptr(), scale.data_ptr()]
    known.plan.launch(*pointers, address(cu_seqlens))
    return outs


def _dequantize_fake(codes, descales, cu_seqlens, block_size, dtype):
    check_dequantize(codes, descales, cu_seqlens, block_size, dtype)
    return [x.new_empty(x.shape, dtype=dtype) for x in codes]


for _name, _impl, _fake in (
    ("prep", _prep, _prep_fake),
    ("dequantize", _dequantize, _dequantize_fake),
):
    hopper._library.impl(_name, _impl, "CUDA")
    torch.library.register_fake(f"fa3_train::{_name}", _fake, lib=hopper._library)
