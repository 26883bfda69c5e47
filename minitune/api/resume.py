"""What an interrupted run is resumed with: its folder's checkpoint, and the same model, data and settings as before."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from minitune.api.examine import as_asked
from minitune.api.model import Model
from minitune.arguments import short
from minitune.checkpoint.files import discard, is_half_written, read_json_object
from minitune.config import Training
from minitune.data.batch import Batch
from minitune.data.corpus import raw
from minitune.data.formats import Prompt
from minitune.data.stream import Stream
from minitune.errors import InputError
from minitune.model.llama import Llama
from minitune.report.folder import FILES, check_free, plain
from minitune.training import checkpoint
from minitune.training.checkpoint import Saved
from minitune.training.step import Objective

FREE = ("log_every", "evaluate_every", "max_skipped", "patience", "save_every", "spikes")
"""Settings of the training with others of which a run may go on: they change no step as long as nothing goes wrong."""
CHANGEABLE = ("lr", "schedule", "warmup", "decay", "min_lr_ratio", "weight_decay", "momentum", "clip",
              "label_smoothing", "epochs", "max_steps", "data", "base", "ask", "objective")
"""What else may be another when the user names it: the checkpoint's weights and moments fit all the same."""
SAMPLED = 4096
"""As many values of a frozen weight tell it from another."""
OWN = (*FILES, "train.toml", "loss.png", "adapter-best", "model-best", "tensorboard", checkpoint.FOLDER)
"""What a run may have left before its first checkpoint."""
SHOWN = 5
"""As many differences are named."""


def _check_changed(changed: Any, resume: bool) -> None:
    """InputError unless it is a list of names of CHANGEABLE, and a run is resumed."""
    if not isinstance(changed, list | tuple) or not all(isinstance(name, str) for name in changed):
        raise InputError(f"train: changed is {short(changed)}; give a list of names such as ['lr']")
    if changed and not resume:
        raise InputError("train: changed is given, but no run is resumed; it goes with resume")
    for name in changed:
        if name not in CHANGEABLE:
            raise InputError(f"train: changed has {short(name)}; a run that goes on may have another "
                             f"{', '.join(CHANGEABLE[:-1])} or {CHANGEABLE[-1]}")


def check_out(out: Path | None, resume: Any, changed: Any = ()) -> None:
    """InputError unless `out` can take a run's folder: a new one, or with `resume` one that holds a checkpoint, whose
    settings `changed` are to be others."""
    _check_changed(changed, resume)
    if not isinstance(resume, bool):
        raise InputError(f"train: resume is {short(resume)}; it must be true or false, out names the run's folder")
    if not resume:
        if out is not None:
            check_free(out)
        return
    if out is None:
        raise InputError("train: resume needs out, the folder of the run that goes on")
    if checkpoint.steps(out / checkpoint.FOLDER):
        return
    if not out.is_dir() or not any(out.iterdir()):
        raise InputError(f"{out}: there is no run to resume; begin it without resume")
    if not (out / "config.json").is_file():
        raise InputError(f"{out}: is not the folder of a run, so there is nothing to resume; name another one")
    trained = _trained_in(out)
    if trained is not None:
        settings = read_json_object(out / "config.json").get("training")
        dpo = isinstance(settings, dict) and settings.get("objective") == "dpo"
        merged = " (merged into its base, since the reference of dpo is a base: minitune merge)" if dpo else ""
        raise InputError(f"{out}: the run has ended and left no checkpoint, there is nothing to resume; to train on, "
                         f"begin a new one from what it has trained, {trained}{merged}")
    if _is_finished(out):
        raise InputError(f"{out}: the run came to its end, but what it trained was not written, and there is no "
                         "checkpoint; begin anew in another folder, with save_every")
    raise InputError(f"{out}: holds no checkpoint to resume from: the run was killed before its first one (save_every "
                     "keeps them on the way), or diverged; begin anew in another folder")


def begun(out: Path) -> Literal["not", "lost", "kept", "ended"]:
    """How far the run in the folder `out` has come: not begun; begun, and killed before its first checkpoint; it has a
    checkpoint; or it has left what it trained, and none."""
    if checkpoint.steps(out / checkpoint.FOLDER):
        return "kept"
    if _trained_in(out) is not None:
        return "ended"
    return "lost" if (out / "config.json").is_file() and not _is_finished(out) else "not"


def clear(out: Path) -> None:
    """Remove what a run has left that was killed before its first checkpoint, so that it can begin anew. InputError
    where the folder holds something else."""
    found = sorted(out.iterdir())
    odd = next((path for path in found if path.name not in OWN and not is_half_written(path)), None)
    if odd is not None:
        raise InputError(f"{out}: the run was killed before its first checkpoint, and would begin anew, but {odd.name} "
                         "lies there, which is no run's; take it away, or name another folder")
    for path in found:
        discard(path)


def _trained_in(out: Path) -> Path | None:
    """What a run has left of the weights that it trained: an adapter, or a model."""
    return next((out / name for name in ("adapter", "model") if (out / name / "config.json").is_file()
                 or (out / name / "adapter_config.json").is_file()), None)


def _is_finished(out: Path) -> bool:
    """Whether metrics.jsonl ends with the last step, or what follows it, that config.json planned."""
    total, metrics = read_json_object(out / "config.json").get("total_steps"), out / "metrics.jsonl"
    if type(total) is not int or not metrics.is_file():
        return False
    return metrics.read_text("utf-8", "replace").rstrip().rpartition("\n")[2].startswith(f'{{"step": {total},')


def about(model: Model, training: Training, data: Iterable[Batch], valid: Sequence[Batch] | None,
          ask: Sequence[Prompt], max_new_tokens: int, objective: Objective | None = None) -> dict[str, Any]:
    """All that a run's steps and evaluations depend on, as JSON holds it. Of the data and of the base's weights it has
    digests, so that files may be moved; of an objective its name. InputError for data whose position cannot be found
    again."""
    network = model.network
    tokenizer = model._tokenizer
    found: dict[str, Any] = plain({
        "chat_template_kwargs": {} if tokenizer is None else tokenizer.chat_template_kwargs,
        "base": {"weights": _digest_of_frozen(network), **asdict(model.config)}, "quant": model.quant,
        "dtype": str(network.dtype).removeprefix("torch."), "device": model.device.type,
        "lora": None if model.lora is None else asdict(model.lora), "adapter": _name(model.adapter_path),
        "trained_weights": sorted(network.trained_names()),
        "add_tokens": [] if tokenizer is None else tokenizer.added,
        "training": _settings(training), "data": _data(data), "valid": None if valid is None else _data(valid),
        "ask": list(map(as_asked, ask)), "max_new_tokens": max_new_tokens, "objective": name_of(objective),
        "now": moment_of(model)})
    return found


def _settings(training: Training) -> dict[str, Any]:
    """Those of which a run must go on with the same."""
    return {name: value for name, value in plain(asdict(training)).items() if name not in FREE}


def all_changed(resumed: Path | None, changed: Sequence[str]) -> list[str]:
    """The names in `changed`, behind those that were changed when the run in the folder `resumed` went on before."""
    config = None if resumed is None else resumed / "config.json"
    before = read_json_object(config).get("changed") if config is not None and config.is_file() else None
    return list(dict.fromkeys([*(before if isinstance(before, list) else ()), *changed]))


@contextlib.contextmanager
def one_moment(model: Any, resumed: Path | None) -> Iterator[None]:
    """Within it a chat template that writes the date writes that of one moment, also where a run goes on over midnight,
    or on another day: now, or when the run in the folder `resumed` was begun. A moment that the user has set stays."""
    tokenizer = getattr(model, "_tokenizer", None)
    if tokenizer is None or not tokenizer.writes_date or tokenizer.now is not None:
        yield
        return
    config = None if resumed is None else resumed / "config.json"
    begun = read_json_object(config).get("now") if config is not None and config.is_file() else None
    try:
        tokenizer.now = datetime.now().replace(microsecond=0) if begun is None else datetime.fromisoformat(begun)
    except (TypeError, ValueError):
        raise InputError(f"{config}: now is {short(begun)}; it must be a date and time as the run wrote it") from None
    try:
        yield
    finally:
        tokenizer.now = None


def moment_of(model: Model) -> str | None:
    """The moment that its chat template writes; None where it writes none, or the clock's."""
    tokenizer = model._tokenizer
    return tokenizer.now.isoformat() if tokenizer is not None and tokenizer.writes_date and tokenizer.now else None


def name_of(objective: Objective | None) -> str | None:
    """What a run's files call an objective of the caller's own: a function by its name, a partial one with its values,
    another object as it prints itself, as a dataclass does with its values, or else by its class."""
    if isinstance(objective, functools.partial):
        given = [*map(short, objective.args), *(f"{name}={short(value)}" for name, value in objective.keywords.items())]
        return f"{name_of(objective.func)}({', '.join(given)})"
    if objective is None or hasattr(objective, "__qualname__"):
        return getattr(objective, "__qualname__", None)
    prints_itself = type(objective).__repr__ is not object.__repr__
    return repr(objective) if prints_itself else type(objective).__qualname__


def check_position(data: Iterable[Batch], owner: str) -> None:
    """InputError where `data` cannot be read again from the middle, which `owner` asks for."""
    if not isinstance(data, Stream | Sequence):
        raise InputError(f"train: {owner}, but the data is a {type(data).__name__}, whose position cannot be found "
                         "again; give files, an mt.data.stream or a list of batches, or leave it out")


def saved_in(out: Path, here: Mapping[str, Any], changed: Sequence[str] = ()) -> Saved:
    """The checkpoint in the run's folder. InputError where it is damaged, or where `here`, what `about` says of the run
    that is to go on, is not what it was, but for what is `changed`; it names the fields and both values."""
    try:
        saved = checkpoint.read(out / checkpoint.FOLDER)
    except InputError as fault:
        trained = _trained_in(out)
        if trained is None or not str(fault).endswith(checkpoint.ANEW):
            raise
        how = "--adapter" if trained.name == "adapter" else "its BASE"
        raise InputError(f"{fault}; {trained} has what was trained before, and can be {how} of the new run") from None
    now, before = dict(_fields(here)), dict(_fields({"training": _settings(Training())}))
    before |= dict(_fields(saved.about))        # an older minitune's checkpoint lacks a setting that is new
    if now["training.objective"] != before["training.objective"]:
        raise InputError(f"{out}: the objective is {now['training.objective']} and was {before['training.objective']}; "
                         "what the one trained is no beginning for the other: begin a new run")
    odd = [name for name in (now | before) if now.get(name) != before.get(name)]
    if any(_part(name) in ("quant", "dtype", "trained_weights") for name in odd):   # these change what is frozen
        odd = [name for name in odd if name != "base.weights"]
    if any(_part(name) == "chat_template_kwargs" for name in odd):      # so chats are written otherwise
        odd = [name for name in odd if _part(name) not in ("data", "valid", "ask")]
    if any(_part(name) == "data" for name in odd):          # the first samples are asked
        odd = [name for name in odd if _part(name) != "ask"]
    odd = [name for name in odd if _called(name) not in changed]
    if odd:
        said = list(dict.fromkeys(_said(name, now.get(name), before.get(name)) for name in odd))
        more = [f"and {len(said) - SHOWN} more"] if len(said) > SHOWN else []
        dated = (f". Its chat template writes the date, for this run {here['now']}: set tokenizer.now to it before "
                 "data is read" if here.get("now") and {"data", "valid", "ask"} & {_part(name) for name in odd} else "")
        names = list(dict.fromkeys([*changed, *map(_called, odd)]))
        anew = (f", or go on with the new: --changed {' '.join(names)} (in Python changed={names})"
                if set(names) <= set(CHANGEABLE) else "")
        raise InputError(f"{out}: cannot be resumed otherwise than it was begun: {'; '.join([*said[:SHOWN], *more])}; "
                         f"give what was given then{anew}{dated}")
    return saved


def _called(name: str) -> str:
    """What a user calls the setting that a field belongs to."""
    of, last = _part(name), name.rpartition(".")[2]
    if of == "base" and last != "weights":      # another shape, or another computation: no base to go on with
        return name
    return last if of == "training" or (of == "data" and last in ("tokens", "seed", "shuffle", "long")) else of


def _said(name: str, now: Any, before: Any) -> str:
    """A difference in the user's words: settings by their names, contents by what they are of."""
    of, last = _part(name), name.rpartition(".")[2]
    content = of in ("data", "valid") and last in ("data", "valid", "sha256", "samples", "batches")
    if name == "base.weights" or content:
        return f"the {'validation data' if of == 'valid' else of} is not what it was"
    if of == "trained_weights":
        differ = sorted(set(now or ()) ^ set(before or ()))
        return (f"other weights are trained than then: {short(differ[0])[1:-1]} is{'' if differ[0] in now else ' not'}"
                + (f", and {len(differ) - 1} more differ" if differ[1:] else ""))
    is_now, was = ("not given" if value is None else short(value) for value in (now, before))
    return f"{name.removeprefix('training.').replace('data.', 'data: ')} is {is_now} and was {was}"


def _part(name: str) -> str:
    """What of `about` a field belongs to."""
    return re.split(r"[.\[]", name)[0]


def _fields(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    """(name, value) of all that lies in nested tables, and in lists of tables."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _fields(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        for place, item in enumerate(value):
            yield from _fields(item, f"{name}[{place}]")
    else:
        yield name, value


def _name(path: Path | None) -> str | None:
    return None if path is None else path.resolve().name


def _data(data: Iterable[Batch]) -> dict[str, Any]:
    """The digests of what is trained on, and how rows are made of it."""
    check_position(data, "the run is to be resumed")
    if isinstance(data, Stream):
        files = [{"share": part.share, "samples": part.kept.numel(), "sha256": _digest(
            [part.corpus.ids, part.corpus.trained, part.corpus.bounds, part.corpus.weights, part.kept])}
                 for part in data.parts]
        return {"tokens": data.tokens, "seed": data.seed, "shuffle": data.shuffle, "long": data.long, "files": files}
    tensors = [tensor for batch in data for tensor in (batch.tokens, batch.labels, batch.cu_seqlens, batch.weights)]
    return {"batches": len(tensors) // 4, "sha256": _digest(tensors)}


def _digest_of_frozen(network: Llama) -> str:
    """sha256 of about SAMPLED values of each weight that is not trained, evenly spread; what is trained is in the
    checkpoint."""
    weights: list[Tensor] = [weight for weight in network.parameters() if not weight.requires_grad]
    weights += [part.packed for projection in network.projections() for _, part in projection.nf4_parts()]
    side = math.isqrt(SAMPLED)
    return _digest(weight[tuple(slice(None, None, -(-size // (side if weight.dim() > 1 else SAMPLED)) or None)
                                for size in weight.shape)] for weight in weights)


def _digest(tensors: Iterable[Tensor | None]) -> str:
    """sha256 of flat tensors, their lengths among them."""
    hashed = hashlib.sha256()
    for tensor in tensors:
        values = None if tensor is None else tensor.detach().cpu().contiguous()
        hashed.update(b"none" if values is None else values.numel().to_bytes(8, "little"))
        if values is not None:
            hashed.update(raw(values))
    return hashed.hexdigest()


__all__ = ["about", "check_out", "check_position", "name_of", "saved_in"]
