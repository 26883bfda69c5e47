"""rms_norm, swiglu, rope: what their kernels are compiled as, and what they may cost."""

from typing import Any

from benchmarks.aot.compile import Row
from minitune.kernels import rms_norm, rope, swiglu

POINTER, SIZE = "*bf16:16", "i32:16"
"""Buffers of torch start, and rows of real models lie, at multiples of 16."""


def _pointers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, POINTER)


def _norm(key: str, name: str, d: int, heads: int, pitches: tuple[str, ...], signature: dict[str, str],
          constants: dict[str, Any], **checks: Any) -> Row:
    config = rms_norm.CONFIGS[key][80]
    tiles, options = rms_norm.row_tiles(config, d)
    sizes = {"rstd": "*fp32:16", "rows": "i32", **{f"{pitch}_pitch": SIZE for pitch in pitches}}
    return Row(f"rms_norm_{key} {name} {d}", getattr(rms_norm, f"rms_norm_{key}"), {**signature, **sizes},
               {"HEADS": heads, "D": d, **tiles, **constants}, options, config.registers, config.shared, **checks)


def _norm_forward(name: str, d: int, residual: bool = False, stored: bool = False, heads: int = 1) -> Row:
    signature = _pointers("x", "weight", "y", *(("residual", "total") if residual else ())) | {"eps": "fp32"}
    without = {} if residual else {"residual": None, "total": None, "residual_pitch": None}
    return _norm("forward", name, d, heads, ("x", "residual", "y") if residual else ("x", "y"), signature,
                 {"APPLY": stored, **without}, stores=128 if stored else None)      # 32 bits each: rstd


def _norm_s(rank: int, residual: bool) -> Row:
    config = rms_norm.CONFIGS["forward_s"][80]
    names = ("x", "weight", "a", "y", "s", *(("residual", "total") if residual else ()))
    pitches = dict.fromkeys(("x_pitch", "y_pitch", *(("residual_pitch",) if residual else ())), SIZE)
    without = {} if residual else {"residual": None, "total": None, "residual_pitch": None}
    return Row(f"rms_norm_forward_s 4096, R {rank}{' residual' * residual}", rms_norm.rms_norm_forward_s,
               _pointers(*names) | pitches | {"rstd": "*fp32:16", "rows": "i32", "eps": "fp32"},
               {"D": 4096, "R": rank, "RANK": rms_norm.rank_tile(rank), **config.tiles, **without}, config.options(),
               config.registers, config.shared, matrix=True)


def _norm_backward(name: str, d: int, residual: bool = False, heads: int = 1) -> Row:
    past = ("residual",) if residual else ()
    without = {} if residual else {"residual": None, "residual_pitch": None}
    return _norm("backward", name, d, heads, ("dy", "x", "dx", *past), _pointers("dy", "x", "weight", "dx", *past),
                 without, stores=128)


def _norm_weight(name: str, d: int, heads: int = 1) -> Row:
    return _norm("backward_weight", name, d, heads, ("dy", "x"),
                 _pointers("dy", "x") | {"partial": "*fp32:16", "tiles_each": "i32"}, {},
                 stores=128 if heads == 1 else None)        # heads: a sum of 32 bits each


def _swiglu(key: str, f: int, names: tuple[str, ...], **constants: Any) -> Row:
    config = swiglu.CONFIGS[key][80]
    signature = _pointers(*names) | {f"{name}_pitch": SIZE for name in names}
    return Row(f"swiglu_{key} {f}{' without h' * bool(constants)}", getattr(swiglu, f"swiglu_{key}"), signature,
               {"F": f, **config.tiles, **constants}, config.options(), config.registers, config.shared, stores=128)


def _rope(heads: int, head_dim: int) -> Row:
    config = rope.CONFIGS["rotate"][80]
    return Row(f"rope_rotate {heads} x {head_dim}", rope.rope_rotate,
               {"x": POINTER, "cos": "*fp32:16", "sin": "*fp32:16", "tokens": "i32", "pitch": SIZE},
               {"BACK": False, "HEADS": heads, "HALF": head_dim // 2,
                **rope.rotate_tiles(config, heads, head_dim // 2)},
               config.options(), config.registers, config.shared, stores=128)


def _rope_join(heads: int, kv_heads: int, head_dim: int) -> Row:
    config, names = rope.CONFIGS["join"][80], ("q", "k", "v", "out")
    sizes = dict.fromkeys(("q_pitch", "k_pitch", "v_pitch", "pitch"), SIZE)
    return Row(f"rope_join {heads}/{kv_heads} x {head_dim}", rope.rope_join,
               _pointers(*names) | {"cos": "*fp32:16", "sin": "*fp32:16", "tokens": "i32"} | sizes,
               {"BACK": True, "HEADS": heads, "KV_HEADS": kv_heads, "HALF": head_dim // 2,
                **rope.rotate_tiles(config, heads, head_dim // 2)},
               config.options(), config.registers, config.shared, stores=128)


ROWS = [
    _norm_forward("residual", 4096, residual=True),
    _norm_forward("residual", 16384, residual=True),
    _norm_forward("heads", 128, heads=32),
    _norm_forward("apply", 3584, stored=True),
    _norm_s(48, True),
    _norm_s(128, True),
    _norm_s(32, False),
    _norm_backward("residual", 4096, residual=True),
    _norm_backward("residual", 16384, residual=True),
    _norm_backward("heads", 128, heads=32),
    _norm_weight("rows", 4096),
    _norm_weight("heads", 128, heads=32),
    _swiglu("forward", 11008, ("gate_up", "h")),
    _swiglu("backward", 18944, ("dh", "gate_up", "gradient", "h")),
    _swiglu("backward", 14336, ("dh", "gate_up", "gradient"), h=None, h_pitch=None),
    _rope(40, 128),
    _rope(40, 80),
    _rope_join(32, 8, 128),
]
