"""Rotary position embedding (Su et al., arXiv 2104.09864): frequencies, tables and plain rotation.

Pair i of a head is turned by the angle position * theta^(-2i/D).  Two layouts of a pair exist:
half-split (x[i], x[i + D/2]), as Llama and Hugging Face use, and interleaved (x[2i], x[2i + 1]),
as in the paper and GPT-J.

Llama-3.1 stretches the context by changing the frequencies (Meta's model card; the same rule as
`rope_type: llama3` of Hugging Face): with w the wavelength 2 pi / f and L the original context,

    f' = f                       where w < L / high_freq_factor
    f' = f / factor              where w > L / low_freq_factor
    f' = (1 - s) f / factor + s f     between, s = (L / w - low) / (high - low)
"""

from __future__ import annotations

import math
from typing import Any

import torch


def rope_frequencies(
    head_dim: int, *, theta: float = 10_000.0, scaling: dict[str, Any] | None = None
) -> torch.Tensor:
    """Angle per position of each pair, FP32 (head_dim // 2,), on the CPU."""
    if head_dim % 2:
        raise ValueError(f"head_dim must be even for RoPE, got {head_dim}")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    factor = scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    share = (context / wavelengths - low) / (high - low)
    between = (1 - share) * frequencies / factor + share * frequencies
    slowed = torch.where(wavelengths > context / low, frequencies / factor, between)
    return torch.where(wavelengths < context / high, frequencies, slowed)


def rope_tables(
    head_dim: int,
    length: int,
    *,
    theta: float = 10_000.0,
    scaling: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every angle, FP32 (length, head_dim // 2) each."""
    frequencies = rope_frequencies(head_dim, theta=theta, scaling=scaling).to(device)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def apply_rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    position_ids: torch.Tensor | None = None,
    interleaved: bool = False,
) -> torch.Tensor:
    """Rotate x (..., T, heads, D) by tables (length, D // 2), in FP32, rounded once.

    `position_ids` (T,) or (..., T) picks the rows; default row t for token t.
    """
    if position_ids is None:
        cos, sin = cos[: x.shape[-3]], sin[: x.shape[-3]]
    else:
        cos, sin = cos[position_ids], sin[position_ids]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    wide = x.float() if x.dtype.itemsize < 4 else x
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = wide.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return joined.to(x.dtype)
