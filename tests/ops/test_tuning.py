"""tuning: every way is timed at a model's shapes, and what does not run is no choice."""

import pytest
import torch

from minitune.ops import tuned, tuning

CPU = torch.device("cpu")


def test_every_way_that_is_there_is_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    products = {"qkv": (24, 16, 4), "same": (24, 16, 4)}
    found = tuning.measure(products, ("qkv",), (4, 2, 8), 32, 16, torch.float32, CPU)
    assert set(found["rms_norm s float32"]) == {(16, 4, 32)}
    assert set(found) == {f"{op} float32" for op in (
        "rms_norm s", "attention forward", "attention backward", "lora_matmul forward", "lora_matmul input",
        "lora_matmul adapters")} | {
        "lora_matmul forward float32 nf4", "lora_matmul input float32 nf4"}
    assert {"reference", "augmented"} <= set(found["lora_matmul forward float32"][24, 16, 4, 32])
    assert all(ms > 0 for shapes in found.values() for ways in shapes.values() for ms in ways.values())
    path = tmp_path / "cache" / "tuned.json"
    tuned.write(path, "a GPU", found)
    assert tuned.read(path) == found
    tuned.write(path, "a GPU", {"attention forward float32": {(8, 8, 8, 16): {"reference": 1.0}}})
    assert tuned.read(path)["attention forward float32"].keys() == {(4, 2, 8, 16), (8, 8, 8, 16)}


def test_a_way_that_does_not_run_is_left_out(monkeypatch):
    def fails():
        raise RuntimeError("out of shared memory")

    with pytest.warns(UserWarning, match="augmented is left out: RuntimeError: out of shared memory"):
        found = tuning.in_turns("lora_matmul", "forward", {"reference": _right, "augmented": fails}, CPU)
    assert set(found) == {"reference"}


def _right():
    return torch.arange(1.0, 5.0), None


@pytest.mark.parametrize("wrong", [1.03, float("nan")])
def test_a_way_that_gives_something_else_is_left_out(monkeypatch, wrong):
    runs = {"reference": _right, "triton": lambda: (_right()[0] * wrong, None),
            "augmented": lambda: (_right()[0] * 1.004, None)}
    monkeypatch.setattr(tuning.backends, "missing", lambda *_: None)
    with pytest.warns(UserWarning, match="triton is left out: ValueError: its result is .* off the first way's"):
        found = tuning.in_turns("lora_matmul", "forward", runs, CPU)
    assert set(found) == {"reference", "augmented"}
