"""Each bad input gets a message that names the argument, the rule and the value."""

from __future__ import annotations

import re

import pytest
import torch

from fa3_train import checks
from fa3_train.ops.attention import (
    attn_bwd_accumulate,
    flash_attn_func,
    flash_attn_varlen_func,
    resolve_backend,
)
from fa3_train.ops.backends import BackendError


def dense(**changes):
    kw = {
        "q": torch.randn(2, 5, 4, 16),
        "k": torch.randn(2, 7, 2, 16),
        "v": torch.randn(2, 7, 2, 16),
    }
    kw.update(changes)
    return flash_attn_func(**kw)


def packed(**changes):
    kw = {
        "q": torch.randn(10, 4, 16),
        "k": torch.randn(12, 2, 16),
        "v": torch.randn(12, 2, 16),
        "cu_seqlens_q": torch.tensor([0, 4, 10], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 5, 12], dtype=torch.int32),
        "max_seqlen_q": 6,
        "max_seqlen_k": 7,
    }
    kw.update(changes)
    return flash_attn_varlen_func(**kw)


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


DENSE = {
    "q ndim": ({"q": torch.randn(5, 4, 16)}, "q: must have 4 dimensions (batch, seqlen, heads, "
               "head_dim), got (5, 4, 16)"),
    "q int": ({"q": torch.ones(2, 5, 4, 16, dtype=torch.int32)},
              "q: must have a floating dtype, got torch.int32"),
    "k dtype": ({"k": torch.randn(2, 7, 2, 16).half()},
                "k: dtype must be that of q (torch.float32), got torch.float16"),
    "v dtype": ({"v": torch.randn(2, 7, 2, 16).bfloat16()},
                "v: dtype must be that of q (torch.float32), got torch.bfloat16"),
    "k device": ({"k": torch.randn(2, 7, 2, 16, device="meta")},
                 "k: device must be that of q (cpu), got meta"),
    "batch": ({"k": torch.randn(3, 7, 2, 16), "v": torch.randn(3, 7, 2, 16)},
              "k: batch must be that of q (2), got 3"),
    "head ratio": ({"k": torch.randn(2, 7, 3, 16), "v": torch.randn(2, 7, 3, 16)},
                   "k: number of heads must divide the 4 heads of q, got 3"),
    "more kv heads": ({"k": torch.randn(2, 7, 8, 16), "v": torch.randn(2, 7, 8, 16)},
                      "k: number of heads must divide the 4 heads of q, got 8"),
    "no kv heads": ({"k": torch.randn(2, 7, 0, 16), "v": torch.randn(2, 7, 0, 16)},
                    "k: must have at least one head, got 0"),
    "head dim": ({"k": torch.randn(2, 7, 2, 24)}, "k: head_dim must equal that of q (16), got 24"),
    "empty head": ({"q": torch.randn(2, 5, 4, 0)}, "q: head_dim must be positive, got 0"),
    "v length": ({"v": torch.randn(2, 6, 2, 16)}, "v: all but the last dimension must be those of "
                 "k (2, 7, 2, 16), got (2, 6, 2, 16)"),
    "window pair": ({"window_size": 5}, "window_size: must be a pair (left, right), got 5"),
    "window low": ({"window_size": (-2, 0)},
                   "window_size[0]: must be an int of at least -1 (-1: unbounded), got -2"),
    "window float": ({"window_size": (1, 0.5)},
                     "window_size[1]: must be an int of at least -1 (-1: unbounded), got 0.5"),
    "window causal": ({"window_size": (4, 3), "causal": True},
                      "window_size[1]: must be -1 or 0 when causal=True, got 3"),
    "causal": ({"causal": 1}, "causal: must be True or False, got 1"),
    "scale": ({"softmax_scale": float("nan")},
              "softmax_scale: must be a finite number or None, got nan"),
    "softcap": ({"softcap": -1.0},
                "softcap: must be 0 (none) or a positive finite number, got -1.0"),
    "softcap inf": ({"softcap": float("inf")},
                    "softcap: must be 0 (none) or a positive finite number, got inf"),
    "sink shape": ({"sink": torch.zeros(3)},
                   "sink: must have one entry per head of q (4), got 3"),
    "sink dims": ({"sink": torch.zeros(1, 4)}, "sink: must have 1 dimensions (heads of q,), got "
                  "(1, 4)"),
    "sink dtype": ({"sink": ints(0, 0, 0, 0)}, "sink: must have a floating dtype, got torch.int32"),
    "backend": ({"backend": "fa2"}, "backend: must be 'auto' or one of ['hopper', 'sdpa', "
                "'reference'], got 'fa2'"),
}  # fmt: skip

PACKED = {
    "dense tensors": ({"q": torch.randn(2, 5, 4, 16)},
                      "q: must have 3 dimensions (total, heads, head_dim), got (2, 5, 4, 16)"),
    "int64": ({"cu_seqlens_q": ints(0, 4, 10, dtype=torch.int64)},
              "cu_seqlens_q: dtype must be torch.int32, got torch.int64"),
    "2d": ({"cu_seqlens_k": ints(0, 5, 12)[None]},
           "cu_seqlens_k: must have 1 dimensions (batch + 1,), got (1, 3)"),
    "empty": ({"cu_seqlens_q": ints()}, "cu_seqlens_q: must have at least one entry, got 0"),
    "strided": ({"cu_seqlens_q": ints(0, 9, 4, 9, 10, 9)[::2]},
                "cu_seqlens_q: must be contiguous, got stride (2,)"),
    "device": ({"cu_seqlens_q": ints(0, 4, 10).to("meta")},
               "cu_seqlens_q: device must be that of q (cpu), got meta"),
    "missing k": ({"cu_seqlens_k": None},
                  "cu_seqlens_k: cu_seqlens_q and cu_seqlens_k must be given together, got None"),
    "missing q": ({"cu_seqlens_q": None}, "cu_seqlens_q: must be a tensor, got None"),
    "first": ({"cu_seqlens_q": ints(1, 4, 10)}, "cu_seqlens_q[0]: must be 0, got 1"),
    "decreasing": ({"cu_seqlens_k": ints(0, 12, 11), "max_seqlen_k": 12},
                   "cu_seqlens_k[2]: must be at least 12, got 11"),
    "too long": ({"cu_seqlens_k": ints(0, 5, 13), "max_seqlen_k": 8},
                 "cu_seqlens_k[-1]: must be at most the 12 rows of the packed tensor, got 13"),
    "max too small": ({"max_seqlen_q": 5},
                      "max_seqlen_q: must be at least the length of sequence 1 (6), got 5"),
    "max negative": ({"max_seqlen_k": -1}, "max_seqlen_k: must be at least 0, got -1"),
    "batches": ({"cu_seqlens_k": ints(0, 5, 6, 12)},
                "cu_seqlens_k: must have as many entries as cu_seqlens_q (3), got 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", DENSE)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_dense(case, requires_grad):
    changes, message = DENSE[case]
    if requires_grad:
        changes = {"v": torch.randn(2, 7, 2, 16).requires_grad_(), **changes}
    with pytest.raises(checks.ArgumentError, match=f"^{re.escape(message)}$"):
        dense(**changes)


@pytest.mark.parametrize("case", PACKED)
def test_packed(case):
    changes, message = PACKED[case]
    with pytest.raises(checks.ArgumentError, match=f"^{re.escape(message)}$"):
        packed(**changes)


def test_good_inputs_pass():
    assert dense().shape == (2, 5, 4, 16)
    assert packed().shape == (10, 4, 16)


@pytest.mark.parametrize("value", [torch.tensor(6), 6.0, None, True])
def test_max_seqlen_must_be_an_int(value):
    with pytest.raises(TypeError, match="^max_seqlen_q: must be a Python int"):
        packed(max_seqlen_q=value)


def test_not_a_tensor():
    with pytest.raises(TypeError, match=r"^k: must be a torch\.Tensor, got list$"):
        dense(k=[1.0])


class TestBackends:
    def test_hopper_needs_a_gpu(self):
        with pytest.raises(BackendError) as info:
            dense(q=torch.randn(2, 5, 4, 16), backend="hopper")
        assert str(info.value) == (
            "backend='hopper': q: device must be a Hopper GPU, got cpu; "
            "backends that could: ['sdpa', 'reference']"
        )

    @pytest.mark.parametrize(
        ("option", "value"),
        [("return_lse", True), ("softcap", 1.0), ("sink", torch.zeros(4))],
    )
    def test_sdpa_refuses_by_name(self, option, value):
        with pytest.raises(BackendError) as info:
            dense(backend="sdpa", **{option: value})
        assert str(info.value) == (
            f"backend='sdpa': {option}: torch's scaled_dot_product_attention has no such option; "
            "backends that could: ['reference']"
        )

    def test_auto_says_what_and_why_once(self, caplog):
        q = torch.randn(1, 3, 2, 40)  # a head dim that no other test uses
        with caplog.at_level("INFO", logger="fa3_train.backend"):
            for _ in range(3):
                flash_attn_func(q, q, q)
        lines = [r.getMessage() for r in caplog.records]
        assert lines == [
            "attention backend 'sdpa' for cpu, torch.float32, head dims 40/40 "
            "(hopper: q: device must be a Hopper GPU, got cpu)"
        ]

    def test_auto_goes_to_the_reference_on_the_cpu_with_a_warning(self, caplog):
        q = torch.randn(1, 3, 2, 48)
        with caplog.at_level("WARNING", logger="fa3_train.backend"):
            flash_attn_func(q, q, q, softcap=2.0)
        assert "attention backend 'reference'" in caplog.text
        assert "softcap: torch's scaled_dot_product_attention has no such option" in caplog.text

    def test_resolve(self):
        assert resolve_backend("auto", "cpu", torch.bfloat16, 64) == "sdpa"
        assert resolve_backend("auto", "cpu", torch.bfloat16, 64, options=("sink",)) == "reference"
        with pytest.raises(checks.ArgumentError, match="^options: must be from .* got 'dropout'$"):
            resolve_backend("auto", "cpu", torch.bfloat16, 64, options=("dropout",))


class TestHopperRules:
    """The rules of the kernels alone, on any device."""

    @pytest.mark.parametrize(
        ("dims", "message"),
        [
            ((60, 60), "q: head_dim must be a multiple of 8 and at most 256 for backend='hopper', "
             "got 60"),
            ((264, 264), "q: head_dim must be a multiple of 8 and at most 256 for "
             "backend='hopper', got 264"),
            ((128, 64), "v: head_dim must be that of q (128), or 128 where that is 192, for "
             "backend='hopper', got 64"),
        ],
    )  # fmt: skip
    def test_head_dims(self, dims, message):
        with pytest.raises(checks.ArgumentError, match=f"^{re.escape(message)}$"):
            checks.check_hopper_head_dims(*dims)

    @pytest.mark.parametrize("dims", [(8, 8), (72, 72), (256, 256), (192, 128)])
    def test_head_dims_that_work(self, dims):
        checks.check_hopper_head_dims(*dims)

    def test_dtype(self):
        with pytest.raises(checks.ArgumentError, match=r"^k: dtype must be one of .*float32$"):
            checks.check_hopper_tensor("k", torch.zeros(1, 2, 2, 8))

    def test_layout(self):
        x = torch.zeros(2, 8, 3, 16, dtype=torch.bfloat16)
        checks.check_hopper_tensor("q", x)
        checks.check_hopper_tensor("q", x.transpose(1, 2))
        with pytest.raises(checks.ArgumentError, match="last dimension must be contiguous"):
            checks.check_hopper_tensor("q", x.transpose(2, 3))
        odd = torch.zeros(2, 8, 3, 20, dtype=torch.bfloat16)[..., :16]
        message = "^q: the stride of dimension 0 must be a multiple of 8 elements for .* got stride"
        wide = torch.zeros(2, 8 * 3 * 16 + 4, dtype=torch.bfloat16)
        with pytest.raises(checks.ArgumentError, match=message):
            checks.check_hopper_tensor("q", wide[:, : 8 * 3 * 16].unflatten(1, (8, 3, 16)))
        with pytest.raises(checks.ArgumentError, match="stride of dimension"):
            checks.check_hopper_tensor("q", odd)

    def test_strides_of_single_elements_are_free(self):
        x = torch.zeros(16, dtype=torch.bfloat16).as_strided((1, 1, 1, 16), (3, 5, 7, 1))
        checks.check_hopper_tensor("q", x)

    def test_address(self):
        x = torch.zeros(2 * 16 + 1, dtype=torch.bfloat16)[1:].view(1, 1, 2, 16)
        with pytest.raises(checks.ArgumentError, match="^q: the address must be a multiple of 16"):
            checks.check_hopper_tensor("q", x)


class TestAccumulate:
    def call(self, **changes):
        q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 4, 1, 8)
        kw = {
            "dout": torch.randn(1, 4, 2, 8), "q": q, "k": k, "v": k, "out": torch.randn(1, 4, 2, 8),
            "lse": torch.zeros(1, 2, 4), "dq": torch.zeros_like(q), "dk": torch.zeros_like(k),
            "dv": torch.zeros_like(k),
        }  # fmt: skip
        kw.update(changes)
        attn_bwd_accumulate(**kw)

    def test_good(self):
        self.call()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"dout": torch.randn(1, 4, 2, 4)}, "dout: must be (1, 4, 2, 8), got (1, 4, 2, 4)"),
            ({"out": torch.randn(1, 4, 2, 8).half()}, "out: dtype must be that of q "
             "(torch.float32), got torch.float16"),
            ({"lse": torch.zeros(2, 4)}, "lse: must be (1, 2, 4), got (2, 4)"),
            ({"dlse": torch.zeros(1, 2, 4).half()},
             "dlse: dtype must be torch.float32, got torch.float16"),
            ({"dq": torch.zeros(1, 4, 1, 8)}, "dq: must be (1, 4, 2, 8), got (1, 4, 1, 8)"),
            ({"dv": torch.zeros(1, 4, 1, 8).half()}, "dv: dtype must be torch.float32, got "
             "torch.float16"),
            ({"sink": torch.zeros(2)}, "dsink: must be given iff sink is, got False"),
            ({"backend": "sdpa"}, "backend='sdpa': return_lse: torch's "
             "scaled_dot_product_attention has no such option; backends that could: "
             "['reference']"),
        ],
    )  # fmt: skip
    def test_bad(self, changes, message):
        with pytest.raises(checks.ArgumentError, match=f"^{re.escape(message)}"):
            self.call(**changes)
