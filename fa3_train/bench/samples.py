"""torch's own samples of scaled_dot_product_attention, run through our replacement.

    python -m fa3_train.bench samples --device cuda --backend hopper --out docs/results/samples_gpu

The inputs are those of torch's operator tests (``OpInfo`` of
``nn.functional.scaled_dot_product_attention``): dense, batched, broadcast, causal of unequal
lengths, with masks and dropout. Each sample is taken as given and with non-contiguous tensors. A
sample passes where the output and the three gradients are within the project's rule (twice the
error against fp64 of the plain formula in the sample's dtype); one that
:func:`fa3_train.integrations.sdpa.supports` refuses counts as refused, with its reason. fp64
samples are compared with torch's result by ``torch.testing.assert_close`` and its default
tolerances, and go through ``torch.autograd.gradcheck`` in its fast mode, as in torch's tests.

Needs the package expecttest, which torch's testing module imports.
"""

from __future__ import annotations

import argparse
import collections
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fa3_train.bench.tables import machine, write_page
from fa3_train.integrations import sdpa
from fa3_train.numerics import compare

OPERATOR = "nn.functional.scaled_dot_product_attention"
DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default=None, help="default: hopper on cuda, else reference")
    parser.add_argument(
        "--dtypes", nargs="+", choices=sorted(DTYPES), help="default: what the device serves"
    )
    parser.add_argument("--out", help="path without suffix: writes .json and .md")


def torch_samples(device: str, dtype: torch.dtype) -> list[Any]:
    """torch's SampleInputs: ``input`` (q), ``args`` (k, v), ``kwargs``, with gradients required.

    Raises:
        ImportError: expecttest is not installed.
    """
    from torch.testing._internal.common_methods_invocations import op_db

    (operator,) = (op for op in op_db if op.name == OPERATOR)
    return list(operator.sample_inputs(device, dtype, requires_grad=True))


def _dout(out: Tensor, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(out.shape, dtype=torch.float64).to(out.device, dtype)


def _formula(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, attn_mask: None = None,
) -> Tensor:  # fmt: skip
    """softmax(q k^T) v as it stands, in the dtype of q; broadcasting, causal top-left."""
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    return scores.softmax(-1) @ v


def _call(leaves: list[Tensor], options: dict[str, Any], function: Any = None) -> list[Tensor]:
    """Output and gradients of ``function``; default what torch's name stands for at the moment."""
    out = (function or F.scaled_dot_product_attention)(*leaves, **options)
    dout = _dout(out, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def _judge(leaves: list[Tensor], options: dict[str, Any], backend: str) -> list[str]:
    """What is wrong with our result; empty for a pass."""
    if leaves[0].dtype == torch.float64:
        with sdpa.sdpa_replacement(backend=backend):
            ours = _call(leaves, options)
        torch.testing.assert_close(ours, _call(leaves, options))
        with sdpa.sdpa_replacement(backend=backend):
            torch.autograd.gradcheck(
                lambda *x: F.scaled_dot_product_attention(*x, **options), leaves, fast_mode=True
            )
        return []
    with sdpa.sdpa_replacement(backend=backend):
        ours = _call(leaves, options)
    plain = _call(leaves, options, _formula)
    # The same dout, which was rounded to the sample's dtype.
    wide = [x.detach().double().cpu().requires_grad_() for x in leaves]
    out = _formula(*wide, **options)
    truth = [out.detach(), *torch.autograd.grad(out, wide, _dout(out, leaves[0].dtype).double())]
    results = [
        compare(a.cpu(), t, b.cpu(), "out" if name == "out" else "grad", name)
        for name, a, t, b in zip(("out", "dq", "dk", "dv"), ours, truth, plain, strict=True)
    ]
    return [str(r) for r in results if not r.ok]


def run(device: str, dtype: torch.dtype, backend: str) -> dict[str, Any]:
    """{"samples", "passed", "refused": {reason: count}, "failed": [text]} for one dtype."""
    refused: collections.Counter[str] = collections.Counter()
    failed, passed, total = [], 0, 0
    for number, sample in enumerate(torch_samples(device, dtype)):
        for kind, given in (("", sample), (" non-contiguous", sample.noncontiguous())):
            total += 1
            leaves, options = [given.input, *given.args], given.kwargs
            reason = sdpa.supports(*leaves, **options)
            if reason is not None:
                refused[reason] += 1
                continue
            try:
                faults = _judge(leaves, options, backend)
            except Exception as error:  # a failure of the sample, to be reported with the others
                faults = [f"{type(error).__name__}: {error}"]
            passed += not faults
            failed += [f"{number}{kind} {options}: {fault}" for fault in faults[:1]]
    return {"samples": total, "passed": passed, "refused": dict(refused), "failed": failed}


def table(result: dict[str, Any]) -> str:
    lines = ["| dtype | samples | passed | refused | failed |", "|---|---|---|---|---|"]
    reasons: collections.Counter[str] = collections.Counter()
    for name, r in result["dtypes"].items():
        reasons.update(r["refused"])
        lines.append(
            f"| {name} | {r['samples']} | {r['passed']} | {sum(r['refused'].values())} | "
            f"{len(r['failed'])} |"
        )
    lines += ["", "Refused (all dtypes):", ""]
    lines += [f"- {count} x {reason}" for reason, count in reasons.items()]
    failed = [f"- {name}: {text}" for name, r in result["dtypes"].items() for text in r["failed"]]
    return "\n".join(lines + (["", "Failed:", "", *failed] if failed else []))


def main(args: argparse.Namespace) -> int:
    cuda = torch.device(args.device).type == "cuda"
    backend = args.backend or ("hopper" if cuda else "reference")
    names = args.dtypes or (["bf16", "fp16"] if cuda else ["fp32", "fp64"])
    result = {
        "what": f"samples of {OPERATOR}",
        "command": args.command,
        "machine": machine(),
        "backend": backend,
        "dtypes": {name: run(args.device, DTYPES[name], backend) for name in names},
    }
    print(f"{result['what']}, torch {torch.__version__}, {args.device}, backend {backend}")
    print(table(result))
    if args.out:
        write_page(result, args.out, table(result))
    return 1 if any(r["failed"] for r in result["dtypes"].values()) else 0
