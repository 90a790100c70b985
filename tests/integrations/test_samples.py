"""torch's own test samples of scaled_dot_product_attention, through our replacement."""

import pytest
import torch

pytest.importorskip("expecttest")  # torch's testing module wants it

from fa3_train.bench import samples  # noqa: E402
from fa3_train.integrations import sdpa  # noqa: E402


@pytest.mark.parametrize("name", ["bf16", "fp32", "fp64"])
def test_every_sample_passes_or_is_refused_for_dropout_or_a_mask(name):
    result = samples.run("cpu", samples.DTYPES[name], "reference")
    assert not result["failed"]
    refused = sum(result["refused"].values())
    assert result["passed"] + refused == result["samples"] and result["passed"] >= 24
    assert {reason.split(":")[0] for reason in result["refused"]} <= {"dropout_p", "attn_mask"}


def test_a_wrong_result_is_reported(monkeypatch):
    serve = sdpa._serve
    monkeypatch.setattr(sdpa, "_serve", lambda *a: serve(*a) * 1.02)
    result = samples.run("cpu", torch.float32, "reference")
    assert result["passed"] == 0 and len(result["failed"]) >= 24
    assert "out: FAILED" in result["failed"][0]
