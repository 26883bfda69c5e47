"""rope: rotation in place, its backward, and the tables of packed documents."""

import math

import pytest
import torch

from minitune.config import ModelConfig, Rope
from minitune.ops import rope
from minitune.ops.documents import Documents
from tests.tolerance import check, relative

SHAPE = {"vocab_size": 8, "d_model": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 16, "d_ff": 8}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_and_back(dtype):
    x, angles = torch.randn(23, 3, 10).to(dtype), torch.randn(23, 5) * 9
    cos, sin = angles.cos(), angles.sin()
    truth = rope.reference(x.double(), angles.double().cos(), angles.double().sin())
    plain = rope.reference(x, cos.to(dtype), sin.to(dtype))
    turned = rope.rotate_(x.clone(), cos, sin)
    check("rotated", turned, plain, truth)
    assert relative(rope.rotate_(turned.clone(), cos, sin, back=True), x) < (1e-6 if dtype == torch.float32 else 6e-3)


def test_rotation_works_on_a_view_of_the_fused_product():
    fused = torch.randn(5, 7 * 4)
    cos, sin = torch.randn(5, 2), torch.randn(5, 2)
    view = fused.unflatten(-1, (7, 4))[:, :3]
    expected = rope.reference(view.clone(), cos, sin)
    rest = fused[:, 12:].clone()
    rope.rotate_(view, cos, sin)
    assert torch.allclose(fused[:, :12].unflatten(-1, (3, 4)), expected, atol=1e-6) and torch.equal(fused[:, 12:], rest)


def test_angles_restart_with_each_document_and_dynamic_reads_its_length():
    config = ModelConfig(**SHAPE, max_positions=8, rope=Rope(kind="dynamic", factor=4.0))
    documents = Documents.from_lengths((5, 20, 8))
    cos, sin = rope.tables(config, documents.positions(), documents)
    start = 0
    for length in documents.lengths:
        alone = Documents.from_lengths((length,))
        expected = rope.tables(config, alone.positions(), alone)
        assert torch.equal(cos[start : start + length], expected[0])
        assert torch.equal(sin[start : start + length], expected[1])
        start += length
    one_more = Documents.from_lengths((9,))
    angles = one_more.positions()[:, None] * rope.frequencies(config.rope, 16, 8, 9)[0]
    assert torch.equal(rope.tables(config, one_more.positions(), one_more)[0], angles.cos())
    short, long = (rope.frequencies(config.rope, 16, 8, n)[0] for n in (5, 20))
    assert not torch.equal(short, long)
    assert torch.equal(rope.frequencies(config.rope, 16, 8, 8)[0], short)


def test_linear_is_slower_by_its_factor():
    plain, scaled = (rope.frequencies(Rope(kind=k, factor=4.0), 16, 64)[0] for k in ("default", "linear"))
    assert torch.allclose(scaled * 4, plain)


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("original", [4, 16, 4096, 1 << 17])
def test_yarn_has_the_frequencies_of_transformers(original, truncate):
    """Of an original context in which no pair turns, of one in which few do, and of one in which nearly all do."""
    theirs = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS["yarn"]
    config = pytest.importorskip("transformers").LlamaConfig(
        hidden_size=32, num_attention_heads=2, max_position_embeddings=4 * original, rope_parameters={
            "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": original,
            "truncate": truncate})
    expected, factor = theirs(config, "cpu")
    own = Rope(kind="yarn", theta=10_000.0, factor=4.0, original_max_positions=original, truncate=truncate)
    found = rope.frequencies(own, 16, 4 * original)
    assert relative(found[0], expected) < 1e-6 and found[1] == pytest.approx(factor)


def test_llama3_keeps_short_waves_and_slows_long_ones():
    kind = Rope(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64)
    plain, scaled = (rope.frequencies(r, 32, 512)[0] for r in (Rope(), kind))
    wavelength = 2 * math.pi / plain
    assert torch.equal(scaled[wavelength < 16], plain[wavelength < 16])
    assert torch.allclose(scaled[wavelength > 64] * 8, plain[wavelength > 64])
