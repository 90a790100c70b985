"""Triton kernels of `norm`: residual add and RMSNorm in one pass, each way.

Forward, per row:   h = x + r;  y = h / sqrt(mean(h^2) + eps) * w        reads x, r; writes h, y
Backward, per row:  n = h * rstd;  g = w * dy
                    dh = dstream + rstd * (g - n * mean(g * n))           reads dy, dstream, h
                    dw += dy * n                                          writes dh

`dstream` is what reaches h past the norm (the residual stream), so the sum of both gradients costs
no pass of its own. h is rounded to its dtype before it is normalised, as if two modules did it.
In the backward each of a fixed number of programs takes rows in turn and has a share of dw in
registers; the shares are summed in FP32 afterwards, always in the same order.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

MAX_DIM = 32_768  # a row is held in registers by one program
_PROGRAMS_PER_SM = 2


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, stream_ptr, out_ptr, rstd_ptr,
    x_stride, residual_stride, dim, eps, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < dim
    x = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + row * residual_stride + at, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(stream_ptr.dtype.element_ty)
        tl.store(stream_ptr + row * dim + at, x, mask=inside)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / dim + eps)
    tl.store(rstd_ptr + row, rstd)
    tl.store(
        out_ptr + row * dim + at, (x * rstd * weight).to(out_ptr.dtype.element_ty), mask=inside
    )


@triton.jit
def _rms_norm_gradient_kernel(
    dout_ptr, dstream_ptr, stream_ptr, weight_ptr, rstd_ptr, dx_ptr, dweight_ptr,
    dout_stride, dstream_stride, stream_stride, rows, dim,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < dim
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    for row_ in range(program, rows, tl.num_programs(0)):
        row = tl.cast(row_, tl.int64)
        dout = tl.load(dout_ptr + row * dout_stride + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(stream_ptr + row * stream_stride + at, mask=inside, other=0.0).to(tl.float32)
        normed = x * tl.load(rstd_ptr + row)
        scaled = dout * weight
        mean = tl.sum(scaled * normed, 0) / dim
        dx = (scaled - normed * mean) * tl.load(rstd_ptr + row)
        if ADD:
            past = tl.load(dstream_ptr + row * dstream_stride + at, mask=inside, other=0.0)
            dx += past.to(tl.float32)
        tl.store(dx_ptr + row * dim + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dweight += dout * normed
    tl.store(dweight_ptr + program * dim + at, dweight, mask=inside)


@functools.cache
def _programs(device: torch.device) -> int:
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return _PROGRAMS_PER_SM * count


def _shape(dim: int) -> tuple[int, int]:
    """Block and warps: 16 elements a thread, up to 16 warps."""
    block = triton.next_power_of_2(dim)
    return block, min(16, max(1, block // 512))


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(.., dim) as rows whose elements are adjacent."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        flat, dim = _rows(x), x.shape[-1]
        more = None if residual is None else _rows(residual)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        stream = x if more is None else torch.empty_like(out)
        rstd = torch.empty(flat.shape[0], dtype=torch.float32, device=x.device)
        if out.numel():
            block, warps = _shape(dim)
            _rms_norm_kernel[(flat.shape[0],)](
                flat, flat if more is None else more, weight, stream, out, rstd, flat.stride(0),
                0 if more is None else more.stride(0), dim, eps, ADD=more is not None,
                BLOCK=block, num_warps=warps,
            )
        ctx.save_for_backward(stream, weight, rstd)
        ctx.adds = more is not None
        ctx.set_materialize_grads(False)
        return out, stream

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dstream):
        stream, weight, rstd = ctx.saved_tensors
        if dout is None:
            return dstream, dstream if ctx.adds else None, None, None
        flat, grad, dim = _rows(stream), _rows(dout), stream.shape[-1]
        past = None if dstream is None else _rows(dstream)
        dx = torch.empty(stream.shape, dtype=stream.dtype, device=stream.device)
        programs = min(_programs(stream.device), max(1, flat.shape[0]))
        shares = torch.empty(programs, dim, dtype=torch.float32, device=stream.device)
        block, warps = _shape(dim)
        _rms_norm_gradient_kernel[(programs,)](
            grad, grad if past is None else past, flat, weight, rstd, dx, shares,
            grad.stride(0), 0 if past is None else past.stride(0), flat.stride(0), flat.shape[0],
            dim, ADD=past is not None, BLOCK=block, num_warps=warps,
        )
        return dx, dx if ctx.adds else None, shares.sum(0).to(weight.dtype), None


def add_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(RMSNorm(x + residual) * weight, x + residual); tensors (.., dim) on CUDA, weight (dim)."""
    return _AddNorm.apply(x, residual, weight, eps)
