"""Reading and writing files safely: strict JSON, regular files only, replacement that is all or nothing."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from minitune.arguments import short
from minitune.errors import InputError

MAX_JSON_FILE = 16 << 20
"""Bytes of the largest JSON file that is read whole; the largest published index has about 8 MB."""
MAX_JSON_ITEMS = 1_000_000
"""The most values in one JSON text, so that parsing takes bounded time; the largest published header has about 10^5."""

_NO_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES)
"""Of a folder: network file systems that sync files alone say one of the first three."""
_HIDDEN = re.compile(r"\.([^/]+)\.[0-9]+\.(tmp|old)")


def listing(lines: list[str], most: int = 20) -> str:
    """Indented lines, cut after ``most`` with a count of the rest."""
    rest = [] if len(lines) <= most else [f"… and {len(lines) - most} more"]
    return "".join(f"\n  {line}" for line in [*lines[:most], *rest])


def refuse_pointer(path: Path, start: bytes) -> None:
    """InputError for a file that begins as Git LFS's stand-in for a large one, which a clone without LFS leaves."""
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: is a Git LFS pointer, not the file itself; fetch that: git lfs pull")


def open_regular(path: Path) -> FileIO:
    """The file opened for unbuffered reading. Raises InputError where it is missing, unreadable or no regular file."""
    try:
        # A named pipe would block a plain open for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise InputError(f"{path}: is not a regular file")
        return FileIO(descriptor, "rb")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be opened: {error}") from None


@contextmanager
def readable(path: Path) -> Iterator[FileIO]:
    """`open_regular`, and InputError too where the disk does not give what it has."""
    with open_regular(path) as file:
        try:
            yield file
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def sha256_of(path: Path) -> str:
    """Of the file's bytes, in hexadecimal digits."""
    with readable(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the name {short(key)} stands twice in one object")
            seen.add(key)
    return result


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{short(text)} is no finite number")
    return value


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def parse_json(raw: bytes, where: str, most: int = MAX_JSON_ITEMS) -> Any:
    """JSON as RFC 8259 has it and no more: UTF-8, no name twice, no NaN, no lone surrogate, bounded size and nesting.

    ``where`` names the source in the InputError that everything else raises.
    """
    if sum(map(raw.count, (b",", b"[", b"{", b"\\"))) > most:
        raise InputError(f"{where}: holds more than {most:,} JSON values and escapes")
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_float=_finite, parse_constant=_no_constant
        )
        if b"\\ud" in raw or b"\\uD" in raw:  # only an escape can bring a lone surrogate in
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise InputError(f"{where}: the JSON is nested too deeply") from None
    except UnicodeEncodeError:
        raise InputError(f"{where}: holds half of a surrogate pair, which is no character") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: is not UTF-8 at byte {error.start}") from None
    except ValueError as error:
        raise InputError(f"{where}: is not valid JSON: {str(error)[:200]}") from None
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file of at most MAX_JSON_FILE bytes. Raises InputError."""
    with readable(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JSON_FILE:
            raise InputError(f"{path}: has {size:,} bytes; at most {MAX_JSON_FILE:,} are read")
        raw = file.readall()
    refuse_pointer(path, raw)
    value = parse_json(raw, str(path))
    if not isinstance(value, dict):
        raise InputError(f"{path}: must hold a JSON object, but holds {short(value)}")
    return value


def json_bytes(value: object) -> bytes:
    """``value`` as indented UTF-8 JSON with a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def sync_folder(folder: Path) -> None:
    """Make renames within ``folder`` last through a power cut, where the system, the file system and the folder's
    permissions let it be synced."""
    if os.name == "posix":
        try:
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno not in _NO_SYNC:
                raise


def discard(path: Path) -> None:
    """Remove a file, or a folder with all that it holds, as far as that can be: what is left over ends no run."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _hidden(path: Path, end: str) -> Path:
    """A name of this process beside `path`, for what is not whole yet (tmp), or set aside (old)."""
    return path.with_name(f".{path.name}.{os.getpid()}.{end}")


def is_half_written(path: Path) -> bool:
    """Whether it is what a process writes before it has its name, or has set aside for that."""
    return _HIDDEN.fullmatch(path.name) is not None


def sweep(folder: Path) -> None:
    """Remove what killed processes left half written in `folder`, and put back what they had set aside for something
    that did not come. No other process may be writing there."""
    for path in sorted(folder.glob(".*")):
        left = _HIDDEN.fullmatch(path.name)
        if left is None:
            continue
        if left[2] == "old" and not (folder / left[1]).exists():
            with suppress(OSError):
                os.replace(path, folder / left[1])
        else:
            discard(path)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Within it an OSError (a full disk, no permission) becomes an InputError."""
    try:
        yield
    except OSError as error:
        place = _HIDDEN.sub(r"\1", str(error.filename or folder))      # a user knows the name that it is written for
        raise InputError(f"{place}: cannot be written: {error.strerror or error}") from error


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which at the end takes the place of `folder` and all that this holds.

    A process that is killed leaves the old one or the new one, whole; where anything fails (InputError where it is an
    OSError) the old one stays.
    """
    new = _hidden(folder, "tmp")
    try:
        with _writing(folder):
            _make(new)
            yield new
            for path in (new, *new.rglob("*")):       # whoever wrote it need not have
                _sync(path)
            old = folder.is_dir()
            if old:
                _exchange(new, folder)
            else:
                os.replace(new, folder)
            try:
                sync_folder(folder.parent)
            except OSError:
                if old:
                    _exchange(new, folder)
                else:
                    os.replace(folder, new)
                raise
    finally:
        discard(new)


def _make(folder: Path) -> None:
    """A folder and its parents, as far as they are missing, with names that last."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_folder(each.parent)


def _sync(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
    elif path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _exchange(new: Path, folder: Path) -> None:
    """The two folders change names: in one go on Linux, where the file system can; else the old one has another name
    for a moment."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2        # AT_FDCWD, RENAME_EXCHANGE
    if rename is None or rename(here, os.fsencode(new), here, os.fsencode(folder), exchange):
        old = _hidden(folder, "old")
        os.replace(folder, old)
        try:
            os.replace(new, folder)
        except BaseException:
            os.replace(old, folder)
            raise
        os.replace(old, new)


@contextmanager
def staged(folder: Path) -> Iterator[Staging]:
    """Write several files of ``folder`` under temporary names; on success they take their names, else they vanish.

    The folder is made if it is missing. An OSError (a full disk, no permission) comes out as InputError.
    """
    staging, there = Staging(folder), folder.exists()
    try:
        with _writing(folder):
            _make(folder)
            yield staging
            staging.commit()
    finally:
        staging.discard()
        if not there:
            with suppress(OSError):
                folder.rmdir()      # which fails where it holds what was written


class Staging:
    """Files written under temporary names, and files that must go, until ``commit``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._written: list[tuple[Path, Path]] = []
        self._obsolete: list[Path] = []

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """A binary file that becomes ``name`` at the commit; files take their names in the order of opening."""
        temporary = _hidden(self.folder / name, "tmp")
        self._written.append((temporary, self.folder / name))
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def write(self, name: str, data: bytes) -> None:
        with self.open(name) as file:
            file.write(data)

    def remove_first(self, *names: str) -> None:
        """Delete these before the first file takes its name: nothing old may pass for whole beside new parts."""
        self._obsolete += [self.folder / name for name in names]

    def commit(self) -> None:
        for path in self._obsolete:
            path.unlink(missing_ok=True)
        while self._written:
            os.replace(*self._written[0])
            del self._written[0]
        sync_folder(self.folder)

    def discard(self) -> None:
        for temporary, _ in self._written:
            discard(temporary)
        self._written.clear()
