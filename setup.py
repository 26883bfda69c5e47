"""The native half of the build: minitune._C for a CPU, minitune._C_cuda where nvcc is. All else is in pyproject.toml.

An install succeeds without them: what cannot be built is left out with one line that says why.

MINITUNE_NATIVE=0        leaves both out
MINITUNE_CUDA=0 or 1     leaves the CUDA half out, or builds it whatever torch this is (a check that it compiles: beside
                         a torch without CUDA it cannot be imported) and fails if that fails
TORCH_CUDA_ARCH_LIST     what to compile for; if unset, the GPUs at hand, else 8.0;8.9;9.0+PTX
MINITUNE_SANITIZE=1      minitune._C with AddressSanitizer and UndefinedBehaviorSanitizer, for tests
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

# -ffp-contract=off: a fused multiply-add changes results. 0x020b…: the stable ABI of torch 2.11. 0x030b…: that of
# Python 3.11. gcc 12 takes the undefined registers in its own AVX-512 header for a fault of ours.
FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math",
         "-fvisibility=hidden", "-g0", "-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized",
         "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030b0000"]
TILES = """#include <immintrin.h>
#pragma GCC target("amx-tile,amx-bf16,avx512bf16")
void tiles() { _tile_zero(0); _tile_dpbf16ps(0, 1, 2); _tile_release(); }
"""
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden"]
HEADERS = ["setup.py", *(f"csrc/{name}.h" for name in (
    "nf4", "nf4_cpu", "bindings", "checks", "checks_rows", "cpu_isa", "rows", "rows_kernels", "adamw_8bit_kernels",
    "attention", "attention_parts", "attention_forward", "attention_backward", "tiles", "tiles_amx", "tiles_avx512"))]

CPU = Extension(
    "minitune._C", [f"csrc/{name}.cpp" for name in (
        "bindings", "cpu_isa", "nf4_cpu", "nf4_cpu_avx2", "nf4_cpu_avx512", "bindings_rows", "rows_portable",
        "rows_avx2", "rows_avx512", "bindings_attention", "attention_amx", "attention_avx512",
        "bindings_products", "bindings_adamw_8bit")],
    depends=HEADERS, extra_compile_args=FLAGS, libraries=["torch_cpu"], py_limited_api=True, language="c++")
CUDA = Extension(
    "minitune._C_cuda", ["csrc/bindings_cuda.cpp"], depends=[*HEADERS, "csrc/nf4_cuda.cu"], extra_compile_args=FLAGS,
    define_macros=[("USE_CUDA", None)], libraries=["torch_cpu", "cudart_static", "dl", "rt", "pthread"],
    py_limited_api=True, language="c++")


class Project(Distribution):
    """pyproject.toml says more than a setuptools before 77 can read; `setup.py build_ext` needs none of it."""

    def parse_config_files(self, *arguments, **named):
        if "build_ext" not in sys.argv:
            super().parse_config_files(*arguments, **named)


class NotBuilt(Exception):
    """Why an extension is left out."""


class BuildNative(build_ext):
    """Builds what can be built, and takes away what an earlier build left of the rest."""

    def run(self):
        inplace, self.left_out = self.inplace, []
        super().run()
        for name in self.left_out:
            for root in [self.build_lib, *([""] if inplace else [])]:
                Path(root, self.get_ext_filename(name)).unlink(missing_ok=True)

    def build_extensions(self):
        self.extensions = [extension for extension in self.extensions if self._build(extension)]

    def _build(self, extension):
        forced = extension is CUDA and os.environ.get("MINITUNE_CUDA") == "1"
        try:
            _prepare(extension)
            if extension is CUDA and self._is_old(extension):
                extension.extra_objects = [self._compile_kernels()]
            self.build_extension(extension)
        except (NotBuilt, BaseError, CCompilerError) as error:
            reason = str(error) if isinstance(error, NotBuilt) else f"the build failed, see above ({str(error)[:80]}…)"
            if forced:
                raise SystemExit(f"MINITUNE_CUDA=1, but {extension.name} cannot be built: {reason}") from None
            print(f"minitune: {extension.name} is not built: {reason}", flush=True)
            self.left_out.append(extension.name)
        return extension.name not in self.left_out

    def _is_old(self, extension):
        """Whether it has to be built: what setuptools asks too, but only after nvcc has had its seconds."""
        built, sources = Path(self.get_ext_fullpath(extension.name)), [*extension.sources, *extension.depends]
        return self.force or not built.exists() or any(
            Path(source).stat().st_mtime > built.stat().st_mtime for source in sources)

    def _compile_kernels(self):
        nvcc, home = _find_nvcc()
        CUDA.library_dirs += [str(home / name) for name in ("lib64", "lib") if (home / name).is_dir()]
        target = Path(self.build_temp, "csrc", "nf4_cuda.o")
        target.parent.mkdir(parents=True, exist_ok=True)
        self.spawn([str(nvcc), "-c", "csrc/nf4_cuda.cu", "-o", str(target), *NVCC_FLAGS, *_architectures()])
        return str(target)


def _prepare(extension):
    """Point an extension at the torch in use. NotBuilt where it is not wanted or cannot be."""
    if os.environ.get("MINITUNE_NATIVE") == "0":
        raise NotBuilt("MINITUNE_NATIVE=0")
    try:
        import torch
    except Exception as error:      # a half-installed torch fails in many ways, and the install has to go on
        raise NotBuilt(f"torch cannot be imported ({error}); install it first, then minitune with "
                       "--no-build-isolation") from None
    if extension is CPU and _takes_tiles():
        extension.define_macros = [*extension.define_macros, ("MINITUNE_TILES", None)]
    home = Path(torch.__file__).parent
    extension.include_dirs = [str(home / "include")]
    extension.library_dirs = [str(home / "lib")]
    if extension is CPU and os.environ.get("MINITUNE_SANITIZE") == "1":
        extension.extra_compile_args = [*FLAGS, "-O1", "-g", *SANITIZE]
        extension.extra_link_args = SANITIZE
    if extension is CUDA:
        asked = os.environ.get("MINITUNE_CUDA") or "auto"
        if asked not in ("0", "1", "auto"):
            raise SystemExit(f"MINITUNE_CUDA is {asked!r}; it must be 0, 1 or auto")
        if asked == "0" or (asked == "auto" and not torch.version.cuda):
            raise NotBuilt("MINITUNE_CUDA=0" if asked == "0" else f"torch {torch.__version__} is built without CUDA")
        if torch.version.cuda:
            extension.libraries = [*extension.libraries, "torch_cuda"]


def _takes_tiles():
    """Whether the compiler, and the assembler behind it, know AMX, the youngest set that attention is built for."""
    compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++").split()
    try:
        return not subprocess.run([*compiler, "-x", "c++", "-c", "-", "-o", os.devnull], input=TILES, text=True,
                                  capture_output=True).returncode
    except OSError:
        return False        # no compiler: the build will say so


def _find_nvcc():
    """(nvcc, the toolkit's folder). The nvcc on the PATH may be a wrapper, so it is asked where its home is."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and Path(home, "bin", "nvcc").exists():
            return Path(home, "bin", "nvcc"), Path(home)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise NotBuilt("there is no nvcc: set CUDA_HOME, or put it on the PATH")
    answer = subprocess.run([nvcc, "--dryrun", "-c", "csrc/nf4_cuda.cu"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", answer.stdout + answer.stderr, re.MULTILINE)
    if top is None:
        raise NotBuilt(f"{nvcc} does not say where its toolkit lies: set CUDA_HOME")
    return Path(nvcc), Path(top[1])


def _architectures():
    """nvcc's flags for what TORCH_CUDA_ARCH_LIST names, else for the GPUs that torch sees."""
    import torch

    names = re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if names == [""] and torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        found = sorted({torch.cuda.get_device_capability(device) for device in devices})
        names = ["{}.{}".format(*capability) for capability in found]
        names[-1] += "+PTX"      # for a later GPU than those at hand
    flags = []
    for name in names if names != [""] else ["8.0", "8.9", "9.0+PTX"]:
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if match is None:
            raise NotBuilt(f"TORCH_CUDA_ARCH_LIST has {name!r}; write it like 8.0;9.0+PTX")
        number = match[1] + match[2]
        flags += [f"-gencode=arch=compute_{number},code=sm_{number}"]
        flags += [f"-gencode=arch=compute_{number},code=compute_{number}"] if match[3] else []
    return flags


# A free-threaded Python has no limited API.
LIMITED = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"bdist_wheel": {"py_limited_api": "cp311"}}
setup(distclass=Project, ext_modules=[CPU, CUDA], cmdclass={"build_ext": BuildNative}, options=LIMITED)
