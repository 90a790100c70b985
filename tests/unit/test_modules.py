"""Layers against formulas that share no code with them (naive_llama), values and gradients."""

from __future__ import annotations

import math

import naive_llama as naive
import pytest
import torch

from fa3_train.models.config import ModelConfig
from fa3_train.modules import (
    FlashAttention,
    LMHead,
    RMSNorm,
    Rope,
    SwiGLU,
    TransformerLayer,
    chunked_cross_entropy,
)
from fa3_train.modules.rope import document_positions
from fa3_train.numerics import AGREEMENT_FP8, assert_as_good, relative_rms_error

LENGTHS = [1, 37, 64, 5, 21]
LLAMA31 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CONFIG = ModelConfig(
    vocab_size=97, hidden_size=48, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=16,
    ffn_hidden_size=88, max_seq_len=128,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20)


def cu_of(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def make_layer(config=CONFIG, **options):
    built = TransformerLayer(
        config.hidden_size, config.ffn_hidden_size, config.num_heads, config.num_kv_heads,
        config.head_dim, max_seq_len=config.max_seq_len, rope_theta=config.rope_theta,
        rope_scaling=config.rope_scaling, qk_norm=config.qk_norm, window_size=config.window_size,
        softcap=config.softcap, norm_eps=config.norm_eps, **options,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in built.parameters():
            # Norm weights away from one, so that a norm without weight fails.
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return built


def gradients_of(output, upstream, leaves):
    return torch.autograd.grad((output * upstream).sum(), leaves)


# ------------------------------------------------------------------------------- small layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype):
    norm = RMSNorm(40, eps=1e-3).to(dtype)
    with torch.no_grad():
        norm.weight.normal_(1, 0.3)
    x = (torch.randn(3, 7, 40) * 5).to(dtype).requires_grad_()
    up = torch.randn(3, 7, 40).to(dtype)

    def run(kind):
        leaf, weight = (t.detach().to(kind).requires_grad_() for t in (x, norm.weight))
        out = naive.rms_norm(leaf, weight, norm.eps)
        return [out, *gradients_of(out, up.to(kind), [leaf, weight])]

    out = norm(x)
    assert out.dtype == dtype
    results = [out, *gradients_of(out, up, [x, norm.weight])]
    for a, t, b in zip(results, run(torch.float64), run(dtype), strict=True):
        assert_as_good(a, t, b, "grad")


def test_rms_norm_takes_16_bit_input_with_fp32_weight():
    norm = RMSNorm(16)
    assert norm(torch.randn(4, 16).bfloat16()).dtype == torch.bfloat16


def test_swiglu():
    mlp = SwiGLU(24, 40)
    x = torch.randn(5, 24, requires_grad=True)
    up = torch.randn(5, 24)

    def run(kind):
        w = naive.leaves(mlp, kind)
        leaf = x.detach().to(kind).requires_grad_()
        gate, lift = (leaf @ w["gate_up_proj.weight"].T).chunk(2, -1)
        out = (gate * torch.sigmoid(gate) * lift) @ w["down_proj.weight"].T
        return [out, *gradients_of(out, up.to(kind), [leaf, *w.values()])]

    out = mlp(x)
    results = [out, *gradients_of(out, up, [x, *mlp.parameters()])]
    for a, t, b in zip(results, run(torch.float64), run(torch.float32), strict=True):
        assert_as_good(a, t, b, "grad")


def test_document_positions_with_empty_documents_and_tail():
    cu = torch.tensor([0, 0, 3, 3, 5], dtype=torch.int32)
    assert document_positions(cu, 7).tolist() == [0, 1, 2, 0, 1, 0, 1]


# -------------------------------------------------------------------------------- whole layer


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"qk_norm": True, "rope_scaling": LLAMA31},
        {"window_size": 7},
        {"num_kv_heads": 6, "softcap": 3.0},
        {"num_kv_heads": 1, "head_dim": 24},
    ],
    ids=lambda c: "-".join(c) or "plain",
)
def test_layer_packed_matches_formula(change, backend):
    config = CONFIG.replace(**change)
    if config.softcap:
        backend = "reference"  # SDPA has no softcap
    block = make_layer(config, backend=backend)
    total = sum(LENGTHS)
    x = torch.randn(total, config.hidden_size, requires_grad=True)
    up = torch.randn(total, config.hidden_size)

    def run(kind):
        w = naive.leaves(block, kind)
        leaf = x.detach().to(kind).requires_grad_()
        out = naive.layer(leaf, LENGTHS, w, config)
        return [out, *gradients_of(out, up.to(kind), [leaf, *w.values()])]

    out = block(x, cu_seqlens=cu_of(LENGTHS), max_seqlen=max(LENGTHS))
    names = ["out", "x", *(n for n, _ in block.named_parameters())]
    results = [out, *gradients_of(out, up, [x, *block.parameters()])]
    for name, a, t, b in zip(names, results, run(torch.float64), run(torch.float32), strict=True):
        assert_as_good(a, t, b, "accum", name)


def test_layer_dense_equals_packed():
    block = make_layer()
    x = torch.randn(3, 20, CONFIG.hidden_size)
    dense = block(x)
    packed = block(x.flatten(0, 1), cu_seqlens=cu_of([20] * 3), max_seqlen=20)
    assert_as_good(dense.flatten(0, 1), packed.double(), what="same")


def test_layer_positions_can_be_given():
    block = make_layer()
    x = torch.randn(8, CONFIG.hidden_size)
    cu = cu_of([8])
    default = block(x, cu_seqlens=cu, max_seqlen=8)
    same = block(x, cu_seqlens=cu, max_seqlen=8, position_ids=torch.arange(8, dtype=torch.int32))
    assert torch.equal(default, same)
    # Scores depend on differences of positions only; stretching them must show.
    other = block(x, cu_seqlens=cu, max_seqlen=8, position_ids=3 * torch.arange(8))
    assert not torch.allclose(default, other, atol=1e-3)


def test_nothing_crosses_a_document():
    """Poison one document: the others keep every bit."""
    block = make_layer()
    x = torch.randn(sum(LENGTHS), CONFIG.hidden_size)
    cu = cu_of(LENGTHS)
    clean = block(x, cu_seqlens=cu, max_seqlen=64)
    x[38:102] = float("nan")
    poisoned = block(x, cu_seqlens=cu, max_seqlen=64)
    keep = torch.ones(len(x), dtype=torch.bool)
    keep[38:102] = False
    assert torch.equal(clean[keep], poisoned[keep])
    assert poisoned[~keep].isnan().all()


def test_qkv_views_reach_the_op_without_a_copy(monkeypatch):
    """v is the GEMM's own memory, and nothing in front of the op became contiguous."""
    import fa3_train.modules.attention as attention

    seen = {}

    def spy(q, k, v, *args, **kwargs):
        seen.update(q=q, k=k, v=v)
        return real(q, k, v, *args, **kwargs)

    real = attention.flash_attn_varlen_func
    monkeypatch.setattr(attention, "flash_attn_varlen_func", spy)
    make_layer()(torch.randn(9, 48), cu_seqlens=cu_of([9]), max_seqlen=9)
    assert seen["v"].stride() == ((6 + 2 * 2) * 16, 16, 1)
    assert seen["v"].storage_offset() == (6 + 2) * 16


@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_checkpointing_gives_equal_gradients(policy, backend):
    block = make_layer(backend=backend)
    x = torch.randn(sum(LENGTHS), 48, requires_grad=True)

    def run(kind):
        block.activation_checkpointing = kind
        out = block(x, cu_seqlens=cu_of(LENGTHS), max_seqlen=64)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])]

    for a, b in zip(run("none"), run(policy), strict=True):
        assert torch.equal(a, b)


def test_selective_checkpointing_keeps_the_attention(monkeypatch):
    """Count forward calls of torch's SDPA: full runs it twice, selective once."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from fa3_train.modules.layer import is_attention

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if is_attention(func):
                Count.calls += 1
            return func(*args, **(kwargs or {}))

    counts = {}
    for policy in ("none", "selective", "full"):
        block = make_layer(backend="sdpa", activation_checkpointing=policy)
        Count.calls = 0
        with Count():
            out = block(torch.randn(2, 16, 48, requires_grad=True))
            out.sum().backward()
        counts[policy] = Count.calls
    # 0 would mean that torch renamed its operators and "selective" had become "full".
    assert counts["none"] > 0
    assert counts == {
        "none": counts["none"], "selective": counts["none"], "full": 2 * counts["none"],
    }  # fmt: skip


def test_layer_compiles_in_one_graph():
    block = make_layer(backend="sdpa", activation_checkpointing="selective")
    x = torch.randn(2, 24, 48, requires_grad=True)
    eager = block(x)
    grad = torch.autograd.grad(eager.square().sum(), x)[0]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    again = compiled(x)
    grad_again = torch.autograd.grad(again.square().sum(), x)[0]
    assert_as_good(again, eager.double(), what="same")
    assert_as_good(grad_again, grad.double(), what="same")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"linear": "tee"}, ["linear", "tee", "te_fp8"]),
        ({"activation_checkpointing": "some"}, ["activation_checkpointing", "some", "selective"]),
        ({"precision": "fp4"}, ["precision", "fp4"]),
        ({"window_size": 0}, ["window_size", "0"]),
        ({"precision": "fp8", "softcap": 2.0}, ["softcap", "fp8", "2.0"]),
        ({"num_kv_heads": 5}, ["num_heads", "num_kv_heads", "5"]),
        ({"num_heads": 5, "head_dim": None}, ["hidden_size", "num_heads", "5"]),
    ],
)
def test_layer_refuses(options, words):
    arguments = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 16, **options}
    with pytest.raises(ValueError) as caught:
        TransformerLayer(48, 88, **arguments)
    for word in words:
        assert word in str(caught.value)


def test_core_refuses_missing_length_and_misplaced_rope():
    core = FlashAttention(16)
    q = torch.randn(4, 2, 16)
    with pytest.raises(ValueError, match="max_seqlen_q"):
        core(q, q, q, cu_seqlens_q=cu_of([4]))
    with pytest.raises(ValueError, match="rope"):
        core(q[None], q[None], q[None], rope=(q, q))


def test_fp8_attention_is_near_and_not_the_same():
    """The whole layer with e4m3 attention against the same layer without, packed, both ways."""
    common = {"head_dim": 64, "backend": "reference", "max_seq_len": 64}
    fp8 = TransformerLayer(48, 88, 4, 2, precision="fp8", seed=5, **common)
    plain = TransformerLayer(48, 88, 4, 2, **common)
    with torch.no_grad():
        for a, b in zip(fp8.parameters(), plain.parameters(), strict=True):
            b.copy_(a.normal_(1.0 if a.dim() == 1 else 0.0, 0.2))
    x = torch.randn(sum(LENGTHS), 48, requires_grad=True)
    results = []
    for block in (fp8, plain):
        added = block(x, cu_seqlens=cu_of(LENGTHS), max_seqlen=64) - x
        results.append([added, torch.autograd.grad(added.square().sum(), x)[0]])
    for a, b in zip(*results, strict=True):
        assert 0 < relative_rms_error(a, b) < AGREEMENT_FP8


def test_hadamard_signs_are_seeded_and_survive_meta():
    a, b, c = (FlashAttention(64, precision="fp8", seed=s) for s in (1, 1, 2))
    assert torch.equal(a.signs, b.signs) and not torch.equal(a.signs, c.signs)
    assert set(a.signs.tolist()) == {-1.0, 1.0}
    assert "signs" in a.state_dict() and "signs" not in FlashAttention(64).state_dict()
    with torch.device("meta"):
        meta = FlashAttention(64, precision="fp8", seed=1)
    meta.to_empty(device="cpu")
    meta.reset_parameters()
    assert torch.equal(a.signs, meta.signs)


def test_rope_tables_stay_fp32_in_a_16_bit_model():
    block = make_layer().bfloat16()
    cos, _ = block.attention.rope.tables(torch.device("cpu"))
    assert cos.dtype == torch.float32
    # Position 127 turns the fastest pair by 127 rad; bf16 tables would be off by 2^-9 of cos.
    assert cos[127, 0].item() == pytest.approx(math.cos(127.0), abs=1e-6)
    assert Rope(16, 8).tables(torch.device("cpu"))[0].shape == (8, 8)


# -------------------------------------------------------------------------------------- loss


def cross_entropy_case(tokens=50, hidden=24, vocab=61, dtype=torch.float32):
    x = torch.randn(tokens, hidden).to(dtype).requires_grad_()
    weight = torch.randn(vocab, hidden).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,))
    labels[::7] = -100
    return x, weight, labels


def plain_loss(x, weight, labels, kind):
    x, weight = (t.detach().to(kind).requires_grad_() for t in (x, weight))
    out = torch.nn.functional.cross_entropy(x @ weight.T, labels)
    return [out, *torch.autograd.grad(3 * out, [x, weight])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [1, 16, 50, 0])
def test_chunked_cross_entropy(chunk, dtype):
    x, weight, labels = cross_entropy_case(dtype=dtype)
    out = chunked_cross_entropy(x, weight, labels, chunk_tokens=chunk)
    assert out.dtype == torch.float32 and out.dim() == 0
    results = [out, *torch.autograd.grad(3 * out, [x, weight])]
    truth = plain_loss(x, weight, labels, torch.float64)
    baseline = plain_loss(x, weight, labels, dtype)
    for name, a, t, b in zip(("loss", "dx", "dw"), results, truth, baseline, strict=True):
        assert a.dtype == (torch.float32 if name == "loss" else dtype)
        assert_as_good(a, t, b, "accum", name)


def test_cross_entropy_only_asked_gradients():
    x, weight, labels = cross_entropy_case()
    full = torch.autograd.grad(chunked_cross_entropy(x, weight, labels), [x, weight])
    frozen = chunked_cross_entropy(x, weight.detach(), labels)
    assert torch.equal(torch.autograd.grad(frozen, x)[0], full[0])
    head_only = chunked_cross_entropy(x.detach(), weight, labels)
    assert torch.equal(torch.autograd.grad(head_only, weight)[0], full[1])
    with torch.no_grad():
        assert not chunked_cross_entropy(x, weight, labels).requires_grad


def test_cross_entropy_without_labels_is_zero():
    x, weight, labels = cross_entropy_case()
    out = chunked_cross_entropy(x, weight, torch.full_like(labels, -100))
    gx, gw = torch.autograd.grad(out, [x, weight])
    assert out == 0 and not gx.any() and not gw.any()


def test_cross_entropy_ignored_rows_may_be_anything():
    x, weight, labels = cross_entropy_case()
    clean = torch.autograd.grad(chunked_cross_entropy(x, weight, labels), x)[0]
    with torch.no_grad():
        x[labels == -100] *= 1e30
    out = chunked_cross_entropy(x, weight, labels)
    dirty = torch.autograd.grad(out, x)[0]
    assert out.isfinite() and torch.equal(clean, dirty)


def test_cross_entropy_never_holds_all_logits():
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    x, weight, labels = cross_entropy_case(tokens=512, hidden=8, vocab=1000)
    with Watch():
        chunked_cross_entropy(x, weight, labels, chunk_tokens=32).backward()
    assert largest <= 32 * 1000


def test_cross_entropy_under_autocast_matches_16_bit_weights():
    x, weight, labels = cross_entropy_case()
    with torch.autocast("cpu", torch.bfloat16):
        out = chunked_cross_entropy(x, weight, labels)
    gx, gw = torch.autograd.grad(out, [x, weight])
    assert gx.dtype == gw.dtype == torch.float32
    wide = plain_loss(x, weight, labels, torch.float64)
    narrow = plain_loss(x, weight, labels, torch.bfloat16)
    for a, t, b in zip([out, gx / 1, gw], wide, narrow, strict=True):
        scale = 1 if a is out else 3
        assert_as_good(scale * a, t, b, "accum")


def test_cross_entropy_shapes_are_checked():
    x, weight, labels = cross_entropy_case()
    with pytest.raises(ValueError, match="labels"):
        chunked_cross_entropy(x, weight, labels[:-1])
    with pytest.raises(ValueError, match="weight"):
        chunked_cross_entropy(x, weight.T, labels)


def test_head_logits_and_loss_agree():
    head = LMHead(16, 33, chunk_tokens=4)
    with torch.no_grad():
        head.weight.normal_()
    x, labels = torch.randn(2, 9, 16), torch.randint(0, 33, (2, 9))
    expected = torch.nn.functional.cross_entropy(head(x).flatten(0, 1), labels.flatten())
    assert_as_good(head(x, labels), expected.double(), what="same")
