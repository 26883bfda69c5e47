"""deterministic: torch's deterministic mode for a block, by its flags alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.utils.deterministic


@contextlib.contextmanager
def deterministic(*, warn_only: bool, fill: bool) -> Iterator[None]:
    """Within it, in every thread: ops add in a fixed order, or with `warn_only` say that they do not; with `fill` new
    memory holds NaN, and the largest number in integers.

    The flags alone: torch's public switch also rewrites the compiler's settings, which are the user's.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory        # type: ignore[attr-defined]
    torch._C._set_deterministic_algorithms(True, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill          # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled    # type: ignore[attr-defined]
