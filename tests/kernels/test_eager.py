"""What a training step on a GPU runs beside our kernels and the library's matrix products: a short list, kept here."""

import collections
import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from minitune.data.packing import pack
from minitune.objectives.sft import sft
from minitune.training.optimizers import AdamW
from minitune.training.step import train_step
from tests.kernels.conftest import INTERPRETED
from tests.kernels.tiny import Tiny, as_on_a_gpu

PRODUCTS = {"mm", "addmm", "addmm_"}
"""The library's matrix products."""
IN_EACH_LAYER = {"add_": 14}
"""Autograd adds the gradients of A and B of a layer's seven linears to what the optimizer's buffer holds."""
IN_EACH_TRAINED_LAYER = {"add_": 9, "copy_": 7, "_to_copy": 11, "sum": 2}
"""Of base weights: the gradients of seven linears and two norms; the linears' copies in the compute dtype; their
gradients in fp32, and each norm's weight cast in forward and backward; the parts of which a norm's gradient is the
sum."""
ONCE_TRAINED = {
    "embedding_dense_backward": "the gradient of the tokens' rows",
    "copy_": "a chunk's gradient of the hidden states", "add_": "the head's gradient, part by part",
}
"""What training embedding and head adds to `ONCE`."""
ONCE = {
    "embedding": "the tokens' rows",
    "zeros": "memory for the adapters' images: what lies between the blocks of B",
    "_to_copy": "positions in fp32; the squared norms in fp64, and the norm back in fp32",
    "mul": "angles: positions times frequencies; a sum of losses of one element",
    "mul_": "angles: cos and sin times yarn's factor",
    "cos": "angles", "sin": "angles",
    "index": "trained positions of the hidden states, and their labels",
    "new_zeros": "the gradient of that", "index_put": "the gradient of that",
    "sum": "of the losses, and of the squared norms", "ones_like": "where the backward begins",
    "div": "of one element: the loss and its gradient by the number of trained tokens",
    "zero_": "the gradients' buffer before the step",
    "linalg_vector_norm": "clipping: norms of blocks of the gradients' buffer", "cat": "clipping", "pow": "clipping",
    "stack": "clipping, of one element", "sqrt": "clipping, of one element", "add": "clipping, of one element",
    "reciprocal": "clipping, of one element", "clamp": "clipping, of one element",
}
"""Once a pass or once a step, however many layers there are: op -> what for."""


class Listed(TorchDispatchMode):
    """Counts what reaches the device but is no kernel of ours: no views, no memory that is only taken."""

    def __init__(self, device):
        super().__init__()
        self.device, self.counts = device, collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = torch.utils._pytree.tree_leaves((args, kwargs, result))
        on_device = any(isinstance(x, torch.Tensor) and x.device.type == self.device for x in tensors)
        if on_device and not func.is_view and not name.startswith(("empty", "new_empty", "detach")):
            self.counts[name] += 1
        return result


@contextlib.contextmanager
def _as_on_a_gpu(monkeypatch):
    """`as_on_a_gpu`; what the interpreter does for itself is not counted."""
    if INTERPRETED:
        from triton.runtime.interpreter import GridExecutor

        run = GridExecutor.__call__

        def unseen(self, *args, **kwargs):
            with _disable_current_modes():
                return run(self, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", unseen)
    with as_on_a_gpu(monkeypatch):
        yield


def _counted(n_layers, device, memory="keep", moments="fp32", **options):
    """op -> how often it ran in the second step, the first having made what is made once."""
    model = Tiny(n_layers, torch.bfloat16, device, **options)
    model.network.memory = memory
    optimizer = AdamW(model.parameters, lr=1e-3, moments=moments)
    batches = [batch.to(device) for batch in pack([list(range(3, 20)), list(range(9, 20))], 32)]
    for _ in range(2):
        with Listed(device) as listed:
            train_step(model, batches, optimizer, 1e-3, 1.0, sft)
    return listed.counts


def test_a_layer_runs_our_kernels_and_the_librarys_products_alone(device, monkeypatch):
    with _as_on_a_gpu(monkeypatch):
        one, two = _counted(1, device), _counted(2, device)
    assert set(two) - PRODUCTS - set(IN_EACH_LAYER) == set(ONCE)
    grown = {name: two[name] - one[name] for name in two if name not in PRODUCTS and two[name] != one[name]}
    assert grown == IN_EACH_LAYER


def test_norms_of_heads_recomputed_layers_and_8_bit_moments_add_nothing(device, monkeypatch):
    with _as_on_a_gpu(monkeypatch):
        counts = _counted(1, device, memory="full", moments="8bit", qk_norm=True)
    assert set(counts) - PRODUCTS - set(IN_EACH_LAYER) == set(ONCE)


def test_a_layer_whose_weights_are_trained_adds_their_copies_and_sums(device, monkeypatch):
    with _as_on_a_gpu(monkeypatch):
        one, two = (_counted(n, device, train="full") for n in (1, 2))
    grown = {name: two[name] - one[name] for name in two if name not in PRODUCTS and two[name] != one[name]}
    assert set(one) - PRODUCTS == set(ONCE) | set(IN_EACH_TRAINED_LAYER) | set(ONCE_TRAINED)
    assert grown == IN_EACH_TRAINED_LAYER
