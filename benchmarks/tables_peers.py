"""RESULTS.md and README.md: a LoRA step on the CPU beside LitGPT and torchtune."""

from __future__ import annotations

from benchmarks.tables_text import UNMEASURED, Raw, markdown, ratio, spread, where

NAMES = {"ours": "minitune", "litgpt": "LitGPT", "torchtune": "torchtune"}


def peers_table(raw: Raw) -> list[str]:
    """The figures of one size: a row for each way to run a peer, and minitune's speed and memory over it."""
    lines = [f"### {raw['size']}, {raw['parameters'] / 1e6:,.3g} M parameters, LoRA r {raw['settings']['rank']}", "",
             where(raw), "", "All in bf16 with torch's fused AdamW, nothing padded, no activation checkpointing. The "
             "peers' adapters are bf16, minitune's fp32. LitGPT gives its loss in bf16, in steps of 1/16 here; its "
             "head may be whole, its cross-entropy is in chunks of 128 in every way.", ""]
    rows = []
    for shape, found in raw["layouts"].items():
        ours = found["sides"]["ours"]
        for name, side in found["sides"].items():
            peer, _, way = name.partition(", ")
            label = NAMES[peer] + (way and f", {way}")
            if "failed" in side:
                rows.append((shape, label, "did not run", "", "", "", ""))
                continue
            beside = name != "ours" and not side["void"] and "failed" not in ours
            over = ratio(ours["tokens_per_s"], side["tokens_per_s"]) if beside else None
            peak = ours["memory"]["resident_peak"] / side["memory"]["resident_peak"] if beside else None
            note = " (void: the loss stood still)" if side["loss_stood_still"] else ""
            rows.append((shape, label + note, spread(side["tokens_per_s"]),
                         f"{side['memory']['resident_peak'] / 1e9:.2f}",
                         *("" if value is None else f"{value:.2f}" for value in (over, peak)),
                         str(sum(turn["void"] for turn in side["turns"] if not turn["warmup"]))))
        for name, losses in found["losses"].items():
            peer, _, way = name.partition(", ")
            course = "the same course" if losses["same_course"] else "NOT the same course"
            rows.append((shape, f"loss curves, minitune and {NAMES[peer]}{way and f', {way}'}",
                         f"{course}, apart by {losses['largest_difference']:.3f}", "", "", "", ""))
    head = ("layout", "side", "tokens/s", "peak GB", "minitune's tokens/s over it", "minitune's peak over it",
            "void turns")
    return [*lines, *markdown(head, rows)]


def readme_peers(raws: dict[str, Raw]) -> str:
    """README's short table: each peer at its fastest, a column a size and layout."""
    found = [raw for _, raw in sorted(raws.items()) if raw["kind"] == "peers"]
    if not found:
        return UNMEASURED
    columns = [(raw["size"], shape, sides["sides"]) for raw in found for shape, sides in raw["layouts"].items()]
    rows = []
    for peer in ("litgpt", "torchtune", "ours"):
        cells = []
        for _, _, sides in columns:
            rates = [side["tokens_per_s"]["median"] for name, side in sides.items() if name.partition(", ")[0] == peer
                     and "failed" not in side and not side["void"] and side["tokens_per_s"].get("n")]
            cells.append(f"{max(rates):,.0f}" if rates else "-")
        rows.append([f"**{NAMES[peer]}**" if peer == "ours" else f"{NAMES[peer]}, the fastest of four ways", *cells])
    head = ["tokens/s", *(f"{size}, {shape}" for size, shape, _ in columns)]
    return "\n".join([*markdown(head, rows), "", *sorted({where(raw) for raw in found})])
