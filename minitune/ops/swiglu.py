"""swiglu: silu(gate) · up (Shazeer 2020, arXiv:2002.05202), gate and up side by side in one tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2·f], gate first -> [T, f] in the same dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def forward(gate_up: Tensor) -> Tensor:
    """The same without autograd's book-keeping."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def backward(dh: Tensor, gate_up: Tensor) -> Tensor:
    """dh [T, f] -> d(gate_up) [T, 2·f].

    d up = dh·silu(gate); d gate = dh·up·silu'(gate). `dh` serves as scratch: it must not be used afterwards.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    gradient = torch.empty_like(gate_up)
    d_gate, d_up = gradient.chunk(2, dim=-1)
    torch.mul(F.silu(gate), dh, out=d_up)
    torch.ops.aten.silu_backward.grad_input(dh.mul_(up), gate, grad_input=d_gate)
    return gradient
