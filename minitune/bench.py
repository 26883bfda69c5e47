"""bench: how fast training is on this machine, of a model's own shapes, on random tokens."""

from __future__ import annotations

import os
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from minitune.api.loading import config_of, load, random_model
from minitune.api.model import Model
from minitune.api.plan import model_row, trained_row
from minitune.api.training import train
from minitune.arguments import check_path, check_positive, check_whole
from minitune.checkpoint.files import json_bytes, staged
from minitune.config import LoRA, MemoryPolicy, Moments, Quant, Training
from minitune.data.batch import Batch
from minitune.data.packing import pack
from minitune.errors import InputError
from minitune.ops.backends import backends
from minitune.report.environment import environment
from minitune.report.folder import plain
from minitune.report.tables import print_table
from minitune.training.machine import matrix_rate
from minitune.training.needs import gigabytes, longest_row
from minitune.training.run import Run

WARM_UP = 3
"""Steps before the measured ones: kernels are compiled, programs made, memory taken."""
ROWS = 8
"""Different rows of random tokens, again and again."""
LEAST, MOST = 5, 1000
"""Measured steps."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured. ``base``: a checkpoint folder, or the name of a shape (random weights, never on a disk);
    ``longest``: the length of the documents in a row of ``tokens``, None for as long as the model reads; ``seconds`` to
    measure for, about; ``train``: base weights that are trained instead of an adapter of ``rank`` (None: 16)."""

    base: str
    tokens: int
    longest: int | None
    micro_batches: int
    seconds: float
    rank: int | None
    train: tuple[str, ...]
    quant: Quant | None
    memory: MemoryPolicy
    moments: Moments


def bench(setting: Setting, device: str | None, dtype: str | None, out: Path | None) -> None:
    """Measure whole training steps, print a table, and write the raw figures into the file `out`. InputError for a
    setting that is none, and for a file that is there already."""
    _check(setting, out)
    model = _model(setting, device, dtype)
    training = Training(tokens=setting.tokens, micro_batches=setting.micro_batches, moments=setting.moments,
                        max_steps=WARM_UP, log_every=1)
    rows = _rows(model, setting)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # what is wrong is said of the run that is measured
        warm = train(model, rows, training=training, quiet=True)
    median = statistics.median(each.seconds for each in warm.records[1:])
    steps = max(LEAST, min(MOST, round(setting.seconds / median)))
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    run = train(model, rows, training=replace(training, max_steps=steps + 1))
    rate = matrix_rate(model.device, model.network.dtype)
    measured = run.records[1:]          # the first one takes memory for the moments
    policy = model.network.policy_of(longest_row(rows, model.device) or setting.tokens)
    print_table("Training on this machine", ("", "here"), [
        ("machine", _machine(environment(str(model.device)))),
        model_row(model, setting.base), trained_row(model, training),
        ("a step", f"{setting.micro_batches} x {setting.tokens:,} tokens in documents of "
                   f"{rows[0].longest_trained:,}; memory {policy}"),
        ("measured", f"{len(measured)} steps, after {WARM_UP + 1} to warm up"),
        ("tokens/s", _spread([each.tokens_per_second for each in measured], ",.0f")),
        ("seconds a step", _spread([each.seconds for each in measured], ".4g")),
        ("of the matrix rate", f"{statistics.median(each.flops / each.seconds for each in measured) / rate:.0%} of "
                               f"{rate / 1e12:,.2f} TFLOP/s"),
        ("most memory", f"{gigabytes(max(each.memory for each in measured))} "
                        f"{'of tensors' if model.device.type == 'cuda' else 'of the process'}")])
    if out is not None:
        _write(out, model, setting, run, policy, rate)
        print(f"every step in {out}")


def _check(setting: Setting, out: Path | None) -> None:
    check_whole("bench", "tokens", setting.tokens, low=2)
    check_positive("bench", seconds=setting.seconds)
    if setting.longest is not None:
        check_whole("bench", "longest", setting.longest, low=2)
        if setting.longest > setting.tokens:
            raise InputError(f"bench: longest is {setting.longest}; it must be at most tokens ({setting.tokens})")
    if not setting.base:
        raise InputError("bench: base is empty; give a folder, or the name of a shape")
    if setting.rank is not None and setting.train:
        raise InputError(f"bench: rank is {setting.rank}, and train={list(setting.train)} has no adapter; leave one "
                         "out")
    if out is not None:
        _check_out(check_path("bench", "out", out))


def _check_out(out: Path) -> None:
    """InputError for a file that is there, and for one in no folder that can be written, before anything is measured.
    """
    if out.exists():
        raise InputError(f"{out} exists already; name another file, or remove it")
    place = next(each for each in out.absolute().parents if each.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InputError(f"{out}: cannot be written: {place} is {'not writable' if place.is_dir() else 'no folder'}; "
                         "name another place")


def _model(setting: Setting, device: str | None, dtype: str | None) -> Model:
    """The folder's, or one of that shape."""
    lora = None if setting.train else LoRA() if setting.rank is None else LoRA(rank=setting.rank)
    names: str | Sequence[str] | None = setting.train[0] if len(setting.train) == 1 else setting.train or None
    if Path(setting.base).exists():
        return load(setting.base, device=device, dtype=dtype, quant=setting.quant, lora=lora, train=names,
                    memory=setting.memory)
    return random_model(config_of("bench", setting.base), device=device, dtype=dtype, quant=setting.quant, lora=lora,
                        train=names, memory=setting.memory)


def _rows(model: Model, setting: Setting) -> list[Batch]:
    """Each token trained but a document's last."""
    generator = torch.Generator().manual_seed(0)
    longest = setting.longest or min(setting.tokens, model.config.max_positions)
    lengths = [longest] * (setting.tokens // longest)
    if setting.tokens - sum(lengths) > 1:
        lengths.append(setting.tokens - sum(lengths))
    return [pack([torch.randint(model.config.vocab_size, (length,), generator=generator) for length in lengths],
                 setting.tokens)[0] for _ in range(ROWS)]


def _spread(values: Sequence[float], form: str) -> str:
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return f"{statistics.median(values):{form}} (p20 to p80: {low:{form}} to {high:{form}})"


def _machine(found: dict[str, Any]) -> str:
    cpu = f"{found['processor']}, {found['threads']} threads"
    gpu = f"{found['gpu']['name']}, " if found["gpu"] else ""
    return f"{gpu}{cpu}; torch {found['packages']['torch']}"


def _write(out: Path, model: Model, setting: Setting, run: Run, policy: str, rate: float) -> None:
    """The raw figures as JSON, those of the step to warm up too, as the first."""
    raw = {"kind": "minitune bench", "when": datetime.now(UTC).isoformat(timespec="seconds"),
           "environment": environment(str(model.device)), "backends": backends(model.device),
           "setting": {**asdict(setting), "base": Path(setting.base).name,
                       "rank": None if model.lora is None else model.lora.rank,
                       "dtype": str(model.network.dtype).removeprefix("torch.")},
           "model": asdict(model.config), "memory_taken": policy, "matrix_flops_per_second": rate,
           "steps": [asdict(each) for each in run.records]}
    with staged(out.parent) as staging:
        staging.write(out.name, json_bytes(plain(raw)))


__all__ = ["Setting", "bench"]
