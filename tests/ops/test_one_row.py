"""One token through all layers on a CPU: the bits of the general way, whatever a layer has, however it is adapted."""

import contextlib
import copy

import pytest
import torch

import minitune as mt
from minitune.config import LoRA, ModelConfig, Rope
from minitune.model import generate as generation
from minitune.model.init import init_weights
from minitune.model.llama import Llama
from minitune.ops import backends, one_row
from tests.tolerance import relative

SIZES = {"vocab_size": 61, "d_model": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 4, "head_dim": 16, "d_ff": 128,
         "windows": (None,) * 3}
VARIANTS = {
    "plain": {}, "grouped": {"n_kv_heads": 2}, "one key head": {"n_kv_heads": 1},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "n_kv_heads": 2},
    "normed heads": {"qk_norm": True, "n_kv_heads": 2}, "odd sizes": {"d_model": 48, "head_dim": 10, "d_ff": 33},
    "dynamic": {"rope": Rope(kind="dynamic", factor=2.0), "max_positions": 16}, "one layer": {
        "n_layers": 1, "windows": (None,)},
    "windows": {"windows": (5, None, 3), "n_kv_heads": 2},
}
ADAPTERS = {"base": None, "all": LoRA(rank=4), "some": LoRA(rank=3, targets=("q_proj", "up_proj"), rslora=True),
            "DoRA": LoRA(rank=4, dora=True)}
STEPS = [7, 9, 3, 60, 0, 12, 5, 8]

pytestmark = pytest.mark.skipif(not one_row.fits(torch.float32, torch.device("cpu")), reason="needs the extension")


def _network(variant, dtype, lora=None):
    network = Llama(ModelConfig(**SIZES | VARIANTS[variant]), dtype=dtype)
    init_weights(network, seed=1, std=0.2)
    generator = torch.Generator().manual_seed(3)
    for name, weight in network.hf_weights().items():
        if "norm" in name or "bias" in name:
            weight.uniform_(0.5, 1.5, generator=generator)
    if lora is not None:
        network.add_adapters(lora, seed=2)
        for adapter in network.adapters().values():
            adapter.B.data.normal_(0, 0.2, generator=generator)
    return network


@torch.no_grad()
def _both(network, length=11):
    """Hidden states of the same tokens, step by step: by the general way, by the one for one row."""
    caches = [generation.Cache(network, 1, length + len(STEPS), length + len(STEPS))]
    generation.prefill(network, [list(range(3, 3 + length))], caches[0])
    caches.append(copy.deepcopy(caches[0]))
    row = generation.one_row_of(network)
    found = [[generation.decode(network, [token], cache, way).clone() for token in STEPS]
             for cache, way in zip(caches, (None, row), strict=True)]
    assert caches[0].lengths == caches[1].lengths == [length + len(STEPS)]
    for name in ("keys", "values"):
        for ours, theirs in zip(getattr(caches[0], name), getattr(caches[1], name), strict=True):
            assert relative(ours, theirs) < (1e-5 if network.dtype == torch.float32 else 2e-2)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore:a document of")
def test_it_has_the_bits_of_the_general_way(variant, adapter, dtype):
    general, row = _both(_network(variant, dtype, ADAPTERS[adapter]))
    for a, b in zip(general, row, strict=True):
        if variant == "windows":        # there the general way gives attention a mask
            assert relative(a, b) < (1e-5 if dtype == torch.float32 else 2e-2)
        else:
            assert torch.equal(a, b)


def test_trained_weights_and_norms(dtype=torch.bfloat16):
    network = _network("normed heads", dtype)
    network.unfreeze(["*norm.weight", "*.o_proj.weight"])
    general, row = _both(network)
    assert all(torch.equal(a, b) for a, b in zip(general, row, strict=True))


@pytest.mark.parametrize("at_hand", [True, False])
def test_weights_in_4_bits(tmp_path, at_hand):
    mt.init("tiny", tmp_path, seed=1)
    network = mt.load(tmp_path, quant="nf4-dq", dtype="bfloat16", device="cpu", lora=LoRA(rank=4)).network
    with network.weights_at_hand(1) if at_hand else contextlib.nullcontext():
        general, row = _both(network)
        copies = [projection.decoded for projection in network.projections()]
    native = not backends.missing("native", torch.device("cpu"))
    assert all(copy is None for copy in copies) == (native or not at_hand)      # they are read as they lie
    assert network.nf4_shapes() and all(torch.equal(a, b) for a, b in zip(general, row, strict=True))
    with backends.use("reference"):
        decoded, _ = _both(network)
    assert all(relative(a, b) < 2e-2 for a, b in zip(row, decoded, strict=True))


def test_it_reads_the_adapters_as_they_are_when_it_is_made():
    network = _network("plain", torch.float32, LoRA(rank=4))
    with network.adapters_switched(False):
        base = _both(network)
    adapted = _both(network)
    assert torch.equal(base[0][0], base[1][0]) and not torch.equal(base[1][0], adapted[1][0])


def test_generation_of_one_sequence_takes_it_and_of_several_does_not(monkeypatch):
    network = _network("grouped", torch.float32)
    made, real = [], one_row.OneRow.step
    monkeypatch.setattr(one_row.OneRow, "step", lambda self, *rest: made.append(1) or real(self, *rest))
    one = generation.generate(network, [[5, 6, 7]], 9, generation.sampler(), lambda row, ids: False)
    assert len(made) == 8
    with backends.use("reference"):
        assert generation.generate(network, [[5, 6, 7]], 9, generation.sampler(), lambda row, ids: False) == one
    several = generation.generate(network, [[5, 6, 7], [8, 9]], 9, generation.sampler(), lambda row, ids: False)
    assert several[:1] == one and len(made) == 8
