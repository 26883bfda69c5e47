"""adamw_: one AdamW step on a flat buffer, in place, its moments in fp32 or in 8 bits: contract, reference, backend.

Backends: triton (kernels/adamw.py, on a GPU); else for moments in fp32 PyTorch's own fused step, for those in 8 bits on
a CPU native (csrc/adamw_8bit_kernels.h); else the reference.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minitune.errors import InputError
from minitune.ops import backends, moments8
from minitune.ops.moments8 import Moment8
from minitune.ops.versions import written

CHUNK = 262_144
"""Elements handled at a time by the references on a CPU: 1 MiB of fp32, so that the temporary stays in the cache."""

GPU_CHUNK = 16_777_216
"""The same on a GPU: 64 MiB, so that temporaries take no memory to speak of, in few launches."""

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


def check_scale(op: str, grad_scale: Tensor | None, device: torch.device) -> None:
    """InputError unless it is None or fp32, of one element, on `device`."""
    if grad_scale is not None and (grad_scale.dtype != torch.float32 or grad_scale.dim() != 0
                                   or grad_scale.device != device):
        raise InputError(f"{op}: grad_scale is {grad_scale.dtype} {list(grad_scale.shape)} on {grad_scale.device}; it "
                         f"must be a torch.float32 [] on {device}")


def unsound(grad_scale: Tensor | None) -> Tensor | None:
    """What tells PyTorch's fused steps not to be taken: 1.0 where the scale is NaN, on its device."""
    return None if grad_scale is None else grad_scale.isnan().float()


def chunks(buffer: Tensor) -> list[slice]:
    """The slices in which a reference walks over a flat buffer, multiples of 256 elements but for the last."""
    size = CHUNK if buffer.device.type == "cpu" else GPU_CHUNK
    return [slice(start, min(start + size, buffer.numel())) for start in range(0, buffer.numel(), size)]


# ---- moments in fp32 ------------------------------------------------------------------------------------------------
def adamw_(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, lr: float, beta1: float, beta2: float,
           eps: float, weight_decay: float, step: int, grad_scale: Tensor | None = None) -> None:
    """One step of AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2) on flat fp32 buffers [n], in place.

        grad = grad · grad_scale                                       (in place, as clipping leaves it)
        param -= lr · weight_decay · param
        exp_avg, exp_avg_sq = running means of grad and grad², with beta1 and beta2
        param -= lr / (1 - beta1^step) · exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)

    `step` counts from 1. `grad_scale` is a 0-dim fp32 tensor on the same device: clipping without asking the device.
    Where it is NaN the step is not taken: `param` and the moments stay as they are, `grad` is NaN. The results are
    those of ``torch.optim.AdamW`` to a few ulp and bitwise repeatable; where buffers are cut at multiples of 16
    elements they do not depend on the cut or the threads.

    Raises InputError for buffers that break this contract.
    """
    check_flat("adamw_", param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    check_scale("adamw_", grad_scale, param.device)
    if backends.choose("adamw", param.device) == "triton":
        from minitune.kernels import adamw as kernel

        kernel.adamw_(param, grad, exp_avg, exp_avg_sq, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
                      weight_decay=weight_decay, step=step, grad_scale=grad_scale)
        return
    if param.device.type not in FUSED_DEVICES:
        adamw_reference_(param, grad, exp_avg, exp_avg_sq, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
                         weight_decay=weight_decay, step=step, grad_scale=grad_scale)
        return
    if grad_scale is not None:
        grad.mul_(grad_scale)
    # One pass over the memory and no temporary: a third of the time of the reference on a CPU.
    steps = torch.full((), float(step), dtype=torch.float32, device=param.device)
    torch._fused_adamw_([param], [grad], [exp_avg], [exp_avg_sq], [], [steps], amsgrad=False, lr=lr, beta1=beta1,
                        beta2=beta2, weight_decay=weight_decay, eps=eps, maximize=False, found_inf=unsound(grad_scale))


def adamw_reference_(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, lr: float, beta1: float,
                     beta2: float, eps: float, weight_decay: float, step: int,
                     grad_scale: Tensor | None = None) -> None:
    """The meaning of `adamw_` in plain PyTorch; arguments as there. It asks the device for a scale that is NaN."""
    check_flat("adamw_reference_", param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    check_scale("adamw_reference_", grad_scale, param.device)
    if grad_scale is not None and bool(grad_scale.isnan()):
        grad.mul_(grad_scale)
        return
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


# ---- moments in 8 bits ----------------------------------------------------------------------------------------------
def adamw_8bit_(param: Tensor, grad: Tensor, exp_avg: Moment8, exp_avg_sq: Moment8, *, lr: float, beta1: float,
                beta2: float, eps: float, weight_decay: float, step: int, grad_scale: Tensor | None = None) -> None:
    """`adamw_` with both moments in 8 bits by blocks of 256 (ops/moments8.py; arXiv:2110.02861), in place.

    The moments are decoded, moved on and used in fp32; then they are encoded anew. They have the same bits on every
    backend, since each operation is rounded by itself; in parameters a square root may differ in its last bit.
    Cutting the buffers at multiples of 256 elements changes nothing. A `grad_scale` of NaN takes no step here either.

    Raises InputError for buffers that break this contract.
    """
    _check_8bit("adamw_8bit_", param, grad, exp_avg, exp_avg_sq, grad_scale)
    backend = backends.choose("adamw_8bit", param.device)
    if backend == "reference":
        adamw_8bit_reference_(param, grad, exp_avg, exp_avg_sq, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
                              weight_decay=weight_decay, step=step, grad_scale=grad_scale)
        return
    tensors = (param, grad, *exp_avg[:2], *exp_avg_sq[:2], moments8.table(True, param.device),
               moments8.table(False, param.device))
    if backend == "native":
        if grad_scale is not None and bool(grad_scale.isnan()):
            grad.mul_(grad_scale)
            return
        torch.ops.minitune.rows_adamw_8bit(
            *tensors, beta1, beta2, eps, 1 - lr * weight_decay, 1 / math.sqrt(1 - beta2**step),
            lr / (1 - beta1**step), None if grad_scale is None else float(grad_scale))
        written(param, grad)
        return
    from minitune.kernels import adamw as kernel

    kernel.adamw_8bit_(*tensors, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
                       step=step, grad_scale=grad_scale)


def adamw_8bit_reference_(param: Tensor, grad: Tensor, exp_avg: Moment8, exp_avg_sq: Moment8, *, lr: float,
                          beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
                          grad_scale: Tensor | None = None) -> None:
    """The meaning of `adamw_8bit_` in plain PyTorch, which defines the bits of the moments; arguments as there."""
    _check_8bit("adamw_8bit_reference_", param, grad, exp_avg, exp_avg_sq, grad_scale)
    if grad_scale is not None and bool(grad_scale.isnan()):
        grad.mul_(grad_scale)
        return
    step_size = lr / (1 - beta1**step)
    root_scale = 1 / math.sqrt(1 - beta2**step)
    for part in chunks(param):
        p, g, first, second = param[part], grad[part], exp_avg.part(part), exp_avg_sq.part(part)
        if grad_scale is not None:
            g.mul_(grad_scale)
        # No addcmul_ or add_(alpha=…): where those fuse a multiply-add the bits would depend on the machine.
        m = moments8.decode(first).mul_(beta1).add_(g * (1 - beta1))
        v = moments8.decode(second).mul_(beta2).add_((g * (1 - beta2)).mul_(g))
        p.mul_(1 - lr * weight_decay).sub_((m / v.sqrt().mul_(root_scale).add_(eps)).mul_(step_size))
        moments8.encode_(first, m)
        moments8.encode_(second, v)


def _check_8bit(op: str, param: Tensor, grad: Tensor, exp_avg: Moment8, exp_avg_sq: Moment8,
                grad_scale: Tensor | None) -> None:
    check_flat(op, param=param, grad=grad)
    check_scale(op, grad_scale, param.device)
    moments8.check(op, "exp_avg", exp_avg, True, param)
    moments8.check(op, "exp_avg_sq", exp_avg_sq, False, param)
