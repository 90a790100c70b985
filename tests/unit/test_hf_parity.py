"""Our model against `transformers` on random small Llamas: logits, loss, gradients, round trips."""

from __future__ import annotations

import json

import pytest
import torch

from fa3_train.models import ModelConfig, TransformerLM
from fa3_train.models import hf as weights
from fa3_train.numerics import assert_as_good

transformers = pytest.importorskip("transformers", reason="the parity tests need transformers")

LLAMA31 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CASES = {
    "gqa_llama31_untied": {"tie": False, "scaling": LLAMA31, "kv": 2},
    "mha_tied": {"tie": True, "scaling": None, "kv": 4},
}


def theirs(tie, scaling, kv, dtype=torch.float32):
    torch.manual_seed(3)
    rope = {"rope_theta": 10000.0, **(scaling or {"rope_type": "default"})}
    config = transformers.LlamaConfig(
        vocab_size=131, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=kv, head_dim=16, max_position_embeddings=96,
        rope_parameters=rope, tie_word_embeddings=tie, rms_norm_eps=1e-5,
        attn_implementation="eager",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.15)
    return model


@pytest.fixture(params=CASES, scope="module")
def case(request, tmp_path_factory):
    """(their model, its folder)."""
    folder = tmp_path_factory.mktemp(request.param)
    model = theirs(**CASES[request.param])
    model.save_pretrained(folder)
    return model, folder


def ours_from(folder, **overrides):
    model = TransformerLM(weights.read_config(folder, **overrides))
    weights.load_weights(model, folder)
    return model


def their_results(model, tokens, labels, kind):
    """Logits, loss and gradients (by their names) of their model in another dtype.

    Even in FP64 their norms and soft-max round to FP32: the "truth" here is theirs, not exact.
    """
    copy = transformers.LlamaForCausalLM(model.config).to(kind)
    copy.load_state_dict({n: t.to(kind) for n, t in model.state_dict().items()})
    logits = copy(tokens).logits
    # By hand: their own loss rounds the logits to FP32.
    flat = logits.flatten(0, 1).log_softmax(-1)
    picked = labels.flatten()
    loss = -flat[picked >= 0].gather(1, picked[picked >= 0, None]).mean()
    loss.backward()
    return logits.detach(), loss.detach(), {n: p.grad for n, p in copy.named_parameters()}


def stacked(ours, theirs_by_name, config):
    return torch.cat([theirs_by_name[n] for n in weights.name_table(config)[ours]])


def test_logits_loss_and_gradients(case):
    model, folder = case
    mine = ours_from(folder)
    tokens = torch.randint(0, 131, (2, 70))
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    labels[0, 5:9] = -100

    truth = their_results(model, tokens, labels, torch.float64)
    baseline = their_results(model, tokens, labels, torch.float32)
    assert_as_good(mine(tokens), truth[0], baseline[0], "accum", "logits")
    loss = mine(tokens, labels)
    assert_as_good(loss, truth[1], baseline[1], "accum", "loss")
    loss.backward()
    for name, parameter in mine.named_parameters():
        expected = [stacked(name, gradients, mine.config) for gradients in (truth[2], baseline[2])]
        assert_as_good(parameter.grad, *expected, "accum", name)


def test_their_own_loss_agrees(case):
    """transformers shifts labels itself; ours come shifted."""
    model, folder = case
    tokens = torch.randint(0, 131, (2, 40))
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    with torch.no_grad():
        theirs_loss = model(tokens, labels=tokens).loss
        mine = ours_from(folder)(tokens, labels)
    assert mine.item() == pytest.approx(theirs_loss.item(), rel=1e-6)


@pytest.mark.parametrize("max_shard_bytes", [5 << 30, 20_000], ids=["single", "sharded"])
def test_round_trip_through_transformers(case, tmp_path, max_shard_bytes):
    model, folder = case
    mine = ours_from(folder)
    weights.save_pretrained(mine, tmp_path, dtype=torch.float32, max_shard_bytes=max_shard_bytes)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert ("model.safetensors.index.json" in names) == (max_shard_bytes < 5 << 30)
    assert not [n for n in names if n.endswith(".part")]
    again, report = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert again.config.rope_parameters == model.config.rope_parameters
    back = ours_from(tmp_path)
    for (name, a), b in zip(mine.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert weights.read_config(tmp_path) == mine.config


def test_qwen3_style_qk_norm_round_trip(tmp_path):
    config = ModelConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16,
        ffn_hidden_size=48, max_seq_len=64, qk_norm=True,
    )  # fmt: skip
    mine = TransformerLM(config)
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15)
    weights.save_pretrained(mine, tmp_path, dtype=torch.float32)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    tokens = torch.randint(0, 64, (1, 30))
    with torch.no_grad():
        truth = other.double()(tokens).logits
        assert_as_good(mine(tokens), truth, other.float()(tokens).logits, "accum")


def test_bf16_is_the_default_on_disk(case, tmp_path):
    _, folder = case
    weights.save_pretrained(ours_from(folder), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    loaded = weights._Shards(tmp_path)["model.norm.weight"]
    assert loaded.dtype == torch.bfloat16


def test_saving_again_with_other_shards_replaces_the_old(case, tmp_path):
    _, folder = case
    mine = ours_from(folder)
    weights.save_pretrained(mine, tmp_path, dtype=torch.float32, max_shard_bytes=20_000)
    weights.save_pretrained(mine, tmp_path, dtype=torch.float32)
    assert not (tmp_path / "model.safetensors.index.json").exists()
    ours_from(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(case, tmp_path):
    _, folder = case
    config = weights.read_config(folder)
    deeper = TransformerLM(config.replace(num_layers=4))
    before = [p.clone() for p in deeper.parameters()]
    with pytest.raises(ValueError, match=r"missing .*layers\.3"):
        weights.load_weights(deeper, folder)
    assert all(torch.equal(a, b) for a, b in zip(before, deeper.parameters(), strict=True))
    with pytest.raises(ValueError, match="unknown"):
        weights.load_weights(TransformerLM(config.replace(num_layers=2)), folder)
    with pytest.raises(ValueError, match=r"\(131, 48\).*\(140, 48\)"):
        weights.load_weights(TransformerLM(config.replace(vocab_size=140)), folder)
    with pytest.raises(ValueError, match="neither"):
        weights.load_weights(deeper, tmp_path)
    with pytest.raises(ValueError, match=r"config\.json"):
        weights.read_config(tmp_path)


def test_a_missing_shard_is_named(case, tmp_path):
    _, folder = case
    mine = ours_from(folder)
    weights.save_pretrained(mine, tmp_path, dtype=torch.float32, max_shard_bytes=20_000)
    victim = sorted(tmp_path.glob("model-*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(ValueError, match=victim.name):
        weights.load_weights(mine, tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, ["model_type", "gpt2"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, ["rope_type", "yarn"]),
        ({"use_sliding_window": True}, ["use_sliding_window"]),
    ],
)
def test_config_without_counterpart_is_refused(case, change, words):
    raw = json.loads((case[1] / "config.json").read_text())
    with pytest.raises(ValueError) as caught:
        weights.config_from_hf({**raw, **change})
    for word in words:
        assert word in str(caught.value)


def test_options_that_llama_lacks_cannot_be_saved(tmp_path):
    mine = TransformerLM(ModelConfig(num_layers=1, vocab_size=32, softcap=5.0))
    with pytest.raises(ValueError, match="softcap"):
        weights.save_pretrained(mine, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_configs_before_transformers_5_are_read():
    raw = {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "max_position_embeddings": 131072, "rope_theta": 500000.0,
        "rope_scaling": {**LLAMA31, "original_max_position_embeddings": 8192},
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    from fa3_train.models import MODELS

    assert weights.config_from_hf(raw) == MODELS["llama3_8b"]
