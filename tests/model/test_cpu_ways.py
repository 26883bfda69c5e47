"""What a CPU takes by itself in bf16, where every size is a multiple of 64: the augmented product, and its borders."""

import copy

import pytest
import torch

from minitune.config import LoRA, ModelConfig
from minitune.model import half
from minitune.model.generate import generate
from minitune.model.init import init_weights
from minitune.model.llama import Llama
from minitune.ops import backends, lora_matmul, nf4, rope
from minitune.ops.documents import Documents
from tests.tolerance import relative

CONFIG = ModelConfig(vocab_size=61, d_model=64, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=16, d_ff=64,
                     windows=(40, None))
LENGTHS = (lora_matmul.CPU_ROWS - 30, 50)


@pytest.fixture
def network():
    return _network(quantized=False)


@pytest.fixture(params=["dense", "nf4"])
def each(request):
    """The network with its linears in 16 bits, and in NF4."""
    return _network(quantized=request.param == "nf4")


def _network(quantized):
    network = Llama(CONFIG, dtype=torch.bfloat16, quantized=quantized)
    init_weights(network, seed=1, std=0.1)
    for i, (name, shape) in enumerate(network.nf4_shapes().items()):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(i)) * 0.1
        network.put_nf4(name, nf4.quantize(weight.bfloat16()))
    network.add_adapters(LoRA(rank=4), seed=2)
    for adapter in network.adapters().values():
        adapter.B.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(3))
    network.refresh_images()
    return network


def _step(network, policy="keep", times=1):
    """[output, dx, gradients of the adapters], the same in each of `times` backwards over one graph."""
    documents = Documents.from_lengths(LENGTHS)
    context = half.Context(*rope.tables(CONFIG, documents.positions(), documents), documents, policy,
                           network._parking if policy == "offload" else None)
    generator = torch.Generator().manual_seed(4)
    x, upstream = (torch.randn(sum(LENGTHS), 64, generator=generator).bfloat16() for _ in range(2))
    network.refresh_images()
    total, branch = x.requires_grad_(), None
    for layer in network.blocks():
        total, branch = layer(total, branch, context)
    wanted = [x, *(p for a in network.adapters().values() for p in (a.A, a.B))]
    rounds = [torch.autograd.grad(total + branch, wanted, upstream, retain_graph=left > 0)
              for left in range(times - 1, -1, -1)]
    assert all(torch.equal(a, b) for other in rounds[1:] for a, b in zip(rounds[0], other, strict=True))
    return [(total + branch).detach(), *rounds[0]]


def test_it_is_the_augmented_product_and_equals_the_separate_ones(each):
    weights = each.blocks()[0].mlp.gate_up.operands()
    assert weights.around is not None and weights.way("forward", lora_matmul.CPU_ROWS) == "augmented"
    found = _step(each)
    with backends.use("reference"):
        expected = _step(each)
    assert all(relative(a, b) < 2e-2 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("policy", ["pointwise", "full", "offload"])
def test_policies_give_the_same_bits(each, policy):
    for a, b in zip(_step(each), _step(each, policy), strict=True):
        assert torch.equal(a, b)


def test_a_kept_graph_gives_its_gradients_again(each):
    for a, b in zip(_step(each), _step(each, times=3), strict=True):
        assert torch.equal(a, b)


def test_generation_with_an_adapter_reads_the_weight_as_it_lies(each):
    weights = each.blocks()[0].mlp.gate_up.operands()
    assert lora_matmul.input_rows(4, weights) is None and weights.way("forward", 4) == "addmm"
    prompt = [list(range(3, 40)) * 8]
    assert len(prompt[0]) > lora_matmul.CPU_ROWS
    new = generate(each, prompt, 20, lambda logits: logits.argmax(-1), lambda row, ids: False)
    assert len(new[0]) == 20


def test_a_copied_model_keeps_weight_and_layout_together(network):
    twin = copy.deepcopy(network)
    for weight in twin.hf_weights().values():
        weight.mul_(0.5)
    other = Llama(CONFIG, dtype=torch.bfloat16)
    for name, weight in other.hf_weights().items():
        weight.copy_(twin.hf_weights()[name])
    other.add_adapters(LoRA(rank=4), seed=2)
    for path, adapter in other.adapters().items():
        adapter.B.data.copy_(twin.adapters()[path].B.data)
    for a, b in zip(_step(twin), _step(other), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(_step(network)[0], _step(twin)[0])


def test_a_weight_that_is_trained_is_laid_out_no_longer(network):
    network.unfreeze(["model.layers.0.mlp.*"])
    assert network.blocks()[0].mlp.gate_up.around is None and network.blocks()[1].mlp.gate_up.around is not None


def test_nor_by_an_adapter_that_comes_to_it_later():
    network = Llama(CONFIG, dtype=torch.bfloat16)
    init_weights(network, seed=1)
    network.unfreeze(["model.layers.0.mlp.*"])
    network.add_adapters(LoRA(rank=4), seed=2)
    assert network.blocks()[0].mlp.gate_up.around is None and network.blocks()[1].mlp.gate_up.around is not None
    assert all(torch.isfinite(found).all() for found in _step(network))


def test_a_weight_that_is_trained_in_parts_lies_nowhere_else(network):
    network.unfreeze("full")
    assert all(projection.weight.untyped_storage().nbytes() == 0 for projection in network.projections())


def test_frozen_siblings_of_a_trained_part_keep_no_memory_but_their_own(network):
    network.unfreeze("*.q_proj.weight")
    qkv = network.blocks()[0].attention.qkv
    for part in qkv.trained.values():
        assert part.is_contiguous() and part.untyped_storage().nbytes() == part.nbytes
    assert [part.dtype for part in qkv.trained.values()] == [torch.float32, torch.bfloat16, torch.bfloat16]
