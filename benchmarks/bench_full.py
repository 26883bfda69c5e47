"""Full fine-tuning on the CPU: every weight trained by minitune and by transformers, side by side.

``python -m benchmarks.bench_full`` writes benchmarks/results/<date>-full-12x768.json and prints the table. Sides, turns
and void runs are those of bench_train. transformers runs with its weights in fp32 under autocast, which is what
minitune does, and with everything in bf16, which takes less memory and keeps 8 bits of each weight; each of them
compiled too. minitune runs with its moments in fp32, which is what stands beside the others, and in 8 bits.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.bench_train import LAYOUTS, SIDES, Record, arguments, compare_losses, say
from benchmarks.harness import ROOT, VOID_SHARE, Worker, WorkerError, ask_quietly, machine, save, summary
from benchmarks.shapes import LR, SEED, SIZES, layout


def variants(compiled: bool) -> dict[str, dict[str, Any]]:
    """Ways of transformers: name -> what its side is told. Compiled, eager attention is the faster one at some layouts.
    """
    ways = [("sdpa", False), *((attention, True) for attention in ("sdpa", "eager") if compiled)]
    return {f"{weights}, {attention}{', torch.compile' * each}":
            {"adapters": weights, "attention": attention, "compiled": each}
            for weights in ("fp32", "bf16") for attention, each in ways}


def rounds(folder: Path, size: str, shape: str, told: argparse.Namespace) -> dict[str, Any]:
    """All sides in turn, `told.rounds` times: each side's record, or why it did not run."""
    sides = {"ours": arguments("ours", folder, size, shape)}
    sides["ours, moments in 8 bits"] = [*sides["ours"], "--moments", "8bit"]
    sides |= {name: arguments("peers", folder, size, shape, variant)
              for name, variant in variants(told.compiled).items()}
    records = {name: Record(name, sum(layout(shape))) for name in sides}
    found: dict[str, Any] = {}
    workers: dict[str, Worker] = {}
    try:
        for name, words in sides.items():
            workers[name] = Worker(SIDES, *words, "--full")
            try:
                records[name].add([workers[name].ask("steps", n=told.warmup)], told.void_share, warmup=True)
            except WorkerError as error:
                found[name] = {"failed": str(error)[-500:]}
                workers.pop(name).close()
        for turn in range(told.rounds):
            for name, worker in workers.items():
                answers = ask_quietly(worker, "steps", told.attempts, told.void_share, n=told.steps)
                records[name].add(answers, told.void_share)
            medians = {name: summary(records[name].rates()).get("median") for name in workers}
            say(f"  round {turn + 1}: " + ", ".join(f"{name} {rate or 0:.0f}" for name, rate in medians.items()))
    finally:
        for worker in workers.values():
            worker.close()
    return found | {name: records[name].as_dict() for name in workers}


def bench(size: str, told: argparse.Namespace) -> Path:
    """Everything about one size, into one raw file; the path of that file."""
    raw: dict[str, Any] = {
        "kind": "full", "size": size, "model": asdict(SIZES[size]), "parameters": SIZES[size].parameters(),
        "settings": {"lr": LR, "seed": SEED, "void_share": told.void_share, "attempts": told.attempts,
                     "warmup": told.warmup, "rounds": told.rounds, "steps_a_turn": told.steps},
        "machine": machine(), "layouts": {}}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        subprocess.run([sys.executable, "-m", SIDES, "write", "--folder", str(folder), "--size", size], cwd=ROOT,
                       check=True)
        for shape in LAYOUTS:
            say(f"{size}, {shape}, every weight")
            sides = rounds(folder, size, shape, told)
            ran = all("losses" in sides[name] for name in ("ours", "fp32, sdpa"))
            curves = {"ours": sides["ours"], "eager": sides["fp32, sdpa"]} if ran else {}
            raw["layouts"][shape] = {"n_tokens": sum(layout(shape)), "sides": sides,
                                     "losses": compare_losses(curves)}
    return save(f"full-{size}", raw, told.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="12x768", help="layers x width")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--steps", type=int, default=2, help="training steps in one turn")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each side that are not measured")
    parser.add_argument("--attempts", type=int, default=4, help="how often a turn is tried until the machine is quiet")
    parser.add_argument("--void-share", type=float, default=VOID_SHARE, help="share of the CPU for others in a turn")
    parser.add_argument("--no-compiled", dest="compiled", action="store_false", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, help="folder of the raw files, default benchmarks/results")
    told = parser.parse_args()
    path = bench(told.size, told)
    print("\n".join(tables.full_table(tables.read(path))), end="\n\n")
    print(f"raw figures: {path.name}")


if __name__ == "__main__":
    main()
