"""Who may import whom, read from the source; and importing needs no GPU, driver or library."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fa3_train"

# A module imports from its own layer and from those before it.
LAYERS = [
    {"_lib", "reference", "reference_fp8", "numerics"},
    {"checks", "rotary"},
    {"ops"},
    {"modules"},
    {"models"},
    {"integrations"},
    {"train"},
    {"bench", "doctor"},
    {"cli", "__main__"},
]
TORCH_ONLY = {"reference", "reference_fp8", "numerics"}
# Not needed for a call of an op: imported when used, never at import time.
LAZY = (
    "deepspeed", "transformer_engine", "megatron", "transformers", "wandb", "datasets", "triton",
    "matplotlib",
)  # fmt: skip
ONE_FILE = ("deepspeed", "transformer_engine", "megatron", "wandb", "datasets")

FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part_of(module: str) -> str:
    """'fa3_train.ops.sdpa' -> 'ops'; the package itself -> ''."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def layer_of(part: str) -> int:
    for i, names in enumerate(LAYERS):
        if part in names:
            return i
    raise AssertionError(f"fa3_train/{part} has no layer: add it to LAYERS")


def imports(path: Path, tree: ast.AST | None = None):
    """(module, line, at import time) of every import; TYPE_CHECKING blocks are left out."""
    tree = tree or ast.parse(path.read_text())
    package = name_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]

    def visit(node: ast.AST, eager: bool):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module.split(".")[0] == "fa3_train" and module.count(".") == 0:
                yield from ((f"{module}.{alias.name}", node.lineno, eager) for alias in node.names)
            else:
                yield module, node.lineno, eager
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        else:
            inner = eager and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            for child in ast.iter_child_nodes(node):
                yield from visit(child, inner)

    yield from visit(tree, True)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_arrows_go_one_way(path):
    here = part_of(name_of(path))
    if not here:  # fa3_train/__init__.py: names looked up when used
        assert not [m for m, _, _ in imports(path) if m.startswith("fa3_train")]
        return
    for module, line, _ in imports(path):
        if module.split(".")[0] != "fa3_train":
            continue
        there = part_of(module)
        if there in ("", "__version__"):
            continue
        assert layer_of(there) <= layer_of(here), (
            f"{path.relative_to(ROOT)}:{line} imports {module}: {here} comes before {there}"
        )


@pytest.mark.parametrize("name", sorted(TORCH_ONLY))
def test_reference_and_numerics_import_torch_only(name):
    path = PACKAGE / f"{name}.py"
    if not path.is_file():
        pytest.skip(f"{name}.py is not written yet")
    for module, line, _ in imports(path):
        top = module.split(".")[0]
        if top == "fa3_train":
            assert part_of(module) in TORCH_ONLY, f"{path.name}:{line} imports {module}"
        else:
            assert top == "torch" or top in sys.stdlib_module_names, f"{path.name}:{line}: {module}"


@pytest.mark.parametrize("name", ["ctypes"])
def test_only_the_loader_knows_ctypes(name):
    users = [
        path.relative_to(ROOT)
        for path in FILES
        if any(module.split(".")[0] == name for module, _, _ in imports(path))
    ]
    assert users == [Path("fa3_train/_lib.py")]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_optional_packages_are_imported_when_used(path):
    if path.stem.endswith("_triton"):  # such a file is the lazily imported part of another
        return
    for module, line, eager in imports(path):
        if module.split(".")[0] in LAZY:
            assert not eager, f"{path.relative_to(ROOT)}:{line} imports {module} at import time"


@pytest.mark.parametrize("package", ONE_FILE)
def test_optional_packages_live_in_one_file(package):
    """One file in each part: an engine or a module may know it, and one integration may.

    Benchmarks are left out: each runs beside the package it compares with.
    """
    users: dict[str, set[str]] = {}
    for path in FILES:
        if any(module.split(".")[0] == package for module, _, _ in imports(path)):
            users.setdefault(part_of(name_of(path)), set()).add(str(path.relative_to(ROOT)))
    users.pop("bench", None)
    for part, files in users.items():
        assert len(files) == 1, f"{package} is imported in {sorted(files)}"
        assert part in {"integrations", "modules", "models", "train", "doctor"}, files


def run(code: str) -> str:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "FA3_TRAIN_LIBRARY": "/nowhere.so"}
    env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_free():
    """No torch, no numpy, nothing but the standard library until a name is used."""
    out = run(
        "import sys, fa3_train; print(fa3_train.__version__);"
        "print([m for m in ('torch', 'numpy', 'ctypes') if m in sys.modules])"
    )
    assert out.splitlines()[1] == "[]"


def test_attention_works_without_gpu_and_library():
    out = run(
        "import sys, torch, fa3_train\n"
        "q = torch.randn(1, 4, 2, 16)\n"
        "print(fa3_train.flash_attn_func(q, q, q, causal=True).shape)\n"
        "print('torch._dynamo' in sys.modules)"
    )
    assert out.splitlines() == ["torch.Size([1, 4, 2, 16])", "False"]


@pytest.mark.parametrize(
    "module",
    [name_of(p) for p in FILES if p.name != "__main__.py"],
)
def test_every_module_imports_without_a_gpu(module):
    """In this process: CUDA is never touched at import, so nothing needs a device."""
    import importlib

    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "fa3_train":
            raise
        pytest.skip(f"{error.name} is not installed")


def test_unknown_name():
    import fa3_train

    with pytest.raises(AttributeError, match="has no attribute 'flash_attn_kvpacked'"):
        fa3_train.flash_attn_kvpacked  # noqa: B018
    assert "flash_attn_func" in dir(fa3_train)
