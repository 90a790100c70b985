"""The `gradients` table of ``bench error``: dq, dk, dv of FP8 attention against fp64.

Both ways of differentiating (``gradient=`` of flash_attn_fp8_func), on normal data whose queries
are scaled so that scores have a standard deviation of 1, 2 and 4, and on the outlier data of the
other tables. Beside them the 16-bit kernel, and where TransformerEngine is installed its FP8
attention (cuDNN: one delayed scale per tensor, FP8 in both passes), after a few passes that fill
its history of maxima.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fa3_train import numerics, reference, reference_fp8
from fa3_train.ops.attention import flash_attn_func
from fa3_train.ops.attention_fp8 import GRADIENTS, flash_attn_fp8_func

KINDS = {"scores of deviation 1": 1.0, "of 2": 2.0, "of 4": 4.0, "outliers": None}
HISTORY_PASSES = 4

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(args: argparse.Namespace, sharpness: float | None) -> list[Tensor]:
    """q, k, v and dout, bf16 (1, S, H, D)."""
    generator = torch.Generator(args.device).manual_seed(args.seed)
    shape = (1, args.seqlen, args.heads, args.head_dim)
    kw: dict[str, Any] = {"generator": generator, "device": args.device}
    if sharpness is None:
        xs = [numerics.outlier_normal(*shape, **kw) for _ in range(3)]
    else:
        xs = [torch.randn(shape, **kw) for _ in range(3)]
        xs[0] *= sharpness
    return [x.to(torch.bfloat16) for x in (*xs, torch.randn(shape, **kw))]


def truth(xs: list[Tensor], causal: bool) -> list[Tensor]:
    """out, dq, dk, dv in fp64, a head at a time: S x S numbers each."""
    heads = []
    for h in range(xs[0].shape[-2]):
        q, k, v, dout = (x[:, :, h : h + 1].double() for x in xs)
        out, lse = reference.attention(q, k, v, causal=causal)
        grads = reference.attention_backward(dout, q, k, v, out, lse, causal=causal)
        heads.append([out, *grads[:3]])
    return [torch.cat(parts, -2) for parts in zip(*heads, strict=True)]


def row(name: str, attend: Attention, xs: list[Tensor], expected: list[Tensor]) -> dict[str, Any]:
    q, k, v = (x.clone().requires_grad_() for x in xs[:3])
    out = attend(q, k, v)
    found = [out, *torch.autograd.grad(out, (q, k, v), xs[3])]
    names = ("out", "dq", "dk", "dv")
    errors = {
        n: numerics.relative_rms_error(a, b) for n, a, b in zip(names, found, expected, strict=True)
    }
    return {"name": name, **errors}


def transformer_engine(args: argparse.Namespace, causal: bool) -> Attention | None:
    """TransformerEngine's FP8 attention, or None where it is not installed."""
    try:
        import transformer_engine.pytorch as te
        from transformer_engine.common import recipe
    except (ImportError, OSError, RuntimeError):
        return None
    module = te.DotProductAttention(
        args.heads, args.head_dim, qkv_format="bshd", attention_dropout=0.0,
        attn_mask_type="causal" if causal else "no_mask",
    )  # fmt: skip
    scaling = recipe.DelayedScaling(fp8_format=recipe.Format.HYBRID, fp8_dpa=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with te.fp8_autocast(enabled=True, fp8_recipe=scaling):
            out = module(q, k, v)
        shaped: Tensor = out.view(q.shape)
        return shaped

    return attend


def gradient_tables(args: argparse.Namespace, masks: tuple[bool, ...]) -> Iterator[dict[str, Any]]:
    """One table per kind of data and mask."""
    signs = reference_fp8.random_signs(args.head_dim).to(args.device)
    for kind, sharpness in KINDS.items():
        for causal in masks:
            xs = inputs(args, sharpness)
            expected = truth(xs, causal)

            def sixteen_bit(q: Tensor, k: Tensor, v: Tensor, causal: bool = causal) -> Tensor:
                out = flash_attn_func(q, k, v, causal=causal)
                assert isinstance(out, Tensor)
                return out

            rows = [row("bf16", sixteen_bit, xs, expected)]
            for gradient in GRADIENTS:

                def attend(
                    q: Tensor, k: Tensor, v: Tensor, gradient: str = gradient, causal: bool = causal
                ) -> Tensor:
                    out = flash_attn_fp8_func(
                        q, k, v, causal=causal, signs=signs, gradient=gradient
                    )
                    assert isinstance(out, Tensor)
                    return out

                rows.append(row(f"fp8, gradient at the {gradient}", attend, xs, expected))
            peer = transformer_engine(args, causal)
            if peer is not None:
                name = "fp8, TransformerEngine"
                try:
                    for _ in range(HISTORY_PASSES):
                        measured = row(name, peer, xs, expected)
                    rows.append(measured)
                except Exception as error:  # a peer that refuses is a row, not the end
                    rows.append({"name": name, "refused": f"{type(error).__name__}: {error}"[:200]})
            title = f"gradients, {kind}, {'causal' if causal else 'full'}, H{args.heads}"
            yield {"title": f"{title} S{args.seqlen} D{args.head_dim}", "rows": rows}


def text(table: dict[str, Any]) -> str:
    lines = [f"{table['title']}, relative RMS error"]
    lines.append(f"{'':38}" + "".join(f"{n:>10}" for n in ("out", "dq", "dk", "dv")))
    for r in table["rows"]:
        if "refused" in r:
            lines.append(f"  {r['name']:36}{r['refused']}")
        else:
            cells = "".join(f"{r[n]:10.2e}" for n in ("out", "dq", "dk", "dv"))
            lines.append(f"  {r['name']:36}{cells}")
    return "\n".join([*lines, ""])
