"""The ops as torch's dispatcher knows them, torch.ops.minitune.*: opaque to torch.compile, differentiable, functional.

Who imports this file can use them in a compiled program of his own; minitune's own step calls the functions behind them
directly, in place where it may. Each runs whatever backend its op takes. Weights are frozen here: they get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from minitune.errors import InputError
from minitune.ops import attention, linear_cross_entropy, lora_matmul, rms_norm, rope, swiglu
from minitune.ops.documents import Documents
from minitune.ops.lora_matmul import LoraWeights
from minitune.ops.once import once

_LIBRARY = torch.library.Library("minitune", "FRAGMENT")
OPS = torch.ops.minitune


def _define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"minitune::{name}", fake, lib=_LIBRARY)


def _differentiable(name: str, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    torch.library.register_autograd(f"minitune::{name}", once(backward), setup_context=setup, lib=_LIBRARY)


def _operands(op: str, **given: Tensor | None) -> Iterator[Tensor]:
    """The tensors, their rows contiguous, since kernels go by addresses: InputError unless all lie on the first one's
    device. None is left out."""
    first = next(iter(given.values()))
    for name, x in given.items():
        if x is None:
            continue
        assert first is not None
        if x.device != first.device:
            raise InputError(f"torch.ops.minitune.{op}: {name} lies on {x.device}, {next(iter(given))} on "
                             f"{first.device}; move them together")
        yield x if x.stride(-1) == 1 and (x.dim() < 3 or x.stride(-2) == x.shape[-1]) else x.contiguous()


def _one_dtype(op: str, **given: Tensor | None) -> None:
    """InputError unless all that are there have the first one's dtype."""
    kinds = {name: x.dtype for name, x in given.items() if x is not None}
    if len(set(kinds.values())) > 1:
        raise InputError(f"torch.ops.minitune.{op}: the dtypes are {', '.join(f'{n} {k}' for n, k in kinds.items())}; "
                         "they must be one")


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


def _norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _one_dtype("rms_norm", x=x, branch=branch)
    x, branch, weight = _operands("rms_norm", x=x, branch=branch, weight=weight)
    return rms_norm.forward(x, weight, eps, branch)


def _norm_gradient(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, past: Tensor) -> Tensor:
    _one_dtype("rms_norm_backward", dy=dy, x=x, past=past)
    dy, x, weight, past = _operands("rms_norm_backward", dy=dy, x=x, weight=weight, past=past)
    return rms_norm.backward(dy, x, rstd.contiguous(), weight, past)


_define("rms_norm(Tensor x, Tensor branch, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)", _norm,
        lambda x, branch, weight, eps: (_like(x), _row_scalars(x), torch.empty_like(x)))
_define("rms_norm_backward(Tensor dy, Tensor x, Tensor rstd, Tensor weight, Tensor past) -> Tensor",
        _norm_gradient, lambda dy, x, rstd, weight, past: _like(x))
_differentiable("rms_norm", _norm_setup, _norm_backward)


# ---- swiglu ---------------------------------------------------------------------------------------------------------
def _half_width(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)


def _swiglu_gradient(dh: Tensor, gate_up: Tensor) -> Tensor:
    _one_dtype("swiglu_backward", dh=dh, gate_up=gate_up)
    dh, gate_up = _operands("swiglu_backward", dh=dh, gate_up=gate_up)
    return swiglu.backward(dh.clone(), gate_up, out=_like(gate_up))[0]      # dh is scratch there


_define("swiglu(Tensor gate_up) -> Tensor", lambda gate_up: swiglu.forward(*_operands("swiglu", gate_up=gate_up)),
        _half_width)
_define("swiglu_backward(Tensor dh, Tensor gate_up) -> Tensor", _swiglu_gradient, lambda dh, gate_up: _like(gate_up))
_differentiable("swiglu", lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
                lambda ctx, dh: OPS.swiglu_backward(dh.contiguous(), *ctx.saved_tensors))


# ---- rope -----------------------------------------------------------------------------------------------------------
def _rope_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.back = inputs[3]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    _one_dtype("rope", cos=cos, sin=sin)
    _, cos, sin = _operands("rope", x=x, cos=cos, sin=sin)
    turned = x.clone(memory_format=torch.contiguous_format)
    return rope.rotate_(turned, cos.contiguous(), sin.contiguous(), back=back)


_define("rope(Tensor x, Tensor cos, Tensor sin, bool back=False) -> Tensor", _rotated,
        lambda x, cos, sin, back=False: _like(x))
_differentiable("rope", _rope_setup, lambda ctx, dy: (OPS.rope(dy, *ctx.saved_tensors, not ctx.back), None, None, None))


# ---- attention: the output and its log-sum-exp, which is empty where none is kept ------------------------------------
def _attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, lengths: list[int],
               window: int | None = None) -> tuple[Tensor, Tensor]:
    _one_dtype("attention", q=q, k=k, v=v)
    q, k, v, _ = _operands("attention", q=q, k=k, v=v, cu_seqlens=cu_seqlens)
    if cu_seqlens.dtype != torch.int32 or len(cu_seqlens) != len(lengths) + 1 or sum(lengths) != len(q):
        raise InputError(f"torch.ops.minitune.attention: cu_seqlens is {cu_seqlens.dtype} [{len(cu_seqlens)}] and "
                         f"lengths are {len(lengths)} that add up to {sum(lengths)}, for {len(q)} tokens; give int32 "
                         "[documents + 1], and lengths that add up to the tokens")
    out, saved = attention.forward(q, k, v, Documents(cu_seqlens, tuple(lengths)), window, needs_backward=False)
    return out.contiguous(), q.new_empty(0, dtype=torch.float32) if saved.lse is None else saved.lse


def _attention_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor,
                        lengths: list[int], window: int | None = None) -> Tensor:
    _one_dtype("attention_backward", dout=dout, q=q, k=k, v=v, out=out)
    dout, q, k, v, out = _operands("attention_backward", dout=dout, q=q, k=k, v=v, out=out)
    saved = attention.Saved(q, k, v, Documents(cu_seqlens, tuple(lengths)), window, None, out, lse)
    if not lse.numel():     # a way that keeps a graph, which no op can return, or blocks, which keep nothing
        saved = attention.forward(q, k, v, saved.documents, window)[1]
    gradient = _side_by_side(q, k)
    attention.backward(dout, saved, gradient)
    return gradient


def _side_by_side(q: Tensor, k: Tensor) -> Tensor:
    return q.new_empty(len(q), q.shape[1] + 2 * k.shape[1], q.shape[2])


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, lengths: list[int],
                    window: int | None = None) -> tuple[Tensor, Tensor]:
    way = attention.forward_way(q, k, Documents(cu_seqlens, tuple(lengths)), window)
    kept = way in ("native", "triton", "flash", "cudnn")
    return _like(q), q.new_empty((q.shape[1], len(q)) if kept else 0, dtype=torch.float32)


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
    _one_dtype("linear_cross_entropy", hidden=hidden, weight=weight)
    hidden, weight, labels = _operands("linear_cross_entropy", hidden=hidden, weight=weight, labels=labels)
    if labels.dtype != torch.int64 or labels.shape != hidden.shape[:1]:
        raise InputError(f"torch.ops.minitune.linear_cross_entropy: labels is {labels.dtype} {list(labels.shape)}; it "
                         f"must be torch.int64 [{len(hidden)}]")
    losses, gradient = linear_cross_entropy.losses_and_gradient(hidden, weight, labels, smoothing, gradient=True)
    assert gradient is not None
    return losses, gradient


def _losses_backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Any, ...]:
    (gradient,) = ctx.saved_tensors
    return linear_cross_entropy.weighed(gradient, upstream), None, None, None


def _losses_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


_define("linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, float smoothing=0.0) -> (Tensor, Tensor)",
        _losses, lambda hidden, weight, labels, smoothing=0.0: (_row_scalars(hidden)[:, 0].contiguous(),
                                                                torch.empty_like(hidden)))
_differentiable("linear_cross_entropy", _losses_setup, _losses_backward)


# ---- lora_matmul: y and S; b carries the scale ----------------------------------------------------------------------
def _lora(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    _one_dtype("lora_matmul", x=x, weight=weight, bias=bias, a=a, b=b)
    x, weight, a, b, *rest = _operands("lora_matmul", x=x, weight=weight, a=a.contiguous(), b=b.contiguous(), bias=bias)
    bias = rest[0] if rest else None
    y, s = lora_matmul.forward(x, LoraWeights(weight, bias, a, b))
    assert s is not None
    return y, s


def _lora_backward(dy: Tensor, x: Tensor, s: Tensor, weight: Tensor, a: Tensor,
                   b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _one_dtype("lora_matmul_backward", dy=dy, x=x, s=s, weight=weight, a=a, b=b)
    dy, x, s, weight, a, b = _operands("lora_matmul_backward", dy=dy, x=x, s=s.contiguous(), weight=weight,
                                       a=a.contiguous(), b=b.contiguous())
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
