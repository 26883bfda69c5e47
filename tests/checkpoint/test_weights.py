"""Loading and saving a whole model's weights: one message for all faults, tolerated extras, shards, atomic files."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitune.checkpoint.hf_config import read_config, write_config
from minitune.checkpoint.reader import INDEX, SINGLE, Checkpoint
from minitune.checkpoint.weights import EMBEDDING, HEAD_WEIGHT, load_weights, save_weights
from minitune.errors import InputError

INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"


def network() -> tuple[dict[str, Tensor], Tensor]:
    """A tiny network's views: q, k, v as row slices of one fused weight whose rows are longer than the view."""
    fused = torch.zeros(8, 6 + 2)
    names = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]
    views = dict(zip(names, fused[:, :6].split([4, 2, 2]), strict=True))
    return {EMBEDDING: torch.zeros(10, 6), **views, "model.norm.weight": torch.zeros(6)}, fused


def values(**more: Tensor) -> dict[str, Tensor]:
    return {name: torch.randn(view.shape).bfloat16() for name, view in network()[0].items()} | more


def test_loads_into_views(tmp_path: Path) -> None:
    source = values(**{INV_FREQ: torch.ones(3)})
    save_file(source, tmp_path / SINGLE)
    views, fused = network()
    assert load_weights(Checkpoint.open(tmp_path), views, tied_head=False) == [INV_FREQ]
    for name, view in views.items():
        assert torch.equal(view, source[name].float())
    assert fused[:, 6:].count_nonzero() == 0


def test_all_faults_in_one_message(tmp_path: Path) -> None:
    source = values(**{"model.layers.7.mlp.up_proj.weight": torch.ones(2), INV_FREQ: torch.ones(3)})
    del source["model.norm.weight"]
    source[EMBEDDING] = torch.ones(11, 6)
    source["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(2, 6, dtype=torch.uint8)
    save_file(source, tmp_path / SINGLE)
    views, fused = network()
    with pytest.raises(InputError) as error:
        load_weights(Checkpoint.open(tmp_path), views, tied_head=False)
    message = str(error.value)
    assert "4 tensors do not fit" in message and str(tmp_path) in message
    assert "the weights have 8 layers, config.json says 1 (num_hidden_layers)" in message.splitlines()[0]
    assert "model.norm.weight is missing" in message
    assert f"{EMBEDDING} has shape [11, 6], but config.json needs [10, 6]" in message
    assert "'model.layers.7.mlp.up_proj.weight' is not part of this model" in message
    assert "k_proj.weight is torch.uint8" in message
    assert "inv_freq" not in message
    assert fused.count_nonzero() == 0  # nothing was read


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_what_to_do_is_said_first(fault: str, tmp_path: Path) -> None:
    source = values()
    if fault == "missing":
        del source["model.norm.weight"]
    else:
        source["model.norm.weight"] = torch.ones(7)
    save_file(source, tmp_path / SINGLE)
    with pytest.raises(InputError) as error:
        load_weights(Checkpoint.open(tmp_path), network()[0], tied_head=False)
    assert str(error.value).splitlines()[0] == (
        f"{tmp_path}: 1 tensors do not fit; config.json and the weights are not of one model, or not whole: fetch both "
        "again, from one place:")


def test_long_lists_are_cut(tmp_path: Path) -> None:
    save_file(values(**{f"model.x{i}": torch.ones(1) for i in range(50)}), tmp_path / SINGLE)
    with pytest.raises(InputError, match=r"50 tensors do not fit") as error:
        load_weights(Checkpoint.open(tmp_path), network()[0], tied_head=False)
    assert str(error.value).count("is not part") == 20 and "… and 30 more" in str(error.value)


def test_tied_head(tmp_path: Path) -> None:
    source = values()
    save_file({**source, HEAD_WEIGHT: source[EMBEDDING].clone()}, tmp_path / SINGLE)
    assert load_weights(Checkpoint.open(tmp_path), network()[0], tied_head=True) == [HEAD_WEIGHT]
    with pytest.raises(InputError, match=r"'lm_head\.weight' is not part"):
        load_weights(Checkpoint.open(tmp_path), network()[0], tied_head=False)
    changed = source[EMBEDDING].clone()
    changed[9, 5] += 1
    save_file({**source, HEAD_WEIGHT: changed}, tmp_path / SINGLE)
    with pytest.raises(InputError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_weights(Checkpoint.open(tmp_path), network()[0], tied_head=True)


def test_untied_head_missing(tmp_path: Path) -> None:
    save_file(values(), tmp_path / SINGLE)
    with pytest.raises(InputError, match=r"lm_head\.weight is missing.*tie_word_embeddings"):
        load_weights(Checkpoint.open(tmp_path), {**network()[0], HEAD_WEIGHT: torch.zeros(10, 6)}, tied_head=False)


def test_bare_transformer_is_explained(tmp_path: Path) -> None:
    save_file({name.removeprefix("model."): value for name, value in values().items()}, tmp_path / SINGLE)
    with pytest.raises(InputError, match=r"lack the prefix 'model\.'"):
        load_weights(Checkpoint.open(tmp_path), network()[0], tied_head=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_is_read_by_safetensors(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: value.to(dtype) for name, value in values().items()}
    pitched = torch.randn(5, 9).to(dtype)
    tensors |= {"odd": torch.ones(3, dtype=torch.uint8), "view": pitched[1:4, 2:7], "none": torch.zeros(0, 2)}
    save_weights(tmp_path, tensors)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    found = load_file(tmp_path / SINGLE)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert b'"format":"pt"' in (tmp_path / SINGLE).read_bytes()[:200]


def test_shards_and_replacement(tmp_path: Path) -> None:
    tensors = {f"model.w{i}": torch.randn(100) for i in range(5)}
    save_weights(tmp_path, {"old": torch.ones(2)})
    save_weights(tmp_path, tensors, shard_bytes=900)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 2000 and index["weight_map"].keys() == tensors.keys()
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert not (tmp_path / SINGLE).exists()
    out = {name: torch.zeros(100) for name in tensors}
    assert load_weights(Checkpoint.open(tmp_path), out, tied_head=False) == []
    assert all(torch.equal(out[name], tensors[name]) for name in tensors)
    save_weights(tmp_path, tensors, shard_bytes=400)
    assert len(list(tmp_path.iterdir())) == 6
    save_weights(tmp_path, {"model.w0": torch.ones(2)})
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]


def test_failed_save_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_weights(tmp_path, {"old": torch.ones(2)})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        save_weights(tmp_path, {"a": torch.zeros(10), "b": torch.zeros(10)}, shard_bytes=40)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    assert Checkpoint.open(tmp_path).names() == ["old"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_ours_and_we_read_theirs(tied: bool, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="4KB")
    state = {name: value for name, value in model.state_dict().items() if not (tied and name == HEAD_WEIGHT)}
    out = {name: torch.zeros_like(value) for name, value in state.items()}
    assert load_weights(Checkpoint.open(tmp_path / "theirs"), out, tied) == []
    assert all(torch.equal(out[name], state[name]) for name in state)
    save_weights(tmp_path / "ours", out, shard_bytes=4000)
    write_config(tmp_path / "ours", read_config(tmp_path / "theirs"))
    ids = torch.randint(32, (1, 7))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(again(ids).logits, model(ids).logits)
