"""tuned: the fastest way at the nearest measured shape, and one clear error for a table that is none."""

import json

import pytest
import torch

import minitune as mt
from minitune.ops import lora_matmul, tuned

GPU, BF16 = torch.device("cuda", 0), torch.bfloat16


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    monkeypatch.setenv("MINITUNE_TUNED", str(path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    tuned.forget()
    yield path
    tuned.forget()


def _write(path, ops):
    path.write_text(json.dumps({"ops": ops}))


def test_the_nearest_measured_shape_counts(table):
    _write(table, {"attention bfloat16": [{"shape": [32, 8, 128, 2048], "ms": {"triton": 1.0, "reference": 1.5}},
                                 {"shape": [32, 8, 128, 16384], "ms": {"triton": 9.0, "reference": 8.0}}]})
    assert tuned.way("attention", (32, 8, 128, 3000), GPU, BF16) == "triton"
    assert tuned.way("attention", (32, 8, 128, 9000), GPU, BF16) == "reference"
    assert tuned.way("attention", (32, 8, 64, 3000), GPU, BF16) is None
    assert tuned.way("attention", (32, 8, 128, 3000), GPU, torch.float32) is None
    assert tuned.ways("attention", (32, 8), GPU, BF16) == {"triton", "reference"}


def test_a_way_that_cannot_be_taken_leaves_the_next_one(table):
    _write(table, {"attention bfloat16": [
        {"shape": [8, 8, 64, 2048], "ms": {"cudnn": 1.0, "triton": 2.0, "reference": 3}},
        {"shape": [8, 8, 64, 4096], "ms": {"cudnn": 1.0}}]})
    assert tuned.way("attention", (8, 8, 64, 4096), GPU, BF16) == "cudnn"
    assert tuned.way("attention", (8, 8, 64, 4096), GPU, BF16, without=("cudnn",)) == "triton"
    assert tuned.way("attention", (8, 8, 64, 4000), GPU, BF16) == "triton"      # there it would make a plan first
    with tuned.forced(attention="cudnn"):
        assert tuned.way("attention", (8, 8, 64, 4000), GPU, BF16) == "cudnn"
        assert tuned.way("attention", (8, 8, 64, 4000), GPU, BF16, without=("cudnn",)) is None


def test_without_a_table_or_a_gpu_nothing_is_known(table):
    assert tuned.way("attention", (32, 8, 128, 2048), GPU, BF16) is None
    assert tuned.way("attention", (32, 8, 128, 2048), torch.device("cpu"), BF16) is None
    assert tuned.ways("attention", (32,), torch.device("cpu"), BF16) == set()


@pytest.mark.parametrize("text", ["", "[]", '{"ops": 3}', '{"ops": {"a": [{"shape": [0], "ms": {"x": 1}}]}}',
                                  '{"ops": {"a": [{"shape": [1], "ms": {"x": -1}}]}}',
                                  '{"ops": {"a": [{"shape": [1], "ms": {"x": NaN}}]}}'])
def test_a_broken_table_is_named(table, text):
    table.write_text(text)
    with pytest.raises(mt.InputError, match=r"tuned.json: is no table of `minitune tune`"):
        tuned.way("a", (1,), GPU, BF16)


def test_tables_of_different_machines_lie_apart(monkeypatch, tmp_path):
    monkeypatch.delenv("MINITUNE_TUNED", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one, other = tuned.place("NVIDIA H100 80GB HBM3"), tuned.place("NVIDIA H200")
    assert one != other and one.parent == tmp_path / "minitune"


def test_a_weight_in_nf4_goes_by_what_was_measured_in_nf4(table, monkeypatch):
    shape = 64, 32, 8, 512
    _write(table, {f"lora_matmul forward bfloat16{kind}": [{"shape": shape, "ms": {"augmented": ms, "triton": 2}}]
                   for kind, ms in (("", 1), (" nf4", 3))})
    assert tuned.way("lora_matmul forward", shape, GPU, BF16) == "augmented"
    assert tuned.way("lora_matmul forward", shape, GPU, BF16, quantized=True) == "triton"
    assert tuned.way("lora_matmul input", shape, GPU, BF16, quantized=True) is None
    like = torch.empty(0, dtype=BF16, device="meta")
    ways = tuned.ways
    monkeypatch.setattr(tuned, "ways", lambda op, start, device, *rest: ways(op, start, GPU, *rest))
    assert lora_matmul.wants_margins(64, 32, 8, like) and not lora_matmul.wants_margins(64, 32, 8, like, True)
