"""`make gpu`'s parts on tiny shapes on the CPU, so that they do not rot where there is no GPU."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    gpu,
    gpu_attention,
    gpu_nf4,
    gpu_products,
    gpu_step,
    harness,
    tables_gpu,
    tables_nf4,
)
from benchmarks.shapes import SEVEN_B, SIZES, TINY


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")


def flat(lines: list[str]) -> str:
    """A page without the spaces that pad its tables."""
    return re.sub(" +", " ", "\n".join(lines))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What a build reads, and the package without what an earlier build left."""
    copy = tmp_path / "tree"
    shutil.copytree(harness.ROOT / "minitune", copy / "minitune", ignore=shutil.ignore_patterns(
        "*.so", "__pycache__", "examples"))
    shutil.copytree(harness.ROOT / "csrc", copy / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(harness.ROOT / name, copy)
    return copy


def test_the_build_comes_first_and_fails_on_a_gpu_without_its_extension(
        tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert next(iter(gpu.LIMITS)) == "build"
    monkeypatch.setenv("MINITUNE_NATIVE", "0")
    monkeypatch.delenv("MINITUNE_CUDA", raising=False)
    part = gpu.run_build("cuda", 60, tree)
    (row,) = part["rows"]
    assert part["status"] == "failed" and row["right"] is False and row["native"] != "available"
    assert any("MINITUNE_NATIVE=0" in line for line in row["left_out"]) and "MINITUNE_CUDA=1, but" in part["stderr"]
    part = gpu.run_build("cpu", 60, tree)
    assert part["status"] == "passed" and "not built" in part["rows"][0]["native"]
    text = "\n".join(tables_gpu.gpu_tables({"device": "cpu", "when": "2026-01-02", "machine": harness.machine(),
                                        "parts": {"build": {**part, "seconds": 1.0}}}))
    assert "The extension: " in text and "_C is not built: MINITUNE_NATIVE=0" in text


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux")
def test_the_build_is_in_place_and_is_seen(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads nothing of pyproject.toml, whose license field a machine's own setuptools may be too old for."""
    (tree / "pyproject.toml").write_text('[project]\nname = "minitune"\nversion = "1"\nlicense = 3\n')
    for name in ("MINITUNE_NATIVE", "MINITUNE_BACKEND", "CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MINITUNE_CUDA", "0")
    part = gpu.run_build("cpu", 240, tree)
    assert part["status"] == "passed" and part["rows"][0]["native"] == "available", part
    assert next((tree / "minitune").glob("_C.*.so"))


def test_an_extension_that_is_missing_on_a_gpu_is_a_wrong_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_nf4.backends, "missing", lambda name, device: f"no {name}")
    assert gpu_nf4.absent("native", "cuda") == {"unavailable": "no native", "right": False}
    assert gpu_nf4.absent("triton", "cuda") == {"unavailable": "no triton"}
    assert gpu_nf4.absent("native", "cpu") == {"unavailable": "no native"}


def test_products_and_attention_run_tiny(tmp_path: Path) -> None:
    parts: dict[str, Any] = {name: gpu.run_part(name, "cpu", 60) for name in ("products", "attention")}
    for part in parts.values():
        assert part["status"] == "passed", part
    products = [row for row in parts["products"]["rows"] if row["what"] == "product"]
    assert len(products) == len(gpu_products.TINY) * 2 * 5 * len(gpu_products.RANKS)
    assert all(row["floor_ms"] > 0 for row in products) and {row["each"] for row in products} == {16, 64}
    assert all(row["right"] and row["tflops"] > 0 for row in products)
    attention = [row for row in parts["attention"]["rows"] if row["what"] == "attention"]
    flash = [row for row in attention if row["backend"].startswith("sdpa flash")]
    assert len(flash) == len(gpu_attention.TINY) * 3 and all(row["right"] for row in flash)
    absent = [row for row in attention if row["backend"] == "varlen_attn"]
    assert absent and all(row["unavailable"] for row in absent)


def test_nf4_runs_tiny() -> None:
    part = gpu.run_part("nf4", "cpu", 60)
    assert part["status"] == "passed", part
    kernels = [row for row in part["rows"] if row["what"] in ("dequantise", "quantise")]
    n_weights, n_alone = (len(list(shapes)) for shapes in (
        gpu_nf4.PLANS["cpu"].weights, (s for s in gpu_nf4.PLANS["cpu"].weights.values() if len(s) == 1)))
    plain = [row for row in kernels if row["backend"] == "reference"]
    assert len(plain) == 2 * (n_weights + n_alone) and all(row["right"] and row["gb_per_s"] > 0 for row in plain)
    for absent in ("triton", "bitsandbytes"):
        assert all(row["unavailable"] for row in kernels if row["backend"] == absent)
    (load,) = (row for row in part["rows"] if row["what"] == "load")
    assert load["disk_gb_per_s"]["n"] == load["load_s"]["n"] >= 1 and load["warm_gb_per_s"] > 0
    assert isinstance(load["promise"], bool)
    assert {row["what"] for row in part["rows"]} >= {"copy rate", "matrix rate", "load", "step"}
    assert [(row["memory"], row["moments"]) for row in part["rows"] if row["what"] == "step"] == [
        ("full", "fp32"), ("full", "8bit"), ("offload", "8bit")]
    text = "\n".join(tables_gpu.gpu_tables({"device": "cpu", "when": "2026-01-02", "machine": harness.machine(),
                                        "parts": {"nf4": part}}))
    for words in ("Copy rate", "gate and up", "Not measured: bitsandbytes", "2 of 2 layers, ", "memory full",
                  "GB/s, file read alone", "not measured: measured on a GPU only"):
        assert words in text
    assert " NO " not in text


def test_the_checks_of_nf4_see_a_wrong_bit_and_a_write_between_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    case = gpu_nf4.make(((33, 64),) * 2, True)
    assert gpu_nf4.decode(case, "reference", "cpu", 1.0)["right"]
    case.values[5, 6] *= 1.01
    assert gpu_nf4.decode(case, "reference", "cpu", 1.0) == {"right": False}
    case = gpu_nf4.make(((33, 64),) * 2, True)
    decode = gpu_nf4.FusedNF4.decode

    def spill(fused: Any, out: torch.Tensor) -> torch.Tensor:
        out.as_strided((1, out.stride(0)), (out.stride(0), 1)).fill_(0)
        return decode(fused, out)

    monkeypatch.setattr(gpu_nf4.FusedNF4, "decode", spill)
    assert gpu_nf4.decode(case, "reference", "cpu", 1.0) == {"right": False}


def test_the_tables_of_nf4_show_errors_verdicts_and_a_part_that_was_cut_off() -> None:
    kernel = {"what": "dequantise", "weight": "w", "kind": "nf4", "ms": {"median": 0.05}, "gb_per_s": 3000.0,
              "share_of_copy": 0.9}
    untimed = {name: kernel[name] for name in ("what", "kind")}
    slow = {**kernel, "weight": "v", "ms": {"median": 0.1}, "share_of_copy": 0.8}
    load = {"what": "load", "layers": 8, "of_layers": 32, "backend": "native", "load_s": harness.summary([2.0]),
            "gb_per_s": 1.4, "warm_gb_per_s": 3.0, "disk_gb_per_s": harness.summary([1.5]), "right": True}
    step = {"what": "step", "case": "QLoRA", "layers": 32, "tokens_per_s": harness.summary([9.0]), "right": True}
    text = flat(tables_nf4.gpu_nf4_tables([
        {**kernel, "backend": "triton", "right": True}, {**kernel, "backend": "bitsandbytes", "same_bits": False},
        {**kernel, "backend": "native", "unavailable": "no nvcc"}, {"what": "load", "layers": 8, "error": "a bad disk",
        "right": False}, {**load, "promise": True}, {**untimed, "weight": "p", "backend": "reference",
        "untimed": "checked only"}, {**step, "most_gb": 6.5, "peak_bytes": 6.4e9}, {**step, "memory": "auto",
        "peak_bytes": 14e9}, {**step, "most_gb": 6.5, "peak_bytes": 6.6e9}]))
    for words in ("| 0.050 | 3,000 | 90%", "others", "Not measured: native: no nvcc", "a bad disk",
                  "| 6.40 | yes", "| 14.00 | yes", "| 6.40 | ≤ 6.5 | met", "| 6.60 | ≤ 6.5 | short", "8 of 32 layers",
                  "| 1.40 | ≥ 1.35 | met", "not measured: no nvcc", "checked only"):
        assert words in text, text
    both = [{**row, "backend": name, "ms": {"median": row["ms"]["median"] * factor}} for row in (kernel, slow)
            for name, factor in (("native", 1), ("bitsandbytes", 1.3 if row is kernel else 0.9))]
    text = flat(tables_nf4.gpu_nf4_tables(both))
    assert "| 0.80 | ≥ 0.85 | short" in text and "| 0.90 | ≥ 1 | short" in text    # the worst weight counts
    assert "Copy rate: 0" in "\n".join(tables_nf4.gpu_nf4_tables([]))


def test_a_rows_error_costs_that_row_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> dict[str, Any]:
        raise KeyError("odd")

    gpu_nf4.attempt({"what": "load"}, fails)
    assert capsys.readouterr().out == '{"what": "load", "error": "KeyError: \'odd\'", "right": false}\n'


def test_a_part_that_is_cut_off_keeps_its_rows() -> None:
    program = """printf '{"what": "a"}\\n{"wh'; exec sleep 600"""       # a shell, which starts in no time
    out, _, code = gpu.run_bounded(["sh", "-c", program], 1)
    assert code is None
    assert gpu.parse_rows(out) == ([{"what": "a"}], False)


def test_numbers_that_are_not_finite_reach_the_raw_file(tmp_path: Path) -> None:
    rows, ended = gpu.parse_rows('{"losses": [1.5, NaN], "norm": {"x": Infinity}, "right": false}\n{"what": "end"}\n')
    assert ended and rows == [{"losses": [1.5, "nan"], "norm": {"x": "inf"}, "right": False}]
    path = harness.save("toy", {"rows": []}, tmp_path)
    harness.rewrite(path, {"rows": rows})
    found = json.loads(path.read_text())
    assert found["rows"] == rows and (found["name"], len(list(tmp_path.iterdir()))) == ("toy", 1)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end a child with its parent")
def test_a_part_ends_with_the_run_that_is_killed() -> None:
    program = "from benchmarks import gpu; gpu.run_bounded(['sh', '-c', 'echo $$ > \"$0\"; exec sleep 600', '{}'], 60)"
    with tempfile.TemporaryDirectory() as place:
        said = Path(place, "pid")
        parent = subprocess.Popen([sys.executable, "-c", program.format(said)], cwd=harness.ROOT)
        while not (said.exists() and said.read_text().strip()):
            time.sleep(0.05)
        child = Path("/proc", said.read_text().strip())
        assert child.exists()
        parent.kill()
        parent.wait()
        end = time.monotonic() + 20
        while child.exists() and (child / "stat").read_text().split()[2] != "Z":
            assert time.monotonic() < end, "it goes on without its parent"
            time.sleep(0.05)


def test_what_runs_unasked_fits_into_eight_minutes() -> None:
    """With 20 s for what is between the parts; and a part alone into a call that is cut off after ten."""
    assert sum(seconds for name, seconds in gpu.LIMITS.items() if name not in gpu.ASKED) <= 460
    assert set(gpu.ASKED) < set(gpu.LIMITS) and max(gpu.LIMITS.values()) <= 540


def test_a_pitched_weight_is_only_checked_where_the_reference_takes_it_row_by_row(
        monkeypatch: pytest.MonkeyPatch) -> None:
    case = gpu_nf4.make(((33, 64),) * 2, True)
    assert "ms" in gpu_nf4.decode(case, "reference", "cpu", 1.0)
    monkeypatch.setattr(gpu_nf4.backends, "missing", lambda name, device: None)
    monkeypatch.setattr(torch, "full", lambda *a, device, full=torch.full, **named: full(*a, **named))
    monkeypatch.setattr(gpu_nf4.NF4Weight, "to", lambda weight, device: weight)
    found = gpu_nf4.decode(case, "reference", "cuda", 1.0)
    assert found["right"] and "ms" not in found and "checked only" in found["untimed"]


def test_reading_plainly_reads_all_and_forgetting_harms_nothing(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * (40 << 20))
    gpu_nf4.forget(file)
    begun = time.perf_counter()
    assert 0 < gpu_nf4.read_plainly(file) <= time.perf_counter() - begun
    assert file.read_bytes() == b"x" * (40 << 20)


def test_a_step_says_whether_it_keeps_its_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_nf4, "ours", lambda *given: None)
    full, auto = gpu_nf4.TRAININGS[0], gpu_nf4.Training("auto", "fp32")
    assert [case.most_gb for case in gpu_nf4.TRAININGS] == [6.5, 5.8, 5.0]
    for peak, kept in ((6.4e9, True), (6.6e9, False)):
        monkeypatch.setattr(gpu_nf4, "train", lambda *given, peak=peak: {
            "peak_bytes": peak, "tokens_per_s": harness.summary([1.0])})
        plan = gpu_nf4.PLANS["cpu"]
        assert gpu_nf4.qlora(plan, full, "cpu", 1.0)["promise"] is kept
        assert "promise" not in gpu_nf4.qlora(plan, auto, "cpu", 1.0)


def test_each_process_of_the_tests_is_told_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def run(words: list[str], seconds: float, **variables: str) -> tuple[str, str, int]:
        given.update(variables, words=words)
        return "1 passed in 1.0s", "", 0

    monkeypatch.setattr(gpu, "run_bounded", run)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: True)
    assert gpu.run_tests("cuda", 60)["status"] == "passed"
    assert given["OMP_NUM_THREADS"] == "2" and given["words"][-2:] == ["-n", "6"]
    assert "tests/kernels/test_interpreter.py" in given["words"]
    assert "--continue-on-collection-errors" in given["words"]     # one file that needs what is not there ends no run


PAGES = {"ops": ("rms_norm with the sum", "torch fused", "ms of its two products alone", "| linear_cross_entropy "),
         "tune": ("lora_matmul forward bfloat16 nf4", "augmented", "attention forward bfloat16"),
         "layer": ("2 x 16, nf4-dq", "ms, forward"), "step": ("nf4-dq, 2 x 16, memory auto", "peak GB")}


@pytest.mark.parametrize("name", PAGES)
def test_a_part_runs_tiny_and_has_its_table(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "TUNED", tmp_path / "tuned.json")
    part = gpu.run_part(name, "cpu", 120)
    assert part["status"] == "passed", part
    assert not gpu.TUNED.exists()       # of a CPU nothing is kept
    text = "\n".join(tables_gpu.gpu_tables({"device": "cpu", "when": "2026-01-02", "machine": harness.machine(),
                                            "parts": {name: part}}))
    for words in PAGES[name]:
        assert words in text, text
    assert " NO " not in text and "promised" not in text and json.dumps(part)


def test_the_suite_is_collected_where_what_a_gpu_machine_lacks_is_missing() -> None:
    """There its tests run without the command line's library and without the oracles that few have."""
    program = ("import sys, pytest; sys.modules.update(dict.fromkeys(('tyro', 'bitsandbytes', 'mistral_common'))); "
               "sys.exit(pytest.main(['tests', '--collect-only', '-qq', '--import-mode=importlib', '-p', "
               "'no:cacheprovider']))")
    run = subprocess.run([sys.executable, "-c", program], cwd=harness.ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]


def test_pytest_output_becomes_counts_and_failures() -> None:
    row = gpu.pytest_row("..F\nFAILED tests/a.py::b - assert 1\n=== 1 failed, 2 passed, 3 skipped in 1.2s ===\n")
    assert row["counts"] == {"failed": 1, "passed": 2, "skipped": 3}
    assert row["failures"] == ["FAILED tests/a.py::b - assert 1"]
    cut = gpu.pytest_row("..F.s [ 50%]\n..\nwords.\n")
    assert cut["counts"] == {"passed": 5, "failed": 1, "skipped": 1} and cut["summary"].startswith("no summary")


def test_the_check_of_products_sees_a_lost_adapter_and_an_unwritten_row() -> None:
    torch.manual_seed(0)
    product = gpu_products.make("qkv", 128, (64, 64), 256, "cpu")
    truth = gpu_products.truth(product)
    variants = dict(gpu_products.forward_variants(product))
    assert gpu_products.check(product, truth, "addmm", "forward", variants["addmm"])["Y"] < gpu_products.LIMIT
    assert gpu_products.check(product, truth, "addmm", "forward", variants["bare"])["Y"] > 0.1
    assert gpu_products.check(product, truth, "addmm", "forward", lambda: None)["Y"] > 1e20


def test_rows_of_the_augmented_product_are_aligned() -> None:
    for (name, inner, widths), each in itertools.product(gpu_products.SHAPES, gpu_products.RANKS):
        rank = each * len(widths)
        padded = -(-rank // 64) * 64
        assert (2 * (inner + padded)) % 128 == 0 and (2 * (sum(widths) + padded)) % 128 == 0, name


@pytest.mark.parametrize("shape", [(5, 9, 2), (16,)])
def test_the_reference_of_attention_is_autograd_of_the_definition(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    case = gpu_attention.make("toy", shape, 4, 2, 8, "cpu")
    found = gpu_attention.reference(case, torch.float64)
    q, k, v = (t.detach().double().requires_grad_() for t in (case.q, case.k, case.v))
    outs, begin = [], 0
    for length in shape:
        here = slice(begin, begin + length)
        keys, values = (t[here].repeat_interleave(2, 1) for t in (k, v))
        scores = torch.einsum("shd,thd->hst", q[here], keys) * 8**-0.5
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
        outs.append(torch.einsum("hst,thd->shd", scores.softmax(-1), values))
        begin += length
    out = torch.cat(outs)
    truth = (out, *torch.autograd.grad(out, (q, k, v), case.do.double()))
    for mine, right in zip(found, truth, strict=True):
        assert torch.allclose(mine, right.detach(), atol=1e-12)


def test_flops_of_seven_b_are_those_of_the_plan() -> None:
    whole, lengths = SEVEN_B, (2048,) * 8
    assert gpu_step.flops_a_token(whole, lengths) / 1e9 == pytest.approx(28.55, abs=0.02)
    head = 4 * whole.vocab * whole.d_model
    assert 32 * gpu_step.layer_flops_a_token(whole, lengths) + head == gpu_step.flops_a_token(whole, lengths)
    assert whole.parameters() == pytest.approx(6.738e9, rel=1e-3)
    assert SIZES["12x768"].parameters() == pytest.approx(134e6, rel=0.01)
    assert SIZES["16x2048"].parameters() == pytest.approx(787e6, rel=0.01)


def test_the_folder_of_the_step_loads_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    gpu_step.write_folder(TINY, tmp_path, "cpu")
    model, told = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert model.config.hidden_size == TINY.d_model


def test_whole_run_writes_a_marked_file(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--parts", "products", "--device", "cpu", "--out",
                           str(tmp_path)], cwd=harness.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    assert '"device": "cpu"' in path.read_text() and "products: passed" in done.stdout


@pytest.mark.parametrize(("option", "place", "why"), [
    ("--out", "file", "--out: "), ("--tar", "file/a.tar.xz", "--tar: "), ("--tar", "folder", "is a folder")])
def test_what_could_not_be_written_is_said_before_anything_is_measured(option: str, place: str, why: str,
                                                                       tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    words = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--parts", "tune", "--out", str(tmp_path / "o"),
             option, str(tmp_path / place)]
    run = subprocess.run(words, cwd=harness.ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and not run.stdout and (tmp_path / "file").read_text() == "kept"
    (line,) = run.stderr.splitlines()
    assert line.startswith("make gpu: ") and why in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line_and_runs_nothing(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out")], cwd=harness.ROOT,
                         capture_output=True, text=True)
    assert run.returncode == 2 and not run.stdout and not (tmp_path / "out").exists()
    (line,) = run.stderr.splitlines()
    assert line.startswith("make gpu: no GPU: torch ") and line.endswith("-m benchmarks.gpu --device cpu")


def test_without_torch_it_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    run = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=harness.ROOT, capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert run.returncode == 2 and not run.stdout
    (line,) = run.stderr.splitlines()
    assert "cannot import torch (ModuleNotFoundError: No module named 'torch')" in line and "PYTHON=" in line
