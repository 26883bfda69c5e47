"""Weights in 4 bits, end to end: losses and gradients of dense weights with the decoded values, little memory."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

import minitune as mt
from minitune.model.llama import Llama
from minitune.ops import backends, nf4
from tests.batches import documents, packed
from tests.oracles import make
from tests.tolerance import relative

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROOT = Path(__file__).parents[1]


def _batch():
    return packed(documents())


def _decoded(folder, target, double_quant):
    """The checkpoint with its linears replaced by what their 4-bit form decodes to."""
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if name.endswith(tuple(f"{linear}.weight" for linear in LINEARS)):
            tensors[name] = nf4.quantize(value, double_quant).dequantize()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """(variant, quant) -> the folder of what its 4-bit form decodes to; without quant of the checkpoint itself."""
    place, made = tmp_path_factory.mktemp("folders"), {}

    def folder(variant, quant=None):
        if (variant, quant) not in made:
            made[variant, quant] = target = place / f"{variant} {quant}"
            if quant is None:
                make(variant, target)
            else:
                _decoded(folder(variant), target, quant == "nf4-dq")
        return made[variant, quant]

    return folder


def _gradients(model, batch):
    for adapter in model.network.adapters().values():
        adapter.B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(adapter.path)))
    torch.manual_seed(3)       # dropout
    loss = model.loss(batch)
    parameters = model.trainable_parameters()
    return loss.detach(), torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("memory", ["keep", "pointwise", "full", "offload"])
@pytest.mark.parametrize("path", [{}, {"dropout": 0.2}, {"dora": True}, {"dora": True, "dropout": 0.2}],
                         ids=["halves", "dropout", "dora", "dora-dropout"])
@pytest.mark.parametrize("variant", ["llama-2-gqa", "llama-biases", "qwen3"])
@pytest.mark.parametrize("quant", ["nf4", "nf4-dq"])
def test_gradients_are_those_of_the_decoded_weights(folder_of, quant, variant, path, memory):
    lora = mt.LoRA(rank=4, **path)
    settings = {"device": "cpu", "dtype": "float32", "lora": lora, "memory": memory}
    ours, plain = mt.load(folder_of(variant), quant=quant, **settings), mt.load(folder_of(variant, quant), **settings)
    (loss, gradients), (expected, truths) = _gradients(ours, _batch()), _gradients(plain, _batch())
    assert torch.equal(loss, expected)
    for gradient, truth in zip(gradients, truths, strict=True):
        assert relative(gradient, truth) < 1e-6


def test_what_is_quantised_and_what_is_not(tmp_path):
    make("llama-2-gqa", tmp_path)
    model = mt.load(tmp_path, quant="nf4-dq", device="cpu")
    names = model.network.nf4_shapes()
    assert len(names) == 3 * len(LINEARS) and all(name.endswith("_proj.weight") for name in names)
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(model.network.hf_weights())
    assert not set(names) & set(model.network.hf_weights())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("prompts", [[[5, 6, 7]], [[5, 6, 7], [9, 8]]], ids=["one", "several"])
def test_generation_is_that_of_the_decoded_weights(tmp_path, prompts, dtype):
    make("llama-2-gqa", tmp_path / "base", torch.bfloat16)
    dense = _decoded(tmp_path / "base", tmp_path / "dense", True)
    answers = [mt.load(folder, quant=quant, device="cpu", dtype=dtype).generate(prompts, 20)
               for folder, quant in ((tmp_path / "base", "nf4-dq"), (dense, None))]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_one_sequence_has_its_weights_decoded_only_where_nothing_reads_them_packed(tmp_path, backend):
    if backends.missing(backend, torch.device("cpu")):
        pytest.skip(backends.missing(backend, torch.device("cpu")))
    make("llama-2-gqa", tmp_path)
    network = mt.load(tmp_path, quant="nf4", device="cpu").network
    with backends.use(backend), network.weights_at_hand(1):
        with network.weights_at_hand(1):        # another one, which ends sooner
            pass
        assert {projection.decoded is None for projection in network.projections()} == {backend == "native"}
    assert all(projection.decoded is None for projection in network.projections())


def test_training_lowers_the_loss_and_the_adapter_goes_on(tmp_path):
    make("llama-2-gqa", tmp_path / "base")
    model = mt.load(tmp_path / "base", quant="nf4-dq", lora=mt.LoRA(rank=4), device="cpu")
    run = mt.train(model, [_batch()], lr=2e-2, max_steps=15)
    assert run.losses[-1] < run.losses[0] - 0.3
    model.save_adapter(tmp_path / "adapter")
    again = mt.load(tmp_path / "base", quant="nf4-dq", adapter=tmp_path / "adapter", device="cpu")
    assert torch.equal(again.loss(_batch()), model.loss(_batch()))


@pytest.mark.parametrize("train", ["full", "last:1", "*.q_proj.weight", ["*.q_proj.weight"], ["*.bias"]], ids=str)
def test_weights_in_4_bits_cannot_be_trained(tmp_path, train):
    make("qwen2", tmp_path)
    with pytest.raises(mt.InputError, match=r"linears in 4 bits cannot be trained"):
        mt.load(tmp_path, quant="nf4", train=train, device="cpu")


def test_norms_train_beside_weights_in_4_bits(tmp_path):
    make("llama-2-gqa", tmp_path / "base")
    dense = _decoded(tmp_path / "base", tmp_path / "dense", False)
    pair = [mt.load(folder, quant=quant, train="norms", device="cpu", dtype="float32")
            for folder, quant in ((tmp_path / "base", "nf4"), (dense, None))]
    gradients = [torch.autograd.grad(model.loss(_batch()), model.trainable_parameters()) for model in pair]
    for ours, truth in zip(*gradients, strict=True):
        assert relative(ours, truth) < 1e-6


def test_bad_values_of_quant_and_weights_are_named(tmp_path):
    make("llama-2-gqa", tmp_path)
    with pytest.raises(mt.InputError, match="quant is 'int8'; say nf4, nf4-dq"):
        mt.load(tmp_path, quant="int8")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(mt.InputError, match=r"model.layers.1.mlp.up_proj.weight.* 1 NaN"):
        mt.load(tmp_path, quant="nf4", device="cpu")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(mt.InputError, match=r"model.layers.1.mlp.up_proj.weight is missing"):
        mt.load(tmp_path, quant="nf4", device="cpu")


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_checkpoint_quantised_by_bitsandbytes_loads_as_it_is(tmp_path, double_quant):
    bnb = pytest.importorskip("bitsandbytes.functional")
    config = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32",
                                      bnb_4bit_use_double_quant=double_quant)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization,
                                                  dtype=torch.float32, device_map="cpu")
    theirs.save_pretrained(tmp_path / "quantised")
    ours = mt.load(tmp_path / "quantised", device="cpu", dtype="float32", lora=mt.LoRA(rank=4))
    part = ours.network.blocks()[1].mlp.down.fused.parts[0]
    module = theirs.model.layers[1].mlp.down_proj.weight
    assert torch.equal(part.packed, module.data.view(-1)) and part.nested == double_quant
    assert torch.equal(part.absmax, module.quant_state.absmax)
    # Their 4-bit product on a CPU works in bf16, so the truth is a dense model of the values that they decode.
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    for name, linear in theirs.named_modules():
        if hasattr(getattr(linear, "weight", None), "quant_state"):
            dense.get_submodule(name).weight.data = bnb.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    ids = torch.arange(3, 40)
    with torch.no_grad():
        assert relative(ours.logits(ids), dense(ids[None]).logits[0]) < 1e-5
    ours.loss(_batch()).backward()
    assert all(p.grad is not None for p in ours.trainable_parameters())


def _quantised(folder, source, skip=None, dtype=torch.bfloat16):
    """A checkpoint as bitsandbytes' users publish it."""
    config = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(source)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
                                      bnb_4bit_use_double_quant=True, llm_int8_skip_modules=skip)
    AutoModelForCausalLM.from_pretrained(source, quantization_config=quantization, dtype=dtype,
                                         device_map="cpu").save_pretrained(folder)


def test_linears_that_a_checkpoint_left_in_16_bits_stay_so(tmp_path):
    pytest.importorskip("bitsandbytes")
    _quantised(tmp_path / "4bit", tmp_path / "base", skip=["q_proj", "o_proj", "lm_head"])
    model = mt.load(tmp_path / "4bit", device="cpu", dtype="float32", lora=mt.LoRA(rank=2))
    layer = model.network.blocks()[0]
    assert [isinstance(part, torch.Tensor) for part in layer.attention.qkv.fused.parts] == [True, False, False]
    assert layer.attention.o.fused is None and layer.attention.o.buffer is None
    names = model.network.nf4_shapes()
    assert not any("q_proj" in name or "o_proj" in name for name in names) and len(names) == 2 * 5
    model.loss(_batch()).backward()
    original = load_file(tmp_path / "base" / "model.safetensors")
    model.save_merged(tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(value.dtype == torch.bfloat16 for value in merged.values()) and merged.keys() == original.keys()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(merged[name], original[name])      # B is zero: what was merged into is the file's


def test_a_prequantised_base_has_no_original_to_merge_into(tmp_path):
    pytest.importorskip("bitsandbytes")
    _quantised(tmp_path / "4bit", tmp_path / "base")
    model = mt.load(tmp_path / "4bit", device="cpu", dtype="float32", lora=mt.LoRA(rank=2))
    with pytest.raises(mt.InputError, match="has no 16-bit original"):
        model.save_merged(tmp_path / "merged", "original")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(mt.InputError, match="is quantised already"):
        mt.load(tmp_path / "4bit", quant="nf4", device="cpu")


def test_a_config_that_says_quantised_over_plain_weights_is_refused(tmp_path):
    make("llama-2-gqa", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(mt.InputError, match="no tensor is quantised"):
        mt.load(tmp_path, device="cpu")


MEMORY = """
import sys, threading, torch, minitune as mt
def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"): return int(line.split()[1]) * 1024
mt.nf4.quantize(torch.ones(64, 64).bfloat16()).dequantize()
before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.001): peak = max(peak, anonymous())
thread = threading.Thread(target=watch); thread.start()
model = mt.load(sys.argv[1], quant="nf4-dq", device="cpu", dtype="bfloat16")
done.set(); thread.join()
result = sum(t.numel() * t.element_size() for t in model.network.hf_weights().values())
result += sum(part.nbytes for p in model.network.projections() for part in p.fused.parts)
print(max(peak, anonymous()) - before, result)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 336 MB in four layers."""
    folder = tmp_path_factory.mktemp("large")
    network = Llama(mt.ModelConfig(vocab_size=1000, d_model=1024, n_layers=4, n_heads=8, n_kv_heads=8, head_dim=128,
                                   d_ff=12288), dtype=torch.bfloat16)
    for weight in network.hf_weights().values():
        weight.detach().uniform_(-0.02, 0.02)
    mt.Model(network, None).save(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_host_memory_of_a_load(large, backend):
    """At most the result, the largest tensor and 64 MiB: the 16-bit model is never there as a whole."""
    if reason := backends.missing(backend, torch.device("cpu")):
        pytest.skip(reason)
    told = subprocess.run([sys.executable, "-c", MEMORY, str(large)], check=True, capture_output=True, text=True,
                          cwd=ROOT, env={**os.environ, "MINITUNE_BACKEND": backend})
    peak, result = map(int, told.stdout.split())
    largest, whole = 1024 * 12288 * 2, 4 * (3 * 1024 * 12288 + 4 * 1024 * 1024) * 2
    assert result < 0.35 * whole
    assert peak <= result + largest + (64 << 20), f"{peak >> 20} MiB for a result of {result >> 20} MiB"


def test_a_copy_of_a_model_trains_alone(tmp_path):
    make("llama-2-gqa", tmp_path)
    model = mt.load(tmp_path, quant="nf4", lora=mt.LoRA(rank=2), device="cpu", dtype="float32")
    other = copy.deepcopy(model)
    assert torch.equal(other.loss(_batch()), model.loss(_batch()))
    assert other.network.blocks()[0].mlp.down.fused.buffer is not model.network.blocks()[0].mlp.down.fused.buffer


def test_to_moves_the_quantised_weights(tmp_path):
    make("llama-2-gqa", tmp_path)
    model = mt.load(tmp_path, quant="nf4", device="cpu").to("meta")
    assert all(p.fused.device.type == "meta" for p in model.network.projections())
