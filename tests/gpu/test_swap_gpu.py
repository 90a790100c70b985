"""The swaps on a GPU: torch's flash registration, F.sdpa, transformers models, flash_attn's names.

Truth is fp64 or fp32; the yardstick is what the framework computes in bf16 without the swap.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from fa3_train import flash_attn_func, reference
from fa3_train.integrations import policy, sdpa
from fa3_train.numerics import assert_as_good

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
has_registry = pytest.mark.skipif(
    not hasattr(attention, "register_flash_attention_impl"), reason="torch before 2.11"
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _qkv(shape_q, shape_k=None, dtype=BF16):
    return [
        torch.randn(s, device="cuda", dtype=dtype).requires_grad_()
        for s in (shape_q, shape_k or shape_q, shape_k or shape_q)
    ]


@pytest.fixture
def flash():
    """Our kernels behind torch's flash backend, and nothing but that backend."""
    from fa3_train.integrations import torch_flash

    attention.activate_flash_attention_impl(torch_flash.register(backend="hopper"))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield
    attention.restore_flash_attention_impl()


def _with_gradients(function, leaves, dout):
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def _judge(ours, theirs, truth):
    for name, a, b, t in zip(("out", "dq", "dk", "dv"), ours, theirs, truth, strict=True):
        assert_as_good(a, t, b, "out" if name == "out" else "grad", name)


@has_registry
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("tokens_first", [False, True])
def test_sdpa_on_the_registered_implementation(flash, causal, kv_heads, tokens_first):
    shapes = (2, 8, 300, 64), (2, kv_heads, 300, 64)
    q, k, v = _qkv(*shapes)
    if tokens_first:
        q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
                   for x in (q, k, v))  # fmt: skip
    dout = torch.randn(shapes[0], device="cuda", dtype=BF16)

    def call(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=kv_heads != 8)

    ours = _with_gradients(call, (q, k, v), dout)
    direct = flash_attn_func(
        *(x.detach().transpose(1, 2) for x in (q, k, v)), causal=causal, backend="hopper"
    )
    assert torch.equal(ours[0].transpose(1, 2), direct)  # the same kernel ran
    attention.restore_flash_attention_impl()
    theirs = _with_gradients(call, (q, k, v), dout)
    assert not torch.equal(theirs[0], ours[0])
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        truth = _with_gradients(call, exact, dout.double())
    _judge(ours, theirs, truth)


@has_registry
def test_varlen_attention_on_the_registered_implementation(flash):
    from torch.nn.attention.varlen import varlen_attn

    cu = torch.tensor([0, 100, 100, 333], dtype=torch.int32, device="cuda")
    q, k, v = _qkv((333, 4, 128))
    dout = torch.randn_like(q)

    def call(q, k, v):
        return varlen_attn(q, k, v, cu, cu, 233, 233, window_size=(-1, 0))

    ours = _with_gradients(call, (q, k, v), dout)
    attention.restore_flash_attention_impl()
    theirs = _with_gradients(call, (q, k, v), dout)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, _ = reference.attention(*exact, causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu)
    _judge(ours, theirs, [out.detach(), *torch.autograd.grad(out, exact, dout.double())])


@has_registry
def test_compiled_code_gets_the_registered_implementation(flash):
    q, k, v = _qkv((2, 4, 256, 64))

    def call(q, k, v):
        return F.scaled_dot_product_attention(q * 1.5, k, v, is_causal=True).square().sum()

    eager, compiled = (
        torch.autograd.grad(f(q, k, v), (q, k, v)) for f in (call, torch.compile(call))
    )
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2)


@has_registry
def test_dropout_is_refused_or_torchs_own():
    from fa3_train.integrations import torch_flash

    q, k, v = (x.detach() for x in _qkv((2, 4, 256, 64)))
    attention.activate_flash_attention_impl(torch_flash.register(backend="hopper"))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with pytest.raises(policy.UnsupportedRequest, match="dropout_p"):
            F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        attention.restore_flash_attention_impl()
        torch.manual_seed(3)
        want = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        if not hasattr(torch.library, "get_kernel"):
            return
        policy.reset_fallback_counts()
        name = torch_flash.register("lenient", policy="warn", backend="hopper")
        attention.activate_flash_attention_impl(name)
        torch.manual_seed(3)
        got = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        attention.restore_flash_attention_impl()
    assert torch.equal(got, want)
    assert list(policy.fallback_counts().values()) == [1]


SHAPES = {
    "square causal": ((2, 4, 200, 64), (2, 4, 200, 64), True),
    "more keys, causal": ((2, 4, 120, 64), (2, 4, 200, 64), True),
    "more queries, causal": ((2, 4, 200, 64), (2, 4, 120, 64), True),
    "no heads": ((3, 100, 128), (3, 140, 128), False),
    "broadcast": ((4, 100, 64), (3, 4, 100, 64), False),
}


@pytest.mark.parametrize("name", SHAPES)
def test_sdpa_replacement(name):
    shape_q, shape_k, causal = SHAPES[name]
    q, k, v = _qkv(shape_q, shape_k)

    def call(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    dout = torch.randn_like(call(q, k, v))
    theirs = _with_gradients(call, (q, k, v), dout)
    with sdpa.sdpa_replacement(backend="hopper"):
        ours = _with_gradients(call, (q, k, v), dout)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        _judge(ours, theirs, _with_gradients(call, exact, dout.double()))


# --- transformers ---------------------------------------------------------------------------------

COMMON = {
    "vocab_size": 197, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "head_dim": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "Llama": {},
    "Mistral": {"sliding_window": 50},
    "Qwen3": {},
    "Gemma2": {
        "sliding_window": 50, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 64
    },
    "GptOss": {"sliding_window": 50, "num_local_experts": 2, "num_experts_per_tok": 2},
}  # fmt: skip


def _models(kind):
    """eager in fp32 (the truth), eager in bf16 (the yardstick), ours in bf16; same weights."""
    transformers = pytest.importorskip("transformers")
    from fa3_train.integrations import hf

    hf.register(backend="hopper")
    config = getattr(transformers, f"{kind}Config")(**COMMON, **MODELS[kind])
    build = transformers.AutoModelForCausalLM.from_config
    made = []
    for name, dtype in (("eager", torch.float32), ("eager", BF16), ("fa3_train", BF16)):
        model = build(copy.deepcopy(config), attn_implementation=name, dtype=dtype).cuda().eval()
        if made:
            model.load_state_dict(made[0].state_dict())
        else:
            for key, parameter in model.named_parameters():
                if "sinks" in key:  # they start at zero: make them matter
                    torch.nn.init.normal_(parameter, std=2.0)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(parameter.bfloat16())
        made.append(model)
    return made


@pytest.mark.parametrize("rows", ["dense", "left padding", "packed"])
@pytest.mark.parametrize("kind", MODELS)
def test_transformers_models(kind, rows):
    models = _models(kind)
    ids = torch.randint(3, 197, (2, 150), device="cuda")
    inputs, keep = {"input_ids": ids, "use_cache": False}, None
    if rows == "left padding":
        mask = torch.ones_like(ids)
        mask[0, :37] = 0
        inputs["attention_mask"], keep = mask, mask.bool()
    if rows == "packed":
        inputs["input_ids"] = ids = ids[:1]
        lengths = (60, 1, 89)
        inputs["position_ids"] = torch.cat(
            [torch.arange(n, device="cuda") for n in lengths]
        )[None]  # fmt: skip
    results = []
    for model in models:
        if rows == "packed" and model is not models[2]:  # eager must be shown the documents
            parts = ids.split(lengths, 1)
            logits = torch.cat(
                [model(input_ids=p, use_cache=False).logits for p in parts], 1
            )  # fmt: skip
        else:
            logits = model(**inputs).logits
        logits = logits if keep is None else logits[keep]
        torch.manual_seed(1)
        logits.backward(torch.randn(logits.shape, device="cuda", dtype=torch.float32).to(logits))
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((logits.detach(), grads))
    truth, theirs, ours = results
    assert_as_good(ours[0], truth[0].double(), theirs[0], "out", f"{kind} logits")
    assert ours[1].keys() == truth[1].keys()
    # Errors of a handful of numbers (sinks, router biases) are too few for a ratio: as one vector,
    # each divided by its size.
    few = [name for name, grad in truth[1].items() if grad.numel() < 1000]
    for name in truth[1].keys() - set(few):
        assert_as_good(ours[1][name], truth[1][name].double(), theirs[1][name], "grad", name)
    sizes = {name: truth[1][name].double().square().mean().sqrt() for name in few}
    joined = [
        torch.cat([(grads[name].double() / sizes[name]).flatten() for name in few]).to(dtype)
        for (_, grads), dtype in ((ours, BF16), (truth, torch.float64), (theirs, BF16))
    ]
    assert_as_good(*joined, "grad", f"{kind} small parameters")


@pytest.mark.parametrize(("save", "runs"), [(True, 1), (False, 2)])
def test_selective_recomputation_keeps_the_attention(save, runs):
    """With torchtitan's save list the backward does not run the attention forward again."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.checkpoint import (
        CheckpointPolicy,
        checkpoint,
        create_selective_checkpoint_contexts,
    )

    from fa3_train.integrations import torchtitan as titan

    forward = torch.ops.fa3_train.attn_fwd.default
    kept = titan.save_ops() if save else set()
    seen = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    def policy_of(ctx, func, *args, **kwargs):
        return (
            CheckpointPolicy.MUST_SAVE if func in kept else CheckpointPolicy.PREFER_RECOMPUTE
        )  # fmt: skip

    def block(q, k, v):
        out = flash_attn_func(q * 1.5, k, v, causal=True, backend="hopper")
        return out * out.sigmoid()

    q, k, v = _qkv((2, 200, 4, 64))
    want = torch.autograd.grad(block(q, k, v).float().sum(), (q, k, v))
    with Count():
        out = checkpoint(
            block, q, k, v, use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy_of),
        )  # fmt: skip
        got = torch.autograd.grad(out.float().sum(), (q, k, v))
    assert seen.count(forward) == runs
    for a, b in zip(got[1:], want[1:], strict=True):  # dq may add up in another order
        assert torch.equal(a, b)


def test_flash_attention_names_run_the_kernels():
    from fa3_train.integrations import flash_attn

    q, k, v = (x.transpose(1, 2) for x in _qkv((2, 4, 200, 64)))
    want = flash_attn_func(q, k, v, causal=True, backend="hopper")
    assert torch.equal(flash_attn.fa3.flash_attn_func(q, k, v, causal=True), want)
    assert torch.equal(flash_attn.fa2.flash_attn_func(q, k, v, 0.0, None, True), want)
    out, lse, *_ = flash_attn.fa3._flash_attn_forward(q, k, v, causal=True)
    dout = torch.randn_like(out)
    got = flash_attn.fa3._flash_attn_backward(dout, q, k, v, out, lse, is_causal=True)
    # dq may add up in another order; dk and dv are repeatable.
    for a, b in zip(got[1:], torch.autograd.grad(want, (q, k, v), dout)[1:], strict=True):
        assert torch.equal(a, b)
