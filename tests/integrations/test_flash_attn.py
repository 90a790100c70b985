"""FA2's and FA3's signatures on our functions, and their discovery by name and metadata."""

import importlib
import importlib.metadata
import importlib.util
import inspect
import sys

import pytest
import torch

from fa3_train import reference
from fa3_train.integrations import flash_attn, policy

FA2_FUNC = (
    "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic "
    "return_attn_probs"
)
FA3_FUNC = (
    "q k v softmax_scale causal qv q_descale k_descale v_descale window_size attention_chunk "
    "softcap num_splits pack_gqa deterministic sm_margin return_attn_probs"
)


def _names(function) -> str:
    return " ".join(inspect.signature(function).parameters)


def test_signatures_are_those_of_the_packages():
    cu = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
    assert _names(flash_attn.fa2.flash_attn_func) == FA2_FUNC
    assert _names(flash_attn.fa3.flash_attn_func) == FA3_FUNC
    assert _names(flash_attn.fa2.flash_attn_varlen_func) == (
        FA2_FUNC.replace("q k v", f"q k v {cu}") + " block_table"
    )
    assert _names(flash_attn.fa3.flash_attn_varlen_func) == FA3_FUNC.replace(
        "q k v", f"q k v {cu} seqused_q seqused_k", 1
    )
    # TransformerEngine inspects nothing but calls the privates by keyword.
    for name in ("_flash_attn_forward", "_flash_attn_backward", "flash_attn_with_kvcache"):
        assert callable(getattr(flash_attn.fa3, name))


def _qkv(b=2, sq=13, sk=17, h=4, hkv=2, d=16, **kw):
    torch.manual_seed(0)
    return (
        torch.randn(b, sq, h, d, **kw),
        torch.randn(b, sk, hkv, d, **kw),
        torch.randn(b, sk, hkv, d, **kw),
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (3, 0), (5, 2), (None, None)])
def test_dense_results_and_lse(causal, window):
    q, k, v = _qkv()
    sides = tuple(-1 if w is None else w for w in window)
    if causal:
        sides = (sides[0], 0)
    out, lse = reference.attention(q, k, v, window_size=sides)
    o3, l3 = flash_attn.fa3.flash_attn_func(
        q, k, v, causal=causal, window_size=window, return_attn_probs=True
    )
    o2, l2, mask = flash_attn.fa2.flash_attn_func(
        q, k, v, 0.0, None, causal, window, return_attn_probs=True
    )
    assert mask is None
    for o, lse_ in ((o2, l2), (o3, l3)):
        torch.testing.assert_close(o, out.float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse_, lse.float(), rtol=1e-5, atol=1e-5)
    alone = flash_attn.fa3.flash_attn_func(q, k, v, causal=causal, window_size=window)
    torch.testing.assert_close(alone, o3, rtol=1e-5, atol=1e-5)


def test_the_fourth_position_differs():
    q, k, v = _qkv()
    with pytest.raises(policy.UnsupportedRequest, match="dropout_p.*0.5"):
        flash_attn.fa2.flash_attn_func(q, k, v, 0.5)
    scaled = flash_attn.fa3.flash_attn_func(q, k, v, 0.5)
    torch.testing.assert_close(
        scaled, reference.attention(q, k, v, softmax_scale=0.5)[0].float(), rtol=1e-5, atol=1e-5
    )


def test_varlen_and_packed_forms_agree():
    torch.manual_seed(0)
    cu = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    qkv = torch.randn(12, 3, 2, 16)
    q, k, v = qkv.unbind(1)
    base = flash_attn.fa3.flash_attn_varlen_func(q, k, v, cu, cu, 7, 7, causal=True)
    assert torch.equal(
        base, flash_attn.fa2.flash_attn_varlen_func(q, k, v, cu, cu, 7, 7, 0.0, None, True)
    )
    assert torch.equal(
        base, flash_attn.fa2.flash_attn_varlen_qkvpacked_func(qkv, cu, 7, causal=True)
    )
    assert torch.equal(
        base,
        flash_attn.fa2.flash_attn_varlen_kvpacked_func(q, qkv[:, 1:], cu, cu, 7, 7, causal=True),
    )
    dense = torch.randn(2, 9, 3, 2, 16)
    q, k, v = dense.unbind(2)
    want = flash_attn.fa3.flash_attn_func(q, k, v, causal=True)
    assert torch.equal(want, flash_attn.fa3.flash_attn_qkvpacked_func(dense, causal=True))
    assert torch.equal(want, flash_attn.fa2.flash_attn_qkvpacked_func(dense, causal=True))
    assert torch.equal(
        want, flash_attn.fa2.flash_attn_kvpacked_func(q, dense[:, :, 1:], causal=True)
    )
    grouped = torch.randn(2, 9, 4 + 2 * 2, 16)
    q, k, v = grouped.split([4, 2, 2], 2)
    assert torch.equal(
        flash_attn.fa3.flash_attn_func(q, k, v),
        flash_attn.fa3.flash_attn_qkvpacked_func(grouped, num_heads_q=4),
    )


def test_gradients_flow():
    q, k, v = (x.requires_grad_() for x in _qkv())
    grads = []
    for function in (flash_attn.fa2.flash_attn_func, flash_attn.fa3.flash_attn_func):
        out = function(q, k, v, causal=True)
        grads.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    truth = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, _ = reference.attention(*truth, window_size=(-1, 0))
    want = torch.autograd.grad(out.square().sum(), truth)
    for got in grads:
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)


def test_private_forward_and_backward_as_context_parallel_code_calls_them():
    q, k, v = _qkv()
    torch.manual_seed(1)
    dout = torch.randn_like(q)
    out, lse, a, b = flash_attn.fa3._flash_attn_forward(q, k, v, causal=True)
    assert a.numel() == b.numel() == 0
    given = [torch.full_like(x, float("nan")) for x in (q, k, v)]
    got = flash_attn.fa3._flash_attn_backward(
        dout, q, k, v, out, lse, dq=given[0], dk=given[1], dv=given[2], is_causal=True
    )
    truth = [x.double().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(
        reference.attention(*truth, window_size=(-1, 0))[0], truth, dout.double()
    )
    for x, y, z in zip(got, given, want, strict=True):
        assert x is y
        torch.testing.assert_close(x, z.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dropout_p": 0.1}, "dropout_p.*0.1"),
        ({"alibi_slopes": torch.zeros(2)}, "ALiBi"),
        ({"attention_chunk": 4}, "attention_chunk.*4"),
        ({"num_splits": 3}, "num_splits.*3"),
        ({"sm_margin": 8}, "sm_margin.*8"),
        ({"q_descale": torch.ones(1, 2)}, "flash_attn_fp8_func"),
        ({"seqused_k": torch.ones(1)}, "cu_seqlens"),
        ({"block_table": torch.ones(1)}, "paged"),
    ],
)
def test_supports_names_what_is_in_the_way(arguments, message):
    import re

    assert re.search(message, flash_attn.supports(**arguments))


def test_supports_accepts_what_is_served():
    assert flash_attn.supports(dropout_p=0.0, num_splits=1, pack_gqa=True, causal=True) is None


def test_install_is_found_by_name_and_by_metadata():
    assert importlib.util.find_spec("flash_attn_interface") is None
    flash_attn.install("flash_attn", "flash_attn_interface")
    try:
        import flash_attn as fa2
        import flash_attn_interface as fa3
        from flash_attn.flash_attn_interface import flash_attn_func as fa2_func

        assert fa3.flash_attn_func is flash_attn.fa3.flash_attn_func
        assert fa2.flash_attn_func is fa2_func is flash_attn.fa2.flash_attn_func
        assert importlib.metadata.version("flash-attn-3") == flash_attn.FA3_VERSION
        assert importlib.metadata.version("flash-attn") == flash_attn.FA2_VERSION
        assert importlib.metadata.version("flash_attn") == flash_attn.FA2_VERSION
        names = importlib.metadata.packages_distributions()
        assert "flash-attn-3" in names["flash_attn_interface"]  # HF transformers looks here
        assert "flash-attn" in names["flash_attn"]
        assert importlib.util.find_spec("flash_attn_interface") is not None
        flash_attn.install("flash_attn_interface")  # twice is harmless
    finally:
        flash_attn.uninstall()
    assert "flash_attn" not in sys.modules
    assert importlib.util.find_spec("flash_attn_interface") is None
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash-attn-3")


def test_install_does_not_stand_in_for_a_real_package_unasked(tmp_path, monkeypatch):
    (tmp_path / "flash_attn_interface.py").write_text("REAL = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="installed package flash_attn_interface"):
        flash_attn.install("flash_attn_interface")
    flash_attn.install("flash_attn_interface", replace=True)
    try:
        import flash_attn_interface

        assert not hasattr(flash_attn_interface, "REAL")
    finally:
        flash_attn.uninstall()
    with pytest.raises(ValueError, match="names: must be from"):
        flash_attn.install("flash_attn_4")


def test_warn_hands_over_to_the_real_package(monkeypatch):
    """What ours does not serve goes to the function that would have been called without us."""
    import types

    real = types.ModuleType("flash_attn_interface")
    real.flash_attn_func = lambda *args, **kwargs: ("real", args, kwargs)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", real)
    policy.reset_fallback_counts()
    flash_attn.install(replace=True, policy="warn")
    try:
        import flash_attn_interface as installed

        assert _names(installed.flash_attn_func) == FA3_FUNC
        q, k, v = _qkv()
        for _ in range(2):
            name, args, kwargs = installed.flash_attn_func(q, k, v, attention_chunk=4)
            assert name == "real" and args[0] is q and kwargs == {"attention_chunk": 4}
        assert torch.equal(
            installed.flash_attn_func(q, k, v), flash_attn.fa3.flash_attn_func(q, k, v)
        )
        with pytest.raises(policy.UnsupportedRequest, match="KV cache"):  # not in the real one
            installed.flash_attn_with_kvcache(q, k, v)
        assert list(policy.fallback_counts().values()) == [2]
    finally:
        flash_attn.uninstall()
    with pytest.raises(policy.UnsupportedRequest, match="attention_chunk"):
        flash_attn.fa3.flash_attn_func(q, k, v, attention_chunk=4)
    with pytest.raises(ValueError, match="policy: 'warn' needs the real package flash_attn"):
        flash_attn.install("flash_attn", policy="warn")


def test_a_reason_is_logged_once_either_way(caplog):
    policy.reset_fallback_counts()
    strict, lenient = policy.Policy("somewhere"), policy.Policy("somewhere", "warn")
    for _ in range(3):
        with pytest.raises(policy.UnsupportedRequest, match="somewhere: x: not served"):
            strict.refuse("x: not served", lambda: None)
        assert lenient.refuse("x: not served", lambda: "original") == "original"
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    assert policy.fallback_counts() == {("somewhere", "x: not served"): 3}


@pytest.mark.parametrize("causal", [False, True])
def test_sequences_shorter_than_their_room(causal):
    """seqused: unused rows may hold anything, and get zeros and no gradient."""
    cu_q = torch.tensor([0, 5, 9, 9, 16], dtype=torch.int32)
    cu_k = torch.tensor([0, 6, 9, 12, 20], dtype=torch.int32)
    used_q = torch.tensor([3, 4, 0, 6], dtype=torch.int32)
    used_k = torch.tensor([6, 2, 1, 7], dtype=torch.int32)
    torch.manual_seed(0)
    q, k, v = torch.randn(16, 4, 16), torch.randn(20, 2, 16), torch.randn(20, 2, 16)
    rooms = [(cu_q, used_q, (q,)), (cu_k, used_k, (k, v))]
    for cu, used, tensors in rooms:
        for start, end, n in zip(cu, cu[1:], used, strict=False):
            for x in tensors:
                x[int(start) + int(n) : int(end)] = float("nan")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = flash_attn.fa3.flash_attn_varlen_func(
        *leaves, cu_q, cu_k, 7, 8, used_q, used_k, causal=causal, return_attn_probs=True
    )
    out.square().sum().backward()
    assert all(not x.grad.isnan().any() for x in leaves)
    for b, (n, m) in enumerate(zip(used_q.tolist(), used_k.tolist(), strict=True)):
        rows_q, rows_k = (
            slice(int(cu_q[b]), int(cu_q[b]) + n),
            slice(int(cu_k[b]), int(cu_k[b]) + m),
        )
        want, want_lse = reference.attention(
            q[None, rows_q], k[None, rows_k], v[None, rows_k], causal=causal
        )
        torch.testing.assert_close(out[rows_q], want[0].float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[:, rows_q], want_lse[0].float(), rtol=1e-5, atol=1e-5)
    assert (out[3:5] == 0).all() and (lse[:, 3:5] == -torch.inf).all()
    whole = flash_attn.fa3.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 7, 8, cu_q.diff(), cu_k.diff()
    )  # all of it: nothing is copied
    assert torch.equal(whole.isnan(), flash_attn.fa3.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 7, 8).isnan())  # fmt: skip


def test_padding_helpers_are_each_others_inverse():
    from fa3_train.integrations import lengths

    torch.manual_seed(0)
    x = torch.randn(3, 5, 2, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]])
    rows, indices, cu, longest, used = lengths.unpad_input(x, mask)
    assert cu.tolist() == [0, 3, 3, 7] and longest == 4 and used.tolist() == [3, 0, 4]
    assert cu.dtype == used.dtype == torch.int32
    back = lengths.pad_input(rows, indices, 3, 5)
    assert torch.equal(back, x * mask[..., None])
    back.sum().backward()
    assert torch.equal(x.grad, mask[..., None].expand_as(x).float())
    _, _, cu, _, used = lengths.unpad_input(x, mask, 1 - mask)
    assert cu.tolist() == [0, 5, 10, 15] and used.tolist() == [3, 0, 4]


DISCOVERY = """
import sys
import torch
if not torch.cuda.is_available():  # transformers wants a GPU before it looks for the packages
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda *a: (9, 0)
    device, dtype, close = "cpu", torch.float32, 1e-5
else:
    device, dtype, close = "cuda", torch.bfloat16, 0.0
from fa3_train.integrations import flash_attn, hf
flash_attn.install("flash_attn", "flash_attn_interface")
from transformers import LlamaConfig, LlamaForCausalLM
hf.register()
config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=97,
                     num_attention_heads=4, num_key_value_heads=2, use_cache=False)
ids = torch.randint(3, 97, (2, 19), device=device)
mask = torch.ones_like(ids)
mask[0, :5] = 0
outs = {}
for name in ("fa3_train", "flash_attention_3", "flash_attention_2"):
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, attn_implementation=name, dtype=dtype).to(device)
    assert model.config._attn_implementation == name, model.config._attn_implementation
    outs[name] = [model(ids).logits, model(ids, attention_mask=mask).logits[mask.bool()]]
for name in ("flash_attention_3", "flash_attention_2"):
    for a, b in zip(outs[name], outs["fa3_train"]):
        torch.testing.assert_close(a, b, rtol=close, atol=close)
module = sys.modules["transformers.modeling_flash_attention_utils"]
print("found", module._flash_fn.__module__ if hasattr(module, "_flash_fn") else "")
"""


def test_transformers_finds_and_runs_it_as_flash_attention_2_and_3():
    import subprocess

    pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, "-c", DISCOVERY], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("found")
