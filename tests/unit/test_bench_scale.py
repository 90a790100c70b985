"""Exposed communication from kernels' times, and the table."""

from __future__ import annotations

import pytest

from fa3_train.bench.scale import communication, table


def test_exposed_is_nccl_alone():
    kernels = [
        ("gemm", 0, 10),
        ("ncclDevKernel_AllGather", 5, 20),  # 5 hidden by the first, 5 by the second, 5 alone
        ("gemm", 15, 30),
        ("ncclDevKernel_ReduceScatter", 28, 40),  # 2 hidden
        ("ncclDevKernel_SendRecv", 35, 38),  # beside another of its kind: counted once
        ("adamw", 50, 100),
    ]
    shares = communication(kernels)
    assert shares["communication_share"] == pytest.approx((15 + 12) / 100)
    assert shares["exposed_share"] == pytest.approx((5 + 10) / 100)
    assert shares["idle_share"] == pytest.approx(10 / 100)


def test_nothing_hidden_and_all_hidden():
    assert communication([("ncclX", 0, 10), ("gemm", 10, 20)])["exposed_share"] == 0.5
    assert communication([("ncclX", 2, 8), ("gemm", 0, 5), ("gemm", 5, 10)])["exposed_share"] == 0
    assert communication([]) is None


def test_efficiency_is_against_one_gpu():
    common = {"step_ms": 1.0, "mfu_causal": 0.5, "peak_memory_gib": 1.0}
    cells = [
        {"cell": "8k_fsdp2", "gpus": 2, "tokens_per_s_per_gpu": 90.0, **common},
        {"cell": "8k_fsdp2", "gpus": 1, "tokens_per_s_per_gpu": 100.0, **common},
        {"cell": "8k_zero3", "gpus": 2, "tokens_per_s_per_gpu": 90.0, **common},
    ]
    rows = table(cells).splitlines()[2:]
    assert "| 100 | 100.0% |" in rows[0] and "| 90 | 90.0% |" in rows[1]
    assert "| 90 | n/a |" in rows[2]
