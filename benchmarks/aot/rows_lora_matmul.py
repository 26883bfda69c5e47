"""lora_matmul: what its kernels are compiled as, and what they may cost."""

from typing import Any

from benchmarks.aot.compile import ARCHES, Row
from minitune.kernels import lora_matmul
from minitune.kernels.launch import Config


def _config(key: str, arch: int) -> Config:
    configs = lora_matmul.CONFIGS[key]
    return configs[max(known for known in configs if known <= arch)]


def _rows(key: str, kernel: Any, name: str, signature: dict[str, str], constants: dict[str, Any],
          arches: tuple[int, ...], rank: int | None = None) -> list[Row]:
    """One row for all generations that share a configuration."""
    found: dict[str, list[int]] = {}
    for arch in arches:
        found.setdefault(str(_config(key, arch)), []).append(arch)
    rows = []
    for same in found.values():
        config = _config(key, same[0])
        tiles = {**config.tiles, **({} if rank is None else {"BR": lora_matmul._rank_tile(rank, config)})}
        rows.append(Row(f"lora_{name}", kernel, signature, {**constants, **tiles}, config.options(), config.registers,
                        config.shared, tuple(same), matrix="bf16" in next(iter(signature.values()))))
    return rows


def _sizes(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32:16")


def _product(name: str, rank: int, transposed: bool, bias: bool = False, key: str = "product", dtype: str = "bf16",
             arches: tuple[int, ...] = ARCHES, even: bool = True) -> list[Row]:
    present = ["x", "weight", "out"] + ["s", "b"] * (rank > 0) + ["bias"] * bias
    sizes = dict.fromkeys(("K", "N", "x_pitch", "weight_pitch", "out_pitch"), "i32:16" if even else "i32")
    constants = {"R": rank, "TRANSPOSED": transposed, "EVEN_K": even, "EVEN_N": even}
    absent = {name: None for name in ("s", "b", "bias") if name not in present}
    return _rows(key, lora_matmul.lora_product, f"product {name} {dtype} R {rank}{' bias' * bias}",
                 dict.fromkeys(present, f"*{dtype}:16") | sizes | {"T": "i32"}, constants | absent, arches)


def _adapters(key: str, rank: int, transposed: bool, arches: tuple[int, ...] = ARCHES) -> list[Row]:
    kind = "fp32" if "fp32" in key else "bf16"
    signature = {"wide": f"*{kind}:16", "narrow": f"*{kind}:16", "out": "*fp32:16", "T": "i32", "part_steps": "i32"}
    return _rows(key, lora_matmul.lora_adapters, f"{key} {'dA' if transposed else 'dB'} R {rank}",
                 signature | _sizes("C", "pitch"), {"R": rank, "TRANSPOSED": transposed}, arches, rank)


ROWS = [
    *_product("forward", 16, transposed=True),
    *_product("forward", 48, transposed=True, bias=True),
    *_product("forward, rank behind", 4, transposed=True),
    *_product("forward", 0, transposed=True, bias=True, arches=(90,)),
    *_product("backward", 16, transposed=False),
    *_product("backward", 128, transposed=False),
    *_product("forward", 16, transposed=True, key="product_small", dtype="fp32", arches=(80, 90)),
    *_product("forward, ragged", 20, transposed=True, key="product_small", arches=(80, 90), even=False),
    *_adapters("adapters", 16, transposed=True),
    *_adapters("adapters", 48, transposed=False, arches=(80, 90)),
    *_adapters("adapters_wide", 128, transposed=False),
    *_adapters("adapters_fp32", 16, transposed=True, arches=(90,)),
    *_rows("sum", lora_matmul.lora_sum, "sum", {"scratch": "*fp32:16", "out": "*bf16:16", "parts": "i32",
                                                "n": "i32:16"}, {}, (90,)),
]
