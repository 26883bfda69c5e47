"""Token ids as callers give them, lists or tensors: checked, and brought into one form."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minitune.arguments import MAX_WHOLE, short
from minitune.errors import InputError


def flat_integers(owner: str, name: str, value: Any) -> Tensor:
    """`value`, a flat list or tensor of whole numbers, as an int64 tensor on the host. Fractions are never cut off."""
    try:
        found = torch.as_tensor(value).cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = torch.empty(0)
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if not whole or found.dim() != 1 or not found.numel() or int(found.abs().max()) > MAX_WHOLE:
        raise InputError(f"{owner}: {name} is {short(value)}; it must be a flat list or tensor of whole numbers below "
                         "2**31, at least one")
    return found.long()


def as_prompts(ids: Any) -> tuple[bool, list[list[int]]]:
    """(whether it is one prompt, the prompts as lists): a flat list or tensor of ids, or a list of such."""
    if isinstance(ids, Tensor):
        ids = ids.tolist()
    try:
        single = len(ids) == 0 or not isinstance(ids[0], Sequence | Tensor)
        return single, [[operator.index(i) for i in prompt] for prompt in ([ids] if single else ids)]
    except (TypeError, RuntimeError, LookupError) as error:
        raise InputError(f"generate: ids is {short(ids)}; give token ids or a list of such, as tokenizer.encode(text) "
                         "makes them; complete(text) takes text") from error
