"""Token ids of a corpus in one memory-mapped file, made once and cached."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from fa3_train.train.data.cache import cache_folder, cached
from fa3_train.train.data.corpus import Corpus
from fa3_train.train.data.tokenizer import end_of_text_id

_FORMAT = 1
_BATCH = 128  # documents encoded together, over the tokenizer's own threads


class TokenStore:
    """Documents as token ids: `tokens.bin` and the borders of the documents in `offsets.npy`."""

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        self.fingerprint: str = meta["key"]
        self.vocab_size: int = meta["vocab_size"]
        self._offsets = np.load(folder / "offsets.npy")
        self._tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 (documents,)."""
        return np.diff(self._offsets)

    def document(self, index: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of one document."""
        base = int(self._offsets[index])
        return self._tokens[base + start : base + stop]


def token_store(
    corpus: Corpus, corpus_key: str, tokenizer: Tokenizer, cache_dir: str | None = None
) -> TokenStore:
    """The corpus in token ids, from the cache if it is there.

    A document ends with the tokenizer's end of text, where it has one. Raises ValueError when the
    corpus has no text at all.
    """
    identity = f"tokens\0{_FORMAT}\0{corpus_key}\0{tokenizer.to_str()}"
    key = hashlib.blake2b(identity.encode(), digest_size=12).hexdigest()
    # Ids of added tokens may lie beyond the count of entries.
    vocab = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())

    def build(folder: Path) -> None:
        dtype = np.dtype(np.uint16 if vocab <= 1 << 16 else np.uint32)
        lengths = _write(folder / "tokens.bin", corpus.documents(), tokenizer, dtype)
        if not lengths:
            raise ValueError(f"{corpus.name}: every document is empty")
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        np.save(folder / "offsets.npy", offsets)
        meta = {"key": key, "dtype": dtype.name, "vocab_size": vocab, "corpus": corpus.name}
        (folder / "meta.json").write_text(json.dumps(meta))

    return TokenStore(cached(cache_folder(cache_dir) / f"tokens-{key}", build))


def _write(
    path: Path, documents: Iterator[str], tokenizer: Tokenizer, dtype: np.dtype
) -> list[int]:
    """Append the tokens of all documents to a file; returns their numbers of tokens."""
    end = end_of_text_id(tokenizer)
    tail = np.asarray([] if end is None else [end], dtype=dtype)
    lengths: list[int] = []
    texts = (text for text in documents if text)
    with path.open("wb") as stream:
        while batch := list(itertools.islice(texts, _BATCH)):
            for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
                ids = np.concatenate([np.asarray(encoding.ids, dtype=dtype), tail])
                stream.write(ids.tobytes())
                lengths.append(len(ids))
    return lengths
