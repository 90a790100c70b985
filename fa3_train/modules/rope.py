"""RoPE as the layers use it: tables shared by all layers, and the choice of the rotating code."""

from __future__ import annotations

from typing import Any

import torch

from fa3_train.ops import preprocess
from fa3_train.rotary import apply_rope, rope_tables


class Rope:
    """cos and sin tables, FP32 (max_seq_len, head_dim // 2), made once per device.

    Not a module and not a buffer on purpose: mixed-precision wrappers (FSDP's cast of forward
    inputs, `model.bfloat16()`, DeepSpeed) would round the angles to 8 bits of mantissa, which
    turns position 4097 into 4096.
    """

    def __init__(
        self,
        head_dim: int,
        max_seq_len: int,
        *,
        theta: float = 10_000.0,
        scaling: dict[str, Any] | None = None,
    ) -> None:
        self.head_dim = head_dim
        self.max_seq_len = max_seq_len
        self.theta = theta
        self.scaling = scaling
        self._tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The tables on `device`; made on the first call."""
        if device not in self._tables:
            # Not inside an inference-mode or fake-tensor cache: these outlive the first forward.
            with torch.inference_mode(False):
                self._tables[device] = rope_tables(
                    self.head_dim, self.max_seq_len, theta=self.theta, scaling=self.scaling,
                    device=device,
                )
        return self._tables[device]


def document_positions(cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """Position of each of `total` packed tokens in its document, int32 (total,).

    cu_seqlens (N + 1,) int32 may have empty documents; tokens past its end continue counting.
    """
    tokens = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, tokens, right=True) - 1
    return tokens - cu_seqlens[document]


def rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    position_ids: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (..., T, H, D) and k (..., T, Hkv, D) turned by their positions' angles.

    `backend` is the attention's: with "hopper" and "auto" on a GPU one launch of the library turns
    both, straight from the strided views of the QKV product; "sdpa" and "reference" stay PyTorch.
    """
    if q.is_cuda and backend in ("auto", "hopper"):
        return preprocess.rope(q, k, cos, sin, position_ids=position_ids, backend=backend)
    return (
        apply_rope(q, cos, sin, position_ids=position_ids),
        apply_rope(k, cos, sin, position_ids=position_ids),
    )
