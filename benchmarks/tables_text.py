"""Pieces of which the tables are made: markdown, a figure with its spread, a promise kept or not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Raw = dict[str, Any]
UNMEASURED = "not measured yet"
"""README's table where there is no raw file."""


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A markdown table with its columns padded, so that it reads well unrendered too."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return [line(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)]


def spread(found: Raw, digits: int = 0) -> str:
    """"median (p20 to p80)" of a summary, or "void"."""
    if not found.get("n"):
        return "void"
    return f"{found['median']:,.{digits}f} ({found['p20']:,.{digits}f} to {found['p80']:,.{digits}f})"


def where(raw: Raw) -> str:
    """The machine and the versions in one line."""
    machine = raw["machine"]
    flags = [flag for flag in machine["flags"] if flag in ("avx512_bf16", "amx_bf16")]
    cpu = f"{machine['cores']} cores of {machine['cpu']} ({', '.join(flags) or 'no bf16'})"
    device = "; ".join(machine["gpus"]) or cpu
    named = ("torch", "triton", "transformers", "peft", "bitsandbytes", "litgpt", "torchtune", "torchao")
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in named if machine["versions"].get(name))
    commit = (machine["commit"] or "unknown")[:10] + (" + changes" if machine["dirty"] else "")
    malloc, settings = "", raw.get("settings", {})
    if raw.get("kind") in ("train", "full", "nf4", "peers") and "rivals_peaks" not in settings:
        malloc = ("; the rivals' peaks are higher than malloc's own settings make them, since they kept freed memory"
                  if "freed_memory" in settings else
                  "; the rivals, unlike minitune, gave freed memory back between steps")
    if '"peak_failed"' in json.dumps(raw):
        malloc += "; of a rival whose peak could not be measured apart, that of its timed process is given"
    return f"{raw['when'][:10]}, {device}, {versions}, commit {commit}{malloc}."


def ratio(ours: Raw | None, theirs: Raw | None) -> float | None:
    """Of the medians of two summaries; None where one is void."""
    if not ours or not theirs or not ours.get("n") or not theirs.get("n"):
        return None
    return float(ours["median"] / theirs["median"])


def verdict(value: float | None, target: float, at_least: bool) -> tuple[str, str, str]:
    """(the ratio, its target, met or short)."""
    wanted = f"{'≥' if at_least else '≤'} {target:g}"
    if value is None:
        return "void", wanted, "not measured"
    met = value >= target if at_least else value <= target
    return f"{value:.2f}", wanted, "met" if met else "short"
