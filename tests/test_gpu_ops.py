"""Every op on a GPU at the shapes of the models it is for: right where new memory is poisoned, the same bits twice, and
nothing for compute-sanitizer to find. A tiny case runs on a CPU as well.

A model's case takes up to 11 GB of a GPU's memory: six at a time fit on one of 80 GB.
"""

import contextlib
import gc
import json
import os
import re
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.utils.deterministic

from benchmarks.fake_gpu import device as fake
from benchmarks.gpu import run_bounded
from minitune.config import ModelConfig, Rope
from minitune.ops import backends, checks, rms_norm, tuned
from minitune.ops.deterministic import deterministic

ROOT = Path(__file__).parents[1]
BIG = {"n_layers": 32, "head_dim": 128}
LLAMA_2_7B = ModelConfig(**BIG, vocab_size=32_000, d_model=4096, n_heads=32, n_kv_heads=32, d_ff=11_008)
LLAMA_3_8B = ModelConfig(**BIG, vocab_size=128_256, d_model=4096, n_heads=32, n_kv_heads=8, d_ff=14_336,
                         rope=Rope(theta=500_000.0))
QWEN_2_7B = ModelConfig(**BIG | {"n_layers": 28}, family="qwen2", vocab_size=152_064, d_model=3584, n_heads=28,
                        n_kv_heads=4, d_ff=18_944, norm_eps=1e-6, rope=Rope(theta=1_000_000.0), qkv_bias=True)
TINY = ModelConfig(n_layers=1, head_dim=16, vocab_size=97, d_model=48, n_heads=4, n_kv_heads=2, d_ff=80)
NEEDED = 24e9
"""Bytes of a GPU from which the models' cases run, with room for what the allocator cannot use."""
CASES = {**{f"{name}, {tokens} tokens, {way}": (config, tokens, "cuda", way)
            for name, config, tokens in (("Llama-2-7B", LLAMA_2_7B, 4096), ("Llama-3-8B", LLAMA_3_8B, 2048),
                                         ("Qwen2-7B", QWEN_2_7B, 2048), ("Qwen2-7B", QWEN_2_7B, 1003))
            for way in ("by default", "triton")},
         "tiny, on a CPU": (TINY, 37, "cpu", "by default")}
"""Model, tokens (1,003: no block size divides them), device, backend."""
every_case = pytest.mark.parametrize(("config", "tokens", "place", "way"), [
    pytest.param(*case, id=name, marks=[pytest.mark.gpu] * (case[2] == "cuda")) for name, case in CASES.items()])


@contextlib.contextmanager
def poisoned_memory(device):
    """Within it torch.empty and its like give NaN, and the largest number in integers: what was never written shows.

    torch fills it in its deterministic mode, which only warns here: a product of cuBLAS would ask for a workspace
    setting.
    """
    with deterministic(warn_only=True, fill=True):
        assert torch.empty(1000, dtype=torch.bfloat16, device=device).isnan().all(), "new memory is not filled"
        yield


def _chosen(way, device):
    """Within it ops take `way`. The test is skipped where that is not there, or the GPU too small."""
    if device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < NEEDED:
        pytest.skip(f"needs a GPU of {NEEDED / 1e9:.0f} GB")
    if way == "by default":
        return contextlib.nullcontext()
    reason = backends.missing(way, device)
    if reason:
        pytest.skip(reason)
    stack = contextlib.ExitStack()
    stack.enter_context(backends.use(way))
    stack.enter_context(tuned.forced(rms_norm_s=way))       # the kernel that gives the thin product too, at any size
    stack.enter_context(mock.patch.object(rms_norm, "MIN_ROWS", 1))
    return stack


def _ops_of(backend, device):
    """All that have it there."""
    of_cpu = (*backends.ROWS, *backends.TILES) if backend == "native" and device.type == "cuda" else ()
    return {op for op, has in backends.OPS.items() if backend in has and op not in of_cpu}


@pytest.fixture(autouse=True)
def _memory_goes_back():
    """To the GPU, for tests beside this one."""
    yield
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def _bits(values):
    return values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.element_size()])


@every_case
@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")
def test_every_op_is_right_in_poisoned_memory(config, tokens, place, way):
    device = torch.device(place)
    with _chosen(way, device), poisoned_memory(device):
        found = list(checks.run(config, tokens, torch.bfloat16, device))
    assert {check.op for check in found} | {"softmax"} == set(backends.OPS)     # that one is within attention
    assert not [check for check in found if not check.right]
    if way != "by default":
        assert {check.op for check in found if check.backend == way} == _ops_of(way, device)


@every_case
def test_every_op_has_the_same_bits_twice(config, tokens, place, way):
    """Not in torch's deterministic mode: nobody trains in it. The second run finds other memory than the first, since
    the first one's results are still held."""
    device = torch.device(place)
    ran = set()
    with _chosen(way, device):
        for case in checks.cases(config, tokens, torch.bfloat16, device):
            once, again = case.results("ours"), case.results("ours")
            differ = [what for what, value in once.items() if not torch.equal(_bits(value), _bits(again[what]))]
            assert not differ, f"{case.op} by {case.backend}: {', '.join(differ)} have other bits"
            ran.add(case.op)
    assert ran | {"softmax"} == set(backends.OPS)


@pytest.mark.parametrize("place", [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def test_poisoned_memory_is_poisoned_and_then_as_before(place):
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    try:
        torch.utils.deterministic.fill_uninitialized_memory = False
        with poisoned_memory(place):
            known = torch.zeros(1000, device=place)
            apart = torch.empty_strided((3, 5), (8, 1), device=place)
            for new in (torch.empty_like(known), known.new_empty(7, 9), apart, known.double().new_empty(9)):
                assert new.isnan().all()
            assert (torch.empty(1000, dtype=torch.uint8, device=place) == 255).all()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch._C._set_deterministic_algorithms(False, warn_only=False)
        torch.utils.deterministic.fill_uninitialized_memory = True


# ---- compute-sanitizer ----------------------------------------------------------------------------------------------
PROGRAM = str(ROOT / "tests" / "gpu_small_ops.py")
TIME = 240
"""Seconds of one run."""
FINDING = re.compile(r"^=+ .*(Invalid |Misaligned |Out-of-range|hazard detected|Race reported)", re.MULTILINE)
UNFIT = re.compile(r"^=+ (.*(?:Device not supported|Unable to|Failed to initialize).*)$", re.MULTILINE)
CLEAN = re.compile(r"^=+ (ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: .*\b0 errors)", re.MULTILINE)


def _run(words, **variables):
    """(exit code, output) of a program; one that takes too long is a failure."""
    out, err, code = run_bounded(words, TIME, ROOT, **variables)
    if code is None:
        pytest.fail(f"{' '.join(words)}: not done after {TIME} s; until then it said:\n{out[-4000:]}\n{err}")
    return code, f"{out}\n{err}" if err else out


def _sanitizer():
    """The path of compute-sanitizer, or None."""
    folders = [os.environ.get("PATH", ""), *(os.path.join(home, "bin") for home in (os.environ.get("CUDA_HOME"),
                                                                                   "/usr/local/cuda") if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def verdict(code, output):
    """None where the sanitizer watched the whole program and found nothing; else ("skip" or "fail", why)."""
    unfit = UNFIT.search(output)
    if unfit and not FINDING.search(output):
        return "skip", f"compute-sanitizer says: {unfit[1]}"
    if code or not CLEAN.search(output) or "\nall ran\n" not in output:      # exit code 0 alone proves nothing
        return "fail", f"exit code {code}\n{output[:6000]}\n…\n{output[-2000:]}"
    return None


HEAD, CLEAN_END = "========= COMPUTE-SANITIZER\n", "========= ERROR SUMMARY: 0 errors\n"
READ = "========= Invalid __global__ read of size 4 bytes\n"
UNSUPPORTED = '========= Error: Device not supported. Please refer to the "Supported Devices" section\n'


@pytest.mark.parametrize(("code", "output", "expected"), [
    (0, f"{HEAD}\nall ran\n{CLEAN_END}", None),
    (0, f"{HEAD}\nall ran\n========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)\n", None),
    (0, f"{HEAD}{CLEAN_END}", "fail"), (0, f"{HEAD}\nall ran\n", "fail"), (1, f"{HEAD}\nall ran\n{CLEAN_END}", "fail"),
    (9, f"{HEAD}{READ}\nall ran\n========= ERROR SUMMARY: 1 error\n", "fail"),
    (9, f"{HEAD}\nall ran\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n", "fail"),
    (9, f"{HEAD}{READ}========= Unable to go on\n", "fail"),
    (0, f"{HEAD}{UNSUPPORTED}\nall ran\n", "skip"), (9, f"{HEAD}{UNSUPPORTED}{CLEAN_END}", "skip")],
    ids=["clean", "warnings", "the program did not run", "no summary", "the program failed", "an error", "a race",
         "an error, then trouble", "unsupported", "unsupported, with an error's exit code"])
def test_the_sanitizers_words_are_understood(code, output, expected):
    found = verdict(code, output)
    assert (found and found[0]) == expected


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(2 * TIME + 60)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing_at_small_shapes(tool):
    sanitizer = _sanitizer()
    if sanitizer is None:
        pytest.skip("compute-sanitizer is neither in PATH nor in $CUDA_HOME/bin nor in /usr/local/cuda/bin")
    _check_small_ops("cuda")        # which also leaves the compiled kernels behind, so that the tool does not wait
    words = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only",
             "--report-api-errors", "no", sys.executable, PROGRAM]      # of failed calls torch itself tells
    found = verdict(*_run(words, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))   # each tensor in memory of its own
    if found and found[0] == "skip":
        pytest.skip(found[1])
    assert found is None, found[1]


@pytest.mark.parametrize("place", [pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.slow]), "cpu"])
def test_the_program_for_the_sanitizer_runs_every_backend_that_is_there(place):
    _check_small_ops(place)


def _check_small_ops(place):
    code, output = _run([sys.executable, PROGRAM, "--device", place])
    assert code == 0 and "\nall ran\n" in output, output[-4000:]
    device = torch.device(place)
    for name in ("triton", "native"):
        ran = re.search(rf"^{name} ran (.*)$", output, re.MULTILINE)
        assert bool(ran) == (backends.missing(name, device) is None), output
        assert not ran or _ops_of(name, device) - {"softmax"} <= set(ran[1].split(", ")), output


ON_A_FAKE_GPU = """
import json, sys
from benchmarks.fake_gpu import device
device.load(sys.argv[1])
from tests import gpu_small_ops
with device.fake_gpu() as watch:
    gpu_small_ops.main([])
print(json.dumps([*watch.launches, *watch.ops]))
device.leave()
"""


def test_the_program_for_the_sanitizer_launches_every_kernel(tmp_path):
    """Seen without a GPU: on tensors that have no values."""
    reason = fake.missing()
    if reason:
        pytest.skip(reason)
    code, output = _run([sys.executable, "-W", "ignore", "-c", ON_A_FAKE_GPU, str(fake.build(tmp_path))])
    assert code == 0, output[-4000:]
    launched = set(json.loads(output.splitlines()[-1]))
    kernels = {name for path in (ROOT / "kernels").glob("*.py")
               for name in re.findall(r"^@triton\.jit.*\ndef ([a-z]\w*)\(", path.read_text(), re.MULTILINE)}
    assert len(kernels) > 20 and not kernels - launched
    assert {"minitune::nf4_quantize", "minitune::nf4_quantize_absmax", "minitune::nf4_dequantize",
            "minitune::nf4_dequantize_out"} <= launched
