"""What the preprocessing ops hand to the library, first and repeated calls, through a stand-in."""

from __future__ import annotations

import contextlib

import pytest
import torch

from fa3_train import _lib, reference_fp8
from fa3_train.checks import ArgumentError
from fa3_train.ops import launch, prep
from fa3_train.ops.prep import HADAMARD, QUANTIZE, ROPE
from fa3_train.rotary import rope_tables


class StandIn:
    """Keeps the structs of all launches."""

    def __init__(self) -> None:
        self.calls: list[_lib.PrepParams] = []

    def call_words(self, name, words) -> None:
        assert name == "fa3_prep"
        self.calls.append(_lib.PrepParams.from_buffer_copy(bytes(words)))


@pytest.fixture
def library(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setattr(_lib, "load", lambda: stand_in)
    monkeypatch.setattr(launch, "on_device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 77, raising=False)
    prep._preps.clear()
    prep._dequantizations.clear()
    yield stand_in
    prep._preps.clear()
    prep._dequantizations.clear()


def sizes(p: _lib.PrepParams):
    names = (
        "num_tensors", "batch", "seqlen", "total", "positions", "head_dim", "rotary_dim",
        "interleaved", "inverse", "in_dtype", "out_dtype", "block_size", "options", "stream",
    )  # fmt: skip
    return [getattr(p, name) for name in names]


ALL = ROPE | HADAMARD | QUANTIZE


def test_a_repeated_call_is_the_first_with_its_own_pointers(library):
    cos, sin = rope_tables(64, 300)
    signs = reference_fp8.random_signs(64)
    for turn in range(2):
        qkv = torch.randn(2, 200, 6, 64).bfloat16()
        xs = list(qkv.split([3, 2, 1], -2))  # strided views
        results = prep._prep(
            xs, [ALL, ALL, QUANTIZE], cos, sin, signs, None, None, False, False, 128
        )
        p = library.calls[turn]
        assert sizes(p) == [3, 2, 200, 0, 300, 64, 64, 0, 0, _lib.BF16, _lib.BF16, 128, 0, 77]
        assert [p.cos, p.sin, p.signs] == [t.data_ptr() for t in (cos, sin, signs)]
        assert p.position_ids is None and p.cu_seqlens is None
        for i, (x, heads) in enumerate(zip(xs, (3, 2, 1), strict=True)):
            t = p.tensors[i]
            assert (t.x.ptr, t.out.ptr, t.descale) == (
                x.data_ptr(), results[i].data_ptr(), results[3 + i].data_ptr()
            )  # fmt: skip
            assert (t.x.stride_batch, t.x.stride_token) == (200 * 6 * 64, 6 * 64)
            assert (t.out.stride_batch, t.out.stride_token) == (200 * heads * 64, heads * 64)
            assert (t.heads, t.rope, t.hadamard, t.quantize) == (heads, i < 2, i < 2, 1)
            assert results[i].dtype == torch.float8_e4m3fn and results[i].shape == x.shape
            assert results[3 + i].shape == (2, heads, 2)
    assert len(prep._preps) == 1


def test_what_the_kernels_cannot_read_is_copied_on_every_call(library):
    base = torch.randn(1 * 8 * 2 * 64 + 1).bfloat16()
    crooked = base[1:].view(1, 8, 2, 64)  # contiguous, but 2 bytes off
    transposed = torch.randn(1, 8, 64, 2).bfloat16().transpose(-1, -2)
    for x in (crooked, crooked, transposed, transposed):
        prep._prep([x], [HADAMARD], None, None, None, None, None, False, False, 128)
        t = library.calls[-1].tensors[0]
        assert t.x.ptr % 16 == 0 and t.x.ptr != x.data_ptr()
        assert (t.x.stride_token, t.x.stride_head) == (128, 64)


def test_stages_that_are_off_get_no_tables(library):
    cos, sin = rope_tables(64, 8)
    x = torch.randn(1, 8, 2, 64).bfloat16()
    signs = reference_fp8.random_signs(64)
    for _ in range(2):
        prep._prep([x], [QUANTIZE], cos, sin, signs, None, None, False, False, 64)
        p = library.calls[-1]
        assert (p.cos, p.sin, p.signs, p.rotary_dim) == (None, None, None, 0)
        out = prep._prep([x], [ROPE], cos, sin, signs, None, None, True, True)[0]
        p = library.calls[-1]
        assert (p.cos, p.signs, p.interleaved, p.inverse) == (cos.data_ptr(), None, 1, 1)
        assert p.tensors[0].descale is None and out.dtype == torch.bfloat16


def test_positions_are_converted_on_every_call(library):
    cos, sin = rope_tables(64, 100)
    x = torch.randn(2, 8, 2, 64).bfloat16()
    ids = torch.arange(8)  # int64, one row for both entries
    for _ in range(2):
        prep._prep([x], [ROPE], cos, sin, None, ids, None, False, False)
        assert library.calls[-1].position_ids not in (None, ids.data_ptr())
    ready = torch.zeros(2, 8, dtype=torch.int32)
    prep._prep([x], [ROPE], cos, sin, None, ready, None, False, False)
    assert library.calls[-1].position_ids == ready.data_ptr()


def test_packed_rules_hold_on_repeated_calls(library):
    x = torch.randn(10, 2, 64).bfloat16()
    good = torch.tensor([0, 4, 10], dtype=torch.int32)
    results = prep._prep([x], [QUANTIZE], None, None, None, None, good, False, False)
    p = library.calls[-1]
    assert (p.batch, p.total, p.seqlen, p.cu_seqlens) == (2, 10, 0, good.data_ptr())
    assert results[1].shape == (2, 10 // 128 + 2)
    bad = torch.tensor([0, 4, 11], dtype=torch.int32)
    with pytest.raises(ArgumentError, match=r"cu_seqlens\[-1\].*10 rows"):
        prep._prep([x], [QUANTIZE], None, None, None, None, bad, False, False)
    codes, descale = results
    (out,) = prep._dequantize([codes], [descale], good, 128, torch.bfloat16)
    p = library.calls[-1]
    assert (p.in_dtype, p.out_dtype) == (_lib.E4M3, _lib.BF16) and out.dtype == torch.bfloat16
    assert p.tensors[0].descale == descale.data_ptr() and p.cu_seqlens == good.data_ptr()


def test_other_options_are_other_plans(library):
    x = torch.randn(1, 8, 2, 64).bfloat16()
    for block, options in ((128, 0), (64, 0), (128, 1), (128, 0)):
        prep._prep(
            [x], [QUANTIZE], None, None, None, None, None, False, False, block, None, options
        )
        assert (library.calls[-1].block_size, library.calls[-1].options) == (block, options)
    assert len(prep._preps) == 3


def test_nothing_to_do_launches_nothing(library):
    x = torch.empty(0, 8, 2, 64).bfloat16()
    for _ in range(2):
        codes, descale = prep._prep(
            [x], [QUANTIZE], None, None, None, None, None, False, False, 128
        )
        assert codes.shape == x.shape and descale.shape == (0, 2, 1)
    x = torch.empty(1, 0, 2, 64).bfloat16()
    (out,) = prep._prep([x], [HADAMARD], None, None, None, None, None, False, False, 128)
    assert out.shape == x.shape and not library.calls
