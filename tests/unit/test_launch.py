"""Plans: what a call asks of the library before its first launch, seen through a stand-in."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch

from fa3_train import _lib, reference_fp8
from fa3_train.ops import fp8, hopper, launch


class StandIn:
    """Answers workspace queries by which pointers are set, and keeps what it was asked to run."""

    def __init__(self) -> None:
        self.queries: list[tuple[bool, bool]] = []
        self.launches: list[tuple[str, int]] = []

    def workspace(self, name, params) -> int:
        asked = bool(params.cu_seqlens_q), bool(getattr(params, "sink", None))
        self.queries.append(asked)
        return 16 + 1000 * asked[0] + 100 * asked[1]

    def call_words(self, name, words) -> None:
        kind = {"fa3_attn_fwd": _lib.AttnFwdParams, "fa3_attn_bwd": _lib.AttnBwdParams}.get(
            name, _lib.AttnFp8FwdParams
        )
        self.launches.append((name, kind.from_buffer_copy(bytes(words)).workspace_bytes))


@pytest.fixture
def library(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setattr(_lib, "load", lambda: stand_in)
    monkeypatch.setattr(launch, "on_device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(hopper, "_require_device", lambda q: None)
    monkeypatch.setattr(hopper, "device_problem", lambda index: None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    for plans in (hopper._forwards, hopper._backwards, fp8._forwards):
        plans.clear()
    yield stand_in
    for plans in (hopper._forwards, hopper._backwards, fp8._forwards):
        plans.clear()


def _expected(packed: bool, sink: bool) -> int:
    return 16 + 1000 * packed + 100 * sink


def _inputs(packed: bool):
    shape = (6, 2, 64) if packed else (1, 6, 2, 64)
    cu = torch.tensor([0, 2, 6], dtype=torch.int32) if packed else None
    longest = (4, 4) if packed else (6, 6)
    return [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(3)], cu, longest


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sink", [False, True])
def test_the_workspace_is_that_of_the_call_with_its_pointers(library, packed, sink):
    """cu_seqlens and a sink change the size: the query must see that they are there."""
    (q, k, v), cu, longest = _inputs(packed)
    z = torch.zeros(2) if sink else None
    mask = (*longest, 0.125, True, -1, -1, 0.0)
    for _ in range(2):  # the second call uses the plan of the first
        out, lse = hopper._attn_fwd(q, k, v, cu, cu, z, *mask)
    hopper._attn_bwd(out, q, k, v, out, lse, None, cu, cu, z, *mask, False)
    size = _expected(packed, sink)
    assert library.launches == [
        ("fa3_attn_fwd", size), ("fa3_attn_fwd", size), ("fa3_attn_bwd", size)
    ]  # fmt: skip
    assert library.queries == [(packed, sink)] * 2


@pytest.mark.parametrize("packed", [False, True])
def test_fp8_likewise(library, packed):
    (q, k, v), cu, longest = _inputs(packed)
    codes, descale = reference_fp8.quantize_blocks(q, cu_seqlens=cu)
    fp8._attn_fp8_fwd(
        codes, codes, codes, descale, descale, descale, cu, cu, *longest, 0.125, True, -1, -1,
        True, torch.bfloat16,
    )  # fmt: skip
    assert library.launches == [("fa3_attn_fp8_fwd", _expected(packed, False))]


@pytest.mark.build
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sink", [False, True])
def test_the_real_library_agrees(monkeypatch, packed, sink):
    """The remembered bytes against a query with everything filled in."""
    if not _lib.available():
        pytest.skip("no compiled library")
    monkeypatch.setattr(launch, "on_device", lambda index: contextlib.nullcontext())
    real = _lib.load()
    (q, k, v), cu, longest = _inputs(packed)
    asked = []
    monkeypatch.setattr(
        launch.Plan, "launch", lambda self, *pointers: asked.append((self._name, self._bytes))
    )
    monkeypatch.setattr(hopper, "_require_device", lambda q: None)
    z = torch.zeros(2) if sink else None
    hopper._forwards.clear()
    hopper._backwards.clear()
    mask = (*longest, 0.125, True, -1, -1, 0.0)
    out, lse = hopper._attn_fwd(q, k, v, cu, cu, z, *mask)
    hopper._attn_bwd(out, q, k, v, out, lse, None, cu, cu, z, *mask, False)
    hopper._forwards.clear()
    hopper._backwards.clear()
    shape = types.SimpleNamespace(
        batch=2 if packed else 1, seqlen_q=longest[0], seqlen_k=longest[1], varlen=packed,
        total_q=6, total_k=6, heads_q=2, heads_k=2, head_dim_qk=64, head_dim_v=64,
    )  # fmt: skip
    for (name, size), kind in zip(asked, (_lib.AttnFwdParams, _lib.AttnBwdParams), strict=True):
        params = kind()
        hopper._fill_common(params, shape, q.dtype, *mask[2:])
        if packed:
            params.cu_seqlens_q = params.cu_seqlens_k = cu.data_ptr()
        if sink:
            params.sink = z.data_ptr()
        assert size == real.workspace(name, params)


@pytest.mark.parametrize(("packed", "sink"), [(False, False), (True, False), (True, True)])
def test_the_backward_is_asked_about_as_it_will_be_called(library, packed, sink):
    """Before a forward that needs a gradient: packed and sink are told by pointers here too."""
    hopper.backward_problem.cache_clear()
    problem = hopper.backward_problem(
        torch.bfloat16, 64, 64, True, packed, False, False, sink, False
    )
    hopper.backward_problem.cache_clear()
    assert problem is None and library.queries == [(packed, sink)]
