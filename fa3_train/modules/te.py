"""TransformerEngine's modules for `linear=te` and `linear=te_fp8`: the only importer in modules.

`te` builds TransformerEngine's fused norm + linear and norm + MLP in 16 bit; `te_fp8` runs the same
modules under its autocast, so that their GEMMs take e4m3/e5m2 inputs.  Attention stays ours in
both: TransformerEngine's autocast does not reach it.  Weight rows keep our order ([q; k; v] and
[gate; up]), because the split of the fused projection is done by our layer and not by
TransformerEngine's.
"""

from __future__ import annotations

import contextlib
import functools
from types import ModuleType
from typing import Any

import torch
from torch import nn


@functools.cache
def load() -> ModuleType:
    """`transformer_engine.pytorch`, imported after torch.

    Raises ImportError where it is not installed, RuntimeError where it is but cannot start (it
    raises that itself on a machine without a GPU); the message says which of the two.
    """
    try:
        import transformer_engine.pytorch as te
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("transformer_engine", ""):
            raise RuntimeError(
                "model.linear: transformer_engine is installed, but a module that it needs is "
                f"missing: {error}"
            ) from error
        raise ImportError(
            "model.linear=te and te_fp8 need the package transformer_engine, which is not "
            "installed (pip install --no-build-isolation 'fa3_train[te]', on a machine with a "
            f"GPU and after torch); linear=torch works without it. Python says: {error}"
        ) from error
    except (RuntimeError, OSError, AssertionError) as error:
        raise RuntimeError(
            "model.linear: transformer_engine is installed but cannot be imported here (it needs "
            f"an NVIDIA GPU and its own cuDNN; linear=torch works without it): {error}"
        ) from error
    return te


@functools.cache
def _with_first(kind: type[nn.Module]) -> Any:
    """A TransformerEngine module whose call takes x alone, and whose attribute `first_microbatch`
    stands for the argument is_first_microbatch: with False, FP8 weights of the call before are
    used again; with None, the default, every call casts its weights."""

    class Module(kind):  # type: ignore[misc, valid-type]
        first_microbatch: bool | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = super().forward(x, is_first_microbatch=self.first_microbatch)
            return out

    Module.__name__, Module.__qualname__ = kind.__name__, kind.__qualname__
    return Module


def norm_linear(in_features: int, out_features: int, eps: float) -> nn.Module:
    """RMSNorm followed by a linear map, fused; (..., in) -> (..., out)."""
    return _with_first(load().LayerNormLinear)(
        in_features, out_features, eps=eps, bias=False, normalization="RMSNorm",
        params_dtype=torch.get_default_dtype(), device=torch.get_default_device(),
    )


def linear(in_features: int, out_features: int) -> nn.Module:
    """A linear map without bias; (..., in) -> (..., out)."""
    return _with_first(load().Linear)(
        in_features, out_features, bias=False,
        params_dtype=torch.get_default_dtype(), device=torch.get_default_device(),
    )


def norm_mlp(hidden_size: int, ffn_hidden_size: int, eps: float) -> nn.Module:
    """RMSNorm followed by SwiGLU, fused; (..., hidden) -> (..., hidden)."""
    return _with_first(load().LayerNormMLP)(
        hidden_size, ffn_hidden_size, eps=eps, bias=False, normalization="RMSNorm",
        activation="swiglu", params_dtype=torch.get_default_dtype(),
        device=torch.get_default_device(),
    )


@functools.cache
def recipe(name: str) -> Any:
    """TransformerEngine's scaling recipe: "current", "delayed" (its default) or "block"."""
    load()
    from transformer_engine.common import recipe as recipes

    classes = {
        "current": recipes.Float8CurrentScaling,
        "delayed": recipes.DelayedScaling,
        "block": recipes.Float8BlockScaling,
    }
    if name not in classes:
        raise ValueError(f"te_recipe must be one of {', '.join(classes)}, got {name!r}")
    return classes[name]()


def autocast(linear_kind: str, recipe_name: str) -> contextlib.AbstractContextManager[Any]:
    """The context in which layers of `linear_kind` run; does nothing unless it is "te_fp8"."""
    if linear_kind != "te_fp8":
        return contextlib.nullcontext()
    te = load()
    if hasattr(te, "autocast"):
        return te.autocast(enabled=True, recipe=recipe(recipe_name))
    return te.fp8_autocast(enabled=True, fp8_recipe=recipe(recipe_name))  # before 2.8


def in_autocast() -> bool:
    """Whether an FP8 autocast region is already open."""
    from transformer_engine.pytorch import quantization

    return quantization.FP8GlobalStateManager.is_fp8_enabled()
