"""DeepSpeed Ulysses: sequence parallelism by exchanging heads for tokens, around our core.

    attention = UlyssesAttention(process_group)
    out = attention(q, k, v, causal=True)          # (B, S / P, H, D) on each of P ranks

DeepSpeed's ``DistributedAttention`` turns (B, S/P, H, D) into (B, S, H/P, D) by all-to-all, runs
the local attention, and turns back. It divides heads, so both head counts must divide by P; where
they do not, use :mod:`fa3_train.integrations.context_parallel`.

For Hugging Face models DeepSpeed has ``UlyssesSPAttentionHF``, which wraps what is registered:
call :func:`fa3_train.integrations.hf.register` first, then hand it
``core_attn_implementation="fa3_train"``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fa3_train.checks import require
from fa3_train.integrations.policy import Policy
from fa3_train.ops import attention

__all__ = ["UlyssesAttention", "supports"]

_policy = Policy("deepspeed")


def supports(*, heads_q: int, heads_k: int, ranks: int, sink: Tensor | None = None) -> str | None:
    """Reason why these heads cannot be exchanged over ``ranks`` processes, or None."""
    for name, heads in (("q", heads_q), ("k", heads_k)):
        if heads % ranks:
            return f"{name}: {heads} heads do not divide over {ranks} ranks"
    if sink is not None:
        return "sink: per-head logits are not exchanged; pass this rank's share to the core instead"
    return None


class _Core(nn.Module):
    """The local attention that DeepSpeed calls with whole sequences and its share of heads."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if "cu_seqlens_q" in options:
            lengths = [options.pop(n) for n in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q",
                                                "max_seqlen_k")]  # fmt: skip
            out = attention.flash_attn_varlen_func(
                q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), *lengths, **options
            )
            return out.view(*q.shape[:2], *out.shape[1:])
        return attention.flash_attn_func(q, k, v, **options)


class UlyssesAttention(nn.Module):
    """Ulysses sequence parallelism around :func:`fa3_train.flash_attn_func`.

    Args:
        process_group: the sequence-parallel group.
    """

    def __init__(self, process_group: Any) -> None:
        super().__init__()
        from deepspeed.sequence.layer import DistributedAttention

        self.ranks = process_group.size()
        # (B, S, H, D): heads are scattered, tokens gathered.
        self.inner = DistributedAttention(_Core(), process_group, scatter_idx=2, gather_idx=1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """q (B, S/P, H, D), k and v (B, S/P, Hkv, D) to (B, S/P, H, Dv).

        Args:
            options: keywords of :func:`fa3_train.flash_attn_func`, or with ``cu_seqlens_q``,
                ``cu_seqlens_k``, ``max_seqlen_q``, ``max_seqlen_k`` those of the varlen function
                over the B S tokens of the whole sequences joined end to end.

        Raises:
            UnsupportedRequest: head counts that do not divide.
        """
        require(q.dim() == 4, "q", "must have 4 dimensions (B, S, H, D)", tuple(q.shape))
        reason = supports(
            heads_q=q.shape[2], heads_k=k.shape[2], ranks=self.ranks, sink=options.get("sink")
        )
        if reason is not None:
            _policy.refuse(reason)
        return self.inner(q, k, v, 0, None, **options)
