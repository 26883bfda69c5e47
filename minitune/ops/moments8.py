"""moments8: an optimizer's moments in 8 bits by blocks (Dettmers et al. 2022, arXiv:2110.02861): format, reference.

A moment is cut into blocks of 256 values. A block keeps its largest magnitude (absmax, fp32) and for each value the
number of the nearest of 256 levels ("dynamic tree": decades, finer near the top), with a sign for a mean of gradients,
without one for a mean of their squares. A square that is above 0 never becomes 0: its code is at least 1. Adam divides
by its root, so where one gradient of a block is a thousand times the others, theirs would be divided by almost nothing.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from minitune.errors import InputError
from minitune.ops.transfer import sent

BLOCK = 256
"""Values that share one absmax."""
TINY = 1e-38
"""An absmax below this is taken for this where it divides."""


class Moment8(NamedTuple):
    """codes uint8 [n]; absmax fp32 [ceil(n / 256)]; value = level of the code · absmax of the block."""

    codes: Tensor
    absmax: Tensor
    signed: bool

    def part(self, part: slice) -> Moment8:
        """A run of it, as views; `part` begins at a multiple of 256, and what lies behind its end is another block."""
        return Moment8(self.codes[part], self.absmax[part.start // BLOCK:-(-part.stop // BLOCK)], self.signed)


def zeros(n: int, signed: bool, device: torch.device) -> Moment8:
    """n values, all 0."""
    zero = 127 if signed else 0
    return Moment8(torch.full((n,), zero, dtype=torch.uint8, device=device),
                   torch.zeros(-(-n // BLOCK), dtype=torch.float32, device=device), signed)


def check(op: str, name: str, moment: Moment8, signed: bool, param: Tensor) -> None:
    """InputError unless a moment fits the flat buffer `param` [n]."""
    n = param.numel()
    wanted = {"codes": (torch.uint8, n), "absmax": (torch.float32, -(-n // BLOCK))}
    for field, tensor in (("codes", moment.codes), ("absmax", moment.absmax)):
        dtype, size = wanted[field]
        if (tensor.dtype != dtype or tensor.shape != (size,) or not tensor.is_contiguous()
                or tensor.device != param.device):
            raise InputError(f"{op}: {name}.{field} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; for {n} "
                             f"values it must be a contiguous {dtype} [{size}] on {param.device}")
    if moment.signed != signed:
        raise InputError(f"{op}: {name}.signed is {moment.signed}; it must be {signed}")


def encode_(moment: Moment8, values: Tensor) -> None:
    """Store fp32 [n]: each block's absmax, and of value · (1 / absmax) the nearest level by the midpoints between."""
    n, levels = values.numel(), table(moment.signed, values.device)[0]
    blocks = torch.nn.functional.pad(values, (0, -n % BLOCK)).view(-1, BLOCK)
    moment.absmax.copy_(blocks.abs().amax(1))
    scaled = (blocks * (1 / moment.absmax.clamp(min=TINY))[:, None]).view(-1)[:n].contiguous()
    codes = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    if not moment.signed:
        codes = torch.maximum(codes, (values > 0).int())
    moment.codes.copy_(codes)


def decode(moment: Moment8) -> Tensor:
    """The values, fp32 [n]."""
    n = moment.codes.numel()
    scale = moment.absmax.repeat_interleave(BLOCK)[:n]
    return table(moment.signed, moment.codes.device)[0][moment.codes.int()] * scale


def dynamic_levels(signed: bool) -> Tensor:
    """The 256 levels, fp32, sorted: a decade 10^-6 … 10^0 and a fraction of 0 to 6 bits (1 to 7 where there is no
    sign), linear between 0.1 and 1; beside them stand 0 and 1."""
    values = [0.0, 1.0]
    for bits in range(7):
        bounds = torch.linspace(0.1, 1, 2**(bits + (not signed)) + 1, dtype=torch.float32)
        fractions = ((10 ** (bits - 6)) * ((bounds[:-1] + bounds[1:]) / 2)).tolist()
        values += [*fractions, *(-fraction for fraction in fractions if signed)]
    return torch.tensor(sorted(values), dtype=torch.float32)


@functools.lru_cache(maxsize=16)
def table(signed: bool, device: torch.device) -> Tensor:
    """fp32 [2, 256]: the levels, sorted; and the midpoints between them as a search tree, which the kernel walks down.

    Node k of the tree, from 1 on, has the children 2·k and 2·k + 1, so the 8 th step ends at 256 + the number of
    midpoints below; place 0 is empty.
    """
    levels = dynamic_levels(signed)
    midpoints = (levels[1:] + levels[:-1]) / 2
    tree = torch.zeros(256, dtype=torch.float32)
    for depth in range(8):
        span = 256 >> depth
        tree[1 << depth:2 << depth] = midpoints[span // 2 - 1::span]
    with torch.inference_mode(False):
        return sent(torch.stack((levels, tree)), device)
