"""swiglu: silu(gate) · up (Shazeer 2020, arXiv:2002.05202), gate and up side by side in one tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minitune.ops import backends
from minitune.ops.versions import written


def reference(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2·f], gate first -> [T, f] in the same dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def forward(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The same without autograd's book-keeping, in `out` [T, f] where that is given."""
    if backends.choose("swiglu", gate_up.device, dtype=gate_up.dtype) == "triton":
        written(out)
        from minitune.kernels import swiglu as kernel

        return kernel.forward(gate_up, out=out)
    if backends.by_rows("swiglu", gate_up):
        h = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2) if out is None else out
        torch.ops.minitune.rows_swiglu(gate_up, h)
        written(out)
        return h
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up) if out is None else torch.mul(F.silu(gate), up, out=out)


def backward(dh: Tensor, gate_up: Tensor, *, want_h: bool = False, overwrite: bool = False,
             out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """dh [T, f] -> (d(gate_up) [T, 2·f], h [T, f] with `forward`'s bits where it is wanted).

    d up = dh·silu(gate); d gate = dh·up·silu'(gate). `dh` serves as scratch: it must not be used afterwards. With
    ``overwrite`` the gradient may take gate_up's place; else it lies in `out` [T, 2·f] where that is given.
    """
    if backends.choose("swiglu", dh.device, dtype=dh.dtype) == "triton":
        from minitune.kernels import swiglu as kernel

        gradient = kernel.backward(dh, gate_up, gradient=gate_up if overwrite else out,
                                   h=dh if want_h else None)
        written(gate_up if overwrite else out, dh if want_h else None)
        return gradient, dh if want_h else None
    if backends.by_rows("swiglu", gate_up):
        gradient = gate_up if overwrite else torch.empty_like(gate_up) if out is None else out
        torch.ops.minitune.rows_swiglu_backward(dh, gate_up, gradient, dh if want_h else None)
        written(gate_up if overwrite else out, dh if want_h else None)
        return gradient, dh if want_h else None
    gate, up = gate_up.chunk(2, dim=-1)
    gradient = torch.empty_like(gate_up) if out is None else out
    d_gate, d_up = gradient.chunk(2, dim=-1)
    silu = F.silu(gate)
    torch.mul(silu, dh, out=d_up)
    torch.ops.aten.silu_backward.grad_input(dh.mul_(up), gate, grad_input=d_gate)
    return gradient, silu.mul_(up) if want_h else None
