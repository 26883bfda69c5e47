"""What nvcc makes of csrc/nf4_cuda.cu, without a GPU: no spills, few registers, wide loads and stores."""

import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "csrc" / "nf4_cuda.cu"
BINARIES = [Path(home, "bin") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
NVCC = next((str(folder / "nvcc") for folder in BINARIES if (folder / "nvcc").exists()), shutil.which("nvcc"))
FAST = {"dequantize_words": 6, "quantize_full": 3}
"""How many instances of each fast kernel: dtypes, plain and nested; dtypes."""
REGISTERS = {89: 40}
"""As many as leave room for all threads that a processor takes at a time: 1,536 there, 2,048 and so 32 elsewhere."""
pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


def _disassembler():
    triton = find_spec("triton")
    folders = [*BINARIES, *([Path(triton.origin).parent / "backends/nvidia/bin"] if triton and triton.origin else [])]
    found = next((str(folder / "cuobjdump") for folder in folders if (folder / "cuobjdump").exists()), None)
    return found or shutil.which("cuobjdump")


@pytest.fixture(scope="module", params=[80, 89, 90, 100], ids="sm_{}".format)
def compiled(request, tmp_path_factory):
    """(the cubin, what ptxas says, the registers that a fast kernel may take)."""
    cubin = tmp_path_factory.mktemp("cuda") / "nf4.cubin"
    run = subprocess.run([NVCC, "-cubin", f"-arch=sm_{request.param}", "-O3", "-std=c++17", "-Xptxas=-v",
                          "-Werror=all-warnings", "-o", cubin, SOURCE], capture_output=True, text=True)
    if "Unsupported gpu architecture" in run.stderr:
        pytest.skip(f"this nvcc does not know sm_{request.param}")
    assert run.returncode == 0, run.stderr
    return cubin, run.stderr, REGISTERS.get(request.param, 32)


def test_registers_and_spills(compiled):
    pattern = r"properties for (\S+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n" \
              r".*?Used (\d+) registers"
    kernels = re.findall(pattern, compiled[1])
    for fast, count in FAST.items():
        assert sum(fast in name for name, *_ in kernels) == count, compiled[1]
    for name, stack, stores, loads, registers in kernels:
        assert (stack, stores, loads) == ("0", "0", "0"), f"{name} spills"
        if any(fast in name for fast in FAST):
            assert int(registers) <= compiled[2], f"{name} takes {registers} registers"


def _instructions(compiled, kernel):
    """The disassembly of each instance of a kernel."""
    tool = _disassembler()
    if tool is None:
        pytest.skip("needs cuobjdump: of the CUDA toolkit, or triton's")
    run = subprocess.run([tool, "-sass", compiled[0]], capture_output=True, text=True, check=True)
    functions = [part for part in run.stdout.split("Function : ")[1:] if kernel in part.split("\n", 1)[0]]
    assert len(functions) == FAST[kernel]
    return functions


def test_dequantize_stores_16_bytes(compiled):
    for body in _instructions(compiled, "dequantize_words"):
        stores = re.findall(r"\bSTG\S*", body)
        assert stores and all("128" in store for store in stores), f"{body[:80]}: {stores}"
        assert not re.search(r"\b(LDL|STL|FFMA)\b", body), f"{body[:80]}: local memory, or a fused multiply-add"


def test_quantize_loads_16_bytes_and_stores_4(compiled):
    for body in _instructions(compiled, "quantize_full"):
        loads, stores = re.findall(r"\bLDG\S*", body), re.findall(r"\bSTG\S*", body)
        # the midpoints' two levels are the only narrow loads; a packed word and an absmax are what is stored
        assert sum("128" not in load for load in loads) <= 2 and any("128" in load for load in loads), loads
        assert stores and not any(re.search(r"\.[US](8|16)\b", store) for store in stores), stores
        assert not re.search(r"\b(LDL|STL)\b", body), f"{body[:80]}: local memory"
