"""Loading of the compiled kernel library: the only file of the package that knows ctypes.

``libfa3_train.so`` is plain C (csrc/fa3_train.h): it links neither torch nor Python, so one file
serves every version of both. The price is that nothing but discipline keeps the structs below equal
to the header, hence the check at load: the library describes its own structs in text made with
``offsetof`` (``fa3_abi_layout``), this file describes its own in the same words, and a difference
refuses the library before a single call is made.

Nothing is loaded at import. The first call of :func:`load` searches, in this order,

1. ``$FA3_TRAIN_LIBRARY`` (a path; if set, nothing else is looked at),
2. ``fa3_train/lib/libfa3_train.so`` inside the package: where a wheel puts it,
3. ``build/libfa3_train.so`` of a source checkout.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from array import array
from collections.abc import Callable
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any, NoReturn

ABI_VERSION = 1
LIBRARY_NAME = "libfa3_train.so"
ENV_VARIABLE = "FA3_TRAIN_LIBRARY"

BF16, FP16, E4M3, FP32 = 0, 1, 2, 3

# FA3_OPT_*: switches of the forward kernels for ablations.
OPTIONS = {
    "no_warp_specialization": 1,
    "no_overlap": 2,
    "no_pingpong": 4,
    "no_reg_realloc": 8,
    "not_persistent": 16,
}


class LibraryError(RuntimeError):
    """Base of everything that the compiled library, or the search for it, can raise."""


class LibraryNotFound(LibraryError):
    """No compiled library where it is looked for. The message lists the places and what to do."""


class AbiMismatch(LibraryError):
    """A library was found, but it was built from another version of csrc/fa3_train.h."""


class InvalidArgument(LibraryError, ValueError):
    """FA3_INVALID_ARGUMENT: the library names the argument, the rule and the value."""


class Unsupported(LibraryError, NotImplementedError):
    """FA3_UNSUPPORTED: a valid request that no kernel of this build serves on this GPU."""


class CudaError(LibraryError):
    """FA3_CUDA_ERROR: the driver refused; the message carries its text."""


class InternalError(LibraryError):
    """FA3_INTERNAL: a bug in the library."""


_EXCEPTIONS: dict[int, type[LibraryError]] = {
    1: InvalidArgument,
    2: Unsupported,
    3: CudaError,
    4: InternalError,
}


class Tensor(Structure):
    """Address and strides (in elements). The batch stride is unused in varlen."""

    _fields_ = [
        ("ptr", c_void_p),
        ("stride_batch", c_int64),
        ("stride_token", c_int64),
        ("stride_head", c_int64),
    ]


def _tensors(*names: str) -> list[tuple[str, Any]]:
    return [(name, Tensor) for name in names]


def _pointers(*names: str) -> list[tuple[str, Any]]:
    return [(name, c_void_p) for name in names]


def _ints(*names: str) -> list[tuple[str, Any]]:
    return [(name, c_int32) for name in names]


_SHAPE = _ints(
    "batch", "seqlen_q", "seqlen_k", "total_q", "total_k", "heads_q", "heads_k",
    "head_dim_qk", "head_dim_v", "window_left", "window_right",
)  # fmt: skip
_WORKSPACE: list[tuple[str, Any]] = [
    ("workspace", c_void_p),
    ("workspace_bytes", c_int64),
    ("stream", c_void_p),
]


class AttnFwdParams(Structure):
    _fields_ = [
        *_tensors("q", "k", "v", "out"),
        *_pointers("lse", "cu_seqlens_q", "cu_seqlens_k", "sink"),
        *_WORKSPACE,
        ("softmax_scale", c_float),
        ("softcap", c_float),
        *_ints("dtype"),
        *_SHAPE,
        *_ints("options", "reserved"),
    ]


class AttnBwdParams(Structure):
    _fields_ = [
        *_tensors("q", "k", "v", "out", "dout", "dq", "dk", "dv"),
        *_tensors("dq_accum", "dk_accum", "dv_accum"),
        *_pointers("lse", "dlse", "cu_seqlens_q", "cu_seqlens_k", "sink", "dsink"),
        *_WORKSPACE,
        ("softmax_scale", c_float),
        ("softcap", c_float),
        *_ints("dtype"),
        *_SHAPE,
        *_ints("deterministic", "options"),
    ]


class AttnFp8FwdParams(Structure):
    _fields_ = [
        *_tensors("q", "k", "v", "out"),
        *_pointers("q_descale", "k_descale", "v_descale", "lse", "cu_seqlens_q", "cu_seqlens_k"),
        *_WORKSPACE,
        ("softmax_scale", c_float),
        *_ints("out_dtype"),
        *_SHAPE,
        *_ints("two_level", "options", "reserved"),
    ]


class PrepTensor(Structure):
    _fields_ = [
        *_tensors("x", "out"),
        *_pointers("descale"),
        *_ints("heads", "rope", "hadamard", "quantize"),
    ]


class PrepParams(Structure):
    _fields_ = [
        ("tensors", PrepTensor * 3),
        *_pointers("cos", "sin", "signs", "position_ids", "cu_seqlens", "stream"),
        *_ints("num_tensors", "batch", "seqlen", "total", "positions", "head_dim", "rotary_dim"),
        *_ints("interleaved", "inverse", "in_dtype", "out_dtype", "block_size", "options"),
    ]


class Template:
    """A filled struct whose pointers are set anew for each call, in a fraction of the time.

    Every struct here is a whole number of 8-byte words and every pointer is one of them.

    Args:
        params: the filled struct; it is copied.
        pointers: names of fields, with dots into structs and arrays: ``"q.ptr"``.
    """

    def __init__(self, params: Structure, pointers: tuple[str, ...]) -> None:
        self._words = array("Q", bytes(params))
        self._places = [_offset(type(params), name) // 8 for name in pointers]

    def fill(self, *values: int) -> array[int]:
        """A copy of the struct with the pointers set; it must live until the call returns."""
        words = self._words[:]
        for place, value in zip(self._places, values, strict=True):
            words[place] = value
        return words


def _offset(kind: Any, name: str) -> int:
    """Bytes from the start of ``kind`` to a field such as ``"q.ptr"`` or ``"tensors.0.x.ptr"``."""
    first, _, rest = name.partition(".")
    if first.isdigit():
        inner, offset = kind._type_, int(first) * ctypes.sizeof(kind._type_)
    else:
        inner, offset = dict(kind._fields_)[first], getattr(kind, first).offset
    return offset + (_offset(inner, rest) if rest else 0)


# C name -> mirror. The order is that of the header and of fa3_abi_layout().
STRUCTS: dict[str, type[Structure]] = {
    "fa3_tensor": Tensor,
    "fa3_attn_fwd_params": AttnFwdParams,
    "fa3_attn_bwd_params": AttnBwdParams,
    "fa3_attn_fp8_fwd_params": AttnFp8FwdParams,
    "fa3_prep_tensor": PrepTensor,
    "fa3_prep_params": PrepParams,
}


def abi_layout() -> str:
    """This file's structs in the words of ``fa3_abi_layout``.

    One line per struct: ``name sizeof field:offset:size field:offset:size ...``.
    """
    lines = []
    for name, struct in STRUCTS.items():
        fields = []
        for field, *_ in struct._fields_:
            place = getattr(struct, field)
            fields.append(f"{field}:{place.offset}:{place.size}")
        lines.append(" ".join([name, str(ctypes.sizeof(struct)), *fields]))
    return "\n".join(lines) + "\n"


def layout_differences(ours: str, theirs: str) -> list[str]:
    """What differs between two layout texts, in sentences; empty when they agree."""

    def parse(text: str) -> dict[str, tuple[str, list[str]]]:
        rows = [line.split() for line in text.splitlines() if line.strip()]
        return {row[0]: (row[1] if len(row) > 1 else "?", row[2:]) for row in rows}

    mine, other = parse(ours), parse(theirs)
    found = []
    for name, (size, fields) in mine.items():
        if name not in other:
            found.append(f"struct {name} is not in the library's text")
            continue
        other_size, other_fields = other[name]
        if size != other_size:
            found.append(f"sizeof({name}) is {size} in Python and {other_size} in the library")
        for i in range(max(len(fields), len(other_fields))):
            a = fields[i] if i < len(fields) else "nothing"
            b = other_fields[i] if i < len(other_fields) else "nothing"
            if a != b:
                found.append(f"{name}, field {i}: {a} in Python, {b} in the library")
                break
    found += [f"struct {name} is unknown to Python" for name in other if name not in mine]
    return found


def search_paths() -> list[Path]:
    """Where :func:`load` looks, in order."""
    override = os.environ.get(ENV_VARIABLE)
    if override:
        return [Path(override)]
    package = Path(__file__).resolve().parent
    return [package / "lib" / LIBRARY_NAME, package.parent / "build" / LIBRARY_NAME]


def _build_note() -> str:
    """What the installation wrote down when it built no library."""
    note = Path(__file__).resolve().parent / "lib" / "build.txt"
    return f" When installed: {note.read_text().strip()}" if note.is_file() else ""


def find_library() -> Path:
    """The library's path.

    Raises:
        LibraryNotFound: at none of :func:`search_paths`; the message says how to get one.
    """
    paths = search_paths()
    for path in paths:
        if path.is_file():
            return path
    tried = ", ".join(str(path) for path in paths)
    if os.environ.get(ENV_VARIABLE):
        raise LibraryNotFound(f"{ENV_VARIABLE}={tried} is not a file")
    raise LibraryNotFound(
        f"the compiled kernels ({LIBRARY_NAME}) are not at any of: {tried}."
        f"{_build_note()} Build them with `cmake -B build && cmake --build build` in a source "
        "checkout or `pip install .` where "
        f"nvcc is found (a CUDA 13 toolkit, or the `build` extra), or set {ENV_VARIABLE} to a "
        "built library. Without them, backend='sdpa' and backend='reference' still work."
    )


class Library:
    """An opened library whose ABI was checked. Use :func:`load`, which opens it once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._dll = ctypes.CDLL(str(path))
        except OSError as error:
            raise LibraryError(f"{path} cannot be loaded: {error}") from error
        version = self._query("fa3_abi_version", ctypes.c_int)()
        if version != ABI_VERSION:
            raise AbiMismatch(
                f"{path} has ABI version {version}, this package needs {ABI_VERSION}: "
                "rebuild the library from the same sources"
            )
        theirs = self._query("fa3_abi_layout", ctypes.c_char_p)()
        found = layout_differences(abi_layout(), (theirs or b"").decode())
        if found:
            raise AbiMismatch(
                f"{path} has other struct layouts than this package: {'; '.join(found)}. "
                "Rebuild the library from the same sources"
            )
        self._last_error = self._query("fa3_last_error", ctypes.c_char_p)
        self.build_info: str = (self._query("fa3_build_info", ctypes.c_char_p)() or b"").decode()

    def _query(self, name: str, restype: type) -> Callable[..., Any]:
        try:
            function = self._dll[name]
        except AttributeError:
            raise AbiMismatch(f"{self.path} does not export {name}: not a {LIBRARY_NAME}") from None
        function.restype = restype
        function.argtypes = []
        return function

    @functools.cache  # noqa: B019 - one Library per process, never freed
    def _entry(self, name: str, restype: type) -> Callable[..., Any]:
        try:
            function = self._dll[name]
        except AttributeError:
            raise Unsupported(
                f"{self.path} holds no {name} (build: {self.build_info or 'not stated'})"
            ) from None
        function.restype = restype
        function.argtypes = [c_void_p]
        return function

    def has(self, name: str) -> bool:
        """Whether the library exports the entry point ``name``."""
        return hasattr(self._dll, name)

    def last_error(self) -> str:
        """The calling thread's last message."""
        return (self._last_error() or b"").decode(errors="replace")

    def call(self, name: str, params: Structure) -> None:
        """Call the entry point ``name``; it launches on ``params.stream`` and returns at once.

        Raises:
            InvalidArgument, Unsupported, CudaError, InternalError: by the returned status.
        """
        status = self._entry(name, ctypes.c_int)(ctypes.byref(params))
        if status:
            self._raise(name, status)

    def call_words(self, name: str, words: array[int]) -> None:
        """:meth:`call` with a struct that a :class:`Template` has filled."""
        status = self._entry(name, ctypes.c_int)(words.buffer_info()[0])
        if status:
            self._raise(name, status)

    def workspace(self, name: str, params: Structure) -> int:
        """Bytes of workspace that ``<name>`` needs for ``params``: calls ``<name>_workspace``."""
        size = int(self._entry(f"{name}_workspace", c_int64)(ctypes.byref(params)))
        if size < 0:
            raise Unsupported(f"{name}_workspace: {self.last_error()}")
        return size

    def _raise(self, name: str, status: int) -> NoReturn:
        message = self.last_error() or f"status {status} without a message"
        raise _EXCEPTIONS.get(status, InternalError)(f"{name}: {message}")


_lock = threading.Lock()
_loaded: Library | None = None


def load() -> Library:
    """Find, open and check the library; the same object ever after.

    Raises:
        LibraryNotFound: no file; AbiMismatch: built from another header; LibraryError: unloadable.
    """
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = Library(find_library())
    return _loaded


def available() -> bool:
    """Whether a library file exists where :func:`load` looks. Opens nothing."""
    return any(path.is_file() for path in search_paths())
