"""pytest plugin: TransformerEngine's own attention tests, with our functions as FlashAttention-3.

    PYTHONPATH=.:tests/peers NVTE_FLASH_ATTN=1 python -m pytest -p te_plugin \\
        TransformerEngine/tests/pytorch/attention/test_attention.py -k "dpa_mask or qkv_layout"

The tests are not part of its wheel; take them from its repository. They compare the backends that
TransformerEngine finds available: FlashAttention (here: ours, by its own discovery), cuDNN, and its
unfused one. A test that reaches what ours refuses is reported as skipped, "refused", with the
reason; at the end stands how many calls ours served.
"""

from __future__ import annotations

import collections

import pytest
import torch  # noqa: F401  (before TransformerEngine)

from fa3_train.integrations import flash_attn
from fa3_train.integrations.policy import UnsupportedRequest

flash_attn.install()
calls: collections.Counter[str] = collections.Counter()
refusals: collections.Counter[str] = collections.Counter()


def _count(module) -> None:
    for name in ("flash_attn_func_v3", "flash_attn_varlen_func_v3"):
        ours = getattr(module, name)
        assert ours is getattr(flash_attn.fa3, name.removesuffix("_v3")), f"{name} is not ours"

        def counted(*args, _name=name, _function=ours, **kwargs):
            calls[_name] += 1
            return _function(*args, **kwargs)

        setattr(module, name, counted)


def pytest_collection_finish(session) -> None:
    from transformer_engine.pytorch.attention.dot_product_attention import backends

    if not calls["hooked"]:
        calls["hooked"] = 1
        _count(backends)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = sum(calls.values())
    try:
        result = yield
    except UnsupportedRequest as reason:
        refusals[str(reason)] += 1
        pytest.skip(f"refused: {reason}")
    if sum(calls.values()) > before:
        calls["tests that reached ours and passed"] += 1
    return result


def pytest_terminal_summary(terminalreporter) -> None:
    calls.pop("hooked", None)
    for name, count in [*calls.items(), *(("refused: " + r, n) for r, n in refusals.items())]:
        terminalreporter.write_line(f"fa3_train: {count} x {name}")
