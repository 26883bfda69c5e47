"""4-bit weights on the CPU: kernels, quantising while loading, and QLoRA steps, beside bitsandbytes.

``python -m benchmarks.bench_nf4 --size 12x768 --size 16x2048`` writes benchmarks/results/<date>-nf4-….json and prints
the tables. Sides, turns and void runs are those of bench_train; rivals are measured in the same run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import tables, tables_nf4
from benchmarks.bench_train import SIDES, arguments
from benchmarks.harness import ROOT, VOID_SHARE, Worker, ask_quietly, machine, save, summary
from benchmarks.nf4_sides import SHAPES
from benchmarks.shapes import ALPHA, LR, RANK, SEED, SIZES, layout
from benchmarks.turns import SETTINGS, Record, all_ran, say, take_turns

QUANT = "nf4-dq"


def kernels(told: argparse.Namespace) -> dict[str, Any]:
    """Quantise and dequantise at each shape, both sides in turn."""
    found: dict[str, Any] = {}
    with Worker("benchmarks.nf4_sides", "ours") as ours, Worker("benchmarks.nf4_sides", "theirs") as theirs:
        for shape in SHAPES:
            for double_quant in (False, True):
                kind = f"{shape} {'nf4-dq' if double_quant else 'nf4'}"
                rows: dict[str, dict[str, Any]] = {"ours": {}, "theirs": {}}
                for _ in range(told.rounds):
                    for name, worker in (("ours", ours), ("theirs", theirs)):
                        answer = ask_quietly(worker, "time", told.attempts, told.void_share, shape=shape,
                                             double_quant=double_quant, n=5)[-1]
                        for what, seconds in answer.value.items():
                            if what == "backend":
                                rows[name][what] = seconds
                            elif not answer.void(told.void_share):
                                rows[name].setdefault(what, []).extend(seconds)
                found[kind] = {name: {what: summary(value) if isinstance(value, list) else value
                                      for what, value in row.items()} for name, row in rows.items()}
                say(f"  {kind}: {ratios(found[kind])}")
    return found


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """Their median time over ours, for each thing that was timed in quiet."""
    pairs = {"dequantize": "dequantize", "dequantize_fresh": "dequantize", "quantize": "quantize"}
    return {what: round(row["theirs"][theirs]["median"] / row["ours"][what]["median"], 2)
            for what, theirs in pairs.items()
            if row["ours"].get(what, {}).get("n") and row["theirs"].get(theirs, {}).get("n")}


def best_rival(folder: Path, size: str, shape: str, told: argparse.Namespace) -> tuple[dict[str, Any], list[Any]]:
    """Short runs of transformers + PEFT + bitsandbytes with each kind of adapters and attention: the fastest."""
    tried: list[Any] = []
    for adapters in ("bf16", "fp32"):
        for attention in ("sdpa", "eager"):
            variant = {"adapters": adapters, "attention": attention, "compiled": False}
            record = Record(str(variant), sum(layout(shape)))
            with Worker(SIDES, *arguments("peers", folder, size, shape, variant), "--quant", QUANT) as worker:
                worker.ask("steps", n=1)
                record.add(ask_quietly(worker, "steps", told.attempts, told.void_share, n=2), told.void_share)
            seconds = [second for turn in record.turns for second in turn["seconds"]]
            tried.append({**variant, "best_tokens_per_s": sum(layout(shape)) / min(seconds)})
            say(f"  rival {variant}: {tried[-1]['best_tokens_per_s']:.0f}")
    best = max(tried, key=lambda entry: entry["best_tokens_per_s"])
    return {key: best[key] for key in ("adapters", "attention", "compiled")}, tried


def training(folder: Path, size: str, shape: str, told: argparse.Namespace) -> dict[str, Any]:
    """QLoRA by both and our LoRA in 16 bits, in turn."""
    rival, tried = best_rival(folder, size, shape, told)
    sides = {"ours": [*arguments("ours", folder, size, shape), "--quant", QUANT],
             "ours_16bit": arguments("ours", folder, size, shape),
             "theirs": [*arguments("peers", folder, size, shape, rival), "--quant", QUANT]}
    found, _ = take_turns({name: [SIDES, *words] for name, words in sides.items()}, sum(layout(shape)), told)
    return {"rival": rival, "tried": tried, "sides": all_ran(found)}


def loading(folder: Path, size: str, told: argparse.Namespace) -> dict[str, Any]:
    """Fresh processes by turns: seconds from process start to first logits, quantising the 16-bit checkpoint."""
    found: dict[str, Any] = {"ours": [], "theirs": []}
    for turn in range(told.starts + 1):      # the first turn warms the page cache and is dropped
        for name, side in (("ours", "ours-start"), ("theirs", "peers-start")):
            for _ in range(told.attempts):
                with Worker(SIDES, *arguments(side, folder, size, "1x32"), "--quant", QUANT) as worker:
                    first = worker.ask("first_logits")
                if turn:
                    found[name].append({"seconds": first.value["at"] - worker.started, "other_share": first.other_share,
                                        "void": first.void(told.void_share), "memory": first.value["memory"]})
                if not first.void(told.void_share):
                    break
    return {name: {"runs": runs, "first_logits_s": summary([run["seconds"] for run in runs if not run["void"]])}
            for name, runs in found.items()}


def bench(size: str, told: argparse.Namespace) -> Path:
    """Loading and training of one size, into one raw file."""
    raw: dict[str, Any] = {"kind": "nf4", "size": size, "model": asdict(SIZES[size]),
                           "parameters": SIZES[size].parameters(), "machine": machine(), "layouts": {},
                           "settings": {**SETTINGS,
                                        "rank": RANK, "alpha": ALPHA, "lr": LR, "seed": SEED, "quant": QUANT,
                                        "void_share": told.void_share, "rounds": told.rounds,
                                        "steps_a_turn": told.steps, "warmup": told.warmup, "starts": told.starts}}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        subprocess.run([sys.executable, "-m", SIDES, "write", "--folder", str(folder), "--size", size], cwd=ROOT,
                       check=True)
        for shape in told.layout:
            say(f"{size}, {shape}")
            raw["layouts"][shape] = training(folder, size, shape, told)
        raw["start"] = loading(folder, size, told)
    return save(f"nf4-{size}", raw, told.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option: Callable[..., Any] = parser.add_argument
    option("--size", action="append", choices=sorted(SIZES), help="layers x width; may be given again")
    option("--layout", action="append", help="documents x length, default 4x256; may be given again")
    option("--rounds", type=int, default=4, help="turns of each side")
    option("--steps", type=int, default=2, help="training steps in one turn")
    option("--warmup", type=int, default=2, help="steps of each side that are not measured")
    option("--starts", type=int, default=2, help="fresh processes of each side, for loading")
    option("--attempts", type=int, default=4, help="how often a turn is tried until the machine is quiet")
    option("--void-share", type=float, default=VOID_SHARE, help="share of the CPU that others may take in a turn")
    option("--no-kernels", dest="kernels", action="store_false", help="loading and training only")
    option("--no-training", dest="training", action="store_false", help="the kernels only")
    option("--out", type=Path, help="folder of the raw files, default benchmarks/results")
    told = parser.parse_args()
    told.layout = told.layout or ["4x256"]
    written = []
    if told.kernels:
        say("kernels")
        raw = {"kind": "nf4-kernels", "machine": machine(), "shapes": kernels(told)}
        written.append(save("nf4-kernels", raw, told.out))
    written += [bench(size, told) for size in told.size or (["12x768", "16x2048"] if told.training else [])]
    for path in written:
        raw = tables.read(path)
        print("\n".join(tables_nf4.nf4_kernels_table(raw) if raw["kind"] == "nf4-kernels"
                        else tables_nf4.nf4_table(raw)))
        print(f"\nraw figures: {path.name}\n")


if __name__ == "__main__":
    main()
