"""setup.py: an install without compiler or torch succeeds and says what is missing; wheel and sdist have it all."""

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for a .so")
compiler = pytest.mark.skipif(not (shutil.which("g++") and shutil.which("gcc")), reason="needs a C++ compiler")
# of torch's stable ABI, added after 2.11; most of it the headers hide by themselves, not all
NEWER = (r"\b(STABLE_TORCH_ERROR_CODE_CHECK|torch_exception_\w+|torch_library_def_with_tags|torch_\w*set_python_module|"
         r"torch_tag_\w+|torch_\w*generator\w*|torch_stream_native_handle|torch_\w+_stable_ivalue|csrc/stable/generator)")
CPU_TORCH = pytest.mark.skipif(bool(torch.version.cuda), reason="beside a torch with CUDA that half is built as well")


@linux
@compiler
def test_attention_in_tiles_is_left_out_where_the_compiler_does_not_know_them(tmp_path):
    old = tmp_path / "old-g++"      # as with an assembler from before AMX
    old.write_text("#!/bin/sh\necho 'no such instruction: tileloadd' >&2\nexit 1\n")
    old.chmod(0o755)
    code = "import runpy; print(runpy.run_path('setup.py')['_takes_tiles']())"
    said = [subprocess.run([sys.executable, "-c", code, "-q", "--name"], cwd=ROOT, capture_output=True, text=True,
                           check=True, env={**os.environ, "CXX": name}).stdout.split()[-1]
            for name in ("g++", str(old), str(tmp_path / "none"))]
    version = int(subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True).stdout.split(".")[0])
    assert said == [str(version >= 11 and platform.machine() == "x86_64"), "False", "False"]
    library = ["-isystem", str(Path(torch.__file__).parent / "include"), "-isystem", sysconfig.get_path("include"),
               "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    for source in ("attention_amx", "attention_avx512", "bindings_attention", "cpu_isa"):
        subprocess.run(["g++", "-std=c++17", "-Wall", "-Werror", "-fsyntax-only", *library, f"csrc/{source}.cpp"],
                       cwd=ROOT, check=True)


@pytest.fixture
def tree(tmp_path):
    """What the build reads of the project, without what an earlier build left."""
    copy = tmp_path / "tree"
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    (copy / "minitune").mkdir()
    for name in ("__init__.py", "errors.py", "py.typed"):
        shutil.copy(ROOT / "minitune" / name, copy / "minitune")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def _setup(tree, *arguments, ok=True, **variables):
    """Output of setup.py, with environment variables; None takes one away."""
    clear = dict.fromkeys(("MINITUNE_NATIVE", "MINITUNE_CUDA", "MINITUNE_SANITIZE", "CC", "CXX"))
    settings = clear | {"TORCH_CUDA_ARCH_LIST": "9.0"} | variables
    environment = {name: value for name, value in {**os.environ, **settings}.items() if value is not None}
    run = subprocess.run([sys.executable, "setup.py", *arguments], cwd=tree, env=environment, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (run.returncode == 0) == ok, run.stdout
    return run.stdout


def _libraries(folder):
    return sorted(path.name.split(".")[0] for path in folder.rglob("*.so"))


def _said(output, name):
    """The one line on an extension that is left out."""
    lines = [line for line in output.splitlines() if line.startswith(f"minitune: minitune.{name} is not built: ")]
    assert len(lines) == 1, output
    return lines[0]


@linux
def test_left_out_on_request_and_what_an_older_build_left_goes(tree):
    old = tree / "minitune" / "_C.abi3.so"
    old.write_bytes(b"old")
    output = _setup(tree, "build_ext", "--inplace", MINITUNE_NATIVE="0")
    assert _said(output, "_C").endswith("MINITUNE_NATIVE=0") and _said(output, "_C_cuda").endswith("MINITUNE_NATIVE=0")
    assert _libraries(tree) == []


@linux
def test_no_compiler(tree):
    false = shutil.which("false")
    output = _setup(tree, "build_ext", "--build-lib", "lib", MINITUNE_CUDA="0", CC=false, CXX=false)
    assert "the build failed" in _said(output, "_C") and _said(output, "_C_cuda").endswith("MINITUNE_CUDA=0")
    assert _libraries(tree) == []


@linux
@compiler
def test_a_compile_error_is_shown(tree):
    source = tree / "csrc" / "bindings.cpp"
    source.write_text(source.read_text() + "\nthis is no C++;\n")
    output = _setup(tree, "build_ext", "--build-lib", "lib", MINITUNE_CUDA="0")
    assert _said(output, "_C") and "this is no C++" in output
    errors = re.findall(r"^(\S+): (?:fatal )?error:", output, re.MULTILINE)
    last = len(source.read_text().splitlines())
    assert errors and all(place.startswith(f"csrc/bindings.cpp:{last}:") for place in errors), output
    assert _libraries(tree) == []


@pytest.mark.parametrize("missing", [True, False])
def test_that_the_cuda_file_was_not_compiled_is_said_at_the_end(missing):
    said = []
    reports = [SimpleNamespace(longrepr=("file", 3, "Skipped: needs nvcc" if missing else "Skipped: needs a GPU"))] * 2
    reporter = SimpleNamespace(stats={"skipped": reports}, write_line=said.append)
    importlib.import_module("tests.conftest").pytest_terminal_summary(reporter)
    assert said == ["NOT COMPILED: csrc/nf4_cuda.cu; 2 tests skipped, there is no nvcc"] * missing


def test_only_what_torch_2_11_has_is_called():
    """The headers at hand are newer; what they added since would end the build beside torch 2.11."""
    for path in (ROOT / "csrc").iterdir():
        found = re.findall(NEWER, path.read_text())
        assert not found, f"{path.name}: {found}"
    assert "-DTORCH_TARGET_VERSION=0x020b000000000000" in (ROOT / "setup.py").read_text()


def test_no_torch(tree):
    (tree / "torch.py").write_text("raise ImportError('no torch here')\n")      # found before the real one
    output = _setup(tree, "build_ext", "--build-lib", "lib", PYTHONPATH=str(tree))
    assert "no torch here" in _said(output, "_C") and "--no-build-isolation" in _said(output, "_C")


def test_wrong_settings(tree):
    assert "must be 0, 1 or auto" in _setup(tree, "build_ext", "--build-lib", "lib", ok=False, MINITUNE_CUDA="yes",
                                            CC="false", CXX="false")


@linux
@compiler
@pytest.mark.skipif(not NVCC, reason="needs nvcc")
def test_the_cuda_half_is_built_on_request(tree):
    output = _setup(tree, "build_ext", "--build-lib", "lib", MINITUNE_CUDA="1")
    assert _libraries(tree / "lib") == ["_C", "_C_cuda"] and "arch=compute_90,code=sm_90" in output
    kernels = tree / "csrc" / "nf4_cuda.cu"
    kernels.write_text(kernels.read_text() + "\nthis is no CUDA;\n")
    output = _setup(tree, "build_ext", "--build-lib", "lib", ok=False, MINITUNE_CUDA="1")
    assert "MINITUNE_CUDA=1, but minitune._C_cuda cannot be built" in output
    assert "must be" not in output and "'sm_90'; write it like" in _setup(
        tree, "build_ext", "--build-lib", "lib", ok=False, MINITUNE_CUDA="1", TORCH_CUDA_ARCH_LIST="sm_90")


@linux
@compiler
@CPU_TORCH
def test_sdist_and_wheel(tree):
    _setup(tree, "-q", "sdist")
    archive = next((tree / "dist").glob("*.tar.gz"))
    with tarfile.open(archive) as files:
        names = {name.split("/", 1)[1] for name in files.getnames() if "/" in name}
        files.extractall(tree / "unpacked", filter="data")
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} <= names
    assert {"setup.py", "MANIFEST.in", "minitune/py.typed"} <= names
    unpacked = next((tree / "unpacked").iterdir())
    assert _said(_setup(unpacked, "bdist_wheel"), "_C_cuda").endswith("is built without CUDA")
    wheel = next((unpacked / "dist").glob("*.whl"))
    assert "-cp311-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as files:
        assert "minitune/_C.abi3.so" in files.namelist() and not any("csrc" in name for name in files.namelist())
