"""The wheel: tag, contents, and the sentence about the kernels."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fa3_train import _lib

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if importlib.util.find_spec("scikit_build_core") is None:
        pytest.skip("scikit-build-core is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w",
        str(folder), str(ROOT),
    ]  # fmt: skip
    env = {**os.environ, "FA3_TRAIN_CUDA": "0"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_one_wheel_for_every_python(wheel):
    assert "-py3-none-" in wheel.name


def test_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "fa3_train").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in names
    for folder, target in (("conf", "fa3_train/conf"), ("recipes", "fa3_train/recipes")):
        for source in (ROOT / folder).rglob("*.yaml"):
            assert f"{target}/{source.relative_to(ROOT / folder)}" in names
    assert not [n for n in names if n.startswith(("tests", "csrc", "conf", "recipes", "docs"))]


def test_it_runs_from_any_folder(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = (
        # An editable install of this checkout would win over the unpacked wheel.
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ScikitBuild' not in "
        "type(f).__name__]; "
        "import fa3_train.train.compose as c; print(c.conf_dir()); "
        "from fa3_train.cli import main; main(['recipe=llama3_8b_32k', 'dryrun=true'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site / "fa3_train" / "conf"))
    assert "8,030,261,248" in done.stdout


def test_loader_repeats_what_the_build_said(tmp_path, monkeypatch):
    package = tmp_path / "fa3_train"
    (package / "lib").mkdir(parents=True)
    (package / "lib" / "build.txt").write_text("no CUDA compiler found\n")
    monkeypatch.setattr(_lib, "__file__", str(package / "_lib.py"))
    monkeypatch.delenv(_lib.ENV_VARIABLE, raising=False)
    with pytest.raises(_lib.LibraryNotFound, match="When installed: no CUDA compiler found Build"):
        _lib.find_library()
