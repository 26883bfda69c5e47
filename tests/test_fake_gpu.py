"""The CUDA path without a GPU (benchmarks/fake_gpu): no operand on another device, no waiting within a step, and the
bytes that a 7B step holds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.fake_gpu import device

pytest.importorskip("transformers")
WORKSPACES = 2 * (32 << 20)
"""cuBLAS's, of the forward's thread and the backward's."""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if reason := device.missing():
        pytest.skip(reason)
    return device.build(tmp_path_factory.mktemp("device"))


def _run(library, group, seconds=240):
    """name -> what a run printed."""
    run = subprocess.run([sys.executable, "-W", "ignore", "-m", "tests.fake_gpu_runs", str(library), group],
                         cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=seconds)
    assert run.returncode == 0, run.stderr[-3000:]
    found = {row.pop("name"): row for row in map(json.loads, run.stdout.splitlines())}
    assert found
    return found


def test_no_step_mixes_devices_or_waits(library):
    found = _run(library, "steps")
    wrong = {name: row for name, row in found.items() if row.get("error") or row["waits"] or row["races"]}
    assert not wrong, json.dumps(wrong, indent=1)
    assert len(found) > 50
    assert found["LoRA"]["launches"]["rms_norm_forward"] and found["8 bits"]["launches"]["adamw_8bit"] == 2
    assert found["nf4, without the extension's CUDA half"]["launches"]["nf4_dequantize"]
    assert found["forced {'attention_forward': 'triton'}"]["launches"]["attention_forward"]
    assert found["forced {'attention_backward': 'triton'}"]["launches"]["attention_dkdv"]
    assert found["norms give S"]["launches"]["rms_norm_forward_s"]
    cudnn = found["cudnn forward"]["ops"]
    assert cudnn["aten::_scaled_dot_product_cudnn_attention"] and cudnn["aten::_flash_attention_backward"]
    assert found["cudnn asked for"]["ops"]["aten::_scaled_dot_product_cudnn_attention_backward"]
    assert found["forced {'lora_matmul_forward': 'triton'}"]["launches"]["lora_product"]


def test_what_a_user_does_runs_and_a_run_waits_only_where_it_must(library):
    found = _run(library, "uses")
    assert not {name: row for name, row in found.items() if row.get("error") or row.get("races")}
    # Of six steps the last one's loss alone is asked for.
    assert list(found["train"]["waits"].values()) == list(found["train, dpo"]["waits"].values()) == [1]
    every = ["augmented", "reference", "triton"]
    assert found["tune"]["ways"] == [
        ["lora_matmul forward bfloat16", 6144, 4096, 48, 16_384, every],
        ["lora_matmul input bfloat16", 6144, 4096, 48, 16_384, every],
        ["lora_matmul adapters bfloat16", 6144, 4096, 48, 16_384, ["reference", "triton"]],
        ["lora_matmul forward bfloat16 nf4", 6144, 4096, 48, 16_384, every],
        ["lora_matmul input bfloat16 nf4", 6144, 4096, 48, 16_384, every],
        ["rms_norm s bfloat16", 4096, 48, 16_384, ["reference", "triton"]],
        ["attention forward bfloat16", 32, 8, 128, 2048, ["cudnn", "reference", "triton"]],
        ["attention backward bfloat16", 32, 8, 128, 2048, ["reference", "triton"]],
        ["attention forward bfloat16", 16, 8, 256, 4096, ["reference", "triton"]],     # cuDNN knows no such heads
        ["attention backward bfloat16", 16, 8, 256, 4096, ["reference", "triton"]]]
    assert not any("step.py" in place for row in found.values() for place in row["waits"])


def test_a_fault_would_be_seen(library):
    found = _run(library, "faults")
    for name in ("an item", "to the host", "copied to the host", "copied from the host", "from the host",
                 "from memory that is not pinned"):
        assert sum(found[name]["waits"].values()) == 1, name
    assert not found["from pinned memory"]["waits"] and not found["into pinned memory"]["waits"]
    assert "two devices" in found["two devices"]["error"] and "nonzero" in found["a boolean index"]["error"]
    # x, x·2 and x·2·2 are 4,096 bytes each; the sum came when one of them had gone.
    assert found["memory"]["peak"] == 3 * 4096 and found["memory"]["live"] == 4096


def test_streams_that_nothing_orders_would_be_seen(library):
    found = _run(library, "streams")
    assert not any(row.get("error") for row in found.values()), found
    in_order = {name for name, row in found.items() if not row["races"]}
    assert in_order == {"read_on_both", "read_by_the_host_in_time", "offload"}
    said = {name: " ".join(row["races"]) for name, row in found.items()}
    assert "aten::add_ writes what stream 1 may still" in said["read_there_written_here"]
    assert "given back is what stream 1 may still" in said["given_back"]
    assert "aten::sum touches what stream 0 may still" in said["read_by_the_host"]
    assert "swiglu_backward writes what stream 1 may still" in said["written_by_a_kernel"]
    assert "given back" in said["offload that gives back at once"]


def test_a_7b_qlora_step_holds_no_more_than_was_promised(library):
    found = _run(library, "memory")
    assert not any(row.get("error") or row.get("waits") for row in found.values()), found
    assert found["parking"]["held"] == [[True], [False, True], [False, False, True], [False] * 3]
    assert 5.2e9 < found["full"]["peak_bytes"] + WORKSPACES < 5.6e9
    assert 4.7e9 < found["offload"]["peak_bytes"] + WORKSPACES < 5.0e9


@pytest.mark.parametrize("group", ["launches on 90", *(
    pytest.param(f"launches on {arch} of all", marks=pytest.mark.slow) for arch in (80, 89, 90, 100))])
def test_every_launch_is_compiled_and_spills_nothing(library, group):
    found = _run(library, group, 900)
    wrong = {name: row for name, row in found.items() if row.get("error") or (row.get("faults")
             and not (row["faults"] == ["16 bytes of stack"] and "'D': 20," in name))}      # heads of the tests alone
    assert not wrong, json.dumps(wrong, indent=1)
    assert len([row for row in found.values() if "faults" in row]) > (130 if "all" in group else 25)
