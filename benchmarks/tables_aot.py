"""benchmarks/KERNELS.md: what each Triton kernel takes on each generation of GPUs, compiled where none is."""

from __future__ import annotations

from benchmarks.tables_text import Raw, markdown

HEAD = ("kernel and shape", "GPU", "tiles", "warps", "stages", "registers", "of", "shared KiB", "of", "spills",
        "matrix instructions", "keeps its budget")


def _row(row: Raw) -> tuple[str, ...]:
    tiles = ", ".join(f"{name} {value}" for name, value in row["tiles"].items())
    matrix = ", ".join(f"{count} {name}" for name, count in row["matrix"].items())
    return (row["case"], f"sm_{row['arch']}", tiles, str(row["warps"]), str(row["stages"]), str(row["registers"]),
            str(row["register_budget"]), f"{row['shared'] / 1024:.1f}", f"{row['shared_budget'] / 1024:.1f}",
            str(row["spills"]), matrix or ("none" if row["matrix_wanted"] else ""),
            "; ".join(row["faults"]) or "yes")


def kernels_page(raw: Raw) -> str:
    """The whole of KERNELS.md, from the newest raw file of ``python -m benchmarks.aot``."""
    versions = raw["machine"]["versions"]
    commit = (raw["machine"]["commit"] or "unknown")[:10] + (" + changes" if raw["machine"]["dirty"] else "")
    kept = sum(not row["faults"] for row in raw["rows"])
    lines = [
        "# What the Triton kernels take", "",
        "Made from `results/` by `python -m benchmarks.aot` and `python -m benchmarks.tables`; edit nothing here.", "",
        "Every kernel in every configuration that is launched, compiled ahead of time for each generation of GPUs that "
        "the configuration serves; no GPU was there. Registers are a thread's, shared memory is a program's; behind "
        'each stands its budget. "Spills" counts the loads and stores of a thread\'s own memory. '
        "`tests/kernels/test_aot.py` holds the same budgets.", "",
        f"{raw['when'][:10]}, triton {versions.get('triton')}, torch {versions.get('torch')}, commit {commit}: "
        f"{kept} of {len(raw['rows'])} keep their budget.", "", *markdown(HEAD, [_row(row) for row in raw["rows"]])]
    return "\n".join(lines) + "\n"
