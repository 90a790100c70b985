"""Tables of README.md and docs/*.md, written from the result files and checked against them.

    python -m fa3_train.bench readme           # rewrite what lies between the marks
    python -m fa3_train.bench readme --check   # exit 1 where a document and its files differ

A document marks a place with a pair of lines

    <!-- measured: NAME -->
    <!-- end -->

and gets the table NAME between them, made from docs/results/*.json alone, under a line that says
on what it was measured. A mark without its file is an error: a document shows no number that is
not in the repository.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fa3_train.bench import curves_report, e2e, fp8_variants, head, layer, logging_cost, profile
from fa3_train.bench.tables import geometric_mean, rate, ratios

ROOT = Path(__file__).resolve().parents[2]
_MARK = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


class MissingResult(ValueError):
    """A document asks for a table whose result file is not there."""


def _read(name: str) -> dict[str, Any]:
    path = ROOT / "docs" / "results" / f"{name}.json"
    if not path.is_file():
        raise MissingResult(f"{path.relative_to(ROOT)} does not exist, but a document shows it")
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def _where(result: dict[str, Any], name: str) -> str:
    facts = result["machine"]
    torch = facts["torch"].split("+")[0]
    return (
        f"{facts.get('gpu', 'no GPU')}, CUDA {facts['cuda']}, torch {torch}, "
        f"cuDNN {facts.get('cudnn', '-')}, driver {facts.get('driver', '-')}: "
        f"`docs/results/{name}.json`"
    )


def _attention_grid() -> str:
    """Geometric means over the paper's grid, forward, backward and FP8."""
    lines = [
        "| | head dim | ours | FA3 | cuDNN | ours / FA3 | cells |",
        "|---|---|---|---|---|---|---|",
    ]
    seen = []
    for title, name, which in (
        ("forward bf16", "attention_paper", "fwd"),
        ("backward bf16", "attention_paper", "bwd"),
        ("forward FP8, block scales, two-level sums", "attention_fp8", "fwd"),
    ):
        result = _read(name)
        seen.append(_where(result, name))
        for dim in (64, 128, 256):
            cells = [c for c in result["cells"] if (c["group"], c["pass"]) == (f"d{dim}", which)]
            means = {
                peer: geometric_mean(r for c in cells if (r := rate(c, peer)))
                for peer in ("ours", "fa3", "cudnn")
            }
            shown = [f"{m:.0f}" if m == m else "" for m in means.values()]
            against = ratios(cells, "ours", "fa3")
            lines.append(
                f"| {title if dim == 64 else ''} | {dim} | {' | '.join(shown)} | "
                f"{geometric_mean(against):.2f} | {min(against):.2f} to {max(against):.2f} |"
            )
    return "\n".join([*dict.fromkeys(seen), "", *lines])


def _attention_training() -> str:
    """Geometric means of the training shapes."""
    result = _read("attention_training")
    lines = [
        "| shapes | pass | ours | FA3 | cuDNN | ours / FA3 | ours / cuDNN |",
        "|---|---|---|---|---|---|---|",
    ]
    for group, which in dict.fromkeys((c["group"], c["pass"]) for c in result["cells"]):
        cells = [c for c in result["cells"] if (c["group"], c["pass"]) == (group, which)]
        rates = [geometric_mean(r for c in cells if (r := rate(c, p)))
                 for p in ("ours", "fa3", "cudnn")]  # fmt: skip
        against = [geometric_mean(ratios(cells, "ours", p)) for p in ("fa3", "cudnn")]
        shown = [*(f"{x:.0f}" for x in rates), *(f"{x:.2f}" for x in against)]
        lines.append(f"| {group} | {which} | " + " | ".join(s.replace("nan", "") for s in shown)
                     + " |")  # fmt: skip
    return "\n".join([_where(result, "attention_training"), "", *lines])


def _end_to_end() -> str:
    """The few numbers of the end-to-end files that answer: what does it bring?"""
    stack, beside, saved = (_read(n) for n in ("e2e_mfu", "layer_te", "layer_backends"))
    lines = ["| | |", "|---|---|"]
    for cell in stack["cells"]:
        for row in cell["variants"].values():
            kind = "bf16" if cell["linear"] == "torch" else "FP8 linears"
            lines.append(
                f"| {cell['layers']} layers of Llama 3.1 8B with embedding and head, "
                f"{cell['seqlen'] // 1024}k, whole step, {kind} | {row['tflops_per_gpu']:.0f} "
                f"TFLOP/s, mfu_causal {row['mfu_causal']:.1%} |"
            )
    for mine, theirs in (
        ("ours bf16", "te bf16"),
        ("ours fp8", "te fp8"),
        ("ours fp8 + fp8 attention", "te fp8 + fp8 attention"),
    ):
        ratios_ = [
            f"{c['variants'][theirs]['fwdbwd']['ms'] / c['variants'][mine]['fwdbwd']['ms']:.2f} "
            f"({c['size']}, {c['seqlen'] // 1024}k)"
            for c in beside["cells"]
            if all("fwdbwd" in c["variants"].get(name, {}) for name in (mine, theirs))
        ]
        precision = theirs.removeprefix("te ")
        lines.append(
            f"| our layer's speed / te.TransformerLayer's, {precision}, forward and backward | "
            f"{', '.join(ratios_)} |"
        )
    for which, label in (("fwd", "forward"), ("fwdbwd", "training step")):
        for variant in ("cudnn", "ours bf16", "ours fp8"):
            shares = [
                f"{1 - c['variants'][variant][which]['ms'] / c['variants']['fa2'][which]['ms']:.1%}"
                for c in saved["cells"]
            ]
            lengths = ", ".join(f"{c['seqlen'] // 1024}k" for c in saved["cells"])
            lines.append(
                f"| {label} of a 405B layer (8-way tensor parallel sizes), time saved by attention "
                f"FA2 → {variant}, at {lengths} | {', '.join(shares)} |"
            )
    names = ("e2e_mfu", "layer_te", "layer_backends")
    where = [_where(r, n) for r, n in zip((stack, beside, saved), names, strict=True)]
    return "\n".join([*where, "", *lines])


def _made_by(module: Any, function: str, name: str) -> Callable[[], str]:
    def table() -> str:
        result = _read(name)
        return f"{_where(result, name)}\n\n{getattr(module, function)(result)}"

    return table


TABLES: dict[str, Callable[[], str]] = {
    "attention_grid": _attention_grid,
    "attention_training": _attention_training,
    "layer_te": _made_by(layer, "table", "layer_te"),
    "layer_backends": _made_by(layer, "table", "layer_backends"),
    "end_to_end": _end_to_end,
    "e2e": _made_by(e2e, "text", "e2e"),
    "e2e_recompute": _made_by(e2e, "text", "e2e_recompute"),
    "e2e_mfu": _made_by(e2e, "text", "e2e_mfu"),
    "head": _made_by(head, "text", "head"),
    "logging": _made_by(logging_cost, "text", "logging"),
    "curves_backends": _made_by(curves_report, "table", "curves_backends"),
    **{
        name: _made_by(curves_report, "table", name)
        for name in (
            "curves_emulated",
            "curves_emulated_ablation",
            "curves_fp8",
            "curves_ablation",
            "curves_deepspeed",
        )
    },
    "perplexity": _made_by(fp8_variants, "text", "perplexity"),
    "perplexity_emulated": _made_by(fp8_variants, "text", "perplexity_emulated"),
    "profile": _made_by(profile, "table", "profile"),
    "profile_fp8": _made_by(profile, "table", "profile_fp8"),
}


def rewritten(text: str) -> str:
    """A document with every marked place filled anew."""

    def fill(match: re.Match[str]) -> str:
        name = match.group(2)
        if name not in TABLES:
            raise MissingResult(f"unknown table '{name}'; known: {', '.join(TABLES)}")
        return f"{match.group(1)}{TABLES[name]()}\n{match.group(3)}"

    return _MARK.sub(fill, text)


def documents() -> list[Path]:
    """README.md and docs/*.md."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if it would")


def main(args: argparse.Namespace) -> int:
    stale = 0
    for path in documents():
        old = path.read_text()
        new = rewritten(old)
        if new != old:
            stale += 1
            print(f"{path.relative_to(ROOT)}: {'differs from' if args.check else 'written from'} "
                  "its result files")  # fmt: skip
            if not args.check:
                path.write_text(new)
    return int(args.check and stale > 0)
