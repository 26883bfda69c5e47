"""adamw_: one AdamW step on a flat buffer, in place: contract, reference and the choice of backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minitune.errors import InputError

CHUNK = 262_144
"""Elements handled at a time by the references on a CPU: 1 MiB of fp32, so that the temporary stays in the cache."""

FUSED_DEVICES = ("cpu", "cuda")
"""Where PyTorch has its one-pass update kernels."""


def check_flat(op: str, **buffers: Tensor | None) -> None:
    """Every buffer that is not None: fp32, one-dimensional, contiguous, as long and on the same device as the first."""
    first: Tensor | None = None
    for name, buffer in buffers.items():
        if buffer is None:
            continue
        first = buffer if first is None else first
        if (buffer.dtype != torch.float32 or buffer.dim() != 1 or not buffer.is_contiguous()
                or buffer.numel() != first.numel() or buffer.device != first.device):
            raise InputError(f"{op}: {name} is {buffer.dtype} {list(buffer.shape)} on {buffer.device}; it must be a "
                             f"flat contiguous torch.float32 [{first.numel()}] on {first.device}")


def chunks(buffer: Tensor) -> list[slice]:
    """The slices in which a reference walks over a flat buffer: CHUNK elements on a CPU, all at once on a GPU."""
    size = CHUNK if buffer.device.type == "cpu" else max(1, buffer.numel())
    return [slice(start, start + size) for start in range(0, buffer.numel(), size)]


def adamw_(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, lr: float, beta1: float, beta2: float,
           eps: float, weight_decay: float, step: int, grad_scale: Tensor | None = None) -> None:
    """One step of AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2) on flat fp32 buffers [n], in place.

        param -= lr · weight_decay · param
        exp_avg, exp_avg_sq = running means of grad and grad², with beta1 and beta2
        param -= lr / (1 - beta1^step) · exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)

    `step` counts from 1. `grad_scale`, a 0-dim fp32 tensor on the same device, is multiplied into `grad` (in place)
    first: clipping without asking the device. The same order of operations as ``torch.optim.AdamW``. The result is
    bitwise repeatable; where buffers are cut at multiples of 16 elements it does not depend on the cut or the threads.

    Raises InputError for buffers that break this contract.
    """
    check_flat("adamw_", param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    if param.device.type not in FUSED_DEVICES:
        adamw_reference_(param, grad, exp_avg, exp_avg_sq, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
                         weight_decay=weight_decay, step=step, grad_scale=grad_scale)
        return
    if grad_scale is not None:
        grad.mul_(grad_scale)
    # One pass over the memory and no temporary: a third of the time of the reference on a CPU, one launch on a GPU.
    steps = torch.full((), float(step), dtype=torch.float32, device=param.device)
    torch._fused_adamw_([param], [grad], [exp_avg], [exp_avg_sq], [], [steps], amsgrad=False, lr=lr, beta1=beta1,
                        beta2=beta2, weight_decay=weight_decay, eps=eps, maximize=False)


def adamw_reference_(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, lr: float, beta1: float,
                     beta2: float, eps: float, weight_decay: float, step: int,
                     grad_scale: Tensor | None = None) -> None:
    """The meaning of `adamw_` in plain PyTorch; arguments as there."""
    check_flat("adamw_reference_", param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    step_size = lr / (1 - beta1**step)
    correction2 = math.sqrt(1 - beta2**step)
    for part in chunks(param):
        p, g, m, v = param[part], grad[part], exp_avg[part], exp_avg_sq[part]
        if grad_scale is not None:
            g.mul_(grad_scale)
        p.mul_(1 - lr * weight_decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.addcdiv_(m, v.sqrt().div_(correction2).add_(eps), value=-step_size)
