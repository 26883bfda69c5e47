"""Settings of models, adapters and training runs with their defaults: frozen dataclasses that check themselves."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from minitune.errors import InputError

MemoryPolicy = Literal["auto", "keep", "pointwise", "full", "offload"]
Quant = Literal["nf4", "nf4-dq"]
ScheduleName = Literal["constant", "linear", "cosine"]
LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linears of a layer, by their Hugging Face names: what ``targets="all-linear"`` means."""
MAX_WHOLE = 2**31 - 1
"""The largest whole number that a setting takes, seeds apart: lengths and offsets of a batch are int32."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def short(value: object) -> str:
    """`value` as one short line for a message, however large it is."""
    return " ".join(_SHORT.repr(value).split())


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


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): W·x becomes W·x + s·B·(A·x), A [rank, in], B [out, rank].

    s = alpha / rank, or alpha / sqrt(rank) with ``rslora`` (Kalajdzievski 2023, arXiv:2312.03732). ``targets`` is
    "all-linear", or names of linears ("q_proj"), or patterns on full names ("model.layers.[01].*"); the keys of
    ``rank_pattern`` and ``alpha_pattern`` are such names or patterns too.
    """

    rank: int = 16
    """r, the inner size of B·A."""
    alpha: float = 32
    """Scale of the adapter: s = alpha / rank."""
    dropout: float = 0.0
    """Share of the adapter's inputs that is zeroed in training."""
    targets: str | tuple[str, ...] = "all-linear"
    """"all-linear", or names or patterns of linears."""
    rslora: bool = False
    """s = alpha / sqrt(rank) instead."""
    dora: bool = False
    """Not part of this version."""
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
        _positive("LoRA", rank=self.rank, alpha=self.alpha, lr_ratio=self.lr_ratio)
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
    moments: Literal["fp32", "8bit"] = "fp32"
    """AdamW's moments: 8bit holds them in a quarter of the memory (Dettmers et al. 2021)."""
    lr: float = 2e-4
    """Highest learning rate."""
    schedule: ScheduleName = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup: float = 0.03
    """Below 1 a share of the steps, else a number of steps."""
    min_lr_ratio: float = 0.0
    """The schedule ends at lr · min_lr_ratio."""
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
    """Report every so many steps."""

    def __post_init__(self) -> None:
        _check_types("training", self)
        check_seed("training", self.seed)
        _positive("training", tokens=self.tokens, micro_batches=self.micro_batches, epochs=self.epochs, lr=self.lr,
                  max_steps=self.max_steps, log_every=self.log_every)
        _at_least_zero("training", warmup=self.warmup, min_lr_ratio=self.min_lr_ratio, weight_decay=self.weight_decay,
                       momentum=self.momentum, clip=self.clip, label_smoothing=self.label_smoothing)
        if self.moments == "8bit" and self.optimizer == "sgd":
            raise InputError('training: moments is "8bit", which only adamw has; leave it out with optimizer="sgd"')
        if self.label_smoothing >= 1:
            raise InputError(f"training: label_smoothing is {self.label_smoothing!r}; it must be below 1")
