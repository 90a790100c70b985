"""FlashAttention-3-style training attention for Hopper GPUs, from the kernel to the dashboard."""

__version__ = "0.1.0"
