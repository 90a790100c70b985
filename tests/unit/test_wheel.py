"""The wheel is complete: conf and recipes travel inside, and it runs from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("scikit_build_core")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The package alone: FA3_TRAIN_CUDA=0 asks for neither cmake nor a compiler."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    done = subprocess.run(
        [*command, "-w", str(folder), str(ROOT)],
        env={**os.environ, "FA3_TRAIN_CUDA": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("fa3_train-*.whl")
    return path


def test_one_wheel_for_every_python(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_it_holds_every_module_group_and_recipe(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    for source, target in (("fa3_train", "fa3_train"), ("conf", "fa3_train/conf")):
        for path in (ROOT / source).rglob("*"):
            if path.suffix in (".py", ".yaml"):
                assert f"{target}/{path.relative_to(ROOT / source).as_posix()}" in held
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert f"fa3_train/recipes/{path.name}" in held


def test_it_runs_from_any_folder(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "fa3_train", "recipe=llama3_8b_32k", "dryrun=true"],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "8,030,261,248" in done.stdout
    where = subprocess.run(
        [sys.executable, "-c", "import fa3_train.train.compose as c; print(c.conf_dir())"],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert where.stdout.strip() == str(site / "fa3_train" / "conf")
