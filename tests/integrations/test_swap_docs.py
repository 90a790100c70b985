"""Every runnable block of docs/swap.md runs, each in a fresh namespace."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import processes  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "swap.md"
BLOCKS = re.findall(r"```python([^\n]*)\n(.*?)```", PAGE.read_text(), re.DOTALL)


def _name(index: int) -> str:
    code = BLOCKS[index][1]
    match = re.search(r"fa3_train\.integrations(?:\.(\w+)| import (\w+))", code)
    return f"{index}-{(match.group(1) or match.group(2)) if match else 'block'}"


def test_the_page_has_a_block_for_each_integration():
    folder = Path(importlib.util.find_spec("fa3_train.integrations").origin).parent
    text = PAGE.read_text()
    missing = [
        path.stem
        for path in folder.glob("*.py")
        if path.stem != "lengths"
        and not path.stem.startswith("_")  # no plug points
        and not re.search(rf"integrations(\.| import ){path.stem}\b", text)
    ]
    assert not missing


def _run(code):
    exec(compile(code, str(PAGE), "exec"), {"__name__": "swap"})


def _in_a_group(rank, ranks, code):
    with contextlib.suppress(ImportError):  # DeepSpeed's shared-memory op, built for minutes
        from deepspeed.ops import __compatible_ops__ as available
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

        available[ShareMemCommBuilder.NAME] = False
    _run(code)


def _marks(options):
    marks = [pytest.mark.gpu] if "gpu" in options.split() else []
    return marks + ([pytest.mark.distributed] if "processes=" in options else [])


@pytest.mark.parametrize(
    "index",
    [pytest.param(i, marks=_marks(options)) for i, (options, _) in enumerate(BLOCKS)],
    ids=_name,
)
def test_block(index):
    options, code = BLOCKS[index]
    needed = re.findall(r"requires=(\S+)", options) + re.findall(
        r"^from (transformers)", code, re.M
    )
    for name in needed:
        pytest.importorskip(name)
    ranks = re.search(r"processes=(\d+)", options)
    if ranks is None:
        _run(code)
    else:
        processes.run(int(ranks.group(1)), _in_a_group, code)


def test_no_block_is_left_out():
    known = re.compile(r"( (gpu|processes=2|requires=[\w.]+))*")
    assert all(known.fullmatch(options) for options, _ in BLOCKS)
