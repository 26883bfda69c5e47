"""train: the whole fine-tuning of a Model in one call."""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minitune.api.examine import (
    Examiner,
    Question,
    as_asked,
    as_prompts,
    check_vocabulary,
    first_questions,
    validation_batches,
)
from minitune.api.model import Model, as_path
from minitune.api.pairs import check_pairs
from minitune.api.resume import (
    about,
    all_changed,
    check_out,
    check_position,
    moment_of,
    name_of,
    one_moment,
    saved_in,
)
from minitune.arguments import check_names, check_whole, short, warn
from minitune.config import ObjectiveName, Training
from minitune.data.account import overlap
from minitune.data.batch import Batch
from minitune.data.glued import with_glued
from minitune.data.samples import are_samples, how_to_give
from minitune.data.stream import Stream, stream
from minitune.errors import InputError
from minitune.objectives import named, takes_pairs, with_reference
from minitune.objectives.evaluate import evaluate
from minitune.ops import backends
from minitune.report.claim import claimed
from minitune.report.folder import run_folder
from minitune.report.progress import is_watched, progress
from minitune.training import checkpoint
from minitune.training.checkpoint import Checkpoints, Saved
from minitune.training.flops import costs_of
from minitune.training.loop import fit, planned
from minitune.training.machine import matrix_rate
from minitune.training.needs import gigabytes, longest_row, moment_bytes
from minitune.training.run import Observer, Run, tell
from minitune.training.runner import all_finite
from minitune.training.step import Objective, check_objective

Files = str | Path | Sequence[str | Path] | Sequence[Mapping[str, Any]] | Mapping[str | Path, float]
"""What `mt.data.stream` reads: a file, several, {file: how often each of its samples is seen in an epoch}, or the
samples themselves."""


def train(model: Model, data: Files | Iterable[Batch], *, valid: Files | Iterable[Batch] | None = None,
          training: Training | None = None, out: str | Path | None = None, ask: Sequence[Question] | None = None,
          max_new_tokens: int = 128, objective: Objective | ObjectiveName | None = None, quiet: bool | None = None,
          config: Mapping[str, Any] | None = None, observers: Sequence[Observer] = (), resume: bool = False,
          changed: Sequence[str] = (), **settings: Any) -> Run:
    """Fine-tune `model` on a data file, on samples or on batches -> Run, the record of every step and evaluation.

    `settings` are fields of Training (lr=1e-4, tokens=4096, …), or give a whole `training`. A path, and samples (a list
    of dicts, as the lines of a file), are tokenised and packed by `mt.data.stream`; batches are taken as they come, and
    a stream brings its tokens, and where nothing else is said its epochs.
    valid: held-out data, any of these, whose loss is measured before training, every ``evaluate_every`` steps and at
    the end.

    out: a folder, new or empty, for all that a run leaves: config.json (with what `config` adds), environment.json,
    ledger.json, metrics.jsonl, answers.jsonl, loss.png, adapter/ (the last one) and adapter-best/ (that of the lowest
    validation loss); for a model loaded with train=… they are model/ and model-best/. Ctrl-C keeps what was trained,
    and a checkpoint.
    resume: go on with the run in `out` from its checkpoint, as if it had not been interrupted. Model, data and settings
    must be the same, but for what changes no step (api/resume.py, FREE) and, from here on, for those that `changed`
    names, such as ["lr", "max_steps"]; new data is read from where the old stood.
    ask: questions, texts or lists of messages, answered greedily before and after training, and at each
    evaluation where ``evaluate_every`` is set; with `out` and a path by default the data's first three prompts.
    objective: "dpo" trains on preferences, a chosen answer over a rejected one (objectives/dpo.py), and evaluations
    measure that. Or what is minimised in place of the loss of the next token, a function of (model, batch) that gives
    (sum of losses, number of trained tokens); evaluations measure the next token all the same, unless it has its own
    ``evaluate(model, batches)``. One with ``takes_pairs = True`` is of pairs, as objectives/dpo.py is.
    quiet: True shows no progress, False shows it always; by default it is shown on a terminal and in a notebook.

    Raises InputError before anything is written, where the data can be looked at before (an iterator cannot);
    TrainingDiverged where step after step has no finite loss, or the weights are no numbers any more.
    """
    if isinstance(objective, str):
        settings, objective = {**settings, "objective": objective}, None
    training = _training(training, settings, data)
    folder = None if out is None else as_path("train", "out", out)
    _check_observers(observers)
    _check_objective(objective, training)
    if quiet is not None and not isinstance(quiet, bool):
        raise InputError(f"train: quiet is {short(quiet)}; it must be True, False or None (by where it runs)")
    backends.asked()        # an unknown name in MINITUNE_BACKEND is told before anything is read
    with contextlib.ExitStack() as claim:
        check_out(folder, resume, changed)
        if resume and folder is not None:       # from here on nobody else goes on with it
            claim.enter_context(claimed(folder))
        claim.enter_context(one_moment(model, folder if resume else None))
        ready = prepare(model, data, valid=valid, training=training, out=folder, ask=ask,
                        max_new_tokens=max_new_tokens, objective=objective, resume=resume, changed=changed)
        if not resume and folder is not None:
            claim.enter_context(claimed(folder))
        return _run(model, ready, training, objective, folder, observers,
                    shown=is_watched() if quiet is None else not quiet,
                    config={**(config or {}), "data": _name(data), "valid": None if valid is None else _name(valid),
                            "ask": list(map(as_asked, ready.examiner.questions)), "max_new_tokens": max_new_tokens,
                            "objective": name_of(objective), "now": moment_of(model),
                            "changed": all_changed(folder if resume else None, changed)})


def _run(model: Model, ready: Ready, training: Training, objective: Objective | None, folder: Path | None,
         observers: Sequence[Observer], shown: bool, config: Mapping[str, Any]) -> Run:
    """The run itself, with the observers that write its folder and show its progress."""
    everyone = [*(_folder(folder, model, ready.batches, config) if folder is not None else ()), *observers,
                progress() if shown else NotesAsWarnings()]
    _tell_ledgers(model, ready.batches, ready.held_out, everyone, shown)
    rate = matrix_rate(model.device, model.network.dtype) if shown or folder is not None else None
    minimised = named(training) if objective is None else objective
    next_token = objective is None and not takes_pairs(minimised)
    return fit(model, ready.batches, training, minimised, everyone, evaluate=ready.examiner,
               costs=costs_of(model.network, reference=with_reference(minimised)), matrix_rate=rate,
               chance=math.log(model.config.vocab_size) if next_token else None,
               checkpoints=None if folder is None else _checkpoints(folder, model, ready), start=ready.saved,
               divisible=next_token)


class NotesAsWarnings(Observer):
    """Where no progress is shown a note of the run becomes a warning."""

    def on_note(self, text: str) -> None:
        warn(text)


@dataclass(frozen=True)
class Ready:
    """What a run is made of, read and checked: the batches, the validation data, and what is asked between steps;
    `about` tells it all (api/resume.py). ``saved``: the checkpoint that it goes on from."""

    batches: Iterable[Batch]
    held_out: Iterable[Batch] | None
    examiner: Examiner
    about: Callable[[], Mapping[str, Any]]
    saved: Saved | None


def prepare(model: Model, data: Any, *, valid: Any, training: Training, out: Path | None, ask: Any,
            max_new_tokens: Any, objective: Objective | None = None, resume: bool = False,
            changed: Sequence[str] = ()) -> Ready:
    """All that is checked before a run, for `train` and for a dry run, once `out` is (`check_out`): InputError for
    whatever could not be trained, evaluated, asked or written. Nothing is computed and nothing written."""
    if not isinstance(model, Model):
        raise InputError(f"train: model is {short(model)}; give what mt.load returns")
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise InputError("train: gradients are switched off here (torch.no_grad, set_grad_enabled or inference_mode); "
                         "call it where they are on")
    if training.save_every is not None and out is None:
        raise InputError(f"train: save_every is {training.save_every}, but there is no folder to keep a checkpoint in; "
                         "give out=…, or leave it out")
    if out is not None:
        _check_room(model, out, training, valid is not None)
    check_whole("train", "max_new_tokens", max_new_tokens)
    if ask is None:
        ask = first_questions(data) if out is not None and isinstance(data, str | Path) else ()
    questions = as_prompts(ask)
    model.trainable_parameters()
    minimised = named(training) if objective is None else objective
    pairs = takes_pairs(minimised)
    batches = _batches("data", data, model, training, pairs)
    held_out = None if valid is None else _batches("valid", valid, model, training, pairs)
    check_pairs(model, minimised, name_of(objective) or training.objective, batches, held_out, resume)
    if training.evaluate_every is not None and held_out is None and not questions:
        raise InputError(f"train: evaluate_every is {training.evaluate_every}, but there is nothing to evaluate; give "
                         "valid=… (held-out data) or ask=… (questions), or leave it out")
    if training.patience is not None and held_out is None:
        raise InputError(f"train: patience is {training.patience}, but there is no validation loss to watch; give "
                         "valid=… (held-out data), or leave it out")
    if isinstance(batches, Sequence):
        check_vocabulary("data", batches, model)
        if not batches:
            raise InputError("train: data is an empty list; give samples (dicts), batches, or a file")
        if not any(batch.n_trained for batch in batches):
            raise InputError("train: the data has no trained token (no batch, or all labels are -100)")
    elif isinstance(batches, Stream) and not batches.n_trained:
        raise InputError("train: the data has no trained token (all labels are -100)")
    examiner = Examiner(model, None if held_out is None else validation_batches(held_out), questions, max_new_tokens,
                        training.evaluate_every is not None,
                        getattr(minimised, "evaluate", evaluate))
    examiner.check()
    for name, asked in (("resume", resume), ("save_every", training.save_every)):
        if asked:
            check_position(batches, f"{name} is {asked}")
    made_of = functools.cache(functools.partial(about, model, training, batches, examiner.valid, questions,
                                                max_new_tokens, objective))
    saved = saved_in(out, made_of(), changed) if out is not None and resume else None
    if saved is not None and saved.step > planned(batches, training):
        raise InputError(f"{out}: {saved.step} steps are done, and {planned(batches, training)} are planned; give more "
                         "epochs or max_steps")
    return Ready(batches, held_out, examiner, made_of, saved)


def _training(training: Training | None, settings: Mapping[str, Any], data: Any) -> Training:
    """The whole training, with what a stream brings."""
    if training is not None and settings:
        raise InputError(f"train: both training and {', '.join(settings)} are given; put all of it into one of them")
    for name in ("optimizer", "schedule"):
        if name in settings and not isinstance(settings[name], str):
            raise InputError(f"train: {name} is {short(settings[name])}; it is made here, by a name; one of torch's "
                             "goes with mt.train_step, in a loop of your own")
    check_names("train", settings, Training, ". Data is read by mt.data.stream; memory and quant go to mt.load, "
                "callbacks to observers")
    found = training or Training(**settings)
    if not isinstance(data, Stream):
        return found
    if data.tokens != found.tokens and "tokens" in settings:
        raise InputError(f"train: the stream has rows of {data.tokens} tokens, the training tokens={found.tokens}; set "
                         "tokens in one place")
    unsaid = training is None and "epochs" not in settings
    return replace(found, tokens=data.tokens, epochs=data.epochs if unsaid else found.epochs)


def _batches(name: str, data: Any, model: Model, training: Training, pairs: bool) -> Iterable[Batch]:
    """The batches of `data`: read, of `pairs` both answers, where it names files, else itself."""
    if _is_files(data) or are_samples(data):
        shuffled = name == "data"
        return stream(data, model.tokenizer, tokens=training.tokens, epochs=training.epochs if shuffled else 1,
                      seed=training.seed, shuffle=shuffled, pairs=pairs)
    if advice := how_to_give(data):
        raise InputError(f"train: {name} is {short(data)}; {advice}")
    if not isinstance(data, Iterable):
        raise InputError(f"train: {name} is {short(data)}; give the path of a data file, a list of samples (dicts), or "
                         "batches")
    if isinstance(data, Sequence):
        wrong = next((place for place, each in enumerate(data) if not isinstance(each, Batch)), None)
        if wrong is not None:
            raise InputError(f"train: {name}[{wrong}] is {short(data[wrong])}; give a file, with a sample a line, a "
                             "list of samples (dicts), or batches as mt.data.stream and mt.data.pack make them")
    if isinstance(data, Stream) and name == "data" and data.epochs not in (1, training.epochs):
        raise InputError(f"train: the stream has epochs={data.epochs}, the training epochs={training.epochs}; set "
                         "epochs in one place")
    return data


def _check_observers(observers: Any) -> None:
    """InputError unless it is a list of what listens to something."""
    if not isinstance(observers, list | tuple) or any(
            not any(callable(getattr(each, name, None)) for name in vars(Observer) if name.startswith("on_"))
            for each in observers):
        raise InputError(f"train: observers is {short(observers)}; give a list of objects with methods such as on_step")


def _check_objective(objective: Any, training: Training) -> None:
    check_objective("train", objective)
    if objective is not None and training.objective != "sft":
        raise InputError(f"train: objective is {short(objective)}, and the training's is {training.objective!r}; give "
                         "one of them")
    if objective is not None and training.label_smoothing:
        raise InputError(f"train: label_smoothing is {training.label_smoothing}, which is a part of the loss of the "
                         "next token; smooth in your objective (model.losses_at takes label_smoothing), or leave one "
                         "out")


def _tell_ledgers(model: Model, batches: Iterable[Batch], held_out: Iterable[Batch] | None,
                  observers: Sequence[Observer], shown: bool) -> None:
    """Tell of the ledgers, those that the data keeps. Where no progress is shown their notes become warnings."""
    ledgers = {name: data.ledger for name, data in (("train", batches), ("valid", held_out))
               if isinstance(data, Stream)}
    if isinstance(batches, Stream):
        ledgers["train"] = with_glued(batches, batches.ledger, model._tokenizer)
    if isinstance(batches, Stream) and isinstance(held_out, Stream):
        note = overlap(batches.parts, held_out.parts)
        if note is not None and note not in ledgers["valid"].notes:
            ledgers["valid"] = replace(ledgers["valid"], notes=(note, *ledgers["valid"].notes))
    if ledgers:
        tell(observers, "on_ledger", ledgers)
    if not shown:
        for name, ledger in ledgers.items():
            for each in ledger.notes:
                warn(f"{name} data: {each}")


def _is_files(data: Any) -> bool:
    if isinstance(data, list | tuple):
        return bool(data) and all(isinstance(each, str | Path) for each in data)
    return isinstance(data, str | Path | Mapping)


def _name(data: Any) -> Any:
    """What config.json says of the data: its files, or what kind of object gave the batches."""
    if isinstance(data, Stream):
        return [{"file": part.corpus.path, "share": part.share, "samples": part.samples} for part in data.parts]
    if are_samples(data):
        return f"{len(data)} samples in memory"
    return data if _is_files(data) else f"batches of a {type(data).__name__}"


def _checkpoints(folder: Path, model: Model, ready: Ready) -> Checkpoints | None:
    """What keeps the run's checkpoint; None where it could not go on from one."""
    if not isinstance(ready.batches, Stream | Sequence):
        return None
    return Checkpoints(folder / checkpoint.FOLDER, ready.about, folder / _what(model),
                       None if ready.saved is None else ready.saved.step)


def _what(model: Model) -> str:
    """The name of what is trained, and of its folder."""
    return "adapter" if model.lora is not None else "model"


def _folder(folder: Path, model: Model, batches: Iterable[Batch], config: Mapping[str, Any]) -> list[Observer]:
    """The observers that write the run folder; ``config``: what config.json says besides."""
    network, adapted = model.network, model.lora is not None
    longest = longest_row(batches, model.device)
    whole = {"model": {"path": model.path, "device": str(model.device), "dtype": str(network.dtype).split(".")[-1],
                       "memory": network.memory,
                       "memory_taken": None if longest is None else functools.partial(network.policy_of, longest),
                       "config": asdict(model.config)},
             "lora": None if model.lora is None else asdict(model.lora), "adapter": model.adapter_path,
             "quant": model.quant, "trained_weights": sorted(network.trained_names()),
             "chat_template_kwargs": {} if model._tokenizer is None else model._tokenizer.chat_template_kwargs,
             "add_tokens": [] if model._tokenizer is None else model._tokenizer.added, **config}
    save = model.save_adapter if adapted else model.save_merged if network.nf4_shapes() else model.save
    return run_folder(folder, save, lambda: all_finite(model.trainable_parameters()), _what(model), whole)


def _check_room(model: Model, folder: Path, training: Training, valid: bool) -> None:
    """InputError where what the run writes does not fit on the disk: that must be known before it is trained. What lies
    there of a run that goes on is a part of it, or gives its place to it."""
    trained = sum(p.numel() for p in model.trainable_parameters())
    weights = model.trainable_parameters() if model.lora is not None else model.network.parameters()
    one = sum(p.numel() * p.element_size() for p in weights)
    parts = {_what(model): one}
    if valid:
        parts["the best so far, and the one that takes its place"] = 2 * one
    if training.save_every is not None:
        parts["two checkpoints"] = 2 * trained * (4 + moment_bytes(training))
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    needed, free = sum(parts.values()), shutil.disk_usage(there).free
    held = sum(path.stat().st_size for name in (_what(model), f"{_what(model)}-best", checkpoint.FOLDER)
               for path in (folder / name).rglob("*") if path.is_file())
    if needed > free + held and shutil.disk_usage(there).total:     # some file systems tell nothing
        of = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items())
        lies = f"; {gigabytes(held)} lie there already" if held else ""
        raise InputError(f"{folder}: what is trained takes {gigabytes(needed)} of disk ({of}{lies}), and "
                         f"{gigabytes(free)} are free; make room, or name a folder elsewhere")
