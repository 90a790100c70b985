"""The backward's plan without a GPU: workspace bytes as docs/backward.md gives them, and refusals.

The query looks at no pointer and needs no device (it then plans for 132 multiprocessors), so the
compiled library answers on any machine.
"""

from __future__ import annotations

import pytest

from fa3_train import _lib

pytestmark = pytest.mark.build

SMS = 132
# (largest qk, v), query rows of a block, keys of a tile, one pass over the scores
TILES = [
    ((64, 64), 128, 128, True),
    ((96, 96), 64, 128, True),
    ((128, 128), 64, 128, True),
    ((192, 128), 80, 64, False),
    ((192, 192), 64, 64, False),
    ((256, 256), 48, 64, False),
]


@pytest.fixture(scope="module")
def library() -> _lib.Library:
    if not _lib.available():
        pytest.skip("no compiled library")
    return _lib.load()


def params(**changes) -> _lib.AttnBwdParams:
    p = _lib.AttnBwdParams()
    values = {
        "batch": 2, "seqlen_q": 1000, "seqlen_k": 1500, "heads_q": 8, "heads_k": 8,
        "head_dim_qk": 128, "head_dim_v": 128, "window_left": -1, "window_right": -1,
        "softmax_scale": 0.1, "dtype": _lib.BF16, **changes,
    }  # fmt: skip
    for name, value in values.items():
        setattr(p, name, value)
    return p


def padded(size: int) -> int:
    return -(-size // 256) * 256


def expected(p: _lib.AttnBwdParams) -> int:
    """docs/backward.md, "Workspace", with the tile table beside it."""
    dims = p.head_dim_qk, p.head_dim_v
    (qk, _), block_m, block_n, one_pass = next(
        t for t in TILES if dims[0] <= t[0][0] and dims[1] <= t[0][1]
    )
    packed = bool(p.cu_seqlens_q)
    blocks = p.total_q // block_m + p.batch if packed else p.batch * -(-p.seqlen_q // block_m)
    tiles = p.total_k // block_n + p.batch if packed else p.batch * -(-p.seqlen_k // block_n)
    rows = p.heads_q * blocks
    group = p.heads_q // p.heads_k
    divisors = [d for d in range(1, group + 1) if group % d == 0]
    shares = next((d for d in divisors if tiles * p.heads_k * d >= 3 * SMS), group)
    shares = {0: shares, 1: 1, 2: group}[p.options]
    key_rows = (p.total_k if packed else p.batch * p.seqlen_k) * p.heads_k
    total = padded(rows * block_m * qk * 4) if one_pass else 0
    total += 2 * padded(rows * block_m * 4)
    total += padded(rows * 4) if p.sink else 0
    if shares > 1:
        total += padded(shares * key_rows * dims[0] * 4) + padded(shares * key_rows * dims[1] * 4)
    total += padded(rows * 8) if one_pass else 0
    total += padded(8)
    return total


CASES = [
    {},
    {"head_dim_qk": 64, "head_dim_v": 64, "deterministic": 1},
    {"head_dim_qk": 40, "head_dim_v": 40},
    {"head_dim_qk": 80, "head_dim_v": 80, "heads_k": 2},
    {"head_dim_qk": 192, "head_dim_v": 128, "deterministic": 1},
    {"head_dim_qk": 160, "head_dim_v": 160},
    {"head_dim_qk": 256, "head_dim_v": 256, "heads_k": 1, "sink": 1},
    {"heads_q": 16, "heads_k": 1, "seqlen_q": 8192, "seqlen_k": 8192, "batch": 1},
    {"heads_q": 32, "heads_k": 8, "options": 2},
    {"heads_q": 12, "heads_k": 1, "options": 1},
    {"heads_q": 12, "heads_k": 2, "cu_seqlens_q": 1, "cu_seqlens_k": 1, "total_q": 1777,
     "total_k": 2001, "batch": 7, "sink": 1},
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_workspace_is_what_the_essay_says(library: _lib.Library, case: dict) -> None:
    p = params(**case)
    assert library.workspace("fa3_attn_bwd", p) == expected(p)


@pytest.mark.parametrize(
    "case,words",
    [
        ({"head_dim_qk": 60}, ["multiples of 8", "60"]),
        ({"head_dim_v": 264}, ["[8, 256]", "264"]),
        ({"heads_k": 3}, ["heads_q", "multiple of heads_k", "3"]),
        ({"dtype": _lib.E4M3}, ["dtype", "2"]),
        ({"softmax_scale": float("nan")}, ["softmax_scale", "nan"]),
        ({"softmax_scale": 0.0}, ["softmax_scale", "positive", "0"]),
        ({"softcap": -1.0}, ["softcap", "-1"]),
        ({"window_left": -2}, ["window", "-2"]),
        ({"options": 3}, ["options", "3"]),
        ({"deterministic": 2}, ["deterministic", "2"]),
        ({"cu_seqlens_q": 1}, ["cu_seqlens_q and cu_seqlens_k"]),
    ],
    ids=str,
)
def test_refusals_name_argument_rule_and_value(library, case: dict, words: list[str]) -> None:
    with pytest.raises(_lib.LibraryError) as refused:
        library.workspace("fa3_attn_bwd", params(**case))
    for word in words:
        assert word in str(refused.value)
