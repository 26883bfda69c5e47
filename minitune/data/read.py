"""read_corpus: a data file as a Corpus, out of the cache where it was encoded before."""

from __future__ import annotations

import contextlib
import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from minitune.data import cache as store
from minitune.data.corpus import Builder, Corpus
from minitune.data.encode import Encoded, chunks, encode
from minitune.data.formats import Sample, read_samples

if TYPE_CHECKING:
    from minitune.data.tokenizer import Tokenizer

Progress = Callable[[str, int, int], object]
"""Called with (file, samples so far, tokens so far) after each chunk that was encoded."""


def read_corpus(path: str | Path, tokenizer: Tokenizer, field_map: Mapping[str, str] | None = None,
                cache: bool | None = None, progress: Progress | None = None) -> Corpus:
    """The encoded samples of a data file.

    ``cache``: None uses the cache for files of at least `MIN_FILE` bytes, True for any, False for none. Raises
    InputError for whatever is wrong with the file.
    """
    path = Path(path)
    before = _state(path)
    wanted = before is not None and (cache is True or (cache is None and before[0] >= store.MIN_FILE))
    entry = store.entry(path, tokenizer, field_map) if wanted else None
    corpus = store.load(entry, str(path), tokenizer.vocab_size) if entry is not None else None
    if corpus is not None:
        return corpus
    builder = Builder(str(path), tokenizer.eos_ids)
    samples = read_samples(path, dict(field_map) if field_map else None)
    with _no_collection():
        for encoded in _ahead(lambda chunk: encode(chunk, tokenizer), chunks(samples)):
            builder.add(encoded)
            if progress is not None:
                progress(builder.path, builder.n_samples, builder.n_tokens)
    corpus = builder.finish()
    if entry is not None and _state(path) == before:        # else it was not these bytes that the entry's name tells of
        store.store(entry, corpus)
    return corpus


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's search for cyclic garbage: samples make none, but they are many, so it would walk through all
    objects of torch again and again, for an eighth of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _ahead(work: Callable[[list[Sample]], list[Encoded]], items: Iterable[list[Sample]]) -> Iterator[list[Encoded]]:
    """work(item) for each item, in order, in a thread: the tokenizer libraries release the interpreter, so the next
    item is read and the one before is stored meanwhile. One thread, since a tokenizer is no good to two at once."""
    waiting: deque[Future[list[Encoded]]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _state(path: Path) -> tuple[int, int, int] | None:
    """Size, time of change and inode of a regular file; None for anything else."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_size, found.st_mtime_ns, found.st_ino) if path.is_file() else None


__all__ = ["Progress", "read_corpus"]
