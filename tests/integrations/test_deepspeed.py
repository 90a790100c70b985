"""DeepSpeed Ulysses around our core over two processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")
sys.path.insert(0, str(Path(__file__).parent))
import processes  # noqa: E402

from fa3_train import reference  # noqa: E402
from fa3_train.integrations.deepspeed import supports  # noqa: E402

B, S, H, HKV, D = 1, 12, 4, 2, 8


def _inputs():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, S, h, D, generator=g) for h in (H, HKV, HKV, H)]


PACKED = [0, 5, 12]


def _ulysses(rank, ranks):
    import deepspeed
    from deepspeed.ops import __compatible_ops__ as available
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    from fa3_train.integrations.deepspeed import UlyssesAttention

    available[ShareMemCommBuilder.NAME] = False  # a shared-memory all-reduce, built for minutes
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    attention = UlyssesAttention(torch.distributed.group.WORLD)
    cu = torch.tensor(PACKED, dtype=torch.int32)
    packed = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": S, "max_seqlen_k": S}
    results = []
    for options in ({}, packed):
        *leaves, dout = (x.chunk(ranks, 1)[rank].contiguous() for x in _inputs())
        leaves = [x.requires_grad_() for x in leaves]
        out = attention(*leaves, causal=True, backend="reference", **options)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, dout)))
    with pytest.raises(ValueError, match="3 heads do not divide over 2 ranks"):
        attention(leaves[0][:, :, :3], *leaves[1:], causal=True)
    return results


def _truth(cu):
    q, k, v, dout = _inputs()
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    if cu is None:
        out, _ = reference.attention(*leaves, window_size=(-1, 0))
    else:
        t = torch.tensor(cu, dtype=torch.int32)
        flat = [x.flatten(0, 1) for x in leaves]
        out, _ = reference.attention(*flat, window_size=(-1, 0), cu_seqlens_q=t, cu_seqlens_k=t)
        out = out.view(B, S, H, D)
    return out.detach(), *torch.autograd.grad(out, leaves, dout.double())


@pytest.mark.distributed
def test_two_ranks_equal_one():
    shares = processes.run(2, _ulysses)
    for case, cu in enumerate((None, PACKED)):
        got = zip(*(share[case] for share in shares), strict=True)
        for parts, x in zip(got, _truth(cu), strict=True):
            torch.testing.assert_close(torch.cat(parts, 1), x.float(), rtol=1e-5, atol=1e-5)


POSITIONS = {"one document": (16,), "packed": (9, 1, 6)}


def _llama():
    import transformers

    from fa3_train.integrations import hf

    name = hf.register(backend="reference")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation=name)
    tokens = torch.randint(0, 97, (1, 16))
    return model, tokens, name


def _logits_and_gradients(model, tokens, positions, weights):
    model.zero_grad()
    logits = model(input_ids=tokens, position_ids=positions).logits
    (logits * weights).sum().backward()
    return logits.detach(), [p.grad.clone() for p in model.parameters()]


def _weights():
    return torch.randn(1, 16, 97, generator=torch.Generator().manual_seed(1))


def _hf_ulysses(rank, ranks):
    import deepspeed
    from deepspeed.ops import __compatible_ops__ as available
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    available[ShareMemCommBuilder.NAME] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    model, tokens, name = _llama()
    UlyssesSPAttentionHF.register_with_transformers(
        model, core_attn_implementation=name, sequence_parallel_size=ranks, micro_batch_size=1
    )
    results = []
    for lengths in POSITIONS.values():
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        mine = [x.chunk(ranks, 1)[rank] for x in (tokens, positions, _weights())]
        results.append(_logits_and_gradients(model, *mine))
    return results


@pytest.mark.distributed
def test_hf_ulysses_around_the_registered_attention():
    """DeepSpeed wraps what is registered: two ranks with half the tokens each are one with all."""
    pytest.importorskip("transformers")
    shares = processes.run(2, _hf_ulysses)
    model, tokens, _ = _llama()
    for case, lengths in enumerate(POSITIONS.values()):
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        logits, grads = _logits_and_gradients(model, tokens, positions, _weights())
        got = torch.cat([share[case][0] for share in shares], 1)
        torch.testing.assert_close(got, logits, rtol=1e-4, atol=1e-5)
        for want, *parts in zip(grads, *(share[case][1] for share in shares), strict=True):
            torch.testing.assert_close(sum(parts), want, rtol=1e-3, atol=1e-4)


def test_supports():
    assert supports(heads_q=8, heads_k=2, ranks=2) is None
    assert supports(heads_q=8, heads_k=2, ranks=4) == "k: 2 heads do not divide over 4 ranks"
    assert "sink" in supports(heads_q=8, heads_k=8, ranks=2, sink=torch.zeros(8))
