"""From tensors to a launch: strided views, streams, workspace, and the memory of earlier calls.

A training step calls the same few shapes thousands of times, and a short attention takes 100 us on
the GPU: the host must not take longer. So a call's struct is filled, checked and asked for its
workspace once per (shapes, strides, dtypes, options) and kept as a :class:`Plan`; later calls copy
its words and set the pointers. Rules about values that may differ under one key (addresses,
cu_seqlens) are applied on every call by the ops.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from fa3_train import _lib

Key = tuple[Any, ...]
MAX_PLANS = 4096  # packed training makes a new max_seqlen each step: forget all and start over


def mark_constant(function):
    """``torch.compiler.assume_constant_result`` without its import of the compiler (over 1 s)."""
    function._dynamo_marked_constant = True
    return function


def strided(x: Tensor) -> _lib.Tensor:
    """The C view of a dense (B, S, H, D) or packed (T, H, D) tensor.

    torch leaves the stride of a dimension of size 1 arbitrary, TMA wants a multiple of 16 bytes:
    such strides are replaced by those of a contiguous tensor, which address the same elements.
    """
    *outer, tokens, heads, dim = x.shape
    head = x.stride(-2) if heads != 1 else dim
    token = x.stride(-3) if tokens != 1 else heads * head
    batch = 0
    if outer:
        batch = x.stride(0) if outer[0] != 1 else tokens * token
    return _lib.Tensor(x.data_ptr(), batch, token, head)


def pointer(x: Tensor | None) -> int | None:
    """Device address, or NULL."""
    return None if x is None else x.data_ptr()


def address(x: Tensor | None) -> int:
    """Device address, or 0."""
    return 0 if x is None else x.data_ptr()


def stream_of(x: Tensor) -> int:
    """torch's current stream on the device of ``x``, as a cudaStream_t."""
    return torch.cuda.current_stream(x.device).cuda_stream


def on_device(index: int) -> contextlib.AbstractContextManager[Any]:
    """Make device ``index`` current, at no cost where it is."""
    if torch.cuda.current_device() == index:
        return contextlib.nullcontext()
    return torch.cuda.device(index)


def call(name: str, params, device: torch.device) -> None:
    """Run ``name`` once on ``device`` with a workspace as large as the library asks for."""
    library = _lib.load()
    with on_device(device.index):
        size = library.workspace(name, params)
        # Kept by this frame until the launch; the caching allocator orders reuse by stream.
        workspace = torch.empty(size, dtype=torch.uint8, device=device) if size else None
        params.workspace = pointer(workspace)
        params.workspace_bytes = size
        library.call(name, params)


def meta(x: Tensor | None) -> Key | None:
    """What a plan depends on: all of a tensor but its address and contents."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device)


class Plan:
    """One entry point with everything set but pointers.

    Args:
        name: entry point. params: its filled struct.
        pointers: fields that each launch sets, ``"q.ptr"`` for one inside a tensor; stream is
            added, and workspace if the entry point has one.
        first: the addresses of the first launch, where there is a ``<name>_workspace`` query. It
            does not read memory, but asks which pointers are NULL: cu_seqlens and a sink change
            the size. Whether a tensor is given is part of the caller's key, so the size holds.
    """

    def __init__(
        self, name: str, params, device: torch.device, pointers: tuple[str, ...],
        first: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        self._library = _lib.load()
        self._name = name
        self._device = device
        self._bytes = 0
        workspace = first is not None
        self._has_workspace = workspace
        if first is not None:
            for field, value in zip(pointers, first, strict=True):
                *outer, last = field.split(".")
                setattr(functools.reduce(getattr, outer, params), last, value)
            with on_device(device.index):
                self._bytes = self._library.workspace(name, params)
            params.workspace_bytes = self._bytes
        added = ("workspace", "stream") if workspace else ("stream",)
        self._template = _lib.Template(params, (*pointers, *added))

    def launch(self, *pointers: int) -> None:
        """Queue it on torch's current stream of the plan's device."""
        device = self._device
        with on_device(device.index):
            workspace = None
            if self._bytes:
                workspace = torch.empty(self._bytes, dtype=torch.uint8, device=device)
            # The raw stream without building a Stream object.
            stream = torch._C._cuda_getCurrentRawStream(device.index)
            if self._has_workspace:
                words = self._template.fill(*pointers, address(workspace), stream)
            else:
                words = self._template.fill(*pointers, stream)
            self._library.call_words(self._name, words)


def remember(plans: dict[Key, Any], key: Key, plan: Any) -> Any:
    """Store ``plan`` under ``key``, in a memory that cannot grow without bound."""
    if len(plans) >= MAX_PLANS:
        plans.clear()
    plans[key] = plan
    return plan
