"""lora_images: the adapters' fp32 parameters, times their factors, into one flat buffer of the compute dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minitune.ops import backends


class Images:
    """Writes the same parameters to the same places again and again; remembers what the kernel wants to know of them.

    A copy is (place, parameter, factor): a view [rows, columns] of the flat buffer, whose rows may lie apart, an fp32
    parameter of that shape, and what it is multiplied by.
    """

    def __init__(self) -> None:
        self._known: tuple[Any, Any] = (None, None)

    def __reduce__(self) -> tuple[type[Images], tuple[()]]:
        return Images, ()       # addresses mean nothing to a copy

    def refresh(self, flat: Tensor, copies: Sequence[tuple[Tensor, Tensor, float]]) -> None:
        """flat [n] in the compute dtype; what no copy names is left as it is."""
        if not copies:
            return
        places, parameters, factors = zip(*copies, strict=True)
        if backends.choose("lora_images", flat.device) == "triton" and all(p.is_contiguous() for p in parameters):
            from minitune.kernels import lora_images as kernel

            kernel.refresh(self._table(kernel, flat, places, parameters, factors), flat)
            return
        scaled = torch._foreach_mul(list(parameters), list(factors))
        torch._foreach_copy_(list(places), scaled)

    def _table(self, kernel: Any, flat: Tensor, places: Sequence[Tensor], parameters: Sequence[Tensor],
               factors: Sequence[float]) -> Any:
        """What the kernel reads, made anew only where a parameter lies elsewhere or goes elsewhere."""
        offsets = [place.storage_offset() - flat.storage_offset() for place in places]
        pitches = [place.stride(0) for place in places]
        key = [p.data_ptr() for p in parameters], [p.shape for p in parameters], offsets, pitches, list(factors)
        if self._known[0] != key:
            self._known = key, kernel.table(parameters, offsets, pitches, factors, flat.device)
        return self._known[1]
