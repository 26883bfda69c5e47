"""The models and token layouts that bench_train measures, and the checkpoint folders and tokens made from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 20_26
LR = 2e-4
RANK, ALPHA = 16, 32
PROMPT, NEW_TOKENS = 32, 64


@dataclass(frozen=True, kw_only=True)
class Size:
    """A Llama of random weights. All counts are of elements."""

    layers: int
    d_model: int
    d_ff: int
    heads: int
    kv_heads: int
    head_dim: int = 64
    vocab: int = 32_000
    tied: bool = False

    @property
    def qkv_width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def products(self) -> list[tuple[str, int, int]]:
        """(name, in, out) of each product of one layer, fused as minitune fuses them."""
        return [("qkv", self.d_model, self.qkv_width), ("o", self.heads * self.head_dim, self.d_model),
                ("gate_up", self.d_model, 2 * self.d_ff), ("down", self.d_ff, self.d_model)]

    def parameters(self) -> int:
        """Weights in the linears, the embedding and, where it has its own, the head."""
        layer = sum(inner * outer for _, inner, outer in self.products())
        return self.layers * layer + (1 if self.tied else 2) * self.vocab * self.d_model


SIZES = {
    "12x768": Size(layers=12, d_model=768, d_ff=2048, heads=12, kv_heads=12),
    "16x2048": Size(layers=16, d_model=2048, d_ff=5632, heads=32, kv_heads=8, tied=True),
    "2x64": Size(layers=2, d_model=64, d_ff=128, heads=4, kv_heads=2, head_dim=16, vocab=256),  # tries the harness only
}

SEVEN_B = Size(layers=32, d_model=4096, d_ff=11_008, heads=32, kv_heads=32, head_dim=128)
TINY = SIZES["2x64"]


def layout(name: str) -> tuple[int, ...]:
    """Document lengths of a layout: "4x256" is four documents of 256 tokens."""
    count, length = (int(word) for word in name.split("x"))
    return (length,) * count


def write_checkpoint(size: Size, folder: Path) -> None:
    """A Hugging Face folder of random bf16 weights, as transformers writes it; no EOS, so no answer ends early."""
    import torch
    import transformers

    torch.manual_seed(SEED)
    config = transformers.LlamaConfig(
        vocab_size=size.vocab, hidden_size=size.d_model, intermediate_size=size.d_ff, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, head_dim=size.head_dim,
        max_position_embeddings=2048, tie_word_embeddings=size.tied, bos_token_id=None, eos_token_id=None,
        pad_token_id=None)
    model: Any = transformers.LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)


def token_ids(size: Size, count: int) -> list[int]:
    """`count` random ids, the same on every side."""
    import random

    chosen = random.Random(SEED)
    return [chosen.randrange(size.vocab) for _ in range(count)]
