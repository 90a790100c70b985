"""transformers models with attn_implementation="fa3_train" against their own eager attention."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from fa3_train.integrations import hf, policy  # noqa: E402

COMMON = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _config(kind: str):
    t = transformers
    if kind == "llama":
        return t.LlamaConfig(**COMMON)
    if kind == "mistral":
        return t.MistralConfig(**COMMON, sliding_window=7)
    if kind == "qwen3":
        return t.Qwen3Config(**COMMON)
    if kind == "qwen2":  # windows on its upper layers only
        return t.Qwen2Config(
            **COMMON, use_sliding_window=True, sliding_window=7, max_window_layers=1
        )
    if kind == "gemma3":
        return t.Gemma3TextConfig(**COMMON, sliding_window=7, query_pre_attn_scalar=16)
    if kind == "gemma2":
        return t.Gemma2Config(
            **COMMON, sliding_window=7, attn_logit_softcapping=3.0, query_pre_attn_scalar=16
        )
    if kind == "gpt_oss":
        return t.GptOssConfig(
            **COMMON, sliding_window=7, num_local_experts=2, num_experts_per_tok=2
        )
    raise AssertionError(kind)


KINDS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt_oss"]


def _pair(kind: str):
    hf.register(backend="reference")
    torch.manual_seed(0)
    config = _config(kind)
    eager = transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation="eager"
    )
    for name, parameter in eager.named_parameters():  # sinks start at zero: make them matter
        if "sinks" in name:
            torch.nn.init.normal_(parameter, std=2.0)
    ours = transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation="fa3_train"
    )
    ours.load_state_dict(eager.state_dict())
    assert ours.config._attn_implementation == "fa3_train"
    return eager.eval(), ours.eval()


def _close(actual, expected, scale=1.0):
    """fp32 rounding of two layers; fp64 would make NaN of transformers' eager padding rows."""
    torch.testing.assert_close(actual, expected, rtol=5e-4 * scale, atol=5e-5 * scale)


def _compare(eager, ours, keep=None, other=None, **inputs):
    """Logits (where ``keep``) and all gradients of a loss over them."""
    results = []
    for model, extra in ((eager, other or {}), (ours, {})):
        model.zero_grad()
        logits = model(**{**inputs, **extra}, use_cache=False).logits
        if keep is not None:
            logits = logits[keep]
        torch.manual_seed(1)
        (logits * torch.randn_like(logits)).sum().backward()
        results.append((logits.detach(), [p.grad for p in model.parameters()]))
    (a, ga), (b, gb) = results
    _close(b, a)
    for x, y in zip(ga, gb, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            _close(y, x, scale=float(x.abs().max() + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients(kind):
    eager, ours = _pair(kind)
    ids = torch.randint(3, 97, (2, 23))
    _compare(eager, ours, input_ids=ids)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding(kind, side):
    eager, ours = _pair(kind)
    ids = torch.randint(3, 97, (3, 19))
    mask = torch.ones(3, 19, dtype=torch.long)
    for row, n in enumerate((0, 5, 11)):
        if n:
            mask[row, slice(0, n) if side == "left" else slice(19 - n, 19)] = 0
    _compare(eager, ours, keep=mask.bool(), input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_positions_equal_separate_documents(kind):
    eager, ours = _pair(kind)
    lengths = (9, 1, 13)
    ids = torch.randint(3, 97, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = ours(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    separate = torch.cat(
        [eager(input_ids=part, use_cache=False).logits[0] for part in ids.split(lengths, 1)]
    )
    _close(packed, separate)


def test_positions_that_jump_ahead_are_read_as_by_eager():
    eager, ours = _pair("llama")
    ids = torch.randint(3, 97, (2, 11))
    positions = torch.cat([torch.arange(4), torch.arange(9, 16)])[None].expand(2, -1)
    _compare(eager, ours, input_ids=ids, position_ids=positions)


def test_explicit_cu_seqlens():
    eager, ours = _pair("llama")
    lengths = (9, 4)
    ids = torch.randint(3, 97, (1, 13))
    cu = torch.tensor([0, 9, 13], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = ours(
        input_ids=ids, position_ids=positions, cu_seq_lens_q=cu, cu_seq_lens_k=cu,
        max_length_q=9, max_length_k=9, use_cache=False,
    ).logits[0]  # fmt: skip
    separate = torch.cat(
        [eager(input_ids=part, use_cache=False).logits[0] for part in ids.split(lengths, 1)]
    )
    _close(packed, separate)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_generation_with_cache_and_left_padding(kind):
    eager, ours = _pair(kind)
    ids = torch.randint(3, 97, (2, 11))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    made = [
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
        for model in (eager, ours)
    ]
    assert torch.equal(*made)


def test_inference_mode_keeps_no_versions():
    eager, ours = _pair("llama")
    with torch.inference_mode():
        ids = torch.randint(3, 97, (2, 9))
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        _close(ours(ids, attention_mask=mask).logits[mask.bool()],
               eager(ids, attention_mask=mask).logits[mask.bool()])  # fmt: skip


def test_gradient_checkpointing_gives_the_same_gradients():
    eager, ours = _pair("llama")
    ours.gradient_checkpointing_enable()
    ours.train()
    eager.train()
    _compare(eager, ours, input_ids=torch.randint(3, 97, (2, 17)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(checkpointing, tmp_path):
    """transformers.Trainer: the same losses and weights as with eager, step after step."""
    pytest.importorskip("accelerate")
    torch.manual_seed(3)
    rows = torch.randint(3, 97, (8, 21))
    data = [{"input_ids": row, "labels": row} for row in rows]
    results = []
    for model in _pair("llama"):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, use_cpu=True,
            gradient_checkpointing=checkpointing, learning_rate=1e-3, logging_steps=1,
            save_strategy="no", report_to=[], disable_tqdm=True, seed=5, optim="sgd",
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
        results.append((losses, list(model.parameters())))
    (a, wa), (b, wb) = results
    assert len(a) == 4 and a[0] != a[-1]
    assert b == pytest.approx(a, rel=1e-4)
    for x, y in zip(wa, wb, strict=True):
        _close(y, x)


def test_what_is_not_served_is_an_error_by_default_and_counted_with_warn():
    eager, ours = _pair("llama")
    module = ours.model.layers[0].self_attn
    q, k = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 5, 16)
    with pytest.raises(policy.UnsupportedRequest, match="dropout.*got 0.1"):
        hf.attention_forward(module, q, k, k, None, dropout=0.1)
    with pytest.raises(policy.UnsupportedRequest, match=r"2-D padding mask.*\(1, 1, 5, 5\)"):
        hf.attention_forward(module, q, k, k, torch.ones(1, 1, 5, 5, dtype=torch.bool))
    hf.register(policy="warn", backend="reference")
    policy.reset_fallback_counts()
    module.eval()
    ours_out, _ = hf.attention_forward(module, q, k, k, None)
    for _ in range(2):
        out, _ = hf.attention_forward(module, q, k, k, None, dropout=0.1)
        torch.testing.assert_close(out, ours_out, rtol=1e-4, atol=1e-5)
    assert list(policy.fallback_counts().values()) == [2]


def test_name_with_flash_is_refused():
    with pytest.raises(ValueError, match="must not contain 'flash'"):
        hf.register("my_flash")
