"""AdamW with 16-bit copies on a GPU: the kernel against torch's fused one, and FP64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fa3_train.train.config import OptimizerSection
from fa3_train.train.engines.optimizer import GuardedAdamW

pytestmark = pytest.mark.gpu
SHAPES = [(1,), (2049,), (300, 517)]


def _optimizer(settings, copies):
    torch.manual_seed(7)
    params = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in SHAPES]
    groups = [{"params": params[:1], "weight_decay": 0.0}, {"params": params[1:]}]
    optimizer = GuardedAdamW(groups, settings)
    if copies:
        optimizer.keep_copies({p: p.detach().bfloat16() for p in params})
    return optimizer, params


def test_update_is_torchs_and_copies_follow():
    settings = OptimizerSection(lr=1e-2, weight_decay=0.3, clip_norm=1.0)
    ours, mine = _optimizer(settings, copies=True)
    theirs, other = _optimizer(settings, copies=False)
    kernels = []
    for step in range(8):
        kernels.append(ours._own_kernel())
        blocked = torch.tensor(step == 4, device="cuda")
        norm = torch.tensor(3.0 if step % 2 else 0.5, device="cuda")
        for a, b in zip(mine, other, strict=True):
            a.grad = torch.randn_like(a) * 10.0 ** (step - 4)
            b.grad = a.grad.clone()
        before = [a.detach().clone() for a in mine]
        for optimizer in (ours, theirs):
            optimizer.set_lr(settings.lr / (step + 1))
            optimizer.guard(norm=norm, blocked=blocked)
            optimizer.step()
        for a, b, old in zip(mine, other, before, strict=True):
            assert torch.equal(a, old) == (step == 4)
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)
            for key in ("exp_avg", "exp_avg_sq", "step"):
                got, wanted = ours.state[a][key], theirs.state[b][key]
                small = 1e-7 * wanted.abs().max().item()  # where a mean crosses zero
                torch.testing.assert_close(got, wanted, rtol=2e-6, atol=small)
            assert torch.equal(ours._copies[a], a.detach().bfloat16())
    assert kernels == [False, *[True] * 7], "torch makes the state, the kernel does the rest"
    assert ours.state[mine[0]]["step"].item() == 7


def test_without_a_guard():
    settings = OptimizerSection(lr=1e-2, clip_norm=0.0)
    ours, mine = _optimizer(settings, copies=True)
    theirs, other = _optimizer(settings, copies=False)
    for _ in range(3):
        for a, b in zip(mine, other, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)
