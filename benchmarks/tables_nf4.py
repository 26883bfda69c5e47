"""The tables of bench_nf4 and of gpu_nf4: kernels, loading and QLoRA steps beside bitsandbytes, what was promised."""

from __future__ import annotations

from typing import Any

from benchmarks.tables_text import UNMEASURED, markdown, ratio, spread, verdict, where

Raw = dict[str, Any]
KERNELS = {"dequantize": 5.0, "dequantize_fresh": 1.5, "quantize": 3.0}
"""How many times faster than bitsandbytes on a CPU, at the least."""
TRAINING = {"12x768": 1.5, "16x2048": 1.3}
LOADING = 3.0
OF_OUR_LORA = 0.9
MEMORY = {"16x2048": 0.5}
GPU_STEP_GB, GPU_STEP_8BIT_GB, GPU_STEP_OFFLOAD_GB = 6.5, 5.8, 5.0
"""What a QLoRA step of Llama-2-7B may take on a GPU, at the most: memory "full", with 8-bit moments, and "offload"."""
GPU_OF_COPY = 0.85
"""Of a GPU's copy rate, what dequantising must reach."""
GPU_LOAD_GB_PER_S, GPU_LOAD_OF_DISK = 2.0, 0.9
"""GB of a file a second that loading to 4 bits must reach, or this share of the disk's rate where that is less."""
RESTLESS = 2.0
"""p80 over p20 from which a median says nothing: the machine gave memory at its own pace."""
_WHAT = {"dequantize": "dequantise into a reused buffer", "dequantize_fresh": "dequantise into fresh memory",
         "quantize": "quantise"}


def nf4_kernels_table(raw: Raw) -> list[str]:
    """Milliseconds of each side at each shape, bf16, and their time over ours: medians, in brackets p20 to p80."""
    rows = []
    for shape, sides in raw["shapes"].items():
        copy = sides["ours"].get("copy", {})
        rows.append((shape, "copy of the 16-bit weight", spread(_milliseconds(copy), 2), "", "", "", ""))
        for what, target in KERNELS.items():
            ours, theirs = sides["ours"].get(what), sides["theirs"].get(what.removesuffix("_fresh"))
            cells = verdict(ratio(theirs, ours), target, True)
            restless = any(side["p80"] > RESTLESS * side["p20"] for side in (ours, theirs) if side and side.get("n"))
            rows.append((shape, _WHAT[what], *(spread(_milliseconds(side), 2) for side in (ours, theirs)),
                         *cells[:2], "restless, no verdict" if restless else cells[2]))
    head = ("weight", "what", "minitune, ms", "bitsandbytes, ms", "times faster", "target", "verdict")
    backends = sorted({sides["ours"].get("backend", "") for sides in raw["shapes"].values()})
    return ["### NF4 kernels", "", f"{where(raw)} Backend: {', '.join(backends)}.", "", *markdown(head, rows)]


def _milliseconds(side: Raw | None) -> Raw:
    return {name: value if name == "n" else 1e3 * value for name, value in (side or {}).items()}


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


# ---- GPU ------------------------------------------------------------------------------------------------------------
def gpu_nf4_tables(rows: list[Raw]) -> list[str]:
    """What the nf4 part of `make gpu` found: kernels beside a copy, loading, QLoRA steps, each promise kept or not."""
    kernels = [row for row in rows if row.get("what") in ("dequantise", "quantise")]
    found = {row["backend"] for row in kernels if "unavailable" not in row}
    absent = {row["backend"]: row["unavailable"] for row in kernels if row["backend"] not in found}
    shown = [(row["what"], row["weight"], row["kind"], row["backend"], *_kernel_cells(row)) for row in kernels
             if row["backend"] in found]
    copied = next((row["gb_per_s"] for row in rows if row.get("what") == "copy rate"), 0.0)
    lines = [f"Copy rate: {copied:,.0f} GB/s, bytes read and written.", "", *markdown(
        ("what", "weight", "kind", "by", "ms", "GB/s", "of the copy rate", "bits of the CPU"), shown), ""]
    lines += [f"Not measured: {name}: {why}" for name, why in absent.items()] + [""] * bool(absent)
    return [*lines, *_loads(rows), "", *_steps(rows), "", *markdown(
        ("promised of NF4 on a GPU", "figure", "target", "verdict"), _promises(rows, kernels, absent)), ""]


def _loads(rows: list[Raw]) -> list[str]:
    loads = []
    for row in rows:
        if row.get("what") == "load":
            rates = [f"{row[name]:.2f}" if name in row else "" for name in ("gb_per_s", "warm_gb_per_s")]
            disk = f"{row['disk_gb_per_s']['median']:.2f}" if "disk_gb_per_s" in row else ""
            loads.append((f"{row['layers']} of {row.get('of_layers', row['layers'])} layers, {row.get('backend', '')}",
                          _failed(row) or spread(row["load_s"], 2), *rates, disk,
                          *_gb(row, "peak_bytes", "result_bytes", "largest_bytes"), _yes(row.get("right"))))
    return markdown(("load to nf4-dq, file not in the page cache", "s", "GB/s of the file", "GB/s, page cache warm",
                     "GB/s, file read alone", "peak GB", "result GB", "largest tensor GB", "right"), loads)


def _steps(rows: list[Raw]) -> list[str]:
    steps = [(f"{row['case']}, {row['layers']} layers", _failed(row) or spread(row["tokens_per_s"]),
              f"{row['share_of_rate']:.1%}" if "share_of_rate" in row else "", *_gb(row, "peak_bytes"),
              _yes(row.get("right"))) for row in rows if row.get("what") == "step"]
    return markdown(("step", "tokens/s", "of the matrix rate", "peak GB", "loss falls"), steps)


def _promises(rows: list[Raw], kernels: list[Raw], absent: dict[str, str]) -> list[tuple[str, ...]]:
    """A row a promise: the worst figure of the extension over all weights."""
    timed: dict[str, dict[tuple[str, ...], Raw]] = {"native": {}, "bitsandbytes": {}}
    for row in kernels:
        if row["backend"] in timed and "ms" in row and "unavailable" not in row:
            timed[row["backend"]][row["what"], row["weight"], row["kind"]] = row
    found: list[tuple[str, ...]] = []
    shares = [row["share_of_copy"] for (what, *_), row in timed["native"].items() if what == "dequantise"]
    found.append(("dequantise: share of the copy rate", *verdict(min(shares, default=None), GPU_OF_COPY, True)))
    for what in ("dequantise", "quantise"):
        times = [timed["bitsandbytes"][key]["ms"]["median"] / row["ms"]["median"]
                 for key, row in timed["native"].items() if key[0] == what and key in timed["bitsandbytes"]]
        cells = verdict(min(times, default=None), 1.0, True)
        why = next((f": {absent[name]}" for name in timed if name in absent), "") if not times else ""
        found.append((f"{what}: times faster than bitsandbytes", *cells[:2], cells[2] + why))
    for row in rows:
        if row.get("what") == "load" and "gb_per_s" in row:
            target = min(GPU_LOAD_GB_PER_S, GPU_LOAD_OF_DISK * row["disk_gb_per_s"]["median"])
            found.append((f"load: GB/s, {GPU_LOAD_GB_PER_S:g} or {GPU_LOAD_OF_DISK:.0%} of the disk's",
                          f"{row['gb_per_s']:.2f}", f"≥ {target:.2f}", "met" if row["promise"] else "short"))
        if row.get("what") == "step" and row.get("most_gb"):
            peak = row["peak_bytes"] / 1e9 if row.get("peak_bytes") else None
            found.append((f"{row['case']}, {row['layers']} layers: peak GB", *verdict(peak, row["most_gb"], False)))
    return found


def _kernel_cells(row: Raw) -> tuple[str, str, str, str]:
    bits = _yes(row.get("right"))
    if "same_bits" in row:      # a rival's, which may be others
        bits = "yes" if row["same_bits"] else "others"
    if "ms" not in row:
        return _failed(row) or str(row.get("unavailable", row.get("untimed", "")))[:60], "", "", bits
    return f"{row['ms']['median']:.3f}", f"{row['gb_per_s']:,.0f}", f"{row['share_of_copy']:.0%}", bits


def _failed(row: Raw) -> str:
    return str(row.get("error", ""))[:90]


def _gb(row: Raw, *names: str) -> list[str]:
    return [f"{row[name] / 1e9:.2f}" if row.get(name) else "" for name in names]


def _yes(right: bool | None) -> str:
    return "" if right is None else "yes" if right else "NO"


def readme_nf4(raws: dict[str, Raw]) -> str:
    """README's short table of QLoRA: a row a side, two columns a size and layout."""
    found = [raw for _, raw in sorted(raws.items()) if raw["kind"] == "nf4"]
    if not found:
        return UNMEASURED
    columns = [(raw["size"], shape, sides["sides"]) for raw in found for shape, sides in raw["layouts"].items()]
    head = ["QLoRA, NF4 double quantised", *(f"{size}, {shape}: {what}" for size, shape, _ in columns
                                             for what in ("tokens/s", "peak GB"))]
    rows = []
    for name, label in (("theirs", "transformers + PEFT + bitsandbytes"), ("ours", "**minitune**"),
                        ("ours_16bit", "minitune, 16-bit LoRA")):
        cells = []
        for _, _, sides in columns:
            rate = {} if sides[name]["void"] else sides[name]["tokens_per_s"]
            cells += [f"{rate['median']:,.0f}" if rate.get("n") else "-",
                      f"{sides[name]['memory']['resident_peak'] / 1e9:.2f}"]
        rows.append([label, *cells])
    return "\n".join([*markdown(head, rows), "", *sorted({where(raw) for raw in found})])
