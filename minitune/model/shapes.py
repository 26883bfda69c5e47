"""The shapes that `minitune init` knows by name, as their published config.json state them."""

from __future__ import annotations

import difflib

from minitune.config import ModelConfig, Rope
from minitune.errors import InputError

_LLAMA3 = Rope(kind="llama3", theta=500_000.0, factor=8.0, original_max_positions=8192)

SHAPES: dict[str, ModelConfig] = {
    "tiny": ModelConfig(vocab_size=4096, d_model=128, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=384,
                        max_positions=1024, tied_head=True, bos_id=1, eos_ids=(2,)),
    "134m": ModelConfig(vocab_size=32_000, d_model=768, n_layers=12, n_heads=12, n_kv_heads=12, head_dim=64, d_ff=2048,
                        bos_id=1, eos_ids=(2,)),
    "787m": ModelConfig(vocab_size=32_000, d_model=2048, n_layers=16, n_heads=32, n_kv_heads=8, head_dim=64, d_ff=5632,
                        tied_head=True, bos_id=1, eos_ids=(2,)),
    "llama-3.2-1b": ModelConfig(vocab_size=128_256, d_model=2048, n_layers=16, n_heads=32, n_kv_heads=8, head_dim=64,
                                d_ff=8192, max_positions=131_072, tied_head=True, bos_id=128_000, eos_ids=(128_001,),
                                rope=Rope(kind="llama3", theta=500_000.0, factor=32.0, original_max_positions=8192)),
    "llama-2-7b": ModelConfig(vocab_size=32_000, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128,
                              d_ff=11_008, max_positions=4096, bos_id=1, eos_ids=(2,)),
    "llama-3-8b": ModelConfig(vocab_size=128_256, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128,
                              d_ff=14_336, max_positions=8192, rope=Rope(theta=500_000.0), bos_id=128_000,
                              eos_ids=(128_001,)),
    "llama-3.1-8b": ModelConfig(vocab_size=128_256, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128,
                                d_ff=14_336, max_positions=131_072, rope=_LLAMA3, bos_id=128_000, eos_ids=(128_001,)),
    "mistral-7b": ModelConfig(family="mistral", vocab_size=32_000, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8,
                              head_dim=128, d_ff=14_336, max_positions=32_768, windows=(4096,) * 32, bos_id=1,
                              eos_ids=(2,)),
    "qwen2-7b": ModelConfig(family="qwen2", vocab_size=152_064, d_model=3584, n_layers=28, n_heads=28, n_kv_heads=4,
                            head_dim=128, d_ff=18_944, norm_eps=1e-6, max_positions=131_072, qkv_bias=True,
                            rope=Rope(theta=1_000_000.0), bos_id=151_643, eos_ids=(151_643,)),
    "qwen3-8b": ModelConfig(family="qwen3", vocab_size=151_936, d_model=4096, n_layers=36, n_heads=32, n_kv_heads=8,
                            head_dim=128, d_ff=12_288, norm_eps=1e-6, max_positions=40_960, qk_norm=True,
                            rope=Rope(theta=1_000_000.0), bos_id=151_643, eos_ids=(151_645,)),
}


def shape(name: str) -> ModelConfig:
    """The ModelConfig of a name. InputError with the nearest name for any other."""
    if name in SHAPES:
        return SHAPES[name]
    near = difflib.get_close_matches(name.lower(), SHAPES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(f"init: no shape is named {name!r}; {hint}there are {', '.join(SHAPES)}")
