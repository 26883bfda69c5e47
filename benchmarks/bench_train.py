"""A LoRA training step on the CPU: minitune, the best transformers + PEFT, and the machine's limit, side by side.

``python -m benchmarks.bench_train --size 12x768 --size 16x2048`` writes benchmarks/results/<date>-train-<size>.json and
prints the table. The sides take turns (`turns.py`). Run it on a quiet machine.
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

from benchmarks import tables
from benchmarks.harness import ROOT, VOID_SHARE, Worker, WorkerError, ask_quietly, machine, save, summary
from benchmarks.shapes import ALPHA, LR, NEW_TOKENS, PROMPT, RANK, SEED, SIZES, layout
from benchmarks.turns import SETTINGS, Record, all_ran, compare_losses, say, take_turns

SIDES = "benchmarks.train_sides"
LAYOUTS = ("4x256", "1x1024")
"""What a whole run of a size measures."""


def arguments(side: str, folder: Path, size: str, shape: str, variant: dict[str, Any] | None = None) -> list[str]:
    words = [side, "--folder", str(folder), "--size", size, "--layout", shape]
    if variant:
        words += ["--adapters", variant["adapters"], "--attention", variant["attention"]]
        words += ["--compiled"] if variant["compiled"] else []
    return words


# ---- which rival ----------------------------------------------------------------------------------------------------
def choose_rivals(folder: Path, size: str, shape: str,
                  told: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Short runs of all variants: the fastest eager and the fastest compiled one, and what every one did."""
    tried: list[dict[str, Any]] = []

    def attempt(adapters: str, attention: str, compiled: bool) -> None:
        variant = {"adapters": adapters, "attention": attention, "compiled": compiled}
        record = Record(str(variant), sum(layout(shape)))
        try:
            with Worker(SIDES, *arguments("peers", folder, size, shape, variant)) as worker:
                record.add([worker.ask("steps", n=2)], told.void_share, warmup=True)
                record.add(ask_quietly(worker, "steps", told.attempts, told.void_share, n=3), told.void_share)
        except WorkerError as error:
            tried.append({**variant, "failed": str(error)[-500:]})
        else:
            tried.append({**variant, "tokens_per_s": summary(record.rates()), "turns": record.turns,
                          "losses": record.losses})
        say(f"  rival {variant}: {tried[-1].get('tokens_per_s', {}).get('median', tried[-1].get('failed', 'void'))}")

    def best(compiled: bool) -> dict[str, Any]:
        # a rival that was never quiet is ranked by its void turns: it must still be run in full, and may succeed there
        def rate(entry: dict[str, Any]) -> float:
            seconds = [s for turn in entry["turns"] if not turn["warmup"] for s in turn["seconds"]]
            return float(entry["tokens_per_s"].get("median", 1.0 / min(seconds)))

        ran = [entry for entry in tried if entry["compiled"] == compiled and "failed" not in entry]
        if not ran:
            raise WorkerError(f"no rival ran (compiled: {compiled}): {tried}")
        return {key: max(ran, key=rate)[key] for key in ("adapters", "attention", "compiled")}

    for adapters in ("bf16", "fp32"):
        for attention in ("sdpa", "eager"):
            attempt(adapters, attention, False)
    eager = best(False)
    if not told.compiled:
        return [eager], tried
    for adapters in ("bf16", "fp32"):
        attempt(adapters, eager["attention"], True)
    attempt(best(True)["adapters"], "eager" if eager["attention"] == "sdpa" else "sdpa", True)
    return [eager, best(True)], tried


# ---- the alternation ------------------------------------------------------------------------------------------------
def alternate(folder: Path, size: str, shape: str, rivals: list[dict[str, Any]],
              told: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    """All sides in turn; each side's record, and the profiles that were asked for."""
    sides = {"products": [SIDES, *arguments("products", folder, size, shape)]}
    if told.ours:
        sides["ours"] = [SIDES, *arguments("ours", folder, size, shape)]
    for variant in rivals:
        sides["compiled" if variant["compiled"] else "eager"] = [
            SIDES, *arguments("peers", folder, size, shape, variant)]
    found, profiles = take_turns(sides, sum(layout(shape)), told, ("ours", "eager") if told.profile else ())
    return all_ran(found), profiles


# ---- from process start ---------------------------------------------------------------------------------------------
def starts(folder: Path, size: str, told: argparse.Namespace, profiles: dict[str, str]) -> dict[str, Any]:
    """Fresh processes by turns: seconds from process start to the first logits of a prompt, then greedy tokens/s; into
    `profiles`, where they were asked for, the operators of a last answer."""
    names = {"ours": "ours-start", "peers": "peers-start"} if told.ours else {"peers": "peers-start"}
    found: dict[str, Any] = {name: {"runs": []} for name in names}
    for turn in range(told.starts + 1):  # the first turn warms the page cache for both and is dropped
        for name, side in names.items():
            for _ in range(told.attempts):
                with Worker(SIDES, *arguments(side, folder, size, "1x32")) as worker:
                    first = worker.ask("first_logits")
                    written = ask_quietly(worker, "generate", told.attempts, told.void_share, n=2) if turn else []
                    if told.profile and turn:
                        profiles[f"{name}-generate"] = worker.ask("profile").value["text"]
                    marks = {name: first.value[name] - worker.started for name in ("imported", "loaded")}
                    run = {"seconds": first.value["at"] - worker.started, **marks, "other_share": first.other_share,
                           "void": first.void(told.void_share), "memory": first.value["memory"],
                           "argmax": first.value["argmax"], "mean_square": first.value["mean_square"],
                           "generation": [{"seconds": answer.value["seconds"], "new": answer.value["new"],
                                           "other_share": answer.other_share, "void": answer.void(told.void_share)}
                                          for answer in written]}
                if turn:
                    found[name]["runs"].append(run)
                if not run["void"]:
                    break
    for side_found in found.values():
        runs = side_found["runs"]
        side_found["first_logits_s"] = summary([run["seconds"] for run in runs if not run["void"]])
        said = [answer for run in runs for answer in run["generation"]]
        side_found["complete_answers"] = all(len(answer["new"]) == NEW_TOKENS for answer in said)
        side_found["generation_tokens_per_s"] = summary(
            [NEW_TOKENS / s for answer in said if not answer["void"] for s in answer["seconds"]])
    return found


# ---- one size -------------------------------------------------------------------------------------------------------
def bench(size: str, told: argparse.Namespace) -> Path:
    """Everything about one size, into one raw file; the path of that file."""
    raw: dict[str, Any] = {
        "kind": "train", "size": size, "model": asdict(SIZES[size]), "parameters": SIZES[size].parameters(),
        "settings": {**SETTINGS,
                     "rank": RANK, "alpha": ALPHA, "lr": LR, "seed": SEED, "prompt": PROMPT, "new_tokens": NEW_TOKENS,
                     "void_share": told.void_share, "attempts": told.attempts, "warmup": told.warmup,
                     "rounds": told.rounds, "steps_a_turn": told.steps, "starts": told.starts},
        "machine": machine(), "layouts": {}}
    profiles: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        subprocess.run([sys.executable, "-m", SIDES, "write", "--folder", str(folder), "--size", size], cwd=ROOT,
                       check=True)
        for shape in told.layout:
            say(f"{size}, {shape}")
            rivals, tried = choose_rivals(folder, size, shape, told)
            sides, texts = alternate(folder, size, shape, rivals, told)
            profiles |= {f"{name}-{shape}": text for name, text in texts.items()}
            raw["layouts"][shape] = {"n_tokens": sum(layout(shape)), "rivals": rivals, "tried": tried, "sides": sides,
                                     "losses": compare_losses(sides)}
        raw["start"] = starts(folder, size, told, profiles)
    # A part of the layouts has a name of its own, and never stands in README for the whole.
    part = "" if set(told.layout) == set(LAYOUTS) else f"-{'-'.join(told.layout)}"
    path = save(f"train-{size}{part}", raw, told.out)
    for name, text in profiles.items():
        save(f"train-{size}-{name}", {"text": text}, told.out, suffix=".profile.txt")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option: Callable[..., Any] = parser.add_argument
    option("--size", action="append", choices=sorted(SIZES), help="layers x width; may be given again")
    option("--layout", action="append", help="documents x length, default 4x256 and 1x1024; may be given again")
    option("--rounds", type=int, default=6, help="turns of each side")
    option("--steps", type=int, default=2, help="training steps in one turn")
    option("--warmup", type=int, default=3, help="steps of each side that are not measured")
    option("--starts", type=int, default=3, help="fresh processes of each side, for loading and generation")
    option("--attempts", type=int, default=4, help="how often a turn is tried until the machine is quiet")
    option("--void-share", type=float, default=VOID_SHARE, help="share of the CPU that others may take in a turn")
    option("--profile", action="store_true", help="write the operators of one step beside the raw file")
    option("--no-compiled", dest="compiled", action="store_false", help="leave torch.compile out")
    option("--no-ours", dest="ours", action="store_false", help="the rivals and the limit only")
    option("--out", type=Path, help="folder of the raw files, default benchmarks/results")
    told = parser.parse_args()
    told.layout = told.layout or list(LAYOUTS)
    written = [bench(size, told) for size in told.size or ["12x768", "16x2048"]]
    for path in written:
        print("\n".join(tables.train_table(tables.read(path))), end="\n\n")
        print(f"raw figures: {path.name}")


if __name__ == "__main__":
    main()
