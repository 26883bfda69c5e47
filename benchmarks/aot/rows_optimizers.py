"""adamw and sgd: what their kernels are compiled as, and what they may cost."""

from typing import Any

from benchmarks.aot.compile import Row
from minitune.kernels import adamw, sgd
from minitune.kernels.launch import Config

SGD_SCALARS = ["decay", "lr", "momentum"]


def _row(name: str, kernel: Any, config: Config, pointers: dict[str, str], scalars: list[str], scaled: bool,
         constants: dict[str, Any], stores: int | None = None, n: str = "i32:16") -> Row:
    """A flat buffer's parts begin at multiples of 16 elements, and so they end."""
    scale = {"grad_scale": "*fp32:16"} if scaled else {}
    return Row(f"{name}{' scaled' * scaled}", kernel, pointers | scale | {"n": n} | dict.fromkeys(scalars, "fp32"),
               {**config.tiles, **constants, **({} if scaled else {"grad_scale": None})},
               config.options() | {"enable_fp_fusion": False}, config.registers, shared=config.shared, stores=stores,
               exact=True)


def _adamw(scaled: bool, name: str = "adamw", **more: Any) -> Row:
    pointers = dict.fromkeys(("param", "grad", "exp_avg", "exp_avg_sq"), "*fp32:16")
    return _row(name, adamw.adamw, adamw.CONFIGS["adamw"][80], pointers, adamw.SCALARS, scaled, {}, **more)


def _adamw_8bit(scaled: bool) -> Row:
    pointers = (dict.fromkeys(("param", "grad", "mean_absmax", "square_absmax", "signed", "unsigned"), "*fp32:16")
                | dict.fromkeys(("mean_codes", "square_codes"), "*u8:16"))
    return _row("adamw 8bit", adamw.adamw_8bit, adamw.CONFIGS["adamw_8bit"][80], pointers, adamw.SCALARS, scaled, {})


def _sgd(name: str, buffer: bool, first: bool, nesterov: bool) -> Row:
    pointers = dict.fromkeys(("param", "grad", *["momentum_buffer"] * buffer), "*fp32:16")
    constants = {"FIRST": first, "NESTEROV": nesterov, **({} if buffer else {"momentum_buffer": None})}
    return _row(f"sgd {name}", sgd.sgd, sgd.CONFIGS["sgd"][80], pointers, SGD_SCALARS, True, constants, stores=128)


ROWS = [
    _adamw(scaled=False, stores=128),
    _adamw(scaled=True, stores=128),
    _adamw(scaled=True, name="adamw any length", n="i32"),      # narrow, but right
    _adamw_8bit(scaled=False),
    _adamw_8bit(scaled=True),
    _sgd("plain", buffer=False, first=False, nesterov=False),
    _sgd("first", buffer=True, first=True, nesterov=False),
    _sgd("nesterov", buffer=True, first=False, nesterov=True),
]
