"""claimed: one holder of a folder at a time, whatever became of the last one; nothing is left where nothing was put."""

import errno
import multiprocessing
import time

import pytest

from minitune.errors import InputError
from minitune.report import claim
from minitune.report.claim import claimed


def test_one_at_a_time(tmp_path):
    with claimed(tmp_path), pytest.raises(InputError, match="another process trains this run; wait"), claimed(tmp_path):
        raise AssertionError
    with pytest.raises(KeyError), claimed(tmp_path):
        raise KeyError
    with claimed(tmp_path):
        pass


def test_a_process_that_was_forked_meanwhile_does_not_hold_it(tmp_path):
    with claimed(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
    try:
        with claimed(tmp_path):
            pass
    finally:
        child.kill()
        child.join()


def test_what_was_made_and_left_empty_goes_again(tmp_path):
    with claimed(tmp_path / "a" / "b" / "c"):
        (tmp_path / "a" / "mine.txt").write_text("a")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "mine.txt"]
    (tmp_path / "d").mkdir()
    with claimed(tmp_path / "d"):
        pass
    assert (tmp_path / "d").is_dir()
    with pytest.raises(InputError, match=r"mine\.txt.*: cannot be written"), claimed(tmp_path / "a" / "mine.txt" / "b"):
        raise AssertionError


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(claim.fcntl, "flock", none)
    with claimed(tmp_path / "a"), claimed(tmp_path / "a"):
        assert (tmp_path / "a").is_dir()
    monkeypatch.setattr(claim, "fcntl", None)
    with claimed(tmp_path / "a"):
        assert (tmp_path / "a").is_dir()
