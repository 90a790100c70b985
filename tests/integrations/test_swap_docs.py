"""Every runnable block of docs/swap.md runs, each in a fresh namespace."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

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
        if path.stem not in ("__init__", "lengths")  # not a plug point
        and not re.search(rf"integrations(\.| import ){path.stem}\b", text)
    ]
    assert not missing


@pytest.mark.parametrize("index", range(len(BLOCKS)), ids=_name)
def test_block(index):
    options, code = BLOCKS[index]
    compile(code, str(PAGE), "exec")  # also those that need a GPU or a process group
    if "no-run" in options:
        pytest.skip("needs a GPU, a model or a process group")
    needed = re.search(r"requires=(\S+)", options)
    for name in [needed.group(1)] if needed else re.findall(r"^from (transformers)", code, re.M):
        pytest.importorskip(name)
    exec(compile(code, str(PAGE), "exec"), {"__name__": "swap"})
