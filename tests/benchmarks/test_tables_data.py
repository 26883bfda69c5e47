"""The table of the data path, from a small raw file."""

from __future__ import annotations

from typing import Any

from benchmarks.harness import summary
from benchmarks.tables_data import data_table


def raw(void: bool) -> dict[str, Any]:
    def row(side: str, seconds: float) -> dict[str, Any]:
        return {"samples": "long", "tokenizer": "tokenizers", "side": side, "n_tokens": 1_000_000,
                "seconds": summary([seconds] * 3), "tokens_per_second": 1_000_000 / seconds}

    return {"name": "data", "when": "2026-01-02T03:04:05Z", "kind": "data", "row": 2048, "others_share": 0.01,
            "void": void, "rows": [row("minitune", 0.8), row("cached", 0.01), row("transformers", 1.25)],
            "machine": {"cpu": "a processor", "cores": 2, "flags": [], "gpus": [], "commit": "0123456789abcdef",
                        "dirty": False, "versions": {"torch": "2.13.0"}}}


def test_a_row_for_each_side_and_the_promise_beside_ours() -> None:
    lines = data_table(raw(void=False))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:]]
    assert cells == [
        ["long samples, tokenizers", "minitune", "1,250,000 (1,250,000 to 1,250,000)", "≥ 1,000,000", "met"],
        ["long samples, tokenizers", "minitune, from its cache", "100,000,000 (100,000,000 to 100,000,000)", "", ""],
        ["long samples, tokenizers", "transformers, tokenising alone", "800,000 (800,000 to 800,000)", "", ""]]
    assert "2 cores of a processor" in lines[0] and "Rows of 2,048 tokens" in lines[0]
    slow = raw(void=False)
    slow["rows"][0]["seconds"] = summary([1.25] * 3)
    assert "| short" in data_table(slow)[4]


def test_a_void_run_tells_no_figures() -> None:
    lines = data_table(raw(void=True))
    assert not any("1,250,000" in line or "met" in line for line in lines) and "not measured" in lines[4]
