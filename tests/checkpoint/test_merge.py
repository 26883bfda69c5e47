"""Merging: the written folder has the adapter's logits, and untouched tensors are the file's bits."""

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")

import minitune as mt
from minitune.checkpoint import writer
from minitune.ops import nf4
from tests.oracles import logits_of, make
from tests.tolerance import relative

IDS = torch.arange(3, 40)


def _adapted(folder, target, **settings):
    """The base with an adapter of random weights on some of its linears, saved to `target`."""
    model = mt.load(folder, lora=mt.LoRA(rank=3, targets=("q_proj", "down_proj")), device="cpu", dtype="float32",
                    **settings)
    for adapter in model.network.adapters().values():
        adapter.B.data.normal_(0, 0.2)
    model.save_adapter(target)
    return model


@pytest.mark.parametrize("variant", ["llama-tied", "qwen2", "mistral"])
def test_a_merged_model_has_the_adapters_logits(tmp_path, variant):
    make(variant, tmp_path / "base")
    model = _adapted(tmp_path / "base", tmp_path / "adapter")
    model.save_merged(tmp_path / "merged")
    expected = model.logits(IDS).detach()
    assert relative(mt.load(tmp_path / "merged", device="cpu", dtype="float32").logits(IDS), expected) < 1e-5
    assert relative(logits_of(tmp_path / "merged", IDS), expected) < 1e-5
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        touched = name.endswith(("q_proj.weight", "down_proj.weight"))
        assert torch.equal(value, after[name]) != touched and value.dtype == after[name].dtype


@pytest.mark.parametrize("onto", ["loaded", "original"])
def test_an_adapter_trained_in_4_bits_merges_onto_either_base(tmp_path, onto):
    make("llama-2-gqa", tmp_path / "base")
    model = _adapted(tmp_path / "base", tmp_path / "adapter", quant="nf4-dq")
    model.save_merged(tmp_path / "merged", onto)
    merged = mt.load(tmp_path / "merged", device="cpu", dtype="float32")
    original = mt.load(tmp_path / "base", adapter=tmp_path / "adapter", device="cpu", dtype="float32")
    truth = model if onto == "loaded" else original
    assert relative(merged.logits(IDS), truth.logits(IDS).detach()) < 1e-5
    base, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    name = "model.layers.0.self_attn.k_proj.weight"       # in 4 bits, but not adapted
    expected = nf4.quantize(base[name]).dequantize() if onto == "loaded" else base[name]
    assert torch.equal(after[name], expected)


def test_trained_weights_are_written_and_their_siblings_are_the_files(tmp_path):
    make("llama-biases", tmp_path / "base")
    model = mt.load(tmp_path / "base", train=["*.q_proj.weight", "model.norm.weight"], device="cpu", dtype="bfloat16")
    for parameter in model.trainable_parameters():
        parameter.data += 0.25
    model.save_merged(tmp_path / "merged")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    for name, value in before.items():
        trained = name.endswith("q_proj.weight") or name == "model.norm.weight"
        assert torch.equal(value, after[name]) != trained, name
        assert after[name].dtype == value.dtype


def test_shards_merge_and_load(tmp_path):
    theirs = make("llama-2-gqa", tmp_path / "base")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    model = _adapted(tmp_path / "sharded", tmp_path / "adapter")
    model.save_merged(tmp_path / "merged")
    merged = mt.load(tmp_path / "merged", device="cpu", dtype="float32")
    assert relative(merged.logits(IDS), model.logits(IDS).detach()) < 1e-5


def test_a_failing_disk_leaves_no_half_model(tmp_path, monkeypatch):
    make("llama-2-gqa", tmp_path / "base")
    model = _adapted(tmp_path / "base", tmp_path / "adapter")
    real, calls = writer._write_tensor, []

    def fail(file, tensor):
        calls.append(1)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        real(file, tensor)

    monkeypatch.setattr(writer, "_write_tensor", fail)
    with pytest.raises(mt.InputError, match="No space left"):
        model.save_merged(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_overflows_is_named(tmp_path):
    make("llama-2-gqa", tmp_path / "base", torch.float16)
    model = _adapted(tmp_path / "base", tmp_path / "adapter")
    model.network.adapters()["model.layers.1.mlp.down_proj"].B.data.fill_(1e6)
    with pytest.raises(mt.InputError, match=r"model.layers.1.mlp.down_proj.weight with its adapter"):
        model.save_merged(tmp_path / "merged")


def test_misuse(tmp_path):
    make("llama-2-gqa", tmp_path / "base")
    model = _adapted(tmp_path / "base", tmp_path / "adapter")
    with pytest.raises(mt.InputError, match="onto is 'elsewhere'"):
        model.save_merged(tmp_path / "merged", "elsewhere")
    with pytest.raises(mt.InputError, match="folder of the base itself"):
        model.save_merged(tmp_path / "base")
    assert not (tmp_path / "merged").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(mt.InputError, match="is a file"):
        model.save_merged(tmp_path / "file")
    with pytest.raises(mt.InputError, match="save_merged"):
        mt.load(tmp_path / "base", quant="nf4", device="cpu").save(tmp_path / "merged")
