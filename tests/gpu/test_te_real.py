"""Our core inside the real TransformerEngine: its layouts and masks, its layers, its discovery.

The yardstick is TransformerEngine's own attention at the same precision: error against fp64 (for
whole layers: against the same layer in fp32) at most twice its error.
"""

from __future__ import annotations

import inspect
import logging
import os
import subprocess
import sys
import textwrap

import pytest
import torch

pytest.importorskip("transformer_engine")
pytestmark = pytest.mark.gpu

from fa3_train import reference  # noqa: E402
from fa3_train.integrations import policy  # noqa: E402
from fa3_train.integrations import transformer_engine as te_swap  # noqa: E402
from fa3_train.numerics import assert_as_good  # noqa: E402

B, S, H, D = 2, 333, 8, 64
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def te():
    import transformer_engine.pytorch as te

    return te


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _leaves(*shapes):
    return [torch.randn(s, device="cuda", dtype=BF16).requires_grad_() for s in shapes]


def test_arguments_are_those_of_the_installed_version(te):
    """Constructor: by name and order. Forward: known, or refused by name when it is not off."""
    for method in ("__init__", "forward"):
        theirs, ours = (
            list(inspect.signature(getattr(c, method)).parameters)
            for c in (te.DotProductAttention, te_swap.DotProductAttention)
        )
        common = [name for name in theirs if name in ours]
        assert common == [name for name in ours if name in theirs], method
        missing = [name for name in theirs if name not in ours]
        if method == "__init__":
            assert not missing
        for name in missing:
            known = te_swap.supports(**{name: object()})
            assert known is not None or name in te_swap._IDLE


CASES = {
    "sbhd causal": {},
    "bshd causal": {"qkv_format": "bshd"},
    "bshd full": {"qkv_format": "bshd", "attn_mask_type": "no_mask"},
    "bshd window": {"qkv_format": "bshd", "window_size": (100, 0)},
    "bshd two-sided window": {
        "qkv_format": "bshd", "attn_mask_type": "no_mask", "window_size": (70, 40)
    },
    "bshd bottom-right": {"qkv_format": "bshd", "attn_mask_type": "causal_bottom_right"},
    "thd": {"qkv_format": "thd", "attn_mask_type": "padding_causal"},
    "bshd padding": {"qkv_format": "bshd", "attn_mask_type": "padding_causal"},
}  # fmt: skip


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("case", CASES)
def test_core_beside_theirs(te, case, kv_heads):
    options = CASES[case]
    layout, mask = options.get("qkv_format", "sbhd"), options.get("attn_mask_type", "causal")
    sk = S + 90 if mask == "causal_bottom_right" else S
    lengths = (S, 201)
    call, cu = {}, None
    if layout == "thd":
        cu = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device="cuda")
        call = {"cu_seqlens_q": cu, "cu_seqlens_kv": cu, "max_seqlen_q": S, "max_seqlen_kv": S}
        lead_q = lead_k = (sum(lengths),)
    elif layout == "sbhd":
        lead_q = lead_k = (S, B)
    else:
        lead_q, lead_k = (B, S), (B, sk)
    q, k, v = _leaves((*lead_q, H, D), (*lead_k, kv_heads, D), (*lead_k, kv_heads, D))
    padded = "padding" in mask and layout == "bshd"
    if padded:
        hidden = torch.arange(S, device="cuda") >= torch.tensor(lengths, device="cuda")[:, None]
        call = {"attention_mask": hidden[:, None, None]}
    settings = {"num_gqa_groups": kv_heads, "attention_dropout": 0.0, **options}
    results = []
    dout = torch.randn(*lead_q, H * D, device="cuda", dtype=BF16)
    if padded:
        dout = dout.masked_fill(hidden[..., None], 0)
    for core in (
        te.DotProductAttention(H, D, **settings),
        te_swap.DotProductAttention(H, D, **settings, backend="hopper"),
    ):
        out = core(q, k, v, **call)
        results.append((out, *torch.autograd.grad(out, (q, k, v), dout)))
    theirs, ours = results

    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    window = options.get("window_size", (-1, -1))
    window = (window[0], 0 if "causal" in mask else window[1])
    if layout == "sbhd":
        dense = [x.transpose(0, 1) for x in exact]
        want = reference.attention(*dense, window_size=window)[0].transpose(0, 1)
    elif padded:
        rows = []
        for b, n in enumerate(lengths):
            row, _ = reference.attention(*(x[b : b + 1, :n] for x in exact), window_size=window)
            rows.append(torch.nn.functional.pad(row, (0, 0, 0, 0, 0, S - n)))
        want = torch.cat(rows)
    else:
        want, _ = reference.attention(*exact, window_size=window, cu_seqlens_q=cu, cu_seqlens_k=cu)
    want = want.flatten(-2)
    truth = (want, *torch.autograd.grad(want, exact, dout.double()))
    for name, a, t, b in zip(("out", "dq", "dk", "dv"), ours, truth, theirs, strict=True):
        if padded and name == "out":  # their padding rows are not defined
            a, t, b = (x.masked_fill(hidden[..., None], 0) for x in (a, t, b))
        assert_as_good(a, t, b, "out" if name == "out" else "grad", f"{case} {name}")


def test_gaps_between_sequences(te):
    """thd with room between the sequences, which TransformerEngine's context parallelism makes."""
    cu, room = (
        torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 120, 300], [0, 128, 320])
    )
    q, k, v = _leaves((320, H, D), (320, 2, D), (320, 2, D))
    dout = torch.randn(320, H * D, device="cuda", dtype=BF16)
    used = torch.zeros(320, dtype=torch.bool, device="cuda")
    used[:120] = used[128:308] = True
    dout[~used] = 0
    options = {"num_gqa_groups": 2, "qkv_format": "thd", "attn_mask_type": "padding_causal"}
    call = {
        "cu_seqlens_q": cu, "cu_seqlens_kv": cu, "cu_seqlens_q_padded": room,
        "cu_seqlens_kv_padded": room, "max_seqlen_q": 192, "max_seqlen_kv": 192,
        "pad_between_seqs": True,
    }  # fmt: skip
    results = []
    for core in (
        te.DotProductAttention(H, D, **options),
        te_swap.DotProductAttention(H, D, **options, backend="hopper"),
    ):
        out = core(q, k, v, **call)
        results.append((out, *torch.autograd.grad(out, (q, k, v), dout)))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want, _ = reference.attention(
        *(x[used] for x in exact), causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu
    )
    truth = torch.autograd.grad(want.flatten(-2), exact, dout[used].double())
    for i, t in enumerate((want.flatten(-2), *(x[used] for x in truth))):
        theirs, ours = (r[i][used] for r in results)
        assert_as_good(ours, t, theirs, "grad" if i else "out", f"gaps {i}")


def _layer(te, dtype=BF16, kv_heads=4, **options):
    layer = te.TransformerLayer(
        512, 1024, H, num_gqa_groups=kv_heads, hidden_dropout=0.0,
        **{"attention_dropout": 0.0, "self_attn_mask_type": "causal", "bias": False,
           "normalization": "RMSNorm", "activation": "swiglu", "params_dtype": dtype, **options},
    )  # fmt: skip
    return layer.cuda()


def _run(layer, x, **call):
    x = x.detach().requires_grad_()
    layer.zero_grad()
    out = layer(x, **call)
    torch.manual_seed(1)
    out.backward(torch.randn_like(out))
    return out.detach(), x.grad, [p.grad.clone() for p in layer.parameters()]


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("kv_heads", [8, 4])
def test_layer_patched(te, kv_heads, rope):
    """Without grouping and RoPE, TransformerEngine hands q, k and v over in one tensor."""
    layer = _layer(te, kv_heads=kv_heads)
    exact = _layer(te, torch.float32, kv_heads=kv_heads)
    with torch.no_grad():
        for a, b in zip(exact.parameters(), layer.parameters(), strict=True):
            a.copy_(b)
    x = torch.randn(S, B, 512, device="cuda", dtype=BF16)
    call = {"rotary_pos_emb": te.RotaryPositionEmbedding(D)(S).cuda()} if rope else {}
    truth = _run(exact, x.float(), **call)
    theirs = _run(layer, x, **call)
    keys = {k for k in layer.state_dict() if not k.endswith("_extra_state")}
    assert te_swap.patch(layer, backend="hopper") == 1
    assert {k for k in layer.state_dict() if not k.endswith("_extra_state")} == keys
    ours = _run(layer, x, **call)
    for i, name in enumerate(("out", "dx")):
        assert_as_good(ours[i], truth[i].double(), theirs[i], "grad" if i else "out", name)
    names = [name for name, _ in layer.named_parameters()]
    for name, a, t, b in zip(names, ours[2], truth[2], theirs[2], strict=True):
        assert_as_good(a, t.double(), b, "grad", name)
    assert te_swap.unpatch(layer) == 1
    again = _run(layer, x, **call)
    assert torch.equal(again[0], theirs[0])


def test_checkpointing_the_core_changes_nothing(te):
    layer = _layer(te)
    te_swap.patch(layer, backend="hopper")
    x = torch.randn(S, B, 512, device="cuda", dtype=BF16)
    plain, again = (_run(layer, x, checkpoint_core_attention=on) for on in (False, True))
    assert torch.equal(plain[0], again[0])


def test_fp8_linears_stay_theirs(te):
    """Inside an FP8 region the GEMMs are FP8 as before, only the attention is ours."""
    from transformer_engine.common import recipe

    layer = _layer(te)
    x = torch.randn(256, B, 512, device="cuda", dtype=BF16)
    plain = _run(layer, x)
    outs = []
    region = getattr(te, "autocast", None) or te.fp8_autocast
    for patched in (False, True):
        if patched:
            te_swap.patch(layer, backend="hopper")
        with region(enabled=True, recipe=recipe.Float8CurrentScaling()):
            out = layer(x)
        out.float().sum().backward()
        outs.append(out.detach())
    fp8_step = (outs[0] - plain[0]).float().square().mean().sqrt()
    assert fp8_step > 0  # the region did something
    assert (outs[1] - outs[0]).float().square().mean().sqrt() < fp8_step


def test_dropout_is_refused_or_theirs(te, caplog):
    x = torch.randn(64, B, 512, device="cuda", dtype=BF16)
    layer = _layer(te, attention_dropout=0.1)
    te_swap.patch(layer, backend="hopper")
    with pytest.raises(policy.UnsupportedRequest, match="attention_dropout.*0.1.*pass 0.0"):
        layer(x)
    te_swap.unpatch(layer)
    te_swap.patch(layer, policy="warn", backend="hopper")
    policy.reset_fallback_counts()
    with caplog.at_level(logging.WARNING, "fa3_train.integrations"):
        for _ in range(3):
            layer(x).sum().backward()
    assert list(policy.fallback_counts().values()) == [3]
    assert len([r for r in caplog.records if "attention_dropout" in r.message]) == 1


DISCOVERY = """
    import torch
    from fa3_train.integrations import flash_attn
    flash_attn.install()
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch.attention.dot_product_attention import backends
    from fa3_train.integrations import transformer_engine as te_swap

    calls = []
    for name in ("flash_attn_func_v3", "flash_attn_varlen_func_v3"):
        ours = getattr(backends, name)
        assert ours is getattr(flash_attn.fa3, name.removesuffix("_v3")), name
        setattr(backends, name, lambda *a, _f=ours, **k: calls.append(_f) or _f(*a, **k))

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 160, h, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
               for h in (8, 2, 2))
    cu = torch.tensor([0, 100, 320], dtype=torch.int32, device="cuda")
    thd = {"cu_seqlens_q": cu, "cu_seqlens_kv": cu, "max_seqlen_q": 220, "max_seqlen_kv": 220}
    for layout, mask, call in (("bshd", "causal", {}), ("thd", "padding_causal", thd)):
        options = dict(num_gqa_groups=2, qkv_format=layout, attn_mask_type=mask)
        inputs = [x if layout == "bshd" else x.flatten(0, 1) for x in (q, k, v)]
        made = []
        for cls in (te.DotProductAttention, te_swap.DotProductAttention):
            out = cls(8, 64, **options)(*inputs, **call)
            made.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
        assert len(calls) == 1, (layout, calls)
        calls.clear()
        assert torch.equal(made[0][0], made[1][0]), layout
        for a, b in zip(*made):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    print("found as FlashAttention-3")
"""


def test_their_own_discovery_of_flash_attention_3():
    environment = {**os.environ, "NVTE_FUSED_ATTN": "0", "NVTE_UNFUSED_ATTN": "0"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DISCOVERY)],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "found as FlashAttention-3" in done.stdout
