"""The doctor's findings on this machine and on made-up ones."""

from __future__ import annotations

import json

from fa3_train import doctor
from fa3_train.doctor import Finding


def test_sections_and_exit_code(capsys):
    sections = doctor.examine()
    broken = [f for fs in sections.values() for f in fs if f.required and not f.ok]
    code = doctor.main([], examine=lambda: sections)
    out = capsys.readouterr().out
    assert code == (1 if broken else 0)
    for title in ("torch and GPU", "attention backends", "packages", "to build the kernels"):
        assert title in out
    names = {f.name for f in sections["attention backends"]}
    assert {"kernel library", "hopper", "sdpa", "reference"} <= names
    # Whatever is missing says what it needs.
    assert all(f.need for fs in sections.values() for f in fs if not f.ok)


def test_missing_required_package_fails_and_says_how(monkeypatch, capsys):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    found = doctor._package("hydra-core", "hydra", True, "configuration: pip install hydra-core")
    assert not found.ok and found.need == "pip install hydra-core (for configuration)"
    assert doctor.main([], examine=lambda: {"packages": [found]}) == 1
    out = capsys.readouterr().out
    assert "MISSING" in out and "cannot run here: hydra-core" in out


def test_missing_optional_package_is_no_failure(capsys):
    found = Finding("datasets", False, "not installed", "pip install datasets (for data=hf)")
    assert doctor.main([], examine=lambda: {"packages": [found]}) == 0
    assert "needs: pip install datasets" in capsys.readouterr().out


def test_transformer_engine_installed_but_unusable(monkeypatch):
    from fa3_train.modules import te

    def load():
        raise RuntimeError("needs an NVIDIA GPU\nand more")

    monkeypatch.setattr(te, "load", load)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    found = doctor._package("transformer-engine", "transformer_engine", False, "linear=te: pip")
    assert not found.ok and "unusable here" in found.found and found.need == "needs an NVIDIA GPU"


def test_broken_kernel_library_is_named(monkeypatch, tmp_path):
    from fa3_train import _lib

    path = tmp_path / "libfa3_train.so"
    path.write_bytes(b"not a library")
    monkeypatch.setenv("FA3_TRAIN_LIBRARY", str(path))
    monkeypatch.setattr(_lib, "_loaded", None)
    found = next(f for f in doctor._backends() if f.name == "kernel library")
    assert not found.ok and str(path) in found.need


def test_old_nvcc_is_not_enough(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name, path=None: f"/opt/{name}")
    monkeypatch.setattr(doctor, "_run", lambda command, pattern: "11.8")
    nvcc = next(f for f in doctor._tools() if f.name == "nvcc")
    assert not nvcc.ok and "11.8" in nvcc.found and "12.8" in nvcc.need
    monkeypatch.setattr(doctor, "_run", lambda command, pattern: "13.0")
    assert next(f for f in doctor._tools() if f.name == "nvcc").ok


def test_json(capsys):
    found = Finding("x", True, "1.0")
    assert doctor.main(["--json"], examine=lambda: {"packages": [found]}) == 0
    assert json.loads(capsys.readouterr().out)["packages"][0]["found"] == "1.0"


def test_unknown_word(capsys):
    assert doctor.main(["--jsn"], examine=dict) == 2
    assert "--jsn" in capsys.readouterr().err
