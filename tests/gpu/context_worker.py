"""For torchrun: attention over several GPUs beside one GPU's, judged by the project's rule.

    torchrun --nproc-per-node=2 context_worker.py

Prints one line per comparison on rank 0; fails on any rank that finds one broken.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from fa3_train import numerics, reference
from fa3_train.integrations import context_parallel as cp
from fa3_train.integrations import ulysses
from fa3_train.ops.attention import flash_attn_varlen_func

TOKENS, HEADS, KV_HEADS, DIM = 4096, 8, 4, 128
DOCUMENTS = {
    "one": (0, 4096),
    "uneven": (0, 1, 130, 130, 1023, 1024, 3500, 4096),
    "in every chunk": (0, 700, 1500, 2048, 2900, 3300, 4096),
}
NAMES = ("out", "dq", "dk", "dv")


def inputs() -> list[torch.Tensor]:
    """q, k, v, dout of the whole row in bf16, the same on every rank."""
    g = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [numerics.outlier_normal(*s, generator=g).to("cuda", torch.bfloat16) for s in shapes]


def gradients(function, leaves, dout) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def whole(dtype: torch.dtype, cu: torch.Tensor) -> list[torch.Tensor]:
    """All of it on this GPU by the plain formula in `dtype`."""
    *leaves, dout = (x.to(dtype) for x in inputs())

    def formula(q, k, v):
        out, _ = reference.attention(
            q, k, v, window_size=(-1, 0), cu_seqlens_q=cu, cu_seqlens_k=cu, dtype=dtype
        )
        return out

    return gradients(formula, leaves, dout)


def run_of(x: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    return x.chunk(ranks)[rank]


def main() -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    failed = False
    for name, documents in DOCUMENTS.items():
        cu = torch.tensor(documents, dtype=torch.int32, device="cuda")
        longest = max(b - a for a, b in zip(documents, documents[1:], strict=False))
        truth, plain = whole(torch.float64, cu), whole(torch.bfloat16, cu)
        *leaves, dout = inputs()

        def ring(q, k, v, documents=documents):
            return cp.ring_attention(q, k, v, cu_seqlens=documents, backend="hopper")

        def gather(q, k, v, documents=documents):
            return cp.gather_attention(q, k, v, documents, backend="hopper")

        def exchange(q, k, v, cu=cu, longest=longest):
            q, k, v = ulysses.to_heads(q, k, v)
            out = flash_attn_varlen_func(
                q, k, v, cu, cu, longest, longest, causal=True, backend="hopper"
            )
            return ulysses.to_tokens(out)

        cases = [("ring", ring, cp.zigzag_shard), ("gather", gather, cp.zigzag_shard)]
        if KV_HEADS % ranks == 0:
            cases.append(("ulysses", exchange, run_of))
        for method, function, shard in cases:
            extra = (0,) if shard is cp.zigzag_shard else ()

            def mine(x, shard=shard, extra=extra):
                return shard(x, rank, ranks, *extra)

            got = gradients(function, [mine(x) for x in leaves], mine(dout))
            for what, a, t, p in zip(NAMES, got, truth, plain, strict=True):
                rule = "out" if what == "out" else "grad"
                label = f"{method}, documents {name}, {what}"
                result = numerics.compare(a, mine(t), mine(p), rule, label)
                failed |= not result.ok
                if rank == 0 or not result.ok:
                    print(f"rank {rank}: {result}", flush=True)
    dist.destroy_process_group()
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
