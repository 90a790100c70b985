"""pytest plugin: other projects' attention tests, run on our functions under the peers' names.

    export PYTHONPATH=.:tests/peers
    # TransformerEngine, which finds ours as FlashAttention-3 and compares it with its own backends
    python -m pytest -p swap_plugin TransformerEngine/tests/pytorch/attention/test_attention.py
    # FlashAttention-3's own tests, which import flash_attn_interface
    FLASH_ATTENTION_DISABLE_SPLIT=TRUE FLASH_ATTENTION_DISABLE_LOCAL=TRUE \\
        python -m pytest -p swap_plugin --every 8 flash-attention/hopper/test_flash_attn.py

The tests are in the projects' repositories, not in their wheels. A test that reaches what ours
refuses is reported as skipped, "refused", and counted by reason; the summary also says how many
tests called our kernels and passed. ``--every N`` keeps each Nth test, for suites of thousands.
"""

from __future__ import annotations

import collections

import pytest
import torch  # noqa: F401  (before TransformerEngine)

from fa3_train.integrations import flash_attn
from fa3_train.integrations.policy import UnsupportedRequest
from fa3_train.ops import attention, backends

calls: collections.Counter[str] = collections.Counter()
refusals: collections.Counter[str] = collections.Counter()


def _counted(function):
    def call(*args, **kwargs):
        calls[function.__name__] += 1
        return function(*args, **kwargs)

    return call


for _name in ("flash_attn_func", "flash_attn_varlen_func"):
    setattr(attention, _name, _counted(getattr(attention, _name)))
flash_attn.install()


def pytest_addoption(parser) -> None:
    parser.addoption("--every", type=int, default=1, help="keep each Nth test")


def pytest_collection_modifyitems(config, items) -> None:
    every = config.getoption("--every")
    config.hook.pytest_deselected(items=[x for i, x in enumerate(items) if i % every])
    items[:] = items[::every]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = sum(calls.values())
    try:
        result = yield
    except (UnsupportedRequest, backends.BackendError) as reason:
        refusals[str(reason).split(", got")[0][:100]] += 1
        pytest.skip(f"refused: {reason}")
    calls["tests that called ours and passed"] += sum(calls.values()) > before
    return result


def pytest_terminal_summary(terminalreporter) -> None:
    for name, count in [*calls.items(), *(("refused: " + r, n) for r, n in refusals.items())]:
        terminalreporter.write_line(f"fa3_train: {count} x {name}")
