"""``F.scaled_dot_product_attention`` served by these kernels, inside a context manager.

    with sdpa_replacement():
        loss = model(batch)

torch's function takes (B, H, S, D) and aligns causal masks top-left; ours takes (B, S, H, D) and
aligns bottom-right. The two agree where Sq = Sk, so ``is_causal`` with Sq != Sk is refused, as are
explicit masks and dropout. The transposes are views: no copy is made.

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
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        return f"query: must have 4 dimensions (B, H, S, D), got {tuple(query.shape)}"
    if is_causal and query.shape[-2] != key.shape[-2]:
        return (
            "is_causal: torch aligns the mask top-left, these kernels bottom-right; needs as many "
            f"queries as keys, got {query.shape[-2]} and {key.shape[-2]}"
        )
    if not enable_gqa and query.shape[1] != key.shape[1]:
        return f"enable_gqa: must be True for {query.shape[1]} query and {key.shape[1]} key heads"
    if query.shape[0] != key.shape[0] or query.shape[0] != value.shape[0]:
        return "key: broadcasting over the batch is not served"
    return None


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
    """torch's function on these kernels: (B, H, S, D) in, (B, H, S, Dv) out.

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
    out = attention.flash_attn_func(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale, is_causal,
        backend=backend,
    )  # fmt: skip
    return out.transpose(1, 2)


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
