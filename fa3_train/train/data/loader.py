"""Micro-batches for one data-parallel rank, resumable to the exact sample.

The whole state is `samples`: how many samples of the endless stream all ranks together have
consumed.  Micro-batch number a of a step takes, on rank r of W, samples

    samples + (a * W + r) * micro_batch + [0, micro_batch)

so the set of samples in one optimizer step depends on W * accumulation * micro_batch alone: a run
that continues on another number of ranks with the same global batch sees the same steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fa3_train.train.data.batch import Batch, make_batch
from fa3_train.train.data.packing import SampleSource


class DataLoader:
    """Endless iterator over `Batch`es of `micro_batch * seq_len` tokens.

    A background thread keeps `prefetch` batches ready (0: none, batches are made on demand);
    what it has prepared but not handed out does not count as consumed. `shard` takes a rank's part
    of a batch, where several ranks share it.
    """

    def __init__(
        self,
        source: SampleSource,
        micro_batch: int,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        prefetch: int = 2,
        pin_memory: bool = False,
        shard: Callable[[Batch], Batch] | None = None,
    ) -> None:
        if micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, got {micro_batch}")
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank must be in [0, dp_size={dp_size}), got {dp_rank}")
        self.source = source
        self.micro_batch = micro_batch
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self._pin = pin_memory
        self._shard = shard
        self._samples = 0
        self._prefetch = prefetch
        self._ahead: deque[Future[Batch]] = deque()
        self._next_ahead = 0
        self._pool: ThreadPoolExecutor | None = None

    @property
    def samples(self) -> int:
        """Samples consumed by all ranks together since the start of training."""
        return self._samples

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches per rank in which every sample occurs at least once."""
        return -(-self.source.samples_per_epoch // (self.micro_batch * self.dp_size))

    def __iter__(self) -> DataLoader:
        return self

    def __next__(self) -> Batch:
        stride = self.micro_batch * self.dp_size
        if self._prefetch == 0:
            batch = self._make(self._samples)
        else:
            if self._pool is None:
                # One thread: PackedDataset keeps the current epoch's order as mutable state.
                self._pool = ThreadPoolExecutor(1, thread_name_prefix="data")
                self._next_ahead = self._samples
            while len(self._ahead) < self._prefetch + 1:
                self._ahead.append(self._pool.submit(self._make, self._next_ahead))
                self._next_ahead += stride
            batch = self._ahead.popleft().result()
        self._samples += stride
        return batch

    def seek(self, samples: int) -> None:
        """Continue after `samples` samples consumed by all ranks together."""
        if samples < 0:
            raise ValueError(f"samples must be >= 0, got {samples}")
        self.close()
        self._samples = samples

    def close(self) -> None:
        """Stop the background thread; the next `next()` starts it again."""
        if self._pool is not None:
            for future in self._ahead:
                future.cancel()
            self._pool.shutdown(wait=True)
            self._pool = None
        self._ahead.clear()

    def state_dict(self) -> dict[str, Any]:
        """Position and identity of the stream; the same on every rank."""
        return {
            "samples": self._samples,
            "seq_len": self.source.seq_len,
            "seed": self.source.seed,
            "fingerprint": self.source.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()` of any data-parallel size.

        Raises ValueError when the stream is another one (data, seed or sequence length), for
        then the position means nothing.
        """
        for key in ("seq_len", "seed", "fingerprint"):
            if key not in state or "samples" not in state:
                raise ValueError(f"data state must have samples and {key}, got {sorted(state)}")
            ours = getattr(self.source, key)
            if state[key] != ours:
                raise ValueError(
                    f"the checkpoint's data position belongs to another stream: {key} was "
                    f"{state[key]!r} and is now {ours!r}"
                )
        self.seek(int(state["samples"]))

    def _make(self, samples: int) -> Batch:
        first = samples + self.dp_rank * self.micro_batch
        batch = make_batch([self.source.sample(first + i) for i in range(self.micro_batch)])
        if self._shard is not None:
            batch = self._shard(batch)
        return batch.pin_memory() if self._pin else batch
