"""What is measured: shapes and their FLOPs, counted as FlashAttention counts them.

Forward: 2 B H Sq k (D + E), where k is the mean number of keys a query sees counted on the
continuous triangle (S / 2 for a causal square); E is the head dim of v. Backward: 2.5 times that
(five products instead of two), forward and backward 3.5 times.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

PASS_FACTOR = {"fwd": 1.0, "bwd": 2.5, "fwdbwd": 3.5}


@dataclass(frozen=True)
class Cell:
    """One shape. ``lengths`` makes it a packed batch (batch and seqlen are then not used)."""

    group: str  # rows of one group share a geometric mean
    name: str
    batch: int
    seqlen: int
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int
    causal: bool
    lengths: tuple[int, ...] = ()
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sink: bool = False
    deterministic: bool = False
    options: tuple[str, ...] = field(default=())  # ablation switches, fa3_train._lib.OPTIONS

    @property
    def plain(self) -> bool:
        """Nothing that only some peers have."""
        return self.window == (-1, -1) and not (self.softcap or self.sink or self.options)

    def flops(self, which: str) -> float:
        """Floating point operations of the pass ``fwd``, ``bwd`` or ``fwdbwd``."""
        lengths = self.lengths or (self.seqlen,) * self.batch
        pairs = sum(self._pairs(s) for s in lengths)
        return PASS_FACTOR[which] * 2.0 * self.heads * pairs * (self.head_dim + self.head_dim_v)

    def _pairs(self, s: int) -> float:
        left, right = self.window
        if self.causal:
            right = 0
        if left < 0 and right < 0:
            return float(s) * s
        if left < 0 and right == 0:
            return s * s / 2.0
        left = s if left < 0 else left
        right = s if right < 0 else right
        # keys i - left ... i + right, cut off at both ends
        return float(sum(min(i + right, s - 1) - max(i - left, 0) + 1 for i in range(s)))


def _dense(group, name, batch, seqlen, heads, kv_heads, d, causal, d_v=None, **more) -> Cell:
    return Cell(group, name, batch, seqlen, heads, kv_heads, d, d_v or d, causal, **more)


def paper() -> list[Cell]:
    """The paper's grid: hidden size 2048, 16k tokens, S = 512 to 16k (arXiv 2407.08608, fig. 5)."""
    cells = []
    for d in (64, 128, 256):
        for causal in (False, True):
            mask = "causal" if causal else "full"
            for seqlen in (512, 1024, 2048, 4096, 8192, 16384):
                heads, batch = 2048 // d, 16384 // seqlen
                name = f"d{d} {mask} S{seqlen}"
                cells.append(_dense(f"d{d}", name, batch, seqlen, heads, heads, d, causal))
    return cells


def document_lengths(total: int, longest: int, seed: int = 0) -> tuple[int, ...]:
    """A packed row as pretraining makes it: log-normal lengths, median 600 tokens, cut to fit.

    Web documents are short in number and long in tokens: with sigma 1.3, before the cut, half of
    the tokens lie in documents of more than 600 exp(1.3^2) = 3250.
    """
    rng = random.Random(seed)
    lengths: list[int] = []
    left = total
    while left:
        n = min(left, longest, max(16, int(math.exp(rng.gauss(math.log(600), 1.3)))))
        lengths.append(n)
        left -= n
    return tuple(lengths)


def training() -> list[Cell]:
    """Shapes of real runs: Llama-3-8B, one tensor-parallel rank of 405B, packed rows, 192/128."""
    cells = []
    for seqlen in (8192, 16384, 32768, 131072):
        cells.append(_dense("llama3-8b", f"8b 32/8 S{seqlen}", 1, seqlen, 32, 8, 128, True))
    for seqlen in (8192, 32768, 131072):
        cells.append(_dense("405b-tp8", f"405b-tp8 16/1 S{seqlen}", 1, seqlen, 16, 1, 128, True))
    for total in (8192, 32768):
        mix = document_lengths(total, 8192)
        name = f"8b 32/8 packed T{total} ({len(mix)} docs)"
        cells.append(_dense("packed", name, 1, total, 32, 8, 128, True, lengths=mix))
    even = (8192,) * 4
    cells.append(
        _dense("packed", "8b 32/8 packed 4x8192", 1, 32768, 32, 8, 128, True, lengths=even)
    )
    cells.append(_dense("192/128", "mla 16/16 192/128 S8192", 1, 8192, 16, 16, 192, True, 128))
    return cells


def ablation() -> list[Cell]:
    """The paper's table 2 shape with one technique switched off at a time."""
    switches = (
        (), ("no_warp_specialization",), ("no_overlap",), ("no_pingpong",), ("no_reg_realloc",),
        ("not_persistent",),
    )  # fmt: skip
    return [
        _dense("ablation", ", ".join(s) or "all", 4, 8448, 16, 16, 128, False, options=s)
        for s in switches
    ]


def options() -> list[Cell]:
    """What each option costs at one shape, Llama-3-8B at 8k, d128 causal; other head dims."""
    base = ("options", 2, 8192, 32, 8, 128, True)

    def cell(name: str, **more) -> Cell:
        group, *sizes = base
        return _dense(group, name, *sizes, **more)

    return [
        cell("plain"),
        cell("softcap 30", softcap=30.0),
        cell("sink", sink=True),
        cell("window 1024", window=(1024, 0)),
        cell("deterministic", deterministic=True),
        _dense("head dims", "d96", 2, 8192, 32, 8, 96, True),
        _dense("head dims", "d192", 2, 8192, 16, 4, 192, True),
        _dense("head dims", "d256 deterministic", 2, 8192, 8, 8, 256, True, deterministic=True),
    ]


SUITES = {"paper": paper, "training": training, "ablation": ablation, "options": options}
