"""in_cache: the rows that a chain of pointwise passes takes at a time, so that a CPU finds them in its cache again."""

from __future__ import annotations

import torch

CACHED_BYTES = 2 << 20
"""Bytes of one fp32 operand that are worked on at a time on a CPU."""


def in_cache(rows: int, row_elements: int, device: torch.device) -> list[slice]:
    """Slices of `rows` rows of `row_elements` fp32 values: about CACHED_BYTES each on a CPU, all at once elsewhere."""
    size = max(16, CACHED_BYTES // (4 * max(1, row_elements))) if device.type == "cpu" else max(1, rows)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
