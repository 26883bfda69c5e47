"""nf4: the format against bitsandbytes, the reference's own rules, and one clear error for each misuse."""

import pytest
import torch

from minitune.errors import InputError
from minitune.ops import backends, nf4

SHAPES = [(4, 64), (3, 48), (5, 7), (1, 1), (130,), (2, 3, 100), (64, 512)]


def _values(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _theirs(weight, double_quant, blocksize=64):
    bnb = pytest.importorskip("bitsandbytes.functional")
    return bnb.quantize_4bit(weight, blocksize=blocksize, compress_statistics=double_quant, quant_type="nf4")


@pytest.fixture(params=["native", "reference"], autouse=True)
def backend(request):
    """Every backend that is there gives the same bits."""
    reason = backends.missing(request.param, torch.device("cpu"))
    if reason:
        pytest.skip(reason)
    with backends.use(request.param):
        yield request.param


@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("dtype", nf4.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_has_their_bits(shape, dtype, blocksize):
    weight = _values(shape, dtype)
    packed, state = _theirs(weight, False, blocksize)
    ours = nf4.quantize(weight, double_quant=False, blocksize=blocksize)
    assert torch.equal(ours.packed, packed.view(-1))
    assert torch.equal(ours.absmax, state.absmax)
    assert ours.shape == shape and ours.dtype == dtype


@pytest.mark.parametrize("scale", [1e-42, 1e-37, 1e-3, 1e30])
def test_quantize_has_their_bits_at_extremes(scale):
    weight = _values((3, 70)) * scale
    weight[0] = 0
    packed, state = _theirs(weight, False)
    ours = nf4.quantize(weight, double_quant=False)
    assert torch.equal(ours.packed, packed.view(-1)) and torch.equal(ours.absmax, state.absmax)


def test_zeros_pack_to_0x77_and_odd_tails_too():
    assert nf4.quantize(torch.zeros(65)).packed.tolist() == [0x77] * 33
    assert nf4.quantize(torch.ones(3), False).packed.tolist() == [0xFF, 0xF7]


def test_nested_codes_are_at_least_as_near_as_theirs():
    weight = _values((512, 512)) * torch.rand(512, 1) ** 3
    _, state = _theirs(weight, True)
    ours = nf4.quantize(weight)
    absmax = nf4.quantize(weight, double_quant=False).absmax
    assert ours.nested_offset.item() == absmax.double().mean().float().item()
    assert torch.equal(ours.nested_code, state.state2.code)
    theirs = state.state2.code[state.absmax.long()] * state.state2.absmax.repeat_interleave(256) + state.offset
    assert ((nf4.absmax_of(ours) - absmax).abs() <= (theirs - absmax).abs() + 1e-6 * absmax).all()
    assert (ours.absmax.int() - state.absmax.int()).abs().max() <= 1


@pytest.mark.parametrize("out_dtype", nf4.DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) != 2 or s[-1] % 64 == 0 or s[-1] % 16])
def test_dequantize_has_their_bits(shape, double_quant, out_dtype):
    """Where their CPU kernel is right: not where the last dimension is a multiple of 16 but not of 64."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    packed, state = _theirs(_values(shape), double_quant)
    state.dtype = out_dtype
    nested = state.state2
    ours = nf4.NF4Weight(packed.view(-1), state.absmax, nested.absmax if nested else None,
                         nested.code if nested else None, state.offset if nested else None, 64, shape, torch.float32)
    expected = bnb.dequantize_4bit(packed, state)
    assert torch.equal(ours.dequantize(out_dtype), expected.view(shape))
    buffer = torch.full(shape, 7.0, dtype=out_dtype)
    assert ours.dequantize(out=buffer) is buffer and torch.equal(buffer, expected.view(shape))


@pytest.mark.parametrize("columns", [64, 48, 7])
@pytest.mark.parametrize("double_quant", [False, True])
def test_rows_may_lie_apart(columns, double_quant):
    weight = nf4.quantize(_values((6, columns)), double_quant)
    room = torch.full((6, columns + 8), 7.0, dtype=torch.bfloat16)
    version = room._version
    weight.dequantize(out=room[:, :columns])
    assert torch.equal(room[:, :columns], weight.dequantize(torch.bfloat16)) and (room[:, columns:] == 7).all()
    assert room._version > version


def test_quantized_values_are_near_and_repeat():
    weight = _values((64, 256))
    once = nf4.quantize(weight)
    assert (once.dequantize() - weight).abs().mean() < 0.08
    assert torch.equal(nf4.quantize(once.dequantize(), False).packed, once.packed)


def test_repr_tells_shape_dtype_device_and_bytes():
    assert repr(nf4.quantize(torch.ones(2, 64).bfloat16(), False)) == (
        "NF4Weight(nf4, shape=[2, 64], dtype=bfloat16, device=cpu, 72 bytes)")
    assert "nf4-dq" in repr(nf4.quantize(torch.ones(2, 64)))


BAD = {
    "blocksize": (lambda: nf4.quantize(torch.ones(64), blocksize=48), "blocksize is 48"),
    "small block": (lambda: nf4.quantize(torch.ones(64), blocksize=16), "blocksize is 16"),
    "bool block": (lambda: nf4.quantize(torch.ones(64), blocksize=True), "blocksize is True"),
    "dtype": (lambda: nf4.quantize(torch.ones(64, dtype=torch.float64)), "float64"),
    "empty": (lambda: nf4.quantize(torch.ones(0, 64)), "holds no value"),
    "nan": (lambda: nf4.quantize(torch.tensor([1.0, float("nan"), float("inf")])), "2 values that are NaN or infinite"),
    "out shape": (lambda: _weight().dequantize(out=torch.empty(64, 2)), "out is"),
    "out dtype": (lambda: _weight().dequantize(torch.float16, out=torch.empty(2, 64)), "out is"),
    "out strides": (lambda: _weight().dequantize(out=torch.empty(64, 2).mT), "strides"),
    "out overlaps": (lambda: _weight().dequantize(out=torch.empty(1, 64).expand(2, 64)), "strides"),
    "out in a graph": (lambda: _weight().dequantize(out=torch.empty(2, 64, requires_grad=True)), "gradient"),
    "to int": (lambda: _weight().dequantize(torch.int32), "int32"),
    "absmax short": (lambda: _weight(absmax=torch.ones(1)), "absmax is"),
    "absmax dtype": (lambda: _weight(absmax=torch.ones(2, dtype=torch.uint8)), "absmax is"),
    "packed short": (lambda: _weight(packed=torch.zeros(63, dtype=torch.uint8)), "packed is"),
    "half nested": (lambda: _weight(nested_code=torch.zeros(256)), "a weight has"),
}


def _weight(**changes):
    fields = {"packed": torch.zeros(64, dtype=torch.uint8), "absmax": torch.ones(2), "nested_absmax": None,
              "nested_code": None, "nested_offset": None, "blocksize": 64, "shape": (2, 64), "dtype": torch.float32}
    return nf4.NF4Weight(**fields | changes)


@pytest.mark.parametrize("case", BAD)
def test_misuse_gets_one_clear_error(case):
    make, message = BAD[case]
    with pytest.raises(InputError, match=message):
        make()
