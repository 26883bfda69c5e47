"""checks_update: what is wrong at the end of a step is found; what is right is (test_checks.py) too."""

import pytest
import torch

from minitune.config import ModelConfig
from minitune.ops import adamw, checks, lora_gradients, sgd
from minitune.ops.lora_images import Images

CONFIG = ModelConfig(vocab_size=97, d_model=48, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=80)


@pytest.mark.parametrize(("owner", "name", "op", "what"), [
    (lora_gradients, "apart", "lora_gradients", "dA"), (sgd, "sgd_", "sgd", "momentum"),
    (adamw, "adamw_", "adamw", "exp_avg"), (adamw, "adamw_8bit_", "adamw_8bit", "8-bit moments that differ, of 392"),
    (Images, "refresh", "lora_images", "images")])
def test_what_is_wrong_at_the_end_of_a_step_is_found(monkeypatch, owner, name, op, what):
    right = getattr(owner, name)

    def spoilt(*tensors, **how):
        how = {each: 0.8 if each in ("momentum", "beta1") else value for each, value in how.items()}
        if op == "lora_images":
            tensors = *tensors[:2], [(place, parameter, 1.01) for place, parameter, _ in tensors[2]]
        found = right(*tensors, **how)
        return found if found is None else (found[0] * 1.01, found[1])

    monkeypatch.setattr(owner, name, spoilt)
    wrong = [check for check in checks.run(CONFIG, 40, torch.float32, torch.device("cpu"), rank=4) if not check.right]
    assert {check.op for check in wrong} == {op} and what in {check.what for check in wrong}
