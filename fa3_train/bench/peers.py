"""The competitors, each behind the same three questions: can you, why not, and do it.

All get the same tensors in the layout training has them in, (B, S, H, D), transposed views where a
peer wants another order. A peer returns its results so that the benchmark can check that all of
them computed the same thing before it times any.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fa3_train import _lib
from fa3_train.bench.cells import Cell

Call = Callable[[], tuple[Tensor, ...]]
MATH_BYTES = 24 << 30  # what the standard formula may keep alive


@dataclass
class Inputs:
    """One cell's tensors. Packed cells: (T, H, D) and cu_seqlens; dense ones: (B, S, H, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    cu_seqlens: Tensor | None
    sink: Tensor | None
    max_seqlen: int
    scale: float


def make_inputs(cell: Cell, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    """Standard normal tensors for ``cell``."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(heads: int, d: int) -> Tensor:
        lead = (sum(cell.lengths),) if cell.lengths else (cell.batch, cell.seqlen)
        x = torch.empty(*lead, heads, d, dtype=dtype, device=device)
        return x.normal_(generator=generator)

    cu = None
    if cell.lengths:
        cu = torch.tensor([0, *cell.lengths], device=device).cumsum(0).int()
    sink = torch.randn(cell.heads, device=device, generator=generator) if cell.sink else None
    return Inputs(
        q=normal(cell.heads, cell.head_dim),
        k=normal(cell.kv_heads, cell.head_dim),
        v=normal(cell.kv_heads, cell.head_dim_v),
        dout=normal(cell.heads, cell.head_dim_v),
        cu_seqlens=cu,
        sink=sink,
        max_seqlen=max(cell.lengths or (cell.seqlen,)),
        scale=1.0 / math.sqrt(cell.head_dim),
    )


class Peer:
    """A competitor. ``name`` is the column in tables."""

    name = ""

    def missing(self) -> str | None:
        """Why it cannot run on this machine at all, or None."""
        return None

    def problem(self, cell: Cell, which: str) -> str | None:
        """Why it cannot serve ``cell``, or None."""
        return None if cell.plain else "option not available"

    def forward(self, cell: Cell, x: Inputs, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """out, in the layout of q; differentiable."""
        raise NotImplementedError

    def build(self, cell: Cell, x: Inputs, which: str) -> Call:
        """What to time for the pass ``fwd``, ``bwd`` or ``fwdbwd``."""
        if which == "fwd":

            def run() -> tuple[Tensor, ...]:
                with torch.no_grad():
                    return (self.forward(cell, x, x.q, x.k, x.v),)

            return run
        leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
        if which == "bwd":
            out = self.forward(cell, x, *leaves)
            return lambda: torch.autograd.grad(out, leaves, x.dout, retain_graph=True)

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(self.forward(cell, x, *leaves), leaves, x.dout)

        return both


class Ours(Peer):
    name = "ours"

    def missing(self) -> str | None:
        return None if _lib.available() else f"{_lib.LIBRARY_NAME} is not built"

    def problem(self, cell: Cell, which: str) -> str | None:
        if cell.options and which != "fwd":
            return "the switches are of the forward"
        return None

    def forward(self, cell: Cell, x: Inputs, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from fa3_train.ops import attention

        if cell.options:
            bits = sum(_lib.OPTIONS[name] for name in cell.options)
            return torch.ops.fa3_train.attn_fwd(
                q, k, v, x.cu_seqlens, x.cu_seqlens, x.sink, x.max_seqlen, x.max_seqlen, x.scale,
                cell.causal, *cell.window, cell.softcap, bits,
            )[0]  # fmt: skip
        options = {
            "window_size": cell.window,
            "softcap": cell.softcap,
            "sink": x.sink,
            "deterministic": cell.deterministic,
            "backend": "hopper",
        }
        if x.cu_seqlens is None:
            return attention.flash_attn_func(q, k, v, x.scale, cell.causal, **options)
        return attention.flash_attn_varlen_func(
            q, k, v, x.cu_seqlens, x.cu_seqlens, x.max_seqlen, x.max_seqlen, x.scale,
            cell.causal, **options,
        )  # fmt: skip


class Standard(Peer):
    """The formula of the textbook, scores in memory."""

    name = "math"

    def problem(self, cell: Cell, which: str) -> str | None:
        if cell.lengths:
            return "no packed sequences"
        copies = 3 if which == "fwd" else 5
        size = copies * 2 * cell.batch * cell.heads * cell.seqlen**2
        if size > MATH_BYTES:
            return f"scores need {size / 2**30:.0f} GiB"
        return super().problem(cell, which)

    def forward(self, cell: Cell, x: Inputs, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = cell.heads // cell.kv_heads
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(group, 1) if group > 1 else t for t in (k, v))
        s = torch.matmul(q * x.scale, k.transpose(-1, -2))
        if cell.causal:
            mask = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
            s = s.masked_fill(mask, -math.inf)
        return torch.matmul(torch.softmax(s, dim=-1), v).transpose(1, 2)


class Sdpa(Peer):
    """torch's scaled_dot_product_attention with one backend pinned."""

    backend = ""

    def problem(self, cell: Cell, which: str) -> str | None:
        if cell.lengths:
            return "no packed sequences"
        return super().problem(cell, which)

    def forward(self, cell: Cell, x: Inputs, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, self.backend)):
            return F.scaled_dot_product_attention(
                *(t.transpose(1, 2) for t in (q, k, v)),
                is_causal=cell.causal,
                scale=x.scale,
                enable_gqa=cell.heads != cell.kv_heads,
            ).transpose(1, 2)


class Cudnn(Sdpa):
    name = "cudnn"
    backend = "CUDNN_ATTENTION"

    def missing(self) -> str | None:
        return None if torch.backends.cudnn.is_available() else "torch has no cuDNN"


class Fa2(Sdpa):
    """FlashAttention-2 as torch ships it; packed rows through torch.nn.attention.varlen."""

    name = "fa2"
    backend = "FLASH_ATTENTION"

    def problem(self, cell: Cell, which: str) -> str | None:
        if cell.head_dim != cell.head_dim_v:
            return "one head dim only"
        return Peer.problem(self, cell, which)

    def forward(self, cell: Cell, x: Inputs, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if x.cu_seqlens is None:
            return super().forward(cell, x, q, k, v)
        from fa3_train import checks
        from fa3_train.ops import sdpa

        cu = x.cu_seqlens
        shape = checks.attention_shape(q, k, v, cu, cu, x.max_seqlen, x.max_seqlen)
        right = 0 if cell.causal else -1
        return sdpa.varlen(q, k, v, cu, cu, shape, x.scale, -1, right)


class Triton(Peer):
    """torch's flex_attention: a Triton kernel made for the mask; compiles once per shape."""

    name = "triton"

    def missing(self) -> str | None:
        return None if importlib.util.find_spec("triton") else "triton is not installed"

    def problem(self, cell: Cell, which: str) -> str | None:
        if cell.head_dim != cell.head_dim_v:
            return "one head dim only"
        return super().problem(cell, which)

    @staticmethod
    @functools.cache
    def _compiled() -> Callable[..., Tensor]:
        from torch.nn.attention.flex_attention import flex_attention

        # The backward is timed again and again on one graph: its buffers may not be given away.
        functorch = importlib.import_module("torch._functorch.config")
        functorch.donated_buffer = False
        torch._dynamo.config.recompile_limit = 256
        return torch.compile(flex_attention, dynamic=False)

    @staticmethod
    @functools.lru_cache(maxsize=2)
    def _mask(cell: Cell, device: torch.device):
        from torch.nn.attention.flex_attention import create_block_mask

        total = sum(cell.lengths) or cell.seqlen
        document = None
        if cell.lengths:
            lengths = torch.tensor(cell.lengths, device=device)
            document = torch.arange(len(lengths), device=device).repeat_interleave(lengths)

        def keep(b, h, i, j):
            allowed = i >= j if cell.causal else i >= 0
            return allowed & (document[i] == document[j]) if document is not None else allowed

        return create_block_mask(keep, None, None, total, total, device=device)

    def forward(self, cell: Cell, x: Inputs, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        packed = x.cu_seqlens is not None
        mask = self._mask(cell, q.device) if packed or cell.causal else None
        if packed:
            q, k, v = (t[None] for t in (q, k, v))
        out = self._compiled()(
            *(t.transpose(1, 2) for t in (q, k, v)),
            scale=x.scale,
            block_mask=mask,
            enable_gqa=cell.heads != cell.kv_heads,
        ).transpose(1, 2)
        return out[0] if packed else out


class Fa3(Peer):
    """FlashAttention-3 from its package, or from a library of its ops given by path.

    Called at the level of its operators, which is where its Python wrappers end up.
    """

    name = "fa3"

    def __init__(self, library: str | None = None) -> None:
        self._library = library
        self._ops = None

    def missing(self) -> str | None:
        if self._ops is not None:
            return None
        path, _, namespace = (self._library or "").partition(":")
        if path:
            torch.ops.load_library(path)
        elif importlib.util.find_spec("flash_attn_interface"):
            importlib.import_module("flash_attn_interface")
        else:
            return "flash_attn_interface is not installed and --fa3-library not given"
        self._ops = getattr(torch.ops, namespace or "flash_attn_3")
        return None

    def problem(self, cell: Cell, which: str) -> str | None:
        if cell.sink or cell.options:
            return "option not available"
        return None

    def _arguments(self, cell: Cell, x: Inputs) -> dict[str, object]:
        kw: dict[str, object] = {"softmax_scale": x.scale, "is_causal": cell.causal}
        if cell.window != (-1, -1):
            kw |= {"window_size_left": cell.window[0], "window_size_right": cell.window[1]}
        if cell.softcap:
            kw["softcap"] = cell.softcap
        if x.cu_seqlens is not None:
            kw |= {
                "cu_seqlens_q": x.cu_seqlens, "cu_seqlens_k": x.cu_seqlens,
                "max_seqlen_q": x.max_seqlen, "max_seqlen_k": x.max_seqlen,
            }  # fmt: skip
        return kw

    def build(self, cell: Cell, x: Inputs, which: str) -> Call:
        kw, ops = self._arguments(cell, x), self._ops
        assert ops is not None

        def forward() -> tuple[Tensor, ...]:
            return ops.fwd(x.q, x.k, x.v, num_splits=1, **kw)

        if which == "fwd":
            return lambda: forward()[:1]  # the others are lse and unused buffers

        def backward(out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
            dq, dk, dv = (torch.empty_like(t) for t in (x.q, x.k, x.v))
            ops.bwd(
                x.dout, x.q, x.k, x.v, out, lse, dq=dq, dk=dk, dv=dv,
                deterministic=cell.deterministic, **kw,
            )  # fmt: skip
            return dq, dk, dv

        if which == "bwd":
            out, lse, *_ = forward()
            return lambda: backward(out, lse)
        return lambda: backward(*forward()[:2])


class Fa4(Peer):
    """FlashAttention-4 (CuTe DSL), where its package is importable."""

    name = "fa4"

    def missing(self) -> str | None:
        try:
            found = importlib.util.find_spec("flash_attn.cute")
        except ModuleNotFoundError:
            found = None
        return None if found else "flash_attn.cute is not installed"

    def forward(self, cell: Cell, x: Inputs, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        interface = importlib.import_module("flash_attn.cute.interface")
        kw = {"softmax_scale": x.scale, "causal": cell.causal}
        if x.cu_seqlens is None:
            result = interface.flash_attn_func(q, k, v, **kw)
        else:
            result = interface.flash_attn_varlen_func(
                q, k, v, cu_seqlens_q=x.cu_seqlens, cu_seqlens_k=x.cu_seqlens, **kw
            )
        return result[0] if isinstance(result, tuple) else result


NAMES = ("ours", "fa3", "cudnn", "fa2", "fa4", "triton", "math")


def make_peers(names: list[str], fa3_library: str | None = None) -> list[Peer]:
    """Peers by name, in the order of :data:`NAMES`."""
    unknown = set(names) - set(NAMES)
    if unknown:
        raise ValueError(f"--peers: must be from {NAMES}, got {sorted(unknown)}")
    made = {
        "ours": Ours, "fa3": lambda: Fa3(fa3_library), "cudnn": Cudnn, "fa2": Fa2, "fa4": Fa4,
        "triton": Triton, "math": Standard,
    }  # fmt: skip
    return [made[name]() for name in NAMES if name in names]
