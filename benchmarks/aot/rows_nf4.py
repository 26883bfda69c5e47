"""nf4: what its kernels are compiled as, and what they may cost."""

from typing import Any

from benchmarks.aot.compile import SPILLS, Row
from minitune.kernels import nf4

NF4 = {"packed": "*u8:16", "table": "*fp32:16"}
PLAIN = {"absmax": "*fp32:16"}
NESTED = {"absmax": "*u8:16", "nested_absmax": "*fp32:16", "nested_code": "*fp32:16", "nested_offset": "*fp32:16"}
NO_NESTED = {"nested_absmax": None, "nested_code": None, "nested_offset": None}
UNFUSED = (*SPILLS, "FFMA", "FFMA2")
"""A fused multiply-add in the nested absmax would change the bits."""


def _nf4(key: str, name: str, signature: dict[str, str], constants: dict[str, Any], **checks: Any) -> Row:
    config = nf4.CONFIGS[key]
    return Row(f"nf4_{key} {name}", getattr(nf4, f"nf4_{key}"), NF4 | signature, {"TILE": config.tile, **constants},
               config.options(), config.registers, shared=config.shared, exact=True, **checks)


def _dequantize(out: str, nested: bool, pitched: bool, values: int = 64) -> Row:
    signature = (NESTED if nested else PLAIN) | {"out": f"*{out}:16", "segments": "i32", "row_segments": "i32",
                                                 "pitch": "i32:16"}
    constants = {"VALUES": values, "PER_BLOCK": 1, "PITCHED": pitched, **({} if nested else NO_NESTED)}
    name = f"{out}{' nested' * nested}{' pitched' * pitched} {values}"
    return _nf4("dequantize", name, signature, constants, lacks=UNFUSED, stores=128)


def _dequantize_any(out: str) -> Row:
    sizes = dict.fromkeys(("start", "columns", "row_tiles", "pitch"), "i32")
    return _nf4("dequantize_any", f"{out} nested", NESTED | {"out": f"*{out}:16"} | sizes, {"BLOCKSIZE": 64},
                lacks=UNFUSED)


def _quantize(values: str, blocksize: int, last: bool) -> Row:
    signature = PLAIN | {"values": f"*{values}:16", "block": "i32", "n": "i32"}
    tile = 1 if last else max(1, nf4.CONFIGS["quantize"].tile // blocksize)
    return _nf4("quantize", f"{values} {blocksize}{' last' * last}", signature,
                {"BLOCKSIZE": blocksize, "LAST": last, "TILE": tile})


ROWS = [
    _dequantize("bf16", nested=True, pitched=False),
    _dequantize("bf16", nested=True, pitched=True),
    _dequantize("bf16", nested=False, pitched=False, values=32),
    _dequantize("fp16", nested=False, pitched=True),
    _dequantize("fp32", nested=True, pitched=False),
    _dequantize_any("bf16"),
    _quantize("bf16", 64, last=False),
    _quantize("fp32", 4096, last=False),
    _quantize("fp32", 64, last=True),
]
