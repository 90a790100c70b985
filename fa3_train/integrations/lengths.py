"""Questions about lengths whose answers lie in device memory, asked once per step.

Frameworks hand the same cu_seqlens, mask or positions to every layer. Reading them on the host
costs a synchronisation, so answers are remembered per tensor object and version, weakly: a tensor
that is gone or was written to is asked again.

:func:`unpad_input` and :func:`pad_input` are the helpers that code written for flash_attn imports
beside its functions.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Remembered",
    "cu_from_lengths",
    "equal",
    "index_first_axis",
    "of",
    "pad_input",
    "unpad_input",
    "used",
    "without_unused",
]


class Remembered:
    """``compute(*tensors)``, with the last few answers kept.

    Args:
        compute: a function of tensors.
        size: how many answers to keep.
    """

    def __init__(self, compute: Callable[..., Any], size: int = 4) -> None:
        self._compute, self._size = compute, size
        self._known: list[tuple[tuple[Any, ...], Any]] = []

    def __call__(self, *tensors: Tensor) -> Any:
        if any(x.is_inference() for x in tensors):  # they keep no version
            return self._compute(*tensors)
        for key, answer in self._known:
            if all(ref() is x and version == x._version
                   for (ref, version), x in zip(key, tensors, strict=True)):  # fmt: skip
                return answer
        answer = self._compute(*tensors)
        key = tuple((weakref.ref(x), x._version) for x in tensors)
        self._known = [(key, answer), *self._known[: self._size - 1]]
        return answer


_equal = Remembered(torch.equal)
of = Remembered(torch.diff)  # one tensor for one cu_seqlens, so that questions about it are too


def equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two cu_seqlens are the same numbers; one that is not given agrees with any."""
    return a is None or b is None or a is b or _equal(a, b)


def cu_from_lengths(lengths: Tensor) -> Tensor:
    """(B) lengths to int32 (B + 1) offsets, 0 first."""
    return nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _rows_used(cu_seqlens: Tensor, used: Tensor) -> tuple[Tensor, Tensor] | None:
    lengths = cu_seqlens.diff()
    used = used.to(lengths.dtype)
    if torch.equal(used, lengths):
        return None
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), used.long())
    cu = cu_from_lengths(used)
    within = torch.arange(starts.numel(), device=used.device)
    return starts + within - torch.repeat_interleave(cu[:-1].long(), used.long()), cu


_used = Remembered(_rows_used)


def used(cu_seqlens: Tensor, seqused: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Which rows of a packed tensor count, where sequences are shorter than their room.

    Args:
        cu_seqlens: (B + 1) offsets of the rooms. seqused: (B) tokens of each that count.

    Returns:
        Their rows and their own cu_seqlens; None if all count.
    """
    return None if seqused is None else _used(cu_seqlens, seqused)


def without_unused(
    attend: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, seqused_q: Tensor | None, seqused_k: Tensor | None,
) -> Any:  # fmt: skip
    """``attend(q, k, v, cu_seqlens_q, cu_seqlens_k)`` over the used tokens alone.

    Where all are used, the call itself; otherwise they are copied together, and the results put
    back where they belong among zeros (lse: -inf). ``attend`` returns out (T, H, D), or that and
    lse (H, T).
    """
    used_q, used_k = used(cu_seqlens_q, seqused_q), used(cu_seqlens_k, seqused_k)
    total = q.shape[0]
    if used_q is not None:
        q, cu_seqlens_q = q.index_select(0, used_q[0]), used_q[1]
    if used_k is not None:
        k, v = (x.index_select(0, used_k[0]) for x in (k, v))
        cu_seqlens_k = used_k[1]
    result = attend(q, k, v, cu_seqlens_q, cu_seqlens_k)
    if used_q is None:
        return result
    out, lse = result if isinstance(result, tuple) else (result, None)
    out = out.new_zeros(total, *out.shape[1:]).index_copy(0, used_q[0], out)
    if lse is None:
        return out
    return out, lse.new_full((lse.shape[0], total), -torch.inf).index_copy(1, used_q[0], lse)


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` of (N, ...)."""
    return x.index_select(0, indices)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Drop the padding: the real tokens of all rows, one after the other.

    Args:
        hidden_states: (B, S, ...). attention_mask: (B, S), nonzero for tokens to keep.
        unused_mask: (B, S), tokens to keep as well without counting them as used.

    Returns:
        (total, ...); their positions in the flattened (B S); cu_seqlens int32 (B + 1); the longest
        row; and the used tokens of each row, int32 (B).
    """
    used = attention_mask.bool()
    kept = used if unused_mask is None else used | unused_mask.bool()
    lengths = kept.sum(1)
    indices = kept.flatten().nonzero().flatten()
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    longest = int(lengths.max()) if lengths.numel() else 0
    return rows, indices, cu_from_lengths(lengths), longest, used.sum(1, dtype=torch.int32)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The way back: (total, ...) to (batch, seqlen, ...), zeros where nothing was."""
    full = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return full.index_copy(0, indices, hidden_states).view(batch, seqlen, *full.shape[1:])
