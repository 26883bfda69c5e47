"""Adapter: what it starts from."""

import torch

from minitune.config import LoRA, ModelConfig
from minitune.model.llama import Llama

CONFIG = ModelConfig(vocab_size=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=8, d_ff=32)


def _adapters(seed, **settings):
    network = Llama(CONFIG, dtype=torch.float32)
    network.add_adapters(LoRA(rank=4, **settings), seed)
    return network.adapters()


def test_each_linear_starts_from_its_own_values_whatever_else_is_adapted():
    all_of_them, few = _adapters(1), _adapters(1, targets=("v_proj",))
    starts = [adapter.A for adapter in all_of_them.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(starts) for b in starts[:i])
    assert len(few) == 2 and all(torch.equal(few[path].A, all_of_them[path].A) for path in few)
    assert not any(torch.equal(a, b.A) for a, b in zip(starts, _adapters(2).values(), strict=True))
