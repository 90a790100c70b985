"""Benchmarks: ``python -m fa3_train.bench <what> --help``. They need torch and numpy, no more."""
