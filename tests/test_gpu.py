"""The whole of it on a GPU: the same losses as on the CPU, no waiting within a step, the same bits twice."""

import json
import math

import pytest
import torch

import minitune as mt
from minitune.bench import LEAST, Setting, bench
from minitune.objectives.dpo import DPO
from minitune.ops import moments8, nf4, rope
from tests.batches import documents, packed
from tests.oracles import make
from tests.tolerance import relative

pytestmark = pytest.mark.gpu
LONG = (1500, 31, 700)     # several blocks of keys: only then could sums be in another order
VARIANTS = ["llama-2-gqa", "llama-dynamic", "mistral", "qwen3"]


def _batch(lengths=(20, 31, 9, 31), seed=5):
    return packed(documents(lengths, seed), sum(lengths) + 5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_gradients_and_generation_equal_the_cpus_in_fp32(variant, tmp_path):
    make(variant, tmp_path)
    results = []
    for device in ("cpu", "cuda"):
        model = mt.load(tmp_path, lora=mt.LoRA(rank=4), dtype="float32", device=device)
        for adapter in model.network.adapters().values():
            adapter.B.data.copy_(torch.randn(adapter.B.shape, generator=torch.Generator().manual_seed(2)) * 0.05)
        loss = model.loss(_batch())
        loss.backward()
        results.append((loss.detach().cpu(), [p.grad.cpu() for p in model.trainable_parameters()],
                        model.generate([[5, 6, 7], [8]], 12)))
    (loss, gradients, new), (gpu_loss, gpu_gradients, gpu_new) = results
    assert relative(gpu_loss, loss) < 1e-5 and gpu_new == new
    for a, b in zip(gpu_gradients, gradients, strict=True):
        assert relative(a, b) < 1e-4


CASES = {**{memory: ("qwen3", {"memory": memory}, {}, "fp32") for memory in ("keep", "pointwise", "full", "offload")},
         "8-bit moments": ("qwen3", {}, {}, "8bit"), "dropout": ("qwen3", {}, {"dropout": 0.1}, "fp32"),
         "dynamic RoPE": ("llama-dynamic", {}, {}, "fp32"), "4 bits": ("qwen3", {"quant": "nf4-dq"}, {}, "fp32")}


@pytest.mark.parametrize(("variant", "options", "lora", "moments"), CASES.values(), ids=CASES)
def test_a_step_in_bf16_repeats_bit_for_bit_and_waits_for_nothing(variant, options, lora, moments, tmp_path):
    """From the first step on: what is made once must not make the host wait either."""
    make(variant, tmp_path)
    losses = []
    for _ in range(2):
        torch.manual_seed(7)
        forget_tables()
        model = mt.load(tmp_path, lora=mt.LoRA(rank=4, **lora), device="cuda", **options)
        model.train(True)
        optimizer = mt.AdamW(model.trainable_parameters(), lr=1e-2, moments=moments)
        batch = _batch(LONG).pin_memory().to("cuda")
        run = []
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):
                loss = model.loss(batch)
                loss.backward()
                optimizer.clip(1.0)
                optimizer.step()
                optimizer.zero_grad()
                run.append(loss.detach())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        losses.append(torch.stack(run).cpu())
    assert torch.equal(*losses) and losses[0][-1] < losses[0][0]


def forget_tables():
    """So that each run makes them anew, within a step."""
    for table in (moments8.table, rope._static, nf4.table, nf4.nested_code):
        table.cache_clear()


@pytest.mark.parametrize("quant", [None, "nf4-dq"])
def test_bench_measures_steps(tmp_path, quant):
    setting = Setting(base="tiny", tokens=512, longest=200, micro_batches=2, seconds=0.2, rank=8, train=(), quant=quant,
                      memory="auto", moments="8bit")
    bench(setting, "cuda", None, tmp_path / "raw.json")
    raw = json.loads((tmp_path / "raw.json").read_text())
    assert raw["environment"]["gpu"]["name"] == torch.cuda.get_device_name()
    assert len(raw["steps"]) > LEAST and all(0 < step["seconds"] < 10 and step["grad_norm"] > 0 and step["memory"] > 0
                                             for step in raw["steps"])


def test_train_runs_and_saves(tmp_path):
    make("llama-2-gqa", tmp_path / "base")
    model = mt.load(tmp_path / "base", lora=mt.LoRA(rank=4), device="cuda")
    run = mt.train(model, [_batch(seed=s) for s in range(4)], epochs=5, lr=1e-2, micro_batches=2)
    assert run.final_loss < run.records[0].loss
    model.save_adapter(tmp_path / "adapter")
    loaded = mt.load(tmp_path / "base", adapter=tmp_path / "adapter", device="cuda")
    assert torch.equal(loaded.loss(_batch()), model.loss(_batch()))


@pytest.mark.parametrize("quant", [None, "nf4-dq"])
def test_preferences_are_learnt_alike_twice(tmp_path, quant):
    make("llama-2-gqa", tmp_path / "base")
    rows = [mt.data.Document(ids.tolist(), [False] * 5 + [True] * (len(ids) - 5), rejected_at=len(ids) // 2)
            for ids in documents((60, 90, 44, 71), 3)]
    losses = []
    for _ in range(2):
        model = mt.load(tmp_path / "base", lora=mt.LoRA(rank=4), device="cuda", quant=quant)
        run = mt.train(model, mt.data.pack(rows, 160), objective=DPO(0.5), epochs=10, lr=1e-2, quiet=True)
        losses.append(run.losses)
    assert losses[0] == losses[1] and losses[0][0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[0][-1] < 0.5
