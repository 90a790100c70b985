"""The FP8 path in plain PyTorch: rotation, Hadamard, block scales, attention. torch only.

What the kernels compute, with the same blocks and the same roundings, on any device:

    x -> RoPE -> times random signs -> Hadamard / sqrt(n) -> e4m3 codes and one descale per block

and attention on such codes, key block by key block. Everything between the roundings is done in
``dtype`` (fp32 by default; fp64 gives the truth that kernels are held against: codes may differ by
one e4m3 step, and a descale by one of its 4-bit steps, where two results fall on different sides of
a rounding boundary).

Why rotate at all (FlashAttention-3, section 3.3, "incoherent processing"): M = diag(signs) H is
orthogonal, so (Q M)(K M)^T = Q K^T, but M spreads an outlier over the whole row, and e4m3 has only
so much range below a row's largest entry. H is the Sylvester-Hadamard matrix of order D; head dims
96 and 192 take blocks of 32 and 64 on the diagonal.

Scale blocks are ``block_size`` (128) consecutive tokens of one head; they never cross a sequence:

    dense   x (B, S, H, D)   descale (B, H, ceil(S / block))
    packed  x (T, H, D)      descale (H, T // block + B): token t of sequence b has block
                             cu[b] // block + b + (t - cu[b]) // block; unused slots hold 1

descale = largest magnitude / 448, rounded up to 4 significant bits; 1 for an all-zero block; NaN
(and NaN codes) where the block holds a NaN or an infinity, so that a broken tensor surfaces instead
of being saturated away. Why 4 bits: a code has 4 significant bits too, so code * descale has at
most 8 and is exact in bf16; a 16-bit backward then differentiates the very numbers of the forward.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fa3_train.reference import visible

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
SMALLEST_DESCALE = torch.finfo(torch.float32).tiny
HEAD_DIMS = (64, 96, 128, 192, 256)  # what the kernels transform and quantize
_ORDERS = {96: 32, 192: 64}
# The FP8 tensor core of Hopper: products and accumulator aligned to the largest exponent and cut
# after this many binary digits behind its leading one, 32 products at a time.
ACCUMULATOR_BITS = 13
PRODUCTS_PER_STEP = 32
# The column whose product with P is the row sum. Four significant bits: its products are cut as
# those of V are.
ONES_VALUE = 1.875
# Blocks whose V descale is this many octaves below the largest before them: their rounded P does
# not matter to O, but would to the row sum, which takes them unrounded.
SMALL_OCTAVES = 3.0
PROBABILITY_OFFSET = 8.0  # the largest probability becomes 2^8 of the 448 that e4m3 holds


# ---- Hadamard --------------------------------------------------------------------------------


def hadamard_order(head_dim: int) -> int:
    """Order of the transform: ``head_dim``, or that of the diagonal blocks for 96 and 192."""
    order = _ORDERS.get(head_dim, head_dim)
    if order < 2 or order & (order - 1):
        raise ValueError(f"head_dim: must be a power of two, 96 or 192, got {head_dim}")
    return order


def hadamard_matrix(order: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sylvester's matrix over sqrt(order): symmetric, orthogonal, entries +-1 / sqrt(order)."""
    if order < 1 or order & (order - 1):
        raise ValueError(f"order: must be a power of two, got {order}")
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return (h / math.sqrt(order)).to(dtype)


def hadamard_transform(x: Tensor) -> Tensor:
    """x (..., D) times the (block-diagonal) Hadamard matrix of its head dim, by butterflies."""
    head_dim = x.shape[-1]
    order = hadamard_order(head_dim)
    y = x.unflatten(-1, (head_dim // order, order))
    step = 1
    while step < order:
        pairs = y.unflatten(-1, (order // (2 * step), 2, step))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack([a + b, a - b], -2).flatten(-3)
        step *= 2
    scaled: Tensor = y.flatten(-2) * (1.0 / math.sqrt(order))
    return scaled


def random_signs(head_dim: int, seed: int = 0) -> Tensor:
    """(head_dim,) fp32 of +1 and -1, the same on every machine for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randint(0, 2, (head_dim,), generator=generator).float() - 1.0


# ---- RoPE ------------------------------------------------------------------------------------


def packed_positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """Position of each of ``total`` packed tokens in its sequence, int64; 0 past the last one."""
    token = torch.arange(total, device=cu_seqlens.device)
    cu = cu_seqlens.long()
    if cu.shape[0] < 2:
        return torch.zeros_like(token)
    sequence = torch.searchsorted(cu[1:].contiguous(), token, right=True)
    inside = sequence < cu.shape[0] - 1
    return torch.where(inside, token - cu[sequence.clamp(max=cu.shape[0] - 2)], 0)


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
    inverse: bool = False,
) -> Tensor:
    """RoPE in the dtype of ``x`` (fp32 or wider). x (B, S, H, D) or, packed, (T, H, D).

    cos, sin (positions, R / 2): the first R <= D elements turn, in pairs (i, i + R / 2) or,
    interleaved, (2i, 2i + 1). A position outside of the tables gives NaN. ``inverse``: by the
    opposite angle.
    """
    if position_ids is None:
        if cu_seqlens is not None:
            position_ids = packed_positions(cu_seqlens, x.shape[-3])
        else:
            position_ids = torch.arange(x.shape[-3], device=x.device)
    inside = (position_ids >= 0) & (position_ids < cos.shape[0])
    row = position_ids.long().clamp(0, cos.shape[0] - 1)
    c, s = (t.to(x.dtype)[row].masked_fill(~inside[..., None], math.nan) for t in (cos, sin))
    c, s = c.unsqueeze(-2), (-s if inverse else s).unsqueeze(-2)
    turning, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], -1)
    if interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2)
    else:
        a, b = turning.chunk(2, -1)
        turned = torch.cat([a * c - b * s, b * c + a * s], -1)
    return torch.cat([turned, rest], -1)


# ---- block scales ----------------------------------------------------------------------------


def scale_slots(
    x: Tensor, block_size: int = 128, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, int]:
    """Block of each token, int64 (S,) or (T,), and the number of slots. -1: in no sequence."""
    tokens = torch.arange(x.shape[-3], device=x.device)
    if cu_seqlens is None:
        return tokens // block_size, -(-x.shape[-3] // block_size)
    sequences = cu_seqlens.shape[0] - 1
    cu = cu_seqlens.long()
    b = torch.searchsorted(cu[1:].contiguous(), tokens, right=True)
    inside = b < sequences
    start = cu[b.clamp(max=max(sequences - 1, 0))]
    block = start // block_size + b + (tokens - start) // block_size
    return torch.where(inside, block, -1), x.shape[-3] // block_size + sequences


def round_up(x: Tensor, bits: int = 4) -> Tensor:
    """x >= 0 to the next number of at most ``bits`` significant bits; not finite: itself."""
    mantissa, exponent = torch.frexp(x)  # mantissa in [0.5, 1)
    up = torch.ldexp(torch.ceil(mantissa * 2.0**bits) * 2.0**-bits, exponent)
    return torch.where(x.isfinite(), up, x)


def quantize_blocks(
    x: Tensor, block_size: int = 128, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x (B, S, H, D) or packed (T, H, D), wide -> e4m3 codes of that shape, fp32 descale.

    Rows that no sequence owns get zero codes.
    """
    slot, slots = scale_slots(x, block_size, cu_seqlens)
    rows = x.abs().amax(-1).transpose(-1, -2)  # (..., H, tokens)
    rows = torch.where(rows.isfinite(), rows, math.inf)
    amax = rows.new_zeros(*rows.shape[:-1], slots + 1)  # the last one collects ownerless rows
    where = torch.where(slot < 0, slots, slot).expand_as(rows)
    amax = amax.scatter_reduce(-1, where, rows, "amax")
    descale = round_up(amax / E4M3_MAX).clamp(min=SMALLEST_DESCALE)
    descale = torch.where(amax == 0, 1.0, torch.where(amax.isinf(), math.nan, descale))
    per_row = descale.gather(-1, where).transpose(-1, -2).unsqueeze(-1)
    codes = (x / per_row).clamp(-E4M3_MAX, E4M3_MAX)
    codes = torch.where((slot < 0)[:, None, None], 0.0, codes).float().to(E4M3)
    return codes, descale[..., :slots].float().contiguous()


def quantize_with(x: Tensor, descale: Tensor | float) -> Tensor:
    """Codes for a given descale that broadcasts against ``x``: per tensor, per head, ..."""
    return (x / descale).clamp(-E4M3_MAX, E4M3_MAX).float().to(E4M3)


def descale_of_rows(
    descale: Tensor, like: Tensor, block_size: int = 128, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Block descales -> one per row of ``like``: (B, S, H, 1) or (T, H, 1). Ownerless rows: 1."""
    slot, _ = scale_slots(like, block_size, cu_seqlens)
    rows = descale[..., slot.clamp(min=0)]
    return torch.where(slot < 0, 1.0, rows).transpose(-1, -2).unsqueeze(-1)


def dequantize_blocks(
    codes: Tensor,
    descale: Tensor,
    block_size: int = 128,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Codes times their block's descale, in ``dtype``."""
    rows = descale_of_rows(descale, codes, block_size, cu_seqlens)
    return codes.to(dtype) * rows.to(dtype)


# ---- the preprocessing -----------------------------------------------------------------------


def _mixes(cos: Tensor | None, sin: Tensor | None, signs: Tensor | None, on: bool | None) -> bool:
    """Whether the transform is on: asked for, or by default where there are signs."""
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin must be given together")
    return (signs is not None) if on is None else on


def rope_hadamard(
    x: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    signs: Tensor | None = None,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    hadamard: bool | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The stages before quantization, in ``dtype``; differentiable by autograd.

    x (B, S, H, D) or packed (T, H, D). ``hadamard`` defaults to "signs are given".
    """
    mix = _mixes(cos, sin, signs, hadamard)
    y = x.to(dtype)
    if cos is not None and sin is not None:
        y = rotate(
            y, cos, sin, position_ids=position_ids, cu_seqlens=cu_seqlens, interleaved=interleaved
        )
    if mix:
        y = hadamard_transform(y if signs is None else y * signs.to(dtype))
    return y


def rope_hadamard_gradient(
    grad: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    signs: Tensor | None = None,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    hadamard: bool | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Gradient of :func:`rope_hadamard` to its x: the transform is orthogonal, so its inverse."""
    mix = _mixes(cos, sin, signs, hadamard)
    y = grad.to(dtype)
    if mix:
        y = hadamard_transform(y)
        y = y if signs is None else y * signs.to(dtype)
    if cos is not None and sin is not None:
        y = rotate(
            y, cos, sin, position_ids=position_ids, cu_seqlens=cu_seqlens, interleaved=interleaved,
            inverse=True,
        )  # fmt: skip
    return y


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
    hadamard: bool | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The whole preprocessing: codes (e4m3, shape of x) and descale (fp32, see the module)."""
    y = rope_hadamard(
        x, cos, sin, signs, interleaved=interleaved, position_ids=position_ids,
        cu_seqlens=cu_seqlens, hadamard=hadamard, dtype=dtype,
    )  # fmt: skip
    return quantize_blocks(y, block_size, cu_seqlens)


# ---- attention on codes ----------------------------------------------------------------------


def cut(x: Tensor, exponent: Tensor) -> Tensor:
    """x without the binary digits below 2^(exponent - ACCUMULATOR_BITS), towards zero."""
    quantum = torch.exp2(exponent - ACCUMULATOR_BITS)
    return torch.trunc(x / quantum) * quantum


def hopper_matmul(a: Tensor, b: Tensor, start: Tensor | None = None) -> Tensor:
    """start + a (M, K) @ b (K, N) as Hopper's FP8 tensor core adds: 32 products at a time, aligned.

    In each step the accumulator and the products are cut (towards zero) to 13 digits behind
    the leading one of the largest of them, then added exactly. fp64 arithmetic: M * 32 * N numbers.
    """
    a, b = a.double(), b.double()
    total = a.new_zeros(a.shape[0], b.shape[1]) if start is None else start.double()
    for k in range(0, a.shape[1], PRODUCTS_PER_STEP):
        products = a[:, k : k + PRODUCTS_PER_STEP, None] * b[None, k : k + PRODUCTS_PER_STEP]
        top = torch.maximum(products.abs().amax(1), total.abs())
        exponent = torch.floor(torch.log2(top.clamp(min=2.0**-120)))
        total = cut(total, exponent) + cut(products, exponent[:, None]).sum(1)
    return total


def _attend_codes(
    q: Tensor, k: Tensor, v: Tensor, q_descale: Tensor, k_descale: Tensor, v_descale: Tensor,
    mask: Tensor, scale: float, two_level: bool, hopper: bool, block_n: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One sequence, one query head. q (Sq, D), k (Sk, D), v (Sk, E) codes; row descales (S,)."""
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    rows = q.shape[0]
    m = q.new_full((rows,), -math.inf)
    total, out = q.new_zeros(rows), q.new_zeros(rows, v.shape[1])
    top_bias = q.new_tensor(-math.inf)
    for begin in reversed(range(0, k.shape[0], block_n)):
        keys = slice(begin, begin + block_n)
        seen = mask[:, keys]
        if not bool(seen.any()):
            continue
        kt = k[keys].transpose(0, 1)
        dots = hopper_matmul(q, kt).to(dtype) if hopper else q @ kt
        c = scale / math.log(2.0) * q_descale.to(dtype) * k_descale[begin].to(dtype)
        bias = torch.log2(v_descale[begin].to(dtype))
        scores = (dots * c[:, None] + bias).masked_fill(~seen, -math.inf)
        before = m
        m = torch.maximum(m, scores.amax(1))
        shift = torch.where(m.isneginf(), 0.0, m)
        alpha = torch.where(m.isneginf(), 1.0, torch.exp2(before - shift))
        p = torch.exp2(scores - shift[:, None] + PROBABILITY_OFFSET)
        p8 = p.clamp(max=E4M3_MAX).float().to(E4M3).to(dtype)
        small = not bool(bias >= top_bias - SMALL_OCTAVES)
        top_bias = torch.fmax(top_bias, bias)
        if two_level and not small:  # by one more column of V, so rounded and cut as P V is
            ones = p8.new_full((p8.shape[1], 1), ONES_VALUE)
            share = (hopper_matmul(p8, ones).to(dtype) if hopper else p8 @ ones)[:, 0] / ONES_VALUE
        else:
            share = p.sum(1)
        total = total * alpha + share / v_descale[begin].to(dtype)
        out = out * alpha[:, None]
        if not hopper:
            out = out + p8 @ v[keys]
        elif two_level:
            out = out + hopper_matmul(p8, v[keys]).to(dtype)
        else:
            out = hopper_matmul(p8, v[keys], out).to(dtype)
    some = total > 0
    safe = torch.where(some, total, 1.0)
    nothing = torch.where(total.isnan(), math.nan, 0.0)[:, None]
    out = torch.where(some[:, None], out / safe[:, None], nothing)
    lse = (m + torch.log2(safe) - PROBABILITY_OFFSET) * math.log(2.0)
    return out, torch.where(some, lse, torch.where(total.isnan(), math.nan, -math.inf))


def attention_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_descale: Tensor,
    k_descale: Tensor,
    v_descale: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    two_level: bool = True,
    accumulator: str = "exact",
    block_size: int = 128,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Attention on e4m3 codes as the kernel does it: online softmax, key blocks from the end.

    V's descale enters as a bias of the scores (b = log2 of it): p' = 2^(s c + b - m + 8) is p times
    the descale, rounded to e4m3; the row sum takes b back. With two levels it sums the rounded p':
    what the rounding does to the mean of V cancels in out = O / sum, and lse is the log of that
    same sum (within log(1 + 2^-4) of the exact one). With one level it sums p' unrounded.

    Args:
        q, k, v: codes (B, S, H, D), (B, Sk, G, D), (B, Sk, G, E), or packed with cu_seqlens.
        q_descale, k_descale, v_descale: fp32, one per block (see the module).
        accumulator: "exact" adds in ``dtype``; "hopper" as the 14-bit FP8 tensor core, for small
            shapes only. Then ``two_level`` decides whether each block of P V starts from zero.

    Returns:
        out (B, Sq, H, E) or (T, H, E) and lse (B, H, Sq) or (H, T), in ``dtype``.
    """
    if accumulator not in ("exact", "hopper"):
        raise ValueError(f"accumulator: must be 'exact' or 'hopper', got {accumulator!r}")
    scale = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    group = q.shape[-2] // k.shape[-2]
    rows_q = descale_of_rows(q_descale, q, block_size, cu_seqlens_q)[..., 0]
    rows_k = descale_of_rows(k_descale, k, block_size, cu_seqlens_k)[..., 0]
    rows_v = descale_of_rows(v_descale, v, block_size, cu_seqlens_k)[..., 0]
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=dtype, device=q.device)
    lse = torch.full((*q.shape[:-3], q.shape[-2], q.shape[-3]), -math.inf, dtype=dtype).to(q.device)
    places: list[tuple[int | None, slice, slice]]
    if cu_seqlens_q is None or cu_seqlens_k is None:
        places = [(b, slice(0, q.shape[1]), slice(0, k.shape[1])) for b in range(q.shape[0])]
    else:
        a, b = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        places = [(None, slice(a[i], a[i + 1]), slice(b[i], b[i + 1])) for i in range(len(a) - 1)]
    for batch, sq, sk in places:
        mask = visible(sq.stop - sq.start, sk.stop - sk.start, causal, window_size, q.device)
        q_b, k_b, v_b, rows_q_b, rows_k_b, rows_v_b, out_b, lse_b = (
            x if batch is None else x[batch] for x in (q, k, v, rows_q, rows_k, rows_v, out, lse)
        )
        for h in range(q.shape[-2]):
            g = h // group
            out_b[sq, h], lse_b[h, sq] = _attend_codes(
                q_b[sq, h], k_b[sk, g], v_b[sk, g], rows_q_b[sq, h], rows_k_b[sk, g],
                rows_v_b[sk, g], mask, scale, two_level, accumulator == "hopper", block_size, dtype,
            )  # fmt: skip
    return out, lse
