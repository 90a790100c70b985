"""Competitors of the FP8 forward: e4m3 q, k, v in, 16-bit out.

``ours`` and ``fa3`` are timed on tensors that are already quantized, each with the scales that it
takes: one per 128 tokens and head, or one per batch entry and key/value head. ``ours-full`` starts
from bf16 and contains the fused Hadamard and quantization: what a training step pays.
``ours-single`` accumulates P V in the tensor core alone, as FA3 does: inexact over long sequences
(docs/fp8.md). ``cudnn`` takes one scale per tensor and writes e4m3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fa3_train import _lib, reference_fp8
from fa3_train.bench.cells import Cell
from fa3_train.bench.peers import Call, Fa3, Inputs, Peer
from fa3_train.bench.peers_cudnn import CudnnFp8

NAMES = ("ours", "ours-full", "ours-single", "fa3", "cudnn")


class OursFp8(Peer):
    name = "ours"
    two_level = True

    def missing(self) -> str | None:
        return None if _lib.available() else f"{_lib.LIBRARY_NAME} is not built"

    def problem(self, cell: Cell, which: str) -> str | None:
        if cell.softcap or cell.sink:
            return "option not available"
        return None

    def build(self, cell: Cell, x: Inputs, which: str) -> Call:
        from fa3_train.ops import fp8  # noqa: F401 - registers the op

        coded = [
            reference_fp8.quantize_blocks(t.float(), cu_seqlens=x.cu_seqlens)
            for t in (x.q, x.k, x.v)
        ]
        codes, descales = zip(*coded, strict=True)
        descales = tuple(d.contiguous() for d in descales)
        bits = sum(_lib.OPTIONS[name] for name in cell.options)

        def run() -> tuple[Tensor, ...]:
            return torch.ops.fa3_train.attn_fp8_fwd(
                *codes, *descales, x.cu_seqlens, x.cu_seqlens, x.max_seqlen, x.max_seqlen, x.scale,
                cell.causal, cell.window[0], 0 if cell.causal else cell.window[1],
                self.two_level, x.q.dtype, bits,
            )  # fmt: skip

        return run


class OursSingle(OursFp8):
    name = "ours-single"
    two_level = False


class OursFull(OursFp8):
    name = "ours-full"

    def build(self, cell: Cell, x: Inputs, which: str) -> Call:
        import fa3_train

        signs = reference_fp8.random_signs(cell.head_dim).to(x.q.device)
        options = {"signs": signs, "window_size": cell.window, "backend": "hopper"}

        def run() -> tuple[Tensor, ...]:
            with torch.no_grad():
                if x.cu_seqlens is None:
                    out = fa3_train.flash_attn_fp8_func(
                        x.q, x.k, x.v, x.scale, cell.causal, **options
                    )
                else:
                    out = fa3_train.flash_attn_fp8_varlen_func(
                        x.q, x.k, x.v, x.cu_seqlens, x.cu_seqlens, x.max_seqlen, x.max_seqlen,
                        x.scale, cell.causal, **options,
                    )  # fmt: skip
            return (out,)

        return run


class Fa3Fp8(Fa3):
    def build(self, cell: Cell, x: Inputs, which: str) -> Call:
        ops, kw = self._ops, self._arguments(cell, x)
        assert ops is not None
        batch = len(cell.lengths) or cell.batch
        codes = []
        for name, t in (("q", x.q), ("k", x.k), ("v", x.v)):
            # One scale per tensor serves every (batch, head): the data has one distribution.
            scale = t.abs().amax().float() / reference_fp8.E4M3_MAX
            codes.append(reference_fp8.quantize_with(t.float(), scale))
            kw[f"{name}_descale"] = scale.expand(batch, cell.kv_heads).contiguous()
        return lambda: ops.fwd(*codes, num_splits=1, **kw)[:1]


def make_peers_fp8(names: list[str], fa3_library: str | None = None) -> list[Peer]:
    """Peers by name; those that torch gives no FP8 attention for are refused by name."""
    unknown = set(names) - set(NAMES)
    if unknown:
        raise ValueError(f"--peers with --dtype fp8: must be from {NAMES}, got {sorted(unknown)}")
    made = {
        "ours": OursFp8, "ours-full": OursFull, "ours-single": OursSingle,
        "fa3": lambda: Fa3Fp8(fa3_library), "cudnn": CudnnFp8,
    }  # fmt: skip
    return [made[name]() for name in NAMES if name in names]
