"""GraphedStep on a GPU: every gradient and parameter has the bits of the eager step on the same padded batches."""

import pytest
import torch

import minitune as mt
from minitune.objectives.sft import sft
from minitune.training import graph
from minitune.training.step import train_step
from tests.batches import documents, packed
from tests.oracles import make

pytestmark = pytest.mark.gpu
ROOM = {"n_documents": 8, "n_trained": 500}
CASES = {"bf16, keep": ("keep", "bfloat16", {}, "fp32"), "bf16, full, 8-bit moments": ("full", "bfloat16", {}, "8bit"),
         "fp32, pointwise": ("pointwise", "float32", {}, "fp32"),
         "4 bits": ("keep", "bfloat16", {"quant": "nf4-dq"}, "fp32")}


def _micro_batch(lengths, seed):
    return packed(documents(lengths, seed), 512)


STEPS = [[_micro_batch([300, 100], 1), _micro_batch([480], 2)], [_micro_batch([17] * 7, 3), _micro_batch([500], 4)],
         [_micro_batch([250, 250], 5), _micro_batch([9, 400, 60], 6)]]


@pytest.mark.parametrize(("memory", "dtype", "options", "moments"), CASES.values(), ids=CASES)
def test_a_replayed_step_is_the_eager_one(memory, dtype, options, moments, tmp_path):
    make("qwen3", tmp_path)
    runs = []
    for graphed in (False, True):
        model = mt.load(tmp_path, lora=mt.LoRA(rank=4), device="cuda", memory=memory, dtype=dtype, **options)
        optimizer = mt.AdamW(model.trainable_parameters(), lr=1e-2, moments=moments)
        step = graph.GraphedStep(model, optimizer, STEPS[0][0], sft, **ROOM) if graphed else None
        run = []
        for i, batches in enumerate(STEPS * 2):
            lr = 1e-2 / (i + 1)
            if step is not None:
                found = step(batches, lr, 0.5)
            else:
                padded = [graph.padded(batch, **ROOM).to("cuda") for batch in batches]
                found = train_step(model, padded, optimizer, lr, 0.5, sft)
            run.append([found.loss.cpu(), found.grad_norm.cpu(),
                        *(x.detach().cpu() for p in model.trainable_parameters() for x in (p.grad, p))])
        runs.append(run)
    for expected, found in zip(*runs, strict=True):
        assert all(map(torch.equal, found, expected))
    assert runs[0][-1][0] < runs[0][0][0]
