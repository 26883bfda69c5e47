"""DoRA and adapters on the head, through every path of the model: training, generation, merging, files."""

import contextlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

import minitune as mt
from minitune.ops import backends
from tests.batches import documents, packed
from tests.oracles import logits_of, make
from tests.tolerance import relative

IDS = torch.arange(3, 40)
KINDS = {"dora": mt.LoRA(rank=4, dora=True), "head": mt.LoRA(rank=4, targets=("q_proj", "lm_head")),
         "dora on the head": mt.LoRA(rank=4, dora=True, targets=("o_proj", "lm_head"))}


def _model(folder, lora, **settings):
    """With adapters that are not zero and, with DoRA, lengths that are not the rows' own."""
    model = mt.load(folder, lora=lora, device="cpu", **{"dtype": "float32", **settings})
    generator = torch.Generator().manual_seed(1)
    for adapter in model.network.adapters().values():
        adapter.B.data.normal_(0, 0.2, generator=generator)
        if adapter.m is not None:
            adapter.m.data *= torch.empty_like(adapter.m).uniform_(0.8, 1.2, generator=generator)
    return model


def _batch():
    return packed(documents(seed=2), 64)


@pytest.fixture(params=KINDS)
def lora(request):
    return KINDS[request.param]


@pytest.mark.parametrize("variant", ["llama-biases", "llama-tied"])
def test_a_fresh_adapter_changes_nothing(tmp_path, lora, variant):
    make(variant, tmp_path)
    model = mt.load(tmp_path, lora=lora, device="cpu", dtype="float32")
    with model.adapter_disabled():
        base = model.logits(IDS).detach()
    assert relative(model.logits(IDS).detach(), base) < 1e-6
    assert relative(_model(tmp_path, lora).logits(IDS).detach(), base) > 0.1


@pytest.mark.parametrize("memory", ["keep", "full"])
def test_losses_with_and_without_a_graph_agree(tmp_path, lora, memory):
    make("qwen3", tmp_path)
    model = _model(tmp_path, lora, memory=memory)
    with torch.no_grad():
        expected = model.loss(_batch())
    loss = model.loss(_batch())
    assert relative(loss.detach(), expected) < 1e-6
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.trainable_parameters())


def test_a_base_that_is_trained_is_no_reference(tiny):
    model = mt.load(tiny, device="cpu", train="last:1")
    with pytest.raises(mt.InputError, match="no adapter to switch off; load a second model"), model.adapter_disabled():
        pass


@pytest.mark.parametrize("lora", [KINDS["head"], mt.LoRA(rank=4, targets=("q_proj",), dropout=0.1)],
                         ids=["head", "dropout"])
def test_a_step_between_a_loss_and_its_backward_is_an_error(tiny, lora):
    """What the backward computes again would read new weights: gradients of neither loss."""
    model = _model(tiny, lora, memory="full").train()
    optimizer = mt.AdamW(model.trainable_parameters(), lr=1e-2)
    early, late = model.loss(_batch()), model.loss(_batch())
    early.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="has been changed, by an optimizer's step perhaps, before the loss's back"):
        late.backward()


@pytest.mark.parametrize("lora", [mt.LoRA(rank=2, dropout=0.1), mt.LoRA(rank=2, dora=True)], ids=["dropout", "dora"])
def test_plain_autograd_is_taken_only_where_it_has_to_be(tiny, lora):
    model = _model(tiny, lora).train()
    assert model.network.needs_composed and model.eval().network.needs_composed == lora.dora
    with model.adapter_disabled():
        assert not model.network.needs_composed


def test_under_plain_autograd_a_policy_other_than_keep_holds_little(tiny):
    held = {}
    for memory in ("keep", "pointwise", "full"):
        model, found = _model(tiny, KINDS["dora"], memory=memory), {}

        def pack(tensor, found=found):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        batch = _batch()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            assert model.hidden(batch).requires_grad
        held[memory] = sum(found.values())
    assert held["full"] == held["pointwise"] < held["keep"] / 2


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("prompts", [[[5, 6, 7]], [[5, 6, 7], [9, 8]]], ids=["one", "several"])
def test_generation_is_that_of_the_logits(tmp_path, lora, prompts, quant):
    make("llama-biases", tmp_path)
    model = _model(tmp_path, lora, quant=quant)
    for prompt, new in zip(prompts, model.generate(prompts, 12), strict=True):
        whole = torch.tensor([*prompt, *new])
        best = model.logits(whole).argmax(-1)[len(prompt) - 1 : -1]
        assert best.tolist() == new


def test_bf16_at_sizes_that_a_cpu_lays_out_follows_fp32(tiny):
    """The product with margins, in passes without a graph, and plain autograd agree with fp32."""
    exact = _model(tiny, mt.LoRA(rank=4, dora=True))
    model = _model(tiny, mt.LoRA(rank=4, dora=True), dtype="bfloat16")
    batch = mt.data.pack([[i % 500 for i in range(3, 303)]], 300)[0]
    expected = exact.loss(batch).detach()
    assert relative(model.loss(batch).detach(), expected) < 5e-3
    with torch.no_grad():
        assert relative(model.loss(batch), expected) < 5e-3


@pytest.mark.parametrize("variant", ["llama-tied", "qwen2"])
def test_a_merged_model_has_the_adapters_logits(tmp_path, lora, variant):
    make(variant, tmp_path / "base")
    model = _model(tmp_path / "base", lora)
    model.save_merged(tmp_path / "merged")
    expected = model.logits(IDS).detach()
    assert relative(mt.load(tmp_path / "merged", device="cpu", dtype="float32").logits(IDS), expected) < 1e-5
    assert relative(logits_of(tmp_path / "merged", IDS), expected) < 1e-5
    said = json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
    assert said == (variant == "llama-tied" and "lm_head" not in lora.targets)


def test_an_adapter_comes_back_as_it_was(tmp_path, lora):
    make("llama-tied", tmp_path / "base")
    model = _model(tmp_path / "base", lora)
    model.save_adapter(tmp_path / "adapter")
    again = mt.load(tmp_path / "base", adapter=tmp_path / "adapter", device="cpu", dtype="float32")
    assert torch.equal(again.logits(IDS), model.logits(IDS)) and again.lora.dora == lora.dora
    run = mt.train(again, [_batch()], lr=1e-2, max_steps=4)
    assert run.losses[-1] < run.losses[0]


def _with_head(folder, value):
    """Put `value` beside the adapter as PEFT puts the base's head there."""
    tensors = load_file(folder / "adapter_model.safetensors") | {"base_model.model.lm_head.base_layer.weight": value}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "minitune.json").unlink(missing_ok=True)


def test_a_head_beside_the_adapter_must_be_the_bases(tmp_path):
    make("llama-2-gqa", tmp_path / "base")
    _model(tmp_path / "base", KINDS["head"]).save_adapter(tmp_path / "adapter")
    head = load_file(tmp_path / "base" / "model.safetensors")["lm_head.weight"]
    _with_head(tmp_path / "adapter", head)
    mt.load(tmp_path / "base", adapter=tmp_path / "adapter", device="cpu")
    _with_head(tmp_path / "adapter", head * 2)
    with pytest.raises(mt.InputError, match=r"its lm_head\.weight is not the base's"):
        mt.load(tmp_path / "base", adapter=tmp_path / "adapter", device="cpu")


@pytest.mark.parametrize(("change", "message"), [
    ({"lora_magnitude_vector": None}, "lacks its lora_magnitude_vector"),
    ({"lora_magnitude_vector": torch.ones(3)}, r"its lora_magnitude_vector is \[3\], and B is \[48, 4\]"),
    ({"lora_magnitude_vector": torch.ones(48, 1)}, "must be a float vector"),
    ({"lora_A.weight": None, "lora_B.weight": None}, "has lora_magnitude_vector, but not the other half"),
], ids=["lacking", "length", "matrix", "alone"])
def test_lengths_that_do_not_fit_are_named(tmp_path, change, message):
    make("llama-2-gqa", tmp_path / "base")
    _model(tmp_path / "base", KINDS["dora"]).save_adapter(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, value in change.items():
        full = f"base_model.model.model.layers.0.self_attn.q_proj.{name}"
        tensors.pop(full)
        if value is not None:
            tensors[full] = value
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "minitune.json").unlink()
    with pytest.raises(mt.InputError, match=message):
        mt.load(tmp_path / "base", adapter=tmp_path / "adapter", device="cpu")


def test_the_slower_path_is_announced(tmp_path):
    make("llama-2-gqa", tmp_path)
    with pytest.warns(UserWarning, match="plain autograd"):
        mt.load(tmp_path, lora=KINDS["dora"], device="cpu").loss(_batch())


@pytest.mark.parametrize("memory", ["keep", "pointwise", "full"])
def test_a_pass_of_the_base_between_forward_and_backward_changes_no_gradient(tmp_path, lora, memory):
    """As a reference model's pass does in preference training."""
    make("llama-2-gqa", tmp_path)
    model = _model(tmp_path, lora, memory=memory)
    parameters = model.trainable_parameters()
    expected = torch.autograd.grad(model.loss(_batch()), parameters)
    loss = model.loss(_batch())
    with model.adapter_disabled(), torch.no_grad():
        model.loss(_batch())
    for gradient, truth in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        assert torch.equal(gradient, truth)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_stream_keeps_its_adapter_whatever_runs_between_two_pieces(tmp_path, lora, backend):
    make("llama-2-gqa", tmp_path)
    model = _model(tmp_path, lora)
    with backends.use(backend) if backend else contextlib.nullcontext():
        adapted = model.generate([5, 6, 7], 12)
        with model.adapter_disabled():
            base = model.generate([5, 6, 7], 12)
            of_base = model.stream([5, 6, 7], 12)
        of_adapter = model.stream([5, 6, 7], 12)
        found = [], []
        for _ in range(12):
            for ids, stream in zip(found, (of_base, of_adapter), strict=True):
                ids += [token for token in [next(stream, None)] if token is not None]
    assert base != adapted and found == (base, adapted)
