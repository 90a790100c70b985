"""flash_attn's own functions, FA2's and FA3's, so that code written for them runs unchanged.

The two packages disagree on positions: the fourth argument of ``flash_attn_func`` is ``dropout_p``
in FA2 and ``softmax_scale`` in FA3. Hence two namespaces here, ``fa2`` and ``fa3``, each with the
exact signatures of its package, and :func:`install`, which makes them importable as ``flash_attn``
and ``flash_attn_interface``. Frameworks find flash attention by *distribution* name as well
(TransformerEngine and HF transformers both do), so install() answers ``importlib.metadata`` too.

    from fa3_train.integrations import flash_attn
    flash_attn.install()                       # before the framework is imported
    from flash_attn_interface import flash_attn_func

Not served, with a reason: dropout, ALiBi, paged and appended KV caches, ``qv``, attention chunks,
split-KV, ``sm_margin``, per-head FP8 descales (use ``fa3_train.flash_attn_fp8_func``).
``pack_gqa`` is a hint about speed and changes no result: it is accepted.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
from collections.abc import Iterable
from typing import Any, NoReturn

from torch import Tensor

from fa3_train.checks import require
from fa3_train.integrations import _handover, lengths
from fa3_train.integrations._layout import readable
from fa3_train.integrations._metadata import Distribution, Finder
from fa3_train.integrations.policy import Policy
from fa3_train.ops import attention

__all__ = ["fa2", "fa3", "install", "supports", "uninstall"]

_policy = Policy("flash_attn")


# The version each namespace claims: signatures were checked against these.
FA2_VERSION = "2.8.3"
FA3_VERSION = "3.0.0"

_MUST_BE_NONE = {
    "seqused_q": "sequences shorter than cu_seqlens says are not served by the private functions",
    "seqused_k": "sequences shorter than cu_seqlens says are not served by the private functions",
    "alibi_slopes": "ALiBi is not served",
    "block_table": "paged KV caches are not served",
    "qv": "qv is not served",
    "q_descale": "per-head FP8 descales are not served; use fa3_train.flash_attn_fp8_func",
    "k_descale": "per-head FP8 descales are not served; use fa3_train.flash_attn_fp8_func",
    "v_descale": "per-head FP8 descales are not served; use fa3_train.flash_attn_fp8_func",
}


def supports(
    *,
    dropout_p: float = 0.0,
    attention_chunk: int = 0,
    num_splits: int = 1,
    sm_margin: int = 0,
    **tensors: Any,
) -> str | None:
    """Reason why a call with these arguments is not served, or None.

    Takes any keyword of the FA2 and FA3 functions; those not named here do not decide.
    """
    if dropout_p != 0.0:
        return f"dropout_p: attention dropout is not served, got {dropout_p}"
    if attention_chunk != 0:
        return f"attention_chunk: must be 0, got {attention_chunk}"
    if num_splits not in (0, 1):
        return f"num_splits: split-KV is not served, must be 0 or 1, got {num_splits}"
    if sm_margin != 0:
        return f"sm_margin: must be 0, got {sm_margin}"
    for name, why in _MUST_BE_NONE.items():
        if tensors.get(name) is not None:
            return f"{name}: {why}"
    return None


def _check(**arguments: Any) -> None:
    reason = supports(**arguments)
    if reason is not None:
        _refuse(reason)


def _refuse(reason: str) -> NoReturn:
    _handover.refuse(_policy, reason)


def _window(window_size: Iterable[int | None], causal: bool) -> tuple[int, int]:
    """As flash_attn reads it: None is unbounded, and causal overrules the right side."""
    left, right = (-1 if side is None else int(side) for side in window_size)
    return left, 0 if causal else right


def _dense(q, k, v, scale, causal, window_size, softcap, deterministic, lse):
    return attention.flash_attn_func(
        *readable(q, k, v), scale, causal, window_size=_window(window_size, causal),
        softcap=softcap, deterministic=deterministic, return_lse=lse,
    )  # fmt: skip


def _varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, window_size, softcap, det, lse):
    return attention.flash_attn_varlen_func(
        *readable(q, k, v), cu_q, cu_k, int(max_q), int(max_k), scale, causal,
        window_size=_window(window_size, causal), softcap=softcap, deterministic=det,
        return_lse=lse,
    )  # fmt: skip


def _split_packed(qkv: Tensor, num_heads_q: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """(…, 3, H, D), or with ``num_heads_q`` (…, H + 2 Hkv, D)."""
    if num_heads_q is None:
        require(
            qkv.dim() >= 4 and qkv.shape[-3] == 3,
            "qkv", "must be (..., 3, heads, head_dim)", tuple(qkv.shape),
        )  # fmt: skip
        return qkv.unbind(-3)  # type: ignore[return-value]
    rest = qkv.shape[-2] - num_heads_q
    require(
        rest > 0 and rest % 2 == 0, "num_heads_q",
        f"must leave an even number of the {qkv.shape[-2]} heads for k and v", num_heads_q,
    )  # fmt: skip
    return qkv.split([num_heads_q, rest // 2, rest // 2], dim=-2)  # type: ignore[return-value]


# --- FA2: results are out, or (out, lse, None) with return_attn_probs -----------------------------


def _fa2_result(result, return_attn_probs: bool):
    return (*result, None) if return_attn_probs else result


def _fa2_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
):  # fmt: skip
    """FA2's flash_attn_func: q (B, Sq, H, D), k and v (B, Sk, Hkv, D).

    With ``return_attn_probs``: (out, lse (B, H, Sq) fp32, None), the None standing for the
    dropout mask.
    """
    _check(dropout_p=dropout_p, alibi_slopes=alibi_slopes)
    out = _dense(
        q, k, v, softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs
    )
    return _fa2_result(out, return_attn_probs)


def _fa2_kvpacked_func(
    q: Tensor, kv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
):  # fmt: skip
    """As flash_attn_func with kv (B, Sk, 2, Hkv, D)."""
    k, v = kv.unbind(-3)
    return _fa2_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, return_attn_probs,
    )  # fmt: skip


def _fa2_qkvpacked_func(
    qkv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
):  # fmt: skip
    """As flash_attn_func with qkv (B, S, 3, H, D)."""
    return _fa2_func(
        *_split_packed(qkv, None), dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def _fa2_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, block_table: Tensor | None = None,
):  # fmt: skip
    """FA2's flash_attn_varlen_func: q (total, H, D), lse (H, total)."""
    _check(dropout_p=dropout_p, alibi_slopes=alibi_slopes, block_table=block_table)
    out = _varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
        window_size, softcap, deterministic, return_attn_probs,
    )  # fmt: skip
    return _fa2_result(out, return_attn_probs)


def _fa2_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
):  # fmt: skip
    """As flash_attn_varlen_func with kv (total_k, 2, Hkv, D)."""
    k, v = kv.unbind(-3)
    return _fa2_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def _fa2_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
):  # fmt: skip
    """As flash_attn_varlen_func with qkv (total, 3, H, D)."""
    return _fa2_varlen_func(
        *_split_packed(qkv, None), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p,
        softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


# --- FA3: results are out, or (out, lse) with return_attn_probs -----------------------------------


def _fa3_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False,
    qv: Tensor | None = None, q_descale: Tensor | None = None, k_descale: Tensor | None = None,
    v_descale: Tensor | None = None, window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1,
    pack_gqa: bool | None = None, deterministic: bool = False, sm_margin: int = 0,
    return_attn_probs: bool = False,
):  # fmt: skip
    """FA3's flash_attn_func: q (B, Sq, H, D), k and v (B, Sk, Hkv, D); with
    ``return_attn_probs`` (out, lse (B, H, Sq) fp32)."""
    _check(
        qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
        attention_chunk=attention_chunk, num_splits=num_splits, sm_margin=sm_margin,
    )  # fmt: skip
    return _dense(
        q, k, v, softmax_scale, causal, window_size, softcap, deterministic, return_attn_probs
    )


def _fa3_qkvpacked_func(
    qkv: Tensor, softmax_scale: float | None = None, causal: bool = False,
    q_descale: Tensor | None = None, k_descale: Tensor | None = None,
    v_descale: Tensor | None = None, window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0, softcap: float = 0.0, deterministic: bool = False,
    num_heads_q: int | None = None, sm_margin: int = 0, return_attn_probs: bool = False,
):  # fmt: skip
    """As flash_attn_func with qkv (B, S, 3, H, D), or (B, S, H + 2 Hkv, D) and ``num_heads_q``."""
    return _fa3_func(
        *_split_packed(qkv, num_heads_q), softmax_scale, causal, None, q_descale, k_descale,
        v_descale, window_size, attention_chunk, softcap, 1, None, deterministic, sm_margin,
        return_attn_probs,
    )  # fmt: skip


def _fa3_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None, softmax_scale: float | None = None, causal: bool = False,
    qv: Tensor | None = None, q_descale: Tensor | None = None, k_descale: Tensor | None = None,
    v_descale: Tensor | None = None, window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1,
    pack_gqa: bool | None = None, deterministic: bool = False, sm_margin: int = 0,
    return_attn_probs: bool = False,
):  # fmt: skip
    """FA3's flash_attn_varlen_func: q (total, H, D), lse (H, total).

    ``seqused``: (B) tokens of each sequence that count. Sequences are packed without the others
    and the results put back, zeros elsewhere: copies, and one synchronisation per new tensor.
    """
    _check(
        qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
        attention_chunk=attention_chunk, num_splits=num_splits, sm_margin=sm_margin,
    )  # fmt: skip
    return lengths.without_unused(
        lambda q, k, v, cu_q, cu_k: _varlen(
            q, k, v, cu_q, cu_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size,
            softcap, deterministic, return_attn_probs,
        ),
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
    )  # fmt: skip


def _for_inference(name: str, what: str) -> Any:
    def function(*args: Any, **kwargs: Any) -> NoReturn:
        _refuse(f"{name}: {what} is not served")

    function.__name__, function.__doc__ = name, "This library is for training."
    return function


_with_kvcache = _for_inference("flash_attn_with_kvcache", "decoding with a KV cache")


def _shorter(cu_seqlens: Tensor | None, used: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is not None and lengths.used(cu_seqlens, used) is None else used


def _fa3_forward(
    q: Tensor, k: Tensor, v: Tensor, k_new: Tensor | None = None, v_new: Tensor | None = None,
    qv: Tensor | None = None, out_: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None, seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    page_table: Tensor | None = None, kv_batch_idx: Tensor | None = None,
    leftpad_k: Tensor | None = None, rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None, seqlens_rotary: Tensor | None = None,
    q_descale: Tensor | None = None, k_descale: Tensor | None = None,
    v_descale: Tensor | None = None, softmax_scale: float | None = None, causal: bool = False,
    window_size_left: int = -1, window_size_right: int = -1, attention_chunk: int = 0,
    softcap: float = 0.0, rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None, num_splits: int = 1, pack_gqa: bool | None = None,
    sm_margin: int = 0,
):  # fmt: skip
    """FA3's private forward, which context-parallel code calls: (out, lse, empty, empty)."""
    for name, value in {
        "k_new": k_new, "v_new": v_new, "page_table": page_table, "kv_batch_idx": kv_batch_idx,
        "leftpad_k": leftpad_k, "rotary_cos": rotary_cos, "rotary_sin": rotary_sin,
        "cu_seqlens_k_new": cu_seqlens_k_new, "seqlens_rotary": seqlens_rotary,
    }.items():  # fmt: skip
        if value is not None:
            _refuse(f"{name}: KV caches are not served")
    _check(
        qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
        seqused_q=_shorter(cu_seqlens_q, seqused_q), seqused_k=_shorter(cu_seqlens_k, seqused_k),
        attention_chunk=attention_chunk, num_splits=num_splits,
        sm_margin=sm_margin,
    )  # fmt: skip
    out, lse = attention.attn_fwd(
        q, k, v, softmax_scale, causal, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        window_size=_window((window_size_left, window_size_right), causal), softcap=softcap,
    )  # fmt: skip
    if out_ is not None:
        out = out_.copy_(out)
    return out, lse, q.new_empty(0), q.new_empty(0)


def _fa3_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    sequed_q: Tensor | None = None, sequed_k: Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, dq: Tensor | None = None,
    dk: Tensor | None = None, dv: Tensor | None = None, softmax_scale: float | None = None,
    is_causal: bool = False, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, deterministic: bool = False, sm_margin: int = 0,
):  # fmt: skip
    """FA3's private backward: writes dq, dk, dv where given, returns them."""
    _check(
        seqused_q=_shorter(cu_seqlens_q, sequed_q), seqused_k=_shorter(cu_seqlens_k, sequed_k),
        sm_margin=sm_margin,
    )  # fmt: skip
    grads = attention.attn_bwd(
        dout, q, k, v, out, softmax_lse, softmax_scale, is_causal, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        window_size=_window((window_size_left, window_size_right), is_causal), softcap=softcap,
        deterministic=deterministic,
    )  # fmt: skip
    return tuple(
        g if given is None else given.copy_(g) for g, given in zip(grads, (dq, dk, dv), strict=True)
    )


def _namespace(name: str, version: str, functions: dict[str, Any]) -> types.ModuleType:
    module = types.ModuleType(name, f"fa3_train's attention under the names of {name}.")
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, origin=__file__)
    module.__file__ = __file__
    module.__version__ = version  # type: ignore[attr-defined]
    for public, function in functions.items():
        setattr(module, public, function)
    return module


fa2 = _namespace(
    "flash_attn",
    FA2_VERSION,
    {
        "flash_attn_func": _fa2_func,
        "flash_attn_kvpacked_func": _fa2_kvpacked_func,
        "flash_attn_qkvpacked_func": _fa2_qkvpacked_func,
        "flash_attn_varlen_func": _fa2_varlen_func,
        "flash_attn_varlen_kvpacked_func": _fa2_varlen_kvpacked_func,
        "flash_attn_varlen_qkvpacked_func": _fa2_varlen_qkvpacked_func,
        "flash_attn_with_kvcache": _with_kvcache,
    },
)
fa3 = _namespace(
    "flash_attn_interface",
    FA3_VERSION,
    {
        "flash_attn_func": _fa3_func,
        "flash_attn_qkvpacked_func": _fa3_qkvpacked_func,
        "flash_attn_varlen_func": _fa3_varlen_func,
        "flash_attn_combine": _for_inference("flash_attn_combine", "combining splits"),
        "flash_attn_with_kvcache": _with_kvcache,
        "get_scheduler_metadata": _for_inference("get_scheduler_metadata", "a foreign schedule"),
        "_flash_attn_forward": _fa3_forward,
        "_flash_attn_backward": _fa3_backward,
    },
)


def _with_fallback(module: types.ModuleType, original: types.ModuleType) -> types.ModuleType:
    """``module`` whose functions hand what they do not serve to those of ``original``."""
    rule = Policy("flash_attn", "warn")
    functions = {
        name: _handover.to_original(function, getattr(original, name, None), rule)
        for name, function in vars(module).items()
        if callable(function)
    }
    return _namespace(module.__name__, module.__version__, functions)


# --- importable under the packages' names ---------------------------------------------------------


_PAD = {f.__name__: f for f in (lengths.index_first_axis, lengths.pad_input, lengths.unpad_input)}
_finder = Finder()
_installed: list[str] = []
_NAMES = {
    "flash_attn": ("flash-attn", FA2_VERSION),
    "flash_attn_interface": ("flash-attn-3", FA3_VERSION),
}


def _foreign(name: str) -> bool:
    """Whether a package of that name, not ours, is installed or imported."""
    if name in sys.modules:
        return name not in _installed
    return importlib.machinery.PathFinder.find_spec(name) is not None


def install(*names: str, replace: bool = False, policy: str = "error") -> None:
    """Make ``import flash_attn_interface`` and ``import flash_attn`` find this library.

    Args:
        names: which of ``flash_attn`` (FA2) and ``flash_attn_interface`` (FA3); default the latter
            alone, since it is what a Hopper GPU would use.
        replace: also where the real package is installed. Without it that is an error, so that
            nobody times one believing it is the other.
        policy: ``error``, or ``warn``: what is not served goes to the real package's function and
            is counted. Needs ``replace=True`` and the real package.

    Call it before the framework is imported: most look for flash attention once, at import. To see
    it undone, call :func:`uninstall`.

    Raises:
        ArgumentError: unknown name, or the real package is there and ``replace`` is not given.
    """
    for name in names or ("flash_attn_interface",):
        require(name in _NAMES, "names", f"must be from {sorted(_NAMES)}", repr(name))
        require(
            replace or not _foreign(name), "replace",
            f"must be True to stand in for the installed package {name}", replace,
        )  # fmt: skip
        distribution, version = _NAMES[name]
        module = fa2 if name == "flash_attn" else fa3
        if Policy("flash_attn", policy).mode == "warn":
            require(_foreign(name), "policy", f"'warn' needs the real package {name}", "none")
            module = _with_fallback(module, importlib.import_module(name))
        sys.modules[name] = module
        _installed.append(name)
        if name == "flash_attn":  # frameworks import from these submodules
            module.__path__ = []  # type: ignore[attr-defined]
            for part, functions in (("flash_attn_interface", vars(module)), ("bert_padding", _PAD)):
                full = f"{name}.{part}"
                sys.modules[full] = _namespace(full, version, dict(functions))
                setattr(module, part, sys.modules[full])
                _installed.append(full)
        _finder.distributions[distribution] = Distribution(distribution, version, name)
    if _finder not in sys.meta_path:
        # First: metadata of a real package of that name must not win over `replace`.
        sys.meta_path.insert(0, _finder)


def uninstall() -> None:
    """Undo :func:`install`. What a framework has already imported stays with it."""
    for name in _installed:
        sys.modules.pop(name, None)
    _installed.clear()
    _finder.distributions.clear()
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
