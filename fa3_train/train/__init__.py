"""Training: configuration, data, engines, metrics, checkpoints and the loop."""
