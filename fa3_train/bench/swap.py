"""Step time before and after the attention is swapped, on the same model and data.

    python -m fa3_train.bench swap --framework hf --layers 8 --out docs/results/swap_hf
    python -m fa3_train.bench swap --framework te --out docs/results/swap_te

``hf``: a Llama-3-8B-shaped transformers model with as many layers as asked for; ``te``: a stack of
te.TransformerLayer of the same sizes. Both copies start from the same weights and see the same
random batches, so their losses may differ by the rounding of bf16 only; the table says by how much
over ``--loss-steps`` steps. Step = forward, backward and a fused AdamW step. The attention's share
is the time of the kernels whose names belong to attention over all kernels, from a profile of one
step of each.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fa3_train.bench.tables import machine

LLAMA3_8B = {
    "hidden_size": 4096, "ffn": 14336, "heads": 32, "kv_heads": 8, "vocab": 32768
}  # fmt: skip
# Substrings of kernel names of attention, ours and the peers'.
_ATTENTION = (
    "fa3::",
    "fwd_kernel",
    "bwd_",
    "flash",
    "fmha",
    "cudnn_generated",
    "attention",
    "attn",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--framework", choices=sorted(_MODELS), required=True)
    parser.add_argument("--before", default=None, help="hf: sdpa (default), flash_attention_2, ...")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10, help="timed, after 3 of warm-up")
    parser.add_argument("--loss-steps", type=int, default=100)
    parser.add_argument("--loss-seqlen", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--out", help="path without suffix: writes .json and .md")


class _Run:
    """One model with its optimizer; ``loss(batch)`` is its forward."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor], Tensor], lr: float) -> None:
        self.model, self.loss = model, loss
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)

    def step(self, batch: Tensor) -> Tensor:
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def _hf(args: argparse.Namespace, swapped: bool) -> _Run:
    from transformers import LlamaConfig, LlamaForCausalLM

    from fa3_train.integrations import hf

    size = LLAMA3_8B
    config = LlamaConfig(
        hidden_size=size["hidden_size"], intermediate_size=size["ffn"],
        num_attention_heads=size["heads"], num_key_value_heads=size["kv_heads"],
        num_hidden_layers=args.layers, vocab_size=size["vocab"], use_cache=False,
        max_position_embeddings=args.seqlen, rope_theta=500000.0,
    )  # fmt: skip
    name = hf.register(backend="hopper") if swapped else (args.before or "sdpa")
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(
            config, attn_implementation=name, dtype=torch.bfloat16
        )
    return _Run(model, lambda tokens: model(tokens, labels=tokens).loss, args.lr)


def _te(args: argparse.Namespace, swapped: bool) -> _Run:
    import transformer_engine.pytorch as te

    from fa3_train.integrations import transformer_engine as te_swap

    size = LLAMA3_8B
    torch.manual_seed(0)
    layers = nn.ModuleList(
        te.TransformerLayer(
            size["hidden_size"], size["ffn"], size["heads"], num_gqa_groups=size["kv_heads"],
            layernorm_epsilon=1e-5, hidden_dropout=0.0, attention_dropout=0.0, bias=False,
            self_attn_mask_type="causal", normalization="RMSNorm", activation="swiglu",
            attn_input_format="bshd", params_dtype=torch.bfloat16, layer_number=i + 1,
            fuse_qkv_params=True,
        )
        for i in range(args.layers)
    )  # fmt: skip
    model = nn.ModuleDict(
        {"embed": nn.Embedding(size["vocab"], size["hidden_size"]), "layers": layers,
         "head": nn.Linear(size["hidden_size"], size["vocab"], bias=False)}
    ).to("cuda", torch.bfloat16)  # fmt: skip
    if swapped:
        te_swap.patch(model, backend="hopper")

    def loss(tokens: Tensor) -> Tensor:
        x = model["embed"](tokens)
        for layer in layers:
            x = layer(x)
        logits = model["head"](x).flatten(0, 1)
        return nn.functional.cross_entropy(logits[:-1].float(), tokens.flatten()[1:])

    return _Run(model, loss, args.lr)


_MODELS: dict[str, Callable[[argparse.Namespace, bool], _Run]] = {"hf": _hf, "te": _te}


def _batches(args: argparse.Namespace, count: int, seqlen: int) -> list[Tensor]:
    g = torch.Generator("cuda").manual_seed(1)
    # A skewed distribution, so that there is something to learn in a hundred steps.
    weights = 1.0 / torch.arange(1, LLAMA3_8B["vocab"] + 1, device="cuda")
    return [
        torch.multinomial(weights, args.batch * seqlen, replacement=True, generator=g).view(
            args.batch, seqlen
        )
        for _ in range(count)
    ]


def _time(run: _Run, batches: list[Tensor]) -> list[float]:
    times = []
    for batch in batches:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run.step(batch)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return times


def _attention_share(run: _Run, batch: Tensor) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run.step(batch)
        torch.cuda.synchronize()
    kernels = [e for e in trace.key_averages() if e.self_device_time_total > 0]
    attention = {
        e.key[:120]: e.self_device_time_total / 1e3
        for e in kernels
        if any(word in e.key.lower() for word in _ATTENTION)
    }
    total = sum(e.self_device_time_total for e in kernels) / 1e3
    return {
        "attention_ms": sum(attention.values()),
        "kernels_ms": total,
        "share": sum(attention.values()) / total,
        "attention_kernels_ms": attention,
    }


def _losses(args: argparse.Namespace, swapped: bool, batches: list[Tensor]) -> list[float]:
    run = _MODELS[args.framework](args, swapped)
    losses = [run.step(batch) for batch in batches]
    values = torch.stack(losses).tolist()
    del run
    torch.cuda.empty_cache()
    return values


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both models in turn, step by step, in one process."""
    before, after = (_MODELS[args.framework](args, swapped) for swapped in (False, True))
    warm, timed = (_batches(args, n, args.seqlen) for n in (3, args.steps))
    runs = {"before": before, "after": after}
    for run in runs.values():
        _time(run, warm)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for batch in timed:
        for name, run in runs.items():
            times[name] += _time(run, [batch])
    result: dict[str, Any] = {
        "what": "swap",
        "framework": args.framework,
        "before": args.before or {"hf": "sdpa", "te": "TransformerEngine's choice"}[args.framework],
        "command": args.command,
        "machine": machine(),
        "settings": {k: getattr(args, k) for k in ("layers", "seqlen", "batch", "steps")},
        "step_ms": {name: statistics.median(x) for name, x in times.items()},
        "step_ms_all": times,
        "profile": {name: _attention_share(run, timed[0]) for name, run in runs.items()},
    }
    result["speedup"] = result["step_ms"]["before"] / result["step_ms"]["after"]
    del before, after, runs, run
    torch.cuda.empty_cache()
    if args.loss_steps:
        batches = _batches(args, args.loss_steps, args.loss_seqlen)
        losses = {name: _losses(args, name == "after", batches) for name in ("before", "after")}
        # The noise to judge by: the same model again from the same seed. Atomic additions in the
        # backward make two runs of one implementation differ as well.
        losses["before, again"] = _losses(args, False, batches)
        result["losses"] = losses
        result["loss_difference_max"] = {
            "after - before": _largest(losses["after"], losses["before"]),
            "before again - before": _largest(losses["before, again"], losses["before"]),
        }
    return result


def _largest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def table(result: dict[str, Any]) -> str:
    s, p = result["step_ms"], result["profile"]
    lines = [
        f"{result['framework']}: {result['settings']} on {result['machine'].get('gpu')}",
        f"| | {result['before']} | fa3_train | ratio |",
        "|---|---|---|---|",
        f"| step ms | {s['before']:.1f} | {s['after']:.1f} | {result['speedup']:.3f} |",
        f"| attention ms | {p['before']['attention_ms']:.2f} | {p['after']['attention_ms']:.2f} | "
        f"{p['before']['attention_ms'] / max(p['after']['attention_ms'], 1e-9):.3f} |",
        f"| attention share | {p['before']['share']:.1%} | {p['after']['share']:.1%} | |",
    ]
    if "losses" in result:
        d, losses = result["loss_difference_max"], result["losses"]
        lines += [
            f"| last loss | {losses['before'][-1]:.5f} | {losses['after'][-1]:.5f} | |",
            f"| largest difference over {len(losses['before'])} steps | "
            f"{d['before again - before']:.2e} (itself again) | {d['after - before']:.2e} | |",
        ]
    return "\n".join(lines)


def main(args: argparse.Namespace) -> int:
    result = measure(args)
    print(table(result))
    if args.out:
        out = Path(args.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        out.with_suffix(".md").write_text(f"`{args.command}`\n\n{table(result)}\n")
        print(f"wrote {out}.json, {out}.md")
    return 0
