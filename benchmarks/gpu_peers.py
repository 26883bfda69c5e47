"""A training step of Llama-2-7B shape by minitune, transformers + PEFT (+ bitsandbytes) and Unsloth, each by itself.

``python -m benchmarks.gpu_peers --device cuda`` starts a process for each side, one after the other, and prints a row
of JSON a side: 16k tokens a step in documents of 2048, rank 16 on all linears, every token trained, the same random
weights and adapters. A rival runs at several micro-batches, with and without checkpointing; its fastest counts. FLOPs a
token as in `gpu_step`. The loss of the one repeated batch must fall, and the sides' first losses must agree.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_step import flops_a_token, seconds_a_step
from benchmarks.gpu_timing import emit, matrix_rate, reason
from benchmarks.harness import ROOT, summary
from benchmarks.random_weights import batch, ours, theirs
from benchmarks.shapes import ALPHA, LR, RANK, SEED, SEVEN_B, TINY, Size, token_ids
from minitune.config import LINEAR_NAMES

SIDES = ("minitune", "minitune nf4-dq", "peft", "peft compiled", "peft nf4-dq", "unsloth", "unsloth nf4-dq")
SECONDS = {"minitune": 60, "minitune nf4-dq": 60}
"""Limit of a side's process; 75 for the others."""


def measure_ours(size: Size, lengths: tuple[int, ...], device: str, quant: str | None, steps: int) -> Iterator[Any]:
    """One row for each memory policy."""
    import minitune as mt

    model = ours(size, device, quant, "auto")
    model.train()
    data = batch(size, lengths, device)
    for memory in ("auto", "full"):
        model.network.memory = memory
        model.network._policies.clear()
        parameters = model.trainable_parameters()
        optimizer = mt.AdamW(parameters, lr=LR)
        yield {"memory": memory, "policy": model.network._policy(len(data.tokens)),
               **_timed(lambda: model.loss(data), optimizer, parameters, 1, sum(lengths), device, steps)}


def measure_peers(size: Size, lengths: tuple[int, ...], device: str, quant: str | None, compiled: bool,
                  steps: int) -> Iterator[Any]:
    """One row for each micro-batch that fits; without checkpointing first, then with it."""
    ids = torch.tensor(token_ids(size, sum(lengths)), device=device).view(len(lengths), lengths[0])
    for checkpointing in (False, True):
        model = theirs(size, device, quant, compiled, checkpointing)
        parameters = [p for p in model.parameters() if p.requires_grad]
        for rows in (4, 8) if checkpointing else (1, 2, 4):
            optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=device == "cuda")
            parts = [ids[i : i + rows] for i in range(0, len(ids), rows)]
            yield {"micro_batch": rows, "checkpointing": checkpointing,
                   **_attempt(lambda model=model, parts=parts: _losses(model, parts), optimizer, parameters,
                              len(parts), sum(lengths), device, steps)}
        del model, parameters
        if device == "cuda":
            torch.cuda.empty_cache()


def measure_unsloth(size: Size, lengths: tuple[int, ...], device: str, quant: str | None, steps: int) -> Iterator[Any]:
    """Unsloth over a folder of the same weights, its own checkpointing on, at two micro-batches."""
    from unsloth import FastLanguageModel

    from benchmarks.gpu_step import write_folder

    with tempfile.TemporaryDirectory() as place:
        write_folder(size, Path(place), device)
        model, _ = FastLanguageModel.from_pretrained(place, max_seq_length=max(lengths), dtype=torch.bfloat16,
                                                     load_in_4bit=quant is not None)
    model = FastLanguageModel.get_peft_model(model, r=RANK, lora_alpha=ALPHA, target_modules=list(LINEAR_NAMES),
                                             lora_dropout=0, use_gradient_checkpointing="unsloth", random_state=SEED)
    ids = torch.tensor(token_ids(size, sum(lengths)), device=device).view(len(lengths), lengths[0])
    parameters = [p for p in model.parameters() if p.requires_grad]
    for rows in (4, 8):
        optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)
        parts = [ids[i : i + rows] for i in range(0, len(ids), rows)]
        yield {"micro_batch": rows, "checkpointing": True,
               **_attempt(lambda parts=parts: _losses(model, parts), optimizer, parameters, len(parts), sum(lengths),
                          device, steps)}


def _losses(model: Any, parts: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The loss of each micro-batch as its share of the step's mean."""
    for part in parts:
        yield model(input_ids=part, labels=part).loss / len(parts)


def _attempt(*given: Any) -> dict[str, Any]:
    """`_timed`, or the reason why not: most often memory."""
    try:
        return _timed(*given)
    except (RuntimeError, torch.OutOfMemoryError) as failure:
        return {"error": reason(failure)}


def _timed(loss: Callable[[], Any], optimizer: Any, parameters: list[Any], parts: int, tokens: int, device: str,
           steps: int) -> dict[str, Any]:
    """Two steps to warm up, then `steps` timed ones. `loss` gives one loss, or an iterator of `parts` losses."""
    losses: list[torch.Tensor] = []

    def step() -> None:
        optimizer.zero_grad()
        found = loss()
        total = torch.zeros((), device=device)
        for part in [found] if parts == 1 and isinstance(found, torch.Tensor) else found:
            part.backward()
            total += part.detach()
        optimizer.step()
        losses.append(total)

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = seconds_a_step(step, steps, device)
    norm = float(torch.stack([p.grad.float().norm() for p in parameters if p.grad is not None]).norm())
    curve = [float(value) for value in losses]
    found = {"tokens_per_s": summary([tokens / s for s in seconds]), "seconds": seconds, "losses": curve,
             "grad_norm": norm, "right": curve[-1] < curve[0] and norm > 0}
    if device == "cuda":
        found |= {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return found


def run_side(side: str, device: str) -> None:
    """In a process of its own: every row of one side."""
    size, lengths, steps = (SEVEN_B, (2048,) * 8, 4) if device == "cuda" else (TINY, (16,) * 4, 2)
    quant = "nf4-dq" if "nf4" in side else None
    if side.startswith("minitune"):
        rows = measure_ours(size, lengths, device, quant, steps)
    elif side.startswith("peft"):
        rows = measure_peers(size, lengths, device, quant, "compiled" in side, steps)
    else:
        rows = measure_unsloth(size, lengths, device, quant, steps)
    flops = flops_a_token(size, lengths)
    for row in rows:
        emit(what="peer", side=side, tokens=sum(lengths), flops_a_token=flops, **row)


def missing(side: str) -> str | None:
    """What this side needs and is not installed."""
    needed = {"peft": ("transformers", "peft"), "unsloth": ("unsloth",)}.get(side.split()[0], ())
    needed += ("bitsandbytes",) if "nf4" in side and not side.startswith("minitune") else ()
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed" if absent else None


def start(side: str, device: str) -> list[dict[str, Any]]:
    """The rows of one side's process; what it printed before its time was over counts."""
    words = [sys.executable, "-m", "benchmarks.gpu_peers", "--device", device, "--side", side]
    begun = time.monotonic()
    try:
        run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS.get(side, 75),
                             env={**os.environ, "HF_HUB_OFFLINE": "1"})
        out, err, code = run.stdout, run.stderr, run.returncode
    except subprocess.TimeoutExpired as cut:
        out, err, code = (cut.stdout or b"").decode(), "cut off", None
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    if code:
        rows.append({"what": "peer", "side": side, "error": err.strip().splitlines()[-1][:300] if err.strip() else code,
                     **({"right": False} if side.startswith("minitune") else {})})
    print(f"{side}: {time.monotonic() - begun:.0f} s, exit {code}", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--side", choices=SIDES, help="this one alone, in this process")
    told = parser.parse_args()
    if told.side:
        run_side(told.side, told.device)
        return
    emit(what="matrix rate", tflops=matrix_rate(told.device))
    first: dict[str, float] = {}
    for side in SIDES if told.device == "cuda" else SIDES[:3]:
        reason_why = missing(side)
        if reason_why:
            emit(what="peer", side=side, unavailable=reason_why)
            continue
        for row in start(side, told.device):
            emit(**row)
            if row.get("losses"):
                first.setdefault(side, row["losses"][0])
    if {"minitune", "peft"} <= first.keys():
        apart = abs(first["minitune"] - first["peft"])
        emit(what="agreement", first_losses=first, right=apart < 0.02)
    emit(what="end")


if __name__ == "__main__":
    main()
