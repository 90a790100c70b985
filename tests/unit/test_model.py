"""The language model as a whole: configurations, packing, initialisation, errors."""

from __future__ import annotations

import math
import subprocess
import sys
from types import SimpleNamespace

import naive_llama as naive
import pytest
import torch

from fa3_train.models import MODELS, ModelConfig, TransformerLM, model_config
from fa3_train.numerics import assert_as_good
from fa3_train.train.data import DataLoader, RandomDataset

SMALL = ModelConfig(
    vocab_size=101, hidden_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    ffn_hidden_size=80, max_seq_len=64,
)  # fmt: skip


def small(**changes):
    torch.manual_seed(11)
    model = TransformerLM(SMALL.replace(**changes))
    with torch.no_grad():  # large enough weights that attention matters to the loss
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model


def packed_batch(**options):
    return next(DataLoader(RandomDataset(101, 48, seed=4, doc_len=14), 2, prefetch=0, **options))


def lengths_of(batch):
    return batch.cu_seqlens.diff().tolist()


def run(model, batch):
    return model(
        batch.tokens, batch.labels, position_ids=batch.position_ids, cu_seqlens=batch.cu_seqlens,
        max_seqlen=batch.max_seqlen,
    )  # fmt: skip


# ----------------------------------------------------------------------------- configurations


@pytest.mark.parametrize("name", MODELS)
def test_named_configs_are_valid_and_counted(name):
    config = model_config(name)
    config.validate()
    with torch.device("meta"):
        built = TransformerLM(config.replace(num_layers=2))
    counted = config.replace(num_layers=2)
    assert sum(p.numel() for p in built.parameters()) == counted.num_parameters()
    matrices = sum(p.numel() for n, p in built.named_parameters() if p.dim() == 2)
    lookup = 0 if config.tie_embeddings else config.embedding_parameters()
    assert matrices - lookup == counted.matmul_parameters()


def test_parameter_counts_are_the_published_ones():
    """Counts of Meta's checkpoints; GPT-3's is named 175B with 174.6e9 of them in its layers."""
    published = {
        "llama3_1b": 1_235_814_400,
        "llama3_8b": 8_030_261_248,
        "llama3_70b": 70_553_706_496,
        "llama3_405b": 405_853_388_800,
    }
    for name, count in published.items():
        assert MODELS[name].num_parameters() == count
    gpt3 = MODELS["gpt3_175b"]
    h = gpt3.hidden_size
    assert gpt3.layer_parameters() == 12 * h * h + 2 * h
    assert gpt3.num_parameters() == pytest.approx(175e9, rel=0.01)


def test_model_config_hands_out_copies():
    first = model_config("llama3_8b")
    first.rope_scaling["factor"] = 1.0
    first.num_layers = 1
    assert MODELS["llama3_8b"].rope_scaling["factor"] == 8.0
    assert MODELS["llama3_8b"].num_layers == 32
    with pytest.raises(ValueError, match="llama3_8b.*lama"):
        model_config("lama")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 0}, ["model.hidden_size", "0"]),
        ({"num_layers": 2.5}, ["model.num_layers", "2.5"]),
        ({"num_heads": 6, "num_kv_heads": 4}, ["num_heads", "num_kv_heads", "6", "4"]),
        ({"head_dim": 20}, ["head_dim", "multiple of 8", "20"]),
        ({"head_dim": 264}, ["head_dim", "256", "264"]),
        ({"norm_eps": 0.0}, ["norm_eps"]),
        ({"softcap": -1.0}, ["softcap", "-1"]),
        ({"window_size": 0}, ["window_size", "0"]),
        ({"loss_chunk_tokens": -1}, ["loss_chunk_tokens"]),
        ({"attention_backend": "flash"}, ["attention_backend", "flash", "sdpa"]),
        ({"linear": "fp8"}, ["model.linear", "te_fp8"]),
        ({"activation_checkpointing": True}, ["activation_checkpointing", "True"]),
        ({"rope_scaling": {"factor": 2.0}}, ["rope_scaling", "low_freq_factor"]),
        ({"rope_scaling": {"rope_type": "yarn"}}, ["rope_type", "yarn"]),
        ({"attention_precision": "fp8", "head_dim": 24}, ["fp8", "head_dim", "24"]),
        ({"attention_precision": "fp8", "head_dim": 64, "softcap": 1.0}, ["softcap", "fp8"]),
        ({"linear": "te_fp8", "hidden_size": 40}, ["te_fp8", "hidden_size", "40"]),
        (
            {"linear": "te_fp8", "te_recipe": "delayed", "activation_checkpointing": "full"},
            ["te_recipe", "activation_checkpointing", "full"],
        ),
    ],
)
def test_impossible_configs_are_refused(change, words):
    with pytest.raises(ValueError) as caught:
        TransformerLM(SMALL.replace(**change))
    for word in words:
        assert word in str(caught.value)


# ------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("tied", [True, False])
def test_packed_loss_and_gradients_match_the_formula(tied):
    model = small(tie_embeddings=tied)
    batch = packed_batch()
    results = [loss := run(model, batch), *torch.autograd.grad(loss, list(model.parameters()))]

    def truth(dtype):
        w = naive.leaves(model, dtype)
        value = naive.loss(batch.tokens, batch.labels, lengths_of(batch), w, model.config)
        return [value, *torch.autograd.grad(value, list(w.values()))]

    names = ["loss", *(n for n, _ in model.named_parameters())]
    for name, a, t, b in zip(
        names, results, truth(torch.float64), truth(torch.float32), strict=True
    ):
        assert_as_good(a, t, b, "accum", name)


def test_packed_loss_is_the_mean_over_documents():
    """Documents fed one by one, weighted by their labels, give the packed loss."""
    model = small().double()
    batch = packed_batch()
    total = count = 0
    with torch.no_grad():
        for tokens, labels in zip(
            batch.tokens.split(lengths_of(batch)),
            batch.labels.split(lengths_of(batch)),
            strict=True,
        ):
            labelled = int((labels != -100).sum())
            total += model(tokens[None], labels[None]) * labelled
            count += labelled
        assert run(model, batch).item() == pytest.approx((total / count).item(), rel=1e-6)


def test_one_long_row_equals_dense():
    model = small()
    tokens = torch.randint(0, 101, (40,))
    assert_as_good(model(tokens), model(tokens[None])[0].double(), what="same")


def test_checkpointing_policies_give_equal_gradients():
    batch = packed_batch()
    results = []
    for policy in ("none", "selective", "full"):
        model = small(activation_checkpointing=policy, tie_embeddings=False)
        loss = run(model, batch)
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for others in zip(*results, strict=True):
        assert all(torch.equal(others[0], other) for other in others[1:])


def test_a_compiled_model_trains_alike_and_does_not_recompile():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    plain, compiled = small(), small()
    for layer in compiled.layers:
        layer.compile(backend=counter, fullgraph=True)
    loader = DataLoader(RandomDataset(101, 48, seed=4, doc_len=14), 2, prefetch=0)
    for step in range(5):
        batch = next(loader)
        expected = torch.autograd.grad(run(plain, batch), list(plain.parameters()))
        actual = torch.autograd.grad(run(compiled, batch), list(compiled.parameters()))
        for a, b in zip(actual, expected, strict=True):
            assert_as_good(a, b.double(), b + b.abs().max() * 1e-6, what="accum")
        if step == 1:
            settled = counter.frame_count
    # Lengths and number of documents change with each batch: two sightings make them dynamic.
    # All layers share one compiled graph, or a deep model would reach the recompile limit.
    assert counter.frame_count == settled == 2


# ----------------------------------------------------------------------------- initialisation


def test_initial_scale_and_loss():
    torch.manual_seed(5)
    model = TransformerLM(MODELS["tiny"].replace(num_layers=8))
    wide = model.layers[3].attention.qkv.linear.weight.std().item()
    out = model.layers[3].attention.out_proj.weight.std().item()
    assert wide == pytest.approx(0.02, rel=0.02)
    assert out == pytest.approx(0.02 / 16**0.5, rel=0.02)
    tokens = torch.randint(0, 4096, (1, 65))
    loss = model(tokens[:, :-1], tokens[:, 1:]).item()
    # log(vocab), plus half the variance of the logits and the tied head's liking for its input.
    assert loss == pytest.approx(math.log(4096), abs=0.2)


def test_meta_then_empty_then_init_equals_direct():
    direct = small_init()
    with torch.device("meta"):
        late = TransformerLM(SMALL)
    late.to_empty(device="cpu")
    assert late.head.weight is late.embedding.weight
    torch.manual_seed(7)
    late.init_weights()
    for (name, a), b in zip(direct.named_parameters(), late.parameters(), strict=True):
        assert torch.equal(a, b), name


def small_init():
    torch.manual_seed(7)
    return TransformerLM(SMALL)


# ------------------------------------------------------------------------------------- errors


def test_too_long_sequences_and_incomplete_packing_are_refused():
    model = small()
    with pytest.raises(ValueError, match=r"65 tokens.*max_seq_len=64"):
        model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="max_seqlen"):
        model(torch.zeros(8, dtype=torch.long), cu_seqlens=torch.tensor([0, 8]).int())
    with pytest.raises(ValueError, match=r"packed.*\(1, 8\)"):
        model(
            torch.zeros(1, 8, dtype=torch.long),
            cu_seqlens=torch.tensor([0, 8]).int(),
            max_seqlen=8,
        )


# -------------------------------------------------------------------------- TransformerEngine

_FAKES = {
    "missing": (None, ImportError, "not installed"),
    "no_gpu": ("raise RuntimeError('no GPU found')", RuntimeError, "no GPU found"),
    "broken": ("import a_module_that_is_not_there", RuntimeError, "a_module_that_is_not_there"),
}


@pytest.mark.parametrize("kind", _FAKES)
def test_unusable_transformer_engine_says_why(kind, tmp_path, monkeypatch):
    from fa3_train.modules import te

    source, error, words = _FAKES[kind]
    for name in [n for n in sys.modules if n.split(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, name)
    if source is None:
        monkeypatch.setitem(sys.modules, "transformer_engine", None)
    else:
        package = tmp_path / "transformer_engine" / "pytorch"
        package.mkdir(parents=True)
        (package.parent / "__init__.py").write_text("")
        (package / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
    te.load.cache_clear()
    with pytest.raises(error, match=words) as caught:
        TransformerLM(SMALL.replace(linear="te"))
    assert "model.linear" in str(caught.value) and "transformer_engine" in str(caught.value)
    for name in [n for n in sys.modules if n.split(".")[0] == "transformer_engine"]:
        del sys.modules[name]  # not by monkeypatch, which would put the fake back


FIRST: list[bool | None] = []  # what each call of a stand-in was told


class _NormLinear(torch.nn.Module):
    """Parameter names and arithmetic of TransformerEngine's LayerNormLinear and Linear."""

    def __init__(self, inputs, outputs, norm=True, eps=0.0, **options):
        super().__init__()
        assert options.pop("bias") is False
        self.eps = eps
        if norm:
            assert options["normalization"] == "RMSNorm"
            self.layer_norm_weight = torch.nn.Parameter(torch.empty(inputs))
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x, is_first_microbatch=None):
        FIRST.append(is_first_microbatch)
        if hasattr(self, "layer_norm_weight"):
            x = naive.rms_norm(x, self.layer_norm_weight, self.eps)
        return x @ self.weight.T


class _OnlyLinear(_NormLinear):
    def __init__(self, inputs, outputs, **options):
        super().__init__(inputs, outputs, norm=False, **options)


class _NormMLP(torch.nn.Module):
    """The same for LayerNormMLP."""

    def __init__(self, hidden, ffn, eps, bias, normalization, activation, **options):
        super().__init__()
        assert (bias, normalization, activation) == (False, "RMSNorm", "swiglu")
        self.eps = eps
        self.layer_norm_weight = torch.nn.Parameter(torch.empty(hidden))
        self.fc1_weight = torch.nn.Parameter(torch.empty(2 * ffn, hidden))
        self.fc2_weight = torch.nn.Parameter(torch.empty(hidden, ffn))

    def forward(self, x, is_first_microbatch=None):
        FIRST.append(is_first_microbatch)
        x = naive.rms_norm(x, self.layer_norm_weight, self.eps) @ self.fc1_weight.T
        gate, up = x.chunk(2, -1)
        return (torch.nn.functional.silu(gate) * up) @ self.fc2_weight.T


def test_wiring_of_transformer_engine_modules(monkeypatch, tmp_path):
    """With stand-ins of the same names: weights of a torch model give the same loss. What the real
    package computes is tested on a GPU."""
    from fa3_train.models import hf
    from fa3_train.modules import te

    fake = SimpleNamespace(LayerNormLinear=_NormLinear, LayerNormMLP=_NormMLP, Linear=_OnlyLinear)
    monkeypatch.setattr(te, "load", lambda: fake)
    donor = small(tie_embeddings=False)
    hf.save_pretrained(donor, tmp_path, dtype=torch.float32)
    model = TransformerLM(donor.config.replace(linear="te"))
    # init_weights knows these names as well: matrices that write the residual stream are smaller.
    mlp = model.layers[0].mlp
    assert mlp.fc2_weight.std() < 0.7 * mlp.fc1_weight.std()
    assert (mlp.layer_norm_weight == 1).all()
    hf.load_weights(model, tmp_path)
    batch = packed_batch()
    FIRST.clear()
    assert_as_good(run(model, batch), run(donor, batch).double(), what="same")
    assert set(FIRST) == {None}, "no engine has said anything about micro-batches"
    for module in model.modules():
        if hasattr(module, "first_microbatch"):
            module.first_microbatch = False
    FIRST.clear()
    run(model, batch)
    assert FIRST == [False] * 6


def test_importing_the_model_needs_no_optional_package():
    code = (
        "import sys; from fa3_train.models import TransformerLM; import fa3_train.models.hf; "
        "bad = {'transformer_engine', 'transformers', 'deepspeed', 'wandb', 'datasets', 'triton'} "
        "& set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("end", [40, 33])
def test_one_document_goes_dense(monkeypatch, end):
    """The same numbers as through the packed ops, also where the row goes on after the document."""
    from fa3_train.modules import attention

    model = small()
    tokens, labels = torch.randint(0, 101, (2, 40))
    labels[end:] = -100
    positions = torch.arange(40, dtype=torch.int32)
    parameters = list(model.parameters())

    def results(borders):
        cu = torch.tensor(borders, dtype=torch.int32)
        common = {"position_ids": positions, "cu_seqlens": cu, "max_seqlen": 40}
        loss = model(tokens, labels, **common)
        logits = model(tokens, **common)
        return [loss, logits[:end], *torch.autograd.grad(loss, parameters)]

    packed = results([0, 0, end])  # an empty document keeps it packed
    monkeypatch.setattr(attention, "flash_attn_varlen_func", None)
    dense = results([0, end])
    assert dense[1].shape == (end, 101)
    for a, b in zip(dense, packed, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
