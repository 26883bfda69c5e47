"""backends: what is chosen, what can be asked for, and what is said of what is missing."""

import importlib
import os
import shutil
import sys
import warnings

import pytest
import torch

import minitune as mt
from minitune.ops import backends, nf4

CPU = torch.device("cpu")


@pytest.fixture
def no_extension(monkeypatch):
    """As after an installation without a compiler."""
    monkeypatch.setattr(backends, "_native", lambda device_type: "it was not built: no C++ compiler at installation")
    backends._announced.clear()
    yield
    backends._announced.clear()


def test_every_backend_says_whether_it_is_there():
    found = mt.backends("cpu")
    assert list(found) == [*backends.NAMES, *backends.OPS] and found["reference"] == "available"
    assert all(reason for reason in found.values()) and found["lora_images"] == "reference"


def test_the_extension_is_there_where_a_compiler_is():
    """Else every test of it would be skipped, unseen."""
    if os.environ.get("MINITUNE_NATIVE") == "0":
        pytest.skip("left out on request")
    if not shutil.which("g++"):
        pytest.skip("there is no g++")
    missing = backends.missing("native", CPU)
    assert missing is None, f"{missing}; build it: python setup.py build_ext --inplace"


def test_without_the_extension_the_reference_takes_over_and_says_why_once(no_extension, monkeypatch):
    monkeypatch.delenv("MINITUNE_BACKEND", raising=False)
    with pytest.warns(UserWarning, match=r"nf4 on cpu runs as plain PyTorch.*no C\+\+ compiler"):
        weight = nf4.quantize(torch.randn(2, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight.dequantize()


def test_asking_for_what_is_missing_is_an_error(no_extension, monkeypatch):
    with backends.use("native"), pytest.raises(mt.InputError, match="the backend 'native' was asked for"):
        nf4.quantize(torch.randn(2, 64))
    with backends.use("native"), pytest.raises(mt.InputError, match="the backend 'native' was asked for"):
        backends.choose("attention", CPU, dtype=torch.bfloat16)
    monkeypatch.setenv("MINITUNE_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(mt.InputError, match="Triton kernels need a GPU"):
        nf4.quantize(torch.randn(2, 64))


def test_an_unknown_name_is_an_error(monkeypatch):
    with pytest.raises(mt.InputError, match="must be one of native, triton, cudnn, reference"), backends.use("cuda"):
        pass
    monkeypatch.setenv("MINITUNE_BACKEND", "fast")
    with pytest.raises(mt.InputError, match="MINITUNE_BACKEND is 'fast'"):
        mt.backends()
    with pytest.raises(mt.InputError, match="MINITUNE_BACKEND is 'fast'"):
        backends.choose("nf4", CPU)


def test_an_extension_that_does_not_load_is_named(tmp_path, monkeypatch):
    """As one that was built for another torch: it is there, but its symbols are not."""
    import minitune
    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(b"\x7fELF no library")
    monkeypatch.setattr(minitune, "__path__", [str(tmp_path), *minitune.__path__])
    monkeypatch.delitem(sys.modules, "minitune._C", raising=False)
    monkeypatch.delattr(minitune, "_C", raising=False)
    backends._native.cache_clear()
    try:
        with pytest.raises(mt.InputError, match=r"_C.abi3.so: does not load with torch .*--no-build-isolation"):
            backends.missing("native", CPU)
        assert "does not load" in mt.backends("cpu")["native"]
    finally:
        backends._native.cache_clear()


def test_an_extension_of_older_sources_is_named(monkeypatch):
    if reason := backends.missing("native", CPU):
        pytest.skip(reason)
    find = importlib.import_module

    def missing_op(name):
        if name == "minitune.ops.rows_native":
            raise RuntimeError("operator minitune::of_tomorrow does not exist")
        return find(name)

    monkeypatch.setattr(backends.importlib, "import_module", missing_op)
    backends._native.cache_clear()
    try:
        with pytest.raises(mt.InputError, match=r"older sources than these \(operator .*make install"):
            backends.missing("native", CPU)
    finally:
        backends._native.cache_clear()


def test_an_instruction_set_that_is_not_there_is_named(monkeypatch):
    if reason := backends.missing("native", CPU):
        pytest.skip(reason)
    monkeypatch.setenv("MINITUNE_CPU_ISA", "sse9")
    backends._native.cache_clear()
    try:
        with pytest.raises(mt.InputError, match="MINITUNE_CPU_ISA is 'sse9'"):
            nf4.quantize(torch.randn(2, 64))
    finally:
        backends._native.cache_clear()


def test_a_backend_is_asked_of_the_ops_that_have_it():
    with backends.use("native"):
        assert backends.choose("adamw", CPU) == "reference"
        assert backends.choose("rms_norm", CPU, dtype=torch.float64) == "reference"
        assert backends.choose("rms_norm", torch.device("meta")) == "reference"


def test_a_measured_op_takes_the_library_until_something_else_was_faster(monkeypatch):
    monkeypatch.delenv("MINITUNE_BACKEND", raising=False)
    monkeypatch.setattr(backends, "missing", lambda name, device: None)
    for op, device in (("lora_matmul", CPU), ("attention", torch.device("cuda"))):
        assert backends.choose(op, device) == "reference"
        assert backends.choose(op, device, measured="triton") == "triton"
        with backends.use("reference"):
            assert backends.choose(op, device, measured="triton") == "reference"


def test_use_ends_with_its_block():
    before = backends.choose("nf4", CPU)
    with backends.use("reference"):
        assert backends.choose("nf4", CPU) == "reference"
    assert backends.choose("nf4", CPU) == before


def test_a_device_that_is_not_there():
    with pytest.raises(mt.InputError, match="backends: device is 'nonsense', which torch does not know"):
        mt.backends("nonsense")
    if not torch.cuda.is_available():
        assert mt.backends("cuda")["triton"] == mt.backends("cuda")["cudnn"] == "torch finds no GPU here"


def test_heads_and_values_lie_side_by_side_or_do_not():
    x = torch.zeros(6, 8, 4)
    apart = {"rows": x[::2], "heads": x[:, ::2], "values": x[:, :, ::2], "turned": x.transpose(0, 1),
             "expanded": x[:1].expand(6, -1, -1), "some heads": x[:, 2:5], "one head": x[:, 3:4], "dimensions": x[None]}
    assert [name for name, each in apart.items() if backends.side_by_side(each)] == ["rows", "some heads", "one head"]
