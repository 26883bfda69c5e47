"""Adapter: what LoRA and DoRA put beside one linear; and which linears get one."""

from __future__ import annotations

import fnmatch
import math
import zlib
from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune.config import LINEAR_NAMES, LoRA
from minitune.errors import InputError
from minitune.names import nearest

HEAD = "lm_head"
T = TypeVar("T")


class Adapter(nn.Module):
    """One linear's adapter: A fp32 [rank, in], B fp32 [out, rank], and s, the factor of B·A.

    A starts as PEFT's does (uniform within ±1/sqrt(in), He et al. 2015 with a = √5), B at zero; the values depend on
    the seed and the linear's name alone, not on which other linears are adapted. With DoRA (Liu et al. 2024,
    arXiv:2402.09353, eq. 5) there is also m fp32 [out], the length of each row of W + s·B·A; it starts as the rows'
    own length (`start_magnitude`).
    """

    m: nn.Parameter | None

    def __init__(self, path: str, in_features: int, out_features: int, lora: LoRA, seed: int, device: torch.device):
        super().__init__()
        self.path = path
        self.rank = int(pick(lora.rank_pattern, path, lora.rank))
        self.alpha = float(pick(lora.alpha_pattern, path, lora.alpha))
        self.scale = self.alpha / (math.sqrt(self.rank) if lora.rslora else self.rank)
        self.dropout = lora.dropout
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{path}".encode()))
        a = torch.empty(self.rank, in_features, dtype=torch.float32).uniform_(-1, 1, generator=generator)
        self.A = nn.Parameter((a / math.sqrt(in_features)).to(device))
        self.B = nn.Parameter(torch.zeros(out_features, self.rank, dtype=torch.float32, device=device))
        m = nn.Parameter(torch.ones(out_features, dtype=torch.float32, device=device)) if lora.dora else None
        self.register_parameter("m", m)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, in] -> s·(dropout(x)·Aᵀ)·Bᵀ [T, out] in x's dtype: the composed path."""
        x = F.dropout(x, self.dropout, self.training)
        return x @ self.A.mT.to(x.dtype) @ (self.B.mT * self.scale).to(x.dtype)

    @torch.no_grad()
    def start_magnitude(self, lengths: Tensor) -> None:
        """lengths fp32 [out] of the base's rows: with them m changes nothing at first."""
        if self.m is not None:
            self.m.copy_(lengths)

    def gain(self, lengths: Tensor) -> Tensor:
        """fp32 [out], what DoRA multiplies the rows of the output by: m over the rows' present `lengths`, which count
        as constant (section 4.3 of the paper). 1 without DoRA."""
        return torch.ones_like(lengths) if self.m is None else self.m / lengths

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}"


def pick(patterns: Mapping[str, T], path: str, default: T) -> T:
    """The value of the first pattern that names `path`, else the default."""
    return next((value for pattern, value in patterns.items() if matches(pattern, path)), default)


def matches(pattern: str, path: str) -> bool:
    """Whether a name ("q_proj", "self_attn.q_proj") or a shell pattern ("model.layers.[01].*") names the module."""
    return path == pattern or path.endswith("." + pattern) or fnmatch.fnmatchcase(path, pattern)


def targeted(lora: LoRA, path: str) -> bool:
    """Whether `lora.targets` names the linear at this Hugging Face path."""
    return any(matches(name, path) for name in lora.target_names())


def make_adapter(path: str, in_features: int, out_features: int, lora: LoRA, seed: int,
                 device: torch.device) -> Adapter | None:
    """The adapter of this linear, if `lora.targets` names it. InputError for a rank that is larger than the linear."""
    if not targeted(lora, path):
        return None
    rank, most = int(pick(lora.rank_pattern, path, lora.rank)), max(out_features, in_features)
    if rank > most:
        raise InputError(f"LoRA: rank is {rank} for {path}, which is {out_features} x {in_features}; more than {most} "
                         "adds nothing, take a smaller one (8 to 64 are usual)")
    return Adapter(path, in_features, out_features, lora, seed, device)


def check_targets(lora: LoRA, paths: list[str]) -> None:
    """Every target must name a linear, every pattern one that has an adapter, else it is a typo: InputError."""
    named = {"targets": lora.target_names(), "rank_pattern": lora.rank_pattern, "alpha_pattern": lora.alpha_pattern}
    for kind, names in named.items():
        for name in names:
            found = [path for path in paths if matches(name, path)]
            if found and kind != "targets" and not any(targeted(lora, path) for path in found):
                raise InputError(f"LoRA: {kind} has {name!r}, but targets gives no adapter to what it names, such as "
                                 f"{found[0]!r}; add it to targets, or leave it out here")
            if found:
                continue
            meant = nearest(name, [*LINEAR_NAMES, HEAD])
            hint = f"; did you mean {meant}? Its" if meant else "; its"
            raise InputError(f"LoRA: {kind} has {name!r}, which names no linear of this model{hint} linears are "
                             f'{", ".join(LINEAR_NAMES)} and {HEAD}, in full for example {paths[0]!r}')
