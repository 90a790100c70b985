"""Rotary position embedding (Su et al., arXiv 2104.09864): frequencies, tables and plain rotation.

Pair i of a head is turned by the angle position * theta^(-2i/R), R the number of elements that turn
(the head dim, or less for partial rotation). Two layouts of a pair exist: half-split
(x[i], x[i + R/2]), as Llama and Hugging Face use, and interleaved (x[2i], x[2i + 1]), as in the
paper and GPT-J.

Llama-3.1 stretches the context by changing the frequencies (Meta's model card; the same rule as
``rope_type: llama3`` of Hugging Face): with w the wavelength 2 pi / f and L the original context,

    f' = f                       where w < L / high_freq_factor
    f' = f / factor              where w > L / low_freq_factor
    f' = (1 - s) f / factor + s f     between, s = (L / w - low) / (high - low)

Angles are fp32 products, as in the code those models were trained with: at position 10^5 an angle
is then good to 0.008 only, but it is the angle that the weights know.
"""

from __future__ import annotations

import math
from typing import Any

import torch

_LLAMA3_KEYS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def _check_scaling(scaling: dict[str, Any]) -> None:
    kind = scaling.get("rope_type", scaling.get("type", "llama3"))
    if kind != "llama3":
        raise ValueError(f"scaling: rope_type must be 'llama3', got {kind!r}")
    missing = [key for key in _LLAMA3_KEYS if key not in scaling]
    if missing:
        raise ValueError(f"scaling: must have {list(_LLAMA3_KEYS)}, missing {missing}")
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    if not 0 < low < high:
        raise ValueError(
            f"scaling: must have 0 < low_freq_factor < high_freq_factor, got {low} and {high}"
        )
    for key in ("factor", "original_max_position_embeddings"):
        if scaling[key] <= 0:
            raise ValueError(f"scaling: {key} must be positive, got {scaling[key]}")


def rope_frequencies(
    head_dim: int, *, theta: float = 10_000.0, scaling: dict[str, Any] | None = None
) -> torch.Tensor:
    """Angle per position of each pair, in radians, FP32 (head_dim // 2,), on the CPU.

    Args:
        head_dim: elements that turn: the head dim, or the rotary dim of a partial rotation.
        scaling: None, or the Llama-3.1 parameters under Hugging Face's names.

    Raises:
        ValueError: odd head_dim; theta not positive; scaling of another kind or incomplete.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be even for RoPE, got {head_dim}")
    if not theta > 0:
        raise ValueError(f"theta must be positive, got {theta}")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    _check_scaling(scaling)
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
    """Rotate x (..., T, heads, D) by tables (length, R // 2), in FP32, rounded once.

    R <= D: elements from R on pass. `position_ids` (T,) or (..., T) picks the rows; default row t
    for token t.
    """
    if position_ids is None:
        if cos.shape[0] < x.shape[-3]:
            raise ValueError(
                f"cos: must have a row for each of the {x.shape[-3]} tokens, got {cos.shape[0]}"
            )
        cos, sin = cos[: x.shape[-3]], sin[: x.shape[-3]]
    else:
        cos, sin = cos[position_ids], sin[position_ids]
    rotary_dim = 2 * cos.shape[-1]
    if rotary_dim > x.shape[-1]:
        raise ValueError(f"cos: must have at most {x.shape[-1] // 2} columns, got {cos.shape[-1]}")
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    wide = x.float() if x.dtype.itemsize < 4 else x
    rest = wide[..., rotary_dim:]
    wide = wide[..., :rotary_dim]
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = wide.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    if rest.shape[-1]:
        joined = torch.cat([joined, rest], -1)
    return joined.to(x.dtype)
