"""Megatron's indexed data: `<prefix>.bin` with token ids, `<prefix>.idx` with their borders.

The index, little-endian: magic "MMIDIDX\\0\\0"; version 1 (u64); dtype code (u8); number of
sequences S (u64); number of document borders D (u64); then S sequence lengths in tokens (i32), S
byte offsets into the .bin (i64), D document borders counted in sequences (i64).  A document is the
run of sequences between two borders.  The layout is public in Megatron-LM,
megatron/core/datasets/indexed_dataset.py.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6, 7: floats, not tokens


class MegatronStore:
    """The documents of a .bin/.idx pair, memory-mapped; `prefix` with or without a suffix.

    Raises ValueError for a file that is missing, of another format, cut short or inconsistent.
    """

    def __init__(self, prefix: str) -> None:
        base = Path(prefix).expanduser()
        if base.suffix in (".bin", ".idx"):
            base = base.with_suffix("")
        self.path = base
        self._index = base.with_name(base.name + ".idx")
        data = base.with_name(base.name + ".bin")
        for file in (self._index, data):
            if not file.is_file():
                raise ValueError(f"data.path={prefix!r}: {file} does not exist")
        raw = self._index.read_bytes()
        lengths, pointers, borders, dtype = self._parse(raw)
        self._offsets = self._document_offsets(lengths, pointers, borders, dtype.itemsize)
        self._tokens = np.memmap(data, dtype=dtype, mode="r") if data.stat().st_size else (
            np.empty(0, dtype)
        )
        if len(self._tokens) < self._offsets[-1]:
            raise ValueError(
                f"{data} holds {len(self._tokens)} tokens, but its index counts "
                f"{self._offsets[-1]}: one of the two files is cut short"
            )
        self.fingerprint = hashlib.blake2b(raw, digest_size=12).hexdigest()

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 (documents,)."""
        return np.diff(self._offsets)

    def document(self, index: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of one document."""
        base = int(self._offsets[index])
        return self._tokens[base + start : base + stop]

    def _parse(self, raw: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.dtype]:
        if len(raw) < _HEADER.size or raw[:9] != _MAGIC:
            raise ValueError(
                f"{self._index} is no Megatron index: it must begin with {_MAGIC!r}, "
                f"got {raw[:9]!r}"
            )
        _, version, code, sequences, documents = _HEADER.unpack_from(raw)
        if version != 1:
            raise ValueError(f"{self._index}: index version must be 1, got {version}")
        if code not in _DTYPES:
            raise ValueError(
                f"{self._index}: token dtype code must be one of {sorted(_DTYPES)} (integers), "
                f"got {code}"
            )
        wanted = _HEADER.size + 12 * sequences + 8 * documents
        if len(raw) < wanted:
            raise ValueError(
                f"{self._index} is cut short: {sequences} sequences and {documents} document "
                f"borders take {wanted} bytes, the file has {len(raw)}"
            )
        if documents < 2:
            raise ValueError(
                f"{self._index}: needs at least 2 document borders (one document), got {documents}"
            )
        at = _HEADER.size
        lengths = np.frombuffer(raw, "<i4", sequences, at)
        pointers = np.frombuffer(raw, "<i8", sequences, at + 4 * sequences)
        borders = np.frombuffer(raw, "<i8", documents, at + 12 * sequences)
        return lengths, pointers, borders, np.dtype(_DTYPES[code])

    def _document_offsets(
        self, lengths: np.ndarray, pointers: np.ndarray, borders: np.ndarray, itemsize: int
    ) -> np.ndarray:
        """Borders of the documents in tokens, int64 (documents + 1,)."""
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        if not np.array_equal(pointers, ends[:-1] * itemsize):
            raise ValueError(
                f"{self._index}: the sequences do not lie one after the other in the .bin "
                "(their byte offsets differ from the sum of the lengths before them)"
            )
        if borders[0] != 0 or borders[-1] != len(lengths) or (np.diff(borders) < 0).any():
            raise ValueError(
                f"{self._index}: document borders must rise from 0 to the number of sequences "
                f"{len(lengths)}, got {borders[0]} ... {borders[-1]}"
            )
        return ends[borders]
