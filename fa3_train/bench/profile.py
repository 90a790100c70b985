"""Where each millisecond of a training step goes, and how far each part is from its roofline.

    python -m fa3_train.bench profile --out docs/results/profile recipe=llama3_8b ... [key=value]

Takes steps of the real `Trainer` under torch's profiler, writes the trace (Chrome format, gzip;
Perfetto opens it), and sums GPU time by component. A kernel belongs to a component by its name, and
to a phase by when the host launched it: host ranges are opened around the engine's forward,
backward and step and around the output head.

"Possible" is the larger of FLOPs over the rate of a large cuBLAS product and bytes over the rate of
a large copy, both measured just before, on the same GPU: a part that runs at 100 % is as good as a
plain GEMM or a plain copy of the same work. FLOPs are what the component must compute (the
attention backward five products against its forward's two), bytes what it must read and write
once. Idle is time in which no kernel runs.
"""

from __future__ import annotations

import argparse
import bisect
import gzip
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fa3_train.bench.tables import machine
from fa3_train.bench.trainer import SIZES
from fa3_train.models.config import ModelConfig
from fa3_train.train.compose import load
from fa3_train.train.config_rules import check_combination
from fa3_train.train.engines import start_world, stop_world
from fa3_train.train.loop import Trainer
from fa3_train.train.signals import StopSignal

# The first pattern that a kernel's name contains says what it does. Attention comes before GEMM:
# names of attention kernels made with CUTLASS contain its name too.
COMPONENTS: tuple[tuple[str, str], ...] = (
    ("attention backward", r"bwd_(prepare|fused|keys|queries|finish|sum)|flash_bwd|bprop"),
    ("attention forward", r"attn_fwd_kernel|attn_varlen_order|fp8_(fwd|plan)_|flash_fwd|fprop"),
    ("rope and quantize", r"rope_kernel|token_kernel|block_kernel|tile_kernel|dequantize_kernel"),
    ("cross-entropy", r"_row_kernel|softmax"),
    ("gradient sums", r"_scaled_sum|index_add|indexFunc|sum_and_scatter|compute_grad_weight"),
    ("swiglu", r"swiglu|dgated|gated_act|silu"),
    ("norm", r"rms_?norm|layer_?norm|RMSNorm|LayerNorm|ln_(fwd|bwd)|GammaBeta"),
    ("fp8 casts", r"cast_transpose|transpose_optimized|transformer_engine.*(amax|quantize|scale)"),
    ("optimizer", r"[aA]dam|LpNorm|multi_tensor|multi_tensor_apply"),
    ("gemm", r"nvjet|gemm|cutlass|xmma|splitK|cublas"),
    ("torch.compile", r"^triton_"),
    ("copies", r"Memcpy|Memset|direct_copy|CatArray|FillFunctor"),
    ("embedding", r"embedding|index_select|indexSelect"),
)
OTHER = "adds and other element-wise"
PHASES = ("forward", "head", "backward", "optimizer", "between")


def component_of(kernel: str) -> str:
    """The component that a kernel's (demangled) name stands for."""
    for name, pattern in COMPONENTS:
        if re.search(pattern, kernel):
            return name
    return OTHER


class _Ranges:
    """Host ranges by name; answers which one was open at a moment, inner ones first."""

    def __init__(self, events: Iterable[dict[str, Any]]) -> None:
        self._spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for event in events:
            if event.get("cat") == "user_annotation" and event["name"].startswith("fa3:"):
                self._spans[event["name"][4:]].append((event["ts"], event["ts"] + event["dur"]))
        for spans in self._spans.values():
            spans.sort()

    def begin_of_last(self, name: str, count: int) -> float:
        """Start of the last ``count`` ranges of a name; -inf where there are fewer."""
        spans = self._spans.get(name, [])
        return spans[-count][0] if len(spans) >= count else float("-inf")

    def at(self, moment: float) -> str:
        for name in ("head", "forward", "backward", "optimizer"):
            spans = self._spans.get(name, [])
            place = bisect.bisect_right(spans, (moment, float("inf"))) - 1
            if place >= 0 and spans[place][1] >= moment:
                return name
        return "between"


def analyse(events: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """GPU milliseconds of one step from the events of a Chrome trace.

    Looks at the last ``steps`` ranges "fa3:step": the profiler's own start falls into an earlier
    one. Where kernels overlap (a dependent launch waits on the GPU for the one before it), the time
    belongs to the one that began first, so that components and idle time add up to the window.

    Returns {"window_ms", "busy_ms", "idle_ms", "components": {component: {phase: ms}},
    "kernels": [the longest, with name, phase, component, ms and calls]}.
    """
    ranges = _Ranges(events)
    begin = ranges.begin_of_last("step", steps)
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event["args"]
    }
    table: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    kernels: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    device = sorted((e for e in events if e.get("cat") in kinds), key=lambda e: float(e["ts"]))
    busy, first, end = 0.0, None, float("-inf")
    for event in device:
        moment = launched.get(event["args"].get("correlation"), float("-inf"))
        if moment < begin:
            continue
        start, stop = event["ts"], event["ts"] + event["dur"]
        first = start if first is None else first
        own = max(0.0, stop - max(start, end))
        end = max(end, stop)
        busy += own
        phase = ranges.at(moment)
        table[component_of(event["name"])][phase] += own / 1e3 / steps
        entry = kernels[event["name"], phase]
        entry[0] += own / 1e3 / steps
        entry[1] += 1
    window = end - first if first is not None else 0.0
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:40]
    return {
        "window_ms": window / 1e3 / steps,
        "busy_ms": busy / 1e3 / steps,
        "idle_ms": (window - busy) / 1e3 / steps,
        "components": {name: dict(phases) for name, phases in table.items()},
        "kernels": [
            {"name": name[:160], "phase": phase, "component": component_of(name),
             "ms": ms, "calls": calls / steps}
            for (name, phase), (ms, calls) in longest
        ],
    }  # fmt: skip


def needed(
    model: ModelConfig, tokens: int, sum_sq: int, accumulation: int
) -> dict[str, tuple[float, float, float]]:
    """{component: (bf16 FLOPs, FP8 FLOPs, bytes)} that one optimizer step cannot do without.

    ``tokens`` and ``sum_sq`` (squared document lengths) are of the whole step.
    """
    t, h, f, layers = tokens, model.hidden_size, model.ffn_hidden_size, model.num_layers
    again = 0 if model.activation_checkpointing == "none" else 1
    weights = model.matmul_parameters() - model.embedding_parameters()
    core = float(layers * model.num_heads * model.head_dim) * sum_sq
    linears = (6.0 + 2.0 * again) * weights * t
    fp8 = model.linear == "te_fp8"
    rotated = model.q_size + model.kv_size
    full = model.activation_checkpointing == "full"
    fp8_attention = model.attention_precision == "fp8"
    forward = 2.0 * core * (2 if full else 1)
    parameters, table = model.num_parameters(), model.embedding_parameters()
    stream = 2.0 * t * h  # one pass over the residual stream
    if model.linear == "torch":  # norms that add the residual, and its gradient
        norms, adds = 6 * (1 + again) + 8, 3 * (1 + again)
    else:
        norms, adds = 4 * (1 + again) + 6, 3 * (2 * (1 + again) + 2)
    work = {
        "gemm, layers": (0.0 if fp8 else linears, linears if fp8 else 0.0, 0.0),
        "gemm, head": (6.0 * model.embedding_parameters() * t, 0.0, 0.0),
        "attention forward": (0.0 if fp8_attention else forward, forward * fp8_attention, 0.0),
        "attention backward": (5.0 * core, 0.0, 0.0),
        "rope and quantize": (0.0, 0.0, 2.0 * (2 + again) * 2 * t * rotated * layers),
        "norm": (0.0, 0.0, stream * (layers * norms + 5)),
        "swiglu": (0.0, 0.0, 2.0 * t * f * layers * (3 * (1 + again) + 5)),
        "cross-entropy": (0.0, 0.0, 2.0 * 3 * t * model.vocab_size),
        OTHER: (0.0, 0.0, stream * layers * adds),
        # The head's gradient is scaled into the FP32 sums; the embedding's are cleared, and hit in
        # the rows of the batch's tokens.
        "gradient sums": (0.0, 0.0, table * (8.0 + 12.0 * (accumulation - 1))),
        "copies": (0.0, 0.0, table * 4.0),
        # AdamW reads four FP32 numbers and writes three; the norm reads one; a bf16 copy.
        "optimizer": (0.0, 0.0, parameters * (28.0 + 4.0 + 2.0)),
    }
    if fp8:  # there they read and write FP8 in ways of TransformerEngine's own
        for name in ("norm", "swiglu"):
            del work[name]
    return work


def ceilings() -> dict[str, float]:
    """TFLOP/s of 8192^3 products (bf16, and FP8 with fast sums) and GB/s of a copy of 1 GiB."""

    def rate(call: Any, work: float, reps: int) -> float:
        for _ in range(3):
            call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(reps):
            call()
        end.record()
        torch.cuda.synchronize()
        return work * reps / start.elapsed_time(end) * 1e3

    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    result = {"bf16_tflops": rate(lambda: torch.mm(a, b, out=out), 2.0 * n**3, 20) / 1e12}
    x, y = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    one = torch.ones((), device="cuda")
    options: dict[str, Any] = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    result["fp8_tflops"] = (
        rate(lambda: torch._scaled_mm(x, y, one, one, **options), 2.0 * n**3, 20) / 1e12
    )
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    result["copy_gbs"] = rate(lambda: target.copy_(source), 2.0 * source.numel(), 10) / 1e9
    return result


def roofline(
    components: dict[str, dict[str, float]],
    work: dict[str, tuple[float, float, float]],
    limits: dict[str, float],
) -> list[dict[str, Any]]:
    """Rows of achieved against possible milliseconds, the longest first."""
    spent: dict[str, float] = {}
    for name, phases in components.items():
        if name == "gemm":
            spent["gemm, head"] = phases.get("head", 0.0)
            spent["gemm, layers"] = sum(phases.values()) - spent["gemm, head"]
        else:
            spent[name] = sum(phases.values())
    rows = []
    for name, ms in sorted(spent.items(), key=lambda item: -item[1]):
        if ms < 1e-3:
            continue
        row: dict[str, Any] = {"component": name, "ms": ms}
        if name in work:
            bf16, fp8, bytes_ = work[name]
            computing = bf16 / limits["bf16_tflops"] + fp8 / limits["fp8_tflops"]
            possible = max(computing / 1e9, bytes_ / limits["copy_gbs"] / 1e6)
            row |= {"tflop": (bf16 + fp8) / 1e12, "gb": bytes_ / 1e9, "possible_ms": possible}
            row["rate"] = (
                f"{(bf16 + fp8) / ms / 1e9:.0f} TFLOP/s"
                if bf16 + fp8
                else f"{bytes_ / ms / 1e6:,.0f} GB/s"
            )
        rows.append(row)
    return rows


def table(result: dict[str, Any]) -> str:
    """Two tables: components by phase, then achieved against possible."""
    profile, window = result["profile"], result["profile"]["window_ms"]
    lines = ["| component | " + " | ".join(PHASES) + " | ms | of the step |",
             "|---" * (len(PHASES) + 3) + "|"]  # fmt: skip
    parts = sorted(profile["components"].items(), key=lambda item: -sum(item[1].values()))
    for name, phases in parts:
        total = sum(phases.values())
        cells = " | ".join(f"{phases[p]:.2f}" if phases.get(p) else "" for p in PHASES)
        lines.append(f"| {name} | {cells} | {total:.2f} | {total / window:.1%} |")
    blank = " | ".join("" for _ in PHASES)
    idle = profile["idle_ms"]
    lines.append(f"| idle | {blank} | {idle:.2f} | {idle / window:.1%} |")
    lines.append(f"| step | {blank} | {window:.2f} | 100% |")
    limits = ", ".join(f"{name} {value:,.0f}" for name, value in result["ceilings"].items())
    lines += ["", f"measured ceilings: {limits}", "",
              "| component | ms | achieved | possible ms | possible / achieved |",
              "|---|---|---|---|---|"]  # fmt: skip
    for row in result["roofline"]:
        if "possible_ms" in row:
            share = row["possible_ms"] / row["ms"]
            lines.append(
                f"| {row['component']} | {row['ms']:.2f} | {row['rate']} | "
                f"{row['possible_ms']:.2f} | {share:.0%} |"
            )
        else:
            lines.append(f"| {row['component']} | {row['ms']:.2f} | | | |")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=SIZES, default="llama3_8b_layers")
    parser.add_argument("--steps", type=int, default=2, help="profiled steps")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them")
    parser.add_argument("--out", help="path without suffix: writes .json, .md and .trace.json.gz")
    parser.add_argument("words", nargs="*", help="key=value, as on the command line of a run")


def _annotate(trainer: Trainer) -> None:
    """Host ranges around the engine's calls and the head; for the rest of the trainer's life."""
    engine: Any = trainer.engine

    def ranged(name: str, call: Any) -> Any:
        def inside(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function(f"fa3:{name}"):
                return call(*args, **kwargs)

        return inside

    for name, method in (("forward", "forward"), ("backward", "backward"), ("optimizer", "step")):
        setattr(engine, method, ranged(name, getattr(engine, method)))
    head = engine.model.head
    head.forward = ranged("head", head.forward)


def take(words: list[str], warmup: int, steps: int, trace: Path) -> dict[str, Any]:
    """Profile ``steps`` steps of the run that ``words`` describe into ``trace``."""
    total = warmup + steps + 2
    fixed = ["checkpoint=none", "run.eval_batches=0", "logging=quiet", "logging.attention_every=0",
             f"run.steps={total}", f"logging.every={total}"]  # fmt: skip
    last = {word.split("=", 1)[0]: word for word in [*words, *fixed]}
    with tempfile.TemporaryDirectory() as folder, StopSignal() as stop:
        config = load([*last.values(), f"run.dir={folder}"])
        world = start_world(config)
        check_combination(config, world.size)
        limits = ceilings()
        trainer = Trainer(config, world, stop)
        _annotate(trainer)
        for _ in range(warmup):
            trainer.advance()
        torch.cuda.synchronize()
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        counted = [0, 0]
        count = trainer.meter.count

        def counting(batch: Any) -> None:
            counted[0] += int(batch.num_tokens)
            counted[1] += int(batch.sum_sq_seqlen)
            count(batch)

        trainer.meter.count = counting  # type: ignore[method-assign]
        with torch.profiler.profile(activities=kinds) as profiler:
            for _ in range(steps + 1):
                with torch.profiler.record_function("fa3:step"):
                    trainer.advance()
            torch.cuda.synchronize()
        profiler.export_chrome_trace(str(trace))
        trainer.logger.close()
        accumulation, model = trainer.engine.accumulation, config.model_config()
    tokens, sum_sq = (value // (steps + 1) for value in counted)
    return {
        "what": "profile", "machine": machine(), "words": list(last.values()),
        "ceilings": limits, "tokens": tokens, "sum_sq": sum_sq, "accumulation": accumulation,
        "work": needed(model, tokens, sum_sq, accumulation),
    }  # fmt: skip


def main(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        words = [*SIZES[args.size], "attention=hopper", *args.words]
        result = take(words, args.warmup, args.steps, trace)
        stop_world()
        text = trace.read_bytes()
    result["command"] = args.command
    result["profile"] = analyse(json.loads(text)["traceEvents"], args.steps)
    components = result["profile"]["components"]
    result["roofline"] = roofline(components, result["work"], result["ceilings"])
    print(table(result))
    if args.out:
        out = Path(args.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{out}.json").write_text(json.dumps(result, indent=1) + "\n")
        facts = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
        Path(f"{out}.md").write_text(f"    {args.command}\n\n{facts}\n\n{table(result)}\n")
        Path(f"{out}.trace.json.gz").write_bytes(gzip.compress(text, 9))
        print(f"wrote {out}.json, {out}.md, {out}.trace.json.gz")
    return 0
