"""nf4: the Triton kernels give the bits of the reference, whatever the shape, the block size and the row pitch."""

import math
import struct
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from minitune.errors import InputError
from minitune.kernels import nf4 as kernels
from minitune.ops import backends, nf4

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The fast path takes whole segments of 64 values; the general one takes the rest, and pitched rows it does not fit.
SHAPES = {"several tiles, nested blocks": (270, 64), "segments alone": (3, 128), "ragged rows, ragged end": (3, 100),
          "odd": (7, 33), "three dimensions": (2, 3, 70), "one value": (1,), "less than a block": (31,),
          "a last block of one value": (193,)}


def _bits(values):
    return values.cpu().view({2: torch.int16, 4: torch.int32}[values.element_size()])


def _weight(shape, dtype=torch.float32):
    """Values of all sizes: a block of zeros, one so small that its absmax is raised, one of large values."""
    values = torch.randn(math.prod(shape))
    for block, factor in zip(values.split(64)[1:], (0.0, 1e-39, 5e37 if dtype != torch.float16 else 1e4), strict=False):
        block.mul_(factor)
    return values.view(shape).to(dtype)


def _near_midpoints(n):
    """Where a last bit decides: blocks of 64 that hold their absmax, and each midpoint with its two neighbours."""
    table = nf4.table(torch.device("cpu"))
    absmax = 0.5 + torch.rand(-(-n // 64), 1)
    middle = absmax * (table[1:] + table[:-1]) / 2
    above, below = middle.nextafter(absmax), middle.nextafter(-absmax)
    return torch.cat((absmax, below, middle, above, absmax.expand(-1, 18)), 1).view(-1)[:n]


def _quantized(shape, double_quant=False, blocksize=64):
    with backends.use("reference"):
        return nf4.quantize(torch.randn(shape) * torch.rand(shape[0], *[1] * (len(shape) - 1)), double_quant, blocksize)


def _dequantized(weight, dtype, device, out=None):
    """(by the kernels on `device`, by the reference on the CPU)"""
    with backends.use("triton"):
        found = weight.to(device).dequantize(dtype, out)
    with backends.use("reference"):
        return found, weight.to("cpu").dequantize(dtype)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_gives_the_references_bits(shape, double_quant, dtype, device):
    found, expected = _dequantized(_quantized(shape, double_quant), dtype, device)
    assert found.dtype == dtype and found.shape == expected.shape
    assert torch.equal(_bits(found), _bits(expected))


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
@pytest.mark.parametrize("shape", [(6, 1024), (5, 1031)], ids=str)
def test_dequantize_of_other_blocks(blocksize, shape, device):
    found, expected = _dequantized(_quantized(shape, True, blocksize), torch.float16, device)
    assert torch.equal(_bits(found), _bits(expected))


@pytest.mark.parametrize(("rows", "columns", "pitch", "start"), [
    (5, 192, 208, 16), (5, 192, 199, 3), (70, 64, 80, 0), (5, 33, 40, 0), (4, 1030, 1031, 1), (9, 1, 4, 0)],
    ids=["segments", "segments, misaligned", "several tiles", "odd", "several tiles a row", "one column"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_may_lie_apart(rows, columns, pitch, start, dtype, device):
    buffer = torch.full((start + rows * pitch,), -7.0, dtype=dtype, device=device)
    out = buffer[start:].view(rows, pitch)[:, :columns]
    found, expected = _dequantized(_quantized((rows, columns), True), dtype, device, out)
    assert found is out and torch.equal(_bits(out.contiguous()), _bits(expected))
    out.fill_(-7.0)
    assert bool((buffer == -7.0).all()), "values between the rows were written"


def test_packed_bytes_that_start_at_an_odd_address(device):
    weight = _quantized((70, 64), True).to(device)
    moved = torch.cat((weight.packed[:1], weight.packed))[1:]
    found, expected = _dequantized(replace(weight, packed=moved), torch.float32, device)
    assert torch.equal(_bits(found), _bits(expected))


def test_extreme_scales_round_as_the_reference_does(device):
    """Subnormal products in fp32, overflow and subnormals in fp16."""
    absmax = torch.tensor([1e-38, 3e-39, 7e4, 65519.9, 1e-7, 3e38, 6e-8, 0.0])
    packed = torch.arange(256, dtype=torch.uint8)
    weight = nf4.NF4Weight(packed, absmax, None, None, None, 64, (512,), torch.float32)
    for dtype in DTYPES:
        found, expected = _dequantized(weight, dtype, device)
        assert torch.equal(_bits(found), _bits(expected))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_gives_the_references_bits(shape, dtype, device):
    _check_quantize(_weight(shape, dtype), 64, device)


@pytest.mark.parametrize("blocksize", [32, 256, 4096])
@pytest.mark.parametrize("n", [8192, 8192 + 37])
def test_quantize_in_other_blocks(blocksize, n, device):
    _check_quantize(_weight((n,)), blocksize, device)


@pytest.mark.parametrize("n", [6400, 50, 63])
def test_quantize_rounds_as_the_reference_does(n, device):
    """A full block is multiplied by a reciprocal, the last one is divided; a midpoint belongs to the level below."""
    for _ in range(5):
        _check_quantize(_near_midpoints(n), 64, device)


@pytest.mark.parametrize("last", [0.0, 3e-39])
def test_the_last_blocks_absmax_is_raised(last, device):
    values = torch.randn(64 + 9)
    values[64:] = last
    _check_quantize(values, 64, device)


def _check_quantize(values, blocksize, device):
    with backends.use("triton"):
        found = nf4.quantize(values.to(device), double_quant=False, blocksize=blocksize)
    with backends.use("reference"):
        expected = nf4.quantize(values, double_quant=False, blocksize=blocksize)
    assert torch.equal(_bits(found.absmax), _bits(expected.absmax))
    assert torch.equal(found.packed.cpu(), expected.packed)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [3, 130], ids=["a full block", "the last block"])
def test_what_is_not_finite_reaches_absmax(bad, at, device):
    values = torch.randn(150)
    values[at] = bad
    values = values.to(device)
    _, absmax = kernels.quantize(values, nf4.table(values.device), 64)
    assert absmax.isfinite().tolist() == [block != at // 64 for block in range(3)]
    with backends.use("triton"), pytest.raises(InputError, match="1 values that are NaN or infinite, of 150"):
        nf4.quantize(values)


def test_the_constants_are_those_of_the_op(device):
    assert kernels.NESTED_BLOCKSIZE.value == nf4.NESTED_BLOCKSIZE
    assert kernels.TINY_BITS.value == struct.unpack("<I", struct.pack("<f", nf4.TINY))[0]
