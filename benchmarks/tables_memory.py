"""RESULTS.md: what a training step holds in a GPU's memory, counted where no GPU is."""

from __future__ import annotations

from benchmarks.tables_text import Raw, markdown

HEAD = ("model", "trained", "weights", "rows of tokens", "memory", "AdamW's moments", "most at a time, GB",
        "between steps, GB")


def memory_table(raw: Raw) -> list[str]:
    """A row a case."""
    versions = raw["machine"]["versions"]
    commit = (raw["machine"]["commit"] or "unknown")[:10] + (" + changes" if raw["machine"]["dirty"] else "")
    return [
        "The second step of LoRA (rank 16, all linears), or of all weights, run with tensors that have no values: "
        "**counted, not measured**. GB are 10^9 bytes. What comes on top was not counted, and no GPU has shown yet how "
        "much it is: cuBLAS's workspaces (32 MiB for each of two threads on Hopper, by its documentation), the CUDA "
        "context and what the allocator cannot use of its blocks. `offload` takes tokens x d_model x 2 bytes a layer "
        "of pinned host memory, which is not in the table.", "",
        f"{raw['when'][:10]}, torch {versions.get('torch')}, commit {commit}: `python -m benchmarks.fake_gpu.memory`.",
        "", *markdown(HEAD, [_row(row) for row in raw["rows"]])]


def _row(row: Raw) -> tuple[str, ...]:
    moments, every = "8 bits" if row["moments"] == "8bit" else str(row["moments"]), row.get("train") == "full"
    return (row["model"], "all weights" if every else "LoRA", row["quant"] or ("fp32" if every else "bf16"),
            f"{len(row['lengths'])} x {row['lengths'][0]:,}", row["memory"], moments, f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['between_bytes'] / 1e9:.2f}")
