"""memory: the policy that `auto` takes, by sizes and free memory."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.fake_gpu.memory import SIZES
from minitune.config import ModelConfig
from minitune.model import memory
from minitune.model.llama import Llama

SEVEN_B = ModelConfig(vocab_size=32_000, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128,
                      d_ff=11_008)
GPU, CPU, BF16 = torch.device("cuda"), torch.device("cpu"), torch.bfloat16
WEIGHTS = 13.6e9
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def _choose(monkeypatch, tokens, free, host=200e9, device=GPU, **options):
    monkeypatch.setattr(memory, "free_bytes", lambda place: int(host if place.type == "cpu" else free))
    return memory.choose_policy(SEVEN_B, tokens, "auto", BF16, device, **options)


@pytest.mark.parametrize(("card", "tokens", "policy"), [
    (150e9, 16_384, "keep"), (84.5e9, 16_384, "pointwise"), (84.5e9, 8_192, "keep"), (84.5e9, 32_768, "full"),
    (25e9, 2_048, "keep"), (25e9, 4_096, "full"), (14.2e9, 2_048, "offload")])
def test_a_7b_model_on_a_card_of_so_many_bytes(monkeypatch, card, tokens, policy):
    assert _choose(monkeypatch, tokens, card - WEIGHTS) == policy


def test_a_step_takes_no_more_than_is_reserved_for_it():
    """By the bytes that were counted (benchmarks/fake_gpu/memory.py)."""
    newest = max(RESULTS.glob("*-memory*.json"), key=lambda path: json.loads(path.read_text())["when"])
    rows = [row for row in json.loads(newest.read_text())["rows"]
            if (row["model"], row["quant"], row["train"]) == ("Llama-2-7B", None, None)]
    assert {row["memory"] for row in rows} == {"keep", "pointwise", "full"}
    for row in rows:
        tokens = sum(row["lengths"])
        kept, taken = memory.kept_bytes(SEVEN_B, tokens, row["memory"], 2), row["peak_bytes"] - row["between_bytes"]
        assert kept < taken <= kept + memory.at_work_bytes(SEVEN_B, tokens, BF16, GPU), row


def test_a_step_of_all_weights_takes_no_more_than_is_reserved_for_it():
    newest = max(RESULTS.glob("*-memory*.json"), key=lambda path: json.loads(path.read_text())["when"])
    rows = [row for row in json.loads(newest.read_text())["rows"] if row["train"] == "full"]
    assert {row["memory"] for row in rows} == {"keep", "full"}
    for row in rows:
        size, tokens, policy = SIZES[row["model"]], sum(row["lengths"]), row["memory"]
        assert size.tied
        config = ModelConfig(vocab_size=size.vocab, d_model=size.d_model, n_layers=size.layers, n_heads=size.heads,
                             n_kv_heads=size.kv_heads, head_dim=size.head_dim, d_ff=size.d_ff, tied_head=True)
        network = Llama(config, dtype=BF16, device="meta")
        network.unfreeze("full")
        trained = network.trained_values()
        kept = memory.kept_bytes(config, tokens, policy, 2) + trained.kept_bytes(policy, 2)
        reserved = kept + memory.at_work_bytes(config, tokens, BF16, GPU) + trained.at_work_bytes(2)
        assert trained.to_come == trained.values        # between two steps they take no memory
        assert kept < row["peak_bytes"] - row["between_bytes"] <= reserved + 4 * trained.to_come, row


def test_without_room_on_the_host_nothing_is_parked(monkeypatch):
    assert _choose(monkeypatch, 2_048, 0.4e9, host=0.8e9) == "full"
    assert _choose(monkeypatch, 2_048, 0.4e9, composed=True) == "full"


def test_a_cpu_leaves_more_to_others(monkeypatch):
    kept = memory.kept_bytes(SEVEN_B, 2_048, "keep", 2)
    assert _choose(monkeypatch, 2_048, 0, host=1.5 * kept, device=CPU) != "keep"
    assert _choose(monkeypatch, 2_048, 0, host=1.8 * kept, device=CPU) == "keep"


def test_plain_autograd_keeps_more(monkeypatch):
    kept = memory.kept_bytes(SEVEN_B, 2_048, "keep", 2)
    assert _choose(monkeypatch, 2_048, 2 * kept, composed=True) == "full"
    assert _choose(monkeypatch, 2_048, 6 * kept, composed=True) == "keep"


def test_trained_base_weights_take_room_for_copies_and_gradients(monkeypatch):
    """Copies of all of them stand beside what "keep" and "pointwise" keep; gradients that the backward makes are to
    come; a GPU is not filled as far as with adapters, since moments may be still to come."""
    trained = memory.Trained(6_738_000_000, 6_476_000_000, 202_400_000, 202_400_000, 131_000_000, 3_000_000_000)
    kept, copies = memory.kept_bytes(SEVEN_B, 2_048, "keep", 2), 2 * trained.copied
    work = memory.at_work_bytes(SEVEN_B, 2_048, BF16, GPU) + 202_400_000 * 8 + 3_000_000_000 * 4
    for free, policy in ((kept + copies + work, "keep"), (kept + work, "full")):
        assert _choose(monkeypatch, 2_048, free / memory.SHARE, trained=trained) == policy
        assert _choose(monkeypatch, 2_048, free / memory.SHARE) == "keep"
    assert _choose(monkeypatch, 2_048, (kept + copies + work) * 0.97 / memory.SHARE, trained=trained) == "pointwise"


@pytest.mark.parametrize(("values", "share"), [(200_000_000, memory.SHARE), (5_000_000, memory.OWN_SHARE)])
def test_a_gpu_is_filled_as_far_as_what_is_trained_lets_it(monkeypatch, values, share):
    """A head, say, or norms: their gradients and moments may be still to come."""
    need = memory.kept_bytes(SEVEN_B, 2_048, "keep", 2) + memory.at_work_bytes(SEVEN_B, 2_048, BF16, GPU)
    trained = memory.Trained(values)
    assert _choose(monkeypatch, 2_048, need / share * 1.01, trained=trained) == "keep"
    assert _choose(monkeypatch, 2_048, need / share * 0.99, trained=trained) != "keep"
