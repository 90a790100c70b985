"""From the data section of a configuration to the loaders of one data-parallel rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from fa3_train.train.data.batch import Batch
from fa3_train.train.data.corpus import Corpus, HuggingFaceCorpus, StdlibCorpus, text_corpus
from fa3_train.train.data.loader import DataLoader
from fa3_train.train.data.megatron import MegatronStore
from fa3_train.train.data.packing import (
    DocumentStore,
    PackedDataset,
    RandomDataset,
    SampleSource,
)
from fa3_train.train.data.store import TokenStore, token_store
from fa3_train.train.data.tokenizer import load_tokenizer, trained_tokenizer

KINDS = ("stdlib", "text", "megatron", "hf", "random")
# The split and the validation order do not follow the run's seed, so that losses of runs with
# different seeds are losses of the same text.
_SPLIT_SEED = 20_240_711


class DataConfig(Protocol):
    """The fields read here; `fa3_train.train.config.DataSection` has them."""

    kind: str
    path: str | None
    text_field: str
    hf_config: str | None
    hf_split: str
    tokenizer: str | None
    bpe_vocab_size: int
    cache_dir: str | None
    val_fraction: float
    shuffle: bool
    seq_len: int
    micro_batch: int
    random_doc_len: int


@dataclass
class DataBundle:
    """What a run reads. `val` is None where val_fraction is 0."""

    train: DataLoader
    val: DataLoader | None
    vocab_size: int  # ids are below this
    description: str  # one line for the log
    tokenizer_path: Path | None  # None for megatron and random

    def close(self) -> None:
        """Stop the background threads."""
        self.train.close()
        if self.val is not None:
            self.val.close()


def build_data(
    config: DataConfig,
    *,
    vocab_size: int,
    seed: int = 0,
    dp_rank: int = 0,
    dp_size: int = 1,
    pin_memory: bool = False,
    prefetch: int = 2,
    shard: Callable[[Batch], Batch] | None = None,
) -> DataBundle:
    """Loaders for training and validation.

    `vocab_size` is the model's; a tokenizer with more entries is refused. `shard` is that of
    `DataLoader`. The first call on a machine tokenizes the corpus (seconds for the default one) and
    caches it. Raises ValueError naming the key of the configuration.
    """
    if config.kind not in KINDS:
        raise ValueError(f"data.kind must be one of {', '.join(KINDS)}, got {config.kind!r}")
    if not 0 <= config.val_fraction < 1:
        raise ValueError(f"data.val_fraction must be in [0, 1), got {config.val_fraction}")
    tokenizer_path: Path | None = None
    train: SampleSource
    val: SampleSource | None
    if config.kind == "random":
        train, val = _random(config, vocab_size, seed)
        used = vocab_size
        description = f"random tokens, vocabulary {vocab_size}"
    else:
        store: DocumentStore
        if config.kind == "megatron":
            store = MegatronStore(_path(config))
            used, name = vocab_size, f"Megatron index {config.path}"
        else:
            store, tokenizer_path, name = _text_store(config)
            used = store.vocab_size
            _check_vocab(used, vocab_size, tokenizer_path)
        train, val, counts = _packed(config, store, seed, vocab_size)
        description = f"{name}: {counts}"

    def loader(source: SampleSource) -> DataLoader:
        return DataLoader(
            source, config.micro_batch, dp_rank=dp_rank, dp_size=dp_size, prefetch=prefetch,
            pin_memory=pin_memory, shard=shard,
        )

    return DataBundle(
        train=loader(train), val=None if val is None else loader(val), vocab_size=used,
        description=description, tokenizer_path=tokenizer_path,
    )


def split_documents(
    lengths: np.ndarray, val_fraction: float
) -> tuple[np.ndarray, np.ndarray | None]:
    """Numbers of the training and of the validation documents (None where val_fraction is 0).

    Documents join validation in a fixed random order until they hold `val_fraction` of all
    tokens. Raises ValueError where one of the two would be empty.
    """
    filled = np.flatnonzero(lengths)
    if val_fraction == 0:
        return filled, None
    if len(filled) < 2:
        raise ValueError(
            f"data.val_fraction={val_fraction} needs at least 2 documents to split, "
            f"got {len(filled)}: set data.val_fraction=0"
        )
    order = np.random.Generator(np.random.PCG64(_SPLIT_SEED)).permutation(filled)
    wanted = val_fraction * lengths[filled].sum()
    count = 1 + int(np.searchsorted(np.cumsum(lengths[order]), wanted))
    count = min(count, len(order) - 1)
    return np.sort(order[count:]), np.sort(order[:count])


def _packed(
    config: DataConfig, store: DocumentStore, seed: int, vocab_size: int
) -> tuple[PackedDataset, PackedDataset | None, str]:
    lengths = np.asarray(store.lengths, dtype=np.int64)
    train_documents, val_documents = split_documents(lengths, config.val_fraction)
    train = PackedDataset(
        store, config.seq_len, seed=seed, shuffle=config.shuffle, documents=train_documents,
        vocab_size=vocab_size,
    )
    val = None
    counts = f"{train.num_tokens:,} tokens in {len(train_documents):,} documents"
    if val_documents is not None:
        val = PackedDataset(
            store, config.seq_len, seed=_SPLIT_SEED, documents=val_documents,
            vocab_size=vocab_size,
        )
        counts += f"; validation {val.num_tokens:,} in {len(val_documents):,}"
    return train, val, counts


def _text_store(config: DataConfig) -> tuple[TokenStore, Path, str]:
    corpus = _corpus(config)
    key = corpus.key()
    if config.tokenizer is None:
        path = trained_tokenizer(corpus, key, config.bpe_vocab_size, config.cache_dir)
    else:
        path = Path(config.tokenizer).expanduser()
    tokenizer = load_tokenizer(path)
    return token_store(corpus, key, tokenizer, config.cache_dir), path, corpus.name


def _corpus(config: DataConfig) -> Corpus:
    if config.kind == "stdlib":
        return StdlibCorpus()
    if config.kind == "text":
        return text_corpus(_path(config), config.text_field)
    return HuggingFaceCorpus(_path(config), config.hf_config, config.hf_split, config.text_field)


def _path(config: DataConfig) -> str:
    if not config.path:
        raise ValueError(f"data.path must be given with data.kind={config.kind}, got {config.path}")
    return config.path


def _random(
    config: DataConfig, vocab_size: int, seed: int
) -> tuple[RandomDataset, RandomDataset | None]:
    def stream(stream_seed: int) -> RandomDataset:
        return RandomDataset(
            vocab_size, config.seq_len, seed=stream_seed, doc_len=config.random_doc_len
        )

    return stream(seed), stream(_SPLIT_SEED) if config.val_fraction else None


def _check_vocab(used: int, model: int, tokenizer: Path) -> None:
    if used > model:
        raise ValueError(
            f"the tokenizer {tokenizer} has {used} entries, more than model.vocab_size={model}: "
            "raise model.vocab_size, or lower data.bpe_vocab_size where the tokenizer is trained "
            "here"
        )
