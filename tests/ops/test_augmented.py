"""augmented: the product over operands with margins equals the separate products, dense and in NF4."""

import pytest
import torch

from minitune.ops import augmented, lora_matmul, nf4, tuned
from minitune.ops.augmented import Augmented
from minitune.ops.lora_matmul import LoraWeights
from minitune.ops.nf4_linear import DecodeBuffer, FusedNF4
from tests.tolerance import check

T, N, K, R = 13, 40, 64, 5


@pytest.fixture(autouse=True)
def measured(monkeypatch):      # whatever the number of rows
    monkeypatch.setattr(tuned, "way", lambda *_: "augmented")


def _weights(dtype, in_nf4=False, bias=False):
    weight = torch.randn(N, K).to(dtype)
    a, b = torch.randn(R, K).to(dtype), torch.randn(N, R).to(dtype)
    if in_nf4:
        parts = [nf4.quantize(weight[:24], double_quant=True), nf4.quantize(weight[24:], double_quant=True)]
        weight = FusedNF4(parts, DecodeBuffer(dtype))
    around = Augmented(weight, R, dtype)
    around.fill(a, b)
    return LoraWeights(around.weight if not in_nf4 else weight, torch.randn(N).to(dtype) if bias else None, a, b,
                       around=around)


def _random(rows, columns):
    return rows.copy_(torch.randn(T, columns))


@pytest.mark.parametrize("in_nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_equals_the_separate_products(dtype, bias, in_nf4):
    w = _weights(dtype, in_nf4, bias)
    x, dy = _random(lora_matmul.input_rows(T, w), K), _random(lora_matmul.gradient_rows(T, w), N)
    plain = w._replace(around=None)
    dense = w.weight if not in_nf4 else torch.cat([part.dequantize(dtype) for part in w.weight.parts])
    truth = LoraWeights(dense.double(), None if w.bias is None else w.bias.double(), w.a.double(), w.b.double())
    y_true = lora_matmul.reference(x.double(), truth)
    y, s = lora_matmul.forward(x, w)
    check("y", y, lora_matmul.forward(x.contiguous(), plain)[0], y_true)
    ds = lora_matmul.backward_s(dy, w)
    dx_true = dy.double() @ truth.weight + dy.double() @ truth.b @ truth.a
    check("dx", lora_matmul.backward_input(dy, ds, w), lora_matmul.backward_input(dy.contiguous(), ds, plain), dx_true)
    assert s.shape == (T, R) and torch.equal(s, x.contiguous() @ w.a.mT)


def test_the_result_may_lie_in_rows_with_margins_of_its_own():
    w = _weights(torch.float32)
    x, out = _random(lora_matmul.input_rows(T, w), K), lora_matmul.gradient_rows(T, w)
    y, _ = lora_matmul.forward(x, w, out=out)
    assert y.data_ptr() == out.data_ptr() and torch.equal(out, lora_matmul.forward(x, w)[0])


def test_rows_are_multiples_of_128_bytes_and_a_plain_tensor_has_no_tail():
    w = _weights(torch.bfloat16)
    x = lora_matmul.input_rows(T, w)
    assert x.stride(0) * 2 % 128 == 0 and augmented.tail(x, w.around.room).shape == (T, w.around.room)
    assert augmented.tail(torch.empty(T, K), w.around.room) is None


def test_margins_of_other_images_are_not_used():
    w = _weights(torch.float32)
    x = _random(lora_matmul.input_rows(T, w), K)
    y = lora_matmul.forward(x, w)[0]
    w.around.fill(torch.randn(R, K), torch.randn(N, R))
    assert w.margins() is None and lora_matmul.input_rows(T, w) is None
    assert torch.allclose(lora_matmul.forward(x, w)[0], y, rtol=1e-4, atol=1e-4)
