"""Rotary embedding in config.json: both generations (rope_theta with rope_scaling, rope_parameters) to Rope and back.

Meanings and defaults follow transformers' modeling_rope_utils.py (5.23).
"""

from __future__ import annotations

from typing import Any

from minitune.checkpoint.fields import integer, mapping, number, only, refuse
from minitune.config import Rope
from minitune.errors import InputError

KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    ),
}
"""The kinds that are supported and, beside type and base, the fields that each reads."""
_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_ORIGINAL = "original_max_position_embeddings"
DEFAULT_THETA = 10_000.0


def read_rope(where: str, config: dict[str, Any], max_positions: int) -> Rope:
    """The rotary embedding of a parsed config.json; ``where`` names the file. Raises InputError.

    Where one thing is said twice, in two generations of fields, both must agree.
    """
    found = []
    for name in ("rope_scaling", "rope_parameters"):
        block = config.get(name)
        if block is not None and mapping(where, name, block):
            found.append(_read_block(where, name, block, config, max_positions))
    if len(found) == 2 and found[0] != found[1]:
        raise InputError(f"{where}: rope_scaling and rope_parameters contradict each other; keep one of them")
    return found[0] if found else _read_block(where, "rope_scaling", {}, config, max_positions)


def _read_block(where: str, name: str, block: dict[str, Any], config: dict[str, Any], max_positions: int) -> Rope:
    kind = _kind(where, name, block)
    for key, value in block.items():
        if value is not None and key not in (*_COMMON, *KINDS[kind], _ORIGINAL):
            known = ", ".join(KINDS[kind]) or "no field of this kind"
            refuse(where, f"{name}.{key}", value, f"rope_type {kind!r} reads {known}")
    only(where, f"{name}.partial_rotary_factor", block.get("partial_rotary_factor"), (None, 1))
    theta = _agreed(where, name, "rope_theta", block, config)
    values: dict[str, Any] = {"theta": DEFAULT_THETA if theta is None else number(where, "rope_theta", theta, 1.0)}
    original = _agreed(where, name, _ORIGINAL, block, config)
    if _ORIGINAL in KINDS[kind]:
        original = max_positions if original is None else integer(where, f"{name}.{_ORIGINAL}", original)
        values["original_max_positions"] = original
    elif original is not None:
        only(where, _ORIGINAL, original, (max_positions,))
    if kind != "default":
        if kind == "yarn" and "factor" in block and block["factor"] is None:  # as DeepSeek writes it
            values["factor"] = max_positions / values["original_max_positions"]
        else:
            values["factor"] = number(where, f"{name}.factor", block.get("factor"))
    if kind == "llama3":
        for key in ("low_freq_factor", "high_freq_factor"):
            values[key] = number(where, f"{name}.{key}", block.get(key))
        if values["high_freq_factor"] <= values["low_freq_factor"]:
            refuse(where, f"{name}.high_freq_factor", values["high_freq_factor"], "it must be above low_freq_factor")
    if kind == "yarn":
        values |= _yarn(where, name, block)
    return Rope(kind=kind, **values)


def _kind(where: str, name: str, block: dict[str, Any]) -> Any:
    said = [(key, block[key]) for key in ("rope_type", "type") if block.get(key) is not None]
    for key, value in said:
        if not isinstance(value, str) or value not in KINDS:
            refuse(where, f"{name}.{key}", value, f"supported: {', '.join(KINDS)}")
        if value != said[0][1]:
            refuse(where, f"{name}.{key}", value, f"but rope_type is {said[0][1]!r}")
    return said[0][1] if said else "default"


def _agreed(where: str, name: str, key: str, block: dict[str, Any], config: dict[str, Any]) -> Any:
    """A value that may stand in the block or at the top level; if in both, the same."""
    inner, outer = block.get(key), config.get(key)
    if inner is not None and outer is not None and inner != outer:
        refuse(where, key, outer, f"but {name}.{key} is {inner!r:.40}; keep one of them")
    return outer if inner is None else inner


def _yarn(where: str, name: str, block: dict[str, Any]) -> dict[str, Any]:
    """The fields of YaRN that are there and not null or zero, which transformers reads as absent."""
    values: dict[str, Any] = {}
    for key in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        if block.get(key) is not None and number(where, f"{name}.{key}", block[key], inclusive=True) > 0:
            values[key] = float(block[key])
        elif key == "attention_factor" and block.get(key) is not None:
            refuse(where, f"{name}.{key}", block[key], "it must be above 0")
    truncate = block.get("truncate", True)
    only(where, f"{name}.truncate", truncate, (True, False))
    return {**values, "truncate": truncate}


def write_rope(rope: Rope, max_positions: int) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling``, the fields that transformers 4 and 5 both read."""
    if rope.kind == "default":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    block: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if _ORIGINAL in KINDS[rope.kind]:
        block[_ORIGINAL] = rope.original_max_positions or max_positions
    elif rope.original_max_positions not in (None, max_positions):
        raise InputError(
            f"rope: original_max_positions is {rope.original_max_positions}, but config.json can only say "
            f"max_positions ({max_positions}) for {rope.kind!r}"
        )
    if rope.kind == "llama3":
        block |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        block |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        optional = {key: getattr(rope, key) for key in ("attention_factor", "mscale", "mscale_all_dim")}
        block |= {key: value for key, value in optional.items() if value is not None}
        if not rope.truncate:
            block["truncate"] = False
    return {"rope_theta": rope.theta, "rope_scaling": block}
