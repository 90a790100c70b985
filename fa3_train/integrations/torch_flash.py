"""These kernels as one of torch's own flash-attention implementations.

    from fa3_train.integrations import torch_flash
    name = torch_flash.register()                      # "fa3_train"; changes nothing yet
    torch.nn.attention.activate_flash_attention_impl(name)
    ...                                                # F.scaled_dot_product_attention, varlen_attn
    torch.nn.attention.restore_flash_attention_impl()

torch (since 2.11) keeps a list of implementations behind its flash backend. Activating one replaces
the kernels of five ``aten`` operators; everything above them stays torch's: the choice between
flash, cuDNN and math, autograd, ``torch.compile``, ``torch.nn.attention.varlen``. So models that
call torch's functions need no change, and only what torch itself would give to FlashAttention comes
here. To be sure that it does, use ``sdpa_kernel(SDPBackend.FLASH_ATTENTION)``.

Not served: dropout, debug masks, ALiBi, paged caches, ``seqused_k``, split-KV. With
``policy="warn"`` such calls go to the kernel that was there before, where torch has
``torch.library.get_kernel`` to find it.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fa3_train.checks import require
from fa3_train.integrations._layout import readable
from fa3_train.integrations.policy import Policy
from fa3_train.ops import attention

__all__ = ["register", "supports"]

NAME = "fa3_train"

_DENSE_FORWARD = "_scaled_dot_product_flash_attention"
_DENSE_BACKWARD = "_scaled_dot_product_flash_attention_backward"
_FORWARD = "_flash_attention_forward"
_FORWARD_INTO = "_flash_attention_forward_no_dropout_inplace"
_BACKWARD = "_flash_attention_backward"


def supports(
    *,
    dropout_p: float = 0.0,
    return_debug_mask: bool = False,
    num_splits: int | None = None,
    **tensors: Any,
) -> str | None:
    """Reason why a call of torch's flash operators with these arguments is not served, or None.

    Args:
        tensors: any of ``seqused_k``, ``alibi_slopes``, ``block_table`` and what later versions
            add; each must be None.
    """
    if dropout_p != 0.0:
        return f"dropout_p: attention dropout is not served, got {dropout_p}"
    if return_debug_mask:
        return "return_debug_mask: the attention matrix is never formed"
    if num_splits not in (None, 0, 1):
        return f"num_splits: split-KV is not served, must be None, 0 or 1, got {num_splits}"
    for name, value in tensors.items():
        if value is not None:
            return f"{name}: not served"
    return None


def _sides(left: int | None, right: int | None, causal: bool) -> tuple[int, int]:
    left, right = (-1 if side is None else int(side) for side in (left, right))
    return left, 0 if causal else right


def _placed(x: Tensor, like: Tensor) -> Tensor:
    """``x`` with the memory layout that torch's shape functions promise, that of ``like``."""
    if x.shape != like.shape:
        return x
    place = torch.empty_like(like, dtype=x.dtype)
    return x if x.stride() == place.stride() else place.copy_(x)


class _Kernels:
    """The five operators. (B, S, H, D) or packed (T, H, D); the two named scaled_dot_product have
    (B, H, S, D)."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def _attend(self, q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, left, right):
        packed = {} if cu_q is None else {
            "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_q if cu_k is None else cu_k,
            "max_seqlen_q": int(max_q), "max_seqlen_k": int(max_k),
        }  # fmt: skip
        return attention.attn_fwd(
            *readable(q, k, v), scale, causal, window_size=_sides(left, right, causal),
            backend=self.backend, **packed,
        )  # fmt: skip

    @staticmethod
    def _aside(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(rng_state, unused, debug mask): nothing random happens here."""
        return (
            torch.zeros(2, dtype=torch.uint64, device=q.device),
            torch.zeros((), dtype=torch.uint64, device=q.device),
            q.new_empty(0),
        )

    def forward(
        self, q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
        scale=None, window_size_left=None, window_size_right=None, **others,
    ):  # fmt: skip
        out, lse = self._attend(
            q, k, v, cu_q, cu_k, max_q, max_k, scale, is_causal, window_size_left,
            window_size_right,
        )  # fmt: skip
        return _placed(out, q), lse, *self._aside(q)

    def forward_into(
        self, out, q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
        scale=None, window_size_left=None, window_size_right=None, **others,
    ):  # fmt: skip
        result, lse = self._attend(
            q, k, v, cu_q, cu_k, max_q, max_k, scale, is_causal, window_size_left,
            window_size_right,
        )  # fmt: skip
        out.copy_(result)
        return lse

    def backward(
        self, dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, rng_state,
        unused, *, scale=None, window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        if cu_q is not None and cu_q.numel() == 0:  # how autograd hands on what was not given
            cu_q = cu_k = None
        if cu_q is None:
            cu_k = max_q = max_k = None
        grads = attention.attn_bwd(
            dout, *readable(q, k, v), out, lse, scale, is_causal,
            window_size=_sides(window_size_left, window_size_right, is_causal), cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_q if cu_k is None else cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k,
            deterministic=torch.are_deterministic_algorithms_enabled(), backend=self.backend,
        )  # fmt: skip
        return tuple(_placed(g, x) for g, x in zip(grads, (q, k, v), strict=True))

    def dense_forward(
        self, q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None
    ):
        sq, sk = q.shape[2], k.shape[2]
        out, lse = self._attend(
            *(x.transpose(1, 2) for x in (q, k, v)), None, None, sq, sk, scale, is_causal, None,
            None,
        )  # fmt: skip
        rng, unused, mask = self._aside(q)
        return _placed(out.transpose(1, 2), q), lse, None, None, sq, sk, rng, unused, mask

    def dense_backward(
        self, dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, is_causal,
        philox_seed, philox_offset, *, scale=None,
    ):  # fmt: skip
        grads = attention.attn_bwd(
            *readable(*(x.transpose(1, 2) for x in (dout, q, k, v, out))), lse, scale, is_causal,
            deterministic=torch.are_deterministic_algorithms_enabled(), backend=self.backend,
        )  # fmt: skip
        return tuple(_placed(g.transpose(1, 2), x) for g, x in zip(grads, (q, k, v), strict=True))


# Operator: our method, and the names and places of the arguments that supports() is asked about.
_OPERATORS: dict[str, tuple[str, dict[str, int]]] = {
    _FORWARD: ("forward", {"dropout_p": 7, "return_debug_mask": 9}),
    _FORWARD_INTO: ("forward_into", {"dropout_p": 8, "return_debug_mask": 10}),
    _DENSE_FORWARD: ("dense_forward", {"dropout_p": 3, "return_debug_mask": 5}),
    _BACKWARD: ("backward", {"dropout_p": 10}),
    _DENSE_BACKWARD: ("dense_backward", {"dropout_p": 10}),
}
_inside: contextvars.ContextVar[bool] = contextvars.ContextVar("inside", default=False)
_KNOWN_KEYWORDS = ("scale", "window_size_left", "window_size_right")


class _Handle:
    """What torch keeps while the implementation is active."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def remove(self) -> None:
        if self._library is not None:
            self._library._destroy()
            self._library = None


def _original(operator: str, key: str) -> Callable[..., Any] | None:
    """torch's kernel of ``operator``, to be called with the dispatch keys first; None if there is
    no way to find it, or none."""
    find = getattr(torch.library, "get_kernel", None)
    if find is None:
        return None
    try:
        return find(f"aten::{operator}", key).call_boxed
    except RuntimeError:
        return None


def _guarded(operator: str, kernels: _Kernels, policy: Policy, key: str) -> Callable[..., Any]:
    method, places = _OPERATORS[operator]
    run = getattr(kernels, method)
    original = _original(operator, key) if policy.mode == "warn" else None

    @functools.wraps(run)
    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        asked = {name: args[i] for name, i in places.items() if i < len(args)}
        asked.update({n: value for n, value in kwargs.items() if n not in _KNOWN_KEYWORDS})
        reason = supports(**asked)
        if reason is None:
            return run(*args, **kwargs)
        if original is None:
            return policy.refuse(reason)
        if _inside.get():  # torch's kernel of one operator calls another: one fallback, not two
            return original(keys, *args, **kwargs)
        token = _inside.set(True)
        try:
            return policy.refuse(reason, lambda: original(keys, *args, **kwargs))
        finally:
            _inside.reset(token)

    return kernel


def _activate(policy: Policy, backend: str, key: str) -> _Handle:
    library = torch.library.Library("aten", "IMPL")
    kernels = _Kernels(backend)
    for operator in _OPERATORS:
        if hasattr(torch.ops.aten, operator):  # the operator that writes into `out` came later
            library.impl(operator, _guarded(operator, kernels, policy, key), key, with_keyset=True)
    return _Handle(library)


def register(
    name: str = NAME, *, policy: str = "error", backend: str = "auto", dispatch_key: str = "CUDA"
) -> str:
    """Add these kernels to torch's list of flash-attention implementations; returns the name.

    Nothing changes before ``torch.nn.attention.activate_flash_attention_impl(name)``.

    Args:
        policy: ``error``, or ``warn`` (torch's kernel runs and the call is counted).
        backend: as in :func:`fa3_train.flash_attn_func`; not ``sdpa``, which would come back here.
        dispatch_key: ``CPU`` makes torch's flash operators, which exist for CUDA alone, work on
            CPU tensors through ``backend="reference"``: for tests.

    Raises:
        ArgumentError: torch has no such list (before 2.11), or a bad argument.
    """
    require(
        hasattr(torch.nn.attention, "register_flash_attention_impl"),
        "torch", "must have torch.nn.attention.register_flash_attention_impl", torch.__version__,
    )  # fmt: skip
    require(backend != "sdpa", "backend", "must not call torch's attention again", repr(backend))
    rule = Policy("torch_flash", policy)
    torch.nn.attention.register_flash_attention_impl(
        name, register_fn=functools.partial(_activate, rule, backend, dispatch_key)
    )
    return name
