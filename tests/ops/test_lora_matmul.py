"""lora_matmul: product, its backward for the input and the adapters, against fp64."""

import pytest
import torch

from minitune.ops import lora_matmul
from minitune.ops.lora_matmul import LoraWeights
from tests.tolerance import check


def _case(dtype, bias):
    tokens, k, n, r = 53, 123, 77, 11
    weights = LoraWeights(torch.randn(n, k), torch.randn(n) if bias else None, torch.randn(r, k), torch.randn(n, r))
    weights = LoraWeights(*(None if w is None else w.to(dtype) for w in weights))
    return torch.randn(tokens, k).to(dtype), weights, torch.randn(tokens, n).to(dtype)


def _plain(x, weights, dy, dtype):
    weights = LoraWeights(*(None if w is None else w.to(dtype).requires_grad_() for w in weights))
    x = x.to(dtype).requires_grad_()
    y = lora_matmul.reference(x, weights)
    return [y.detach(), *torch.autograd.grad(y, (x, weights.a, weights.b), dy.to(dtype))]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward(dtype, bias):
    x, weights, dy = _case(dtype, bias)
    y, s = lora_matmul.forward(x, weights)
    ds = lora_matmul.backward_s(dy, weights)
    values = [y, lora_matmul.backward_input(dy, ds, weights), *lora_matmul.backward_adapters(dy, x, s, ds, weights)]
    truth, plain = _plain(x, weights, dy, torch.float64), _plain(x, weights, dy, dtype)
    for name, value, p, t in zip(("y", "dx", "da", "db"), values, plain, truth, strict=True):
        check(name, value, p, t)


def test_without_an_adapter_it_is_the_product():
    x, weights, dy = _case(torch.float32, True)
    bare = LoraWeights(weights.weight, weights.bias, None, None)
    y, s = lora_matmul.forward(x, bare)
    assert s is None and torch.equal(y, torch.addmm(bare.bias, x, bare.weight.mT))
    assert lora_matmul.backward_s(dy, bare) is None
    assert torch.equal(lora_matmul.backward_input(dy, None, bare), dy @ bare.weight)
