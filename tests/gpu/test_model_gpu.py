"""The model on a GPU: the Triton loss kernel, bf16 layers, torch.compile, TransformerEngine.

Truth is the formula in FP64 on the CPU (naive_llama); the yardstick is the same formula in bf16.
"""

from __future__ import annotations

import importlib.util

import naive_llama as naive
import pytest
import torch

from fa3_train.models import MODELS, ModelConfig, TransformerLM
from fa3_train.models.hf import name_table
from fa3_train.modules import chunked_cross_entropy
from fa3_train.numerics import assert_as_good
from fa3_train.train.data import DataLoader, RandomDataset

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
CONFIG = ModelConfig(
    vocab_size=1000, hidden_size=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64,
    ffn_hidden_size=512, max_seq_len=512, attention_backend="sdpa",
)  # fmt: skip
needs_te = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="no transformer_engine"
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


# -------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "vocab", "chunk"), [(300, 1000, 128), (70, 50_257, 0), (3, 2, 2)]
)
def test_cross_entropy_kernel(dtype, tokens, vocab, chunk):
    x = (torch.randn(tokens, 64) * 0.7).to(dtype)
    weight = torch.randn(vocab, 64).to(dtype)
    labels = torch.randint(0, vocab, (tokens,))
    labels[::5] = -100

    def plain(kind):
        a, w = (t.to(kind).requires_grad_() for t in (x, weight))
        logits = a @ w.T
        if kind.itemsize == 2:
            logits = logits.float()  # 16-bit GEMM, FP32 soft-max: what the kernel promises
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return [loss, *torch.autograd.grad(3 * loss, [a, w])]

    a, w = (t.cuda().requires_grad_() for t in (x, weight))
    loss = chunked_cross_entropy(a, w, labels.cuda(), chunk_tokens=chunk)
    results = [loss, *torch.autograd.grad(3 * loss, [a, w])]
    for name, got, t, b in zip(
        ("loss", "dx", "dw"), results, plain(torch.float64), plain(dtype), strict=True
    ):
        assert_as_good(got.cpu(), t, b, "accum", name)


def test_cross_entropy_ignores_what_has_no_label():
    x = torch.randn(64, 32, device="cuda", dtype=BF16)
    weight = torch.randn(500, 32, device="cuda", dtype=BF16)
    labels = torch.randint(0, 500, (64,), device="cuda")
    labels[::5] = -100
    clean = chunked_cross_entropy(x, weight, labels)
    x[::5] = float("nan")
    x.requires_grad_()
    loss = chunked_cross_entropy(x, weight, labels)
    grad = torch.autograd.grad(loss, x)[0]
    assert torch.equal(loss, clean) and grad.isfinite().all() and not grad[::5].any()


def test_cross_entropy_of_llama3_needs_one_chunk_of_memory():
    tokens, hidden, vocab = 8192, 256, 128_256
    x = torch.randn(tokens, hidden, device="cuda", dtype=BF16, requires_grad=True)
    weight = torch.randn(vocab, hidden, device="cuda", dtype=BF16, requires_grad=True)
    labels = torch.randint(0, vocab, (tokens,), device="cuda")
    chunked_cross_entropy(x, weight, labels, chunk_tokens=1024).backward()  # library workspaces
    x.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = chunked_cross_entropy(x, weight, labels, chunk_tokens=1024)
    peak = torch.cuda.max_memory_allocated() - before
    # One chunk in bf16, dW in FP32 and dx; all logits in bf16 alone would be 2.1 GB.
    allowed = 1024 * vocab * 2 + 4 * vocab * hidden + 2 * tokens * hidden
    assert loss.isfinite() and peak < 1.1 * allowed


# -------------------------------------------------------------------------------------- SwiGLU


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5, 88), (257, 2 * 2049), (70_000, 16), (0, 64)])
def test_swiglu_kernel(dtype, shape):
    from fa3_train.modules.mlp import gated

    buffer = torch.full((*shape[:-1], shape[-1] + 8), float("nan"), dtype=dtype)
    buffer[..., : shape[-1]] = (torch.randn(shape) * 4).to(dtype)
    up = torch.randn(*shape[:-1], shape[-1] // 2).to(dtype)

    def run(kind, device, function):
        x = buffer.to(device=device, dtype=kind).requires_grad_()
        out = function(x[..., : shape[-1]])  # a view: NaN lies between the rows
        grad = torch.autograd.grad((out * up.to(device=device, dtype=kind)).sum(), x)[0]
        assert not grad[..., shape[-1] :].any()
        return out.cpu(), grad.cpu()

    def formula(x):
        gate, lift = x.chunk(2, -1)
        return gate * torch.sigmoid(gate) * lift

    results = run(dtype, "cuda", gated)
    truth, baseline = run(torch.float64, "cpu", formula), run(dtype, "cpu", formula)
    for got, t, b in zip(results, truth, baseline, strict=True):
        assert_as_good(got, t, b, "grad")


def test_swiglu_takes_a_transposed_gradient():
    from fa3_train.modules.mlp import gated

    x = torch.randn(6, 32, device="cuda", requires_grad=True)
    up = torch.randn(16, 6, device="cuda")
    a = torch.autograd.grad(gated(x), x, up.t())[0]
    b = torch.autograd.grad(gated(x), x, up.t().contiguous())[0]
    assert torch.equal(a, b)


# ------------------------------------------------------------------------------------- norm


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5, 1024), (700, 1500), (2, 16_384), (0, 2048)])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("used", ["both", "norm", "stream"])
def test_norm_kernel(dtype, shape, adds, used):
    """norm(x + r) and x + r, with gradients coming down either or both."""
    from fa3_train.modules import RMSNorm

    dim = shape[-1]
    data = [torch.full((*shape[:-1], dim + 8), float("nan"), dtype=dtype) for _ in range(2)]
    for x in data:
        x[..., :dim] = (torch.randn(shape) * 3).to(dtype)
    ups = [torch.randn(shape).to(dtype) for _ in range(2)]
    scale = torch.randn(dim).to(dtype)

    def run(kind, device):
        leaves = [x.to(device=device, dtype=kind).requires_grad_() for x in data[: 1 + adds]]
        views = [x[..., :dim] for x in leaves]  # NaN lies between the rows
        norm = RMSNorm(dim).to(device=device, dtype=kind)
        norm.weight.data.copy_(scale)
        if device == "cuda":
            assert norm._own_kernel(views[0])
        pair = norm(*views, with_stream=True)
        parts = [
            (out * up.to(device=device, dtype=kind)).sum()
            for out, up in zip(pair, ups, strict=True)
        ]
        loss = {"both": sum(parts), "norm": parts[0], "stream": parts[1]}[used]
        grads = torch.autograd.grad(loss, [*leaves, norm.weight], allow_unused=True)
        return [r.cpu() for r in (*pair, *grads) if r is not None]

    results = run(dtype, "cuda")
    truth, baseline = run(torch.float64, "cpu"), run(dtype, "cpu")
    assert len(results) == len(truth)
    for got, t, b in zip(results, truth, baseline, strict=True):
        assert_as_good(got, t, b, "accum")


# ------------------------------------------------------------------------------------- model


def batch_of(config, tokens=300):
    source = RandomDataset(config.vocab_size, tokens, seed=2, doc_len=70)
    return next(DataLoader(source, 1, prefetch=0))


def run(model, batch, labelled=True):
    batch = batch.to("cuda")
    return model(
        batch.tokens, batch.labels if labelled else None, position_ids=batch.position_ids,
        cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen,
    )  # fmt: skip


def trained_like(model):
    """Weights large enough that attention and norms matter to the loss."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.08)
    return model


def bf16_model(config):
    return trained_like(TransformerLM(config).bfloat16())


def judge(model, batch, logits, loss, grads, weights, mm=naive.product):
    """Logits and gradients against FP64, with bf16 PyTorch (`mm` as given) as the yardstick.

    The loss is one number, whose bf16 error is luck: it is judged by the logits it came from.
    """
    lengths = batch.cu_seqlens.diff().tolist()

    def formula(dtype, mm):
        w = {n: t.detach().cpu().to(dtype).requires_grad_() for n, t in weights.items()}
        out = naive.logits(batch.tokens, lengths, w, model.config, mm)
        value = torch.nn.functional.cross_entropy(
            out.float() if dtype == BF16 else out, batch.labels
        )
        return [out, *torch.autograd.grad(value, list(w.values()))]

    own = torch.nn.functional.cross_entropy(logits.cpu().double(), batch.labels)
    assert_as_good(loss.cpu(), own, what="same", name="loss")
    truth, baseline = formula(torch.float64, naive.product), formula(BF16, mm)
    for name, a, t, b in zip(["logits", *weights], [logits, *grads], truth, baseline, strict=True):
        assert_as_good(a.cpu(), t, b, "accum", name)


@pytest.mark.parametrize("backend", ["sdpa", "hopper"])
@pytest.mark.parametrize(
    "change",
    [{}, {"qk_norm": True, "head_dim": 128, "tie_embeddings": False}, {"window_size": 40}],
    ids=lambda c: "-".join(c) or "plain",
)
@pytest.mark.parametrize("policy", ["none", "selective"])
def test_bf16_loss_and_gradients(backend, change, policy):
    config = CONFIG.replace(**change, attention_backend=backend, activation_checkpointing=policy)
    model = bf16_model(config).cuda()
    batch = batch_of(config)
    loss = run(model, batch)
    weights = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(weights.values()))
    judge(model, batch, run(model, batch, labelled=False), loss, grads, weights)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 64), (6, 2, 128), (2, 1, 256)])
@pytest.mark.parametrize("options", [{}, {"window_size": (40, 0)}], ids=["causal", "window"])
def test_the_product_alone_gives_the_same_bits(packed, heads, kv_heads, dim, options):
    """packed_attention launches the very kernels: only where they read and write differs."""
    from fa3_train.ops.attention import flash_attn_func, flash_attn_varlen_func
    from fa3_train.ops.packed_qkv import packed_attention
    from fa3_train.ops.preprocess import rope
    from fa3_train.rotary import rope_tables

    cu = torch.tensor([0, 1, 130, 130, 300], dtype=torch.int32, device="cuda") if packed else None
    shape = (300,) if packed else (2, 150)
    qkv = torch.randn(*shape, heads + 2 * kv_heads, dim, device="cuda", dtype=BF16)
    up = torch.randn(*shape, heads, dim, device="cuda", dtype=BF16)
    cos, sin = rope_tables(dim, 300, device="cuda")
    common = {"causal": True, "deterministic": True, **options}

    def by_views(x):
        q, k, v = x.split((heads, kv_heads, kv_heads), dim=-2)
        if not packed:
            return flash_attn_func(*rope(q, k, cos, sin), v, **common)
        from fa3_train.modules.rope import document_positions

        q, k = rope(q, k, cos, sin, position_ids=document_positions(cu, 300))
        return flash_attn_varlen_func(q, k, v, cu, cu, 170, 170, **common)

    def by_product(x):
        lengths = {"cu_seqlens": cu, "max_seqlen": 170} if packed else {}
        return packed_attention(x * 1.0, heads, kv_heads, cos, sin, **lengths, **common)

    results = []
    for run_one in (by_views, by_product):
        x = qkv.clone().requires_grad_()
        out = run_one(x)
        results.append((out, *torch.autograd.grad(out, x, up)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 64), (6, 2, 128)])
def test_the_product_alone_in_fp8(packed, heads, kv_heads, dim):
    """The same codes and kernels as flash_attn_fp8_func; only dq is summed by atomics."""
    from fa3_train.ops.attention_fp8 import flash_attn_fp8_func, flash_attn_fp8_varlen_func
    from fa3_train.ops.packed_qkv import packed_attention
    from fa3_train.rotary import rope_tables

    cu = torch.tensor([0, 1, 130, 130, 300], dtype=torch.int32, device="cuda") if packed else None
    shape = (300,) if packed else (2, 150)
    qkv = torch.randn(*shape, heads + 2 * kv_heads, dim, device="cuda", dtype=BF16)
    up = torch.randn(*shape, heads, dim, device="cuda", dtype=BF16)
    cos, sin = rope_tables(dim, 300, device="cuda")
    signs = torch.randint(0, 2, (dim,), device="cuda").float() * 2 - 1
    common = {"causal": True, "cos": cos, "sin": sin, "signs": signs}

    def by_views(x):
        q, k, v = x.split((heads, kv_heads, kv_heads), dim=-2)
        if packed:
            return flash_attn_fp8_varlen_func(q, k, v, cu, cu, 170, 170, **common)
        return flash_attn_fp8_func(q, k, v, **common)

    def by_product(x):
        lengths = {"cu_seqlens": cu, "max_seqlen": 170} if packed else {}
        return packed_attention(x * 1.0, heads, kv_heads, fp8=True, **lengths, **common)

    results = []
    for run_one in (by_views, by_product):
        x = qkv.clone().requires_grad_()
        out = run_one(x)
        (grad,) = torch.autograd.grad(out, x, up)
        results.append((out, *grad.split((heads, kv_heads, kv_heads), dim=-2)))
    for name, a, b in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        if name == "dq":
            assert (a - b).float().norm() < 5e-3 * a.float().norm()
        else:
            assert torch.equal(a, b), name


def test_compiled_layers():
    config = CONFIG.replace(
        attention_backend="hopper", compile_layers=True, activation_checkpointing="selective"
    )
    model = bf16_model(config).cuda()
    weights = dict(model.named_parameters())
    for tokens in (300, 400, 300):  # other lengths and numbers of documents
        batch = batch_of(config, tokens)
        loss = run(model, batch)
        grads = torch.autograd.grad(loss, list(weights.values()))
    judge(model, batch, run(model, batch, labelled=False), loss, grads, weights)


def test_model_built_on_the_device():
    with torch.device("cuda"):
        model = TransformerLM(MODELS["tiny"])
    assert all(p.is_cuda for p in model.parameters())
    assert model.layers[0].attention.qkv.linear.weight.std().item() == pytest.approx(0.02, rel=0.05)


# -------------------------------------------------------------------------- TransformerEngine


def te_model(config, donor):
    """A TransformerEngine model with the donor's weights, and the donor's names -> its names."""
    with torch.device("cuda"):
        model = TransformerLM(config).bfloat16()
    ours, theirs = name_table(donor.config), name_table(config)
    by_source = {sources: name for name, sources in theirs.items()}
    names = {name: by_source[sources] for name, sources in ours.items()}
    mine = dict(model.named_parameters())
    assert set(names.values()) == set(mine), "every parameter has a Hugging Face name"
    with torch.no_grad():
        for name, other in names.items():
            mine[other].copy_(dict(donor.named_parameters())[name])
    return model, names


@needs_te
@pytest.mark.parametrize(
    ("linear", "recipe", "policy"),
    [
        ("te", "current", "none"),
        ("te", "current", "selective"),
        ("te_fp8", "current", "none"),
        ("te_fp8", "current", "full"),
        ("te_fp8", "delayed", "none"),
        ("te_fp8", "block", "none"),
    ],
)
def test_transformer_engine_layers(linear, recipe, policy):
    donor = bf16_model(CONFIG)
    config = CONFIG.replace(linear=linear, te_recipe=recipe, activation_checkpointing=policy)
    model, names = te_model(config, donor)
    batch = batch_of(config, tokens=320)
    for _ in range(3 if recipe == "delayed" else 1):  # delayed scaling needs a history of maxima
        model.zero_grad()
        loss = run(model, batch)
        loss.backward()
    mine = dict(model.named_parameters())
    grads = [mine[names[n]].grad for n, _ in donor.named_parameters()]
    mm = naive.fp8_product if linear == "te_fp8" else naive.product
    logits = run(model, batch, labelled=False)
    judge(donor, batch, logits, loss, grads, dict(donor.named_parameters()), mm)


@pytest.mark.parametrize(
    "linear", ["torch", *(pytest.param(k, marks=needs_te) for k in ("te", "te_fp8"))]
)
@pytest.mark.parametrize("policy", ["none", "selective"])
def test_gemms_sum_the_weight_gradients(linear, policy):
    """Buckets that the GEMMs write hold what the gradients of two micro-batches add up to."""
    from fa3_train.train.engines.gradients import GradientBuckets

    config = CONFIG.replace(
        linear=linear, attention_backend="hopper", activation_checkpointing=policy
    )
    with torch.device("cuda"):
        model = trained_like(TransformerLM(config).bfloat16())
    named = list(model.named_parameters())
    batches = [batch_of(config, tokens) for tokens in (320, 160)]
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in named}
    for batch in batches:
        run(model, batch).backward()
        for name, p in named:
            sums[name] += p.grad
            p.grad = None
    buckets = GradientBuckets(named, 1)
    buckets.fuse(model)
    for _ in range(2):
        for index, batch in enumerate(batches):
            buckets.begin(first=index == 0, last=index == 1)
            run(model, batch).backward()
            buckets.expect(first=index == 1)
        buckets.finish()
    wide = 0
    for (name, p), view in zip(named, buckets.views, strict=True):
        assert p.grad is None
        assert (view - sums[name]).norm() < 0.02 * sums[name].norm(), name
        wide += int(not torch.equal(view, view.bfloat16().float()))
    assert wide >= 4 * config.num_layers
    buckets.close()


@needs_te
def test_transformer_layer_alone_in_fp8_really_is_fp8():
    from fa3_train.modules import TransformerLayer

    with torch.device("cuda"):
        fp8 = TransformerLayer(256, 512, 4, 2, linear="te_fp8", backend="sdpa").bfloat16()
    wide = TransformerLayer(256, 512, 4, 2, linear="te", backend="sdpa").cuda().bfloat16()
    wide.load_state_dict(fp8.state_dict(), strict=False)
    x = torch.randn(2, 64, 256, device="cuda", dtype=BF16)
    a, b = fp8(x), wide(x)
    assert torch.equal(b, wide(x)) and not torch.equal(a, b)
