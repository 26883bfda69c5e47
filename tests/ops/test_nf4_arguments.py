"""The native NF4 ops refuse what does not fit: each argument in turn, then thousands at random under sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minitune.ops import backends, nf4

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
absent = backends.missing("native", CPU)
needs_native = pytest.mark.skipif(absent is not None, reason=f"minitune._C is missing: {absent}")
OPS = torch.ops.minitune


def _operands(nested):
    """For 6 rows of 100: 600 values, 10 blocks of 64."""
    given = {"packed": torch.zeros(300, dtype=torch.uint8), "absmax": torch.ones(10), "nested_absmax": None,
             "nested_code": None, "nested_offset": None, "table": nf4.table(CPU), "blocksize": 64}
    if nested:
        given |= {"absmax": torch.zeros(10, dtype=torch.uint8), "nested_absmax": torch.ones(1),
                  "nested_code": nf4.nested_code(CPU), "nested_offset": torch.tensor(1.0)}
    return given


def _short(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() // 2)
    return tensor


def _unaligned(tensor):
    data = bytearray(tensor.numel() * tensor.element_size() + 1)
    return torch.frombuffer(data, dtype=tensor.dtype, offset=1, count=tensor.numel())


FLOAT, BYTE = torch.float32, torch.uint8
BLOCKSIZES = [("blocksize", n, "power of two") for n in (0, -64, 1, 16, 48, 65, 8192, 2**40, -2**63)]
OPERANDS = [
    ("packed", torch.zeros(299, dtype=BYTE), "packed has 299 elements; it must have 300"),
    ("packed", torch.zeros(301, dtype=BYTE), "packed has 301"),
    ("packed", torch.zeros(0, dtype=BYTE), "packed has 0"),
    ("packed", torch.zeros(300, dtype=torch.int8), "packed is Char; it must be Byte"),
    ("packed", torch.zeros(300), "packed is Float"),
    ("packed", torch.zeros(600, dtype=BYTE)[::2], "packed is not contiguous"),
    ("packed", torch.zeros(1, dtype=BYTE).expand(300), "packed is not contiguous"),
    ("packed", _short(torch.zeros(300, dtype=BYTE)), "its storage ends before"),
    ("table", torch.zeros(15), "table has 15"),
    ("table", torch.zeros(17), "table has 17"),
    ("table", torch.zeros(16, dtype=torch.float64), "table is Double"),
    ("table", torch.zeros(32)[::2], "table is not contiguous"),
    ("table", _unaligned(torch.zeros(16)), "table lies at address"),
    *BLOCKSIZES]
PLAIN = [
    ("absmax", torch.ones(9), "absmax has 9 elements; it must have 10"),
    ("absmax", torch.ones(11), "absmax has 11"),
    ("absmax", torch.ones(10).half(), "absmax is Half"),
    ("absmax", torch.ones(10, dtype=BYTE), "absmax is Byte; it must be Float"),
    ("absmax", torch.ones(20)[::2], "absmax is not contiguous"),
    ("absmax", _short(torch.ones(10)), "its storage ends before"),
    ("absmax", _unaligned(torch.ones(10)), "absmax lies at address"),
    ("blocksize", 32, "absmax has 10 elements; it must have 19"),
    ("nested_code", torch.ones(256), "1 are given; give all or none")]
NESTED = [
    ("absmax", torch.ones(10), "absmax is Float; it must be Byte"),
    ("absmax", torch.zeros(11, dtype=BYTE), "absmax has 11"),
    ("nested_absmax", None, "2 are given; give all or none"),
    ("nested_absmax", torch.ones(2), "nested_absmax has 2 elements; it must have 1"),
    ("nested_absmax", torch.ones(0), "nested_absmax has 0"),
    ("nested_absmax", torch.ones(1).double(), "nested_absmax is Double"),
    ("nested_code", torch.ones(255), "nested_code has 255"),
    ("nested_code", torch.ones(512)[::2], "nested_code is not contiguous"),
    ("nested_code", torch.ones(256).bfloat16(), "nested_code is BFloat16"),
    ("nested_offset", torch.ones(0), "nested_offset has 0"),
    ("nested_offset", torch.ones(2), "nested_offset has 2"),
    ("nested_offset", torch.tensor(1.0).double(), "nested_offset is Double"),
    ("nested_offset", None, "2 are given; give all or none")]
WRONG = [(nested, *case) for nested, cases in ((False, OPERANDS + PLAIN), (True, OPERANDS + NESTED)) for case in cases]


@needs_native
@pytest.mark.parametrize("nested", [False, True])
def test_the_right_call_passes(nested):
    given = _operands(nested)
    assert OPS.nf4_dequantize(*given.values(), 6, 100, FLOAT).shape == (6, 100)
    OPS.nf4_dequantize_out(*given.values(), torch.zeros(6, 100))


@needs_native
@pytest.mark.parametrize(("nested", "name", "value", "message"), WRONG)
def test_wrong_operands(nested, name, value, message):
    given = _operands(nested) | {name: value}
    out = torch.full((6, 100), 7.0)
    with pytest.raises(RuntimeError, match=message):
        OPS.nf4_dequantize(*given.values(), 6, 100, FLOAT)
    with pytest.raises(RuntimeError, match=message):
        OPS.nf4_dequantize_out(*given.values(), out)
    with pytest.raises(RuntimeError, match=message):
        OPS.nf4_product(*given.values(), torch.zeros(100), out[:, 0].clone())
    assert (out == 7).all()


@needs_native
@pytest.mark.parametrize(("x", "y", "message"), [
    (torch.zeros(99), torch.zeros(6), "packed has 300 elements; it must have 297"),
    (torch.zeros(100), torch.zeros(7), "packed has 300 elements; it must have 350"),
    (torch.zeros(100), torch.zeros(0), "packed has 300 elements; it must have 0"),
    (torch.zeros(100), torch.zeros(6).bfloat16(), "y is BFloat16; it must be Float"),
    (torch.zeros(100).half(), torch.zeros(6).half(), "x is Half; it must be float32 or bfloat16"),
    (torch.zeros(100).double(), torch.zeros(6).double(), "x is Double"),
    (torch.zeros(200)[::2], torch.zeros(6), "x is not contiguous"),
    (torch.zeros(100), torch.zeros(12)[::2], "y is not contiguous"),
    (_short(torch.zeros(100)), torch.zeros(6), "its storage ends before"),
    (torch.zeros(100), _short(torch.zeros(6)), "its storage ends before"),
    (_unaligned(torch.zeros(100)), torch.zeros(6), "x lies at address")])
def test_wrong_vectors(x, y, message):
    with pytest.raises(RuntimeError, match=f"nf4_product: .*{message}"):
        OPS.nf4_product(*_operands(False).values(), x, y)


@needs_native
@pytest.mark.parametrize(("rows", "columns", "dtype", "message"), [
    (-6, -100, FLOAT, "neither may be negative"), (-1, 100, FLOAT, "rows is -1"), (6, -1, FLOAT, "columns is -1"),
    (2**32, 2**31, FLOAT, "2\\^63"), (2**62, 4, FLOAT, "2\\^63"), (2**63 - 1, 1, FLOAT, "packed has 300"),
    (6, 98, FLOAT, "packed has 300 elements; it must have 294"), (7, 100, FLOAT, "packed has 300"),
    (0, 100, FLOAT, "packed has 300 elements; it must have 0"),
    (6, 100, torch.float64, "dtype is Double"), (6, 100, torch.uint8, "dtype is Byte"),
    (6, 100, torch.int64, "dtype is Long"), (6, 100, torch.float8_e4m3fn, "float32, float16 or bfloat16")])
def test_wrong_shape_or_dtype(rows, columns, dtype, message):
    with pytest.raises(RuntimeError, match=message):
        OPS.nf4_dequantize(*_operands(False).values(), rows, columns, dtype)


@needs_native
@pytest.mark.parametrize(("out", "message"), [
    (torch.zeros(600), "out has 1 dimensions"), (torch.zeros(6, 10, 10), "out has 3 dimensions"),
    (torch.zeros(6, 99), "packed has 300 elements; it must have 297"), (torch.zeros(7, 100), "packed has 300"),
    (torch.zeros(0, 100), "it must have 0"), (torch.zeros(6, 100).double(), "out is Double"),
    (torch.zeros(6, 100, dtype=torch.int16), "out is Short"), (torch.zeros(100, 6).t(), "must not overlap"),
    (torch.zeros(6, 200)[:, ::2], "must not overlap"), (torch.zeros(1, 100).expand(6, 100), "must not overlap"),
    (torch.zeros(600).as_strided((6, 100), (99, 1)), "strides 99 and 1"),
    (_short(torch.zeros(6, 100)), "its storage ends before"), (_unaligned(torch.zeros(600)).view(6, 100), "address")])
def test_wrong_out(out, message):
    with pytest.raises(RuntimeError, match=message):
        OPS.nf4_dequantize_out(*_operands(False).values(), out)


@needs_native
@pytest.mark.parametrize(("name", "value", "message"), [
    ("weight", torch.zeros(4, 8).t(), "weight is not contiguous"), ("weight", torch.zeros(64).double(), "weight is Do"),
    ("weight", torch.zeros(64, dtype=BYTE), "weight is Byte"), ("weight", _short(torch.zeros(64)), "storage ends"),
    ("weight", _unaligned(torch.zeros(64)), "address"), ("table", torch.zeros(15), "table has 15"),
    ("table", torch.zeros(16).half(), "table is Half"), *BLOCKSIZES])
def test_wrong_quantize(name, value, message):
    given = {"weight": torch.zeros(64), "table": nf4.table(CPU), "blocksize": 64} | {name: value}
    with pytest.raises(RuntimeError, match=message):
        OPS.nf4_quantize(*given.values())


@needs_native
@pytest.mark.parametrize(("name", "value", "message"), [
    ("absmax", torch.zeros(600)[::2], "absmax is not contiguous"), ("absmax", torch.zeros(9).half(), "absmax is Half"),
    ("absmax", _short(torch.zeros(300)), "storage ends"), ("offset", torch.zeros(0), "offset has 0"),
    ("offset", torch.zeros(300), "offset has 300"), ("offset", torch.tensor(0), "offset is Long"),
    ("code", torch.zeros(255), "code has 255"), ("code", torch.zeros(257), "code has 257"),
    ("code", torch.zeros(256).double(), "code is Double")])
def test_wrong_quantize_absmax(name, value, message):
    given = {"absmax": torch.zeros(300), "offset": torch.tensor(0.0), "code": nf4.nested_code(CPU)} | {name: value}
    with pytest.raises(RuntimeError, match=message):
        OPS.nf4_quantize_absmax(*given.values())


@needs_native
def test_empty_tensors_give_empty_results():
    none = [torch.zeros(0, dtype=BYTE), torch.zeros(0), None, None, None, nf4.table(CPU), 64]
    assert OPS.nf4_dequantize(*none, 0, 5, FLOAT).shape == (0, 5)
    assert OPS.nf4_dequantize(*none, 2**62, 0, FLOAT).shape == (2**62, 0)
    OPS.nf4_dequantize_out(*none, torch.zeros(3, 0))
    assert [len(t) for t in OPS.nf4_quantize(torch.zeros(0), nf4.table(CPU), 64)] == [0, 0]
    assert [len(t) for t in OPS.nf4_quantize_absmax(torch.zeros(0), torch.tensor(0.0), nf4.nested_code(CPU))] == [0, 0]


def _library(name):
    """The path of a runtime library of the compiler, or None."""
    path = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return path if os.path.isabs(path) else None


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux")
def test_random_arguments_under_sanitizers(tmp_path):
    libraries = [_library("libasan.so"), _library("libstdc++.so")]     # the second, so that exceptions find their way
    if None in libraries:
        pytest.skip("this g++ has no AddressSanitizer")
    environment = {**os.environ, "MINITUNE_SANITIZE": "1", "MINITUNE_CUDA": "0", "CXX": "g++"}
    environment.pop("MINITUNE_NATIVE", None)
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp",
                    tmp_path / "temp"], cwd=ROOT, env=environment, check=True)
    extension = next((tmp_path / "lib" / "minitune").glob("_C.*.so"))
    environment |= {"LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1",
                    "UBSAN_OPTIONS": "print_stacktrace=1"}
    run = subprocess.run([sys.executable, Path(__file__).with_name("fuzz_native.py"), extension, "20000"], cwd=tmp_path,
                         env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
