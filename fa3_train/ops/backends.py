"""Which implementation serves a request: an explicit value, or one choice that is logged.

    hopper      this project's kernels: CUDA, sm_90, bf16/fp16, every option
    sdpa        torch's own attention: any device; no lse, softcap or sink
    reference   fp32/fp64 PyTorch by definition: any device, every option, slow

``auto`` takes the first of these that can, once per (device, dtype, head dims, options), and writes
one log line that says what and why. It never takes ``reference`` on a GPU, where that would look
like a hang: it raises instead. A named backend that cannot serve the request is an error that says
which argument is in the way and which backends could.

The answer depends on constants only, so ``torch.compile`` evaluates :func:`choose` while tracing
and the log line does not break the graph.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable

import torch

from fa3_train import _lib, checks
from fa3_train.ops import hopper
from fa3_train.ops.launch import mark_constant

BACKENDS = ("hopper", "sdpa", "reference")
OPTIONS = (
    "return_lse", "softcap", "sink", "window_size", "deterministic", "varlen", "grouped", "grad",
)  # fmt: skip

_log = logging.getLogger("fa3_train.backend")


class BackendError(checks.ArgumentError):
    """No backend, or not the named one, can serve the request."""


def _hopper_problem(
    device: torch.device, dtype: torch.dtype, d_qk: int, d_v: int, options: frozenset[str]
) -> str | None:
    if device.type != "cuda":
        return f"q: device must be a Hopper GPU, got {device}"
    problem = hopper.device_problem(
        torch.cuda.current_device() if device.index is None else device.index
    )
    if problem:
        return f"q: {problem}"
    if dtype not in checks.HOPPER_DTYPES:
        return f"q: dtype must be torch.bfloat16 or torch.float16, got {dtype}"
    try:
        checks.check_hopper_head_dims(d_qk, d_v)
    except checks.ArgumentError as error:
        return str(error)
    if not _lib.available():
        return f"library: {_lib.LIBRARY_NAME} is not built or not found"
    library = _lib.load()  # a library that is there but unusable is an error, not a reason
    if not library.has("fa3_attn_fwd"):
        return f"library: {library.path} holds no forward ({library.build_info})"
    if "grad" in options:
        return hopper.backward_problem(
            dtype, d_qk, d_v, "grouped" in options, "varlen" in options, "window_size" in options,
            "softcap" in options, "sink" in options, "deterministic" in options,
        )  # fmt: skip
    return None


def _sdpa_problem(
    device: torch.device, dtype: torch.dtype, d_qk: int, d_v: int, options: frozenset[str]
) -> str | None:
    for option in ("return_lse", "softcap", "sink"):
        if option in options:
            return f"{option}: torch's scaled_dot_product_attention has no such option"
    if (
        "deterministic" in options
        and "grad" in options
        and device.type == "cuda"
        and not torch.are_deterministic_algorithms_enabled()
    ):
        return "deterministic: needs torch.use_deterministic_algorithms(True)"
    return None


def _reference_problem(
    device: torch.device, dtype: torch.dtype, d_qk: int, d_v: int, options: frozenset[str]
) -> str | None:
    return None


_PROBLEMS: dict[str, Callable[..., str | None]] = {
    "hopper": _hopper_problem,
    "sdpa": _sdpa_problem,
    "reference": _reference_problem,
}


@functools.cache
def _choose(
    backend: str,
    device_type: str,
    device_index: int | None,
    dtype: torch.dtype,
    d_qk: int,
    d_v: int,
    options: tuple[str, ...],
    deterministic_algorithms: bool,
) -> str:
    device = torch.device(device_type if device_index is None else f"{device_type}:{device_index}")
    request = (device, dtype, d_qk, d_v, frozenset(options))
    if backend != "auto":
        problem = _PROBLEMS[backend](*request)
        if problem is None:
            return backend
        if problem.startswith("library:"):
            _lib.load()  # raises LibraryNotFound, which says how to get one
        others = [b for b in BACKENDS if b != backend and _PROBLEMS[b](*request) is None]
        raise BackendError(f"backend='{backend}': {problem}; backends that could: {others}")

    asked = ", ".join([f"{device}", f"{dtype}", f"head dims {d_qk}/{d_v}", *options])
    problem = _PROBLEMS["hopper"](*request)
    if problem is None:
        _log.info("attention backend 'hopper' for %s", asked)
        return "hopper"
    why = [f"hopper: {problem}"]
    problem = _PROBLEMS["sdpa"](*request)
    if problem is None:
        # On a Hopper GPU this is a loss that its owner should see; elsewhere it is expected.
        on_hopper = device.type == "cuda" and hopper.device_problem(device.index or 0) is None
        _log.log(
            logging.WARNING if on_hopper else logging.INFO,
            "attention backend 'sdpa' for %s (%s)", asked, why[0],
        )  # fmt: skip
        return "sdpa"
    why.append(f"sdpa: {problem}")
    if device.type == "cuda":
        raise BackendError(
            f"backend='auto': nothing fast serves {asked} ({'; '.join(why)}); "
            "backend='reference' would, slowly, if asked for by name"
        )
    _log.warning("attention backend 'reference' for %s (%s)", asked, "; ".join(why))
    return "reference"


def _choose_constant(*request) -> str:
    return _choose(*request)


mark_constant(_choose_constant)


def choose(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim_qk: int,
    head_dim_v: int | None = None,
    options: tuple[str, ...] = (),
) -> str:
    """The backend that serves a request: ``hopper``, ``sdpa`` or ``reference``.

    Args:
        backend: ``auto`` or a name from :data:`BACKENDS`.
        device, dtype: those of q. head_dim_v: default ``head_dim_qk``.
        options: what the request uses, in the order of :data:`OPTIONS`.

    Raises:
        BackendError: unknown name; a named backend that cannot; nothing fast for ``auto`` on a GPU.
        LibraryNotFound: ``hopper`` asked for, everything fits, but no compiled library is there.
    """
    checks.require(
        backend == "auto" or backend in BACKENDS,
        "backend",
        f"must be 'auto' or one of {list(BACKENDS)}",
        repr(backend),
    )
    # index(): inside torch.compile with dynamic shapes, a head dim becomes the constant it is.
    d_qk = operator.index(head_dim_qk)
    d_v = d_qk if head_dim_v is None else operator.index(head_dim_v)
    deterministic = "deterministic" in options and torch.are_deterministic_algorithms_enabled()
    return _choose_constant(
        backend, device.type, device.index, dtype, d_qk, d_v, options, deterministic
    )
