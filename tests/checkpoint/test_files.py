"""Folders that take the place of others, whole or not at all, with or without a system that exchanges names; and what
a killed process leaves behind."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from minitune.checkpoint import files
from minitune.checkpoint.files import replaced, staged, sweep
from minitune.errors import InputError


def fill(folder, **texts):
    for name, text in texts.items():
        (folder / name).write_text(text)


def found(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


SYSTEMS = {"as it is": None, "no renameat2": SimpleNamespace(), "refused": SimpleNamespace(renameat2=lambda *_: -1)}


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_new_folder_takes_the_place_of_the_old_one_with_all_that_it_holds(tmp_path, monkeypatch, system):
    if SYSTEMS[system]:
        monkeypatch.setattr(files.ctypes, "CDLL", lambda _: SYSTEMS[system])
    for texts in ({"a": "1", "b": "1"}, {"a": "2", "c": "2"}):
        with replaced(tmp_path / "best") as new:
            fill(new, **texts)
        assert found(tmp_path) == {f"best/{name}": text for name, text in texts.items()}
        assert os.listdir(tmp_path) == ["best"]


def test_the_names_change_at_once_where_the_system_can(tmp_path, monkeypatch):
    renamed = []
    monkeypatch.setattr(os, "replace", lambda *names: renamed.append(names))
    (tmp_path / "best").mkdir()
    with replaced(tmp_path / "best") as new:
        fill(new, a="2")
    if renamed:
        pytest.skip("this file system does not exchange names")
    assert found(tmp_path) == {"best/a": "2"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_where_anything_fails_the_old_one_stays(tmp_path, error):
    (tmp_path / "best").mkdir()
    fill(tmp_path / "best", a="1")
    told = InputError if isinstance(error, OSError) else error
    with pytest.raises(told, match=r"best: .* No space left|^$"), replaced(tmp_path / "best") as new:
        fill(new, a="2")
        raise error
    assert found(tmp_path) == {"best/a": "1"} and os.listdir(tmp_path) == ["best"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(5, "Input/output error")])
def test_where_the_new_one_cannot_take_its_name_the_old_one_has_its_own_again(tmp_path, monkeypatch, error):
    monkeypatch.setattr(files.ctypes, "CDLL", lambda _: SimpleNamespace())
    rename, done = os.replace, []
    (tmp_path / "best").mkdir()
    fill(tmp_path / "best", a="1")

    def fails_once(*names):
        done.append(names)
        if len(done) == 2:
            raise error
        rename(*names)

    monkeypatch.setattr(os, "replace", fails_once)
    with pytest.raises(InputError if isinstance(error, OSError) else error), replaced(tmp_path / "best") as new:
        fill(new, a="2")
    assert found(tmp_path) == {"best/a": "1"} and os.listdir(tmp_path) == ["best"]


@pytest.mark.parametrize("old", [True, False])
def test_where_the_new_name_may_not_last_all_is_as_before(tmp_path, monkeypatch, old):
    if old:
        (tmp_path / "best").mkdir()
        fill(tmp_path / "best", a="1")

    def dying(folder):
        if folder == tmp_path and (tmp_path / "best" / "a").exists() and (tmp_path / "best" / "a").read_text() == "2":
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "sync_folder", dying)
    with pytest.raises(InputError, match="Input/output error"), replaced(tmp_path / "best") as new:
        fill(new, a="2")
    assert found(tmp_path) == ({"best/a": "1"} if old else {}) and os.listdir(tmp_path) == ["best"] * old


def test_folders_that_are_made_last_and_so_does_what_was_put_into_them(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync_folder", lambda folder: synced.append(str(folder.relative_to(tmp_path))))
    with staged(tmp_path / "run" / "checkpoint") as staging:
        staging.write("a", b"1")
    assert sorted(synced) == [".", "run", "run/checkpoint"]
    synced.clear()
    with replaced(tmp_path / "run" / "best") as new:
        (new / "inner").mkdir()
        fill(new / "inner", a="2")
    hidden = f"run/.best.{os.getpid()}.tmp"
    assert synced[0] == "run" and sorted(synced[1:]) == sorted(["run", hidden, f"{hidden}/inner"])


def test_what_is_half_written_and_cannot_be_removed_hides_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    with pytest.raises(InputError, match="No space left"), staged(tmp_path) as staging:
        staging.write("a", b"1")
        raise OSError(28, "No space left on device")
    with pytest.raises(KeyboardInterrupt), staged(tmp_path) as staging:
        staging.write("a", b"1")
        raise KeyboardInterrupt


def test_what_cannot_be_written_has_the_name_that_a_user_knows(tmp_path):
    with pytest.raises(InputError) as raised, replaced(tmp_path / "best.of") as new:
        (new / "missing" / "a").write_text("")
    assert str(raised.value) == f"{tmp_path}/best.of/missing/a: cannot be written: No such file or directory"


def test_a_file_of_that_name_is_no_folder_to_replace(tmp_path):
    fill(tmp_path, best="mine")
    with pytest.raises(InputError, match="cannot be written"), replaced(tmp_path / "best") as new:
        fill(new, a="2")
    assert found(tmp_path) == {"best": "mine"}


def test_a_folder_that_cannot_be_removed_ends_nothing(tmp_path, monkeypatch):
    (tmp_path / "best").mkdir()
    fill(tmp_path / "best", old="1")
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError(16, "busy")))
        with replaced(tmp_path / "best") as new:
            fill(new, a="2")
        assert found(tmp_path / "best") == {"a": "2"} and len(os.listdir(tmp_path)) == 2
    with replaced(tmp_path / "best") as new:
        fill(new, a="3")
    assert (tmp_path / "best" / "a").read_text() == "3"


@pytest.mark.parametrize("calls", range(4))
def test_what_a_killed_process_left_is_swept_and_what_it_set_aside_is_put_back(tmp_path, monkeypatch, calls):
    """Without an exchange, where a process dies after so many renames and nothing of its is done any more."""
    monkeypatch.setattr(files.ctypes, "CDLL", lambda _: SimpleNamespace())
    rename, done = os.replace, []
    (tmp_path / "best").mkdir()
    fill(tmp_path / "best", a="1")

    def killed(*names):
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(rename(*names))

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", killed)
        patched.setattr(files, "discard", lambda _: None)
        with replaced(tmp_path / "best") as new:
            fill(new, a="2")
        raise KeyboardInterrupt
    assert len(os.listdir(tmp_path)) == 2
    sweep(tmp_path)
    assert found(tmp_path) == {"best/a": "1" if calls < 2 else "2"} and os.listdir(tmp_path) == ["best"]


def test_nothing_else_is_swept(tmp_path):
    mine = {".env": "", ".a.tmp": "", ".old": "", "a.12.tmp": "", ".a.12.tmp.txt": "", "new": ""}
    fill(tmp_path, **mine)
    (tmp_path / ".git").mkdir()
    with pytest.raises(KeyboardInterrupt), staged(tmp_path) as staging:
        staging.discard = lambda: None
        staging.write("config.json", b"{}")
        raise KeyboardInterrupt
    assert (tmp_path / f".config.json.{os.getpid()}.tmp").is_file()
    sweep(tmp_path)
    sweep(tmp_path / "nowhere")
    assert {path.name for path in tmp_path.iterdir()} == {*mine, ".git"}


def test_a_folder_that_was_made_for_what_failed_goes(tmp_path):
    for name in ("new", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(InputError, match="No space left"), staged(tmp_path / name) as staging:
            staging.write("a", b"1")
            raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == ["empty"] and not os.listdir(tmp_path / "empty")
    with staged(tmp_path / "new") as staging:
        staging.write("a", b"1")
    assert found(tmp_path) == {"new/a": "1"}


@pytest.mark.parametrize(("number", "told"), [(errno.EINVAL, None), (errno.EACCES, None), (errno.EIO, "EIO")])
def test_a_file_system_that_syncs_files_alone_is_enough(tmp_path, monkeypatch, number, told):
    sync = os.fsync

    def files_alone(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, errno.errorcode[number])
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", files_alone)
    with pytest.raises(InputError, match=told) if told else nullcontext():
        with staged(tmp_path) as staging:
            staging.write("a", b"1")
        with replaced(tmp_path / "best") as new:
            fill(new, b="2")
    assert found(tmp_path) == ({"a": "1"} if told else {"a": "1", "best/b": "2"})
