"""The eager FP8 forward asks the library for what the two ops would, in fewer steps."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fa3_train
from fa3_train import _lib, reference_fp8
from fa3_train.ops import attention_fp8, fp8, hopper, launch, prep
from fa3_train.rotary import rope_tables

KINDS = {
    "fa3_prep": _lib.PrepParams,
    "fa3_attn_fp8_fwd": _lib.AttnFp8FwdParams,
    "fa3_attn_bwd": _lib.AttnBwdParams,
}


class StandIn:
    """Keeps the structs of all launches."""

    build_info = path = ""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []

    def workspace(self, name, params) -> int:
        return 64

    def has(self, name) -> bool:
        return True

    def call_words(self, name, words) -> None:
        self.calls.append((name, KINDS[name].from_buffer_copy(bytes(words))))


class Watch(TorchDispatchMode):
    """A dispatch mode that sees the ops, as a checkpointing policy does."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def library(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setattr(_lib, "load", lambda: stand_in)
    monkeypatch.setattr(launch, "on_device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(hopper, "device_problem", lambda index: None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 5, raising=False)
    monkeypatch.setattr(attention_fp8, "_choose", lambda *request: "hopper")
    memories = (
        prep._preps, prep._dequantizations, fp8._forwards, hopper._backwards,
        attention_fp8._resolved,
    )  # fmt: skip
    for memory in memories:
        memory.clear()
    with torch.library._scoped_library("fa3_train", "IMPL") as implementations:
        implementations.impl("prep", prep._prep, "CPU")
        implementations.impl("attn_fp8_fwd", fp8._attn_fp8_fwd, "CPU")
        implementations.impl("attn_bwd", hopper._attn_bwd, "CPU")
        implementations.impl("dequantize", prep._dequantize, "CPU")
        yield stand_in
    for memory in memories:
        memory.clear()


def numbers(params, pointers=True):
    """All fields of a struct, nested; addresses (which differ by call) only as given or not."""
    found = {}
    for name, kind, *_ in params._fields_:
        value = getattr(params, name)
        if isinstance(value, _lib.Tensor):
            found |= {
                f"{name}.{part}": getattr(value, part)
                for part in ("stride_batch", "stride_token", "stride_head")
            }
        elif hasattr(value, "_length_"):
            for i in range(value._length_):
                found |= {f"{name}.{i}.{k}": v for k, v in numbers(value[i]).items()}
        elif kind is _lib.c_void_p:
            found[name] = value is not None
        else:
            found[name] = value
    return found


def request(packed: bool, rope: bool, mixed: bool, ids):
    lead = (200,) if packed else (2, 200)
    qkv = torch.randn(*lead, 6, 64).bfloat16()
    q, k, v = qkv.split([4, 1, 1], -2)
    options = {"causal": True}
    if rope:
        options["cos"], options["sin"] = rope_tables(64, 300)
        options["position_ids"] = None if ids is None else torch.zeros(lead, dtype=ids)
    if mixed:
        options["signs"] = reference_fp8.random_signs(64).bfloat16()  # as in a bf16 model
    if packed:
        cu = torch.tensor([0, 150, 200], dtype=torch.int32)
        return lambda: fa3_train.flash_attn_fp8_varlen_func(q, k, v, cu, cu, 150, 150, **options), (
            q,
            k,
            v,
        )
    return lambda: fa3_train.flash_attn_fp8_func(q, k, v, **options), (q, k, v)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rope,ids", [(False, None), (True, None), (True, torch.int64)])
@pytest.mark.parametrize("mixed", [False, True])
def test_same_launches_as_the_ops(library, packed, rope, ids, mixed):
    call, (q, k, v) = request(packed, rope, mixed, ids)
    with Watch() as watch:
        call()
    assert any("fa3_train.prep" in s for s in watch.seen)
    for _ in range(2):
        out = call()
    (_, prep_op), (_, forward_op) = library.calls[:2]
    for i in (2, 4):
        (prep_name, ours), (forward_name, forward) = library.calls[i : i + 2]
        assert (prep_name, forward_name) == ("fa3_prep", "fa3_attn_fp8_fwd")
        assert numbers(ours) == numbers(prep_op)
        assert numbers(forward) == numbers(forward_op)
        # what the one writes is what the other reads
        for t, x, name in zip(ours.tensors, (q, k, v), "qkv", strict=True):
            assert t.x.ptr == x.data_ptr()
            assert t.out.ptr == getattr(forward, name).ptr
            assert t.descale == getattr(forward, f"{name}_descale")
            assert t.out.ptr % 16 == 0 and t.descale % 16 == 0
        places = sorted((t.out.ptr, t.descale) for t in ours.tensors)
        assert len({p for pair in places for p in pair}) == 6
    assert forward.out.ptr == out.data_ptr() and len(library.calls) == 6


def test_the_memory_is_used(library):
    call, _ = request(False, True, True, None)
    call()
    (known,) = attention_fp8._resolved.values()
    assert known.eager is not None
    call()
    assert list(attention_fp8._resolved.values()) == [known]


def test_values_are_checked_where_asked_for(library, monkeypatch):
    """The debug check reads codes: it needs the ops, whose tensors it can name."""
    call, _ = request(False, False, False, None)
    call()
    monkeypatch.setenv(fp8.CHECK_VARIABLE, "1")
    seen = []
    monkeypatch.setattr(fp8, "check_values", lambda name, *rest: seen.append(name))
    call()
    assert seen == ["q", "k", "v"]


def test_misaligned_inputs_take_the_way_that_copies(library):
    base = torch.randn(2 * 8 * 2 * 64 + 1).bfloat16()
    for x in (base[:-1].view(2, 8, 2, 64), base[1:].view(2, 8, 2, 64)):
        fa3_train.flash_attn_fp8_func(x, x, x)
        assert library.calls[-2][1].tensors[0].x.ptr % 16 == 0


def test_gradient_keeps_the_inputs_not_the_codes(library):
    call, (q, k, v) = request(False, True, True, None)
    q = q.detach().requires_grad_()
    out = fa3_train.flash_attn_fp8_func(q, k, v)
    assert any(t is not None and t.data_ptr() == q.data_ptr() for t in out.grad_fn.saved_tensors)
    assert all(t is None or t.dtype != torch.float8_e4m3fn for t in out.grad_fn.saved_tensors)
    out = fa3_train.flash_attn_fp8_func(q, k, v, gradient="codes")
    assert any(t is not None and t.dtype == torch.float8_e4m3fn for t in out.grad_fn.saved_tensors)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gradient", ["inputs", "codes"])
def test_compiled_in_one_graph(library, monkeypatch, packed, gradient):
    """Tracing sees the ops, forward and backward, and no memory of eager calls."""
    monkeypatch.setattr(hopper, "_require_device", lambda q: None)
    cos, sin = rope_tables(64, 300)
    signs = reference_fp8.random_signs(64)
    cu = torch.tensor([0, 150, 200], dtype=torch.int32)

    def attend(q, k, v):
        options = {"causal": True, "cos": cos, "sin": sin, "signs": signs, "gradient": gradient}
        if packed:
            return fa3_train.flash_attn_fp8_varlen_func(q, k, v, cu, cu, 150, 150, **options)
        return fa3_train.flash_attn_fp8_func(q, k, v, **options)

    lead = (200,) if packed else (2, 200)
    q, k, v = (torch.randn(*lead, h, 64).bfloat16().requires_grad_() for h in (4, 2, 2))
    torch._dynamo.reset()
    out = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    names = [name for name, _ in library.calls]
    middle = ["fa3_prep"]  # the rotation again, or the values of the codes
    assert names == ["fa3_prep", "fa3_attn_fp8_fwd", *middle, "fa3_attn_bwd", "fa3_prep"]
    assert not attention_fp8._resolved
