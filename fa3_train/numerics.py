"""How errors are measured and how large they may be: the one tolerance table of the project.

The yardstick is not a constant but PyTorch: an implementation in bf16 may be at most ``factor``
times as far from the fp64 truth as the plain PyTorch formula evaluated in bf16 on the same inputs
(maximum and root mean square, both). A constant would be either loose for short rows or wrong for
long ones; this rule follows the data, outliers included.

One floor is needed where PyTorch happens to be exact (a row with one key copies v): nobody can be
asked for less than the rounding of the result to its own dtype, half a unit in the last place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """``error <= factor * PyTorch's error + ulps * u * magnitude``.

    u is the unit roundoff of the result's dtype (eps / 2); the magnitude is max|truth| for the
    maximum error and rms(truth) for the RMS error.
    """

    factor: float
    ulps: float
    why: str


TOLERANCES: dict[str, Tolerance] = {
    "out": Tolerance(2.0, 1.0, "the project's rule; the floor is the rounding of the output"),
    "lse": Tolerance(2.0, 4.0, "fp32: exp2 and log2 of the hardware are good to 2 ulp each"),
    "grad": Tolerance(2.0, 1.0, "the project's rule; the floor is the rounding of the gradient"),
    "accum": Tolerance(2.0, 4.0, "fp32 sums over blocks, in another order than PyTorch's"),
    "lse_fp8": Tolerance(
        2.0,
        256.0,
        "beside an emulation of the FP8 kernel; 2^8 and descales pass through the exponent",
    ),
    "fp8_inputs": Tolerance(
        1.2, 0.0, "RMS beside what rounding the inputs to e4m3 costs by itself"
    ),
    "same": Tolerance(
        0.0, 32.0, "no low precision: the same sums, of some tens of terms, in another order"
    ),
}

# Two correct implementations, one against the other, relative RMS: what a benchmark lets pass
# before it times a peer. bf16 results and gradients differ by some 3e-3, FP8 ones by some 5e-2.
AGREEMENT = 2e-2
AGREEMENT_FP8 = 1.5e-1
# FP8 attention on normal data, relative RMS against fp32: a quarter of what cuDNN's FP8 attention
# (one delayed scale per tensor, FP8 backward) measures.
FP8_GRADIENTS = {"dq": 2.75e-2, "dk": 2.75e-2, "dv": 2.2e-2}


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to ``dtype``: 2^-8 bf16, 2^-11 fp16, 2^-24 fp32."""
    return torch.finfo(dtype).eps / 2


def max_error(actual: Tensor, truth: Tensor) -> float:
    """max |actual - truth|, in fp64; 0 for empty tensors."""
    if actual.numel() == 0:
        return 0.0
    return (actual.double() - truth.double()).abs().max().item()


def rms_error(actual: Tensor, truth: Tensor) -> float:
    """sqrt(mean (actual - truth)^2), in fp64; 0 for empty tensors."""
    if actual.numel() == 0:
        return 0.0
    return (actual.double() - truth.double()).square().mean().sqrt().item()


def rms(x: Tensor) -> float:
    """sqrt(mean x^2), in fp64; 0 for empty tensors."""
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def relative_rms_error(actual: Tensor, truth: Tensor) -> float:
    """rms_error / rms(truth); 0 if both are 0, inf if only the truth is."""
    error, size = rms_error(actual, truth), rms(truth)
    if size == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / size


def sqnr_db(actual: Tensor, truth: Tensor) -> float:
    """Signal to quantization noise, 20 log10(rms(truth) / rms(error)), in dB."""
    relative = relative_rms_error(actual, truth)
    return math.inf if relative == 0.0 else -20.0 * math.log10(relative)


@dataclass(frozen=True)
class Comparison:
    """One result against the truth and against PyTorch at the same precision."""

    name: str
    error_max: float
    error_rms: float
    limit_max: float
    limit_rms: float
    baseline_max: float
    baseline_rms: float
    fault: str | None = None  # a NaN, an infinity or a shape that should not be

    @property
    def ok(self) -> bool:
        return (
            self.fault is None
            and self.error_max <= self.limit_max
            and self.error_rms <= self.limit_rms
        )

    def __str__(self) -> str:
        verdict = "ok" if self.ok else f"FAILED{': ' + self.fault if self.fault else ''}"
        return (
            f"{self.name}: {verdict}; max error {self.error_max:.3e} (limit {self.limit_max:.3e}, "
            f"PyTorch {self.baseline_max:.3e}), rms {self.error_rms:.3e} "
            f"(limit {self.limit_rms:.3e}, PyTorch {self.baseline_rms:.3e})"
        )


def compare(
    actual: Tensor,
    truth: Tensor,
    baseline: Tensor | None = None,
    what: str = "out",
    name: str | None = None,
) -> Comparison:
    """Measure ``actual`` by the rule ``TOLERANCES[what]``.

    Args:
        actual: the result under test; its dtype sets the floor.
        truth: fp64, same shape.
        baseline: PyTorch at the same precision; None leaves only the floor.
        what: row of the table. name: for the message; default ``what``.

    Infinities (lse of a row without keys) must sit at the same places with the same sign; a NaN
    in ``actual`` is a fault. Errors are taken over the finite part.
    """
    rule = TOLERANCES[what]
    name = name or what
    fault = None
    if actual.shape != truth.shape:
        fault = f"shape {tuple(actual.shape)} instead of {tuple(truth.shape)}"
        return Comparison(name, math.inf, math.inf, 0.0, 0.0, 0.0, 0.0, fault)
    a, t = actual.detach().double(), truth.detach().double()
    b = t if baseline is None else baseline.detach().double()
    finite = t.isfinite()
    if a.isnan().any():
        fault = f"{int(a.isnan().sum())} NaN of {a.numel()}, first at {_first(a.isnan())}"
    elif not torch.equal(a[~finite], t[~finite]):
        fault = f"infinities differ, first at {_first((a != t) & ~finite)}"
    elif not a[finite].isfinite().all():
        fault = f"an infinity where the truth is finite, at {_first(~a.isfinite() & finite)}"
    a, t, b = a[finite], t[finite], b[finite]
    base_max, base_rms = max_error(b, t), rms_error(b, t)
    u = unit_roundoff(actual.dtype)
    size_max = t.abs().max().item() if t.numel() else 0.0
    return Comparison(
        name,
        max_error(a, t),
        rms_error(a, t),
        rule.factor * base_max + rule.ulps * u * size_max,
        rule.factor * base_rms + rule.ulps * u * rms(t),
        base_max,
        base_rms,
        fault,
    )


def assert_as_good(
    actual: Tensor,
    truth: Tensor,
    baseline: Tensor | None = None,
    what: str = "out",
    name: str | None = None,
) -> Comparison:
    """:func:`compare`, and an AssertionError with its numbers when the rule is broken."""
    result = compare(actual, truth, baseline, what, name)
    if not result.ok:
        raise AssertionError(str(result))
    return result


def outlier_normal(
    *shape: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """fp64 entries N(0, 1) + N(0, 100) * Bernoulli(0.001): the data of the paper's table 3."""
    kw = {"generator": generator, "device": device, "dtype": torch.float64}
    base = torch.randn(*shape, **kw)
    return base + torch.randn(*shape, **kw) * 10.0 * (torch.rand(*shape, **kw) < 0.001)


def _first(mask: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in mask.nonzero()[0])
