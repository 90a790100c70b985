"""Our DotProductAttention with TransformerEngine's layouts, masks and surroundings.

TransformerEngine itself needs a GPU to import; the tests with the real one are in tests/gpu. Here a
stand-in has the attributes that patch() reads.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fa3_train import reference
from fa3_train.integrations import policy
from fa3_train.integrations import transformer_engine as te_swap

S, B, H, HKV, D = 11, 2, 4, 2, 8
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def _qkv(*lead, sk=None):
    torch.manual_seed(0)
    lead_k = lead if sk is None else (sk, *lead[1:])
    return (
        torch.randn(*lead, H, D, requires_grad=True),
        torch.randn(*lead_k, HKV, D, requires_grad=True),
        torch.randn(*lead_k, HKV, D, requires_grad=True),
    )


def _ours(**options):
    return te_swap.DotProductAttention(H, D, HKV, **options)


@pytest.mark.parametrize("layout", ["sbhd", "bshd"])
@pytest.mark.parametrize("mask", ["causal", "no_mask"])
def test_layouts_flattened_heads_and_gradients(layout, mask):
    q, k, v = _qkv(S, B)
    module = _ours(qkv_format=layout, attn_mask_type=mask)
    if layout == "sbhd":
        out = module(q, k, v)
    else:
        out = module(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1)
    assert out.shape == (S, B, H * D)
    want, _ = reference.attention(
        *(x.transpose(0, 1) for x in (q, k, v)), window_size=(-1, 0 if mask == "causal" else -1)
    )
    want = want.transpose(0, 1).flatten(-2).float()
    torch.testing.assert_close(out, want, **CLOSE)
    got = torch.autograd.grad(out.square().sum(), (q, k, v))
    for a, b in zip(got, torch.autograd.grad(want.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_thd_and_bottom_right():
    cu_q = torch.tensor([0, 5, 11], dtype=torch.int32)
    cu_k = torch.tensor([0, 7, 13], dtype=torch.int32)
    q, k, v = _qkv(S, sk=13)
    module = _ours(qkv_format="thd", attn_mask_type="padding_causal_bottom_right")
    want, _ = reference.attention(
        q, k, v, window_size=(-1, 0), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k
    )
    for longest in ({"max_seqlen_q": 6, "max_seqlen_kv": 7}, {}):
        out = module(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_kv=cu_k, **longest)
        torch.testing.assert_close(out, want.flatten(-2).float(), **CLOSE)


def test_top_left_packed_sequences_of_unequal_lengths_are_refused():
    cu_q = torch.tensor([0, 5, 11], dtype=torch.int32)
    cu_k = torch.tensor([0, 6, 11], dtype=torch.int32)
    q, k, v = _qkv(S)
    module = _ours(qkv_format="thd", attn_mask_type="padding_causal")
    with pytest.raises(policy.UnsupportedRequest, match="top-left.*equal lengths"):
        module(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_kv=cu_k)
    want, _ = reference.attention(
        q, k, v, window_size=(-1, 0), cu_seqlens_q=cu_q, cu_seqlens_k=cu_q
    )
    for same in (cu_q, cu_q.clone()):
        out = module(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_kv=same, cu_seqlens_q_padded=same)
        torch.testing.assert_close(out, want.flatten(-2).float(), **CLOSE)
    cu_q[1] = 6  # in place: a remembered answer about the old numbers would be wrong
    with pytest.raises(policy.UnsupportedRequest, match="top-left"):
        module(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_kv=torch.tensor([0, 5, 11]).int())


def test_gaps_between_packed_sequences():
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    room = torch.tensor([0, 5, 11], dtype=torch.int32)
    q, k, v = _qkv(S)
    for x in (q, k, v):
        x.data[3:5] = x.data[9:] = float("nan")
    module = _ours(qkv_format="thd", attn_mask_type="padding_causal")
    out = module(
        q, k, v, cu_seqlens_q=cu, cu_seqlens_kv=cu, cu_seqlens_q_padded=room,
        cu_seqlens_kv_padded=room, pad_between_seqs=True,
    )  # fmt: skip
    for rows in (slice(0, 3), slice(5, 9)):
        want, _ = reference.attention(*(x[None, rows] for x in (q, k, v)), window_size=(-1, 0))
        torch.testing.assert_close(out[rows], want[0].flatten(-2).float(), **CLOSE)
    assert (out[3:5] == 0).all() and (out[9:] == 0).all()


@pytest.mark.parametrize("dim", [-3, -2])
def test_q_k_v_in_one_tensor(dim):
    torch.manual_seed(0)
    where = 5 + dim
    qkv = torch.randn(S, B, H, D).unsqueeze(where).repeat_interleave(3, where)
    qkv = torch.randn_like(qkv).requires_grad_()
    q, k, v = qkv.unbind(dim)
    module = te_swap.DotProductAttention(H, D)
    want = module(q, k, v)
    assert torch.equal(want, module(qkv_layer=qkv, qkv_interleave_dim=dim))
    kv = torch.stack([k, v], where)
    assert torch.equal(want, module(q, kv_layer=kv, qkv_interleave_dim=dim))
    with pytest.raises(ValueError, match="qkv_layer: must come alone"):
        module(q, k, v, qkv_layer=qkv)
    with pytest.raises(ValueError, match="kv_layer: must have 2 along"):
        module(q, kv_layer=qkv, qkv_interleave_dim=dim)


@pytest.mark.parametrize("how", ["mask", "cu_seqlens"])
def test_padding_never_reaches_a_result(how):
    lengths = (7, 11)
    q, k, v = _qkv(B, S)
    for x in (q, k, v):
        x.data[0, lengths[0] :] = float("nan")
    module = _ours(qkv_format="bshd", attn_mask_type="padding_causal")
    if how == "mask":
        padding = torch.arange(S) >= torch.tensor(lengths)[:, None]
        out = module(q, k, v, attention_mask=padding[:, None, None])
    else:
        cu = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
        out = module(q, k, v, cu_seqlens_q=cu, cu_seqlens_kv=cu)
    for b, n in enumerate(lengths):
        want, _ = reference.attention(
            q[b : b + 1, :n], k[b : b + 1, :n], v[b : b + 1, :n], window_size=(-1, 0)
        )
        torch.testing.assert_close(out[b, :n], want[0].flatten(-2).float(), **CLOSE)
    assert (out[0, lengths[0] :] == 0).all()


@pytest.mark.parametrize(
    ("options", "call", "sides"),
    [
        ({"window_size": (3, 0)}, {}, (3, 0)),
        ({}, {"window_size": (2, 0)}, (2, 0)),
        ({"window_size": (3, 3), "attn_mask_type": "no_mask"}, {}, (3, 3)),
        ({"window_size": (-1, -1)}, {}, (-1, 0)),
    ],
)
def test_windows(options, call, sides):
    q, k, v = _qkv(B, S)
    out = _ours(qkv_format="bshd", **options)(q, k, v, **call)
    want, _ = reference.attention(q, k, v, window_size=sides)
    torch.testing.assert_close(out, want.flatten(-2).float(), **CLOSE)


def test_softcap_scale_and_learnable_sink():
    q, k, v = _qkv(B, S)
    module = _ours(qkv_format="bshd", softcap=2.0, softmax_scale=0.7, softmax_type="learnable")
    nn.init.normal_(module.softmax_offset)
    want, _ = reference.attention(
        q, k, v, softmax_scale=0.7, softcap=2.0, window_size=(-1, 0), sink=module.softmax_offset
    )
    torch.testing.assert_close(module(q, k, v), want.flatten(-2).float(), **CLOSE)


def test_checkpointing_the_core():
    q, k, v = _qkv(B, S)
    module = _ours(qkv_format="bshd")
    grads = [
        torch.autograd.grad(module(q, k, v, checkpoint_core_attention=on).square().sum(), (q, k, v))
        for on in (False, True)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout.*0.1.*pass 0.0"),
        ({"qkv_format": "bhsd"}, "qkv_format.*bhsd"),
        ({"attn_mask_type": "arbitrary"}, "attn_mask_type.*arbitrary"),
        ({"attn_mask_type": "causal", "seqlens": (3, 5)}, "top-left.*3 and 5"),
        ({"core_attention_bias_type": "alibi"}, "core_attention_bias_type.*alibi"),
        ({"inference_params": object()}, "inference_params"),
        ({"softmax_type": "off-by-one"}, "softmax_type.*off-by-one"),
        ({"cp_size": 2}, "cp_group.*2 ranks"),
        ({"fp8_output": True}, "fp8_output"),
        ({"pad_between_seqs": True}, "pad_between_seqs.*'thd'.*'sbhd'"),
        ({"num_splits": 4}, "num_splits.*4"),
        ({"same_lengths": False}, "'causal' is aligned top-left.*equal lengths"),
        (
            {
                "attn_mask_type": "no_mask",
                "window_size": (3, 3),
                "bottom_right_diagonal": False,
                "seqlens": (3, 5),
            },
            "'no_mask' is aligned top-left.*3 and 5",
        ),
        ({"thd_attention_policies": [{}]}, "thd_attention_policies"),
        ({"of_the_future": torch.ones(2, 3)}, r"of_the_future: not served, got shape \(2, 3\)"),
    ],
)
def test_supports_names_what_is_in_the_way(arguments, message):
    import re

    assert re.search(message, te_swap.supports(**arguments))
    assert te_swap.supports() is None


class Core(nn.Module):
    """What patch() reads of a te.DotProductAttention; ``patch`` goes by the class's name."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.num_attention_heads, self.num_gqa_groups_per_partition, self.tp_size = H, HKV, 1
        self.hidden_size_per_attention_head_k = self.hidden_size_per_attention_head_v = D
        self.attention_dropout, self.qkv_format = dropout, "bshd"
        self.attn_mask_type, self.window_size = "causal", (-1, 0)
        self.softmax_scale, self.layer_number, self.cp_group = D**-0.5, 3, None

    def forward(self, *args, **kwargs):
        return "original"


Core.__name__ = "DotProductAttention"


class Layer(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.core_attention = Core(dropout)


def test_patch_and_unpatch():
    model = nn.ModuleList([Layer(), Layer()])
    before = [layer.core_attention for layer in model]
    keys = set(model.state_dict())
    assert te_swap.patch(model) == 2
    core = model[0].core_attention
    assert isinstance(core, te_swap.DotProductAttention)
    assert (core.num_attention_heads, core.num_gqa_groups, core.head_dim_qk) == (H, HKV, D)
    assert core.layer_number == 3 and core.softmax_scale == D**-0.5
    q, k, v = _qkv(B, S)
    want, _ = reference.attention(q, k, v, window_size=(-1, 0))
    torch.testing.assert_close(core(q, k, v), want.flatten(-2).float(), **CLOSE)
    with pytest.raises(ValueError, match="model: must hold a te.DotProductAttention"):
        te_swap.patch(model)
    assert {k.rsplit("_extra", 1)[0] for k in model.state_dict()} >= keys
    assert te_swap.unpatch(model) == 2
    assert [layer.core_attention for layer in model] == before


def test_policy_decides_about_dropout():
    q, k, v = _qkv(B, S)
    strict, lenient = Layer(0.1), Layer(0.1)
    te_swap.patch(strict)
    te_swap.patch(lenient, policy="warn")
    with pytest.raises(policy.UnsupportedRequest, match="attention_dropout.*0.1"):
        strict.core_attention(q, k, v)
    assert lenient.core_attention(q, k, v) == "original"
    strict.eval()  # no dropout in evaluation
    assert strict.core_attention(q, k, v).shape == (B, S, H * D)
