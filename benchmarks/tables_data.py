"""The table of the data path: tokens/s from a file to packed batches, beside transformers' tokenizer."""

from __future__ import annotations

from benchmarks.tables_text import Raw, markdown, verdict, where

TARGET = 1e6
"""Tokens/s that minitune must reach without its cache, on two cores."""
_SIDES = {"minitune": "minitune", "cached": "minitune, from its cache",
          "transformers": "transformers, tokenising alone"}


def data_table(raw: Raw) -> list[str]:
    """A row for each side of `benchmarks.bench_data`, tokens/s as median (p20 to p80); void where others took the CPU.
    """
    rows = []
    for found in raw["rows"]:
        seconds, ours = found["seconds"], found["side"] == "minitune"
        slow, typical, fast = (f"{found['n_tokens'] / seconds[name]:,.0f}" for name in ("p80", "median", "p20"))
        rate = "void" if raw["void"] else f"{typical} ({slow} to {fast})"
        kept = verdict(None if raw["void"] else found["n_tokens"] / seconds["median"] / TARGET, 1, True)[2]
        rows.append((f"{found['samples']} samples, {found['tokenizer']}", _SIDES[found["side"]], rate,
                     f"≥ {TARGET:,.0f}" if ours else "", kept if ours else ""))
    return [f"{where(raw)} Rows of {raw['row']:,} tokens; other processes took {raw['others_share']:.0%} of the CPU.",
            "", *markdown(("data", "side", "tokens/s", "target", "kept"), rows)]


__all__ = ["data_table"]
