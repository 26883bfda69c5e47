"""sgd_: one SGD step with momentum on a flat buffer, in place: contract, reference and the choice of backend.

Backends: triton (kernels/sgd.py, on a GPU), else PyTorch's own fused step, else the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitune.errors import InputError
from minitune.ops import backends
from minitune.ops.adamw import FUSED_DEVICES, check_flat, check_scale, chunks, unsound


def sgd_(param: Tensor, grad: Tensor, momentum_buffer: Tensor | None, *, lr: float, momentum: float, nesterov: bool,
         weight_decay: float, first: bool, grad_scale: Tensor | None = None) -> None:
    """One step of SGD on flat fp32 buffers [n], in place, with decoupled weight decay (arXiv:1711.05101, algorithm 1).

        grad = grad · grad_scale                                     (in place, as clipping leaves it)
        param -= lr · weight_decay · param
        momentum_buffer = momentum · momentum_buffer + grad          (= grad where `first`: the old content is not read)
        param -= lr · (grad + momentum · momentum_buffer if nesterov else momentum_buffer)

    With momentum 0 the buffer may be None and the step is lr · grad. `grad_scale` is a 0-dim fp32 tensor on the same
    device; where it is NaN the step is not taken, and `grad` alone is written. Momentum as in ``torch.optim.SGD``
    (Sutskever et al. 2013).

    Raises InputError for buffers that break this contract.
    """
    _check("sgd_", param, grad, momentum_buffer, momentum, nesterov, grad_scale)
    if backends.choose("sgd", param.device) == "triton":
        from minitune.kernels import sgd as kernel

        kernel.sgd_(param, grad, momentum_buffer, lr=lr, momentum=momentum, nesterov=nesterov,
                    weight_decay=weight_decay, first=first, grad_scale=grad_scale)
        return
    if param.device.type not in FUSED_DEVICES:
        sgd_reference_(param, grad, momentum_buffer, lr=lr, momentum=momentum, nesterov=nesterov,
                       weight_decay=weight_decay, first=first, grad_scale=grad_scale)
        return
    found_inf = unsound(grad_scale)
    if grad_scale is not None:
        grad.mul_(grad_scale)
    if weight_decay:        # the library's kernel adds its decay to the gradient, so it gets none
        decay = 1 - lr * weight_decay
        param.mul_(decay if found_inf is None else torch.where(found_inf > 0, 1.0, decay))
    buffers = [] if momentum_buffer is None or momentum == 0 else [momentum_buffer]
    torch._fused_sgd_([param], [grad], buffers, weight_decay=0.0, momentum=momentum, lr=lr, dampening=0.0,
                      nesterov=nesterov, maximize=False, is_first_step=first, found_inf=found_inf)


def sgd_reference_(param: Tensor, grad: Tensor, momentum_buffer: Tensor | None, *, lr: float, momentum: float,
                   nesterov: bool, weight_decay: float, first: bool, grad_scale: Tensor | None = None) -> None:
    """The meaning of `sgd_` in plain PyTorch; arguments as there. It asks the device for a scale that is NaN."""
    _check("sgd_reference_", param, grad, momentum_buffer, momentum, nesterov, grad_scale)
    if grad_scale is not None and bool(grad_scale.isnan()):
        grad.mul_(grad_scale)
        return
    for part in chunks(param):
        p, g = param[part], grad[part]
        if grad_scale is not None:
            g.mul_(grad_scale)
        p.mul_(1 - lr * weight_decay)
        if momentum_buffer is None or momentum == 0:
            p.add_(g, alpha=-lr)
            continue
        m = momentum_buffer[part]
        if first:
            m.copy_(g)
        else:
            m.mul_(momentum).add_(g)
        p.add_(g.add(m, alpha=momentum) if nesterov else m, alpha=-lr)


def _check(op: str, param: Tensor, grad: Tensor, momentum_buffer: Tensor | None, momentum: float,
           nesterov: bool, grad_scale: Tensor | None) -> None:
    check_flat(op, param=param, grad=grad, momentum_buffer=momentum_buffer)
    check_scale(op, grad_scale, param.device)
    if momentum and momentum_buffer is None:
        raise InputError(f"{op}: momentum is {momentum} but momentum_buffer is None; give a buffer [{param.numel()}]")
    if nesterov and not momentum:
        raise InputError(f"{op}: nesterov needs a momentum above 0")
