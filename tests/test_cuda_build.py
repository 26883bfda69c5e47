"""What nvcc makes of csrc/nf4_cuda.cu, without a GPU: no spills, few registers and wide stores in the fast kernel."""

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
FAST = "dequantize_words"
pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


def _disassembler():
    triton = find_spec("triton")
    folders = [*BINARIES, *([Path(triton.origin).parent / "backends/nvidia/bin"] if triton and triton.origin else [])]
    found = next((str(folder / "cuobjdump") for folder in folders if (folder / "cuobjdump").exists()), None)
    return found or shutil.which("cuobjdump")


@pytest.fixture(scope="module", params=[80, 89, 90, 100], ids="sm_{}".format)
def compiled(request, tmp_path_factory):
    """(the cubin, what ptxas says)."""
    cubin = tmp_path_factory.mktemp("cuda") / "nf4.cubin"
    run = subprocess.run([NVCC, "-cubin", f"-arch=sm_{request.param}", "-O3", "-std=c++17", "-Xptxas=-v",
                          "-Werror=all-warnings", "-o", cubin, SOURCE], capture_output=True, text=True)
    if "Unsupported gpu architecture" in run.stderr:
        pytest.skip(f"this nvcc does not know sm_{request.param}")
    assert run.returncode == 0, run.stderr
    return cubin, run.stderr


def test_registers_and_spills(compiled):
    pattern = r"properties for (\S+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n" \
              r".*?Used (\d+) registers"
    kernels = re.findall(pattern, compiled[1])
    assert sum(FAST in name for name, *_ in kernels) == 6, compiled[1]      # 3 dtypes, plain and nested
    for name, stack, stores, loads, registers in kernels:
        assert (stack, stores, loads) == ("0", "0", "0"), f"{name} spills"
        assert FAST not in name or int(registers) <= 40, f"{name} takes {registers} registers"


def test_stores_of_16_bytes(compiled):
    tool = _disassembler()
    if tool is None:
        pytest.skip("needs cuobjdump: of the CUDA toolkit, or triton's")
    run = subprocess.run([tool, "-sass", compiled[0]], capture_output=True, text=True, check=True)
    functions = [part for part in run.stdout.split("Function : ")[1:] if FAST in part.split("\n", 1)[0]]
    assert len(functions) == 6
    for body in functions:
        stores = re.findall(r"\bSTG\S*", body)
        assert stores and all("128" in store for store in stores), f"{body[:80]}: {stores}"
        assert not re.search(r"\b(LDL|STL|FFMA)\b", body), f"{body[:80]}: local memory, or a fused multiply-add"
