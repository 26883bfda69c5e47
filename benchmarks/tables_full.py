"""RESULTS.md: full fine-tuning on the CPU beside transformers."""

from __future__ import annotations

from benchmarks.tables_text import Raw, markdown, ratio, spread, where

HEAD = ("layout", "side", "tokens/s", "peak GB", "minitune's tokens/s over it", "minitune's peak over it", "void turns")
OURS = "minitune"


def full_table(raw: Raw) -> list[str]:
    """The figures of one size: a row a side, and minitune's speed and memory over each."""
    lines = [f"### {raw['size']}, {raw['parameters'] / 1e6:,.3g} M parameters, all of them trained", "", where(raw), "",
             "AdamW with moments in fp32, but where it is said. transformers' weights lie in fp32 and compute in bf16 "
             "by autocast, as minitune's do, or lie in bf16 with gradients and moments, where an update smaller than "
             "1/256 of a weight may vanish.", ""]
    rows = []
    for shape, found in raw["layouts"].items():
        ours = found["sides"]["ours"]
        for name, side in found["sides"].items():
            own = name.startswith("ours")
            label = name.replace("ours", OURS) if own else f"transformers, {name}"
            if "failed" in side:
                rows.append((shape, label, "did not run", "", "", "", ""))
                continue
            beside = not own and not side["void"] and "failed" not in ours
            over = ratio(ours["tokens_per_s"], side["tokens_per_s"]) if beside else None
            peak = ours["memory"]["resident_peak"] / side["memory"]["resident_peak"] if beside else None
            note = " (void: the loss stood still)" if side["loss_stood_still"] else ""
            rows.append((shape, label + note, spread(side["tokens_per_s"]),
                         f"{side['memory']['resident_peak'] / 1e9:.2f}",
                         *("" if value is None else f"{value:.2f}" for value in (over, peak)),
                         str(sum(turn["void"] for turn in side["turns"] if not turn["warmup"]))))
        losses = found["losses"]
        if losses["compared"]:
            rows.append((shape, "loss curves, minitune and fp32", f"apart by {losses['largest_difference']:.3f}", "",
                         "", "", ""))
    return [*lines, *markdown(HEAD, rows)]
