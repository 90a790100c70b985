"""Triton kernel of `ring.merge_into`: two partial attention results become one, in place.

A row is one head of one token. Per element it reads both results once and writes one, where the
PyTorch formula makes five passes over FP32 tensors of the size of the output.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ROWS = 16


@triton.jit
def _merge_kernel(
    out_ptr, lse_ptr, more_ptr, more_lse_ptr, rows, tokens, heads, width,
    out_sb, out_st, out_sh, lse_sb, lse_sh, more_sb, more_st, more_sh, more_lse_sb, more_lse_sh,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    alive = row < rows
    head = row % heads
    token = row // heads % tokens
    batch = row // heads // tokens
    lse_at = batch * lse_sb + head * lse_sh + token
    a = tl.load(lse_ptr + lse_at, mask=alive, other=0.0)
    more_lse_at = batch * more_lse_sb + head * more_lse_sh + token
    b = tl.load(more_lse_ptr + more_lse_at, mask=alive, other=0.0)
    top = tl.maximum(a, b)
    base = tl.where(top == float("-inf"), 0.0, top)  # neither saw a key: weights 0, not NaN
    weight_a, weight_b = tl.exp(a - base), tl.exp(b - base)
    both = weight_a + weight_b
    total = base + tl.log(both)
    scale = tl.where(both > 0.0, 1.0 / both, 0.0)
    column = tl.arange(0, WIDTH)
    inside = alive[:, None] & (column < width)[None, :]
    out_at = (batch * out_sb + token * out_st + head * out_sh)[:, None] + column[None, :]
    more_at = (batch * more_sb + token * more_st + head * more_sh)[:, None] + column[None, :]
    x = tl.load(out_ptr + out_at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(more_ptr + more_at, mask=inside, other=0.0).to(tl.float32)
    x = x * (weight_a * scale)[:, None] + y * (weight_b * scale)[:, None]
    tl.store(out_ptr + out_at, x.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + lse_at, total, mask=alive)


def merge_into(
    out: torch.Tensor, lse: torch.Tensor, more: torch.Tensor, more_lse: torch.Tensor
) -> None:
    """See `fa3_train.integrations.ring.merge_into`."""
    batch, tokens, heads, width = out.shape
    rows = batch * tokens * heads
    if rows:
        _merge_kernel[(triton.cdiv(rows, _ROWS),)](
            out, lse, more, more_lse, rows, tokens, heads, width,
            *out.stride()[:3], *lse.stride()[:2], *more.stride()[:3], *more_lse.stride()[:2],
            ROWS=_ROWS, WIDTH=triton.next_power_of_2(width),
        )  # fmt: skip
