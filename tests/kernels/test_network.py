"""The whole step by our kernels: a network's losses and gradients equal those of the references, in every way."""

import contextlib

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from minitune.config import LoRA, ModelConfig
from minitune.kernels import rms_norm as kernels
from minitune.model.init import init_weights
from minitune.model.llama import Llama
from minitune.ops import attention, attention_library, backends, rms_norm, tuned
from minitune.ops.documents import Documents
from tests.tolerance import relative

LENGTHS = (19, 1, 12)
BASE = {"vocab_size": 61, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "d_ff": 40}
SHAPES = {"llama": ModelConfig(**BASE), "qwen3, window": ModelConfig(**BASE, qk_norm=True, windows=(7, None)),
          "biases": ModelConfig(**BASE, qkv_bias=True, o_bias=True, mlp_bias=True)}


def _network(config, device, train=None):
    network = Llama(config, dtype=torch.float32)
    init_weights(network, seed=1, std=0.1)
    if train is not None:
        network.unfreeze(train)
    else:
        network.add_adapters(LoRA(rank=3), seed=2)
    for adapter in network.adapters().values():
        adapter.B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    return network.to(device)


def _step(network, policy, device, twice=False):
    """[losses, gradients of what is trained]; by every policy the kernels run in forward, recompute and backward."""
    network.memory = policy
    network._policies.clear()
    documents = Documents.from_lengths(LENGTHS, device)
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, 61, (sum(LENGTHS),), generator=generator).to(device)
    hidden = network(tokens, documents.positions().to(device), documents)
    losses = network.losses_at(hidden, tokens.roll(1), 0.1)
    parameters = [p for p in network.parameters() if p.requires_grad]
    for _ in range(twice):
        torch.autograd.grad(losses.sum(), parameters, retain_graph=True)
    return [losses.detach(), *torch.autograd.grad(losses.sum(), parameters)]


@pytest.mark.parametrize("policy", ["keep", "pointwise", "full"])
@pytest.mark.parametrize("train", [None, "full", ("*.0.mlp.*", "*.v_proj.*", "*.1.self_attn.*norm.weight")], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_by_our_kernels_equals_the_references(shape, train, policy, device):
    if train is not None and len(train) == 3 and shape != "qwen3, window":
        train = train[:2]       # no other has norms there
    network = _network(SHAPES[shape], device, train)
    with backends.use("reference"):
        expected = _step(network, "keep", device)
    with backends.use("triton"):
        found = _step(network, policy, device)
    for value, e in zip(found, expected, strict=True):
        assert relative(value, e) < 1e-5


def test_the_kernels_write_into_the_augmented_products_rows(device):
    network = _network(SHAPES["llama"], device)
    with backends.use("reference"):
        expected = _step(network, "keep", device)
    ways = dict.fromkeys(("lora_matmul_forward", "lora_matmul_input"), "augmented")
    with tuned.forced(**ways, **dict.fromkeys(("attention_forward", "attention_backward"), "triton")):
        for projection in network.projections():
            projection.lay_out()
        with _triton_where_it_is_not_measured():
            found = _step(network, "pointwise", device)
    for value, e in zip(found, expected, strict=True):
        assert relative(value, e) < 1e-5


@pytest.mark.parametrize("augmented", [False, True], ids=["addmm", "augmented"])
def test_norms_give_the_thin_products_of_a_step_whatever_is_kept(augmented, device, monkeypatch):
    """Two a layer, once more where the layer is computed again; the same bits by every policy, and none of them while
    the adapters are off."""
    monkeypatch.setattr(rms_norm, "MIN_ROWS", 1)
    made = []
    forward_s = kernels.forward_s
    monkeypatch.setattr(kernels, "forward_s", lambda *a, **how: made.append(1) or forward_s(*a, **how))
    network = _network(SHAPES["llama"], device)
    with backends.use("reference"):
        expected = _step(network, "keep", device)
    ways = dict.fromkeys(("lora_matmul_forward", "lora_matmul_input"), "augmented") if augmented else {}
    found = {}
    with tuned.forced(**ways, rms_norm_s="triton"):
        for projection in network.projections():
            projection.lay_out()
        with _triton_where_it_is_not_measured():
            for policy in ("keep", "pointwise", "full"):
                made.clear()
                found[policy] = _step(network, policy, device)
                assert len(made) == 2 * len(network.layers) * (2 if policy == "full" else 1)
            made.clear()
            with network.adapters_switched(False), torch.no_grad():
                documents = Documents.from_lengths(LENGTHS, device)
                network(torch.zeros(sum(LENGTHS), dtype=torch.int64, device=device), documents.positions().to(device),
                        documents)
            assert not made
    for value, e in zip(found["keep"], expected, strict=True):
        assert relative(value, e) < 1e-5
    for policy in ("pointwise", "full"):
        assert all(torch.equal(a, b) for a, b in zip(found["keep"], found[policy], strict=True)), policy


@contextlib.contextmanager
def _triton_where_it_is_not_measured():
    """What a GPU takes by itself; the interpreter has to be asked."""
    choose = backends.choose

    def chosen(op, device, measured=None, dtype=None, but=()):
        return measured or "reference" if op in backends.MEASURED else "reference" if op == "nf4" else "triton"

    backends.choose = chosen
    try:
        yield
    finally:
        backends.choose = choose


def test_a_kept_graph_is_not_overwritten(device):
    network = _network(SHAPES["llama"], device)
    with backends.use("triton"):
        once, again = _step(network, "pointwise", device), _step(network, "pointwise", device, twice=True)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_the_librarys_gradients_are_turned_on_their_way_into_one_buffer(device, monkeypatch):
    """Its graph of plain products here: what a GPU's FlashAttention gives back comes apart in the same way."""
    network = _network(SHAPES["llama"], device)
    with backends.use("reference"):
        expected = _step(network, "keep", device)

    def library(q, k, v, documents, window=None, needs_backward=True, rows=None):
        out, graph = attention_library.forward(q, k, v, documents, window, needs_backward)
        return out, attention.Saved(q, k, v, documents, window, graph)

    monkeypatch.setattr(attention, "forward", library)
    with backends.use("triton"):
        found = _step(network, "keep", device)
    for value, e in zip(found, expected, strict=True):
        assert relative(value, e) < 1e-5
