"""Settings of every test: two threads at most, one where tests run side by side, no network for the oracles, GPU tests
only where a GPU is, and first."""

import os
import tempfile

if "PYTEST_XDIST_WORKER" in os.environ:     # set, not a default: a worker inherits what the line below gave its parent,
    os.environ["OMP_NUM_THREADS"] = "1"     # and two threads in each of two workers on two cores wait for one another
else:
    os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))   # processes that tests start see it too
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MINITUNE_CACHE"] = tempfile.mkdtemp(prefix="minitune-cache-")     # not the user's

import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)    # as where the tests do not run in the background


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        items.sort(key=lambda item: "gpu" not in item.keywords)     # a run that is cut off has lost the others alone
        return
    items.sort(key=lambda item: item.name != "test_kernels_interpreted")       # the longest: begun last, one core waits
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["MINITUNE_CACHE"], ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """-q shows skips as letters alone; that the CUDA file went uncompiled has to be seen."""
    missed = [report for report in terminalreporter.stats.get("skipped", []) if "needs nvcc" in str(report.longrepr)]
    if missed:
        terminalreporter.write_line(f"NOT COMPILED: csrc/nf4_cuda.cu; {len(missed)} tests skipped, there is no nvcc")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny checkpoint with a tokenizer. Whoever writes into a folder makes one of his own."""
    from tests.files import write_tiny

    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _tiny_stays_as_it_is(request: pytest.FixtureRequest) -> Iterator[None]:
    if "tiny" not in request.fixturenames:
        yield
        return
    from tests.files import contents

    folder = request.getfixturevalue("tiny")
    before = contents(folder)
    yield
    assert contents(folder) == before, "the test wrote into the folder that all tests share"
