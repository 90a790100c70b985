"""FLOPs of a training step and the peaks they are divided by.

Notation: N weights of matrix products, L layers, H query heads, D head dim, l_i length of document
i, S packed length. A multiply-add counts as two FLOPs; element-wise work (norms, RoPE, softmax,
SwiGLU's product) is left out, as in every convention below.

Matrix products. A token passes each of the N weights once in the forward (2 N FLOPs) and twice in
the backward (gradient of input, gradient of weight): 6 N per token. N counts the layers' matrices
and the output head, also when the head shares the embedding's memory; the embedding itself is a
lookup and counts nothing.

Attention core. Forward: S = Q K^T and O = P V, 2 D FLOPs each for every visible (query, key) pair
and head, so 4 D H per pair. Backward: dV, dP, dQ, dK, four products of that size: twice the
forward. A causal document of length l sees l^2 / 2 pairs (the diagonal's l / 2 is dropped, as
Megatron-LM does):

    forward  2 D H l^2        forward + backward  6 D H l^2        per layer and document

* `mfu_causal` (primary; Megatron-LM's convention for packed sequences): 6 N tokens
  + 6 L H D sum(l_i^2). Only work that the documents at hand need.
* `mfu_palm` (PaLM, arXiv 2204.02311, appendix B; torchtitan): 6 N + 12 L H D S per token, i.e.
  full non-causal attention over the packed length, whatever the documents are. It flatters long
  context up to twofold, and is here for comparison only.
* `hfu`: what the hardware did. The flash backward recomputes Q K^T (one product more: 7 instead of
  6 D H l^2), full activation checkpointing repeats the layers' forward, and selective
  checkpointing repeats its matrix products but not the attention.

Sliding windows of w keys see fewer pairs: l^2 / 2 becomes w l - w^2 / 2 for l > w.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fa3_train.models.config import ModelConfig

FORMULAS = {
    "mfu_causal": "(6 N tokens + 6 L H D sum(document length^2)) / (step time x peak)",
    "mfu_palm": "(6 N + 12 L H D seq_len) tokens / (step time x peak)",
    "hfu": "mfu_causal + recomputation: Q K^T in the flash backward, and what "
    "model.activation_checkpointing runs again",
    "mfu_causal_mixed": "mfu_causal with each FLOP divided by the peak of the precision it ran in",
    "N": "weights of matrix products: layers and output head, no embedding lookup, no norms",
}


@dataclass(frozen=True)
class Peak:
    """Dense tensor-core peak of one GPU, FLOP/s. `fp8` is None where the GPU has no FP8."""

    gpu: str
    bf16: float
    fp8: float | None
    source: str


_H100 = "NVIDIA H100 datasheet (2024), {}: {} TFLOPS BF16, {} FP8 with sparsity; dense is half"
# A device name must match one pattern entirely: a MIG slice or an unknown board has no peak here.
_PEAKS: tuple[tuple[str, Peak], ...] = (
    (
        r"NVIDIA H100 80GB HBM3",
        Peak("H100 SXM", 989.5e12, 1979e12, _H100.format("SXM", "1,979", "3,958")),
    ),
    (
        r"NVIDIA H100 NVL",
        Peak("H100 NVL", 835.5e12, 1670.5e12, _H100.format("NVL", "1,671", "3,341")),
    ),
    (
        r"NVIDIA H100 PCIe",
        Peak("H100 PCIe", 756.5e12, 1513e12, _H100.format("PCIe (2022)", "1,513", "3,026")),
    ),
    (
        r"NVIDIA H200",
        Peak(
            "H200 SXM",
            989.5e12,
            1979e12,
            "NVIDIA H200 datasheet, SXM: 1,979 TFLOPS BF16, 3,958 FP8 with sparsity; dense is half",
        ),
    ),
    (
        r"NVIDIA H200 NVL",
        Peak(
            "H200 NVL",
            835.5e12,
            1670.5e12,
            "NVIDIA H200 datasheet, NVL: 1,671 TFLOPS BF16, 3,341 FP8 with sparsity; dense is half",
        ),
    ),
    (
        r"NVIDIA GH200 (480GB|144G HBM3e)",
        Peak(
            "GH200",
            989.5e12,
            1979e12,
            "NVIDIA GH200 datasheet: 1,979 TFLOPS BF16, 3,958 FP8 with sparsity; dense is half",
        ),
    ),
    (
        r"NVIDIA A100-(SXM4|PCIE)-(40|80)GB|NVIDIA A100 80GB PCIe",
        Peak("A100", 312e12, None, "NVIDIA A100 datasheet: 312 TFLOPS BF16 dense"),
    ),
)


def peak_of(device_name: str) -> Peak | None:
    """Peak of the GPU that `torch.cuda.get_device_name` names; None when it is not in the table."""
    for pattern, peak in _PEAKS:
        if re.fullmatch(pattern, device_name):
            return peak
    return None


def visible_square(sum_sq: float, tokens: float, window: int | None) -> float:
    """2 x visible (query, key) pairs of causal documents with sum of squared lengths `sum_sq`.

    With a window the pairs depend on every length, not on the sum of squares alone: the
    token-weighted mean length sum_sq / tokens stands for all, exact when documents are equal.
    """
    if window is None or tokens == 0:
        return sum_sq
    length = sum_sq / tokens
    if length <= window:
        return sum_sq
    return tokens / length * (2 * window * length - window**2)


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of some packed tokens, forward + backward, by convention and by precision."""

    causal: float
    palm: float
    hardware: float
    fp8: float  # the part of `causal` that runs in FP8

    def ideal_seconds(self, peak: Peak, gpus: int) -> float | None:
        """Time at the peaks of the precisions used; None when the GPU has no FP8 peak."""
        if self.fp8 and peak.fp8 is None:
            return None
        return ((self.causal - self.fp8) / peak.bf16 + self.fp8 / (peak.fp8 or 1.0)) / gpus


def step_flops(model: ModelConfig, tokens: float, sum_sq: float, seq_len: int) -> StepFlops:
    """Forward + backward FLOPs.

    Args:
        tokens: packed tokens.
        sum_sq: sum of squared document lengths, tokens^2.
        seq_len: packed length S of the PaLM convention.
    """
    core = float(model.num_layers * model.num_heads * model.head_dim)
    pairs = visible_square(sum_sq, tokens, model.window_size)
    matmul = 6.0 * model.matmul_parameters() * tokens
    attention = 6.0 * core * pairs
    head = model.embedding_parameters()
    layers = model.matmul_parameters() - head
    fp8 = 0.0
    if model.linear == "te_fp8":
        fp8 += 6.0 * layers * tokens
    if model.attention_precision == "fp8":
        fp8 += attention / 3.0  # the forward; the backward runs in bf16
    hardware = matmul + attention + core * pairs
    if model.activation_checkpointing != "none":
        hardware += 2.0 * layers * tokens
    if model.activation_checkpointing == "full":
        hardware += 2.0 * core * pairs
    return StepFlops(
        causal=matmul + attention,
        palm=matmul + 12.0 * core * seq_len * tokens,
        hardware=hardware,
        fp8=fp8,
    )
