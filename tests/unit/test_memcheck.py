"""What `bench memcheck` makes of the sanitizer's answers; a script stands in for the tool."""

from __future__ import annotations

import json
import stat

import pytest

from fa3_train.bench import __main__ as cli

SCRIPT = """#!/bin/sh
case "$*" in
*canary*) echo "========= ERROR SUMMARY: {planted} errors" ;;
*) echo "case one"; echo "case two"; {end}; echo "========= ERROR SUMMARY: {found} errors" ;;
esac
exit {code}
"""


@pytest.mark.parametrize(
    ("planted", "found", "end", "code", "clean"),
    [
        (7, 0, "echo ran 2 cases", 0, True),
        (7, 3, "echo ran 2 cases", 0, False),
        (0, 0, "echo ran 2 cases", 0, False),  # the tool looked at nothing
        (7, 0, "true", 0, False),  # it ended early
        (7, 0, "echo ran 2 cases", 1, False),
    ],
)
def test_clean_needs_all_of_it(tmp_path, monkeypatch, capsys, planted, found, end, code, clean):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SCRIPT.format(planted=planted, found=found, end=end, code=code))
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    out = tmp_path / "result"
    assert cli.main(["memcheck", "--out", str(out)]) == (0 if clean else 1)
    assert ("NOT CLEAN" in capsys.readouterr().out) is not clean
    result = json.loads(out.with_suffix(".json").read_text())
    assert result["clean"] is (clean or planted == 0)
    assert result["cases"]["cases"] == ["one", "two"] and result["cases"]["errors"] == found
    assert "- one" in out.with_suffix(".md").read_text()


def test_without_the_tool_it_says_where_it_looked(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("pathlib.Path.is_file", lambda self: False)
    assert cli.main(["memcheck"]) == 2
    assert "compute-sanitizer" in capsys.readouterr().err
