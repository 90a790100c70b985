"""The loader: struct layouts against the header by the C compiler, refusals, messages."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fa3_train import _lib

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "csrc" / "fa3_train.h"

needs_cc = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")

SOURCE = r"""
static const char* layout = "%(layout)s";
int fa3_abi_version(void) { return %(version)d; }
const char* fa3_abi_layout(void) { return layout; }
const char* fa3_last_error(void) { return "q: head_dim must be even, got 7"; }
const char* fa3_build_info(void) { return "fwd d64"; }
int fa3_attn_fwd(const void* p) { return %(status)d; }
long long fa3_attn_fwd_workspace(const void* p) { return %(bytes)d; }
"""


def compile_library(folder: Path, **changes) -> Path:
    values = {
        "layout": _lib.abi_layout(),
        "version": _lib.ABI_VERSION,
        "status": 0,
        "bytes": 0,
        **changes,
    }
    values["layout"] = values["layout"].replace("\n", "\\n")
    source = folder / "fake.c"
    source.write_text(SOURCE % values)
    path = folder / _lib.LIBRARY_NAME
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", path, source], check=True)
    return path


def fields_of(struct: str) -> list[str]:
    """Field names of a C struct in the header, in order."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)
    body = re.search(rf"typedef struct {struct} \{{(.*?)\}} {struct};", text, re.S)
    assert body, struct
    names: list[str] = []
    for statement in body.group(1).split(";"):
        statement = re.sub(r"\[\d+\]", "", statement).strip()
        if statement:
            declared = re.sub(r"^(const\s+)?\w+[\s*]+", "", statement, count=1)
            names += [name.strip(" *") for name in declared.split(",")]
    return names


@pytest.mark.parametrize("struct", _lib.STRUCTS)
def test_fields_are_those_of_the_header(struct):
    assert [name for name, *_ in _lib.STRUCTS[struct]._fields_] == fields_of(struct)


@needs_cc
def test_layout_is_that_of_the_c_compiler(tmp_path):
    """offsetof and sizeof from gcc on the header itself, no compiled library needed."""
    lines = []
    for struct in _lib.STRUCTS:
        lines.append(f'printf("{struct} %zu", sizeof({struct}));')
        for field in fields_of(struct):
            lines.append(
                f'printf(" {field}:%zu:%zu", offsetof({struct}, {field}), '
                f"sizeof((({struct}*)0)->{field}));"
            )
        lines.append('printf("\\n");')
    source = tmp_path / "layout.c"
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "{HEADER}"\n'
        "int main(void) {" + "\n".join(lines) + "return 0; }"
    )
    program = tmp_path / "layout"
    subprocess.run(["gcc", "-o", program, source], check=True)
    theirs = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert theirs == _lib.abi_layout()


def test_version_is_that_of_the_header():
    assert f"#define FA3_ABI_VERSION {_lib.ABI_VERSION}\n" in HEADER.read_text()


def test_constants_are_those_of_the_header():
    text = HEADER.read_text()
    for name, code in (("BF16", 0), ("FP16", 1), ("E4M3", 2), ("FP32", 3)):
        assert f"FA3_{name} = {code}" in text and getattr(_lib, name) == code
    for name, bit in _lib.OPTIONS.items():
        assert re.search(rf"FA3_OPT_{name.upper()} = {bit}\b", text), name
    for name, status in (
        ("INVALID_ARGUMENT", 1), ("UNSUPPORTED", 2), ("CUDA_ERROR", 3), ("INTERNAL", 4),
    ):  # fmt: skip
        assert re.search(rf"FA3_{name} = {status}\b", text)


@pytest.mark.skipif(not _lib.available(), reason="no compiled library")
def test_compiled_library_agrees():
    library = _lib.load()
    assert library.path.is_file()
    assert library.build_info


@needs_cc
def test_a_good_library_loads(tmp_path):
    library = _lib.Library(compile_library(tmp_path, bytes=4096))
    assert library.build_info == "fwd d64"
    params = _lib.AttnFwdParams()
    library.call("fa3_attn_fwd", params)
    assert library.workspace("fa3_attn_fwd", params) == 4096
    assert library.has("fa3_attn_fwd") and not library.has("fa3_attn_bwd")


@needs_cc
def test_wrong_version_is_refused(tmp_path):
    path = compile_library(tmp_path, version=_lib.ABI_VERSION + 1)
    with pytest.raises(_lib.AbiMismatch, match="has ABI version 2, this package needs 1"):
        _lib.Library(path)


@needs_cc
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("softcap:188:4", "softcap:192:4",
         "fa3_attn_fwd_params, field 12: softcap:188:4 in Python, softcap:192:4 in the library"),
        ("fa3_attn_bwd_params 488", "fa3_attn_bwd_params 496",
         r"sizeof\(fa3_attn_bwd_params\) is 488 in Python and 496 in the library"),
        (" reserved:244:4", "", "field 26: reserved:244:4 in Python, nothing in the library"),
        ("fa3_prep_tensor", "fa3_other", "struct fa3_prep_tensor is not in the library's text"),
        ("fa3_tensor", "fa3_extra 8 x:0:8\nfa3_tensor", "struct fa3_extra is unknown to Python"),
    ],
)  # fmt: skip
def test_wrong_layout_is_refused(tmp_path, old, new, message):
    layout = _lib.abi_layout()
    assert old in layout
    path = compile_library(tmp_path, layout=layout.replace(old, new, 1))
    with pytest.raises(_lib.AbiMismatch, match=message):
        _lib.Library(path)


@needs_cc
def test_another_library_is_refused(tmp_path):
    source = tmp_path / "x.c"
    source.write_text("int x(void) { return 0; }")
    path = tmp_path / "x.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", path, source], check=True)
    with pytest.raises(_lib.AbiMismatch, match="does not export fa3_abi_version"):
        _lib.Library(path)


def test_not_a_library(tmp_path):
    path = tmp_path / _lib.LIBRARY_NAME
    path.write_text("hello")
    with pytest.raises(_lib.LibraryError, match="cannot be loaded"):
        _lib.Library(path)


@needs_cc
@pytest.mark.parametrize(
    ("status", "kind", "builtin"),
    [
        (1, _lib.InvalidArgument, ValueError),
        (2, _lib.Unsupported, NotImplementedError),
        (3, _lib.CudaError, RuntimeError),
        (4, _lib.InternalError, RuntimeError),
        (99, _lib.InternalError, RuntimeError),
    ],
)
def test_status_becomes_an_exception_with_the_message(tmp_path, status, kind, builtin):
    library = _lib.Library(compile_library(tmp_path, status=status))
    with pytest.raises(kind, match="^fa3_attn_fwd: q: head_dim must be even, got 7$") as info:
        library.call("fa3_attn_fwd", _lib.AttnFwdParams())
    assert isinstance(info.value, builtin)


@needs_cc
def test_missing_entry_point_and_refused_workspace(tmp_path):
    library = _lib.Library(compile_library(tmp_path, bytes=-1))
    with pytest.raises(_lib.Unsupported, match=r"holds no fa3_attn_bwd \(build: fwd d64\)"):
        library.call("fa3_attn_bwd", _lib.AttnBwdParams())
    with pytest.raises(_lib.Unsupported, match="^fa3_attn_fwd_workspace: q: head_dim must be even"):
        library.workspace("fa3_attn_fwd", _lib.AttnFwdParams())


class TestTemplate:
    POINTERS = ("q.ptr", "out.ptr", "lse", "workspace", "stream")

    def params(self, values=(0, 0, 0, None, None)):
        params = _lib.AttnFwdParams()
        params.q.stride_token, params.v.stride_head = 77, -5
        params.softmax_scale, params.head_dim_v, params.workspace_bytes = 0.125, 64, 1 << 40
        params.q.ptr, params.out.ptr, params.lse, params.workspace, params.stream = values
        return params

    def test_a_filled_template_is_the_struct(self):
        values = (0xFFFF_0000_1234_5678, 2, 3, 4, 5)
        template = _lib.Template(self.params(), self.POINTERS)
        assert template.fill(*values).tobytes() == bytes(self.params(values))
        # another call does not see the last one's pointers
        assert template.fill(0, 0, 0, 0, 0).tobytes() == bytes(self.params())

    def test_fields_of_arrays(self):
        params = _lib.PrepParams()
        template = _lib.Template(params, ("tensors.0.x.ptr", "tensors.2.descale", "stream"))
        words = template.fill(11, 22, 33)
        params.tensors[0].x.ptr, params.tensors[2].descale, params.stream = 11, 22, 33
        assert words.tobytes() == bytes(params)

    def test_every_pointer_is_given(self):
        with pytest.raises(ValueError, match="shorter|longer"):
            _lib.Template(self.params(), self.POINTERS).fill(1, 2)

    def test_every_struct_is_whole_words_and_pointers_are_words(self):
        for struct in _lib.STRUCTS.values():
            assert ctypes.sizeof(struct) % 8 == 0
            for name, kind in struct._fields_:
                if kind is ctypes.c_void_p:
                    assert getattr(struct, name).offset % 8 == 0

    @needs_cc
    def test_the_library_gets_the_words(self, tmp_path):
        good = _lib.Library(compile_library(tmp_path))
        words = _lib.Template(self.params(), self.POINTERS).fill(1, 2, 3, 4, 5)
        good.call_words("fa3_attn_fwd", words)
        (tmp_path / "bad").mkdir()
        bad = _lib.Library(compile_library(tmp_path / "bad", status=1))
        with pytest.raises(_lib.InvalidArgument, match="head_dim must be even"):
            bad.call_words("fa3_attn_fwd", words)


class TestSearch:
    def test_order(self, monkeypatch):
        monkeypatch.delenv(_lib.ENV_VARIABLE, raising=False)
        first, second = _lib.search_paths()
        assert first == ROOT / "fa3_train" / "lib" / _lib.LIBRARY_NAME
        assert second == ROOT / "build" / _lib.LIBRARY_NAME

    def test_environment_wins_and_does_not_fall_through(self, monkeypatch, tmp_path):
        monkeypatch.setenv(_lib.ENV_VARIABLE, str(tmp_path / "none.so"))
        assert not _lib.available()
        with pytest.raises(_lib.LibraryNotFound, match=r"FA3_TRAIN_LIBRARY=.*none\.so is not a f"):
            _lib.find_library()

    def test_message_says_what_to_do(self, monkeypatch, tmp_path):
        monkeypatch.setattr(_lib, "search_paths", lambda: [tmp_path / "a.so", tmp_path / "b.so"])
        monkeypatch.delenv(_lib.ENV_VARIABLE, raising=False)
        with pytest.raises(_lib.LibraryNotFound) as info:
            _lib.find_library()
        text = str(info.value)
        for part in ("a.so", "b.so", "cmake", "pip install", "FA3_TRAIN_LIBRARY", "sdpa"):
            assert part in text

    @needs_cc
    def test_load_opens_once(self, monkeypatch, tmp_path):
        monkeypatch.setenv(_lib.ENV_VARIABLE, str(compile_library(tmp_path)))
        monkeypatch.setattr(_lib, "_loaded", None)
        assert _lib.load() is _lib.load()


def test_sizes_match_pointers():
    assert ctypes.sizeof(ctypes.c_void_p) == 8, "the layouts are those of 64-bit machines"
