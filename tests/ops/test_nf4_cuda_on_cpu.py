"""The kernels of csrc/nf4_cuda.cu run on a CPU, thread by thread (cuda_on_cpu.h): the reference's bits on any shape.

What only a GPU shows, tests/test_gpu_nf4.py asks: this holds the indices, the rounding and what is written.
"""

import ctypes
import mmap
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minitune.ops import nf4

CSRC = Path(__file__).parents[2] / "csrc"
SOURCE = (CSRC / "nf4_cuda.cu").read_text()
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux")
LAUNCH = re.compile(r"(\w+(?:<[^<>]*>)?)<<<(.+?), kThreads, 0, [^;]+?>>>\((.*?)\);")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
BITS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
POINTER, LONG, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class Dequantize(ctypes.Structure):
    _fields_ = [*((name, POINTER) for name in ("packed", "absmax", "absmax_codes", "nested_absmax", "nested_code",
                                               "nested_offset", "table", "out")),
                *((name, LONG) for name in ("rows", "columns", "pitch")),
                *((name, INT) for name in ("block_shift", "dtype", "reused"))]


class Quantize(ctypes.Structure):
    _fields_ = [*((name, POINTER) for name in ("values", "table", "packed", "absmax")), ("n", LONG),
                ("block_shift", INT), ("dtype", INT)]


class QuantizeAbsmax(ctypes.Structure):
    _fields_ = [*((name, POINTER) for name in ("absmax", "offset", "code", "codes", "nested_absmax")), ("n", LONG)]


def _build(place, text=SOURCE):
    """The kernels as a library for the CPU."""
    for header in ("cuda_bf16.h", "cuda_fp16.h", "cuda_runtime.h"):
        (place / header).write_text("")
    text, count = LAUNCH.subn(r"launch_on_cpu(\2, [&] { \1(\3); });", text)
    assert count == 5 and "<<<" not in text
    (place / "kernels.cpp").write_text(text)
    command = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-Wall",
               "-Wno-unknown-pragmas", "-fsanitize=alignment", "-fno-sanitize-recover=alignment", "-I", str(place),
               "-I", str(CSRC), "-include", str(Path(__file__).parent / "cuda_on_cpu.h"),
               str(place / "kernels.cpp"), "-o", str(place / "kernels.so")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return ctypes.CDLL(str(place / "kernels.so"))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return _build(tmp_path_factory.mktemp("cuda"))


def _guarded(tensor):
    """The same values, behind whose last byte lies a page that cannot be read."""
    n_bytes, page = tensor.nbytes, mmap.PAGESIZE
    whole = -(-n_bytes // page) * page
    room = mmap.mmap(-1, whole + page)
    memory = torch.frombuffer(room, dtype=torch.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(POINTER(memory.data_ptr() + whole), ctypes.c_size_t(page), 0) == 0
    return memory[whole - n_bytes:whole].view(tensor.dtype).copy_(tensor)


def _address(tensor):
    return None if tensor is None else tensor.data_ptr()


def _shift(blocksize):
    return blocksize.bit_length() - 1


def _same_bits(value, reference):
    """NaN aside, which torch's casts write in several ways."""
    nan = reference.isnan()
    bits = BITS[value.element_size()]
    assert torch.equal(value.isnan(), nan)
    assert torch.equal(value.masked_fill(nan, 0).view(bits), reference.masked_fill(nan, 0).view(bits))


def _dequantize(kernels, weight, out):
    rows, columns = out.shape
    flat = out.is_contiguous()
    nested, packed, absmax = weight.nested, _guarded(weight.packed), _guarded(weight.absmax)
    work = Dequantize(
        _address(packed), None if nested else _address(absmax), _address(absmax) if nested else None,
        _address(weight.nested_absmax), _address(weight.nested_code), _address(weight.nested_offset),
        _address(nf4.table(CPU)), out.data_ptr(), 1 if flat else rows, rows * columns if flat else columns,
        rows * columns if flat else out.stride(0), _shift(weight.blocksize), DTYPES[out.dtype])
    assert kernels.nf4_cuda_dequantize(ctypes.byref(work), None) == 0


# rows, columns, row pitch, first element. A round of all thread blocks is 8,192 words of 8 values.
DECODED = {"flat, several rounds": (70, 2048, 2048, 0), "flat, not a whole word": (3, 43, 43, 0),
           "apart, several rounds": (70, 1096, 1160, 0), "apart, rows narrower than a warp": (9, 104, 168, 8),
           "apart, misaligned": (5, 192, 200, 3), "apart, odd": (7, 33, 40, 0), "one word": (1, 8, 8, 0),
           "one value": (1, 1, 1, 0)}


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", nf4.DTYPES, ids=str)
@pytest.mark.parametrize("case", DECODED.values(), ids=DECODED)
def test_dequantize(kernels, case, dtype, nested):
    rows, columns, pitch, start = case
    for blocksize in (32, 64, 4096):
        weight = nf4.quantize(torch.randn(rows, columns), nested, blocksize)
        room = torch.full((start + rows * pitch + 8,), 7.0, dtype=dtype)
        out = room.as_strided((rows, columns), (pitch, 1), start)
        _dequantize(kernels, weight, out)
        _same_bits(out.contiguous(), nf4.dequantize_reference(weight).to(dtype))
        out.fill_(7)
        assert bool((room == 7).all()), "values outside of out were written"


@pytest.mark.parametrize("dtype", nf4.DTYPES, ids=str)
def test_dequantize_any_scale(kernels, dtype):
    scales = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-40, -1e-45, 0.0, -0.0, 65519.9, 65520.0,
                           5.9e-8, 3.4e38, 3.3895e38, 1.1754944e-38, 9.2e-41]).repeat_interleave(8)
    packed = torch.arange(256, dtype=torch.uint8).repeat(len(scales) // 8)
    weight = nf4.NF4Weight(packed, scales, None, None, None, 64, (len(scales) // 8, 512), torch.float32)
    out = torch.empty(weight.shape, dtype=dtype)
    _dequantize(kernels, weight, out)
    _same_bits(out, nf4.dequantize_reference(weight).to(dtype))


def _values(n, dtype):
    """Normal values, and blocks of zeros, tiny, huge, infinite and NaN values; values beside midpoints, which a
    division in place of a product would round to another level; a tail of zeros."""
    flat, levels = torch.randn(n), torch.tensor(nf4.TABLE)
    midpoints = (levels[1:] + levels[:-1]) / 2
    if n > 8192:
        for block, scale in zip(flat[1024:7168].split(32), torch.rand(192) * 9, strict=True):
            block[:15], block[15:30], block[30:] = midpoints * scale, (midpoints * scale).nextafter(levels[1:]), scale
    flat[n - n % 64:] = 0
    for i, value in enumerate((0.0, 1e-39, 3e38, float("inf"), float("nan"))):
        flat[128 + 64 * i + 3: 192 + 64 * i: 7] = value
        if value < 1:
            flat[128 + 64 * i: 192 + 64 * i] = value
    return flat.to(dtype)


def _quantize(kernels, values, blocksize):
    """packed with 4 bytes, absmax with one value behind its end."""
    n = len(values)
    packed = torch.full((-(-n // 2) + 4,), 0xAA, dtype=torch.uint8)
    absmax = torch.full((-(-n // blocksize) + 1,), -7.0)
    work = Quantize(values.data_ptr(), _address(nf4.table(CPU)), packed.data_ptr(), absmax.data_ptr(), n,
                    _shift(blocksize), DTYPES[values.dtype])
    assert kernels.nf4_cuda_quantize(ctypes.byref(work), None) == 0
    return packed, absmax


@pytest.mark.parametrize("dtype", nf4.DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 256, 512, 4096])
def test_quantize(kernels, blocksize, dtype):
    for n in (1, 63, 64, 100, 8192, 8193, 70_000):
        for start in (0, 1):               # 1: no wide loads
            values = _guarded(_values(start + n, dtype))[start:]
            packed, absmax = _quantize(kernels, values, blocksize)
            expected, scales = nf4.quantize_reference(values, blocksize)
            assert torch.equal(packed[:-4], expected) and packed[-4:].tolist() == [0xAA] * 4
            _same_bits(absmax[:-1], scales)
            assert absmax[-1] == -7


def _quantize_absmax(kernels, absmax, offset, code):
    codes, nested = torch.empty(len(absmax), dtype=torch.uint8), torch.empty(-(-len(absmax) // 256))
    work = QuantizeAbsmax(*map(_address, (absmax, offset, code, codes, nested)), len(absmax))
    assert kernels.nf4_cuda_quantize_absmax(ctypes.byref(work), None) == 0
    return codes, nested


@pytest.mark.parametrize("n", [1, 255, 256, 257, 5000])
def test_quantize_absmax(kernels, n):
    code, wide = nf4.nested_code(CPU), torch.rand(n) * 10.0 ** torch.randint(-42, 30, (n,))
    for absmax in (torch.rand(n), wide, torch.zeros(n), wide.where(wide > 1e-30, torch.nan)):
        offset = absmax.nanmean()
        codes, nested = _quantize_absmax(kernels, absmax, offset, code)
        expected, scales = nf4.quantize_absmax_reference(absmax, offset, code)
        assert torch.equal(codes, expected)
        _same_bits(nested, scales)


# ---- that it would be seen ------------------------------------------------------------------------------------------
def _without_barrier(place, number):
    """The kernels without one of their four `__syncthreads()`."""
    parts = SOURCE.split("__syncthreads();")
    assert len(parts) == 5
    return _build(place, "__syncthreads();".join([*parts[:number], parts[number] + parts[number + 1],
                                                  *parts[number + 2:]]))


def test_levels_read_before_they_are_written_are_seen(tmp_path):
    weight = nf4.quantize(torch.randn(12, 104), double_quant=False)
    out = torch.empty(weight.shape)
    _dequantize(_without_barrier(tmp_path, 0), weight, out)
    assert not torch.equal(out, nf4.dequantize_reference(weight))


def test_midpoints_read_before_they_are_written_are_seen(tmp_path):
    values = torch.randn(4096)
    packed, _ = _quantize(_without_barrier(tmp_path, 1), values, 64)
    assert not torch.equal(packed[:-4], nf4.quantize_reference(values, 64)[0])


@pytest.mark.parametrize("number", [2, 3])
def test_a_maximum_read_at_the_wrong_time_is_seen(number, tmp_path):
    absmax, code = torch.rand(20_000), nf4.nested_code(CPU)
    found = _quantize_absmax(_without_barrier(tmp_path, number), absmax, absmax.mean(), code)
    assert not all(map(torch.equal, found, nf4.quantize_absmax_reference(absmax, absmax.mean(), code)))
