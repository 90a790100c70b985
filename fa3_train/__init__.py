"""FlashAttention-3-style training attention for Hopper GPUs, from the kernel to the dashboard.

Importing this package costs nothing: no torch, no compiled library, no GPU. The names below are
looked up when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module that defines it.
_EXPORTS = {
    "flash_attn_func": "fa3_train.ops.attention",
    "flash_attn_varlen_func": "fa3_train.ops.attention",
    "flash_attn_fp8_func": "fa3_train.ops.attention_fp8",
    "flash_attn_fp8_varlen_func": "fa3_train.ops.attention_fp8",
    "rope_hadamard_quantize": "fa3_train.ops.preprocess",
}
_SUBMODULES = ("bench", "integrations", "models", "modules", "ops", "train")

__all__ = [
    "__version__",
    "flash_attn_fp8_func",
    "flash_attn_fp8_varlen_func",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "rope_hadamard_quantize",
]

if TYPE_CHECKING:
    from fa3_train.ops.attention import flash_attn_func, flash_attn_varlen_func
    from fa3_train.ops.attention_fp8 import flash_attn_fp8_func, flash_attn_fp8_varlen_func
    from fa3_train.ops.preprocess import rope_hadamard_quantize


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"fa3_train.{name}")
    raise AttributeError(f"module 'fa3_train' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS, *_SUBMODULES])
