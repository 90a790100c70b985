"""Every rule about arguments of the attention ops, once.

The public functions call this module before anything runs, the fakes call it while tracing; so a
request is refused with the same sentence in eager mode and under ``torch.compile``. Messages read
``<argument>: <rule>, got <value>``.

Nothing here synchronises with a device. What lives in device memory is therefore not looked at:
the entries of ``cu_seqlens`` are verified (start at 0, never decrease, end within the tensor, no
sequence longer than ``max_seqlen``) when the tensor is on the CPU, or when the environment variable
``FA3_TRAIN_CHECK_CU_SEQLENS=1`` asks for it at the price of one device synchronisation per call.

Shape letters: B batch, S tokens of a sequence, T tokens of a packed batch, H query heads,
G key/value heads, D head dim of q and k, E head dim of v and out.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

CU_SEQLENS_DEBUG = "FA3_TRAIN_CHECK_CU_SEQLENS"

HOPPER_DTYPES = (torch.bfloat16, torch.float16)
HOPPER_MAX_HEAD_DIM = 256
HOPPER_HEAD_DIM_MULTIPLE = 8
# (head dim of q and k, head dim of v) that may differ: multi-head latent attention.
HOPPER_MIXED_HEAD_DIMS = ((192, 128),)
ALIGNMENT_BYTES = 16  # TMA: addresses and strides


class ArgumentError(ValueError):
    """An argument breaks a rule. The message names the argument, the rule and the value."""


def require(ok: bool, argument: str, rule: str, value: Any) -> None:
    """Raise :class:`ArgumentError` ``argument: rule, got value`` unless ``ok``."""
    if not ok:
        fail(argument, rule, value)


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one attention call. ``varlen``: batch and lengths come from cu_seqlens."""

    varlen: bool
    batch: int
    seqlen_q: int  # dense: length; varlen: max_seqlen_q
    seqlen_k: int
    total_q: int  # rows of q: batch * seqlen_q when dense
    total_k: int
    heads_q: int
    heads_k: int
    head_dim_qk: int
    head_dim_v: int

    @property
    def lse_shape(self) -> tuple[int, ...]:
        if self.varlen:
            return (self.heads_q, self.total_q)
        return (self.batch, self.heads_q, self.seqlen_q)

    @property
    def out_shape(self) -> tuple[int, ...]:
        if self.varlen:
            return (self.total_q, self.heads_q, self.head_dim_v)
        return (self.batch, self.seqlen_q, self.heads_q, self.head_dim_v)

    @property
    def empty(self) -> bool:
        """No query row, or no sequence: nothing to compute."""
        return self.batch == 0 or self.total_q == 0


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def fail(argument: str, rule: str, value: Any) -> NoReturn:
    """Raise :class:`ArgumentError` ``argument: rule, got value``."""
    raise ArgumentError(f"{argument}: {rule}, got {value}")


def _check_tensor(name: str, x: Any, ndim: int, layout: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != ndim:
        fail(name, f"must have {ndim} dimensions {layout}", tuple(x.shape))


def attention_shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> AttentionShape:
    """Check the tensors of a call and return its sizes; the rules every backend shares.

    Dense: q (B, Sq, H, D), k (B, Sk, G, D), v (B, Sk, G, E). Varlen (cu_seqlens given):
    q (Tq, H, D), k (Tk, G, D), v (Tk, G, E), cu_seqlens int32 (B + 1).

    Raises:
        ArgumentError: naming the argument, the rule and the value. TypeError: not a tensor.
    """
    varlen = cu_seqlens_q is not None or cu_seqlens_k is not None
    layout = "(total, heads, head_dim)" if varlen else "(batch, seqlen, heads, head_dim)"
    ndim = 3 if varlen else 4
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x, ndim, layout)
        if not x.dtype.is_floating_point:
            fail(name, "must have a floating dtype", x.dtype)
        if x.dtype != q.dtype:
            fail(name, f"dtype must be that of q ({q.dtype})", x.dtype)
        if x.device != q.device:
            fail(name, f"device must be that of q ({q.device})", x.device)

    heads_q, d_qk = q.shape[-2], q.shape[-1]
    heads_k, d_v = k.shape[-2], v.shape[-1]
    for name, count in (("q", heads_q), ("k", heads_k)):
        if count < 1:
            fail(name, "must have at least one head", count)
    for name, size in (("q", d_qk), ("v", d_v)):
        if size < 1:
            fail(name, "head_dim must be positive", size)
    if k.shape[-1] != d_qk:
        fail("k", f"head_dim must equal that of q ({d_qk})", k.shape[-1])
    if heads_q % heads_k:
        fail("k", f"number of heads must divide the {heads_q} heads of q", heads_k)
    if v.shape[:-1] != k.shape[:-1]:
        fail(
            "v",
            f"all but the last dimension must be those of k {tuple(k.shape)}",
            tuple(v.shape),
        )
    if not varlen:
        batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
        if k.shape[0] != batch:
            fail("k", f"batch must be that of q ({batch})", k.shape[0])
        return AttentionShape(
            False, batch, seqlen_q, seqlen_k, batch * seqlen_q, batch * seqlen_k,
            heads_q, heads_k, d_qk, d_v,
        )  # fmt: skip

    if cu_seqlens_q is None or cu_seqlens_k is None:
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        fail(missing, "cu_seqlens_q and cu_seqlens_k must be given together", None)
    for name, value in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not _is_int(value):
            raise TypeError(
                f"{name}: must be a Python int (a tensor would cost a device synchronisation), "
                f"got {type(value).__name__}"
            )
        if value < 0:  # type: ignore[operator]
            fail(name, "must be at least 0", value)
    assert max_seqlen_q is not None and max_seqlen_k is not None
    total_q, total_k = q.shape[0], k.shape[0]
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.device, total_q, max_seqlen_q)
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q.device, total_k, max_seqlen_k)
    entries = cu_seqlens_q.shape[0]
    if cu_seqlens_k.shape[0] != entries:
        fail(
            "cu_seqlens_k",
            f"must have as many entries as cu_seqlens_q ({entries})",
            cu_seqlens_k.shape[0],
        )
    return AttentionShape(
        True, entries - 1, max_seqlen_q, max_seqlen_k, total_q, total_k,
        heads_q, heads_k, d_qk, d_v,
    )  # fmt: skip


def check_cu_seqlens(
    name: str, cu: Tensor, device: torch.device, total: int, max_seqlen: int | None
) -> None:
    """Rules for one cu_seqlens tensor: int32 (B + 1), contiguous, on the device of the data.

    The entries are read only where that is free (CPU) or asked for; see the module's docstring.
    """
    _check_tensor(name, cu, 1, "(batch + 1,)")
    if cu.dtype != torch.int32:
        fail(name, "dtype must be torch.int32", cu.dtype)
    if cu.device != device:
        fail(name, f"device must be that of q ({device})", cu.device)
    if cu.shape[0] < 1:
        fail(name, "must have at least one entry", cu.shape[0])
    if not cu.is_contiguous():
        fail(name, "must be contiguous", f"stride {cu.stride()}")
    if torch.compiler.is_compiling() or _is_fake(cu):
        return
    if cu.device.type == "cpu" or os.environ.get(CU_SEQLENS_DEBUG) == "1":
        check_cu_seqlens_values(name, cu.tolist(), total, max_seqlen)


def recheck_cu_seqlens(
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, shape: AttentionShape
) -> None:
    """The entries again, where they are read, for a call whose sizes are known to be fine."""
    for name, cu, total, longest in (
        ("cu_seqlens_q", cu_seqlens_q, shape.total_q, shape.seqlen_q),
        ("cu_seqlens_k", cu_seqlens_k, shape.total_k, shape.seqlen_k),
    ):
        if cu is not None and (cu.device.type == "cpu" or os.environ.get(CU_SEQLENS_DEBUG) == "1"):
            check_cu_seqlens_values(name, cu.tolist(), total, longest)


def check_cu_seqlens_values(
    name: str, entries: list[int], total: int, max_seqlen: int | None
) -> None:
    """Rules for the entries: first 0, never decreasing, last <= total, steps <= max_seqlen."""
    require(entries[0] == 0, f"{name}[0]", "must be 0", entries[0])
    for i in range(1, len(entries)):
        length = entries[i] - entries[i - 1]
        require(length >= 0, f"{name}[{i}]", f"must be at least {entries[i - 1]}", entries[i])
        if max_seqlen is not None:
            require(
                length <= max_seqlen,
                name.replace("cu_seqlens", "max_seqlen"),
                f"must be at least the length of sequence {i - 1} ({length})",
                max_seqlen,
            )
    require(
        entries[-1] <= total,
        f"{name}[-1]",
        f"must be at most the {total} rows of the packed tensor",
        entries[-1],
    )


def _is_fake(x: Tensor) -> bool:
    return isinstance(x, torch._subclasses.FakeTensor) or x.is_meta


def resolve_window(causal: bool, window_size: tuple[int, int]) -> tuple[int, int]:
    """``causal`` and ``window_size`` as (left, right); -1 is unbounded, causal is right = 0.

    Raises:
        ArgumentError: a side below -1; not a pair; causal with a right side above 0.
    """
    if not isinstance(causal, bool):
        fail("causal", "must be True or False", repr(causal))
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        fail("window_size", "must be a pair (left, right)", repr(window_size))
    left, right = window_size
    for side, value in ((0, left), (1, right)):
        if not _is_int(value) or value < -1:
            fail(
                f"window_size[{side}]", "must be an int of at least -1 (-1: unbounded)", repr(value)
            )
    if causal:
        if right > 0:
            fail("window_size[1]", "must be -1 or 0 when causal=True", right)
        right = 0
    return left, right


def _is_finite(value: Any) -> bool:
    """A real number, written with comparisons because tracing knows no math.isfinite."""
    return (
        isinstance(value, (int, float, torch.SymInt, torch.SymFloat))
        and not isinstance(value, bool)
        and -math.inf < value < math.inf
    )


def resolve_scale(softmax_scale: float | None, head_dim_qk: int) -> float:
    """``softmax_scale``, by default 1 / sqrt(head dim of q and k)."""
    if softmax_scale is None:
        return 1.0 / math.sqrt(head_dim_qk)
    if not _is_finite(softmax_scale):
        fail("softmax_scale", "must be a finite number or None", repr(softmax_scale))
    return float(softmax_scale)


def check_softcap(softcap: float) -> float:
    """``softcap``: 0 (none) or a positive finite number."""
    if not _is_finite(softcap) or softcap < 0:
        fail("softcap", "must be 0 (none) or a positive finite number", repr(softcap))
    return float(softcap)


def check_sink(sink: Tensor | None, shape: AttentionShape, device: torch.device) -> None:
    """``sink``: None or one floating-point logit per query head."""
    if sink is None:
        return
    _check_tensor("sink", sink, 1, "(heads of q,)")
    if not sink.dtype.is_floating_point:
        fail("sink", "must have a floating dtype", sink.dtype)
    if sink.shape[0] != shape.heads_q:
        fail("sink", f"must have one entry per head of q ({shape.heads_q})", sink.shape[0])
    if sink.device != device:
        fail("sink", f"device must be that of q ({device})", sink.device)


def check_hopper_head_dims(head_dim_qk: int, head_dim_v: int) -> None:
    """Head dims that the kernels take: equal, a multiple of 8, at most 256; or 192 with 128."""
    for name, d in (("q", head_dim_qk), ("v", head_dim_v)):
        if d % HOPPER_HEAD_DIM_MULTIPLE or d > HOPPER_MAX_HEAD_DIM:
            fail(
                name,
                f"head_dim must be a multiple of {HOPPER_HEAD_DIM_MULTIPLE} and at most "
                f"{HOPPER_MAX_HEAD_DIM} for backend='hopper'",
                d,
            )
    if head_dim_v != head_dim_qk and (head_dim_qk, head_dim_v) not in HOPPER_MIXED_HEAD_DIMS:
        fail(
            "v",
            f"head_dim must be that of q ({head_dim_qk}), or 128 where that is 192, "
            "for backend='hopper'",
            head_dim_v,
        )


def check_hopper_tensor(
    name: str, x: Tensor, dtypes: tuple[torch.dtype, ...] = HOPPER_DTYPES
) -> None:
    """What TMA asks of a tensor: dtype, last dimension contiguous, 16-byte address and strides."""
    if x.dtype not in dtypes:
        fail(name, f"dtype must be one of {list(dtypes)} for backend='hopper'", x.dtype)
    problem = layout_problem(x)
    if problem is not None:
        fail(name, f"{problem} for backend='hopper'", f"stride {x.stride()}")
    if not torch.compiler.is_compiling() and not _is_fake(x) and x.data_ptr() % ALIGNMENT_BYTES:
        fail(
            name,
            f"the address must be a multiple of {ALIGNMENT_BYTES} bytes for backend='hopper'",
            f"0x{x.data_ptr():x}",
        )


def layout_problem(x: Tensor) -> str | None:
    """The layout rule that ``x`` breaks, or None. Dimensions of size 1 have no stride to obey."""
    multiple = ALIGNMENT_BYTES // x.element_size()
    if x.shape[-1] % multiple == 0 and x.is_contiguous():
        return None
    if x.shape[-1] != 1 and x.stride(-1) != 1:
        return "the last dimension must be contiguous"
    for dim in range(x.dim() - 1):
        if x.shape[dim] != 1 and x.stride(dim) % multiple:
            return f"the stride of dimension {dim} must be a multiple of {multiple} elements"
    return None
