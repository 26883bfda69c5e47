"""written, unwritten: what autograd has to know, or to be asked, of tensors that are written to in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def written(*tensors: Tensor | None) -> None:
    """Move the version counter of each. A kernel that writes through a raw pointer does not, and then a backward that
    saved the tensor before would take the new values for the old ones instead of stopping."""
    torch.autograd.graph.increment_version([x for x in tensors if x is not None])


def unwritten(run: Callable[..., Result], parameters: Iterable[Tensor]) -> Callable[..., Result]:
    """`run`, for a backward that computes the forward again: RuntimeError where a parameter was written to since now.
    What is computed again saves its tensors anew, so autograd would mix old and new values without a word. A write
    that autograd is not told of, through `.data` or by a fused optimizer of torch's, is not seen."""
    versions = [(p, p._version) for p in parameters]

    def checked(*arguments: object) -> Result:
        if any(p._version != version for p, version in versions):
            raise RuntimeError("a parameter that this loss was computed with has been changed, by an optimizer's step "
                               "perhaps, before the loss's backward; call backward first, or compute the loss again")
        return run(*arguments)

    return checked
