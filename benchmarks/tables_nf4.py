"""The tables of bench_nf4: kernels, loading and QLoRA steps beside bitsandbytes, with what was promised."""

from __future__ import annotations

from typing import Any

from benchmarks.tables_text import markdown, ratio, spread, verdict, where

Raw = dict[str, Any]
KERNELS = {"dequantize": 5.0, "dequantize_fresh": 1.5, "quantize": 3.0}
"""How many times faster than bitsandbytes on a CPU, at the least."""
TRAINING = {"12x768": 1.5, "16x2048": 1.3}
LOADING = 3.0
OF_OUR_LORA = 0.9
MEMORY = {"16x2048": 0.5}
_WHAT = {"dequantize": "dequantise into a reused buffer", "dequantize_fresh": "dequantise into fresh memory",
         "quantize": "quantise"}


def nf4_kernels_table(raw: Raw) -> list[str]:
    """Milliseconds of each side at each shape, bf16, and their time over ours."""
    rows = []
    for shape, sides in raw["shapes"].items():
        copy = sides["ours"].get("copy", {})
        rows.append((shape, "copy of the 16-bit weight", f"{1e3 * copy['median']:.2f}" if copy.get("n") else "void", "",
                     "", "", ""))
        for what, target in KERNELS.items():
            ours, theirs = sides["ours"].get(what), sides["theirs"].get(what.removesuffix("_fresh"))
            value = ratio(theirs, ours)
            rows.append((shape, _WHAT[what], *(f"{1e3 * side['median']:.2f}" if side and side.get("n") else "void"
                                               for side in (ours, theirs)), *verdict(value, target, True)))
    head = ("weight", "what", "minitune, ms", "bitsandbytes, ms", "times faster", "target", "verdict")
    backends = sorted({sides["ours"].get("backend", "") for sides in raw["shapes"].values()})
    return ["### NF4 kernels", "", f"{where(raw)} Backend: {', '.join(backends)}.", "", *markdown(head, rows)]


def nf4_table(raw: Raw) -> list[str]:
    """QLoRA and loading at one size, and each promise kept or not."""
    rows, promises = [], []
    names = {"ours": "minitune, NF4", "ours_16bit": "minitune, bf16", "theirs": "transformers + PEFT + bitsandbytes"}
    for shape, found in raw["layouts"].items():
        sides: dict[str, Raw] = found["sides"]
        chosen = f", {found['rival']['adapters']} adapters, {found['rival']['attention']}"
        for name, side in sides.items():
            note = " (void: the loss stood still)" if side["loss_stood_still"] else ""
            rows.append((shape, names[name] + (chosen if name == "theirs" else "") + note,
                         spread(side["tokens_per_s"]), f"{side['memory']['resident_peak'] / 1e9:.2f}"))
        rates = {name: None if side["void"] else side["tokens_per_s"] for name, side in sides.items()}
        promises.append((f"{shape}: tokens/s over theirs", *verdict(
            ratio(rates["ours"], rates["theirs"]), TRAINING.get(raw["size"], 1.0), True)))
        promises.append((f"{shape}: tokens/s over our own 16-bit LoRA", *verdict(
            ratio(rates["ours"], rates["ours_16bit"]), OF_OUR_LORA, True)))
        peak = sides["ours"]["memory"]["resident_peak"] / sides["theirs"]["memory"]["resident_peak"]
        promises.append((f"{shape}: peak memory over theirs", *verdict(peak, MEMORY.get(raw["size"], 1.0), False)))
    start = {name: side["first_logits_s"] for name, side in raw["start"].items()}
    promises.append(("loading: their time over ours", *verdict(ratio(start["theirs"], start["ours"]), LOADING, True)))
    loads = [(names[name], spread(side, 2)) for name, side in start.items()]
    return [f"### {raw['size']}, QLoRA r {raw['settings']['rank']}, {raw['settings']['quant']}", "", where(raw), "",
            *markdown(("layout", "side", "tokens/s", "peak GB"), rows), "",
            *markdown(("side", "start to first logits, quantising, s"), loads), "",
            *markdown(("what", "ratio", "target", "verdict"), promises)]
