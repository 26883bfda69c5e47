"""read_corpus: a data file, or rows in memory, as a Corpus; a file's out of the cache where it was encoded before."""

from __future__ import annotations

import gc
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitune.arguments import check_path
from minitune.data import cache as store
from minitune.data.corpus import Builder, Corpus
from minitune.data.encode import Encoded, chunks, encode
from minitune.data.formats import Sample, to_samples
from minitune.data.rows import read_rows
from minitune.data.samples import NAME, rows_of
from minitune.errors import InputError

if TYPE_CHECKING:
    from minitune.data.tokenizer import Tokenizer

_THREADS = 2
_SWITCH = 1e-3
"""Seconds until a thread that wants the interpreter gets it: it may have a library to call that keeps all cores busy.
Python's own 5 ms are long beside such a call."""
Progress = Callable[[str, int, int], object]
"""Called with (file, samples so far, tokens so far) after each chunk that was encoded."""


def read_corpus(path: str | Path, tokenizer: Tokenizer, field_map: Mapping[str, str] | None = None,
                cache: bool | None = None, progress: Progress | None = None, pairs: bool = False) -> Corpus:
    """The encoded samples of a data file; with `pairs` both answers of each preference.

    ``cache``: None uses the cache for files of at least `MIN_FILE` bytes, True for any, False for none. Raises
    InputError for whatever is wrong with the file.
    """
    path = check_path("data", "a file", path)
    before = _state(path)
    wanted = before is not None and (cache is True or (cache is None and before[0] >= store.MIN_FILE))
    entry = store.entry(path, tokenizer, field_map, pairs) if wanted else None
    corpus = store.load(entry, str(path), tokenizer.vocab_size) if entry is not None else None
    if corpus is not None:
        return corpus
    corpus = _encoded(str(path), to_samples(read_rows(path), field_map, pairs), tokenizer, progress)
    if entry is not None and _state(path) == before:        # else it was not these bytes that the entry's name tells of
        store.store(entry, corpus)
    return corpus


def corpus_of(rows: Any, tokenizer: Tokenizer, field_map: Mapping[str, str] | None = None,
              progress: Progress | None = None, pairs: bool = False) -> Corpus:
    """The encoded samples of rows in memory (`minitune.data.samples`). InputError for whatever is wrong with one."""
    return _encoded(NAME, to_samples(rows_of(rows), field_map, pairs), tokenizer, progress)


def _encoded(name: str, samples: Iterable[Sample], tokenizer: Tokenizer, progress: Progress | None) -> Corpus:
    builder = Builder(name, tokenizer.eos_ids)
    with _undisturbed:
        for encoded in _ahead(lambda chunk: encode(chunk, tokenizer), chunks(samples)):
            builder.add(encoded)
            if progress is not None:
                progress(builder.path, builder.n_samples, builder.n_tokens)
    return builder.finish()


class _Undisturbed:
    """Threads take turns quickly (`_SWITCH`), and Python's search for cyclic garbage rests: samples make none, but they
    are many, so it would walk through all objects of torch again and again, for an eighth of the time. Both are as
    before when the last of those who entered has left."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, (True, 0.0)

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = gc.isenabled(), sys.getswitchinterval()
                gc.disable()
                sys.setswitchinterval(min(self._before[1], _SWITCH))
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                collects, switch = self._before
                sys.setswitchinterval(switch)
                if collects:
                    gc.enable()


_undisturbed = _Undisturbed()


def _ahead(work: Callable[[list[Sample]], list[Encoded]], items: Iterable[list[Sample]]) -> Iterator[list[Encoded]]:
    """work(item) for each item, in order, in threads: the tokenizer libraries release the interpreter, so items are
    read, and what became of those before is stored, meanwhile. Two threads, so that the library has one item at work
    while the other is made into `Encoded`."""
    waiting: deque[Future[list[Encoded]]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > _THREADS:
                    yield waiting.popleft().result()
        except InputError:      # but what stands before it in the file comes first
            while waiting:
                waiting.popleft().result()
            raise
        while waiting:
            yield waiting.popleft().result()


def _state(path: Path) -> tuple[int, int, int] | None:
    """Size, time of change and inode of a regular file; None for anything else."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_size, found.st_mtime_ns, found.st_ino) if path.is_file() else None


__all__ = ["Progress", "corpus_of", "read_corpus"]
