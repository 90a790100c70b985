"""Attention modules: the parameter-free core, and self-attention with projections and RoPE.

Shapes, with B sequences of S tokens (dense) or T packed tokens of several documents (varlen):
x (B, S, hidden) or (T, hidden); q (..., H, D); k and v (..., Hkv, D) with H a multiple of Hkv.
Which of the two it is follows from `cu_seqlens`: given, x is packed.

q, k and v are strided views of the one QKV GEMM's output; nothing is transposed or made
contiguous on the way into the attention op. On the Hopper kernels the product itself goes into one
op that rotates q and k in place and returns one gradient for all three (ops/packed_qkv.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fa3_train.modules.linear import build_linear, build_norm_linear
from fa3_train.modules.norm import RMSNorm
from fa3_train.modules.rope import Rope, document_positions, rotate
from fa3_train.ops.attention import (
    flash_attn_func,
    flash_attn_varlen_func,
    resolve_backend,
)
from fa3_train.ops.packed_qkv import packed_attention
from fa3_train.reference_fp8 import HEAD_DIMS


class FlashAttention(nn.Module):
    """softmax(scale * Q K^T) V with the options of `fa3_train.flash_attn_func`, without parameters.

    precision "bf16" computes in the dtype of q, k and v. "fp8" takes over RoPE as well: it rotates,
    multiplies q and k by a random-sign Hadamard matrix (`signs`, drawn from `seed`; it
    leaves Q K^T unchanged and spreads outliers), quantizes to e4m3 and keeps a 16-bit backward.

    `window_size` is the number of keys that a query sees, itself included; None is all of them.
    """

    signs: torch.Tensor | None

    def __init__(
        self,
        head_dim: int,
        *,
        causal: bool = True,
        softmax_scale: float | None = None,
        window_size: int | None = None,
        softcap: float = 0.0,
        deterministic: bool = False,
        precision: str = "bf16",
        backend: str = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if precision not in ("bf16", "fp8"):
            raise ValueError(f"precision must be bf16 or fp8, got {precision!r}")
        if precision == "fp8" and softcap:
            raise ValueError(f"softcap is not available with precision=fp8, got {softcap}")
        if window_size is not None and window_size < 1:
            raise ValueError(f"window_size must be >= 1 or None (no window), got {window_size}")
        self.head_dim = head_dim
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.softcap = softcap
        self.deterministic = deterministic
        self.precision = precision
        self.backend = backend
        right = 0 if causal else -1
        if window_size is not None and not causal:
            right = window_size - 1
        self.window = (-1 if window_size is None else window_size - 1, right)
        self.seed = seed
        # In the checkpoint, for a resumed run must rotate by the same matrix to be bitwise equal.
        self.register_buffer("signs", None)
        if precision == "fp8":
            self.signs = torch.empty(head_dim, dtype=torch.float32)
            if not self.signs.is_meta:
                self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the Hadamard signs again from `seed`."""
        if self.signs is not None:
            generator = torch.Generator().manual_seed(self.seed)
            draw = torch.randint(0, 2, (self.head_dim,), generator=generator, device="cpu")
            self.signs.copy_((2 * draw - 1).to(self.signs.dtype))

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        *,
        kv_heads: int | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_k: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        rope: tuple[torch.Tensor, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of q (..., H, D) over k, v (..., Hkv, D) -> (..., H, D).

        Packed inputs need cu_seqlens_q (N + 1,) int32 and max_seqlen_q; those of k default to
        them. `rope` = (cos, sin) tables is for precision="fp8", where q and k come in unrotated,
        and for self-attention on the product of a projection: q alone, (..., H + 2 Hkv, D) with
        kv_heads = Hkv, which is overwritten (see `serves_product`).
        """
        if k is None or v is None:
            if kv_heads is None:
                raise ValueError("kv_heads must be given where k and v are not, got None")
            cos, sin = rope if rope is not None else (None, None)
            return packed_attention(
                q, q.shape[-2] - 2 * kv_heads, kv_heads, cos, sin, position_ids=position_ids,
                cu_seqlens=cu_seqlens_q, max_seqlen=max_seqlen_q,
                softmax_scale=self.softmax_scale, causal=self.causal, window_size=self.window,
                softcap=self.softcap, deterministic=self.deterministic,
                fp8=self.precision == "fp8", signs=self.signs,
            )
        lengths: tuple[Any, ...] = ()
        if cu_seqlens_q is not None:
            if max_seqlen_q is None:
                raise ValueError("max_seqlen_q must be given with cu_seqlens_q, got None")
            same = cu_seqlens_k is None
            lengths = (
                cu_seqlens_q,
                cu_seqlens_q if same else cu_seqlens_k,
                max_seqlen_q,
                max_seqlen_q if same or max_seqlen_k is None else max_seqlen_k,
            )
        if self.precision == "fp8":
            from fa3_train.ops.attention_fp8 import flash_attn_fp8_func, flash_attn_fp8_varlen_func

            cos, sin = rope if rope is not None else (None, None)
            fp8_call = flash_attn_fp8_varlen_func if lengths else flash_attn_fp8_func
            return fp8_call(
                q, k, v, *lengths, softmax_scale=self.softmax_scale, causal=self.causal,
                cos=cos, sin=sin, signs=self.signs, position_ids=position_ids,
                window_size=self.window, backend=self.backend,
            )
        if rope is not None:
            raise ValueError("rope must be None with precision=bf16: rotate q and k before")
        call = flash_attn_varlen_func if lengths else flash_attn_func
        return call(
            q, k, v, *lengths, softmax_scale=self.softmax_scale, causal=self.causal,
            window_size=self.window, softcap=self.softcap, deterministic=self.deterministic,
            backend=self.backend,
        )

    def serves_product(self, qkv: torch.Tensor, kv_heads: int) -> bool:
        """Whether `forward` takes the QKV projection's whole product (..., H + 2 Hkv, D): eager, in
        16 bits, on the Hopper kernels, the module's own method."""
        if not qkv.is_cuda or torch.compiler.is_compiling():
            return False
        if "forward" in vars(self):  # wrapped (context parallelism), for calls with q, k and v
            return False
        if qkv.dtype not in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cuda"):
            return False
        if self.precision == "fp8" and self.head_dim not in HEAD_DIMS:
            return False
        used = {
            "return_lse": self.precision == "fp8",  # as flash_attn_fp8_func asks: sdpa has no FP8
            "softcap": self.softcap != 0.0,
            "window_size": self.window[0] >= 0 or self.window[1] > 0,
            "deterministic": self.deterministic,
            "varlen": qkv.dim() == 3,
            "grouped": qkv.shape[-2] != 3 * kv_heads,
            "grad": torch.is_grad_enabled() and qkv.requires_grad,
        }
        options = tuple(name for name, on in used.items() if on)
        chosen = resolve_backend(
            self.backend, qkv.device, qkv.dtype, self.head_dim, options=options
        )
        return chosen == "hopper"

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, causal={self.causal}, window={self.window}, "
            f"softcap={self.softcap}, precision={self.precision}, backend={self.backend}"
        )


class SelfAttention(nn.Module):
    """RMSNorm -> QKV projection -> (QK-norm) -> RoPE -> attention -> output projection.

    x (B, S, hidden) or packed (T, hidden) -> the same shape, without the residual. The input norm
    belongs to this module because TransformerEngine fuses it with the projection; its output rows
    are [q heads; k heads; v heads].
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        rope: Rope,
        norm_eps: float = 1e-5,
        qk_norm: bool = False,
        linear: str = "torch",
        causal: bool = True,
        window_size: int | None = None,
        softcap: float = 0.0,
        deterministic: bool = False,
        precision: str = "bf16",
        backend: str = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}"
            )
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.rope = rope
        self.rope_backend = backend  # which code rotates q and k where the core does not
        rows = (num_heads + 2 * num_kv_heads) * head_dim
        self.qkv = build_norm_linear(linear, hidden_size, rows, norm_eps)
        self.q_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.core = FlashAttention(
            head_dim, causal=causal, window_size=window_size, softcap=softcap,
            deterministic=deterministic, precision=precision, backend=backend, seed=seed,
        )
        self.out_proj = build_linear(linear, num_heads * head_dim, hidden_size)

    def forward(
        self,
        x: torch.Tensor,
        *,
        position_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        normed: bool = False,
    ) -> torch.Tensor:
        """`position_ids` int (T,) or (B, S); default: 0, 1, ... in each sequence or document.

        `normed`: x has been through the input norm (linear="torch" only).
        """
        product = self.qkv(x, normed=True) if normed else self.qkv(x)
        out = self._attend(product, position_ids, cu_seqlens, max_seqlen)
        return self.out_proj(out.flatten(-2))

    def _attend(
        self,
        product: torch.Tensor,
        position_ids: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        max_seqlen: int | None,
    ) -> torch.Tensor:
        """The QKV product (..., heads * D) -> (..., H, D)."""
        heads = product.unflatten(-1, (-1, self.head_dim))
        tables = self.rope.tables(product.device)
        packing: dict[str, Any] = {"cu_seqlens_q": cu_seqlens, "max_seqlen_q": max_seqlen}
        if self.q_norm is None and self.core.serves_product(heads, self.num_kv_heads):
            return self.core(
                heads, kv_heads=self.num_kv_heads, **packing, rope=tables,
                position_ids=position_ids,
            )
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=-2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if cu_seqlens is not None and position_ids is None:
            position_ids = document_positions(cu_seqlens, product.shape[0])
        if self.core.precision == "fp8":  # rotates as it quantizes
            return self.core(q, k, v, **packing, rope=tables, position_ids=position_ids)
        q, k = rotate(q, k, *tables, position_ids=position_ids, backend=self.rope_backend)
        return self.core(q, k, v, **packing)
