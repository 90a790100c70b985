"""FP8 attention inside the model: it learns as 16-bit attention does, packed rows and all."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fa3_train.models.config import ModelConfig
from fa3_train.models.transformer import TransformerLM

pytestmark = pytest.mark.gpu

CONFIG = ModelConfig(
    vocab_size=512, hidden_size=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64,
    ffn_hidden_size=512, max_seq_len=512, attention_backend="hopper",
)  # fmt: skip
LENGTHS = (300, 1, 512, 127, 84)


def batch(seed: int):
    """Packed documents, each a short random phrase over and over."""
    g = torch.Generator().manual_seed(seed)
    phrases = [torch.randint(0, 512, (17,), generator=g) for _ in LENGTHS]
    documents = [p.repeat(n // 17 + 1)[: n + 1] for p, n in zip(phrases, LENGTHS, strict=True)]
    tokens = torch.cat([d[:-1] for d in documents]).cuda()
    labels = torch.cat([d[1:] for d in documents]).cuda()
    cu = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32).cuda()
    return tokens, labels, cu


def losses(precision: str, steps: int = 40) -> list[float]:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = TransformerLM(dataclasses.replace(CONFIG, attention_precision=precision))
    model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    found = []
    for step in range(steps):
        tokens, labels, cu = batch(step % 2)
        loss = model(tokens, labels, cu_seqlens=cu, max_seqlen=max(LENGTHS))
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(loss.item())
    return found


def test_fp8_attention_trains_as_16_bit_attention_does():
    wide, narrow = losses("bf16"), losses("fp8")
    assert wide != narrow  # it is another computation
    assert wide[-1] < wide[0] - 1.0  # there was something to learn, and it was learnt
    # Single steps of a run that memorizes are chaotic (bf16 against itself with another order of
    # sums differs by some percent); the mean of the curve is not.
    assert sum(narrow) == pytest.approx(sum(wide), rel=0.02), (wide, narrow)


def test_signs_do_not_move_with_the_dtype_of_the_model():
    """model.to(bf16) turns the signs into bf16: +-1 are exact, and the op takes any float."""
    with torch.device("cuda"):
        model = TransformerLM(dataclasses.replace(CONFIG, attention_precision="fp8"))
    model.to(torch.bfloat16)
    signs = [m.signs for m in model.modules() if getattr(m, "signs", None) is not None]
    assert len(signs) == CONFIG.num_layers
    assert all((s.float().abs() == 1).all() for s in signs)
