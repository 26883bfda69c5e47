"""The named shapes have the sizes that their models are published with."""

import pytest

from minitune.model.shapes import SHAPES


@pytest.mark.parametrize("shape", SHAPES)
def test_named_shapes_have_their_published_sizes(shape):
    billions = {"llama-2-7b": 6.738, "llama-3-8b": 8.030, "llama-3.1-8b": 8.030, "llama-3.2-1b": 1.236,
                "mistral-7b": 7.242, "qwen2-7b": 7.616, "qwen3-8b": 8.191, "134m": 0.134, "787m": 0.787,
                "tiny": 0.001312}
    c = SHAPES[shape]
    heads = (c.n_heads + 2 * c.n_kv_heads) * c.head_dim
    layer = c.d_model * (heads + c.n_heads * c.head_dim + 3 * c.d_ff + 2) + heads * c.qkv_bias
    layer += 2 * c.head_dim * c.qk_norm
    total = c.n_layers * layer + c.d_model + c.vocab_size * c.d_model * (1 if c.tied_head else 2)
    assert total / 1e9 == pytest.approx(billions[shape], rel=5e-3)
