"""The unit that the training loop hands to the model: packed sequences of one micro-batch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

IGNORE_INDEX = -100


@dataclass
class Batch:
    """One micro-batch, packed into a single row of T = micro_batch * seq_len tokens.

    A *piece* is a stretch of one document; attention stays inside a piece and positions restart
    at 0 with each. `cu_seqlens` holds the N + 1 borders of the N pieces, from 0 to T.
    """

    tokens: torch.Tensor  # (T,) int64
    labels: torch.Tensor  # (T,) int64, the next token of the document; IGNORE_INDEX at its end
    position_ids: torch.Tensor  # (T,) int32, position within the piece
    cu_seqlens: torch.Tensor  # (N + 1,) int32
    max_seqlen: int  # longest piece, tokens
    num_tokens: int  # tokens of documents: T less the padding that ends an epoch
    sum_sq_seqlen: int  # sum of squared piece lengths, for attention FLOPs
    # Context parallelism: tensors of tokens are this rank's share, all else is of the whole row,
    # and cu_seqlens is also here, as numbers on the host.
    borders: tuple[int, ...] = ()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, so that `to(..., non_blocking=True)` overlaps."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function) -> Batch:
        moved = {
            f.name: function(value)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return dataclasses.replace(self, **moved)


def make_batch(samples: list[Sample]) -> Batch:
    """Join packed samples into one row; the borders of a sample are always borders of pieces."""
    lengths = np.concatenate([s.lengths for s in samples])
    borders = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=borders[1:])
    positions = np.arange(borders[-1], dtype=np.int64) - np.repeat(borders[:-1], lengths)
    return Batch(
        tokens=torch.from_numpy(np.concatenate([s.tokens for s in samples])),
        labels=torch.from_numpy(np.concatenate([s.labels for s in samples])),
        position_ids=torch.from_numpy(positions.astype(np.int32)),
        cu_seqlens=torch.from_numpy(borders.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        num_tokens=sum(s.num_tokens for s in samples),
        sum_sq_seqlen=int((lengths.astype(np.int64) ** 2).sum()),
    )


@dataclass
class Sample:
    """One packed sequence of exactly seq_len tokens."""

    tokens: np.ndarray  # (seq_len,) int64
    labels: np.ndarray  # (seq_len,) int64
    lengths: np.ndarray  # (pieces,) int64, sums to seq_len
    num_tokens: int  # without padding
