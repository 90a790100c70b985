"""Run by test_triton.py with TRITON_INTERPRET=1: our Triton kernels on the CPU, against FP64.

In fp32 and fp16: the interpreter truncates to bf16 where a GPU rounds.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fa3_train.modules import _rms_norm_triton, _scaled_sum_triton, _swiglu_triton
from fa3_train.numerics import assert_as_good
from fa3_train.train.engines import _adamw_triton

torch.manual_seed(0)
_rms_norm_triton._programs = lambda device: 7  # fewer than rows: each takes several


def compare(ours, formula, kind, tensors, used=(True, True)):
    """Results and gradients of both, the formula also in FP64."""

    def run(function, dtype):
        leaves = [t.to(dtype).clone().requires_grad_() for t in tensors]
        outputs = function(*leaves)
        ups = [torch.linspace(-1, 1 - i / 3, o.numel()).view_as(o) for i, o in enumerate(outputs)]
        loss = sum((o * u.to(dtype)).sum() for o, u, on in zip(outputs, ups, used) if on)  # noqa: B905
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        return [r for r in (*outputs, *grads) if r is not None]

    results = run(ours, kind), run(formula, torch.float64), run(formula, kind)
    assert len({len(r) for r in results}) == 1
    for got, truth, baseline in zip(*results, strict=True):
        assert_as_good(got, truth, baseline, "accum")


def norm(kind, adds, used):
    dim = 1500
    rows = [torch.randn(33, dim + 8)[:, :dim] for _ in range(1 + adds)]

    def ours(*t):
        return _rms_norm_triton.add_norm(t[0], t[1] if adds else None, t[-1], 1e-5)

    def formula(*t):
        stream = t[0] + t[1] if adds else t[0] * 1
        return F.rms_norm(stream, (dim,), t[-1], 1e-5), stream

    compare(ours, formula, kind, [*rows, torch.randn(dim)], used)


def swiglu(kind):
    def formula(x):
        gate, up = x.chunk(2, -1)
        return (gate * torch.sigmoid(gate) * up,)

    compare(lambda x: (_swiglu_triton.swiglu(x),), formula, kind, [torch.randn(5, 2 * 2051)])


def scaled_sum():
    for overwrite in (True, False):
        total, gradient, factor = torch.randn(5003), torch.randn(5003), torch.tensor(0.3)
        wanted = factor * gradient + (0 if overwrite else total)
        _scaled_sum_triton.run(total, gradient, factor, overwrite)
        assert torch.allclose(total, wanted, atol=1e-6)


def adamw():
    param = torch.randn(5003)
    leaf = torch.nn.Parameter(param.clone())
    theirs = torch.optim.AdamW([leaf], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.3)
    state = {k: torch.zeros(5003) for k in ("exp_avg", "exp_avg_sq")} | {"step": torch.tensor(0.0)}
    copy = torch.empty(5003, dtype=torch.float16)
    for step in range(4):
        gradient, scale = torch.randn(5003), torch.tensor(1.0 + step)
        blocked = torch.tensor(float(step == 2))
        if step != 2:
            leaf.grad = gradient / scale
            theirs.step()
            state["step"] += 1
        _adamw_triton.update(
            param, gradient, state, copy, scale=scale, blocked=blocked, lr=1e-2, betas=(0.9, 0.95),
            log2_betas=(math.log2(0.9), math.log2(0.95)), eps=1e-8, weight_decay=0.3,
        )  # fmt: skip
        torch.testing.assert_close(param, leaf.detach(), rtol=2e-6, atol=1e-7)
        assert torch.equal(copy, param.half())


for kind in (torch.float32, torch.float16):
    for adds in (False, True):
        for used in ((True, True), (True, False), (False, True)):
            norm(kind, adds, used)
    swiglu(kind)
scaled_sum()
adamw()
print("all as good as PyTorch")
