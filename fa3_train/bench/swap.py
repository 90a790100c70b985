"""Step time before and after the attention is swapped: one model, switched in place.

    python -m fa3_train.bench swap --framework hf --layers fit --out docs/results/swap_hf
    python -m fa3_train.bench swap --framework te --layers fit --out docs/results/swap_te

``hf``: a Llama-3-8B-shaped transformers model and its registration; ``sdpa``: the same model under
``sdpa_replacement``; ``torch``: the same with torch's flash backend and our kernels behind it;
``te``: a stack of te.TransformerLayer of the same sizes, patched. ``--layers fit`` takes as many of
the 32 as the memory holds, by the peaks of a model of one and of two layers. Step = forward,
backward, a fused AdamW step, bf16 weights and moments, no recomputation.

Time: the two attentions take turns step by step on the same weights, since a GPU's clock wanders.
The attention's share is the time of the kernels that :data:`ATTENTION` names over all kernels, in a
profile of one step of each; the table lists the names, so that a wrong attribution can be seen.

Losses: ``--loss-layers`` layers, ``--loss-steps`` steps with a warm-up of a fifth of them, from the
same seed on the same batches, with four attentions: before, after, before again, and another that
nobody doubts (torch's FlashAttention-2; for ``torch``, which starts from it, cuDNN). The distance
of that one is bf16 noise: two right kernels that round in another order. Ours may be twice that
away. (``before`` again is the first kernel beside itself: the order of its atomic additions.)
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fa3_train.bench.tables import machine, write_page

LLAMA3_8B = {"hidden": 4096, "ffn": 14336, "heads": 32, "kv_heads": 8, "vocab": 32768}
LAYERS = 32
# Parts of the names of attention kernels: ours, FlashAttention's in torch, cuDNN's, CUTLASS's.
ATTENTION = ("fa3::", "pytorch_flash", "flash::", "flash_fprop", "flash_bprop", "sdpa", "fmha")
# Share of the memory that ``fit`` plans with: fragments and workspaces want the rest.
_FILL = 0.90


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--framework", choices=sorted(_MODELS), required=True)
    parser.add_argument("--before", default="sdpa", help="hf: the attn_implementation to replace")
    parser.add_argument("--layers", default="4", help="a number, or 'fit'")
    parser.add_argument("--seqlen", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8, help="timed per attention, after 2")
    parser.add_argument("--loss-steps", type=int, default=100, help="0 leaves the losses out")
    parser.add_argument("--loss-layers", type=int, default=8)
    parser.add_argument("--loss-seqlen", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--out", help="path without suffix: writes .json and .md")


@dataclass
class _Model:
    """A model, and how to run it with one attention or another.

    ``use`` maps ``before``, ``after`` and ``other`` to a function that makes the switch and returns
    a context to run the steps in.
    """

    module: nn.Module
    loss: Callable[[Tensor], Tensor]
    use: dict[str, Callable[[], Any]]


def _flash_attention_2() -> Any:
    """torch's copy of FlashAttention-2, and no other kernel of its scaled_dot_product_attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.FLASH_ATTENTION)


def _llama(args: argparse.Namespace, layers: int, seqlen: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = LLAMA3_8B
    config = LlamaConfig(
        hidden_size=size["hidden"], intermediate_size=size["ffn"], vocab_size=size["vocab"],
        num_attention_heads=size["heads"], num_key_value_heads=size["kv_heads"],
        num_hidden_layers=layers, use_cache=False, max_position_embeddings=seqlen,
        rope_theta=500000.0,
    )  # fmt: skip
    with torch.device("cuda"):
        return LlamaForCausalLM._from_config(
            config, attn_implementation=args.before, dtype=torch.bfloat16
        )


def _hf(args: argparse.Namespace, layers: int, seqlen: int) -> _Model:
    from fa3_train.integrations import hf

    model = _llama(args, layers, seqlen)
    name = hf.register(backend="hopper")

    def switch(implementation: str, context: Any = None) -> Any:
        model.set_attn_implementation(implementation)
        return context or contextlib.nullcontext()

    return _Model(
        model,
        lambda tokens: model(tokens, labels=tokens).loss,
        {
            "before": lambda: switch(args.before),
            "after": lambda: switch(name),
            "other": lambda: switch("sdpa", _flash_attention_2()),
        },
    )


def _sdpa(args: argparse.Namespace, layers: int, seqlen: int) -> _Model:
    from fa3_train.integrations.sdpa import sdpa_replacement

    model = _llama(args, layers, seqlen)
    return _Model(
        model,
        lambda tokens: model(tokens, labels=tokens).loss,
        {
            "before": contextlib.nullcontext,
            "after": lambda: sdpa_replacement(backend="hopper"),
            "other": _flash_attention_2,
        },
    )


@contextlib.contextmanager
def _registered() -> Iterator[None]:
    from torch.nn import attention

    from fa3_train.integrations import torch_flash

    attention.activate_flash_attention_impl(torch_flash.register(backend="hopper"))
    try:
        with _flash_attention_2():  # the backend, which is ours for the moment
            yield
    finally:
        attention.restore_flash_attention_impl()


def _torch(args: argparse.Namespace, layers: int, seqlen: int) -> _Model:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = _llama(args, layers, seqlen)
    return _Model(
        model,
        lambda tokens: model(tokens, labels=tokens).loss,
        {
            "before": _flash_attention_2,
            "after": _registered,
            "other": lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
        },
    )


def _te(args: argparse.Namespace, layers: int, seqlen: int) -> _Model:
    import transformer_engine.pytorch as te

    from fa3_train.integrations import transformer_engine as te_swap

    size = LLAMA3_8B
    stack = nn.ModuleList(
        te.TransformerLayer(
            size["hidden"], size["ffn"], size["heads"], num_gqa_groups=size["kv_heads"],
            layernorm_epsilon=1e-5, hidden_dropout=0.0, attention_dropout=0.0, bias=False,
            self_attn_mask_type="causal", normalization="RMSNorm", activation="swiglu",
            attn_input_format="bshd", params_dtype=torch.bfloat16, layer_number=i + 1,
            fuse_qkv_params=True,
        )
        for i in range(layers)
    )  # fmt: skip
    angles = te.RotaryPositionEmbedding(size["hidden"] // size["heads"])(seqlen).cuda()
    ends: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    model = nn.ModuleDict(
        {"embed": nn.Embedding(size["vocab"], size["hidden"], **ends), "layers": stack,
         "norm": te.RMSNorm(size["hidden"], eps=1e-5, **ends),
         "head": nn.Linear(size["hidden"], size["vocab"], bias=False, **ends)}
    )  # fmt: skip
    with torch.no_grad():
        model["embed"].weight.mul_(0.02)

    def loss(tokens: Tensor) -> Tensor:
        x = model["embed"](tokens)
        for layer in stack:
            x = layer(x, rotary_pos_emb=angles)
        logits = model["head"](model["norm"](x))[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits.float(), tokens[:, 1:].flatten())

    def switch(backend: str | None) -> Any:
        te_swap.unpatch(model)
        if backend is not None:
            te_swap.patch(model, backend=backend)
        return _flash_attention_2() if backend == "sdpa" else contextlib.nullcontext()

    return _Model(
        model, loss,
        {"before": lambda: switch(None), "after": lambda: switch("hopper"),
         "other": lambda: switch("sdpa")},
    )  # fmt: skip


_MODELS: dict[str, Callable[[argparse.Namespace, int, int], _Model]] = {
    "hf": _hf, "sdpa": _sdpa, "torch": _torch, "te": _te,
}  # fmt: skip
_FLASH = "torch's FlashAttention-2"


def _build(args: argparse.Namespace, layers: int, seqlen: int) -> tuple[_Model, Any]:
    torch.manual_seed(0)
    model = _MODELS[args.framework](args, layers, seqlen)
    return model, torch.optim.AdamW(model.module.parameters(), lr=args.lr, fused=True)


def _release() -> None:
    gc.collect()  # models refer to themselves
    torch.cuda.empty_cache()


def _step(model: _Model, optimizer: Any, batch: Tensor) -> Tensor:
    loss = model.loss(batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def _batches(args: argparse.Namespace, count: int, seqlen: int) -> list[Tensor]:
    g = torch.Generator("cuda").manual_seed(1)
    # A skewed distribution, so that there is something to learn in a hundred steps.
    weights = 1.0 / torch.arange(1, LLAMA3_8B["vocab"] + 1, device="cuda")
    drawn = torch.multinomial(weights, count * args.batch * seqlen, replacement=True, generator=g)
    return list(drawn.view(count, args.batch, seqlen))


def _peak(args: argparse.Namespace, layers: int, batch: Tensor) -> int:
    """Bytes at the peak of two steps (the second one has the optimizer's moments throughout)."""
    model, optimizer = _build(args, layers, args.seqlen)
    with model.use["before"]():
        _step(model, optimizer, batch)
        torch.cuda.reset_peak_memory_stats()
        _step(model, optimizer, batch)
    return torch.cuda.max_memory_allocated()


def fitting_layers(args: argparse.Namespace) -> tuple[int, dict[str, float]]:
    """How many layers the memory holds, at most 32, and the figures it follows from."""
    batch = _batches(args, 1, args.seqlen)[0]
    peaks = []
    for layers in (1, 2):
        peaks.append(_peak(args, layers, batch))
        _release()
    each = peaks[1] - peaks[0]
    total = torch.cuda.get_device_properties(0).total_memory
    layers = min(LAYERS, int((_FILL * total - peaks[0]) // each) + 1)
    gib = {"total_gib": total, "one_layer_gib": peaks[0], "each_further_layer_gib": each}
    return layers, {name: round(value / 2**30, 2) for name, value in gib.items()}


def _times(args: argparse.Namespace, model: _Model, optimizer: Any) -> dict[str, list[float]]:
    batches = _batches(args, 2 + args.steps, args.seqlen)
    times: dict[str, list[float]] = {"before": [], "after": []}
    for batch in batches:
        for name, list_ in times.items():
            with model.use[name]():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                _step(model, optimizer, batch)
                end.record()
                torch.cuda.synchronize()
            list_.append(start.elapsed_time(end))
    return {name: list_[2:] for name, list_ in times.items()}


def _profile(args: argparse.Namespace, model: _Model, optimizer: Any, name: str) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    batch = _batches(args, 1, args.seqlen)[0]
    with model.use[name](), profile(activities=[ProfilerActivity.CUDA]) as trace:
        _step(model, optimizer, batch)
        torch.cuda.synchronize()
    kernels = {
        e.key: e.self_device_time_total / 1e3
        for e in trace.key_averages()
        if e.self_device_time_total > 0
    }
    attention = {
        key[:160]: ms for key, ms in kernels.items() if any(part in key for part in ATTENTION)
    }
    rest = sorted(((ms, key[:160]) for key, ms in kernels.items() if key[:160] not in attention))
    total = sum(kernels.values())
    return {
        "attention_ms": sum(attention.values()),
        "kernels_ms": total,
        "share": sum(attention.values()) / total,
        "attention_kernels_ms": attention,
        "largest_others_ms": {key: ms for ms, key in rest[:-13:-1]},
    }


def _losses(args: argparse.Namespace, name: str, batches: list[Tensor]) -> list[float]:
    model, optimizer = _build(args, args.loss_layers, args.loss_seqlen)
    warm_up = max(len(batches) // 5, 1)
    losses = []
    with model.use[name]():
        for i, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, (i + 1) / warm_up)
            losses.append(_step(model, optimizer, batch))
    return torch.stack(losses).tolist()


def _distance(a: list[float], b: list[float]) -> dict[str, float]:
    differences = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return {"largest": max(differences), "mean": statistics.fmean(differences)}


def measure_time(args: argparse.Namespace) -> dict[str, Any]:
    """Both attentions in turn on one model: the result without losses."""
    fit: dict[str, float] = {}
    if args.layers == "fit":
        layers, fit = fitting_layers(args)
    else:
        layers = int(args.layers)
    model, optimizer = _build(args, layers, args.seqlen)
    times = _times(args, model, optimizer)
    step = {name: statistics.median(x) for name, x in times.items()}
    return {
        "what": "swap",
        "framework": args.framework,
        "before": {
            "hf": args.before, "sdpa": "torch's choice", "torch": _FLASH,
            "te": "TransformerEngine's choice",
        }[args.framework],
        "other": "torch's cuDNN attention" if args.framework == "torch" else _FLASH,
        "command": args.command,
        "machine": machine(),
        "settings": {"layers": layers, "seqlen": args.seqlen, "batch": args.batch,
                     "steps": args.steps, **LLAMA3_8B},
        "memory": {**fit, "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)},
        "step_ms": step,
        "step_ms_all": times,
        "speedup": step["before"] / step["after"],
        "profile": {name: _profile(args, model, optimizer, name) for name in times},
    }  # fmt: skip


def add_losses(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Four runs of ``--loss-steps`` steps from one seed: how far apart their losses are."""
    batches = _batches(args, args.loss_steps, args.loss_seqlen)
    losses = {}
    for label, name in (
        ("before", "before"), ("again", "before"), ("other", "other"), ("after", "after")
    ):  # fmt: skip
        losses[label] = _losses(args, name, batches)
        _release()
    distances = {
        label: _distance(losses[label], losses["before"]) for label in ("again", "other", "after")
    }
    ours, noise = distances["after"], distances["other"]
    result["losses"] = {
        "settings": {"layers": args.loss_layers, "seqlen": args.loss_seqlen, "lr": args.lr},
        "curves": losses,
        "distance_from_before": distances,
        "within_noise": all(ours[k] <= 2 * noise[k] for k in noise),
    }


def table(result: dict[str, Any]) -> str:
    s, p, size = result["step_ms"], result["profile"], result["settings"]
    lines = [
        f"{result['framework']}: {size['layers']} layers of Llama-3-8B, {size['batch']} x "
        f"{size['seqlen']} tokens, {result['memory']['peak_gib']} GiB, "
        f"{result['machine'].get('gpu')}",
        "",
        f"| | {result['before']} | fa3_train | ratio |",
        "|---|---|---|---|",
        f"| step ms | {s['before']:.1f} | {s['after']:.1f} | {result['speedup']:.3f} |",
        f"| attention ms | {p['before']['attention_ms']:.2f} | {p['after']['attention_ms']:.2f} | "
        f"{p['before']['attention_ms'] / max(p['after']['attention_ms'], 1e-9):.3f} |",
        f"| attention share | {p['before']['share']:.1%} | {p['after']['share']:.1%} | |",
    ]
    if "losses" in result:
        x = result["losses"]
        curves, distances = x["curves"], x["distance_from_before"]
        lines += [
            "",
            f"Losses over {len(curves['before'])} steps ({x['settings']['layers']} layers, "
            f"{x['settings']['seqlen']} tokens a step, peak lr {x['settings']['lr']}):",
            "",
            "| | first | last | mean of last 10 | largest distance | mean distance |",
            "|---|---|---|---|---|---|",
        ]
        names = {
            "before": result["before"], "again": f"{result['before']}, again",
            "other": result["other"], "after": "fa3_train",
        }  # fmt: skip
        for label, name in names.items():
            c, d = curves[label], distances.get(label)
            far = f"{d['largest']:.2e} | {d['mean']:.2e}" if d else "- | -"
            tail = statistics.fmean(c[-10:])
            lines.append(f"| {name} | {c[0]:.5f} | {c[-1]:.5f} | {tail:.5f} | {far} |")
        verdict = "within" if x["within_noise"] else "OUTSIDE"
        lines += ["", f"fa3_train is {verdict} twice the distance of {result['other']}."]
    return "\n".join(lines)


def _write(result: dict[str, Any], out: str) -> None:
    names = [
        f"- {which}: " + "; ".join(
            f"`{key[:90]}` {ms:.2f} ms" for key, ms in p["attention_kernels_ms"].items()
        )
        for which, p in result["profile"].items()
    ]  # fmt: skip
    counted = "Counted as attention:\n\n" + "\n".join(names)
    write_page(result, out, f"{table(result)}\n\n{counted}")


def main(args: argparse.Namespace) -> int:
    result = measure_time(args)
    if args.out:  # what is measured stays, whatever happens to the losses
        _write(result, args.out)
    _release()
    if args.loss_steps:
        add_losses(args, result)
    print(table(result))
    if args.out:
        _write(result, args.out)
        print(f"wrote {args.out}.json, {args.out}.md")
    return 0
