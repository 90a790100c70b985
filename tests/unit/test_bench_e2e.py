"""What the end-to-end benchmarks make of their measurements, and that documents quote the files."""

from __future__ import annotations

import pytest
import torch

from fa3_train.bench import e2e, layer, profile, readme
from fa3_train.models import MODELS
from fa3_train.modules import FlashAttention, TransformerLayer
from fa3_train.train.flops import step_flops

# Names as they stand in traces of an H100.
KERNELS = {
    "void fa3::attn_fwd_kernel<fa3::FwdTraits<128, 128> >(fa3::FwdParams)": "attention forward",
    "void fa3::fp8_fwd_kernel<fa3::Fp8Traits<128> >(fa3::Fp8FwdKernelParams)": "attention forward",
    "void fa3::bwd_fused<fa3::BwdTraits<128> >(fa3::BwdKernelParams)": "attention backward",
    "void fa3::bwd_prepare<128, 64>(fa3::BwdAroundParams)": "attention backward",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false, "
    "cutlass::bfloat16_t> >": "attention forward",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3": "attention backward",
    "void fa3::prep::rope_kernel<__nv_bfloat16, __nv_bfloat16, false>": "rope and quantize",
    "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT": "gemm",
    "_swiglu_gradient_kernel": "swiglu",
    "_rms_norm_kernel": "norm",
    "_row_kernel": "cross-entropy",
    "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer",
    "Memset (Device)": "copies",
    "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<BFloat16> >": profile.OTHER,
}


@pytest.mark.parametrize("name", KERNELS, ids=lambda n: n[:40])
def test_kernels_have_components(name):
    assert profile.component_of(name) == KERNELS[name]


def _event(kind, name, start, length, **args):
    return {"cat": kind, "name": name, "ts": start, "dur": length, "args": args}


EVENTS = [
    _event("user_annotation", "fa3:step", -500, 400),
    _event("user_annotation", "fa3:step", 0, 90),
    _event("user_annotation", "fa3:step", 90, 90),
    _event("cuda_runtime", "cudaLaunchKernel", -300, 1, correlation=9),
    _event("kernel", "nvjet_a", 100, 400, correlation=9),  # of a step that is not looked at
    _event("user_annotation", "fa3:forward", 0, 100),
    _event("user_annotation", "fa3:head", 60, 30),
    _event("user_annotation", "fa3:backward", 110, 50),
    _event("cpu_op", "aten::mm", 1, 5),
    _event("cuda_runtime", "cudaLaunchKernel", 10, 1, correlation=1),
    _event("cuda_driver", "cuLaunchKernelEx", 70, 1, correlation=2),
    _event("cuda_runtime", "cudaLaunchKernel", 120, 1, correlation=3),
    _event("cuda_runtime", "cudaMemcpyAsync", 170, 1, correlation=4),
    _event("kernel", "nvjet_a", 1000, 400, correlation=1),
    _event("kernel", "nvjet_a", 1500, 600, correlation=2),
    _event("kernel", "bwd_fused", 2000, 500, correlation=3),  # overlaps the one before by 100
    _event("gpu_memcpy", "Memcpy HtoD", 2900, 100, correlation=4),
]


def test_profile_by_component_and_phase():
    got = profile.analyse(EVENTS, steps=2)
    assert got["window_ms"] == pytest.approx(1.0)
    assert got["busy_ms"] == pytest.approx((400 + 1000 + 100) / 2e3)
    assert got["idle_ms"] == pytest.approx(got["window_ms"] - got["busy_ms"])
    assert got["components"]["gemm"] == pytest.approx({"forward": 0.2, "head": 0.3})
    assert got["components"]["attention backward"] == pytest.approx({"backward": 0.2})
    assert got["components"]["copies"] == pytest.approx({"between": 0.05})
    assert sum(sum(p.values()) for p in got["components"].values()) == pytest.approx(got["busy_ms"])
    assert got["kernels"][0]["phase"] == "head" and got["kernels"][0]["calls"] == 0.5


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_needed_work_is_that_of_the_flop_count(policy):
    model = MODELS["llama3_8b"].replace(activation_checkpointing=policy)
    tokens, square = 8192, 8192**2
    work = profile.needed(model, tokens, square, 1)
    total = sum(bf16 + fp8 for bf16, fp8, _ in work.values())
    assert total == pytest.approx(step_flops(model, tokens, square, tokens).hardware)


def test_roofline_takes_the_larger_bound():
    rows = profile.roofline(
        {"gemm": {"forward": 3.0, "head": 1.0}, "norm": {"forward": 2.0}, "idle": {}},
        {"gemm, layers": (1e12, 1e12, 0.0), "norm": (0.0, 0.0, 3e9)},
        {"bf16_tflops": 500.0, "fp8_tflops": 1000.0, "copy_gbs": 3000.0},
    )
    by_name = {row["component"]: row for row in rows}
    assert by_name["gemm, layers"]["possible_ms"] == pytest.approx(3.0)
    assert by_name["norm"]["possible_ms"] == pytest.approx(1.0)
    assert "possible_ms" not in by_name["gemm, head"]  # nothing is claimed where nothing is known


def test_exchanged_cores_compute_the_same():
    torch.manual_seed(0)
    block = TransformerLayer(32, 48, 4, 2, max_seq_len=16, backend="sdpa")
    stack = torch.nn.Module()
    stack.layers = torch.nn.ModuleList([block])
    x = torch.randn(20, 32)
    cu = torch.tensor([0, 10, 20], dtype=torch.int32)
    before = block(x, cu_seqlens=cu, max_seqlen=10)
    e2e.exchange(stack, "fa2", x.device)
    assert torch.allclose(block(x, cu_seqlens=cu, max_seqlen=10), before, atol=1e-5)
    assert torch.allclose(block(x.view(2, 10, 32)), before.view(2, 10, 32), atol=1e-5)
    e2e.exchange(stack, "ours fp8", x.device)
    assert block.attention.core.precision == "fp8"
    assert isinstance(block.attention.core, FlashAttention)


def test_savings_are_against_fa2():
    row = {"forward_ms": 1.0, "backward_ms": 1.0, "optimizer_ms": 1.0, "tokens_per_s": 1.0,
           "tflops_per_gpu": 1.0, "mfu_causal": None}  # fmt: skip
    cell = {
        "engine": "torch", "linear": "torch", "seqlen": 8, "accumulation": 2, "micro_batch": 1,
        "layers": 4, "recompute": "none",
        "peak_gib": 1.0,
        "variants": {"fa2": row | {"step_ms": 10.0}, "cudnn": {"skipped": "no"},
                     "ours bf16": row | {"step_ms": 9.0}},
    }  # fmt: skip
    lines = e2e.text({"cells": [cell, {"engine": "deepspeed", "linear": "te", "seqlen": 8,
                                       "error": "out of memory"}]}).splitlines()  # fmt: skip
    assert "| 10.0% |" in lines[4] and "n/a" in lines[4]
    assert len({line.count("|") for line in lines}) == 1


def test_layer_ratios():
    def row(forward, step):
        return {"fwd": {"ms": forward}, "fwdbwd": {"ms": step, "tflops": 1.0}}

    variants = {"te bf16": row(2.0, 6.0), "ours bf16": row(1.0, 5.0)}
    cell = {"size": "8b", "seqlen": 8, "variants": variants}
    assert "2.000 / 1.200" in layer.table({"suite": "te", "cells": [cell]})
    cell = {"size": "8b", "seqlen": 8, "variants": {"fa2": row(2.0, 6.0), "cudnn": row(1.5, 4.5)}}
    assert "25.0% / 25.0%" in layer.table({"suite": "backends", "cells": [cell]})


def test_documents_show_what_the_files_say():
    """Run `python -m fa3_train.bench readme` after a result file has changed."""
    for path in readme.documents():
        assert readme.rewritten(path.read_text()) == path.read_text(), path.name


def test_a_mark_without_its_file_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    with pytest.raises(readme.MissingResult, match=r"attention_paper\.json does not exist"):
        readme.rewritten("<!-- measured: attention_grid -->\n<!-- end -->")
    with pytest.raises(readme.MissingResult, match="unknown table 'nothing'"):
        readme.rewritten("<!-- measured: nothing -->\n<!-- end -->")
