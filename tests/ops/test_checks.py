"""checks: all ops are right here, and one that is wrong is found."""

import pytest
import torch

from minitune.config import ModelConfig
from minitune.ops import backends, checks, swiglu

CONFIG = ModelConfig(vocab_size=97, d_model=48, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=80)
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_ops_are_right(dtype):
    found = list(checks.run(CONFIG, 40, dtype, CPU, rank=4))
    assert {check.op for check in found} | {"softmax"} == set(backends.OPS)     # that one is within attention
    assert [check for check in found if not check.right] == []


@pytest.mark.parametrize("spoil", [lambda h: h * 1.01, lambda h: h.index_fill(0, torch.tensor([3]), float("nan"))],
                         ids=["1 % off", "a row of NaN"])
def test_what_is_wrong_is_found(monkeypatch, spoil):
    right = swiglu.forward
    monkeypatch.setattr(swiglu, "forward", lambda gate_up: spoil(right(gate_up)))
    wrong = [check for check in checks.run(CONFIG, 40, torch.float32, CPU, rank=4) if not check.right]
    assert [(check.op, check.what) for check in wrong] == [("swiglu", "h")]
