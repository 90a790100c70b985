"""Documents to fixed-length sequences, as a pure function of (seed, sample number).

An epoch is the documents in shuffled order, joined and cut every `seq_len` tokens; the resulting
samples are visited in a second shuffled order, so that the pieces of a long document do not
arrive in a row.  Nothing is thrown away: the last sample of an epoch is filled up with padding
that forms a piece of its own and has no labels.  Every token occurs once per epoch, and every
token except the first of each document is once a label.

Because sample g of the endless stream depends on (seed, g) alone, the position in the data is one
integer.  Cost: one permutation and one prefix sum over the documents per epoch (8 bytes each per
document); a sample then touches only its own tokens of the memory map.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from fa3_train.train.data.batch import IGNORE_INDEX, Sample


class DocumentStore(Protocol):
    """Token ids of many documents; `fingerprint` changes whenever any of them does."""

    fingerprint: str

    @property
    def lengths(self) -> np.ndarray: ...  # (documents,) int64, tokens of each

    def document(self, index: int, start: int, stop: int) -> np.ndarray: ...


class SampleSource(Protocol):
    """What a DataLoader reads: an endless, numbered stream of samples."""

    seq_len: int
    seed: int
    fingerprint: str

    @property
    def samples_per_epoch(self) -> int: ...

    def sample(self, index: int) -> Sample: ...


class PackedDataset:
    """The endless stream of packed samples over some documents of a store.

    `documents` selects a subset (train or validation) by number; default all. Raises ValueError
    when there is no token at all or seq_len < 2 (nothing to predict); `sample` does so for a
    token outside [0, vocab_size), where that is given.
    """

    def __init__(
        self,
        store: DocumentStore,
        seq_len: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        documents: np.ndarray | None = None,
        pad_token: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        if seq_len < 2:
            raise ValueError(f"seq_len must be at least 2 tokens, got {seq_len}")
        lengths = np.asarray(store.lengths, dtype=np.int64)
        chosen = np.arange(len(lengths)) if documents is None else np.asarray(documents)
        self._documents = chosen[lengths[chosen] > 0]
        self._lengths = lengths
        self._store = store
        self.seq_len = seq_len
        self.seed = seed
        self.shuffle = shuffle
        self._pad_token = pad_token
        self._vocab_size = vocab_size
        self.num_tokens = int(lengths[self._documents].sum())
        if self.num_tokens == 0:
            raise ValueError(f"no tokens in {len(chosen)} documents: nothing to train on")
        self.fingerprint = store.fingerprint
        self._epoch = -1
        self._order = self._starts = self._visits = np.empty(0, dtype=np.int64)

    @property
    def samples_per_epoch(self) -> int:
        """Samples that hold every token once, the padded last one included."""
        return -(-self.num_tokens // self.seq_len)

    def sample(self, index: int) -> Sample:
        """Sample `index` >= 0 of the endless stream (index // samples_per_epoch is the epoch)."""
        epoch, visit = divmod(index, self.samples_per_epoch)
        if epoch != self._epoch:
            self._enter(epoch)
        return self._cut(int(self._visits[visit]) * self.seq_len)

    def _enter(self, epoch: int) -> None:
        if self.shuffle:
            rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._order = rng.permutation(self._documents)
            self._visits = rng.permutation(self.samples_per_epoch)
        else:
            self._order = self._documents
            self._visits = np.arange(self.samples_per_epoch)
        ends = np.cumsum(self._lengths[self._order])
        self._starts = ends - self._lengths[self._order]
        self._epoch = epoch

    def _cut(self, start: int) -> Sample:
        """Tokens [start, start + seq_len) of the epoch's joined documents."""
        tokens = np.full(self.seq_len, self._pad_token, dtype=np.int64)
        labels = np.full(self.seq_len, IGNORE_INDEX, dtype=np.int64)
        pieces: list[int] = []
        filled = 0
        slot = int(np.searchsorted(self._starts, start, side="right")) - 1
        while filled < self.seq_len and slot < len(self._order):
            number = int(self._order[slot])
            length = int(self._lengths[number])
            first = start + filled - int(self._starts[slot])
            last = min(length, first + self.seq_len - filled)
            count = last - first
            # One token more than the piece holds, where the document goes on: its last label.
            text = self._store.document(number, first, min(last + 1, length))
            tokens[filled : filled + count] = text[:count]
            labels[filled : filled + len(text) - 1] = text[1:]
            pieces.append(count)
            filled += count
            slot += 1
        self._check_ids(tokens)
        if filled < self.seq_len:
            pieces.append(self.seq_len - filled)
        return Sample(tokens, labels, np.asarray(pieces, dtype=np.int64), filled)

    def _check_ids(self, tokens: np.ndarray) -> None:
        # On CUDA an id out of range ends the process without saying which; here it costs 10 us.
        if self._vocab_size is None:
            return
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self._vocab_size:
            raise ValueError(
                f"the data holds token id {high if low >= 0 else low}, outside of the model's "
                f"vocabulary [0, {self._vocab_size}) (model.vocab_size)"
            )


class RandomDataset:
    """Uniform random tokens, for benchmarks that should not depend on a disk.

    `doc_len` 0: one document per sequence; otherwise document lengths are drawn uniformly from
    [1, 2 * doc_len), which has mean doc_len. The loss of a model on this stream stays at
    log(vocab_size).
    """

    def __init__(self, vocab_size: int, seq_len: int, *, seed: int = 0, doc_len: int = 0) -> None:
        if seq_len < 2:
            raise ValueError(f"seq_len must be at least 2 tokens, got {seq_len}")
        if doc_len < 0:
            raise ValueError(f"doc_len must be >= 0 (0: one document a sequence), got {doc_len}")
        self.vocab_size = vocab_size
        self.seq_len = seq_len
        self.seed = seed
        self.doc_len = doc_len
        self.num_tokens = self.samples_per_epoch * seq_len
        self.fingerprint = f"random-v1-{vocab_size}-{doc_len}"

    @property
    def samples_per_epoch(self) -> int:
        """Nominal: the stream never repeats."""
        return 1 << 40

    def sample(self, index: int) -> Sample:
        """Sample `index` >= 0; depends on (seed, index) alone."""
        rng = np.random.Generator(np.random.PCG64([self.seed, index]))
        text = rng.integers(0, self.vocab_size, self.seq_len, dtype=np.int64)
        lengths = self._lengths(rng)
        labels = np.full(self.seq_len, IGNORE_INDEX, dtype=np.int64)
        labels[:-1] = text[1:]
        labels[np.cumsum(lengths) - 1] = IGNORE_INDEX
        return Sample(text, labels, lengths, self.seq_len)

    def _lengths(self, rng: np.random.Generator) -> np.ndarray:
        if self.doc_len == 0:
            return np.asarray([self.seq_len], dtype=np.int64)
        lengths: list[int] = []
        left = self.seq_len
        while left:
            lengths.append(min(left, int(rng.integers(1, 2 * self.doc_len))))
            left -= lengths[-1]
        return np.asarray(lengths, dtype=np.int64)
