"""Random-weight models by transformers, one for each variant that minitune reads: the oracles' side."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

BASE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "attn_implementation": "eager", "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False,
}


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10_000.0, **fields}


VARIANTS: dict[str, PretrainedConfig] = {
    "llama-1": LlamaConfig(**BASE | {"num_key_value_heads": 6}),
    "llama-2-gqa": LlamaConfig(**BASE),
    "llama-tied": LlamaConfig(**BASE | {"tie_word_embeddings": True}),
    "llama-linear": LlamaConfig(**BASE, rope_parameters=_rope("linear", factor=3.0)),
    "llama-dynamic": LlamaConfig(**BASE | {"max_position_embeddings": 16},
                                 rope_parameters=_rope("dynamic", factor=2.0)),
    "llama-3.1": LlamaConfig(**BASE, rope_parameters=_rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)),
    "llama-yarn": LlamaConfig(**BASE, rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama-yarn-mscale": LlamaConfig(**BASE, rope_parameters=_rope(
        "yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=0.4, beta_fast=16.0,
        beta_slow=2.0, truncate=False)),
    "llama-biases": LlamaConfig(**BASE, attention_bias=True, mlp_bias=True),
    "llama-head-dim": LlamaConfig(**BASE, head_dim=20),
    "mistral": MistralConfig(**BASE, sliding_window=7),
    "mistral-full": MistralConfig(**BASE, sliding_window=None),
    "qwen2": Qwen2Config(**BASE),
    "qwen2-window": Qwen2Config(**BASE, use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen3": Qwen3Config(**BASE, head_dim=16),
    "qwen3-window": Qwen3Config(**BASE, head_dim=16, use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen3-tied": Qwen3Config(**BASE | {"tie_word_embeddings": True}, head_dim=16),
}


def make(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A transformers model with random weights, norms and biases included, saved to `folder`."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(VARIANTS[name]), dtype=dtype).eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:
            parameter.data.uniform_(0.5, 1.5)
        else:
            parameter.data.normal_(0, 0.15)
    model.save_pretrained(folder)
    return model


def load_theirs(folder: Path, adapter: Path | None = None) -> torch.nn.Module:
    """transformers' model in fp32 of the checkpoint in `folder`, by PEFT with the adapter in `adapter`."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


def logits_of(folder: Path, ids: torch.Tensor, adapter: Path | None = None) -> torch.Tensor:
    """The logits [T, V] that this model gives for ids [T]."""
    with torch.no_grad():
        return load_theirs(folder, adapter)(ids[None]).logits[0]
