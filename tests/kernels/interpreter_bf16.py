"""Triton's interpreter made right for bf16 (casts, arithmetic and tl.dot) and for any numpy.

The stock one (3.6 to 3.9) holds bf16 as numpy's uint16. It cuts fp32 off where it should round to nearest even, and
adds and multiplies the 16-bit patterns as if they were integers. Here bf16 is widened to fp32, computed and rounded.
Still wrong: reductions over bf16 (widen first) and atomics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder


def widen(bits: np.ndarray) -> np.ndarray:
    """The patterns of bf16, uint16 -> fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """fp32 -> the patterns of bf16, rounded to nearest, ties to even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _is_bf16(*handles: Any) -> bool:
    return any(handle.dtype.scalar == tl.bfloat16 for handle in handles)


def _numbers(handle: Any) -> np.ndarray:
    return widen(handle.data) if _is_bf16(handle) else handle.data


def _rounded(values: np.ndarray) -> Any:
    """A result of arithmetic on bf16; comparisons stay what they are."""
    return Handle(values, tl.int1) if values.dtype == np.bool_ else Handle(narrow(values), tl.bfloat16)


def _repair(name: str, repaired: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    setattr(Builder, name, repaired(getattr(Builder, name)))


def _cast(stock: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Any, source: Any, kind: Any, *rounding: Any) -> Any:
        target = kind.scalar
        toward_zero = bool(rounding) and rounding[0] == interpreter._ir.ROUNDING_MODE.RTZ
        if toward_zero or not (_is_bf16(source) or target == tl.bfloat16):
            return stock(self, source, kind, *rounding)
        numbers = _numbers(source)
        if target == tl.bfloat16:
            return Handle(narrow(numbers), target)
        return Handle(numbers.astype(interpreter._get_np_dtype(target)), target)
    return cast


def _elementwise(stock: Callable[..., Any]) -> Callable[..., Any]:
    def compute(self: Any, *operands: Any) -> Any:
        *handles, op = operands
        return _rounded(op(*map(_numbers, handles))) if _is_bf16(*handles) else stock(self, *operands)
    return compute


def _fma(stock: Callable[..., Any]) -> Callable[..., Any]:
    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if not _is_bf16(z):
            return stock(self, x, y, z)
        return _rounded(_numbers(x) * _numbers(y) + _numbers(z))
    return fma


def _dot(stock: Callable[..., Any]) -> Callable[..., Any]:
    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = [Handle(_numbers(x), tl.float32) if _is_bf16(x) else x for x in (a, b)]
        return stock(self, *wide, *rest)
    return dot


def _count_with_any_numpy() -> None:
    """`range` over a tensor asks for its number; numpy 2.4 no longer makes one of an array, as Triton 3.6 does it."""
    stock = interpreter._patch_lang_tensor

    def patch(tensor: Any, *rest: Any) -> None:
        stock(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch


def install() -> None:
    """Once a process, before a kernel runs."""
    if hasattr(Builder, "get_bf16"):
        return
    _count_with_any_numpy()
    for name in ("cast_impl", "create_fp_to_fp"):
        _repair(name, _cast)
    for name in ("binary_op", "unary_op"):
        _repair(name, _elementwise)
    _repair("create_fma", _fma)
    _repair("create_dot", _dot)
    Builder.get_bf16 = lambda self, value: Handle(narrow(np.array([value])), tl.bfloat16)    # 3.6 has none
