"""nf4_linear: products on weights that are decoded into one buffer, against dense weights of their own."""

import copy
import threading

import pytest
import torch

from minitune.ops import backends, lora_matmul, nf4
from minitune.ops.lora_matmul import LoraWeights
from minitune.ops.nf4_linear import DecodeBuffer, FusedNF4, nf4_linear, reference
from tests.tolerance import check


def _fused(buffer, rows=(5, 9, 3), columns=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = [nf4.quantize(torch.randn(n, columns, generator=generator), double_quant=bool(i % 2))
             for i, n in enumerate(rows)]
    return FusedNF4(parts, buffer)


@pytest.mark.parametrize("bias", [False, True])
def test_two_products_share_the_buffer_and_keep_their_gradients(bias):
    buffer = DecodeBuffer(torch.float32)
    first, second = _fused(buffer), _fused(buffer, rows=(24,), columns=17, seed=1)
    b = torch.randn(17) if bias else None
    x = torch.randn(7, 24, requires_grad=True)
    nf4_linear(nf4_linear(x, first, b), second).square().sum().backward()
    gradient, x.grad = x.grad, None
    reference(reference(x, first, b), second).square().sum().backward()
    assert torch.equal(gradient, x.grad)


def test_plain_autograd_over_the_buffer_stops():
    """Why nf4_linear exists: the second decode overwrites what the first product saved, and its version tells."""
    buffer = DecodeBuffer(torch.float32)
    x = torch.randn(7, 24, requires_grad=True)
    with _fused(buffer, rows=(24,)).decoded() as first:
        y = torch.nn.functional.linear(x, first)
    with _fused(buffer, rows=(24,), seed=1).decoded() as second:
        y = torch.nn.functional.linear(y, second)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_threads_that_share_a_buffer_take_turns():
    buffer = DecodeBuffer(torch.float32)
    weights = [_fused(buffer, rows=(96,), columns=128, seed=seed) for seed in range(2)]
    x = torch.randn(64, 128)
    expected = [nf4_linear(x, weight) for weight in weights]
    wrong = []

    def work(i):
        for _ in range(200):
            if not torch.equal(nf4_linear(x, weights[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_first_use_in_inference_mode_does_no_harm(backend):
    if reason := backends.missing(backend, torch.device("cpu")):
        pytest.skip(reason)
    nf4.table.cache_clear()
    nf4.nested_code.cache_clear()
    with backends.use(backend):
        buffer = DecodeBuffer(torch.float32)
        with torch.inference_mode():
            fused = FusedNF4([nf4.quantize(torch.randn(5, 24)), torch.randn(3, 24)], buffer)
            nf4_linear(torch.randn(2, 24), fused)
        parts = [nf4.quantize(torch.randn(5, 24)), torch.randn(3, 24)]
        x = torch.randn(2, 24, requires_grad=True)
        nf4_linear(x, FusedNF4(parts, buffer)).sum().backward()
        assert x.grad is not None


def test_a_copy_has_a_buffer_of_its_own():
    fused = _fused(DecodeBuffer(torch.float32))
    pair = copy.deepcopy([fused, fused])
    assert pair[0].buffer is pair[1].buffer is not fused.buffer


def test_a_part_may_be_left_in_16_bits():
    buffer = DecodeBuffer(torch.float32)
    plain = torch.randn(4, 24)
    fused = FusedNF4([_fused(buffer).parts[0], plain], buffer)
    with fused.decoded() as whole:
        assert torch.equal(whole[5:], plain) and len(fused) == 9


def test_lora_matmul_takes_it():
    buffer = DecodeBuffer(torch.float32)
    fused = _fused(buffer)
    whole = fused.decode(torch.empty(17, 24))
    a, b = torch.randn(4, 24), torch.randn(17, 4)
    x, dy = torch.randn(6, 24), torch.randn(6, 17)
    packed, plain = LoraWeights(fused, None, a, b), LoraWeights(whole, None, a, b)
    (y, _), (expected, _) = lora_matmul.forward(x, packed), lora_matmul.forward(x, plain)
    assert torch.equal(y, expected) and torch.equal(lora_matmul.reference(x, packed), lora_matmul.reference(x, plain))
    ds = lora_matmul.backward_s(dy, packed)
    assert torch.equal(lora_matmul.backward_input(dy, ds, packed), lora_matmul.backward_input(dy, ds, plain))


def test_the_buffer_grows_and_is_one():
    buffer = DecodeBuffer(torch.bfloat16)
    small = buffer.take(2, 3, torch.device("cpu"))
    large = buffer.take(5, 7, torch.device("cpu"))
    assert large.shape == (5, 7) and large.dtype == torch.bfloat16
    assert buffer.take(2, 3, torch.device("cpu")).data_ptr() == large.data_ptr() != small.data_ptr()


@pytest.mark.skipif(bool(backends.missing("native", torch.device("cpu"))), reason="the extension is not there")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_row_reads_the_packed_parts_and_leaves_the_buffer_alone(dtype):
    weight = _fused(DecodeBuffer(dtype))
    weight = FusedNF4([*weight.parts, torch.randn(4, 24).to(dtype)], weight.buffer)     # one that is not quantised
    x, bias = torch.randn(1, 24).to(dtype), torch.randn(21).to(dtype)
    found = lora_matmul.forward(x, LoraWeights(weight, bias, None, None))[0]
    assert found.shape == (1, 21) and weight.buffer._room is None
    whole = torch.cat([part if isinstance(part, torch.Tensor) else part.dequantize(dtype) for part in weight.parts])
    truth = torch.nn.functional.linear(x.double(), whole.double(), bias.double())
    check("y", found, reference(x, weight, bias), truth)
