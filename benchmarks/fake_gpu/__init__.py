"""The CUDA path without a GPU: what a step holds in memory, and what would make the host wait."""
