"""A LoRA training step on the CPU: minitune beside LitGPT and torchtune, in the ways that each can be run.

``python -m benchmarks.bench_peers`` writes benchmarks/results/<date>-peers-12x768.json and prints the table. Same
weights, tokens, adapters and optimizer; the turns are those of bench_train. It needs an environment of
its own, since what these two ask for does not agree (torchtune 0.6.1 needs a torchao that still has its NF4 tensor):

    pip install torch==2.13.0 && pip install litgpt torchtune && pip install torchao==0.14.1 'numpy>=2'
    pip install --no-build-isolation .
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
from benchmarks.shapes import ALPHA, LR, RANK, SEED, SIZES, layout
from benchmarks.turns import SETTINGS, compare_losses, say, take_turns

PEER_SIDES = "benchmarks.peer_sides"
PEERS = ("litgpt", "torchtune")
WAYS: dict[str, list[str]] = {
    "": [], ", head whole": ["--whole"], ", torch.compile": ["--compiled"],
    ", head whole, torch.compile": ["--whole", "--compiled"]}
"""What each peer is run with. Both multiply by the head in chunks of tokens, which saves memory, and on a CPU costs a
copy of the head for each chunk of several sequences."""


def rounds(folder: Path, size: str, shape: str, told: argparse.Namespace) -> dict[str, Any]:
    """All sides in turn: each side's record, or why it did not run."""
    sides = {"ours": [SIDES, *arguments("ours", folder, size, shape)]}
    for peer in PEERS:
        for way, flags in WAYS.items():
            sides[peer + way] = [PEER_SIDES, *arguments(peer, folder, size, shape), *flags]
    return take_turns(sides, sum(layout(shape)), told)[0]


def bench(size: str, told: argparse.Namespace) -> Path:
    """Everything about one size, into one raw file; the path of that file."""
    raw: dict[str, Any] = {
        "kind": "peers", "size": size, "model": asdict(SIZES[size]), "parameters": SIZES[size].parameters(),
        "settings": {**SETTINGS,
                     "rank": RANK, "alpha": ALPHA, "lr": LR, "seed": SEED, "void_share": told.void_share,
                     "attempts": told.attempts, "warmup": told.warmup, "rounds": told.rounds,
                     "steps_a_turn": told.steps},
        "machine": machine(), "layouts": {}}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        subprocess.run([sys.executable, "-m", SIDES, "write", "--folder", str(folder), "--size", size], cwd=ROOT,
                       check=True)
        for shape in LAYOUTS:
            say(f"{size}, {shape}")
            sides = rounds(folder, size, shape, told)
            curves = {name: side for name, side in sides.items() if "losses" in side}
            raw["layouts"][shape] = {
                "n_tokens": sum(layout(shape)), "sides": sides,
                "losses": {name: compare_losses({"ours": curves["ours"], "eager": curves[name]})
                           for name in curves if name != "ours" and "ours" in curves}}
    return save(f"peers-{size}", raw, told.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="12x768", help="layers x width")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--steps", type=int, default=2, help="training steps in one turn")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each side that are not measured")
    parser.add_argument("--attempts", type=int, default=4, help="how often a turn is tried until the machine is quiet")
    parser.add_argument("--void-share", type=float, default=VOID_SHARE, help="share of the CPU for others in a turn")
    parser.add_argument("--out", type=Path, help="folder of the raw files, default benchmarks/results")
    told = parser.parse_args()
    path = bench(told.size, told)
    print("\n".join(tables.peers_table(tables.read(path))), end="\n\n")
    print(f"raw figures: {path.name}")


if __name__ == "__main__":
    main()
