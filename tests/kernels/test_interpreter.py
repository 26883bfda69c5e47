"""The kernels' logic without a GPU: the tests of this folder once more, under Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs these tests compiled")
@pytest.mark.timeout(900)      # two minutes on a machine of its own
def test_kernels_interpreted():
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE)], text=True,
                         cwd=HERE.parents[1], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True)
    assert run.returncode == 0, f"{run.stdout[-6000:]}\n{run.stderr[-2000:]}"
    assert "skipped" not in run.stdout.splitlines()[-1], run.stdout[-500:]
