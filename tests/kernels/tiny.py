"""A network as small as the interpreter can bear, with what a training step asks of a model."""

import contextlib

import torch

from minitune.config import LoRA, ModelConfig
from minitune.model.init import init_weights
from minitune.model.llama import Llama
from minitune.ops import backends, tuned
from minitune.training import clip, optimizers, step


class Tiny:
    """A model with adapters on all linears, or with base weights that are trained."""

    def __init__(self, n_layers, dtype, device, train=None, **options):
        self.config = ModelConfig(vocab_size=64, d_model=32, n_layers=n_layers, n_heads=4, n_kv_heads=2, head_dim=16,
                                  d_ff=48, **options)
        self.network, self.device = Llama(self.config, dtype=dtype, memory="keep"), torch.device(device)
        init_weights(self.network, seed=1)
        if train is None:
            self.network.add_adapters(LoRA(rank=8), seed=2)
        else:
            self.network.unfreeze(train)
        self.network.to(device)
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]

    def hidden(self, batch):
        return self.network(batch.tokens, batch.positions, batch.documents)

    def losses_at(self, hidden, labels, label_smoothing=0.0):
        return self.network.losses_at(hidden, labels, label_smoothing)


@contextlib.contextmanager
def as_on_a_gpu(monkeypatch):
    """Our kernels wherever a GPU takes them by itself, attention among them; the library's matrix products; and nothing
    is asked of the device."""
    def chosen(op, device, measured=None, dtype=None, but=()):
        return measured or "reference" if op in backends.MEASURED else "triton"

    with monkeypatch.context() as patched, tuned.forced(attention_forward="triton", attention_backward="triton"):
        patched.setattr(backends, "choose", chosen)
        for module in (clip, optimizers, step):
            patched.setattr(module, "asks", lambda device: False)
        yield
