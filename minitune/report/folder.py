"""RunFolder: all that a run leaves behind, in one folder that is usable at any moment."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minitune.arguments import short, warn
from minitune.checkpoint.files import json_bytes, read_json_object, replaced, staged, sweep
from minitune.errors import InputError, NotSaved, out_of_memory
from minitune.report.environment import environment
from minitune.report.metrics import AnswersFile, MetricsFile
from minitune.report.plot import LossPlot
from minitune.training import checkpoint
from minitune.training.run import EvaluationRecord, Observer, Run, RunInfo
from minitune.training.schedule import min_lr_ratio_of, warmup_of

METRICS = "metrics.jsonl"
FILES = ("config.json", "environment.json", "ledger.json", METRICS, "answers.jsonl")
"""What the observers of `run_folder` write before anything is trained."""


EVALUATION = "evaluation.json"
"""In `what`-best: the step and the validation loss of what lies there."""


def check_free(folder: Path) -> None:
    """InputError unless `folder` is not there yet, or is an empty folder."""
    if checkpoint.steps(folder / checkpoint.FOLDER):
        raise InputError(f"{folder} exists already, with a run that did not end: go on with it (--resume, in Python "
                         "resume=True), name another folder, or remove it")
    if folder.is_symlink() and not folder.exists():
        raise InputError(f"{folder} is a link to {os.readlink(folder)}, which is not there; make that folder, or name "
                         "another one")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists already; name another folder, or remove it")


def check_no_run(folder: Path) -> None:
    """InputError where `folder`, given as a model, is what a run left: it says what of it is the base, and what the
    adapter. Which of its adapters is wanted, the last or the best, only the user knows."""
    if not (folder / "config.json").is_file() or not (folder / "environment.json").is_file():
        return
    found = read_json_object(folder / "config.json")
    model = found.get("model")
    if "model_type" in found or not isinstance(model, dict):
        return
    whole = [folder / name for name in ("model", "model-best") if (folder / name).is_dir()]
    adapters = [folder / name for name in ("adapter", "adapter-best") if (folder / name).is_dir()]
    if whole:
        advice = f"give {' or '.join(map(str, whole))}, which it trained"
    elif adapters:
        stored = _is_quantized(model.get("path"))       # then it needs no word, and takes none
        quant = f", quant {found['quant']}" if isinstance(found.get("quant"), str) and not stored else ""
        advice = (f"its base is {short(model.get('path'))[1:-1]}{quant}; give that here, and "
                  f"{' or '.join(map(str, adapters))} as the adapter")
    else:
        advice = f"it kept nothing that was trained; its base is {short(model.get('path'))[1:-1]}"
    raise InputError(f"{folder}: is the folder of a run, no model: {advice}")


def _is_quantized(base: Any) -> bool:
    """Whether the checkpoint at this path, if it is still there, was stored in 4 bits."""
    config = Path(base) / "config.json" if isinstance(base, str) else None
    return config is not None and config.is_file() and "quantization_config" in read_json_object(config)


def run_folder(folder: Path, save: Callable[[Path], None], sound: Callable[[], bool], what: str,
               config: Mapping[str, Any]) -> list[Observer]:
    """The observers that fill `folder`: see RunFolder; metrics.jsonl, answers.jsonl and loss.png beside it. Last comes
    what removes the checkpoint: a process that is killed before all is written can be resumed."""
    return [RunFolder(folder, save, sound, what, config), MetricsFile(folder / METRICS),
            AnswersFile(folder / "answers.jsonl"), LossPlot(folder / "loss.png"),
            Finished(folder / checkpoint.FOLDER)]


def _evaluation_of(best: Path) -> tuple[float, int] | None:
    """(validation loss, step) of the best so far; None where its folder does not tell."""
    try:
        found = read_json_object(best / EVALUATION)
        return float(found["valid_loss"]), int(found["step"])
    except (InputError, KeyError, TypeError, ValueError):
        return None


class RunFolder(Observer):
    """Writes config.json (`config` with the training as it was resolved), environment.json and ledger.json when the run
    starts; `what`-best at each evaluation whose loss is the lowest so far; `what` (adapter, or model) when it ends.

    `save` writes what is trained into a folder, and `sound` tells whether all of it is finite. A run that Ctrl-C or an
    error stopped keeps what its last step made, if that is sound; so does one that diverged, or else what its last
    checkpoint held, if there is one; one that ended before its first step leaves nothing. Each file, and each folder
    that `save` fills, takes its name when it is whole, and the older one is there until then.
    """

    def __init__(self, folder: str | Path, save: Callable[[Path], None], sound: Callable[[], bool], what: str,
                 config: Mapping[str, Any]) -> None:
        self.folder, self.save, self.sound, self.what, self.config = Path(folder), save, sound, what, config
        self._ledger: dict[str, Any] | None = None
        self._best: Path | None = None
        self._kept = (math.inf, 0)      # validation loss and step of what lies there
        self._abandoned = False         # whether no step of this run made it
        self._begun = False

    def on_ledger(self, ledgers: Mapping[str, Any]) -> None:
        self._ledger = {name: ledger.as_dict() for name, ledger in ledgers.items()}

    def on_start(self, info: RunInfo) -> None:
        check_free(self.folder)
        self._begun = True
        self._write_settings(info)

    def _write_settings(self, info: RunInfo) -> None:
        training = {**asdict(info.training), "warmup": warmup_of(info.training),
                    "min_lr_ratio": min_lr_ratio_of(info.training)}
        config = {**self.config, "training": training, "total_steps": info.total_steps,
                  "trained_parameters": info.n_parameters}
        machine = {**environment(info.device), "matrix_flops_per_second": info.matrix_rate}
        with staged(self.folder) as staging:
            staging.write("config.json", json_bytes(plain(config)))
            staging.write("environment.json", json_bytes(plain(machine)))
            if self._ledger is not None:
                staging.write("ledger.json", json_bytes(plain(self._ledger)))

    def on_resume(self, run: Run) -> None:
        """What stands in the folder stays, but for what a killed process left half written, and for settings that were
        changed; the best so far is known again."""
        for name in ("", checkpoint.FOLDER, self.what, f"{self.what}-best"):
            sweep(self.folder / name)
        if self.config.get("changed"):
            self._write_settings(run.info)
        best = self.folder / f"{self.what}-best"
        if best.is_dir():
            self._best, found = best, _evaluation_of(best)
            if found is None and run.best is not None and run.best.loss is not None:
                found = run.best.loss, run.best.step        # of an earlier version, which did not write it
            if found is not None:
                self._kept = found
                self._abandoned = found not in [(each.loss, each.step) for each in run.evaluations]

    def on_evaluation(self, record: EvaluationRecord) -> None:
        if record.step and record.loss is not None and record.loss < self._kept[0] and self.sound():
            best = self.folder / f"{self.what}-best"
            try:
                with replaced(best) as new:
                    self.save(new)
                    (new / EVALUATION).write_bytes(json_bytes({"step": record.step, "valid_loss": record.loss}))
            except InputError as error:     # a full disk ends no run that may have days behind it
                warn(f"step {record.step}: the best so far is not kept: {error}"
                     + (f"; that of before stays in {best}" if self._best else ""))
            else:
                self._kept, self._best, self._abandoned = (record.loss, record.step), best, False

    def on_end(self, run: Run) -> None:
        run.best_adapter = self._best
        if self._best is not None and run.best is not None and run.best.loss != self._kept[0]:
            loss, step = self._kept
            why = (f"of a part that was lost when the run was killed, and done again in another way; its validation "
                   f"loss was {loss:.4f}, which nothing since was below" if self._abandoned else
                   f"whose validation loss was {loss:.4f}; that of step {run.best.step}, {run.best.loss:.4f}, was not "
                   "kept")
            warn(f"{self._best}: is of step {step} {why}")
        if not run.records:
            for name in FILES if self._begun else ():
                (self.folder / name).unlink(missing_ok=True)
            return
        if run.end == "diverged" and run.restored is None and not (self.sound() and run.skipped < len(run.records)):
            return
        if not self.sound():
            warn(f"{self.folder / self.what} is not written: the last step made weights that are not finite; "
                 "begin anew with a lower lr")
            return
        try:
            with replaced(self.folder / self.what) as new:
                self.save(new)
        except (InputError, RuntimeError, MemoryError) as error:    # days after the start, perhaps
            if not isinstance(error, InputError) and out_of_memory(error) is None:
                raise
            stands = checkpoint.steps(self.folder / checkpoint.FOLDER)
            best = "" if self._best is None else f" but for the best so far, {self._best}"
            advice = ("the last checkpoint stands: make room, and resume" if stands else
                      f"what was trained is lost{best}, since no checkpoint was kept on the way (save_every)")
            raise NotSaved(f"{out_of_memory(error) or error}; {advice}") from error
        run.adapter = self.folder / self.what


class Finished(Observer):
    """Removes the checkpoints in `folder` when a run has come to its end and what it trained is saved."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_end(self, run: Run) -> None:
        if run.adapter is not None and run.done:
            checkpoint.remove(self.folder)


def plain(value: Any) -> Any:
    """`value` as JSON holds it: tables, lists, texts, numbers; paths and the like as texts, no number that is none. A
    function stands for what it gives when the file is written."""
    if callable(value):
        return plain(value())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
