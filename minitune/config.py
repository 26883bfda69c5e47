"""Settings of models, adapters and training runs with their defaults: frozen dataclasses that check themselves."""

from __future__ import annotations

import functools
import os
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from minitune.errors import InputError
from minitune.names import unknown_names

MemoryPolicy = Literal["auto", "keep", "pointwise", "full", "offload"]
Quant = Literal["nf4", "nf4-dq"]
ScheduleName = Literal["constant", "linear", "cosine", "wsd", "slanted-triangular"]
LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linears of a layer, by their Hugging Face names: what ``targets="all-linear"`` means."""
MAX_WHOLE = 2**31 - 1
"""The largest whole number that a setting takes, seeds apart: lengths and offsets of a batch are int32."""

T = TypeVar("T")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def short(value: object) -> str:
    """`value` as one short line for a message, however large it is."""
    return " ".join(_SHORT.repr(value).split())


def check_names(owner: str, names: Iterable[str], settings: type[Any], more: str = "") -> None:
    """InputError for names that are no fields of the dataclass `settings`; `more` ends it."""
    known = [each.name for each in fields(settings)]
    unknown = set(names).difference(known)
    if unknown:
        raise InputError(f"{owner}: no setting is named {unknown_names(unknown, known)}; there are "
                         f"{', '.join(known)}{more}")


def _names_checked(owner: str) -> Callable[[type[T]], type[T]]:
    """Of a dataclass: `check_names` for its keyword arguments, where Python would raise a TypeError."""

    def checked(settings: type[T]) -> type[T]:
        made: Any = settings
        plain = made.__init__

        @functools.wraps(plain)
        def init(self: T, *values: Any, **named: Any) -> None:
            check_names(owner, named, settings)
            plain(self, *values, **named)

        made.__init__ = init
        return settings

    return checked


def check_whole(owner: str, name: str, value: object, low: int = 1) -> None:
    """InputError unless `value` is a whole number from `low` to MAX_WHOLE. True is none."""
    if type(value) is not int or not low <= value <= MAX_WHOLE:
        raise InputError(f"{owner}: {name} is {short(value)}; it must be a whole number from {low} to {MAX_WHOLE}")


def check_seed(owner: str, seed: object) -> None:
    """InputError unless `seed` is one that torch's generators take."""
    if type(seed) is not int or not -2**63 <= seed < 2**64:
        raise InputError(f"{owner}: seed is {short(seed)}; it must be a whole number from -2**63 to 2**64 - 1")


def _check_types(owner: str, settings: Any) -> None:
    """InputError for a field whose value is not of its declared type: a Literal's values, int, float, bool, str, texts;
    and for a whole number that is too large."""
    for name, declared in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        choices = get_args(declared) if get_origin(declared) is Literal else ()
        if choices and value not in choices:
            raise InputError(f"{owner}: {name} is {short(value)}; it must be one of {', '.join(map(str, choices))}")
        kinds = [kind for kind in (get_args(declared) or (declared,)) if kind in (int, float, bool, str)]
        optional = type(None) in get_args(declared) and value is None
        if kinds and not choices and not optional and get_origin(declared) in (None, UnionType):
            fits = type(value) in kinds or (float in kinds and type(value) is int)
            if tuple[str, ...] in get_args(declared) and isinstance(value, tuple | list):
                fits = all(isinstance(each, str) for each in value)
            if not fits:
                raise InputError(f"{owner}: {name} is {short(value)}; it must be {' or '.join(map(_name, kinds))}")
            if type(value) is int and float not in kinds and name != "seed" and abs(value) > MAX_WHOLE:
                raise InputError(f"{owner}: {name} is {short(value)}; it must be at most {MAX_WHOLE}")


def _name(kind: type) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text, or a list of texts"}[kind]


def _positive(owner: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 < value <= sys.float_info.max:
            raise InputError(f"{owner}: {name} is {short(value)}; it must be a positive, finite number")


def _from_one(owner: str, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise InputError(f"{owner}: {name} is {short(value)}; it must be a whole number of at least 1")


def _at_least_zero(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= sys.float_info.max:
            raise InputError(f"{owner}: {name} is {short(value)}; it must be a finite number of at least 0")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its extensions to longer contexts.

    ``kind`` names the extension as Hugging Face's ``rope_type`` does; the fields after ``factor`` belong to ``llama3``
    and ``yarn`` (Peng et al. 2023, arXiv:2309.00071) and keep the names of config.json.
    """

    kind: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_types("rope", self)
        _positive("rope", theta=self.theta, factor=self.factor, original_max_positions=self.original_max_positions)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a Llama-family transformer. Sizes count elements; ``windows`` holds one entry a layer.

    A layer whose window is w lets position i attend to positions i-w+1 … i; None is plain causal attention.
    """

    family: Literal["llama", "mistral", "qwen2", "qwen3"] = "llama"
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    norm_eps: float = 1e-5
    max_positions: int = 2048
    rope: Rope = field(default_factory=Rope)
    tied_head: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_types("model", self)
        sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_positions")
        _positive("model", norm_eps=self.norm_eps, **{name: getattr(self, name) for name in sizes})
        if self.n_heads % self.n_kv_heads:
            raise InputError(f"model: n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise InputError(f"model: head_dim is {self.head_dim}; rotary embedding needs an even one")
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.n_layers)
        if len(self.windows) != self.n_layers:
            raise InputError(f"model: windows has {len(self.windows)} entries for {self.n_layers} layers")


@_names_checked("LoRA")
@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): W·x becomes W·x + s·B·(A·x), A [rank, in], B [out, rank].

    s = alpha / rank, or alpha / sqrt(rank) with ``rslora`` (Kalajdzievski 2023, arXiv:2312.03732). ``targets`` is
    "all-linear" (all but lm_head), or names of linears ("q_proj", "lm_head"), or patterns on full names
    ("model.layers.[01].*"); the keys of ``rank_pattern`` and ``alpha_pattern`` are such names or patterns too.
    """

    rank: int = 16
    """Rank r of the adapters, the inner size of B·A: a higher one can learn more and costs more."""
    alpha: float = 32
    """Scale of the adapter: s = alpha / rank."""
    dropout: float = 0.0
    """Share of the adapter's inputs that is zeroed in training."""
    targets: str | tuple[str, ...] = "all-linear"
    """"all-linear" (a layer's seven), or names or patterns of linears, such as q_proj or lm_head."""
    rslora: bool = False
    """s = alpha / sqrt(rank) instead."""
    dora: bool = False
    """DoRA (Liu et al. 2024, arXiv:2402.09353): trains the length of each row of W + s·B·A as well; slower."""
    lr_ratio: float = 1.0
    """LoRA+: B learns at lr · lr_ratio."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other ranks, by name or pattern."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Other alphas, by name or pattern."""

    def __post_init__(self) -> None:
        _check_types("LoRA", self)
        for name in ("rank_pattern", "alpha_pattern"):
            self._check_pattern(name, getattr(self, name))
        check_whole("LoRA", "rank", self.rank)
        _positive("LoRA", alpha=self.alpha, lr_ratio=self.lr_ratio)
        if not 0 <= self.dropout < 1:
            raise InputError(f"LoRA: dropout is {self.dropout!r}; it must be at least 0 and below 1")
        if not self.targets:
            raise InputError('LoRA: targets is empty; name linears such as ("q_proj", "v_proj") or say "all-linear"')
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))

    def _check_pattern(self, name: str, pattern: object) -> None:
        if not isinstance(pattern, Mapping) or not all(isinstance(key, str) for key in pattern):
            raise InputError(f'LoRA: {name} is {short(pattern)}; it must be a table such as {{"q_proj": 8}}')
        for key, value in pattern.items():
            where = f"{name}[{short(key)}]"
            if name == "rank_pattern":
                check_whole("LoRA", where, value)
            elif type(value) not in (int, float):
                raise InputError(f"LoRA: {where} is {short(value)}; it must be a number")
            _positive("LoRA", **{where: value})


@_names_checked("training")
@dataclass(frozen=True, kw_only=True)
class Training:
    """One training run: how long, how fast, in what batches."""

    tokens: int = 2048
    """T, the length of one packed micro-batch; no document may be longer."""
    micro_batches: int = 1
    """Micro-batches of one optimizer step."""
    epochs: int = 1
    """Passes over the data."""
    max_steps: int | None = None
    """Optimizer steps instead of epochs; the data is repeated as often as needed."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW (Loshchilov & Hutter 2019), or SGD with momentum."""
    moments: Literal["fp32", "8bit"] = "fp32"
    """AdamW's moments: 8bit holds them in a quarter of the memory (Dettmers et al. 2021)."""
    lr: float = 2e-4
    """Highest learning rate."""
    schedule: ScheduleName = "cosine"
    """Course of the learning rate after the warm-up; wsd: constant, then down at the end."""
    warmup: float | None = None
    """Below 1 a share of the steps, else a number of steps; by default 0.03 (slanted-triangular: 0.1)."""
    decay: float = 0.1
    """wsd: the last part of the run, in which lr falls; below 1 a share of the steps, else a number of steps."""
    min_lr_ratio: float | None = None
    """The schedule falls towards lr · min_lr_ratio; by default 0 (slanted-triangular: 1/32)."""
    weight_decay: float = 0.0
    """Decoupled (AdamW's)."""
    momentum: float = 0.9
    """Momentum of SGD."""
    clip: float = 1.0
    """Largest global norm of the gradient; 0 does not clip."""
    label_smoothing: float = 0.0
    """Share of each target that is spread over the whole vocabulary; the reported loss is the smoothed one."""
    seed: int = 0
    """Random seed of adapters, shuffling and dropout."""
    log_every: int = 1
    """Report every so many steps; without a terminal some twenty reports are printed, metrics.jsonl holds all."""
    evaluate_every: int | None = None
    """Evaluate the validation data and ask the sample questions every so many steps, and before and after training; by
    default the data about ten times in the run, the questions only before and after."""
    save_every: int | None = None
    """Keep a checkpoint to resume from every so many steps; by default only where the run is interrupted."""

    def __post_init__(self) -> None:
        _check_types("training", self)
        check_seed("training", self.seed)
        _from_one("training", tokens=self.tokens, micro_batches=self.micro_batches, epochs=self.epochs,
                  max_steps=self.max_steps, log_every=self.log_every, evaluate_every=self.evaluate_every,
                  save_every=self.save_every)
        _positive("training", lr=self.lr, decay=self.decay)
        _at_least_zero("training", warmup=self.warmup or 0.0, min_lr_ratio=self.min_lr_ratio or 0.0,
                       weight_decay=self.weight_decay, momentum=self.momentum, clip=self.clip,
                       label_smoothing=self.label_smoothing)
        self._check_rates()
        if self.moments == "8bit" and self.optimizer == "sgd":
            raise InputError('training: moments is "8bit", which only adamw has; leave it out with optimizer="sgd"')
        for name, value in (("label_smoothing", self.label_smoothing), ("momentum", self.momentum)):
            if value >= 1:
                raise InputError(f"training: {name} is {value!r}; it must be below 1")
        if self.momentum != Training.momentum and self.optimizer == "adamw":
            raise InputError(f"training: momentum is {self.momentum!r}, which only sgd has; leave it out with "
                             'optimizer="adamw"')
        if self.decay != Training.decay and self.schedule != "wsd":
            raise InputError(f"training: decay is {self.decay!r}, which only the schedule wsd has; leave it out with "
                             f'schedule="{self.schedule}"')

    def _check_rates(self) -> None:
        """InputError for rates that would grow where they should shrink, or stand still."""
        if self.min_lr_ratio is not None and self.min_lr_ratio > 1:
            raise InputError(f"training: min_lr_ratio is {self.min_lr_ratio!r}; it must be at most 1, since lr is the "
                             "highest learning rate")
        if self.schedule == "slanted-triangular" and self.min_lr_ratio == 0:
            raise InputError("training: min_lr_ratio is 0; slanted-triangular starts at lr · min_lr_ratio, so it needs "
                             "one above 0 (by default 1/32)")
        if self.lr * self.weight_decay >= 1:
            raise InputError(f"training: lr · weight_decay is {self.lr * self.weight_decay:g}; at 1 or more a step "
                             "wipes the weights out, take a smaller one (0.01 to 0.1 is usual)")


Long = Literal["refuse", "split", "truncate"]
"""What is done with a sample that is longer than a row of T tokens."""
MAX_SHARE = 1000
"""The most times that a file may be seen in one epoch."""


@_names_checked("data")
@dataclass(frozen=True, kw_only=True)
class Data:
    """How the data is read: names of fields, long samples, files mixed in, what is held out for validation."""

    field_map: tuple[str, ...] = ()
    """Your names of fields, as ours=yours: prompt=question completion=answer."""
    long: Long = "refuse"
    """A sample longer than --tokens: refuse it, split it (no context across pieces), truncate it (its end is lost)."""
    mix: tuple[str, ...] = ()
    """More files, as FILE=SHARE: how often each of its samples is seen in an epoch (0.5: every second epoch)."""
    valid: str | None = None
    """File of held-out samples, to measure the loss on."""
    valid_split: float = 0.0
    """Samples to hold out of the training data: below 1 a share, else a number; 0 holds out none."""
    cache: bool = True
    """Keep the encoded data in the user's cache folder (MINITUNE_CACHE names another)."""

    def __post_init__(self) -> None:
        for name in ("field_map", "mix"):
            value = getattr(self, name)
            if not isinstance(value, tuple | list) or not all(isinstance(each, str) for each in value):
                raise InputError(f"data: {name} is {short(value)}; it must be a list of texts such as "
                                 f'{"prompt=question" if name == "field_map" else "more.jsonl=0.5"}')
            object.__setattr__(self, name, tuple(value))
        if isinstance(self.valid, os.PathLike):
            object.__setattr__(self, "valid", os.fspath(self.valid))
        _check_types("data", self)
        _at_least_zero("data", valid_split=self.valid_split)
        if self.valid_split >= 1 and self.valid_split != int(self.valid_split):
            raise InputError(f"data: valid_split is {self.valid_split!r}; below 1 it is a share of the samples, else a "
                             "whole number of them")
        if self.valid is not None and self.valid_split:
            raise InputError("data: both valid and valid_split are given; name a file, or hold samples out, not both")
        self.fields()
        self.shares("")

    def fields(self) -> dict[str, str]:
        """``field_map`` as a table {our field: their field}."""
        return _pairs("field_map", self.field_map, "ours=yours, such as prompt=question", last=False)

    @property
    def cached(self) -> bool | None:
        """``cache`` as `mt.data.stream` takes it: None is for files that are worth it."""
        return None if self.cache else False

    def shares(self, path: str | os.PathLike[str]) -> dict[str, float]:
        """{file: share} of `path`, seen once an epoch unless ``mix`` names it too, and of ``mix``."""
        found = {os.fspath(path): 1.0}
        for name, share in _pairs("mix", self.mix, "FILE=SHARE, such as more.jsonl=0.5", last=True).items():
            try:
                found[name] = float(share)
            except ValueError:
                raise InputError(f"data: mix has {short(f'{name}={share}')}; the share must be a number") from None
            check_share("data: mix", name, found[name])
        return found


def check_share(owner: str, name: str, share: object) -> None:
    """InputError unless `share` is how often a file's samples can be seen in an epoch."""
    if type(share) not in (int, float) or not 0 < share <= MAX_SHARE:       # type: ignore[operator]
        raise InputError(f"{owner}: the share of {short(name)} is {short(share)}; it must be a positive number of at "
                         f"most {MAX_SHARE}, the times that each sample is seen in an epoch")


def _pairs(name: str, texts: tuple[str, ...], form: str, last: bool) -> dict[str, str]:
    """{left: right} of texts "left=right"; ``last`` parts them at their last "=", since a file's name may hold one."""
    found: dict[str, str] = {}
    for text in texts:
        left, _, right = text.rpartition("=") if last else text.partition("=")
        if not left.strip() or not right.strip():
            raise InputError(f"data: {name} has {short(text)}; write {form}")
        if left.strip() in found:
            raise InputError(f"data: {name} names {short(left.strip())} twice; keep one")
        found[left.strip()] = right.strip()
    return found
