"""FLOP formulas against hand counts, peaks, and the meter on the CPU."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fa3_train.models.config import MODELS
from fa3_train.modules import FlashAttention, TransformerLayer
from fa3_train.train.compose import load
from fa3_train.train.flops import peak_of, step_flops, visible_square
from fa3_train.train.metrics import PHASES, StepMeter

H100 = "NVIDIA H100 80GB HBM3"

# ---- FLOPs ------------------------------------------------------------------------------------


def count_by_hand(model, lengths):
    """Multiply-adds of every product, document by document: forward x 3, two FLOPs each."""
    h, q, kv, f = model.hidden_size, model.q_size, model.kv_size, model.ffn_hidden_size
    per_token = model.num_layers * (h * q + 2 * h * kv + q * h + 3 * h * f)
    per_token += h * model.vocab_size
    attention = 0.0
    for length in lengths:
        # Q K^T and P V: every head, half of the square.
        attention += model.num_layers * model.num_heads * 2 * model.head_dim * length**2 / 2
    return 3 * 2 * (per_token * sum(lengths) + attention)


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("lengths", [[8192], [1, 7, 500, 1540], [1]])
def test_causal_flops_are_the_products_counted_one_by_one(name, lengths):
    model = MODELS[name]
    got = step_flops(model, sum(lengths), sum(n * n for n in lengths), 8192)
    assert got.causal == pytest.approx(count_by_hand(model, lengths), rel=1e-12)


@pytest.mark.parametrize(
    ("seq_len", "causal", "palm"), [(8192, 51.5, 57.9), (32768, 70.8, 96.6), (131072, 148.1, 251.2)]
)
def test_published_llama3_8b_figures(seq_len, causal, palm):
    """GFLOP per token under Megatron-LM's and torchtitan's conventions."""
    got = step_flops(MODELS["llama3_8b"], seq_len, seq_len**2, seq_len)
    assert got.causal / seq_len / 1e9 == pytest.approx(causal, abs=0.05)
    assert got.palm / seq_len / 1e9 == pytest.approx(palm, abs=0.05)


def test_short_documents_cost_less_but_palm_does_not_notice():
    model = MODELS["llama3_8b"]
    one = step_flops(model, 8192, 8192**2, 8192)
    many = step_flops(model, 8192, 8 * 1024**2, 8192)
    core = 6 * model.num_layers * model.num_heads * model.head_dim
    assert one.causal - many.causal == core * (8192**2 - 8 * 1024**2)
    assert one.palm == many.palm


def test_hardware_flops_of_recomputation():
    model = MODELS["llama3_8b"]
    tokens, sum_sq = 8192, 8192**2
    core = model.num_layers * model.num_heads * model.head_dim
    layers = model.matmul_parameters() - model.embedding_parameters()
    plain, selective, full = (
        step_flops(model.replace(activation_checkpointing=c), tokens, sum_sq, tokens).hardware
        for c in ("none", "selective", "full")
    )
    causal = step_flops(model, tokens, sum_sq, tokens).causal
    assert plain - causal == pytest.approx(core * sum_sq)
    assert selective - plain == pytest.approx(2 * layers * tokens)
    assert full - selective == pytest.approx(2 * core * sum_sq)


@pytest.mark.parametrize(("length", "window"), [(1000, 100), (1000, 1000), (100, 1000), (64, 1)])
def test_windowed_pairs_against_a_count(length, window):
    pairs = sum(min(i + 1, window) for i in range(length))
    got = visible_square(length**2, length, window) / 2
    # The conventions drop the half diagonal: at most half a pair per query.
    assert abs(got - pairs) <= length / 2


def test_fp8_share_and_both_denominators():
    model = MODELS["llama3_8b"].replace(linear="te_fp8", attention_precision="fp8")
    flops = step_flops(model, 8192, 8192**2, 8192)
    layers = model.matmul_parameters() - model.embedding_parameters()
    core = model.num_layers * model.num_heads * model.head_dim
    assert flops.fp8 == 6 * layers * 8192 + 2 * core * 8192**2
    peak = peak_of(H100)
    both = flops.fp8 / peak.fp8 + (flops.causal - flops.fp8) / peak.bf16
    assert flops.ideal_seconds(peak, 2) == pytest.approx(both / 2)
    plain = step_flops(MODELS["llama3_8b"], 8192, 8192**2, 8192)
    assert plain.fp8 == 0
    assert plain.ideal_seconds(peak, 1) == pytest.approx(plain.causal / peak.bf16)
    assert flops.ideal_seconds(peak_of("NVIDIA A100-SXM4-80GB"), 1) is None


# ---- peaks ------------------------------------------------------------------------------------


def test_peaks_are_dense():
    assert peak_of(H100).bf16 == 989.5e12
    assert peak_of(H100).fp8 == 2 * peak_of(H100).bf16
    assert peak_of("NVIDIA H100 PCIe").bf16 < peak_of("NVIDIA H100 NVL").bf16 < 989.5e12
    assert peak_of("NVIDIA A100-SXM4-40GB").fp8 is None


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA H100",
        "NVIDIA GeForce RTX 4090",
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        "NVIDIA H200 MIG 1g.18gb",
        "Tesla H100 80GB HBM3",
        "",
    ],
)
def test_no_peak_is_guessed(name):
    assert peak_of(name) is None


# ---- the meter --------------------------------------------------------------------------------


class Attend(nn.Module):
    """A projection, then our attention core: the probe has to find it inside."""

    def __init__(self, delay: float = 0.0) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 48)
        self.core = FlashAttention(16, backend="reference")
        self.delay = delay

    def forward(self, x):
        time.sleep(self.delay)
        return self.core(*self.qkv(x)).square().sum()

    def qkv(self, x):
        return self.proj(x).view(1, -1, 3, 16).split(1, dim=2)


def batch(lengths):
    return SimpleNamespace(num_tokens=sum(lengths), sum_sq_seqlen=sum(n * n for n in lengths))


def make(model=None, **kwargs):
    words = kwargs.pop("words", [])
    config = load(["model=tiny", "logging.attention_every=2", *words])
    return StepMeter(
        config, config.model_config(), device=torch.device("cpu"), model=model, **kwargs
    )


def one_step(meter, number, model, lengths=(6, 10)):
    meter.start_step(number)
    with meter.phase("data"):
        time.sleep(0.01)
    meter.count(batch(lengths))
    with meter.phase("forward"):
        loss = model(torch.randn(16, 16))
    with meter.phase("backward"):
        loss.backward()
    with meter.phase("optimizer"):
        time.sleep(0.005)
    meter.end_step(loss=loss.detach(), grad_norm=None, lr=0.1)
    return float(loss.detach())


def test_records_of_an_interval():
    model = Attend()
    meter = make(model, tokens_seen=100)
    losses = [one_step(meter, n, model) for n in (1, 2, 3)]
    records = meter.flush()
    assert meter.flush() == []
    assert [r["step"] for r in records] == [1, 2, 3]
    assert [r["loss"] for r in records] == losses
    assert [r["tokens_total"] for r in records] == [116, 132, 148]
    for r in records:
        assert r["grad_norm"] is None and r["lr"] == 0.1 and r["tokens"] == 16
        assert r["data_ms"] >= 10 and r["optimizer_ms"] >= 5
        assert r["forward_ms"] > 0 and r["backward_ms"] > 0
        parts = sum(r[f"{name}_ms"] for name in PHASES) + r["other_ms"]
        assert parts == pytest.approx(r["step_ms"], rel=1e-6)
        assert r["tokens_per_s"] == pytest.approx(16 / r["step_ms"] * 1e3)
        flops = step_flops(meter.model_config, 16, 136, 256)
        assert r["tflops_per_gpu"] == pytest.approx(flops.causal / r["step_ms"] * 1e3 / 1e12)
        assert r["mfu_causal"] is None and r["mfu_palm"] is None  # the CPU has no peak here
        assert "mfu_causal_mixed" not in r and "hfu" not in r
        assert r["peak_memory_gib"] > 0


def test_accumulation_adds_up():
    model = Attend()
    meter = make(model)
    meter.start_step(1)
    for lengths in ((16,), (1, 15)):
        with meter.phase("forward"):
            time.sleep(0.01)
        meter.count(batch(lengths))
    meter.end_step(loss=1.0, grad_norm=2.0, lr=0.0)
    (r,) = meter.flush()
    assert r["tokens"] == 32 and r["forward_ms"] >= 20 and r["grad_norm"] == 2.0
    flops = step_flops(meter.model_config, 32, 256 + 1 + 225, 256).causal
    assert r["tflops_per_gpu"] * r["step_ms"] == pytest.approx(flops / 1e9)


def test_step_time_runs_from_end_to_end_except_after_restart():
    model = Attend()
    meter = make(model)
    one_step(meter, 1, model)
    time.sleep(0.05)
    one_step(meter, 2, model)
    meter.restart()
    time.sleep(0.2)
    one_step(meter, 3, model)
    first, second, third = meter.flush()
    assert second["other_ms"] >= 50
    assert first["step_ms"] < second["step_ms"]
    assert third["step_ms"] < 200 and third["other_ms"] < 50


def test_utilisation_against_a_known_peak():
    model = Attend()
    meter = make(model, words=["logging.hfu=true"])
    meter.peak = peak_of(H100)
    one_step(meter, 1, model)
    (r,) = meter.flush()
    flops = step_flops(meter.model_config, 16, 136, 256)
    seconds = r["step_ms"] / 1e3
    assert r["mfu_causal"] == pytest.approx(flops.causal / seconds / 989.5e12)
    assert r["mfu_palm"] == pytest.approx(flops.palm / seconds / 989.5e12)
    assert r["hfu"] == pytest.approx(flops.hardware / seconds / 989.5e12)


def test_fp8_run_reports_the_mixed_denominator_or_null():
    model = Attend()
    words = ["attention=fp8", "precision=bf16"]
    meter = make(model, words=words)
    one_step(meter, 1, model)
    assert meter.flush()[0]["mfu_causal_mixed"] is None
    meter.peak = peak_of(H100)
    one_step(meter, 2, model)
    (r,) = meter.flush()
    assert 0 < r["mfu_causal_mixed"] < r["mfu_causal"]


def test_attention_share_is_sampled_and_leaves_no_hook():
    model = Attend(delay=0.02)
    meter = make(model)
    losses = []
    for n in (1, 2, 3, 4):
        torch.manual_seed(n)
        losses.append(one_step(meter, n, model))
    shares = [r["attention_share"] for r in meter.flush()]
    # Steps 2, 4, ...: the first one pays for warm-up.
    assert shares[0] is None and shares[2] is None
    assert 0 < shares[1] < 1 and 0 < shares[3] < 1
    assert not model.core._forward_hooks and not model.core._forward_pre_hooks


def test_attention_share_measures_forward_and_backward(monkeypatch):
    """With a slow core the share is nearly all of forward + backward."""

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            time.sleep(0.05)
            return q + k + v

        @staticmethod
        def backward(ctx, grad):
            time.sleep(0.1)
            return grad, grad, grad

    monkeypatch.setattr(FlashAttention, "forward", lambda self, q, k, v: Slow.apply(q, k, v))
    model = Attend()
    meter = make(model, words=["logging.attention_every=1"])
    one_step(meter, 1, model)
    (r,) = meter.flush()
    measured = r["attention_share"] * r["step_ms"]
    assert 150 <= measured <= r["forward_ms"] + r["backward_ms"]


@pytest.mark.parametrize("keywords", [False, True])
def test_probe_changes_no_gradient(keywords):
    class Model(Attend):
        def forward(self, x):
            q, k, v = self.qkv(x)
            out = self.core(q=q, k=k, v=v) if keywords else self.core(q, k, v)
            return out.square().sum()

    torch.manual_seed(0)
    model = Model()
    x = torch.randn(8, 16)

    def gradient(probed):
        model.zero_grad()
        meter = make(model, words=["logging.attention_every=1"])
        meter.start_step(1)
        if not probed:
            meter._probe.detach()
        loss = model(x)
        loss.backward()
        meter.end_step(loss=loss.detach(), grad_norm=None, lr=0)
        (r,) = meter.flush()
        assert (r["attention_share"] is not None) == probed
        return loss.detach(), model.proj.weight.grad.clone()

    for a, b in zip(gradient(True), gradient(False), strict=True):
        assert torch.equal(a, b)


def test_no_probe_under_compile_or_when_off():
    model = Attend()
    for words in (["engine.compile=true"], ["logging.attention_every=0"]):
        meter = make(model, words=words)
        one_step(meter, 2, model)
        assert meter.flush()[0]["attention_share"] is None


def test_wrong_use_is_an_error():
    meter = make()
    with pytest.raises(RuntimeError, match="start_step"):
        meter.count(batch([3]))
    meter.start_step(1)
    with pytest.raises(ValueError, match="'eval'"), meter.phase("eval"):
        pass


def test_description_names_formula_peak_and_gpu():
    meter = make()
    info = meter.describe()
    assert info["gpu"] == "CPU" and info["peak_bf16_flops"] is None
    assert "n/a" in info["peak_source"]
    assert "sum(document length^2)" in info["formulas"]["mfu_causal"]
    assert info["attention_backend"] in ("sdpa", "reference")
    meter.peak = peak_of(H100)
    assert "datasheet" in meter.describe()["peak_source"]


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_probe_inside_recomputed_layers(checkpointing):
    torch.manual_seed(0)
    layer = TransformerLayer(
        32, 48, 2, 1, backend="sdpa", activation_checkpointing=checkpointing, max_seq_len=64
    )
    x = torch.randn(1, 24, 32)

    def train(every):
        layer.zero_grad()
        meter = make(layer, words=[f"logging.attention_every={every}"])
        meter.start_step(1)
        loss = layer(x).square().sum()
        loss.backward()
        meter.end_step(loss=loss.detach(), grad_norm=None, lr=0)
        (r,) = meter.flush()
        return r["attention_share"], [p.grad.clone() for p in layer.parameters()]

    share, probed = train(1)
    none, plain = train(0)
    assert 0 < share < 1 and none is None
    for a, b in zip(probed, plain, strict=True):
        assert torch.equal(a, b)
