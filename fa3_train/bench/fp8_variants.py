"""FP8 attention with its remedies taken away, inside a model: held-out perplexity, and training.

    python -m fa3_train.bench perplexity --weights runs/bf16/hf --out docs/results/perplexity
    python -m fa3_train.bench.fp8_variants tensor recipe=tiny_gpu attention=fp8 ...

The first takes a model that was trained with BF16 attention (a folder that
`checkpoint.export_hf=true` wrote) and evaluates the same held-out text under every FP8 variant of
`bench error`: one scale per tensor, per head or per block of 128 tokens, with and without Hadamard,
two-level and single-level sums. Beside the perplexity stands what the variant does to the output
of the attention itself on the model's own activations: relative RMS error against fp32, over all
layers and in the worst one, every layer fed by the BF16 model.

The second trains with such a variant; it is what `bench curves --suite ablation` starts.

All variants here rotate first, round to bf16, then quantize: they differ in the named respect only.
(The product's FP8 attention rotates and quantizes in one pass, without that rounding; it is in the
table as "fp8, fused".) On a GPU the FP8 kernel runs, elsewhere its emulation.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fa3_train import reference, reference_fp8
from fa3_train.bench.error import BLOCK, Variant
from fa3_train.bench.error import VARIANTS as _VARIANTS
from fa3_train.modules.attention import FlashAttention
from fa3_train.ops.preprocess import dequantize, rope_hadamard_quantize

# Keys for the command line; the variants are those of `bench error`, in its order.
_KEYS = (
    "tensor", "head", "block", "tensor_hadamard", "head_hadamard", "block_hadamard", "single_level",
)  # fmt: skip
VARIANTS: dict[str, Variant] = dict(zip(_KEYS, _VARIANTS, strict=True))


# ---- the attention ---------------------------------------------------------------------------


def encode(x: Tensor, scales: str, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Packed x (T, H, D) -> e4m3 codes and descale (H, T // 128 + documents), fp32."""
    wide = x.float()
    if scales == "block":
        return reference_fp8.quantize_blocks(wide, BLOCK, cu_seqlens)
    dims = (0, 1, 2) if scales == "tensor" else (0, 2)
    top = wide.abs().amax(dims, keepdim=True) / reference_fp8.E4M3_MAX
    descale = reference_fp8.round_up(top).clamp(min=reference_fp8.SMALLEST_DESCALE)
    slots = x.shape[0] // BLOCK + cu_seqlens.shape[0] - 1
    rows = descale.expand(1, x.shape[1], 1)[0].expand(-1, slots)
    return reference_fp8.quantize_with(wide, descale), rows.contiguous()


class _Coded(torch.autograd.Function):
    """Causal packed attention on the codes of q, k, v; 16-bit backward, straight through them."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float,
        variant: Variant,
    ) -> Tensor:  # fmt: skip
        coded = [encode(x, variant.scales, cu) for x in (q, k, v)]
        codes, descales = [c for c, _ in coded], [d for _, d in coded]
        if q.is_cuda:
            out, lse = torch.ops.fa3_train.attn_fp8_fwd(
                *codes, *descales, cu, cu, longest, longest, scale, True, -1, 0,
                variant.two_level, q.dtype,
            )  # fmt: skip
        else:
            out, lse = reference_fp8.attention_fp8(
                *codes, *descales, softmax_scale=scale, causal=True, cu_seqlens_q=cu,
                cu_seqlens_k=cu, two_level=variant.two_level,
            )  # fmt: skip
            out = out.to(q.dtype)
        ctx.save_for_backward(*codes, *descales, out, lse, cu)
        ctx.call = (longest, scale)
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        *coded, out, lse, cu = ctx.saved_tensors
        longest, scale = ctx.call
        backend = "hopper" if dout.is_cuda else "reference"
        q, k, v = dequantize(coded[:3], coded[3:], cu_seqlens=cu, dtype=out.dtype, backend=backend)
        if dout.is_cuda:
            dq, dk, dv, _ = torch.ops.fa3_train.attn_bwd(
                dout, q, k, v, out, lse, None, cu, cu, None, longest, longest, scale, True, -1, 0,
                0.0, False,
            )  # fmt: skip
        else:
            dq, dk, dv, _ = reference.attention_backward(
                dout, q, k, v, out, lse, softmax_scale=scale, causal=True, cu_seqlens_q=cu,
                cu_seqlens_k=cu,
            )  # fmt: skip
        return dq.to(out.dtype), dk.to(out.dtype), dv.to(out.dtype), None, None, None, None


class _StandIn(nn.Module):
    """What SelfAttention asks of its attention before it calls it."""

    precision = "fp8"  # hand over q and k unrotated, with the tables

    def serves_product(self, qkv: Tensor, kv_heads: int) -> bool:
        """Not the undivided product of the projection."""
        return False


class VariantAttention(_StandIn):
    """In the place of a causal FlashAttention(precision="fp8"), for packed tokens."""

    def __init__(self, core: FlashAttention, variant: Variant) -> None:
        super().__init__()
        if not core.causal or core.window[0] >= 0 or core.precision != "fp8":
            raise ValueError(
                "core must be causal, without a window and of precision fp8, got "
                f"{core.extra_repr()}"
            )
        self.core = core
        self.variant = variant

    def reset_parameters(self) -> None:
        """As FlashAttention's: the signs."""
        self.core.reset_parameters()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        max_seqlen_q: int,
        rope: tuple[Tensor, Tensor],
        position_ids: Tensor,
    ) -> Tensor:
        """q (T, H, D), k, v (T, Hkv, D) -> (T, H, D)."""
        signs = self.core.signs if self.variant.hadamard else None
        backend = "hopper" if q.is_cuda else "reference"
        turned = (
            rope_hadamard_quantize(
                x, *rope, signs, position_ids=position_ids, quantize=False, backend=backend
            )
            for x in (q, k)
        )
        scale = self.core.softmax_scale or 1.0 / math.sqrt(q.shape[-1])
        out: Tensor = _Coded.apply(*turned, v, cu_seqlens_q, max_seqlen_q, scale, self.variant)
        return out


def install(model: nn.Module, variant: Variant) -> None:
    """Replace the attention of every layer of a TransformerLM of attention_precision fp8."""
    for layer in model.layers:  # type: ignore[union-attr]
        core = layer.attention.core
        layer.attention.core = VariantAttention(getattr(core, "core", core), variant)


# ---- perplexity ------------------------------------------------------------------------------


class _Shadow(_StandIn):
    """The BF16 attention of a layer, beside which every variant runs on the same inputs."""

    def __init__(self, plain: FlashAttention, others: dict[str, nn.Module]) -> None:
        super().__init__()
        self.plain = plain
        self.others = nn.ModuleDict(others)
        self.squares: dict[str, Tensor] = {}  # (squared error, squared truth), summed

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, rope: tuple[Tensor, Tensor],
        position_ids: Tensor, **packing: Any,
    ) -> Tensor:  # fmt: skip
        cos, sin = rope
        turned_q, turned_k = (
            reference_fp8.rotate(x.float(), cos, sin, position_ids=position_ids) for x in (q, k)
        )
        truth = _fp32_attention(turned_q, turned_k, v.float(), packing["cu_seqlens_q"])
        plain: Tensor = self.plain(turned_q.to(v.dtype), turned_k.to(v.dtype), v, **packing)
        self._add("bf16", plain, truth)
        for name, other in self.others.items():
            out = other(q, k, v, rope=rope, position_ids=position_ids, **packing)
            self._add(name, out, truth)
        return plain

    def _add(self, name: str, out: Tensor, truth: Tensor) -> None:
        error = (out.float() - truth).square().sum(dtype=torch.float64)
        both = torch.stack([error, truth.square().sum(dtype=torch.float64)])
        self.squares[name] = self.squares[name] + both if name in self.squares else both


def _fp32_attention(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
    """Causal attention of each document in fp32, without TF32."""
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    ends = cu.tolist()
    for a, b in zip(ends, ends[1:], strict=False):
        if a == b:
            continue
        one, two, three = (x[a:b].transpose(0, 1) for x in (q, k, v))
        two, three = (x.repeat_interleave(group, 0) for x in (two, three))
        scores = one @ two.transpose(1, 2) / math.sqrt(q.shape[-1])
        later = torch.ones(b - a, b - a, dtype=torch.bool, device=q.device).triu(1)
        probabilities = scores.masked_fill(later, -math.inf).softmax(-1)
        out[a:b] = (probabilities @ three).transpose(0, 1)
    return out


def _load(words: Sequence[str], weights: Path, precision: str, device: torch.device) -> Any:
    from fa3_train.models.hf import load_weights
    from fa3_train.models.transformer import TransformerLM
    from fa3_train.train.compose import load

    config = load([*words, f"attention.precision={precision}"])
    with device:
        model = TransformerLM(config.model_config())
    load_weights(model, str(weights))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return config, model.eval()


@torch.no_grad()
def _losses(model: nn.Module, batches: list[Any]) -> list[float]:
    """Mean loss of each batch."""
    values = [
        model(
            b.tokens, b.labels, position_ids=b.position_ids, cu_seqlens=b.cu_seqlens,
            max_seqlen=b.max_seqlen,
        )
        for b in batches
    ]  # fmt: skip
    return torch.stack(values).float().tolist()


def _row(name: str, losses: list[float], base: list[float], labels: list[int]) -> dict[str, Any]:
    """Loss over all labels; its change against `base`, with the standard error over batches."""
    total = sum(labels)
    loss = sum(x * n for x, n in zip(losses, labels, strict=True)) / total
    gaps = [a - b for a, b in zip(losses, base, strict=True)]
    mean = sum(g * n for g, n in zip(gaps, labels, strict=True)) / total
    count = len(gaps)
    middle = sum(gaps) / count
    error = math.sqrt(sum((g - middle) ** 2 for g in gaps) / max(1, count - 1) / count)
    return {
        "name": name, "loss": loss, "perplexity": math.exp(loss), "loss_minus_bf16": mean,
        "standard_error": error,
    }  # fmt: skip


def measure(weights: Path, words: Sequence[str], batches: int) -> dict[str, Any]:
    """The table: one row per variant."""
    from fa3_train.train.data import IGNORE_INDEX
    from fa3_train.train.data.build import build_data

    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = "hopper" if device.type == "cuda" else "reference"
    words = [*words, f"attention.backend={backend}"]
    config, plain = _load(words, weights, "bf16", device)
    data = build_data(config.data, vocab_size=config.model.vocab_size, seed=config.run.seed)
    if data.val is None:
        raise ValueError("data.val_fraction=0 leaves nothing to evaluate on")
    count = min(batches, data.val.batches_per_epoch) if batches else data.val.batches_per_epoch
    held_out = [next(data.val).to(device) for _ in range(count)]
    data.close()
    labels = [int((b.labels != IGNORE_INDEX).sum()) for b in held_out]
    base = _losses(plain, held_out)
    rows = [_row("bf16", base, base, labels)]
    _, model = _load(words, weights, "fp8", device)
    rows.append(_row("fp8, fused (the product)", _losses(model, held_out), base, labels))
    cores = [layer.attention.core for layer in model.layers]
    for variant in VARIANTS.values():
        if variant.two_level or device.type == "cuda":  # the emulation adds exactly
            install(model, variant)
            rows.append(_row(variant.name, _losses(model, held_out), base, labels))
    shadows = []
    for layer, core, bf16 in zip(model.layers, cores, plain.layers, strict=True):
        used = {k: v for k, v in VARIANTS.items() if v.two_level or device.type == "cuda"}
        others: dict[str, nn.Module] = {k: VariantAttention(core, v) for k, v in used.items()}
        layer.attention.core = _Shadow(bf16.attention.core, {"fused": core, **others})
        shadows.append(layer.attention.core)
    _losses(model, held_out[:2])
    names = ["bf16", "fused", *(k for k in VARIANTS if k in shadows[0].squares)]
    for row, name in zip(rows, names, strict=True):
        sums = torch.stack([s.squares[name] for s in shadows])
        per_layer = (sums[:, 0] / sums[:, 1]).sqrt()
        row["output_error"] = float((sums[:, 0].sum() / sums[:, 1].sum()).sqrt())
        row["output_error_worst_layer"] = float(per_layer.max())
    return {"text": data.description, "labels": sum(labels), "rows": rows}


def text(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "| attention | held-out loss | perplexity | loss minus bf16 | standard error | "
        "error of the output | worst layer |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['name']} | {r['loss']:.5f} | {r['perplexity']:.4f} | {r['loss_minus_bf16']:+.2e} | "
        f"{r['standard_error']:.1e} | {r['output_error']:.2e} | "
        f"{r['output_error_worst_layer']:.2e} |"
        for r in result["rows"]
    ]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", type=Path, required=True, help="folder of safetensors")
    parser.add_argument("--batches", type=int, default=0, help="held-out batches; 0: all")
    parser.add_argument("--out", help="write OUT.json and OUT.md")
    parser.add_argument("words", nargs="*", help="default: those of `bench curves --suite fp8`")


def main(args: argparse.Namespace) -> int:
    from fa3_train.bench.curves import hundred_million
    from fa3_train.bench.tables import machine, write_page

    result = {"what": "perplexity", "command": args.command, "machine": machine()}
    result |= measure(args.weights, args.words or hundred_million(), args.batches)
    print(text(result))
    if args.out:
        title = f"Held-out perplexity, {result['labels']:,} labels"
        write_page(result, args.out, text(result), title)
    return 0


def train(variant: str, words: Sequence[str]) -> int:
    """A run of the trainer whose attention is a variant."""
    from fa3_train.train import loop
    from fa3_train.train.compose import load

    build = loop.build_model

    def build_variant(config: Any, world: Any) -> nn.Module:
        model = build(config, world)
        install(model, VARIANTS[variant])
        return model

    loop.build_model = build_variant
    return loop.run(load(list(words)))


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in VARIANTS:
        sys.exit(f"usage: python -m {__spec__.name} {{{'|'.join(VARIANTS)}}} key=value ...")
    sys.exit(train(sys.argv[1], sys.argv[2:]))
