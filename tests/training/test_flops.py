"""FLOPs of a step by shapes beside what torch counts, the measured matrix rate, and the peak of memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import minitune as mt
from minitune.training.flops import Costs, costs_of
from minitune.training.machine import matrix_rate, peak_memory


def batch(lengths):
    """Documents whose second half is trained."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(4096, (n,), generator=generator).tolist() for n in lengths]
    return mt.data.pack([(d, [-100] * (len(d) // 2) + d[len(d) // 2 + 1:] + [-100]) for d in ids], sum(lengths))[0]


@pytest.mark.parametrize("how", [{"lora": mt.LoRA(rank=8)}, {"lora": mt.LoRA(rank=64, targets=("q_proj",))},
                                 {"lora": mt.LoRA(rank=8), "quant": "nf4"}, {"train": "full"}, {"train": "last:2"},
                                 {"train": ["model.norm.weight"]}],
                         ids=str)
@pytest.mark.filterwarnings("ignore:dropout, DoRA and trained")
def test_products_of_a_step_are_those_that_torch_counts(tiny, how):
    model = mt.load(tiny, device="cpu", dtype="float32", memory="keep", **how)
    model.train()
    one = batch((96, 40, 120))
    with FlopCounterMode(display=False) as counter:
        model.loss(one).backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    costs = costs_of(model.network)
    attention = 4 * 128 * sum(n**2 / 2 for n in (96, 40, 120)) * (costs.idle + 3.5 * (4 - costs.idle))
    again = 2 * costs.head * one.n_trained if model.network.head_weight.requires_grad else 0   # its logits, twice
    lowest = 0 if how.get("lora") else 4      # adapters in layer 0, and nothing below: its input needs no gradient
    unused = 2 * sum(p.n_rows * p.n_columns for p in model.network.projections()[lowest * 4:][:1])
    assert counts["aten.mm"] == pytest.approx(costs.of_batch(one) - attention + again - unused * one.n_tokens, rel=5e-3)


def test_filler_costs_nothing_and_windows_bound_attention():
    costs = Costs(frozen=100, trained=10, head=50, head_products=2, adapters=7, attention_width=8,
                  windows=(None, 4))
    full, (row,) = batch((10,)), mt.data.pack([batch((10,)).tokens.tolist()], 16)
    assert row.documents.lengths == (10, 6)
    pairs = 10**2 / 2 + (4 * 10 - 4**2 / 2)
    assert costs.of_batch(row) == 10 * (400 + 60 + 42) + 9 * 200 + 3.5 * 4 * 8 * pairs
    assert costs.of_batch(full) == 10 * 502 + full.n_trained * 200 + 3.5 * 32 * pairs


def test_a_reference_is_a_forward_more(tiny):
    model = mt.load(tiny, lora=mt.LoRA(rank=8), device="cpu", dtype="float32")
    one = batch((96, 40, 120))
    with FlopCounterMode(display=False) as counter, torch.no_grad(), model.adapter_disabled():
        model.loss(one)
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) == "aten.mm")
    more = costs_of(model.network, reference=True).of_batch(one) - costs_of(model.network).of_batch(one)
    assert more == pytest.approx(counted + 4 * 128 * 4 * sum(n**2 / 2 for n in (96, 40, 120)), rel=5e-3)


def test_the_matrix_rate_is_measured_once_and_draws_nothing():
    state = torch.get_rng_state()
    rate = matrix_rate(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e14 and matrix_rate(torch.device("cpu"), torch.float32) == rate
    assert torch.equal(torch.get_rng_state(), state)


def test_the_peak_of_memory_rises_with_what_is_taken():
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(min(before, 1 << 30) + (1 << 20), dtype=torch.uint8)      # more than the process ever had
    assert 10 << 20 < before <= peak_memory(torch.device("cpu")) - (0 if before > 1 << 30 else 1 << 20)
    assert held.numel()
