"""Settings of models, adapters and training runs with their defaults: frozen dataclasses that check themselves."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from minitune.arguments import (
    check_at_least_zero,
    check_from_one,
    check_positive,
    check_seed,
    check_share_or_number,
    check_types,
    check_whole,
    names_checked,
    short,
)
from minitune.errors import InputError

Moments = Literal["fp32", "8bit"]
MemoryPolicy = Literal["auto", "keep", "pointwise", "full", "offload"]
Quant = Literal["nf4", "nf4-dq"]
ObjectiveName = Literal["sft", "dpo"]
ScheduleName = Literal["constant", "linear", "cosine", "wsd", "slanted-triangular"]
LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linears of a layer, by their Hugging Face names: what ``targets="all-linear"`` means."""
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
        check_types("rope", self)
        check_positive("rope", theta=self.theta, factor=self.factor, original_max_positions=self.original_max_positions)


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
        check_types("model", self)
        sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_positions")
        check_positive("model", norm_eps=self.norm_eps, **{name: getattr(self, name) for name in sizes})
        if self.n_heads % self.n_kv_heads:
            raise InputError(f"model: n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise InputError(f"model: head_dim is {self.head_dim}; rotary embedding needs an even one")
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.n_layers)
        if len(self.windows) != self.n_layers:
            raise InputError(f"model: windows has {len(self.windows)} entries for {self.n_layers} layers")


@names_checked("LoRA")
@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): W·x becomes W·x + s·B·(A·x), A [rank, in], B [out, rank].

    s = alpha / rank, or alpha / sqrt(rank) with ``rslora`` (Kalajdzievski 2023, arXiv:2312.03732). ``targets`` are
    "all-linear" (all but lm_head), names of linears ("q_proj", "lm_head"), or patterns on full names
    ("model.layers.[01].*"); the keys of ``rank_pattern`` and ``alpha_pattern`` are such names or patterns too.
    """

    rank: int = 16
    """Rank r of the adapters, the inner size of B·A: a higher one can learn more and costs more."""
    alpha: float = 32
    """Scale of the adapter: s = alpha / rank."""
    dropout: float = 0.0
    """Share of the adapter's inputs that is zeroed in training."""
    targets: str | tuple[str, ...] = "all-linear"
    """"all-linear" (a layer's seven), names or patterns of linears, such as q_proj, or several of these."""
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
        check_types("LoRA", self)
        for name in ("rank_pattern", "alpha_pattern"):
            self._check_pattern(name, getattr(self, name))
        check_whole("LoRA", "rank", self.rank)
        check_positive("LoRA", alpha=self.alpha, lr_ratio=self.lr_ratio)
        if not 0 <= self.dropout < 1:
            raise InputError(f"LoRA: dropout is {self.dropout!r}; it must be at least 0 and below 1")
        if not self.targets:
            raise InputError('LoRA: targets is empty; name linears such as ("q_proj", "v_proj") or say "all-linear"')
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))

    def target_names(self) -> tuple[str, ...]:
        """``targets`` one by one, the seven linears that "all-linear" stands for among them."""
        said = (self.targets,) if isinstance(self.targets, str) else self.targets
        return tuple(name for each in said for name in (LINEAR_NAMES if each == "all-linear" else (each,)))

    def _check_pattern(self, name: str, pattern: object) -> None:
        if not isinstance(pattern, Mapping) or not all(isinstance(key, str) for key in pattern):
            raise InputError(f'LoRA: {name} is {short(pattern)}; it must be a table such as {{"q_proj": 8}}')
        for key, value in pattern.items():
            where = f"{name}[{short(key)}]"
            if name == "rank_pattern":
                check_whole("LoRA", where, value)
            elif type(value) not in (int, float):
                raise InputError(f"LoRA: {where} is {short(value)}; it must be a number")
            check_positive("LoRA", **{where: value})


@names_checked("training")
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
    moments: Moments = "fp32"
    """AdamW's moments: 8bit holds them in a quarter of the memory (Dettmers et al. 2022)."""
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
    objective: ObjectiveName = "sft"
    """sft: the loss of the next token; dpo: of preferences the chosen answer over the rejected one, against the base
    (Rafailov et al. 2023)."""
    beta: float = 0.1
    """dpo: how dearly a new log-probability that departs from the base's is paid for; a low one departs farther."""
    seed: int = 0
    """Random seed of shuffling and dropout; of the adapters' start too, which in Python mt.load(seed=) sets."""
    log_every: int = 1
    """Report every so many steps; without a terminal some twenty reports are printed, metrics.jsonl holds all."""
    evaluate_every: int | None = None
    """Evaluate the validation data and ask the sample questions every so many steps, and before and after training; by
    default the data about ten times in the run, the questions only before and after."""
    patience: int | None = None
    """End the run after so many evaluations in a row that found no lower validation loss; by default never."""
    spikes: Literal["warn", "skip", "stop"] = "warn"
    """A step whose loss or gradient norm stands more than six standard deviations (each at least 5 % of the mean) above
    the mean of the 128 before it: tell of it, leave it out, or leave it out and end the run, which can then be
    resumed."""
    max_skipped: int = 3
    """A step whose loss or gradient is not finite is left out; more than so many in a row end the run."""
    save_every: int | None = None
    """Keep a checkpoint to resume from every so many steps; by default only where the run is interrupted."""

    def __post_init__(self) -> None:
        check_types("training", self)
        check_seed("training", self.seed)
        check_from_one("training", tokens=self.tokens, micro_batches=self.micro_batches, epochs=self.epochs,
                  max_steps=self.max_steps, log_every=self.log_every, evaluate_every=self.evaluate_every,
                  save_every=self.save_every, patience=self.patience)
        check_positive("training", lr=self.lr, decay=self.decay)
        check_whole("training", "max_skipped", self.max_skipped, 0)
        check_at_least_zero("training", warmup=self.warmup or 0.0, min_lr_ratio=self.min_lr_ratio or 0.0,
                       weight_decay=self.weight_decay, momentum=self.momentum, clip=self.clip,
                       label_smoothing=self.label_smoothing)
        for name, value in (("warmup", self.warmup), ("decay", self.decay)):
            check_share_or_number("training", name, value or 0.0, "steps")
        self._check_rates()
        self._check_objective()
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

    def _check_objective(self) -> None:
        """InputError for settings that belong to another objective."""
        check_positive("training", beta=self.beta)
        if self.objective == "sft" and self.beta != Training.beta:
            raise InputError(f"training: beta is {self.beta!r}, which only the objective dpo has; leave it out, or say "
                             'objective="dpo"')
        if self.objective == "dpo" and self.label_smoothing:
            raise InputError(f"training: label_smoothing is {self.label_smoothing!r}, which only the objective sft "
                             'has; leave it out with objective="dpo"')

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


Onto = Literal["loaded", "original"]
"""Into what an adapter is merged: the base as it was loaded (in 4 bits: its decoded values, on which the adapter was
trained), or the 16-bit weights of the checkpoint that were quantised."""
Long = Literal["refuse", "split", "truncate", "drop"]
"""What is done with a sample that is longer than a row of T tokens."""
MAX_SHARE = 1000
"""The most times that a file may be seen in one epoch."""


@names_checked("data")
@dataclass(frozen=True, kw_only=True)
class Data:
    """How the data is read: names of fields, long samples, files mixed in, what is held out for validation."""

    field_map: tuple[str, ...] = ()
    """Your names of fields, as ours=yours: prompt=question completion=answer."""
    long: Long = "refuse"
    """A sample longer than --tokens: refuse, split (no context across pieces), truncate (its end is lost) or drop."""
    mix: tuple[str, ...] = ()
    """More files, as FILE=SHARE: how often each of its samples is seen in an epoch (0.5: every second epoch)."""
    valid: str | None = None
    """File of held-out samples, to measure the loss on."""
    valid_split: float = 0.0
    """Samples to hold out of the training data: below 1 a share, else a number; 0 holds out none."""
    chat_template_kwargs: tuple[str, ...] = ()
    """Settings of the model's chat template, as name=value: enable_thinking=false."""
    cache: bool = True
    """Keep the encoded data in the user's cache folder (MINITUNE_CACHE names another)."""

    def __post_init__(self) -> None:
        for name, example in (("field_map", "prompt=question"), ("mix", "more.jsonl=0.5"),
                              ("chat_template_kwargs", "enable_thinking=false")):
            value = getattr(self, name)
            if not isinstance(value, tuple | list) or not all(isinstance(each, str) for each in value):
                raise InputError(f"data: {name} is {short(value)}; it must be a list of texts such as {example}")
            object.__setattr__(self, name, tuple(value))
        if isinstance(self.valid, os.PathLike):
            object.__setattr__(self, "valid", os.fspath(self.valid))
        check_types("data", self)
        if self.valid == "":
            raise InputError("data: valid is empty; give a file of samples, or leave it out")
        check_at_least_zero("data", valid_split=self.valid_split)
        check_share_or_number("data", "valid_split", self.valid_split, "samples")
        if self.valid is not None and self.valid_split:
            raise InputError("data: both valid and valid_split are given; name a file, or hold samples out, not both")
        self.fields()
        self.shares("")
        self.template_kwargs()

    def fields(self) -> dict[str, str]:
        """``field_map`` as a table {our field: their field}."""
        return _pairs("field_map", self.field_map, "ours=yours, such as prompt=question", last=False)

    def template_kwargs(self) -> dict[str, Any] | None:
        """``chat_template_kwargs`` as a table: each value as JSON where it is that, else as a text; None without."""
        found: dict[str, Any] = {}
        for name, value in _pairs("chat_template_kwargs", self.chat_template_kwargs,
                                  "name=value, such as enable_thinking=false", last=False).items():
            try:
                found[name] = json.loads(value)
            except (ValueError, RecursionError):
                if value.lower() in ("true", "false", "none", "null"):      # as a text each of them would be true
                    raise InputError(f"data: chat_template_kwargs has {short(f'{name}={value}')}; write it as JSON, "
                                     f"{ {'none': 'null'}.get(value.lower(), value.lower()) }") from None
                found[name] = value
        return found or None

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
