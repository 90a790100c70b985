"""Data: packing invariants, exact resume, corpora, caches, the Megatron index, errors."""

from __future__ import annotations

import json
import multiprocessing
import struct
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fa3_train.train.config import DataSection
from fa3_train.train.data import (
    IGNORE_INDEX,
    DataLoader,
    PackedDataset,
    RandomDataset,
    build_data,
    make_batch,
)
from fa3_train.train.data.build import split_documents
from fa3_train.train.data.cache import cached
from fa3_train.train.data.corpus import HuggingFaceCorpus, StdlibCorpus, text_corpus
from fa3_train.train.data.megatron import MegatronStore
from fa3_train.train.data.tokenizer import load_tokenizer


class ListStore:
    """Documents in memory whose tokens are all different: a token names its place."""

    fingerprint = "list"

    def __init__(self, lengths):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])

    def document(self, index, start, stop):
        assert 0 <= start < stop <= self.lengths[index]
        return np.arange(self.offsets[index] + start, self.offsets[index] + stop)

    def owner(self, token):
        return int(np.searchsorted(self.offsets, token, side="right")) - 1


LENGTHS = [5, 0, 1, 33, 2, 100, 16, 17, 1, 64, 3]


def epoch(dataset, number=0):
    per = dataset.samples_per_epoch
    return [dataset.sample(number * per + i) for i in range(per)]


# ------------------------------------------------------------------------------------ packing


@pytest.mark.parametrize("seq_len", [2, 16, 48, 500])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_token_once_per_epoch_and_labels_follow(seq_len, shuffle):
    store = ListStore(LENGTHS)
    dataset = PackedDataset(store, seq_len, seed=3, shuffle=shuffle, pad_token=-7)
    for number in (0, 1, 5):
        tokens, labels, padding = Counter(), Counter(), 0
        for sample in epoch(dataset, number):
            assert sample.tokens.shape == sample.labels.shape == (seq_len,)
            assert sample.lengths.sum() == seq_len and (sample.lengths > 0).all()
            start = 0
            for length in sample.lengths:
                piece = sample.tokens[start : start + length]
                target = sample.labels[start : start + length]
                start += length
                if piece[0] == -7:
                    assert (piece == -7).all() and (target == IGNORE_INDEX).all()
                    padding += length
                    continue
                # One document, in order: nothing crosses.
                owner = store.owner(piece[0])
                assert all(store.owner(t) == owner for t in piece)
                assert (np.diff(piece) == 1).all()
                assert (target[:-1] == piece[1:]).all()
                at_end = piece[-1] == store.offsets[owner + 1] - 1
                assert target[-1] == (IGNORE_INDEX if at_end else piece[-1] + 1)
                tokens.update(piece.tolist())
                labels.update(target[target != IGNORE_INDEX].tolist())
        assert padding == -sum(LENGTHS) % seq_len
        assert tokens == Counter(range(sum(LENGTHS)))
        # Each token but the first of a document is predicted once.
        firsts = {int(o) for o, n in zip(store.offsets, LENGTHS, strict=False) if n}
        assert labels == Counter(t for t in range(sum(LENGTHS)) if t not in firsts)


def test_shuffling_depends_on_seed_and_epoch_alone():
    def order(seed, number):
        dataset = PackedDataset(ListStore(LENGTHS), 16, seed=seed)
        return np.concatenate([s.tokens for s in epoch(dataset, number)]).tolist()

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(s, e)) for s in (1, 2) for e in (0, 1)}) == 4
    dataset = PackedDataset(ListStore(LENGTHS), 16, seed=1)
    dataset.sample(0)
    late = dataset.sample(dataset.samples_per_epoch * 3 + 2).tokens
    fresh = PackedDataset(ListStore(LENGTHS), 16, seed=1)
    assert (fresh.sample(fresh.samples_per_epoch * 3 + 2).tokens == late).all()


def test_a_subset_of_documents():
    store = ListStore(LENGTHS)
    dataset = PackedDataset(store, 16, documents=np.asarray([3, 9]), pad_token=-7)
    seen = {store.owner(t) for s in epoch(dataset) for t in s.tokens if t >= 0}
    assert seen == {3, 9} and dataset.num_tokens == 97


def test_batch_joins_samples():
    dataset = PackedDataset(ListStore(LENGTHS), 16, seed=3, pad_token=-7)
    samples = [dataset.sample(i) for i in range(5)]
    batch = make_batch(samples)
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.position_ids.dtype == batch.cu_seqlens.dtype == torch.int32
    lengths = np.concatenate([s.lengths for s in samples])
    assert batch.cu_seqlens.diff().tolist() == lengths.tolist()
    assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == len(batch.tokens) == 80
    assert batch.position_ids.tolist() == [i for n in lengths for i in range(n)]
    assert batch.max_seqlen == lengths.max() and batch.sum_sq_seqlen == (lengths**2).sum()
    assert batch.num_tokens == int((batch.tokens != -7).sum())
    moved = batch.to("meta")
    assert moved.tokens.is_meta and moved.cu_seqlens.is_meta
    assert moved.max_seqlen == batch.max_seqlen


@pytest.mark.parametrize("doc_len", [0, 5, 300])
def test_random_tokens(doc_len):
    dataset = RandomDataset(50, 64, seed=9, doc_len=doc_len)
    sample = dataset.sample(7)
    assert (dataset.sample(7).tokens == sample.tokens).all()
    assert (dataset.sample(8).tokens != sample.tokens).any()
    assert sample.tokens.min() >= 0 and sample.tokens.max() < 50
    assert sample.lengths.sum() == 64 and (len(sample.lengths) > 1) == (doc_len == 5)
    ends = np.cumsum(sample.lengths) - 1
    assert (sample.labels[ends] == IGNORE_INDEX).all()
    inner = np.setdiff1d(np.arange(64), ends)
    assert (sample.labels[inner] == sample.tokens[inner + 1]).all()


def test_random_documents_have_the_mean_that_was_asked():
    dataset = RandomDataset(50, 100_000, doc_len=40)
    lengths = dataset.sample(0).lengths
    assert lengths.mean() == pytest.approx(40, rel=0.05)


def test_impossible_datasets_are_refused():
    with pytest.raises(ValueError, match="seq_len.*1"):
        PackedDataset(ListStore([4]), 1)
    with pytest.raises(ValueError, match="no tokens in 2 documents"):
        PackedDataset(ListStore([0, 0]), 8)
    with pytest.raises(ValueError, match="doc_len.*-1"):
        RandomDataset(5, 8, doc_len=-1)
    with pytest.raises(ValueError, match=r"token id 9.*\[0, 9\).*vocab_size"):
        PackedDataset(ListStore([10]), 10, vocab_size=9).sample(0)
    assert PackedDataset(ListStore([10]), 10, vocab_size=10).sample(0).num_tokens == 10


# ------------------------------------------------------------------------------------- loader


def make_loader(micro=2, rank=0, size=1, **options):
    return DataLoader(
        PackedDataset(ListStore(LENGTHS), 16, seed=5), micro, dp_rank=rank, dp_size=size, **options
    )


def global_batch(loaders, accumulation):
    """The tokens that all ranks see in one optimizer step, as a set of samples."""
    rows = []
    for _ in range(accumulation):
        for loader in loaders:
            rows += next(loader).tokens.view(-1, 16).tolist()
    return sorted(map(tuple, rows))


def test_ranks_share_each_step_without_overlap():
    single = make_loader(micro=8)
    for size, micro, accumulation in ((2, 4, 1), (4, 2, 1), (2, 1, 4), (1, 2, 4)):
        single.seek(0)
        loaders = [make_loader(micro, r, size) for r in range(size)]
        for _ in range(7):  # over the end of an epoch, which has 16 samples
            assert global_batch(loaders, accumulation) == global_batch([single], 1)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_resume_is_exact_on_1_2_4_ranks(prefetch):
    straight = make_loader(micro=8, prefetch=0)
    expected = [global_batch([straight], 1) for _ in range(9)]
    state = None
    seen = []
    for size in (1, 2, 4):
        loaders = [make_loader(8 // size, r, size, prefetch=prefetch) for r in range(size)]
        if state is not None:
            for loader in loaders:
                loader.load_state_dict(state)
        seen += [global_batch(loaders, 1) for _ in range(3)]
        states = [loader.state_dict() for loader in loaders]
        assert all(s == states[0] for s in states)
        state = json.loads(json.dumps(states[0]))  # survives any serializer
    assert seen == expected


def test_prefetched_batches_do_not_count_as_consumed():
    loader = make_loader(prefetch=3)
    next(loader)
    assert loader.state_dict()["samples"] == 2
    loader.seek(0)
    again = next(loader)
    assert torch.equal(again.tokens, next(make_loader(prefetch=0)).tokens)


@pytest.mark.parametrize("key", ["seq_len", "seed", "fingerprint"])
def test_another_stream_is_refused(key):
    loader = make_loader()
    state = loader.state_dict()
    with pytest.raises(ValueError, match=f"another stream: {key}.*'other'"):
        loader.load_state_dict({**state, key: "other"})
    with pytest.raises(ValueError, match=key):
        loader.load_state_dict({k: v for k, v in state.items() if k != key})


def test_loader_arguments_are_checked():
    with pytest.raises(ValueError, match="micro_batch.*0"):
        make_loader(micro=0)
    with pytest.raises(ValueError, match="dp_rank.*2"):
        make_loader(rank=2, size=2)
    with pytest.raises(ValueError, match="samples.*-1"):
        make_loader().seek(-1)


def test_an_error_in_the_background_reaches_the_caller_and_threads_end():
    source = PackedDataset(ListStore([40]), 16, vocab_size=20)
    loader = DataLoader(source, 3, prefetch=2)
    with pytest.raises(ValueError, match="vocab_size"):
        next(loader)
    loader.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("data")]


# ------------------------------------------------------------------------------------ corpora


@pytest.fixture
def folder(tmp_path):
    """A small corpus of 12 documents in three formats."""
    root = tmp_path / "text"
    (root / "deep").mkdir(parents=True)
    for i in range(6):
        (root / "deep" / f"{i}.py").write_text(f"def function_{i}():\n    return {i}\n" * (i + 3))
    (root / "read.md").write_text("# Ünïcode ∀ text\n" * 9)
    (root / "skip.bin").write_bytes(b"\xff\x00")
    lines = [json.dumps({"text": f"line number {i} " * 5, "n": i}) for i in range(5)]
    (root / "rows.jsonl").write_text("\n".join(lines) + "\n\n")
    return root


def section(tmp_path, **options):
    options = {
        "kind": "text", "cache_dir": str(tmp_path / "cache"), "seq_len": 32, "micro_batch": 2,
        "bpe_vocab_size": 300, "val_fraction": 0.2, **options,
    }  # fmt: skip
    return DataSection(**options)


def decoded(bundle):
    tokenizer = load_tokenizer(bundle.tokenizer_path)
    store = bundle.train.source._store
    return [
        tokenizer.decode(store.document(i, 0, n).tolist(), skip_special_tokens=True)
        for i, n in enumerate(store.lengths)
    ]


def test_text_folder_round_trip(folder, tmp_path):
    bundle = build_data(section(tmp_path, path=str(folder)), vocab_size=300)
    assert decoded(bundle) == list(text_corpus(str(folder)).documents())
    assert len(decoded(bundle)) == 12 and "Ünïcode ∀" in "".join(decoded(bundle))
    train, val = bundle.train.source, bundle.val.source
    assert not set(train._documents) & set(val._documents)
    assert len(train._documents) + len(val._documents) == 12
    # Every document ends with entry 0, the end of text.
    store = train._store
    assert all(store.document(i, n - 1, n)[0] == 0 for i, n in enumerate(store.lengths))
    batch = next(bundle.train)
    assert batch.tokens.shape == (64,) and int(batch.tokens.max()) < 300
    bundle.close()


def test_globs_single_files_and_fields(folder, tmp_path, monkeypatch):
    def documents(path, field="text"):
        return list(text_corpus(str(path), field).documents())

    assert len(documents(folder / "**" / "*.py")) == 6
    assert len(documents(folder / "read.md")) == 1
    assert len(documents(folder / "rows.jsonl")) == 5
    monkeypatch.chdir(folder)
    assert len(documents("deep/*.py")) == 6
    with pytest.raises(ValueError, match=r"rows.jsonl:1.*'n' must be a string"):
        documents(folder / "rows.jsonl", "n")
    with pytest.raises(ValueError, match=r"rows.jsonl:1.*data.text_field"):
        documents(folder / "rows.jsonl", "body")
    with pytest.raises(ValueError, match=r"skip.bin.*UTF-8.*byte 0.*0xff"):
        documents(folder / "skip.bin")


def test_cache_is_used_and_follows_the_content(folder, tmp_path, monkeypatch):
    config = section(tmp_path, path=str(folder))
    first = build_data(config, vocab_size=300)
    again = build_data(config, vocab_size=300)
    assert again.train.source.fingerprint == first.train.source.fingerprint
    assert again.tokenizer_path == first.tokenizer_path

    (folder / "read.md").write_text("changed " * 30)
    changed = build_data(config, vocab_size=300)
    assert changed.train.source.fingerprint != first.train.source.fingerprint
    # Position in the old text means nothing in the new one.
    with pytest.raises(ValueError, match="fingerprint"):
        changed.train.load_state_dict(first.train.state_dict())
    # The same text and another tokenizer are another stream too.
    other = build_data(section(tmp_path, path=str(folder), bpe_vocab_size=280), vocab_size=300)
    assert other.train.source.fingerprint != changed.train.source.fingerprint
    left = [p.name for p in (tmp_path / "cache").iterdir() if p.name.startswith(".")]
    assert not left


def test_large_corpora_are_keyed_by_size_and_time(folder, monkeypatch):
    import os

    import fa3_train.train.data.corpus as corpus

    monkeypatch.setattr(corpus, "_HASH_CONTENT_BYTES", 10)
    before = text_corpus(str(folder)).key()
    assert text_corpus(str(folder)).key() == before
    os.utime(folder / "read.md", ns=(1, 1))
    assert text_corpus(str(folder)).key() != before


def test_a_given_tokenizer_is_used(folder, tmp_path):
    path = build_data(section(tmp_path, path=str(folder)), vocab_size=300).tokenizer_path
    mine = tmp_path / "mine.json"
    mine.write_text(path.read_text())
    bundle = build_data(section(tmp_path, path=str(folder), tokenizer=str(mine)), vocab_size=300)
    assert bundle.tokenizer_path == mine and bundle.vocab_size == 300


def test_stdlib_is_large_readable_and_without_tests():
    corpus = StdlibCorpus()
    names = {str(f.relative_to(corpus.root)) for f in corpus.files}
    assert "typing.py" in names and "pydoc_data/topics.py" in names
    assert not [n for n in names if n.startswith(("test/", "site-packages/"))]
    assert sum(len(text) for text in corpus.documents()) > 10e6


def _build_slowly(argument):
    entry, log = argument

    def build(target: Path):
        with open(log, "a") as stream:
            stream.write("built\n")
        time.sleep(0.3)
        (target / "value").write_text("42")

    return (cached(Path(entry), build) / "value").read_text()


def test_two_processes_build_a_cache_entry_once(tmp_path):
    log = tmp_path / "log"
    argument = (str(tmp_path / "entry"), str(log))
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map(_build_slowly, [argument] * 3) == ["42"] * 3
    assert log.read_text() == "built\n"


def test_a_failed_build_leaves_nothing(tmp_path):
    def build(target):
        (target / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="space"):
        cached(tmp_path / "entry", build)
    assert [p.name for p in tmp_path.iterdir()] == ["entry.lock"]
    assert cached(tmp_path / "entry", lambda target: None).is_dir()


def test_split_is_by_document_and_fixed():
    lengths = np.asarray([10, 0, 20, 30, 40, 0, 900])
    train, val = split_documents(lengths, 0.02)
    assert sorted([*train, *val]) == [0, 2, 3, 4, 6]
    again = split_documents(lengths, 0.02)
    assert (again[0] == train).all() and (again[1] == val).all()
    many = np.full(1000, 7)
    train, val = split_documents(many, 0.1)
    assert len(val) == 100 and len(train) == 900
    assert split_documents(many, 0)[1] is None
    # Even when validation asks for nearly everything, one document trains.
    train, val = split_documents(np.asarray([5, 5]), 0.99)
    assert len(train) == len(val) == 1
    with pytest.raises(ValueError, match="val_fraction=0.1 needs at least 2 documents.*1"):
        split_documents(np.asarray([5, 0]), 0.1)


def test_hugging_face_rows(monkeypatch):
    rows = [{"body": "one"}, {"body": "two"}]

    class Rows(list):
        column_names = ["body"]
        _fingerprint = "abc"

    fake = SimpleNamespace(load_dataset=lambda path, config, split: Rows(rows))
    monkeypatch.setitem(__import__("sys").modules, "datasets", fake)
    corpus = HuggingFaceCorpus("some/set", None, "train", "body")
    assert list(corpus.documents()) == ["one", "two"] and len(corpus.key()) == 32
    with pytest.raises(ValueError, match="'text' is not a column.*body"):
        HuggingFaceCorpus("some/set", None, "train", "text")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r"data\.kind=hf needs the package datasets"):
        HuggingFaceCorpus("some/set", None, "train", "body")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "tekst"}, ["data.kind", "tekst", "stdlib"]),
        ({"path": None}, ["data.path", "text"]),
        ({"path": "/nowhere/at/all"}, ["data.path", "/nowhere/at/all"]),
        ({"val_fraction": 1.0}, ["data.val_fraction", "1.0"]),
        ({"tokenizer": "/nowhere.json"}, ["data.tokenizer", "/nowhere.json"]),
        ({"bpe_vocab_size": 100}, ["data.bpe_vocab_size", "257", "100"]),
        ({"bpe_vocab_size": 400}, ["400", "model.vocab_size=300", "data.bpe_vocab_size"]),
    ],
)
def test_impossible_data_is_refused(folder, tmp_path, change, words):
    (folder / "more.txt").write_text("".join(f"word{i} " for i in range(3000)))
    config = section(tmp_path, **{"path": str(folder), **change})
    with pytest.raises(ValueError) as caught:
        build_data(config, vocab_size=300)
    for word in words:
        assert word in str(caught.value)


def test_empty_folders_and_files_are_refused(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"none.*holds no file ending in \.txt"):
        build_data(section(tmp_path, path=str(tmp_path / "none")), vocab_size=300)
    (tmp_path / "none" / "a.txt").write_text("")
    with pytest.raises(ValueError, match="every document is empty"):
        build_data(section(tmp_path, path=str(tmp_path / "none")), vocab_size=300)


def test_a_broken_tokenizer_file_is_refused(tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"data.tokenizer=.*bad.json.*cannot be read"):
        load_tokenizer(tmp_path / "bad.json")


# ----------------------------------------------------------------------------------- megatron


def write_megatron(prefix, sequences, borders, code=8, dtype="<u2", change=None):
    """An index written from the format's description, with single fields to spoil."""
    data = np.concatenate([np.asarray(s) for s in sequences]).astype(dtype)
    prefix.with_suffix(".bin").write_bytes(data.tobytes())
    lengths = [len(s) for s in sequences]
    pointers = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * data.itemsize
    parts = {
        "magic": b"MMIDIDX\x00\x00",
        "version": struct.pack("<Q", 1),
        "code": struct.pack("<B", code),
        "counts": struct.pack("<QQ", len(sequences), len(borders)),
        "lengths": np.asarray(lengths, "<i4").tobytes(),
        "pointers": np.asarray(pointers, "<i8").tobytes(),
        "borders": np.asarray(borders, "<i8").tobytes(),
    }
    prefix.with_suffix(".idx").write_bytes(b"".join({**parts, **(change or {})}.values()))
    return prefix


SEQUENCES = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]]


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4"), (5, "<i8"), (1, "u1")])
@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_megatron_documents(tmp_path, code, dtype, suffix):
    prefix = write_megatron(tmp_path / "corpus", SEQUENCES, [0, 2, 3, 4], code, dtype)
    store = MegatronStore(str(prefix) + suffix)
    assert store.lengths.tolist() == [5, 1, 4]
    assert [store.document(i, 0, n).tolist() for i, n in enumerate(store.lengths)] == [
        [1, 2, 3, 4, 5], [6], [7, 8, 9, 10],
    ]  # fmt: skip
    assert store.document(2, 1, 3).tolist() == [8, 9]


def test_megatron_trains_and_checks_ids(tmp_path):
    prefix = write_megatron(tmp_path / "corpus", SEQUENCES, [0, 2, 3, 4])
    config = section(tmp_path, kind="megatron", path=str(prefix), seq_len=4, micro_batch=1)
    bundle = build_data(config, vocab_size=11)
    assert next(bundle.train).tokens.shape == (4,)
    small = build_data(config, vocab_size=3)
    with pytest.raises(ValueError, match="vocab_size"):
        for _ in range(3):
            next(small.train)
    small.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"magic": b"NOTMEGATR"}, "no Megatron index.*NOTMEGATR"),
        ({"version": struct.pack("<Q", 2)}, "version must be 1, got 2"),
        ({"code": b"\x06"}, "dtype code.*got 6"),
        ({"counts": struct.pack("<QQ", 400, 4)}, "cut short: 400 sequences"),
        ({"borders": np.asarray([0, 3, 2, 4], "<i8").tobytes()}, "must rise"),
        ({"borders": np.asarray([0, 2, 3, 9], "<i8").tobytes()}, "number of sequences 4"),
        ({"pointers": np.asarray([0, 6, 10, 99], "<i8").tobytes()}, "do not lie one after"),
    ],
)
def test_spoilt_megatron_files_are_refused(tmp_path, change, words):
    prefix = write_megatron(tmp_path / "corpus", SEQUENCES, [0, 2, 3, 4], change=change)
    with pytest.raises(ValueError, match=words):
        MegatronStore(str(prefix))


def test_a_short_megatron_bin_and_a_missing_one_are_refused(tmp_path):
    prefix = write_megatron(tmp_path / "corpus", SEQUENCES, [0, 2, 3, 4])
    data = prefix.with_suffix(".bin")
    data.write_bytes(data.read_bytes()[:-2])
    with pytest.raises(ValueError, match="holds 9 tokens.*counts 10"):
        MegatronStore(str(prefix))
    data.unlink()
    with pytest.raises(ValueError, match=r"corpus.bin does not exist"):
        MegatronStore(str(prefix))
    prefix.with_suffix(".idx").write_bytes(b"")
    data.write_bytes(b"")
    with pytest.raises(ValueError, match="no Megatron index"):
        MegatronStore(str(prefix))
