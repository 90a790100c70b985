"""Data: documents to packed, shuffled, resumable batches."""

from fa3_train.train.data.batch import IGNORE_INDEX, Batch, Sample, make_batch
from fa3_train.train.data.build import DataBundle, build_data
from fa3_train.train.data.loader import DataLoader
from fa3_train.train.data.packing import PackedDataset, RandomDataset

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "DataBundle",
    "DataLoader",
    "PackedDataset",
    "RandomDataset",
    "Sample",
    "build_data",
    "make_batch",
]
