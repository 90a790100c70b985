"""Triton kernels of `mlp`: silu(gate) * up and its gradient, each one pass over memory.

Per element the forward moves 3 numbers and the backward 5 (gate, up and the incoming gradient in,
two gradients out, into one tensor that the GEMM's backward takes as it is); the PyTorch formula
moves 5 and 13, the concatenation of the two gradients included, and keeps silu(gate) as well.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 2048
_WARPS = 8


@triton.jit
def _swiglu_kernel(x_ptr, out_ptr, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(x_ptr + row * stride + at, mask=inside).to(tl.float32)
    up = tl.load(x_ptr + row * stride + width + at, mask=inside).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * width + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_gradient_kernel(
    x_ptr, dout_ptr, dx_ptr, stride, dout_stride, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(x_ptr + row * stride + at, mask=inside).to(tl.float32)
    up = tl.load(x_ptr + row * stride + width + at, mask=inside).to(tl.float32)
    dout = tl.load(dout_ptr + row * dout_stride + at, mask=inside).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dgate = dout * up * (sigmoid + silu * (1.0 - sigmoid))
    kind = dx_ptr.dtype.element_ty
    tl.store(dx_ptr + row * 2 * width + at, dgate.to(kind), mask=inside)
    tl.store(dx_ptr + row * 2 * width + width + at, (dout * silu).to(kind), mask=inside)


def _grid(rows: int, width: int) -> tuple[int, int]:
    return rows, triton.cdiv(width, _BLOCK)  # rows first: only this axis goes beyond 65535


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        rows, width = x.shape[0], x.shape[1] // 2
        out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
        if out.numel():
            _swiglu_kernel[_grid(rows, width)](
                x, out, x.stride(0), width, BLOCK=_BLOCK, num_warps=_WARPS
            )
        ctx.save_for_backward(x)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        (x,) = ctx.saved_tensors
        rows, width = x.shape[0], x.shape[1] // 2
        if dout.stride(1) != 1:
            dout = dout.contiguous()
        dx = torch.empty(rows, 2 * width, dtype=x.dtype, device=x.device)
        if dx.numel():
            _swiglu_gradient_kernel[_grid(rows, width)](
                x, dout, dx, x.stride(0), dout.stride(0), width, BLOCK=_BLOCK, num_warps=_WARPS
            )
        return dx


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """x (..., 2 * width) = [gate, up] on CUDA -> silu(gate) * up (..., width), rounded once."""
    flat = x.reshape(-1, x.shape[-1])
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    return _SwiGLU.apply(flat).view(*x.shape[:-1], x.shape[-1] // 2)
