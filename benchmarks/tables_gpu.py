"""RESULTS.md: what one `make gpu` found, part by part, with what was promised of a GPU first."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from benchmarks.tables_nf4 import gpu_nf4_tables
from benchmarks.tables_text import Raw, markdown, spread, verdict, where

LORA = {(16, "forward"): 4.0, (64, "forward"): 7.0, (16, "backward"): 10.0, (64, "backward"): 14.0}
"""Percent of the time of a layer's four products that adapters of a rank may add, at the most."""
PRODUCTS = ("qkv", "o", "gate_up", "down")
OWN_WAYS = ("addmm", "Triton")
"""What a step can take at every product; S has to be made by somebody."""
AUGMENTED = {("qkv", "forward"): "augmented, S as a product", ("qkv", "backward"): "augmented, dS as a product",
             ("gate_up", "forward"): "augmented, S as a product", ("gate_up", "backward"): "augmented, dS as a product",
             ("down", "forward"): "augmented, S as a product"}
"""Where it can take the augmented product too: the op before must be ours (ARCHITECTURE.md, who writes which tail)."""
CASES = ("8 x 2048, 32 heads", "8 x 2048, 32/8 heads", "1 x 16384, 32 heads", "ragged, 32 heads", "ragged, 32/8 heads")
"""Of attention."""
ATTENTION = {"forward": 0.65, "backward": 0.45}
"""Of cuDNN's rate, our kernel's; its backward is deterministic, cuDNN's need not be."""
DISPATCH = 0.97
"""Of the best rate that is allowed (a backward must repeat bit for bit), what the dispatch reaches; 3 % are noise."""
OF_COPY, HEAD, OF_MATRIX = 0.85, 1.05, 0.74
TOKENS_PER_S, QLORA = 20_000, 0.95
Parts = dict[str, Raw]
Row = tuple[str, str, str, str]


def _ms(row: Raw) -> str:
    ms = row.get("ms")
    return f"{ms['median']:.3f}" if ms else str(row.get("unavailable", row.get("error", "")))[:60]


def _rate(row: Raw, rate: float | None) -> tuple[str, str]:
    tflops = row.get("tflops")
    return (f"{tflops:,.1f}" if tflops else "", f"{tflops / rate:.0%}" if tflops and rate else "")


def _word(found: bool | None) -> str:
    return "" if found is None else "yes" if found else "NO"


def _attention_rows(rows: list[Raw]) -> list[Raw]:
    """Rows to show: a backend whose forward is unavailable on a case has one row, not one for each pass."""
    found = [row for row in rows if row.get("what") == "attention"]
    absent = {(row["case"], row["backend"]) for row in found if row["pass"] == "forward" and "unavailable" in row}
    return [{**row, "pass": "all"} if (row["case"], row["backend"]) in absent else row for row in found
            if row["pass"] == "forward" or (row["case"], row["backend"]) not in absent]


def gpu_tables(raw: Raw) -> list[str]:
    """What one `make gpu` found, part by part; a part that failed says so."""
    lines = [f"### GPU run on {raw['device']}", "", where(raw), ""]
    if raw["device"] == "cuda":
        lines += [*markdown(("promised of a GPU", "figure", "target", "verdict"), promises(raw["parts"])), ""]
    for name, part in raw["parts"].items():
        lines += [f"#### {name}: {part['status']} in {part['seconds']:.0f} s", "",
                  *_GPU_PARTS.get(name, _gpu_steps)(part["rows"])]
    return lines


def _gpu_words(rows: list[Raw]) -> list[str]:
    lines = []
    for row in rows:
        native = f"The extension: {row['native']}." if row["what"] == "build" else row.get("summary", "")
        lines += [native, *row.get("left_out", []), *row.get("failures", [])[:10]]
    return [*lines, ""]


def _matrix_rate(rows: list[Raw]) -> float | None:
    return next((row["tflops"] for row in rows if row.get("what") == "matrix rate"), None)


def _gpu_products(rows: list[Raw]) -> list[str]:
    rate = _matrix_rate(rows)
    shown = [(row["product"], str(row["each"]), row["pass"], row["variant"], _ms(row), *_rate(row, rate),
              f"{row['over_bare']:.3f}" if row.get("over_bare") else "", f"{row['floor_ms']:.3f}",
              _word(row.get("right", False))) for row in rows if row.get("what") == "product"]
    return [f"Matrix rate: {rate or 0:,.1f} TFLOP/s. Rates count the base product's operations alone.", "", *markdown(
        ("product", "rank", "pass", "variant", "ms", "TFLOP/s", "of the rate", "time over bare",
         "ms to add at the least", "right"), shown), ""]


def _gpu_attention(rows: list[Raw]) -> list[str]:
    rate = _matrix_rate(rows)
    shown = [(row["case"], row["backend"], row["pass"], _ms(row), *_rate(row, rate), _word(row.get("right")),
              _word(row.get("repeats"))) for row in _attention_rows(rows)]
    head = ("case", "backend", "pass", "ms", "TFLOP/s", "of the rate", "right", "bitwise repeat")
    return [*markdown(head, shown), ""]


def _gpu_ops(rows: list[Raw]) -> list[str]:
    shown = [(row["op"], "x".join(map(str, row["shape"])), row["variant"], _ms(row),
              f"{row['gb_per_s']:,.0f}" if "gb_per_s" in row else "",
              f"{row['share_of_copy']:.0%}" if "share_of_copy" in row else "", _word(row.get("right")))
             for row in rows if row.get("what") == "op"]
    over = [(row["op"], "x".join(map(str, row["shape"])), _ms(row), f"{row['bare_ms']['median']:.3f}"
             if "bare_ms" in row else "") for row in rows if row.get("what") == "over"]
    return [*markdown(("op", "shape", "by", "ms", "GB/s", "of the copy rate", "right"), shown), "",
            *markdown(("op", "shape", "ms", "ms of its two products alone"), over), ""]


def _gpu_tune(rows: list[Raw]) -> list[str]:
    shown = [(row["op"], " x ".join(map(str, row["shape"])), row["way"], ", ".join(
        f"{way} {ms:.3f}" for way, ms in row["ms"].items())) for row in rows if row.get("what") == "tuned"]
    return [*markdown(("op", "shape", "fastest", "ms of each way"), shown), ""]


def _gpu_configs(rows: list[Raw]) -> list[str]:
    """Of each kernel its own configuration beside the fastest that is right."""
    shown = []
    for name in dict.fromkeys(row["kernel"] for row in rows if row.get("what") == "config"):
        mine = [row for row in rows if row.get("kernel") == name]
        ran = [row for row in mine if "ms" in row and row.get("right")]
        own = next(row for row in mine if row["own"])
        best = min(ran, key=lambda row: row["ms"]["median"], default=own)
        gain = f"{own['ms']['median'] / best['ms']['median']:.2f}" if "ms" in own and "ms" in best else ""
        shown.append((name, _config(own), _ms(own), _config(best), _ms(best), gain, f"{len(ran)} of {len(mine)}",
                      _word(all(row.get("right", True) for row in mine))))
    head = ("kernel", "its configuration", "ms", "the fastest", "ms", "times as fast", "ran", "right")
    return [*markdown(head, shown), ""]


def _config(row: Raw) -> str:
    tiles = ", ".join(f"{name} {size}" for name, size in row["tiles"].items())
    return f"{tiles}, {row['num_warps']} warps, {row['num_stages']} stages"


def _gpu_layer(rows: list[Raw]) -> list[str]:
    shown = [(row["case"], _ms({**row, "ms": row.get("forward_ms")}), _ms(row),
              f"{row['share_of_rate']:.1%}" if "share_of_rate" in row else "", _word(row.get("right")))
             for row in rows if row.get("what") == "layer"]
    return [*markdown(("one layer", "ms, forward", "ms, both", "of the matrix rate", "right"), shown), ""]


def _gpu_steps(rows: list[Raw]) -> list[str]:
    """Of minitune, and of the others beside it."""
    steps = []
    for row in rows:
        if row.get("what") in ("step", "peer"):
            names = [row.get(name) for name in ("case", "side", "memory", "micro_batch")]
            names += ["checkpointing"] * bool(row.get("checkpointing"))
            why = str(row.get("unavailable", row.get("error", "")))[:90]
            steps.append((", ".join(str(name) for name in names if name),
                          spread(row["tokens_per_s"]) if "tokens_per_s" in row else why,
                          f"{row['peak_bytes'] / 1e9:.2f}" if row.get("peak_bytes") else "",
                          f"{row['share_of_rate']:.0%}" if row.get("share_of_rate") else "", _word(row.get("right"))))
    return [*markdown(("case", "tokens/s", "peak GB", "of the matrix rate", "right"), steps), ""]


# ---- what was promised ----------------------------------------------------------------------------------------------
def promises(parts: Parts) -> list[Row]:
    """(what, figure, target, verdict) of every figure but those of NF4, which stand with their part."""
    def rows(part: str, what: str) -> list[Raw]:
        return [row for row in parts.get(part, {}).get("rows", []) if row.get("what") == what]

    found = [*_lora(rows("products", "product")), *_attention(rows("attention", "attention"))]
    ops: dict[str, list[float]] = {}
    for row in rows("ops", "op"):
        if row["variant"] == "minitune" and "share_of_copy" in row and row.get("right"):
            ops.setdefault(row["op"].split()[0], []).append(row["share_of_copy"])
    for op in ("rms_norm", "swiglu", "rope", "adamw"):
        found.append((f"{op}: share of the copy rate", *verdict(min(ops.get(op, []), default=None), OF_COPY, True)))
    over = [row["over"] for row in rows("ops", "over") if "over" in row and row.get("right")]
    found.append(("linear_cross_entropy over its two products", *verdict(max(over, default=None), HEAD, False)))
    shares = [row["share_of_rate"] for row in rows("layer", "layer")
              if "bf16" in row["case"] and "share_of_rate" in row and row.get("right")]
    found.append(("one layer: share of the matrix rate", *verdict(min(shares, default=None), OF_MATRIX, True)))
    return [*found, *_whole_steps(rows("step", "step"), rows("peers", "peer"))]


def _lora(rows: list[Raw]) -> Iterable[Row]:
    """The fastest way of each product, summed over a layer's four, over the bare products; beside it the floor."""
    for (each, step), target in LORA.items():
        bare, ours, floor = 0.0, 0.0, 0.0
        for product in PRODUCTS:
            own = [row for row in rows if (row["product"], row["each"], row["pass"]) == (product, each, step)]
            ways = *OWN_WAYS, AUGMENTED.get((product, step))
            times = [row["ms"]["median"] for row in own if row["variant"] in ways and "ms" in row]
            alone = [row["ms"]["median"] for row in own if row["variant"] == "bare" and "ms" in row]
            if not times or not alone:
                bare = 0.0
                break
            bare, ours, floor = bare + alone[0], ours + min(times), floor + own[0]["floor_ms"]
        what = f"LoRA of rank {each}, {step}: % added to the time of a layer's products"
        if bare:
            what += f" (at the least {100 * floor / bare:.1f})"
        yield what, *verdict(100 * (ours / bare - 1) if bare else None, target, False)


def _attention(rows: list[Raw]) -> Iterable[Row]:
    """The worst case of each pass."""
    def rate(case: str, step: str, wanted: Callable[[str], bool], repeats: bool = False) -> float | None:
        return max((row["tflops"] for row in rows if row["case"] == case and row["pass"] == step
                    and wanted(row["backend"]) and row.get("tflops") and row.get("right")
                    and (row.get("repeats") or not repeats)), default=None)

    def worst(pairs: list[tuple[float | None, float | None]]) -> float | None:
        """None where a case is missing."""
        shares = [ours / theirs for ours, theirs in pairs if ours and theirs]
        return min(shares) if len(shares) == len(CASES) else None

    for step, target in ATTENTION.items():
        back = step == "backward"
        yield f"attention {step}: our kernel of cuDNN's rate", *verdict(worst([
            (rate(case, step, lambda name: name == "minitune", back), rate(case, step, lambda name: "cudnn" in name))
            for case in CASES]), target, True)
    for step, allowed in (("forward", "forward"), ("backward", "backward, deterministic")):
        back = step == "backward"
        yield f"attention {step}: the dispatch of the best that is allowed", *verdict(worst([
            (rate(case, step, lambda name: name == "dispatch", back),
             rate(case, allowed, lambda name: name != "dispatch", back)) for case in CASES]), DISPATCH, True)


def _whole_steps(rows: list[Raw], peers: list[Raw]) -> Iterable[Row]:
    def fastest(found: Iterable[Raw]) -> float | None:
        return max((row["tokens_per_s"]["median"] for row in found
                    if row.get("tokens_per_s", {}).get("n") and row.get("right")), default=None)

    sixteen, four = ([row for row in rows if row["case"].startswith(f"{kind}, 8 x")] for kind in ("bf16", "nf4-dq"))
    lora, qlora = fastest(sixteen), fastest(four)
    alike = [row.get("policy") for row in sixteen] == [row.get("policy") for row in four]
    yield "Llama-2-7B, LoRA, 8 x 2048: tokens/s", *verdict(lora, TOKENS_PER_S, True)
    yield "QLoRA over LoRA, the same step", *verdict(qlora / lora if qlora and lora and alike else None, QLORA, True)
    for name, ours, theirs in (("transformers + PEFT", "minitune", "peft"), ("Unsloth", "minitune", "unsloth"),
                               ("transformers + PEFT + bitsandbytes", "minitune nf4-dq", "peft nf4-dq"),
                               ("Unsloth in 4 bits", "minitune nf4-dq", "unsloth nf4-dq")):
        sides = [fastest(row for row in peers if row["side"] in names) for names in (
            (ours,), (theirs, "peft compiled") if theirs == "peft" else (theirs,))]
        value = sides[0] / sides[1] if sides[0] and sides[1] else None
        yield f"the step over {name}'s", *verdict(value, 1.0, True)


_GPU_PARTS: dict[str, Callable[[list[Raw]], list[str]]] = {
    "build": _gpu_words, "tests": _gpu_words, "sanitizer": _gpu_words, "tune": _gpu_tune, "products": _gpu_products,
    "attention": _gpu_attention, "ops": _gpu_ops, "layer": _gpu_layer, "configs": _gpu_configs, "nf4": gpu_nf4_tables}
