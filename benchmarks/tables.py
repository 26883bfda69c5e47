"""Every table of figures, made from the raw files: RESULTS.md and KERNELS.md here, README.md's between its markers.

``python -m benchmarks.tables`` rewrites them. For each name the newest raw file counts, in RESULTS.md on each kind of
machine.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT, summary
from benchmarks.tables_aot import kernels_page
from benchmarks.tables_data import data_table
from benchmarks.tables_full import full_table
from benchmarks.tables_gpu import gpu_tables
from benchmarks.tables_memory import memory_table
from benchmarks.tables_nf4 import nf4_kernels_table, nf4_table, readme_nf4
from benchmarks.tables_peers import peers_table, readme_peers
from benchmarks.tables_text import UNMEASURED, markdown, ratio, spread, verdict, where

Raw = dict[str, Any]
PAGE, KERNELS, README = ROOT / "benchmarks" / "RESULTS.md", ROOT / "benchmarks" / "KERNELS.md", ROOT / "README.md"
TARGETS = {"12x768": {"eager": 1.6, "compiled": 1.2}, "16x2048": {"eager": 1.35, "products": 0.60}}
"""What our tokens/s must be of each other side's, at the least."""
GENERATION_TARGET = 1.5
SAME_BEST = 0.9
"""Of a prompt's positions, how many must have the same best next token on both sides; bf16 turns a few near-ties."""
_NAMES = {"ours": "minitune", "eager": "transformers + PEFT", "compiled": "the same, torch.compile",
          "products": "products alone (limit)"}


# ---- raw files ------------------------------------------------------------------------------------------------------
def read(path: Path) -> Raw:
    raw: Raw = json.loads(path.read_text())
    return raw


def newest(folder: Path, each_machine: bool = False) -> dict[str, Raw]:
    """name -> the newest raw file of that name, or with `each_machine` of that name on each kind of machine."""
    found: dict[str, Raw] = {}
    for path in sorted(folder.glob("*.json")):
        raw = read(path)
        name = f"{raw['name']} on {raw['machine']['cpu']}" if each_machine else raw["name"]
        if name not in found or raw["when"] >= found[name]["when"]:
            found[name] = raw
    return found


def trial(raw: Raw) -> bool:
    """Whether a file only tried the harness: tiny shapes, whose figures say nothing."""
    return raw.get("size") == "2x64" or raw.get("device") == "cpu"


# ---- training -------------------------------------------------------------------------------------------------------
def _row(what: str, value: float | None, target: float, at_least: bool) -> tuple[str, str, str, str]:
    return what, *verdict(value, target, at_least)


def verdicts(raw: Raw) -> list[tuple[str, str, str, str]]:
    """(what, ratio, target, met or short) for every figure that was promised."""
    rows = []
    for shape, found in raw["layouts"].items():
        sides: dict[str, Raw] = {name: side for name, side in found["sides"].items() if not side["void"]}
        ours = sides.get("ours")
        for other, target in TARGETS.get(raw["size"], {}).items():
            value = ratio(ours and ours["tokens_per_s"], sides.get(other, {}).get("tokens_per_s"))
            rows.append(_row(f"{shape}: tokens/s over {_NAMES[other]}", value, target, True))
        leanest = [sides[name]["memory"]["resident_peak"] for name in ("eager", "compiled") if name in sides]
        value = ours["memory"]["resident_peak"] / min(leanest) if ours and leanest else None
        rows.append(_row(f"{shape}: peak memory over the leaner rival", value, 1.0, False))
        losses: Raw = found["losses"]
        if losses["compared"]:
            same = losses["same_start"] and losses["same_course"]
            rows.append((f"{shape}: loss curves, largest difference", f"{losses['largest_difference']:.3f}", "match",
                         "met" if same else "short"))
    ours, peers = raw["start"].get("ours", {}), raw["start"].get("peers", {})
    if ours.get("runs") and peers.get("runs"):
        pairs = list(zip(ours["runs"][-1]["argmax"], peers["runs"][-1]["argmax"], strict=True))
        rows.append(_row("first logits: share of positions with their best token",
                         sum(a == b for a, b in pairs) / len(pairs), SAME_BEST, True))
    rows.append(_row("process start to first logits, over theirs",
                     ratio(ours.get("first_logits_s"), peers.get("first_logits_s")), 1.0, False))
    rows.append(_row("greedy generation over theirs", ratio(
        ours.get("generation_tokens_per_s"), peers.get("generation_tokens_per_s")), GENERATION_TARGET, True))
    return rows


def train_table(raw: Raw) -> list[str]:
    """The figures of one size: speed and memory by layout, start and generation, and each promise kept or not."""
    lines = [f"### {raw['size']}, {raw['parameters'] / 1e6:,.3g} M parameters, LoRA r {raw['settings']['rank']}", "",
             where(raw), ""]
    rows = []
    for shape, found in raw["layouts"].items():
        chosen = {"compiled" if v["compiled"] else "eager": f", {v['adapters']} adapters, {v['attention']}"
                  for v in found["rivals"]}
        for name in ("ours", "eager", "compiled", "products"):
            side = found["sides"].get(name)
            if side:
                note = " (void: the loss stood still)" if side["loss_stood_still"] else ""
                memory = f"{side['memory']['resident_peak'] / 1e9:.2f}" if name != "products" else ""
                rows.append((shape, _NAMES[name] + chosen.get(name, "") + note, spread(side["tokens_per_s"]), memory,
                             str(sum(turn["void"] for turn in side["turns"] if not turn["warmup"]))))
    lines += markdown(("layout", "side", "tokens/s", "peak GB", "void turns"), rows)
    starts = [(_NAMES["ours" if name == "ours" else "eager"].removesuffix(" + PEFT"), spread(side["first_logits_s"], 2),
               *(_until(side, mark) for mark in ("imported", "loaded")), spread(side["generation_tokens_per_s"], 1))
              for name, side in raw["start"].items()]
    lines += ["", *markdown(("side", "start to first logits, s", "imported at", "weights loaded at", "greedy tokens/s"),
                            starts)]
    return [*lines, "", *markdown(("what", "ratio", "target", "verdict"), verdicts(raw))]


def _until(side: Raw, mark: str) -> str:
    """Seconds from process start to a mark on the way to the first logits; older files have none."""
    found = [run[mark] for run in side["runs"] if mark in run and not run["void"]]
    return spread(summary(found), 2) if found else ""


# ---- documents ------------------------------------------------------------------------------------------------------
_KINDS: dict[str, tuple[str, Callable[[Raw], list[str]]]] = {
    "train": ("Training and generation on the CPU", train_table),
    "peers": ("Beside LitGPT and torchtune on the CPU", peers_table),
    "full": ("Full fine-tuning on the CPU", full_table),
    "nf4-kernels": ("4-bit kernels on the CPU", nf4_kernels_table), "nf4": ("QLoRA on the CPU", nf4_table),
    "data": ("Reading data on the CPU", data_table),
    "gpu": ("On a GPU", gpu_tables), "memory": ("A GPU's memory, counted without one", memory_table)}


def results_page(raws: dict[str, Raw]) -> str:
    """The whole of RESULTS.md."""
    lines = ["# Measured", "", "Made from `results/` by `python -m benchmarks.tables`; edit nothing here.", ""]
    for kind, (title, table) in _KINDS.items():
        chosen = [raw for _, raw in sorted(raws.items()) if raw["kind"] == kind]
        if chosen:
            lines += [f"## {title}", ""]
            for raw in chosen:
                lines += [*table(raw), ""]
    return "\n".join(lines).rstrip() + "\n"


def readme_train(raws: dict[str, Raw]) -> str:
    """README's short table: a row a side, a column a size and layout. Of runs that measured all layouts of a size; one
    that looked at a part has a name of its own, and stands in RESULTS.md."""
    raws = {name: raw for name, raw in raws.items() if raw["kind"] == "train" and raw["name"] == f"train-{raw['size']}"}
    columns = [(raw["size"], shape, found["sides"]) for _, raw in sorted(raws.items())
               for shape, found in raw["layouts"].items()]
    if not columns:
        return UNMEASURED
    rows = []
    for name in ("eager", "compiled", "ours", "products"):
        cells = []
        for _, _, sides in columns:
            found = sides.get(name)
            rate = found["tokens_per_s"] if found and not found["void"] else {}
            cells.append(f"{rate['median']:,.0f}" if rate.get("n") else "-")
        rows.append([f"**{_NAMES[name]}**" if name == "ours" else _NAMES[name], *cells])
    head = ["tokens/s", *(f"{size}, {shape}" for size, shape, _ in columns)]
    places = sorted({where(raw) for raw in raws.values()})
    return "\n".join([*markdown(head, rows), "", *places])


def by_machine(table: Callable[[dict[str, Raw]], str], raws: dict[str, Raw]) -> str:
    """README's table of each kind of machine, the one that has measured most first: a row never mixes two."""
    machines: dict[str, dict[str, Raw]] = {}
    for name, raw in raws.items():
        machines.setdefault(raw["machine"]["cpu"], {})[name] = raw
    tables = [table(found) for found in sorted(machines.values(), key=len, reverse=True)]
    return "\n\n".join([each for each in tables if each != UNMEASURED] or [UNMEASURED])


def fill(text: str, kind: str, table: str) -> str:
    """`text` with the lines between ``<!-- bench:kind -->`` and ``<!-- /bench -->`` replaced by `table`."""
    pattern = re.compile(rf"(<!-- bench:{re.escape(kind)} -->\n).*?(<!-- /bench -->)", re.DOTALL)
    return pattern.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text)


def documents(results: Path = RESULTS, page: Path = PAGE, kernels: Path = KERNELS,
              readme: Path = README) -> dict[Path, str]:
    """file -> the text that it has to hold by the raw files in `results`: RESULTS.md; KERNELS.md if kernels were
    compiled; README.md if it is there. Nothing is written."""
    everywhere = {name: raw for name, raw in newest(results, each_machine=True).items() if not trial(raw)}
    raws = {name: raw for name, raw in newest(results).items() if not trial(raw)}
    found = {page: results_page(everywhere)}
    for raw in raws.values():
        if raw["kind"] == "aot":
            found[kernels] = kernels_page(raw)
    if readme.exists():
        text = readme.read_text()
        for kind, table in {"train": readme_train, "peers": readme_peers, "nf4": readme_nf4}.items():
            text = fill(text, kind, by_machine(table, everywhere))
        found[readme] = text
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--kernels", type=Path, default=KERNELS)
    parser.add_argument("--readme", type=Path, default=README)
    told = parser.parse_args()
    if not any(told.results.glob("*.json")):
        parser.error(f"{told.results} holds no raw file; nothing was written")
    for path, text in documents(told.results, told.page, told.kernels, told.readme).items():
        same = path.exists() and path.read_text() == text
        path.write_text(text)
        print(f"{path.name}: {'unchanged' if same else 'rewritten'}")


if __name__ == "__main__":
    main()
