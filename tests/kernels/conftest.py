"""Where the kernels' tests run: interpreted on a CPU in a process with TRITON_INTERPRET=1, else compiled on a GPU.

A test that asks for `device` runs in either. Triton reads TRITON_INTERPRET when it is imported, so one process does one
of the two: test_interpreter.py starts the interpreting one, where the tests that compile are left out.
"""

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = ["test_aot.py", "test_interpreter.py"] if INTERPRETED else ["test_interpreter_memory.py"]

if INTERPRETED:
    from tests.kernels import interpreter_bf16, interpreter_memory

    interpreter_bf16.install()
    interpreter_memory.install()


def pytest_itemcollected(item: pytest.Item) -> None:
    if not INTERPRETED and "device" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"
