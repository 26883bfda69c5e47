"""Checkpoints: all that an interrupted run needs to go on bit for bit, in a folder that holds a whole one at any time.

A checkpoint is two files. step-N.json has the micro-batches that are done, what the run is made of (`about`), the
evaluations, and two SHA-256: of step-N.safetensors, and of itself without that one. The other file has the trained
weights as the optimizer moves them (fp32), its state, the states of torch's generators, and the records of the steps.
The JSON comes when the tensors are written and synced: without it there is no checkpoint. The last two stay (and both
until the next one stands, if there is room for three): where bytes of the newer one are not those that were written, a
run goes on from the older one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitune.arguments import short
from minitune.checkpoint.fields import integer, text
from minitune.checkpoint.files import discard, json_bytes, parse_json, readable, sha256_of, staged, sweep
from minitune.checkpoint.reader import SPOILT, Checkpoint
from minitune.checkpoint.safetensors_header import AGAIN, read_header
from minitune.checkpoint.writer import Summed, write_safetensors
from minitune.errors import InputError
from minitune.training.optimizers import FlatOptimizer
from minitune.training.run import EvaluationRecord, Run, SampleAnswer, StepRecord

FOLDER = "checkpoint"
FORMAT = 5
OWN = "own_sha256"
"""Of the JSON's bytes without this field, its last one."""
MOST = 1_000_000_000
"""Values of a checkpoint's JSON; it has the answers to every question at every evaluation."""
RECORDS = "run/records"
"""A row a step, the fields of StepRecord as fp64 (which holds each of its integers), seen as bytes."""
ANEW = "begin anew in another folder"
_ANEW = f"the checkpoint is damaged, and the run cannot be resumed; {ANEW}"


@dataclass(frozen=True)
class Position:
    """Where a run stands between two steps: the steps that are done, the micro-batches that they took, and the states
    of torch's generators by device type (what dropout draws next)."""

    step: int = 0
    micro_batches: int = 0
    generators: Mapping[str, Tensor] = field(default_factory=dict)

    def after(self, micro_batches: int, device: torch.device) -> Position:
        """One step on, with the generators as they are now."""
        return Position(self.step + 1, self.micro_batches + micro_batches, _states(device))

    def standing(self, device: torch.device) -> Position:
        """The same with the generators put back to what it holds; before the first step, it holds them as they are."""
        self.set_generators(device)
        return self if self.generators else dataclasses.replace(self, generators=_states(device))

    def set_generators(self, device: torch.device) -> None:
        """Put the generators back, those there are: before the first step there is nothing to put back."""
        if "cpu" in self.generators:
            torch.set_rng_state(self.generators["cpu"])
        if "cuda" in self.generators and device.type == "cuda":
            torch.cuda.set_rng_state(self.generators["cuda"], device)


def _states(device: torch.device) -> dict[str, Tensor]:
    """Those of torch's generators now."""
    states = {"cpu": torch.get_rng_state()}
    return states if device.type != "cuda" else {**states, "cuda": torch.cuda.get_rng_state(device)}


class Checkpoints:
    """The checkpoints of a run, in `folder`. `about` gives what the run is made of, as JSON holds it, whenever one is
    written. `trained` is where what was trained is saved when the run ends, for messages. `step`: that of the last
    checkpoint that stands; None: there is none yet.
    """

    def __init__(self, folder: Path, about: Callable[[], Mapping[str, Any]], trained: Path,
                 step: int | None = None) -> None:
        self.folder, self.trained, self.step = folder, trained, step
        self._about = about

    def write(self, position: Position, model: torch.nn.Module, optimizer: FlatOptimizer, run: Run) -> None:
        """Keep the run as it stands, and the last one before it that is there in its full length; older ones go when
        this one stands. InputError where it cannot be written; the last one stays."""
        content = {"format": FORMAT, "step": position.step, "micro_batches": position.micro_batches,
                   "run": self._about(), "evaluations": [_plain(each) for each in run.evaluations]}
        tensors, told = _files(self.folder, position.step)

        def put() -> None:
            with staged(self.folder) as staging:
                with staging.open(tensors.name) as file:    # takes its name before the JSON that stands for it
                    summed = Summed(file)
                    write_safetensors(summed, _tensors(position, model, optimizer, run))
                whole = {**content, "sha256": summed.sha256}
                staging.write(told.name, json_bytes({**whole, OWN: _own(whole)}))

        sweep(self.folder)
        self._keep(self._own_steps())
        try:
            put()
        except InputError as error:
            if not _is_full(error) or not self._make_room():
                raise
            put()
        self.step = position.step
        older = (step for step in self._own_steps()[1:] if _stands(self.folder, step))
        self._keep([self.step, *itertools.islice(older, 1)])

    def accept(self) -> None:
        """Let the whole checkpoints tell of the run as it goes on, where settings were changed: before the next one is
        written, a process may be killed. InputError where that cannot be written."""
        about = self._about()
        for step in self._own_steps():
            try:
                content = _content(self.folder, step)
            except InputError:
                continue        # damaged: nobody goes on from it
            if json_bytes({"run": content["run"]}) != json_bytes({"run": about}):
                content["run"] = about
                with staged(self.folder) as staging:
                    staging.write(_files(self.folder, step)[1].name, json_bytes({**content, OWN: _own(content)}))

    def _own_steps(self) -> list[int]:
        """The steps of this run's checkpoints, the newest first. One that is newer than the run, which could not be
        read when it went on from an older one, is none."""
        return [step for step in steps(self.folder) if self.step is not None and step <= self.step]

    def _make_room(self) -> bool:
        """Remove all but the newest whole checkpoint, on a disk that has no room for three; whether any was."""
        try:
            self.step = read(self.folder).step      # a disk may have spoilt the last one since it was written
        except InputError:
            return False        # as far as can be read none is whole: all stay
        before = steps(self.folder)
        self._keep([self.step])
        return steps(self.folder) != before

    def _keep(self, kept: Sequence[int]) -> None:
        """Remove what belongs to other steps than these. What cannot be removed ends no run."""
        stay = [path for step in kept for path in _files(self.folder, step)]
        # A checkpoint's JSON first: without it its tensors are none.
        for path in sorted(self.folder.glob("step-*"), key=lambda path: path.suffix != ".json"):
            if path not in stay:
                discard(path)

    def restore_weights(self, model: torch.nn.Module, optimizer: FlatOptimizer) -> int:
        """Put the weights of the newest whole checkpoint into the model -> its step. InputError where there is none."""
        saved = read(self.folder)
        with Checkpoint.open_file(saved.tensors) as source:
            _read_weights(source, model, optimizer)
        return saved.step


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was found whole; its tensors wait in the file until `restore`. ``note``: what is wrong with the
    newer one, where there is one."""

    folder: Path
    step: int
    micro_batches: int
    about: Mapping[str, Any]
    evaluations: list[EvaluationRecord]
    note: str = ""

    @property
    def tensors(self) -> Path:
        return _files(self.folder, self.step)[0]

    def restore(self, model: torch.nn.Module, optimizer: FlatOptimizer, run: Run) -> Position:
        """Put weights and moments into the model and the optimizer, what was recorded into the run -> where it stands.

        The model must have the parameters that the run trained; InputError where the file does not fit or is damaged.
        """
        try:
            return self._restore(model, optimizer, run)
        except InputError as error:     # the reader's advice on a damaged file is for one that can be had again
            raise InputError(str(error).replace(AGAIN, _ANEW).replace(SPOILT, _ANEW)) from None

    def _restore(self, model: torch.nn.Module, optimizer: FlatOptimizer, run: Run) -> Position:
        with Checkpoint.open_file(self.tensors) as source:
            left = set(source.names()) - _read_weights(source, model, optimizer)
            left -= _read_state(source, model, optimizer)
            states = {name.partition("/")[2]: source.read(name, torch.uint8) for name in sorted(left)
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
        kinds: dict[Any, Callable[[float], Any]] = {"int": int, "bool": bool, "float": float}
        return [StepRecord(**{each.name: kinds[each.type](value)
                              for each, value in zip(names, row, strict=True)}) for row in values.tolist()]


def steps(folder: Path) -> list[int]:
    """The steps of which there is a checkpoint, whole or damaged, the newest first."""
    found = (re.fullmatch(r"step-([1-9][0-9]{0,17})\.json", path.name) for path in folder.glob("step-*.json"))
    return sorted((int(match[1]) for match in found if match), reverse=True)


def read(folder: Path) -> Saved:
    """The newest whole checkpoint in `folder`. InputError, which names the newest's fault, where there is none."""
    fault: InputError | None = None
    for step in steps(folder):
        try:
            saved = _read(folder, step)
        except InputError as error:
            fault = fault or error
            continue
        if fault is None:
            return saved
        what = str(fault).removesuffix(f"; {_ANEW}")
        return dataclasses.replace(saved, note=f"{what}; the run goes on from the checkpoint before it, of step {step}")
    raise fault or InputError(f"{folder}: holds no checkpoint; begin anew in another folder")


def _is_full(error: InputError) -> bool:
    """Whether a disk, or the user's share of it, is full."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT)


def _own(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json_bytes(content)).hexdigest()


def _content(folder: Path, step: int) -> dict[str, Any]:
    """What the JSON of that step's checkpoint says. InputError where its bytes are not those that were written."""
    path = _files(folder, step)[1]
    with readable(path) as file:
        raw = file.readall()
    try:
        found = parse_json(raw, str(path), MOST)
    except InputError as error:
        raise InputError(f"{error}; {_ANEW}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InputError(f"{path}: its format is {short(found.get('format') if isinstance(found, dict) else found)}; "
                         f"this version of minitune goes on from format {FORMAT} alone; resume with the version that "
                         "began the run, or begin anew in another folder")
    if found.pop(OWN, None) != _own(found):
        raise InputError(f"{path}: its SHA-256 is not the one that it has as {OWN}, so some of its bytes are not those "
                         f"that were written; {_ANEW}")
    if found.get("step") != step:
        raise InputError(f"{path}: step is {short(found.get('step'))}, not that of its name; {_ANEW}")
    return found


def _stands(folder: Path, step: int) -> bool:
    """Whether that step's checkpoint is there in its full length. Its tensors' bytes are not summed, which takes about
    as long as to write them; who reads it does."""
    try:
        _content(folder, step)
        read_header(_files(folder, step)[0])
    except InputError:
        return False
    return True


def _read(folder: Path, step: int) -> Saved:
    """The checkpoint of that step. InputError where its bytes are not those that were written."""
    found, (tensors, path) = _content(folder, step), _files(folder, step)
    micro_batches = integer(str(path), "micro_batches", found.get("micro_batches"), low=step)
    sha256 = text(str(path), "sha256", found.get("sha256"))
    about, evaluations = found.get("run"), found.get("evaluations")
    if not isinstance(about, dict) or not isinstance(evaluations, list):
        raise InputError(f"{path}: run or evaluations is missing; {_ANEW}")
    if not tensors.is_file():
        raise InputError(f"{tensors}: there is no such file, which {path.name} stands for; {_ANEW}")
    if sha256_of(tensors) != sha256:
        raise InputError(f"{tensors}: its SHA-256 is not the one that {path.name} has, so some of its bytes are not "
                         f"those that were written; {_ANEW}")
    return Saved(folder, step, micro_batches, about, [_evaluation(path, each) for each in evaluations])


def remove(folder: Path) -> None:
    """Remove the checkpoints of a run that is finished, the oldest first, so that a process that is killed meanwhile
    leaves the newest; of each the JSON first, since without it there is none."""
    for step in reversed(steps(folder)):
        for path in reversed(_files(folder, step)):
            discard(path)
    sweep(folder)
    with contextlib.suppress(OSError):
        folder.rmdir()      # which fails where somebody else's files lie


def _files(folder: Path, step: int) -> tuple[Path, Path]:
    """The tensors of the checkpoint of that step, and the JSON that stands for them."""
    return folder / f"step-{step}.safetensors", folder / f"step-{step}.json"


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
        numbers = {name: None if found.get(name) is None else float(found[name])
                   for name in ("loss", "perplexity", "accuracy", "chosen", "rejected")}
        return EvaluationRecord(step=int(found["step"]), seconds=float(found["seconds"]), answers=answers,
                                n_tokens=None if found["n_tokens"] is None else int(found["n_tokens"]), **numbers)
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: evaluations has {short(found)}, which is no evaluation; {_ANEW}") from None


__all__ = ["FOLDER", "Checkpoints", "Position", "Saved", "read", "remove", "steps"]
