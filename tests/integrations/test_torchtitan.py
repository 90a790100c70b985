"""torchtitan's inner attention, on a stand-in with the shape of its classes, or on the real one."""

from __future__ import annotations

import dataclasses
import types
from typing import NamedTuple

import pytest
import torch

from fa3_train import reference
from fa3_train.integrations import policy
from fa3_train.integrations import torchtitan as titan

B, L, N, NKV, D = 2, 6, 4, 2, 8


class Metadata(NamedTuple):
    """torchtitan's VarlenMetadata, field for field."""

    cu_seq_q: torch.Tensor
    cu_seq_k: torch.Tensor
    max_q: int
    max_k: int
    cu_seq_q_host: tuple[int, ...] | None = None


class StandIn(torch.nn.Module):
    """The parts of torchtitan's VarlenAttention that a subclass meets."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config:
        window_size: tuple[int, int] = (-1, 0)

    def __init__(self, config):
        raise AssertionError("would activate another flash attention")


def _base():
    try:
        from torchtitan.models.common.attention import VarlenAttention
    except ImportError:
        return StandIn
    return VarlenAttention


def _qkv():
    torch.manual_seed(0)
    return [torch.randn(B, L, n, D, requires_grad=True) for n in (N, NKV, NKV)]


DOCUMENTS = torch.tensor([0, 4, 9, 12], dtype=torch.int32)  # across the rows of the batch


@pytest.mark.parametrize("window", [(-1, 0), (2, 0), (-1, -1)])
@pytest.mark.parametrize("packed", [True, False])
def test_values_and_gradients(window, packed):
    q, k, v = _qkv()
    module_class = titan.inner_attention(_base())
    module = module_class(module_class.Config(window_size=window))
    masks = Metadata(DOCUMENTS, DOCUMENTS, 5, 5) if packed else None
    out = module(q, k, v, attention_masks=masks, enable_gqa=True)
    assert out.shape == (B, L, N, D)
    if packed:
        want, _ = reference.attention(
            *(x.flatten(0, 1) for x in (q, k, v)), window_size=window, cu_seqlens_q=DOCUMENTS,
            cu_seqlens_k=DOCUMENTS,
        )  # fmt: skip
        want = want.view(B, L, N, D)
    else:
        want, _ = reference.attention(q, k, v, window_size=window)
    want = want.float()
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(out.square().sum(), (q, k, v))
    for a, b in zip(got, torch.autograd.grad(want.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_out_transform_gets_lse_per_token(packed):
    q, k, v = _qkv()
    masks = Metadata(DOCUMENTS, DOCUMENTS, 5, 5) if packed else None
    seen = {}

    def epilogue(out, lse):
        seen["shapes"] = out.shape, lse.shape
        return out * torch.sigmoid(lse).unsqueeze(-1)

    out = titan.varlen_attention(q, k, v, masks, out_transform=epilogue, backend="reference")
    assert seen["shapes"] == ((B * L, N, D), (B * L, N))
    assert out.shape == (B, L, N, D)
    plain = titan.varlen_attention(q, k, v, masks, backend="reference")
    ratio = out / plain
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio), rtol=1e-4, atol=1e-5)


def test_use_in_sets_every_layer_and_keeps_the_window():
    base = _base()
    layers = [
        types.SimpleNamespace(
            attention=types.SimpleNamespace(inner_attention=base.Config(window_size=(w, 0)))
        )
        for w in (-1, 128)
    ]
    assert titan.use_in(types.SimpleNamespace(layers=layers), base) == 2
    windows = [layer.attention.inner_attention.window_size for layer in layers]
    assert windows == [(-1, 0), (128, 0)]
    with pytest.raises(ValueError, match="must have layers"):
        titan.use_in(types.SimpleNamespace(layers=[]), base)


def test_save_ops_names_our_forward():
    assert torch.ops.fa3_train.attn_fwd.default in titan.save_ops()


def test_other_masks_are_refused():
    q, k, v = _qkv()
    with pytest.raises(policy.UnsupportedRequest, match="VarlenMetadata.*got dict"):
        titan.varlen_attention(q, k, v, {"flex": 1})
    assert "paged" in titan.supports(block_table=torch.zeros(1))
