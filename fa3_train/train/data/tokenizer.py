"""Byte-level BPE: trained once on a corpus, or read from a `tokenizer.json`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fa3_train.train.data.cache import cache_folder, cached
from fa3_train.train.data.corpus import Corpus

END_OF_TEXT = "<|endoftext|>"
# Names under which published tokenizers keep the token that ends a document.
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
_FORMAT = 1
# BPE merges settle long before this much text; counting words of a terabyte would not end.
_TRAINING_CHARACTERS = 64 << 20
_SMALLEST = 257  # 256 bytes and the end of text


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A `tokenizers` JSON file; ValueError with the reason when it cannot be read."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"data.tokenizer={str(path)!r} is not a file (expected a tokenizer.json)")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises bare Exception
        raise ValueError(f"data.tokenizer={str(path)!r} cannot be read: {error}") from error


def end_of_text_id(tokenizer: Tokenizer) -> int | None:
    """Id of the token that ends a document, or None where the vocabulary has none."""
    for name in _END_NAMES:
        number = tokenizer.token_to_id(name)
        if number is not None:
            return number
    return None


def trained_tokenizer(
    corpus: Corpus, corpus_key: str, vocab_size: int, cache_dir: str | None = None
) -> Path:
    """Path of a byte-level BPE of `vocab_size` entries trained on the corpus, from the cache if
    it is there. Entry 0 ends a document. ValueError below 257 entries."""
    if vocab_size < _SMALLEST:
        raise ValueError(
            f"data.bpe_vocab_size must be at least {_SMALLEST} (256 bytes and the end of text), "
            f"got {vocab_size}"
        )
    identity = f"bpe\0{_FORMAT}\0{vocab_size}\0{corpus_key}"
    key = hashlib.blake2b(identity.encode(), digest_size=12).hexdigest()

    def build(folder: Path) -> None:
        train_bpe(corpus.documents(), vocab_size).save(str(folder / "tokenizer.json"))

    folder = cached(cache_folder(cache_dir) / f"bpe-{vocab_size}-{key}", build)
    return folder / "tokenizer.json"


def train_bpe(documents: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al., arXiv 1508.07909, on bytes as in GPT-2)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first(documents, _TRAINING_CHARACTERS), trainer)
    return tokenizer


def _first(documents: Iterator[str], characters: int) -> Iterator[str]:
    seen = 0
    for text in documents:
        yield text
        seen += len(text)
        if seen >= characters:
            return
