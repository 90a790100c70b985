"""`python -m fa3_train`: see `fa3_train.cli`."""

import os

# Read when torch loads OpenMP. Threads that spin at a barrier burn the core that the other one
# waits for: with other work on both cores a quickstart step took 10.0 s spinning, 2.2 s sleeping.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from fa3_train.cli import main  # noqa: E402

if __name__ == "__main__":
    code = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from fa3_train.train.engines import leave

        leave(code)
    raise SystemExit(code)
