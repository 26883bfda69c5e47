"""interpreter_memory: what it has to find, in kernels that do it, and what it has to leave alone."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterError

N = tl.constexpr(16)


@triton.jit
def _shifted(x, n, shift, WAIT: tl.constexpr):
    """x[i] = x[i + shift], in one program."""
    i = tl.arange(0, N)
    values = tl.load(x + i + shift, mask=i + shift < n, other=0)
    if WAIT:
        tl.debug_barrier()
    tl.store(x + i, values, mask=i < n)


@triton.jit
def _after_maximum(x, SIZE: tl.constexpr):
    """Several warps wait for a maximum."""
    i = tl.arange(0, SIZE)
    own = tl.load(x)
    tl.store(x + i, tl.load(x + i) - tl.max(tl.load(x + i), axis=0) - own)


@triton.jit
def _one_place_read_by_all(x):
    i = tl.arange(0, N)
    value = tl.load(x + i * 0)
    tl.store(x + i * 0, value + 1, mask=i == N - 1)


@triton.jit
def _added(x):
    tl.atomic_add(x, 1)


@triton.jit
def _neighbours(x, y, ahead):
    """A program for each value: y[i] = x[i + ahead]."""
    i = tl.program_id(0)
    tl.store(y + i, tl.load(x + i + ahead))


@triton.jit
def _one_place(y):
    tl.store(y, tl.program_id(0))


@triton.jit
def _read_again(x, y, WAIT: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(x + i, i)
    if WAIT:
        tl.debug_barrier()
    tl.store(y + i, tl.load(x + (i + 1) % N))


@triton.jit
def _twice(x, WAIT: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(x + i, i)
    if WAIT:
        tl.debug_barrier()
    tl.store(x + N - 1 - i, i)


@triton.jit
def _half_as_many(x):
    i = tl.arange(0, N)
    tl.store(x + i // 2, i)


def _values(n=N.value):
    return torch.arange(n, dtype=torch.int32)


BESIDE = "touches what lies beside its tensors' elements"
FAULTS = {
    "beyond the end": (lambda: _shifted[(1,)](_values(), 99, 1, True), "touches what is none of its tensors"),
    "between rows": (lambda: _shifted[(1,)](_values(40).view(5, 8)[:, :6], 16, 0, True), BESIDE),
    "behind a part": (lambda: _shifted[(1,)](_values(40)[:12], 16, 0, True), BESIDE),
    "read and written": (lambda: _neighbours[(4,)](y := _values(), y, 1), "writes what another program read"),
    "written and read": (lambda: _neighbours[(4,)](y := _values(), y[1:], 0), "reads what another program wrote"),
    "written by two": (lambda: _one_place[(2,)](_values()), "writes what another program wrote"),
    "read at another place": (lambda: _shifted[(1,)](_values(), 16, 1, False), "read at another place of a tile"),
    "read after the write": (lambda: _read_again[(1,)](_values(), _values(), False), "reads what it has just written"),
    "read by all": (lambda: _one_place_read_by_all[(1,)](_values()), "read at another place of a tile"),
    "an atomic": (lambda: _added[(1,)](_values()), "an atomic operation"),
    "written from two places": (lambda: _twice[(1,)](_values(), False), "writes twice, from two places of a tile"),
    "written twice at once": (lambda: _half_as_many[(1,)](_values()), "writes a value twice in one tile"),
}


@pytest.mark.parametrize(("launch", "said"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found(launch, said):
    with pytest.raises(InterpreterError, match=said):
        launch()


def test_what_waits_and_what_stays_apart_is_no_fault():
    x = _values()
    _shifted[(1,)](x, 16, 1, True)
    assert x.tolist() == [*range(1, 16), 0]
    _read_again[(1,)](_values(), y := _values(), True)
    assert y.tolist() == [*range(1, 16), 0]
    _twice[(1,)](x, True)
    assert x.tolist() == list(range(15, -1, -1))
    _after_maximum[(1,)](x := _values(64), 64)
    assert x.tolist() == list(range(-63, 1))
    _neighbours[(4,)](_values(), y := _values()[3:], 1)
    assert y[:4].tolist() == [1, 2, 3, 4]
