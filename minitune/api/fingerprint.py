"""fingerprint: by what an adapter knows the base again that it was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitune.arguments import short, warn
from minitune.checkpoint.adapter import trained_on
from minitune.checkpoint.folders import ABOUT
from minitune.data.corpus import raw
from minitune.errors import InputError
from minitune.model.llama import Llama

FIRST = 64
"""As many values of each linear are looked at: a page of its file."""


@torch.no_grad()
def fingerprint(network: Llama) -> dict[str, str]:
    """{"bfloat16": SHA-256, "nf4": SHA-256} of the first values of each of the layers' linears, those that lie in 16
    bits or more rounded to bfloat16, and those in 4 bits by their codes; what there is none of has no entry. One base
    has the same in fp32 and bfloat16, on a CPU and a GPU."""
    dense: list[Tensor] = []
    codes: list[Tensor] = []
    for projection in network.projections():
        codes += [part.packed.flatten()[:FIRST // 2] for _, part in projection.nf4_parts()]
        weights = projection.hf_weights()
        dense += [weights[name][0, :FIRST].to(torch.bfloat16).view(torch.int16)
                  for path in projection.parts if (name := f"{path}.weight") in weights]
    found = {form: torch.cat(values).cpu() for form, values in (("bfloat16", dense), ("nf4", codes)) if values}
    return {form: hashlib.sha256(raw(values)).hexdigest() for form, values in found.items()}


def warn_of_another_base(adapter: Path, about: Mapping[str, Any], network: Llama, folder: Path) -> None:
    """Warn where an adapter that minitune wrote was trained on a base with other weights; where one of the two bases
    lies in 4 bits they cannot be compared. InputError for a file of ours that says what we never write."""
    said = about.get("base")
    if said is None:        # another trainer's, who does not tell
        return
    if not isinstance(said, dict):
        raise InputError(f"{adapter / ABOUT}: base is {short(said)}; it must be a table of SHA-256; remove the file "
                         "to do without it")
    here = fingerprint(network)
    if said.keys() == here.keys() and said != here:
        warn(f"{adapter}: was trained on a base with other weights than {folder} has, so its answers differ; "
             f"{trained_on(adapter)}")


__all__ = ["fingerprint", "warn_of_another_base"]
