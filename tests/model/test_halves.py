"""The hand-written halves against plain autograd over the reference ops, under every memory policy."""

import weakref
from unittest import mock

import pytest
import torch

from minitune.config import LoRA, ModelConfig
from minitune.model import half
from minitune.model.attention_half import AttentionHalf
from minitune.model.init import init_weights
from minitune.model.llama import Llama
from minitune.model.lora import Projection
from minitune.model.memory import kept_bytes
from minitune.model.mlp_half import MlpHalf
from minitune.ops import rms_norm, rope, tuned
from minitune.ops.documents import Documents
from tests.tolerance import check_rms, relative

LENGTHS = (9, 20, 9, 3)
BASE = {"vocab_size": 61, "d_model": 40, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "head_dim": 10, "d_ff": 52}
SHAPES = {
    "llama": ModelConfig(**BASE),
    "qwen2": ModelConfig(**BASE, qkv_bias=True, tied_head=True),
    "qwen3": ModelConfig(**BASE, qk_norm=True),
    "mistral": ModelConfig(**BASE, windows=(5, None), o_bias=True, mlp_bias=True, qkv_bias=True),
}
LORAS = {
    "all": LoRA(rank=4),
    "some": LoRA(rank=3, targets=("q_proj", "v_proj", "up_proj"), rank_pattern={"layers.1.self_attn.v_proj": 5}),
    "mlp only": LoRA(rank=2, targets=("down_proj",), rslora=True),
}
BASES = {
    "full": "full", "norms": "norms", "last layer": "last:1",
    "patterns": ("*.layers.0.*", "*.v_proj.*", "*down_proj.weight", "*.1.input_layernorm.weight"),
    "one norm": ("*.layers.1.post_attention_layernorm.weight",),
}
"""Base weights that are trained."""
TRAINED = LORAS | BASES
assert len(TRAINED) == len(LORAS) + len(BASES)


def _network(config, trained, dtype=torch.float32, memory="keep"):
    """`trained`: a LoRA, or what `unfreeze` takes."""
    network = Llama(config, dtype=dtype, memory=memory)
    init_weights(network, seed=1, std=0.1)
    for name, weight in network.hf_weights().items():
        if weight.dim() == 1:
            weight.copy_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(len(name))) + 0.5)
    if not isinstance(trained, LoRA):
        network.unfreeze(trained)
    else:
        network.add_adapters(trained, seed=2)
        for adapter in network.adapters().values():
            adapter.B.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(3))
    return network


def _x_and_upstream(dtype):
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(sum(LENGTHS), 40, generator=generator).to(dtype) for _ in range(2)]


def _context(network, policy="keep"):
    documents = Documents.from_lengths(LENGTHS)
    cos, sin = rope.tables(network.config, documents.positions(), documents)
    return half.Context(cos, sin, documents, policy, network._parking if policy == "offload" else None)


def _gradients(network, forward, dtype):
    """[output, dx, gradient of each parameter of a layer that is trained] of a run through all layers."""
    x, upstream = _x_and_upstream(dtype)
    x.requires_grad_()
    network.refresh_images()
    y = forward(x)
    parameters = [p for layer in network.blocks() for p in layer.parameters() if p.requires_grad]
    assert parameters
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], upstream)]


def _fast(network, policy):
    def forward(x):
        branch = None
        for layer in network.blocks():
            x, branch = layer(x, branch, _context(network, policy))
        return x + branch
    return forward


def _composed(network):
    def forward(x):
        for layer in network.blocks():
            context = _context(network)
            for part in (layer.attention, layer.mlp):
                x = x + part.composed(x, context)
        return x
    return forward


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_plain_autograd(shape, trained):
    network = _network(SHAPES[shape], TRAINED[trained], torch.float64)
    expected = _gradients(network, _composed(network), torch.float64)
    bound = 2e-7 if trained in LORAS else 4e-7      # parameters, cos and sin are fp32
    for value, e in zip(_gradients(network, _fast(network, "keep"), torch.float64), expected, strict=True):
        assert relative(value, e) < bound


def test_adapters_beside_trained_base_weights():
    """Of the same projection, and of one whose other parts are trained."""
    network = _network(SHAPES["mistral"], ("*.q_proj.weight", "*mlp*", "*norm.weight"), torch.float64)
    network.add_adapters(LORAS["some"], seed=2)
    for adapter in network.adapters().values():
        adapter.B.data.normal_(0, 0.02)
    expected = _gradients(network, _composed(network), torch.float64)
    for policy in ("keep", "full"):
        for value, e in zip(_gradients(network, _fast(network, policy), torch.float64), expected, strict=True):
            assert relative(value, e) < 4e-7, policy


@pytest.mark.parametrize("trained", ["all", *BASES])
@pytest.mark.parametrize("shape", SHAPES)
def test_policies_give_the_same_bits(shape, trained):
    network = _network(SHAPES[shape], TRAINED[trained])
    keep = _gradients(network, _fast(network, "keep"), torch.float32)
    for policy in ("pointwise", "full", "offload"):
        other = _gradients(network, _fast(network, policy), torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(keep, other, strict=True)), policy


@pytest.mark.parametrize("trained", ["all", "full"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_errs_no_more_than_plain_autograd(shape, trained):
    network = _network(SHAPES[shape], TRAINED[trained], torch.bfloat16)
    truth_network = _network(SHAPES[shape], TRAINED[trained], torch.float64)
    weights = network.hf_weights()
    for name, weight in truth_network.hf_weights().items():
        weight.copy_(weights[name])
    truth = _gradients(truth_network, _composed(truth_network), torch.float64)
    plain = _gradients(network, _composed(network), torch.bfloat16)
    for i, (value, p, t) in enumerate(zip(_gradients(network, _fast(network, "keep"), torch.bfloat16), plain, truth,
                                          strict=True)):
        check_rms(f"entry {i}", value, p, t.double())


@pytest.fixture
def augmented_everywhere(monkeypatch):
    """As if the augmented product had been measured to be the fastest at every shape."""
    monkeypatch.setattr(tuned, "way", lambda op, *_, **__: "augmented" if op.startswith("lora_matmul") else None)
    monkeypatch.setattr(tuned, "ways", lambda *_: {"augmented"})


@pytest.mark.parametrize("lora", LORAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_augmented_product_gives_the_same(shape, lora, augmented_everywhere):
    network = _network(SHAPES[shape], LORAS[lora], torch.float64)
    assert any(p.around is not None for p in network.projections())
    expected = _gradients(network, _composed(network), torch.float64)
    for policy in ("keep", "pointwise", "full", "offload"):
        for value, e in zip(_gradients(network, _fast(network, policy), torch.float64), expected, strict=True):
            assert relative(value, e) < 2e-7, policy


def test_the_margins_of_an_older_forward_are_not_used(augmented_everywhere):
    test_two_forwards_before_their_backwards_keep_their_own_adapters(exact=False)


def test_pointwise_and_full_keep_what_is_predicted():
    """What autograd holds between forward and backward is what kept_bytes says, within 6 % (S and 1/rms)."""
    config = SHAPES["qwen3"]
    for policy in ("keep", "pointwise", "full", "offload"):
        network = _network(config, LoRA(rank=1))
        network.refresh_images()
        held = {}

        def pack(tensor, held=held):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(sum(LENGTHS), 40, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _fast(network, policy)(x)
        predicted = kept_bytes(config, sum(LENGTHS), policy, 4)
        assert sum(held.values()) == pytest.approx(predicted, rel=0.06), policy


@pytest.mark.parametrize("policy", ["keep", "pointwise", "full", "offload"])
def test_a_graph_that_is_kept_gives_its_gradients_again(policy):
    network = _network(SHAPES["qwen3"], LORAS["all"])
    x, upstream = _x_and_upstream(torch.float32)
    network.refresh_images()
    y = _fast(network, policy)(x.requires_grad_())
    first = torch.autograd.grad(y, x, upstream, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y, x, upstream)[0], first)


@pytest.mark.parametrize("policy", ["keep", "pointwise", "full", "offload"])
def test_a_loss_that_is_still_referenced_keeps_no_images_alive(policy):
    network = _network(SHAPES["llama"], LORAS["all"])
    network.refresh_images()
    loss = _fast(network, policy)(_x_and_upstream(torch.float32)[0]).sum()
    images = weakref.ref(network.blocks()[0].mlp.down.images[0])
    network.refresh_images()
    assert images() is not None     # the backward is still to come
    loss.backward()
    assert images() is None and loss.grad_fn is not None


def test_host_buffers_are_used_again_and_dropped_graphs_leave_none_behind():
    network = _network(SHAPES["llama"], LORAS["all"])
    for _ in range(3):
        _gradients(network, _fast(network, "offload"), torch.float32)
    x, _ = _x_and_upstream(torch.float32)
    y = _fast(network, "offload")(x)
    (free,) = network._parking._free.values()
    assert len(free) == 0 and y.requires_grad
    del y
    _gradients(network, _fast(network, "offload"), torch.float32)
    assert len(free) == len(network.blocks())


def test_a_layer_whose_input_needs_no_gradient_gets_none():
    network = _network(SHAPES["llama"], LORAS["all"])
    x, _ = _x_and_upstream(torch.float32)
    network.refresh_images()
    y = _fast(network, "keep")(x)
    y.sum().backward()
    assert x.grad is None and all(a.A.grad is not None for a in network.adapters().values())


@pytest.mark.parametrize("trained", ["norms", "*.layers.0.post_attention_layernorm.weight", "*.layers.0.mlp.*"])
@pytest.mark.parametrize("policy", ["keep", "full"])
def test_nor_does_what_it_trains_before_anything_else_need_it(policy, trained):
    """The first norm that is trained, or the first product, above an embedding that is not."""
    network = _network(SHAPES["llama"], (trained,) if "*" in trained else trained)
    weights = [p for p in network.parameters() if p.requires_grad and p is not network.norm]
    x, upstream = _x_and_upstream(torch.float32)
    network.refresh_images()
    found, expected = (torch.autograd.grad(_fast(network, policy)(each), weights, upstream)
                       for each in (x, x.clone().requires_grad_()))
    assert all(torch.equal(d, e) for d, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("policy", ["keep", "full"])
def test_a_half_is_given_gradients_whose_values_lie_in_memory(policy):
    """Kernels take their addresses; those of a sum are one value, expanded."""
    network, given = _network(SHAPES["llama"], LORAS["all"]), []

    def watched(self, dy, past, *rest, usual=MlpHalf.backward_from):
        given.append((dy, past))
        return usual(self, dy, past, *rest)

    network.refresh_images()
    y = _fast(network, policy)(_x_and_upstream(torch.float32)[0])
    with mock.patch.object(MlpHalf, "backward_from", watched):
        y.sum().backward()
    assert len(given) == 2 and all(d.is_contiguous() for pair in given for d in pair)


def test_full_holds_the_memory_of_one_half_at_a_time():
    network, alive = _network(SHAPES["llama"], LORAS["all"]), []

    def first(self, *rest, usual=AttentionHalf.forward_keeping, **options):
        found = usual(self, *rest, **options)
        alive.append(weakref.ref(found[1]["attended"]))
        return found

    def second(self, *rest, usual=MlpHalf.forward_keeping, **options):
        assert alive.pop()() is None
        return usual(self, *rest, **options)

    network.refresh_images()
    patch = mock.patch.object
    with patch(AttentionHalf, "forward_keeping", first), patch(MlpHalf, "forward_keeping", second):
        assert _fast(network, "full")(_x_and_upstream(torch.float32)[0]).requires_grad


@pytest.mark.parametrize(("trained", "policy"), [("norms", "keep"), ("norms", "full"), ("full", "full")])
def test_a_base_weight_that_changed_before_a_backward_that_reads_it_is_an_error(trained, policy):
    """It would give wrong gradients: autograd says so."""
    network = _network(SHAPES["llama"], BASES[trained])
    network.refresh_images()
    loss = _fast(network, policy)(_x_and_upstream(torch.float32)[0]).sum()
    with torch.no_grad():
        network.blocks()[0].mlp.base_parameters()[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_update_before_the_backward_of_linears_leaves_them_their_copies():
    """As adapters have their images."""
    network = _network(SHAPES["qwen2"], ("*_proj.*",))
    expected = _gradients(network, _fast(network, "keep"), torch.float32)
    x, upstream = _x_and_upstream(torch.float32)
    network.refresh_images()
    y = _fast(network, "keep")(x.requires_grad_())
    parameters = [p for p in network.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in parameters:
            p.add_(1)
    for value, e in zip(torch.autograd.grad(y, [x, *parameters], upstream), expected[1:], strict=True):
        assert torch.equal(value, e)


@pytest.mark.parametrize("trained", ["full", "norms", ("*.v_proj.weight",), ("*.bias",), ("*gate_proj.*", "*norm*")],
                         ids=str)
@pytest.mark.parametrize("policy", ["keep", "pointwise", "full"])
def test_copies_take_what_is_predicted(trained, policy):
    """Bytes that only the backward's operands hold: copies of all that shares a product with what is trained."""
    network = _network(SHAPES["mistral"], trained, torch.bfloat16)
    network.refresh_images()
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    made, copied = [], Projection.copied

    def watched(self):
        found = copied(self)
        made.extend(weakref.ref(x) for x in found if x.untyped_storage().data_ptr() not in own)
        return found

    with mock.patch.object(Projection, "copied", watched):
        y = _fast(network, policy)(_x_and_upstream(torch.bfloat16)[0].requires_grad_())
    held = sum(x.nbytes for x in (ref() for ref in made) if x is not None)
    assert y.requires_grad and held == network.trained_values().kept_bytes(policy, 2)
    assert (held > 0) == (policy != "full" and trained != "norms")


def test_a_trained_bias_has_its_gradient_in_fp32():
    network = _network(SHAPES["qwen2"], ("*.q_proj.bias",), torch.bfloat16)
    gradients = _gradients(network, _fast(network, "keep"), torch.bfloat16)[2:]
    assert len(gradients) == 2 and not any(torch.equal(d, d.bfloat16().float()) for d in gradients)


@torch.no_grad()
def test_a_pass_without_gradients_reads_trained_weights_as_they_stand():
    """Two such passes, nothing between them but the update."""
    network, (x, _) = _network(SHAPES["qwen2"], BASES["full"]), _x_and_upstream(torch.float32)
    found = []
    for _ in range(2):
        network.refresh_images()
        found.append(_fast(network, "keep")(x))
        network.blocks()[1].mlp.down.base_parameters()[0].add_(1)
    assert not torch.equal(*found)


@pytest.mark.parametrize("with_branch", [False, True])
def test_a_loss_of_the_stream_alone_passes_the_half_by(with_branch):
    network = _network(SHAPES["llama"], BASES["full"])
    x, branch = (x.requires_grad_() for x in _x_and_upstream(torch.float32))
    given = (x, branch) if with_branch else (x,)
    total, _ = half.run(network.blocks()[0].attention, x, branch if with_branch else None, _context(network))
    assert all(torch.equal(d, torch.ones_like(x)) for d in torch.autograd.grad(total.sum(), given))


@pytest.mark.parametrize(("trained", "policy", "again"), [
    ("norms", "pointwise", 0), ("full", "pointwise", 4), ("full", "keep", 0),
    (("*.q_proj.bias", "*.down_proj.*"), "pointwise", 0)], ids=str)
def test_a_norms_output_is_formed_again_only_for_who_reads_it(trained, policy, again):
    network = _network(SHAPES["mistral"], trained)
    network.refresh_images()
    y = _fast(network, policy)(_x_and_upstream(torch.float32)[0])
    with mock.patch.object(rms_norm, "apply", side_effect=rms_norm.apply) as apply:
        y.sum().backward()
    assert apply.call_count == again


@pytest.mark.parametrize("policy", ["keep", "full"])
def test_copies_of_trained_weights_live_no_longer_than_their_backward(policy):
    network = _network(SHAPES["llama"], BASES["full"], torch.bfloat16)
    network.refresh_images()
    made, copied = [], Projection.copied

    def watched(self):
        weight, bias = copied(self)
        made.append(weakref.ref(weight))
        return weight, bias

    with mock.patch.object(Projection, "copied", watched):
        loss = _fast(network, policy)(_x_and_upstream(torch.bfloat16)[0]).sum()
        kept = sum(ref() is not None for ref in made)
        loss.backward()
    assert kept == (len(network.projections()) if policy == "keep" else 0)
    assert loss.grad_fn is not None and all(ref() is None for ref in made)


def test_two_forwards_before_their_backwards_keep_their_own_adapters(exact=True):
    """An update between a forward and its backward must not change that backward."""
    network = _network(SHAPES["llama"], LORAS["all"])
    expected = _gradients(network, _fast(network, "full"), torch.float32)
    x, upstream = _x_and_upstream(torch.float32)
    x.requires_grad_()
    network.refresh_images()
    y = _fast(network, "full")(x)
    with torch.no_grad():
        for adapter in network.adapters().values():
            adapter.B.add_(1)
    network.refresh_images()
    dx = torch.autograd.grad(y, x, upstream)[0]
    assert torch.equal(dx, expected[1]) if exact else relative(dx, expected[1]) < 1e-6
