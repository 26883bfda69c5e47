"""Full fine-tuning on the CPU: every weight trained by minitune and by transformers, side by side.

``python -m benchmarks.bench_full`` writes benchmarks/results/<date>-full-12x768.json and prints the table. Sides and
turns are those of bench_train. transformers runs with its weights in fp32 under autocast, which is what
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
from benchmarks.bench_train import LAYOUTS, SIDES, arguments
from benchmarks.harness import ROOT, VOID_SHARE, machine, save
from benchmarks.shapes import LR, SEED, SIZES, layout
from benchmarks.turns import SETTINGS, compare_losses, say, take_turns


def variants(compiled: bool) -> dict[str, dict[str, Any]]:
    """Ways of transformers: name -> what its side is told. Compiled, eager attention is the faster one at some layouts.
    """
    ways = [("sdpa", False), *((attention, True) for attention in ("sdpa", "eager") if compiled)]
    return {f"{weights}, {attention}{', torch.compile' * each}":
            {"adapters": weights, "attention": attention, "compiled": each}
            for weights in ("fp32", "bf16") for attention, each in ways}


def rounds(folder: Path, size: str, shape: str, told: argparse.Namespace) -> dict[str, Any]:
    """All sides in turn: each side's record, or why it did not run."""
    sides = {"ours": arguments("ours", folder, size, shape)}
    sides["ours, moments in 8 bits"] = [*sides["ours"], "--moments", "8bit"]
    sides |= {name: arguments("peers", folder, size, shape, variant)
              for name, variant in variants(told.compiled).items()}
    found, _ = take_turns({name: [SIDES, *words, "--full"] for name, words in sides.items()}, sum(layout(shape)), told)
    return found


def bench(size: str, told: argparse.Namespace) -> Path:
    """Everything about one size, into one raw file; the path of that file."""
    raw: dict[str, Any] = {
        "kind": "full", "size": size, "model": asdict(SIZES[size]), "parameters": SIZES[size].parameters(),
        "settings": {**SETTINGS,
                     "lr": LR, "seed": SEED, "void_share": told.void_share, "attempts": told.attempts,
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
