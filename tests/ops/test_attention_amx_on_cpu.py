"""csrc/attention_amx.cpp without AMX: its tile registers in plain C++ (amx_on_cpu.h), for the layout and the indices.

A CPU that has them runs it as it is, in test_attention_cpu.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from minitune.ops import attention, backends
from minitune.ops.documents import Documents
from tests.tolerance import check

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
BF16 = torch.bfloat16
POINTER, LONG = ctypes.c_void_p, ctypes.c_int64
pytestmark = pytest.mark.skipif(backends.backends("cpu")["attention"] != "native" or not shutil.which("g++"),
                                reason="no CPU with AVX-512 and bf16, or no g++")
DRIVER = """#include "attention.h"
#include <cstdlib>
extern "C" void run(const attention::Work* work, bool backward) {
  const attention::Path& path = attention::kAmx;
  const size_t room = (backward ? path.room_backward : path.room_forward)(*work);
  void* memory = std::aligned_alloc(64, room);
  for (int64_t task = 0; task < work->documents * work->kv_heads * work->splits; ++task)
    (backward ? path.backward : path.forward)(*work, task, memory);
  std::free(memory);
}
"""
CASES = {       # lengths, heads, kv_heads, head_dim, window, parts of a key head's queries
    "ragged": ((37, 1, 64), 4, 2, 20, None, 2), "one head": ((70,), 1, 1, 64, None, 1),
    "several chunks": ((290,), 2, 1, 64, None, 1), "window": ((100, 33), 2, 2, 96, 40, 1)}


class Heads(ctypes.Structure):
    _fields_ = [("data", POINTER), ("pitch", LONG)]


class Work(ctypes.Structure):
    _fields_ = [("starts", POINTER), *((name, LONG) for name in ("documents", "tokens", "heads", "kv_heads",
                                                                 "head_dim", "splits", "window")),
                ("scale", ctypes.c_float), *((name, Heads) for name in ("q", "k", "v", "out")), ("lse", POINTER),
                *((name, Heads) for name in ("dout", "dq", "dk", "dv"))]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    place = tmp_path_factory.mktemp("amx")
    (place / "driver.cpp").write_text(DRIVER)
    run = subprocess.run(["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wno-maybe-uninitialized",
                          "-Wno-uninitialized", "-DMINITUNE_TILES", "-I", str(CSRC), "-include",
                          str(HERE / "amx_on_cpu.h"), str(CSRC / "attention_amx.cpp"), str(place / "driver.cpp"),
                          "-o", str(place / "amx.so")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return ctypes.CDLL(str(place / "amx.so"))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_backward(case, library):
    lengths, heads, kv_heads, d, window, splits = case
    tokens, documents = sum(lengths), Documents.from_lengths(lengths)
    given = {name: torch.randn(tokens, n, d).to(BF16) for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads),
                                                                      ("dout", heads))}
    found = {name: torch.full_like(given[like], float("nan")) for name, like in (("out", "q"), ("dq", "q"), ("dk", "k"),
                                                                                 ("dv", "v"))}
    lse = torch.empty(heads, tokens)
    rows = {name: Heads(x.data_ptr(), x.shape[1] * d) for name, x in (given | found).items()}
    work = Work(documents.cu_seqlens.data_ptr(), len(lengths), tokens, heads, kv_heads, d, splits, window or tokens,
                d**-0.5, lse=lse.data_ptr(), **rows)
    library.run(ctypes.byref(work), False)
    work.splits = 1
    library.run(ctypes.byref(work), True)
    plain, truth = (_reference(given, documents, window, dtype) for dtype in (BF16, torch.float64))
    for name, value in found.items():
        check(name, value, plain[name], truth[name])


def _reference(given, documents, window, dtype):
    """out, dq, dk and dv of plain PyTorch."""
    q, k, v = (given[name].to(dtype, copy=True).requires_grad_() for name in ("q", "k", "v"))
    out = attention.reference(q, k, v, documents, window)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), given["dout"].to(dtype))
    return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}
