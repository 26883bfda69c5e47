"""The ops as torch's dispatcher knows them, torch.ops.minitune.*: opaque to torch.compile, differentiable, functional.

Who imports this file can use them in a compiled program of his own; minitune's own step calls the functions behind them
directly, in place where it may. Each runs whatever backend its op takes. Weights are frozen: they get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minitune.ops import attention, linear_cross_entropy, lora_matmul, rms_norm, rope, swiglu
from minitune.ops.documents import Documents
from minitune.ops.lora_matmul import LoraWeights

_LIBRARY = torch.library.Library("minitune", "FRAGMENT")
OPS = torch.ops.minitune


def _define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"minitune::{name}", fake, lib=_LIBRARY)


def _differentiable(name: str, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    torch.library.register_autograd(f"minitune::{name}", backward, setup_context=setup, lib=_LIBRARY)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _row_scalars(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32))


# ---- rms_norm: the norm of x + branch, 1/rms, the sum ---------------------------------------------------------------
def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2], output[1], inputs[2])
    ctx.mark_non_differentiable(output[1])


def _norm_backward(ctx: Any, dy: Tensor, _: Any, past: Tensor) -> tuple[Any, ...]:
    total, rstd, weight = ctx.saved_tensors
    dx = OPS.rms_norm_backward(dy.contiguous(), total, rstd, weight, past.contiguous())
    return dx, dx, None, None


_define("rms_norm(Tensor x, Tensor branch, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
        lambda x, branch, weight, eps: rms_norm.forward(x, weight, eps, branch),
        lambda x, branch, weight, eps: (_like(x), _row_scalars(x), torch.empty_like(x)))
_define("rms_norm_backward(Tensor dy, Tensor x, Tensor rstd, Tensor weight, Tensor past) -> Tensor",
        lambda dy, x, rstd, weight, past: rms_norm.backward(dy, x, rstd, weight, past),
        lambda dy, x, rstd, weight, past: _like(x))
_differentiable("rms_norm", _norm_setup, _norm_backward)


# ---- swiglu ---------------------------------------------------------------------------------------------------------
def _half_width(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)


_define("swiglu(Tensor gate_up) -> Tensor", swiglu.forward, _half_width)
_define("swiglu_backward(Tensor dh, Tensor gate_up) -> Tensor",
        lambda dh, gate_up: swiglu.backward(dh.clone(), gate_up)[0], lambda dh, gate_up: torch.empty_like(gate_up))
_differentiable("swiglu", lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
                lambda ctx, dh: OPS.swiglu_backward(dh.contiguous(), *ctx.saved_tensors))


# ---- rope -----------------------------------------------------------------------------------------------------------
def _rope_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.back = inputs[3]


_define("rope(Tensor x, Tensor cos, Tensor sin, bool back=False) -> Tensor",
        lambda x, cos, sin, back=False: rope.rotate_(x.clone(memory_format=torch.contiguous_format), cos, sin,
                                                     back=back),
        lambda x, cos, sin, back=False: _like(x))
_differentiable("rope", _rope_setup, lambda ctx, dy: (OPS.rope(dy, *ctx.saved_tensors, not ctx.back), None, None, None))


# ---- attention: the output and its log-sum-exp, which is empty where no kernel of ours ran ---------------------------
def _attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, lengths: list[int],
               window: int | None) -> tuple[Tensor, Tensor]:
    out, saved = attention.forward(q, k, v, Documents(cu_seqlens, tuple(lengths)), window, needs_backward=False)
    return out.contiguous(), q.new_empty(0, dtype=torch.float32) if saved.lse is None else saved.lse


def _attention_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor,
                        lengths: list[int], window: int | None) -> Tensor:
    saved = attention.Saved(q, k, v, Documents(cu_seqlens, tuple(lengths)), window, None, out, lse)
    if not lse.numel():     # the library's way keeps a graph, which no op can return
        saved = attention.forward(q, k, v, saved.documents, window)[1]
    gradient = _side_by_side(q, k)
    attention.backward(dout, saved, gradient)
    return gradient


def _side_by_side(q: Tensor, k: Tensor) -> Tensor:
    return q.new_empty(len(q), q.shape[1] + 2 * k.shape[1], q.shape[2])


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, lengths: list[int],
                    window: int | None) -> tuple[Tensor, Tensor]:
    ours = attention.backend(q, k, max(lengths), window) == "triton"
    return _like(q), q.new_empty((q.shape[1], len(q)) if ours else 0, dtype=torch.float32)


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, inputs[3])
    ctx.lengths, ctx.window = inputs[4:]
    ctx.mark_non_differentiable(output[1])


def _attention_gradients(ctx: Any, dout: Tensor, _: Any) -> tuple[Any, ...]:
    q, k, *_ = ctx.saved_tensors
    gradient = OPS.attention_backward(dout.contiguous(), *ctx.saved_tensors, ctx.lengths, ctx.window)
    return *gradient.split((q.shape[1], k.shape[1], k.shape[1]), dim=1), None, None, None


_define("attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int[] lengths, int? window=None)"
        " -> (Tensor, Tensor)", _attention, _attention_fake)
_define("attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens, "
        "int[] lengths, int? window=None) -> Tensor", _attention_backward,
        lambda dout, q, k, v, out, lse, cu_seqlens, lengths, window=None: _side_by_side(q, k))
_differentiable("attention", _attention_setup, _attention_gradients)


# ---- linear_cross_entropy: the losses, and d loss / d hidden of each token -------------------------------------------
def _losses(hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    losses, gradient = linear_cross_entropy.losses_and_gradient(hidden, weight, labels, smoothing, gradient=True)
    assert gradient is not None
    return losses, gradient


def _losses_backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Any, ...]:
    (gradient,) = ctx.saved_tensors
    return (gradient * upstream[:, None]).to(gradient.dtype), None, None, None


def _losses_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


_define("linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, float smoothing=0.0) -> (Tensor, Tensor)",
        _losses, lambda hidden, weight, labels, smoothing=0.0: (_row_scalars(hidden)[:, 0].contiguous(),
                                                                torch.empty_like(hidden)))
_differentiable("linear_cross_entropy", _losses_setup, _losses_backward)


# ---- lora_matmul: y and S; b carries the scale ----------------------------------------------------------------------
def _lora(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    y, s = lora_matmul.forward(x, LoraWeights(weight, bias, a, b))
    assert s is not None
    return y, s


def _lora_backward(dy: Tensor, x: Tensor, s: Tensor, weight: Tensor, a: Tensor,
                   b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    w = LoraWeights(weight, None, a, b)
    ds = lora_matmul.backward_s(dy, w)
    assert ds is not None
    da, db = lora_matmul.backward_adapters(dy, x, s, ds, w)
    return lora_matmul.backward_input(dy, ds, w), da.to(a.dtype), db.to(b.dtype).contiguous()


def _lora_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, a, b = inputs
    ctx.save_for_backward(x, output[1], weight, a, b)
    ctx.mark_non_differentiable(output[1])


def _lora_gradients(ctx: Any, dy: Tensor, _: Any) -> tuple[Any, ...]:
    dx, da, db = OPS.lora_matmul_backward(dy.contiguous(), *ctx.saved_tensors)
    return dx, None, None, da, db


_define("lora_matmul(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b) -> (Tensor, Tensor)", _lora,
        lambda x, weight, bias, a, b: (x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(a))))
_define("lora_matmul_backward(Tensor dy, Tensor x, Tensor s, Tensor weight, Tensor a, Tensor b)"
        " -> (Tensor, Tensor, Tensor)", _lora_backward,
        lambda dy, x, s, weight, a, b: (x.new_empty(x.shape), a.new_empty(a.shape), b.new_empty(b.shape)))
_differentiable("lora_matmul", _lora_setup, _lora_gradients)
