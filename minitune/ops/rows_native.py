"""What torch.compile has to know of the extension's row ops (csrc/rows.h), its attention (csrc/attention.h) and its
products (csrc/bindings_products.cpp): they write where they are told to, and give nothing back."""

from __future__ import annotations

from typing import Any

import torch

NAMES = ("rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "rope", "losses", "softmax", "softmax_backward",
         "product", "adamw_8bit")


def _nothing(*_: Any) -> None:
    return None


for _name in (*(f"rows_{name}" for name in NAMES), "attention_tiles", "attention_tiles_backward", "product_apart"):
    torch.library.register_fake(f"minitune::{_name}", _nothing)
