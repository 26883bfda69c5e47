"""Checkpoints: all that an interrupted run needs to go on bit for bit, in a folder that holds a whole one at any time.

checkpoint.json has the steps and micro-batches that are done, what the run is made of (`about`), the evaluations, and
the SHA-256 of step-N.safetensors. That has the trained weights as the optimizer moves them (fp32), its state, the
states of torch's generators, and the records of the steps. The JSON is replaced when the tensors it stands for are
written and synced, and only then older tensors go: a process that is killed in between leaves the older checkpoint, or
this one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitune.arguments import short
from minitune.checkpoint.fields import integer, text
from minitune.checkpoint.files import json_bytes, open_regular, parse_json, sha256_of, staged
from minitune.checkpoint.reader import SPOILT, Checkpoint
from minitune.checkpoint.safetensors_header import AGAIN
from minitune.checkpoint.writer import Summed, write_safetensors
from minitune.errors import InputError
from minitune.training.optimizers import FlatOptimizer
from minitune.training.run import EvaluationRecord, Run, SampleAnswer, StepRecord

FOLDER, JSON = "checkpoint", "checkpoint.json"
FORMAT = 3
RECORDS = "run/records"
"""A row a step, the fields of StepRecord as fp64 (which holds each of its integers), seen as bytes."""
_ANEW = "the checkpoint is damaged, and the run cannot be resumed; begin anew in another folder"


@dataclass(frozen=True)
class Position:
    """Where a run stands between two steps: the steps that are done, the micro-batches that they took, and the states
    of torch's generators by device type (what dropout draws next)."""

    step: int = 0
    micro_batches: int = 0
    generators: Mapping[str, Tensor] = field(default_factory=dict)

    def after(self, micro_batches: int, device: torch.device) -> Position:
        """One step on, with the generators as they are now."""
        states = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(device)
        return Position(self.step + 1, self.micro_batches + micro_batches, states)

    def set_generators(self, device: torch.device) -> None:
        """Put the generators back, those there are: before the first step there is nothing to put back."""
        if "cpu" in self.generators:
            torch.set_rng_state(self.generators["cpu"])
        if "cuda" in self.generators and device.type == "cuda":
            torch.cuda.set_rng_state(self.generators["cuda"], device)


class Checkpoints:
    """The checkpoint of a run, in `folder`. `about` gives what the run is made of, as JSON holds it, whenever one is
    written. `trained` is where what was trained is saved when the run ends, for messages. `step`: that of the
    checkpoint that stands; None: there is none yet.
    """

    def __init__(self, folder: Path, about: Callable[[], Mapping[str, Any]], trained: Path,
                 step: int | None = None) -> None:
        self.folder, self.trained, self.step = folder, trained, step
        self._about = about

    def write(self, position: Position, model: torch.nn.Module, optimizer: FlatOptimizer, run: Run) -> None:
        """Put the run as it stands in place of the last checkpoint. InputError where it cannot be written; the last one
        stays then."""
        content = {"format": FORMAT, "step": position.step, "micro_batches": position.micro_batches,
                   "run": self._about(), "evaluations": [_plain(each) for each in run.evaluations]}
        name = _tensors_of(position.step)
        with staged(self.folder) as staging:
            with staging.open(name) as file:        # takes its name before the JSON that stands for it
                summed = Summed(file)
                write_safetensors(summed, _tensors(position, model, optimizer, run))
            staging.write(JSON, json_bytes({**content, "sha256": summed.sha256}))
        self.step = position.step
        with contextlib.suppress(OSError):      # older ones, and what a killed process left half written
            for path in self.folder.iterdir():
                if path.name not in (JSON, name):
                    path.unlink()

    def restore_weights(self, model: torch.nn.Module, optimizer: FlatOptimizer) -> None:
        """Put the weights of the checkpoint that stands into the model. InputError where they cannot be read."""
        with read(self.folder).opened() as source:
            _read_weights(source, model, optimizer)


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read; its tensors wait in the file until `restore`."""

    folder: Path
    step: int
    micro_batches: int
    sha256: str
    about: Mapping[str, Any]
    evaluations: list[EvaluationRecord]

    @property
    def tensors(self) -> Path:
        return self.folder / _tensors_of(self.step)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Checkpoint]:
        """The file of its tensors. InputError, before anything is read into a model, where its bytes are not those
        that were written."""
        with Checkpoint.open_file(self.tensors) as source:
            if sha256_of(self.tensors) != self.sha256:
                raise InputError(f"{self.tensors}: its SHA-256 is not the one that {JSON} has, so some of its bytes "
                                 f"are not those that were written; {_ANEW}")
            yield source

    def restore(self, model: torch.nn.Module, optimizer: FlatOptimizer, run: Run) -> Position:
        """Put weights and moments into the model and the optimizer, what was recorded into the run -> where it stands.

        The model must have the parameters that the run trained; InputError where the file does not fit or is damaged.
        """
        try:
            return self._restore(model, optimizer, run)
        except InputError as error:     # the reader's advice on a damaged file is for one that can be had again
            raise InputError(str(error).replace(AGAIN, _ANEW).replace(SPOILT, _ANEW)) from None

    def _restore(self, model: torch.nn.Module, optimizer: FlatOptimizer, run: Run) -> Position:
        with self.opened() as source:
            left = set(source.names()) - _read_weights(source, model, optimizer)
            left -= _read_state(source, model, optimizer)
            states = {name.partition("/")[2]: source.read(name, torch.uint8) for name in left
                      if name.startswith("generators/")}
            odd = {RECORDS, "generators/cpu"} - left or left - {RECORDS, *(f"generators/{name}" for name in states)}
            if odd:
                raise InputError(f"{self.tensors}: tensor {short(min(odd))} is missing, or unknown; {_ANEW}")
            run.records, run.evaluations = self._records(source.read(RECORDS, torch.uint8)), list(self.evaluations)
        try:
            torch.Generator().set_state(states["cpu"])
        except RuntimeError:
            raise InputError(f"{self.tensors}: generators/cpu is no state of torch's generator; {_ANEW}") from None
        return Position(self.step, self.micro_batches, states)

    def _records(self, rows: Tensor) -> list[StepRecord]:
        names = fields(StepRecord)
        if rows.dim() != 2 or rows.shape != (self.step, 8 * len(names)):
            raise InputError(f"{self.tensors}: {RECORDS} has shape {list(rows.shape)}; it must have a row for each of "
                             f"the {self.step} steps; {_ANEW}")
        values = rows.view(torch.float64)
        always = [i for i, each in enumerate(names) if each.name not in ("loss", "grad_norm")]
        if not bool(values[:, always].isfinite().all()):
            raise InputError(f"{self.tensors}: {RECORDS} holds values that are not finite; {_ANEW}")
        return [StepRecord(**{each.name: int(value) if each.type == "int" else value
                              for each, value in zip(names, row, strict=True)}) for row in values.tolist()]


def read(folder: Path) -> Saved:
    """The checkpoint in `folder`. InputError, which names the file, for one that is no longer whole."""
    path = folder / JSON
    with open_regular(path) as file:
        found = parse_json(file.readall(), str(path))
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InputError(f"{path}: its format is {short(found.get('format') if isinstance(found, dict) else found)}; "
                         f"this version of minitune goes on from format {FORMAT} alone")
    step = integer(str(path), "step", found.get("step"))
    micro_batches = integer(str(path), "micro_batches", found.get("micro_batches"), low=step)
    sha256 = text(str(path), "sha256", found.get("sha256"))
    about, evaluations = found.get("run"), found.get("evaluations")
    if not isinstance(about, dict) or not isinstance(evaluations, list):
        raise InputError(f"{path}: run or evaluations is missing; {_ANEW}")
    saved = Saved(folder, step, micro_batches, sha256, about, [_evaluation(path, each) for each in evaluations])
    if not saved.tensors.is_file():
        raise InputError(f"{saved.tensors}: there is no such file, which {JSON} stands for; {_ANEW}")
    return saved


def remove(folder: Path) -> None:
    """Remove the checkpoint of a run that is finished; the JSON goes first, since without it there is none."""
    (folder / JSON).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _tensors_of(step: int) -> str:
    return f"step-{step}.safetensors"


def _named(model: torch.nn.Module, optimizer: FlatOptimizer) -> list[tuple[str, Tensor]]:
    """What the optimizer moves, in its order, with the model's names."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [(names[id(p)], p) for group in optimizer.param_groups for p in group["params"]]


def _tensors(position: Position, model: torch.nn.Module, optimizer: FlatOptimizer, run: Run) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, p in _named(model, optimizer):
        found[f"weights/{name}"] = p
        for key, value in optimizer.state.get(p, {}).items():
            found[f"optimizer/{name}/{key}"] = value
    found |= {f"generators/{name}": state for name, state in position.generators.items()}
    rows = [[float(value) for value in dataclasses.astuple(record)] for record in run.records]
    return found | {RECORDS: torch.tensor(rows, dtype=torch.float64).view(torch.uint8)}


def _read_weights(source: Checkpoint, model: torch.nn.Module, optimizer: FlatOptimizer) -> set[str]:
    """The names of what was read."""
    named = {f"weights/{name}": p for name, p in _named(model, optimizer)}
    missing = named.keys() - set(source.names())
    if missing:
        raise InputError(f"{source.path(source.names()[0])}: tensor {short(min(missing))} is missing; {_ANEW}")
    for name, p in named.items():
        source.read_into(name, p)
    return set(named)


def _read_state(source: Checkpoint, model: torch.nn.Module, optimizer: FlatOptimizer) -> set[str]:
    """The names of what was read. A parameter that never had a gradient has no state."""
    taken: set[str] = set()
    state: dict[int, dict[str, Tensor]] = {}
    for index, (name, _) in enumerate(_named(model, optimizer)):
        start = f"optimizer/{name}/"
        own = [each for each in source.names() if each.startswith(start)]
        if own:
            state[index] = {each.removeprefix(start): source.read(each) for each in own}
        taken |= set(own)
    try:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    except InputError as error:
        raise InputError(f"{source.path(source.names()[0])}: {error}; {_ANEW}") from None
    return taken


def _plain(record: EvaluationRecord) -> dict[str, Any]:
    """As JSON holds it: a number that is not finite as a text ("inf", "nan")."""
    return {name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(record).items()}


def _evaluation(path: Path, found: Any) -> EvaluationRecord:
    try:
        answers = tuple(SampleAnswer(question=str(each["question"]), answer=str(each["answer"]))
                        for each in found["answers"])
        numbers = {name: None if found[name] is None else float(found[name])
                   for name in ("loss", "perplexity", "accuracy")}
        return EvaluationRecord(step=int(found["step"]), seconds=float(found["seconds"]), answers=answers,
                                n_tokens=None if found["n_tokens"] is None else int(found["n_tokens"]), **numbers)
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: evaluations has {short(found)}, which is no evaluation; {_ANEW}") from None


__all__ = ["FOLDER", "JSON", "Checkpoints", "Position", "Saved", "read", "remove"]
