"""``F.scaled_dot_product_attention`` served by these kernels, inside a context manager.

    with sdpa_replacement():
        loss = model(batch)

torch's function takes (B, H, S, D) and aligns causal masks top-left; ours takes (B, S, H, D) and
aligns bottom-right. The two agree where Sq = Sk. With more keys than queries, torch's mask hides
the keys from Sq on from every query, so they are cut off; with more queries than keys, the queries
from Sk on see all keys, in a second call. Fewer or more than four dimensions and leading dimensions
that broadcast are brought into shape. Explicit masks and dropout are refused.

The transposes are views: no copy is made unless something is broadcast.

Code that did ``from torch.nn.functional import scaled_dot_product_attention`` at import keeps its
own reference and is not reached: patch such a module by name with ``modules=``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fa3_train.integrations._layout import readable
from fa3_train.integrations.policy import Policy
from fa3_train.ops import attention

__all__ = ["scaled_dot_product_attention", "sdpa_replacement", "supports"]

_NAME = "scaled_dot_product_attention"
_original = F.scaled_dot_product_attention


def supports(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str | None:
    """Reason why this call is not served, or None. Arguments as torch's function."""
    if attn_mask is not None:
        return f"attn_mask: explicit masks are not served, got shape {tuple(attn_mask.shape)}"
    if dropout_p != 0.0:
        return f"dropout_p: attention dropout is not served, got {dropout_p}"
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.is_nested or x.dim() < 2:
            return f"{name}: must be a strided tensor (..., S, D), got {tuple(x.shape)}"
    try:
        _lead(query, key, value, enable_gqa)
    except (RuntimeError, ValueError) as error:
        shapes = [tuple(x.shape) for x in (query, key, value)]
        return f"key: leading dimensions do not fit those of query, got {shapes} ({error})"
    return None


def _lead(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[torch.Size, tuple[int, int, int]]:
    """(batch dimensions, heads of query, key and value), after broadcasting."""
    tensors = (query, key, value)
    batch = torch.broadcast_shapes(*(x.shape[:-3] for x in tensors))
    heads = tuple(x.shape[-3] if x.dim() > 2 else 1 for x in tensors)
    if not enable_gqa:
        (count,) = torch.broadcast_shapes(*((n,) for n in heads))
        heads = (count, count, count)
    elif heads[1] != heads[2] or heads[1] == 0 or heads[0] % heads[1]:
        raise ValueError("enable_gqa: the key heads must divide the query heads")
    return batch, heads  # type: ignore[return-value]


def _fold(x: Tensor, batch: torch.Size, heads: int) -> Tensor:
    """(..., S, D) to (B, H, S, D); a view unless something is broadcast."""
    shape = (*batch, heads, *x.shape[-2:])
    if x.shape != shape:
        x = x.expand(shape).contiguous()
    return x.reshape(-1, *shape[-3:])


def _serve(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None, backend: str
) -> Tensor:
    """(B, H, S, D), with torch's top-left mask expressed by ours; see the head of this file."""
    q, k, v = readable(*(x.transpose(1, 2) for x in (query, key, value)))
    sq, sk = q.shape[1], k.shape[1]
    if is_causal and sq < sk:
        k, v = k[:, :sq], v[:, :sq]
    if is_causal and sq > sk:
        first, rest = (
            attention.flash_attn_func(rows, k, v, scale, causal, backend=backend)
            for rows, causal in ((q[:, :sk], True), (q[:, sk:], False))
        )
        out = torch.cat([first, rest], 1)
    else:
        out = attention.flash_attn_func(q, k, v, scale, is_causal, backend=backend)
    return out.transpose(1, 2)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    policy: Policy | None = None,
    backend: str = "auto",
) -> Tensor:
    """torch's function on these kernels: (..., H, S, D) in, (..., H, S, Dv) out.

    Raises:
        UnsupportedRequest: what :func:`supports` names, unless ``policy`` says ``warn``.
    """
    arguments = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    reason = supports(*arguments)
    if reason is not None:

        def fallback() -> Tensor:
            return _original(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                enable_gqa=enable_gqa,
            )  # fmt: skip

        return (policy or Policy("sdpa")).refuse(reason, fallback)
    batch, heads = _lead(query, key, value, enable_gqa)
    folded = (_fold(x, batch, n) for x, n in zip((query, key, value), heads, strict=True))
    out = _serve(*folded, is_causal, scale, backend)
    lead = (*batch, heads[0]) if max(x.dim() for x in (query, key, value)) > 2 else ()
    return out.reshape(*lead, *out.shape[-2:])


@contextlib.contextmanager
def sdpa_replacement(
    policy: str = "error", *, backend: str = "auto", modules: tuple[ModuleType, ...] = ()
) -> Iterator[None]:
    """Serve ``F.scaled_dot_product_attention`` by these kernels while the context is open.

    Args:
        policy: ``error`` or ``warn`` for calls that :func:`supports` refuses.
        backend: as in :func:`fa3_train.flash_attn_func`. ``sdpa`` is refused: it would call itself.
        modules: further modules that hold the function under its own name.
    """
    if backend == "sdpa":
        raise ValueError("backend: must not be 'sdpa' here, it calls the function it would replace")
    rule = Policy("sdpa", policy)
    inside = False

    def replacement(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal inside
        if inside:  # a backend that is built on torch's own function
            return _original(*args, **kwargs)
        inside = True
        try:
            return scaled_dot_product_attention(*args, policy=rule, backend=backend, **kwargs)
        finally:
            inside = False

    places: tuple[ModuleType, ...] = (torch.nn.functional, *modules)
    before = [getattr(place, _NAME) for place in places]
    for place in places:
        setattr(place, _NAME, replacement)
    try:
        yield
    finally:
        for place, function in zip(places, before, strict=True):
            setattr(place, _NAME, function)
