"""`python -m fa3_train`: see `fa3_train.cli`."""

from fa3_train.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
