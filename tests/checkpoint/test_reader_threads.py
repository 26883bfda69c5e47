"""reader's threads: the parts of a chunk that are read side by side, and what ends them."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from minitune.checkpoint import reader
from minitune.checkpoint.reader import SINGLE, Checkpoint
from minitune.errors import InputError


def single(folder: Path, values: torch.Tensor) -> Checkpoint:
    save_file({"w": values}, folder / SINGLE)
    return Checkpoint.open(folder)


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_parts_that_several_threads_read_lie_where_they_belong(target: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(3, 1 << 20)        # 12 MiB, many parts even in a chunk
    before = threading.active_count()
    with single(tmp_path, values) as checkpoint:
        found = torch.empty_like(values, dtype=target)
        checkpoint.read_into("w", found)
        assert threading.active_count() > before
    assert torch.equal(found, values.to(target)) and threading.active_count() == before


def test_a_file_that_is_cut_while_threads_read_it(tmp_path: Path) -> None:
    checkpoint = single(tmp_path, torch.randn(3, 1 << 20))
    with (tmp_path / SINGLE).open("r+b") as file:
        file.truncate(9 << 20)
    with checkpoint, pytest.raises(InputError, match=r"ends at byte 9,437,184; it has become shorter while"):
        checkpoint.read_into("w", torch.empty(3, 1 << 20))


def test_ctrl_c_waits_for_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they write into may be given back right after it."""
    usual, real, running = reader.wait, reader._read, []

    def slow(*arguments: Any) -> None:
        running.append(1)
        time.sleep(0.05)
        real(*arguments)
        running.pop()

    calls = iter([KeyboardInterrupt()])

    def broken(parts: Any) -> Any:
        for error in calls:
            raise error
        return usual(parts)

    monkeypatch.setattr(reader, "_read", slow)
    monkeypatch.setattr(reader, "wait", broken)
    with single(tmp_path, torch.randn(3, 1 << 20)) as checkpoint:
        with pytest.raises(KeyboardInterrupt):
            checkpoint.read_into("w", torch.empty(3, 1 << 20))
        assert not running
