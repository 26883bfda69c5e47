"""The cache of encoded files: a Corpus on disk, found by the content it was made of, mapped into memory.

An entry's name is a hash of all that it depends on: the file's bytes, the tokenizer's files as they were loaded, its
settings and chat templates, the field map, this package's code, the libraries' versions. An entry is never trusted: its
bytes carry a checksum, which is verified before anything is used, and whatever is wrong with it (torn, changed, of
another key, another user's), the file is encoded anew. Entries lie in ``data/`` of the folder that MINITUNE_CACHE
names, else of the user's cache folder; the least recently used ones go when all take more than MAX_BYTES.

An entry is: MAGIC, sha256 of all that follows (32 bytes), the header's length (8 bytes), the header (JSON), and each
array at a multiple of 64 bytes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import mmap
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from minitune.data.corpus import ARRAYS, Corpus, raw

if TYPE_CHECKING:
    from minitune.data.tokenizer import Tokenizer

MAGIC = b"minitune corpus\n"
MIN_FILE = 1_000_000
"""Smaller files are encoded in about a second: not worth an entry unless it is asked for."""
MAX_BYTES = 20_000_000_000
"""The most that all entries together may take."""
_ALIGNED = 64
_MOMENT = re.compile(r"""strftime_now\b(?!\s+is\b)(?:\s*\(\s*(['"])((?:(?!\1).)*)\1\s*\))?""")
"""A template's calls for the date, with their formats; what only asks whether there is such a function is none."""
_ABANDONED = 86_400.0
"""Seconds after which a file that is still half written belongs to a process that was killed."""


def folder() -> Path:
    """Where entries lie. RuntimeError where the user has no home."""
    told = os.environ.get("MINITUNE_CACHE")
    cache = Path(told) if told else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minitune"
    return cache / "data"


def entry(path: Path, tokenizer: Tokenizer, field_map: Mapping[str, str] | None, pairs: bool = False) -> Path | None:
    """The file in which the Corpus of `path` is or will be cached; None where there can be none."""
    parts: dict[str, Any] = {
        "format": MAGIC.decode(), "code": _code(), "order": sys.byteorder, "suffix": path.suffix.lower(),
        "fields": sorted((field_map or {}).items()), "pairs": pairs,
        "tokenizer": [tokenizer.kind, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids,
                      tokenizer.adds_bos, sorted(tokenizer.control_ids), tokenizer.added,
                      sorted(tokenizer.digests.items())],
        "templates": sorted(tokenizer.chat_templates.items()), "kwargs": dict(tokenizer.chat_template_kwargs)}
    if tokenizer.writes_date:
        parts["written"] = _written(tokenizer)
        if parts["written"] is None:
            return None
    try:
        parts["data"] = _digest(path)
        where = folder()
    except (OSError, RuntimeError):
        return None
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
    return where / f"{key}.corpus"


def _written(tokenizer: Tokenizer) -> list[str] | None:
    """What its templates write of the moment that it is; None where a format is no plain text, so that it may be any
    part of the moment, which never comes again."""
    calls = [call for source in tokenizer.chat_templates.values() for call in _MOMENT.finditer(source)]
    if any(call[2] is None for call in calls):
        return None
    return sorted({tokenizer.clock().strftime(call[2]) for call in calls})


def load(path: Path, source: str, vocab_size: int) -> Corpus | None:
    """The Corpus of entry `path`, mapped into memory, for the file named `source`; None unless all of it is sound."""
    try:
        with path.open("rb") as file:
            if hasattr(os, "getuid") and os.fstat(file.fileno()).st_uid != os.getuid():
                return None
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        corpus = _read(data, path.stem, source)
        os.utime(path)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return corpus if _is_sound(corpus, vocab_size) else None


def _read(data: mmap.mmap, key: str, source: str) -> Corpus:
    """ValueError, KeyError or TypeError for what is no entry of this key."""
    start = len(MAGIC) + 32
    view = memoryview(data)
    if view[:len(MAGIC)] != MAGIC or hashlib.sha256(view[start:]).digest() != view[len(MAGIC):start]:
        raise ValueError("checksum")
    length = int.from_bytes(view[start:start + 8], "little")
    header = json.loads(bytes(view[start + 8:start + 8 + length]))
    if header["key"] != key:
        raise ValueError("key")
    arrays: dict[str, Tensor] = {}
    for name, dtype in ARRAYS.items():
        offset, count = header["arrays"][name]
        arrays[name] = torch.frombuffer(data, dtype=dtype, offset=offset, count=count) if count else torch.empty(
            0, dtype=dtype)
    dropped = {reason: (samples, tokens) for reason, (samples, tokens) in header["dropped"].items()}
    return Corpus(path=source, marker=header["marker"], n_samples=header["n_samples"], dropped=dropped, **arrays)


def _is_sound(corpus: Corpus, vocab_size: int) -> bool:
    """Whether the arrays fit each other: a checksum proves that they are as written, not who wrote them."""
    n = len(corpus)
    if corpus.bounds.numel() != n + 1 or corpus.ids.numel() != corpus.trained.numel() or any(
            getattr(corpus, name).numel() != n for name in ("weights", "digests", "n_trained", "flags", "rejected_at")):
        return False
    lengths = corpus.bounds.diff()
    if corpus.bounds[0] != 0 or corpus.bounds[-1] != corpus.ids.numel() or (n and lengths.min() <= 0):
        return False
    if n and (corpus.rejected_at.min() < 0 or (corpus.rejected_at >= lengths).any()):
        return False
    if n and (corpus.ids.min() < 0 or corpus.ids.max() >= vocab_size or (corpus.weights <= 0).any()):
        return False
    return int(corpus.n_trained.sum()) == int(corpus.trained.sum()) and not corpus.weights.isinf().any()


def store(path: Path, corpus: Corpus) -> None:
    """Write an entry under another name, then rename it. Without room or permission there is none, and no error."""
    offset, places, arrays = 0, {}, {name: getattr(corpus, name) for name in ARRAYS}
    for name, values in arrays.items():
        places[name] = [offset, values.numel()]
        offset += -(-values.numel() * values.element_size() // _ALIGNED) * _ALIGNED
    if offset > MAX_BYTES:
        return
    room = 4096 + 32 * len(arrays) + len(json.dumps(corpus.dropped))
    start = -(-(len(MAGIC) + 40 + room) // _ALIGNED) * _ALIGNED
    header = json.dumps({"key": path.stem, "marker": corpus.marker, "n_samples": corpus.n_samples,
                         "dropped": corpus.dropped,
                         "arrays": {name: [start + at, count] for name, (at, count) in places.items()}}).encode()
    head = len(header).to_bytes(8, "little") + header.ljust(start - len(MAGIC) - 40)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _temporary(path) as file:
            hashed = hashlib.sha256(head)
            file.write(MAGIC + bytes(32) + head)
            for values in arrays.values():
                content = raw(values)
                for piece in (content, bytes(-len(content) % _ALIGNED)):
                    hashed.update(piece)
                    file.write(piece)
            file.seek(len(MAGIC))
            file.write(hashed.digest())
        _prune(path)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[BinaryIO]:
    """A file that becomes `path` at the end, and vanishes if anything goes wrong before."""
    descriptor, name = tempfile.mkstemp(prefix=".", suffix=".partial", dir=path.parent)     # its owner's alone
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _prune(kept: Path) -> None:
    """Remove what a killed process left half written, and the least recently used entries until the rest takes at most
    MAX_BYTES; `kept` stays."""
    for path in kept.parent.glob(".*.partial"):
        if time.time() - path.stat().st_mtime > _ABANDONED:
            path.unlink(missing_ok=True)
    found = sorted(((stat.st_mtime, stat.st_size, path) for path in kept.parent.glob("*.corpus")
                    if (stat := path.stat())), reverse=True)
    taken = 0
    for _, size, path in found:
        taken += size
        if taken > MAX_BYTES and path != kept:
            path.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def _code() -> list[str]:
    """What encodes: the source of this package, and the versions of the libraries behind it."""
    hashed = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        hashed.update(path.read_bytes())
    versions = []
    for name in ("sentencepiece", "tokenizers", "jinja2", "pyarrow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return [hashed.hexdigest(), *versions]


__all__ = ["MAX_BYTES", "MIN_FILE", "entry", "folder", "load", "store"]
