"""vector_math: MKL's vector functions are called on one thread before several call them at once."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minitune
from minitune.ops.vector_math import FUNCTIONS

IN_MKL = {"acos", "asin", "atan", "cos", "cosh", "erf", "erfc", "erfinv", "exp", "expm1", "log", "log10", "log1p",
          "log2", "sin", "sinh", "sqrt", "tan", "tanh"}
"""What ATen hands to MKL's vector functions, one version or another of it."""

FIRST_CALLS = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode

class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor):
            print(function.overloadpacket.__name__, args[0].dtype, args[0].numel())
        return function(*args, **(kwargs or {}))

with Seen():
    import minitune.ops.rope
"""

STORM = """
import os, sys
import torch

def first_is_second():
    torch.set_num_threads(4)
    for _ in range(20):         # they are awake
        awake.add_(1)
    import minitune.ops
    return angles.cos().equal(angles.cos())

torch.set_num_threads(1)
awake, angles = torch.zeros(1 << 16), torch.linspace(0, 100, 1 << 18)
wrong = 0
for _ in range(int(sys.argv[1])):
    child = os.fork()
    if not child:
        os._exit(0 if first_is_second() else 1)
    wrong += os.waitpid(child, 0)[1] != 0
print(wrong)
"""


def _called() -> set[str]:
    """Names of methods called in minitune's sources outside of the kernels, but for those of `math`."""
    names = set()
    for file in Path(minitune.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Attribute) and ast.unparse(called.value) not in ("math", "tl", "cmath"):
                names.add(called.attr.removesuffix("_"))
    return names


def test_what_minitune_calls_is_settled():
    assert {"cos", "sqrt"} <= _called()
    assert _called() & IN_MKL <= set(FUNCTIONS) <= IN_MKL


def test_importing_an_op_settles_them_on_one_element():
    seen = subprocess.run([sys.executable, "-c", FIRST_CALLS], check=True, capture_output=True, text=True).stdout
    calls = [line.split() for line in seen.splitlines()]
    for name in FUNCTIONS:
        for dtype in ("torch.float32", "torch.float64"):
            assert [n for function, of, n in calls if (function, of) == (name, dtype)] == ["1"], (name, dtype)


@pytest.mark.slow
@pytest.mark.skipif("2024.2" not in torch.__config__.show(), reason="another MKL")
def test_no_thread_of_a_fresh_process_gets_inaccurate_kernels():
    """Without `settle` a few of these processes do."""
    storms = [subprocess.Popen([sys.executable, "-c", STORM, "1000"], stdout=subprocess.PIPE, text=True)
              for _ in range(6)]
    assert [storm.communicate()[0] for storm in storms] == ["0\n"] * 6
