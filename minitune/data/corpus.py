"""Corpus: the encoded samples of one source file as flat arrays, grown in memory or mapped from the cache."""

from __future__ import annotations

import ctypes
import hashlib
import re
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minitune.data.document import Document

if TYPE_CHECKING:
    from minitune.data.encode import Encoded

ENDS, BLANK, SPOILT, OPEN = 1, 2, 4, 8
"""Bits of ``Corpus.flags``: an end-of-text token is trained; the answers are blank; a text holds U+FFFD or a null
character; a conversation does not end with an answer."""
ARRAYS = {"ids": torch.int32, "trained": torch.int8, "bounds": torch.int64, "weights": torch.float32,
          "numbers": torch.int64, "digests": torch.int64, "n_trained": torch.int32, "flags": torch.uint8,
          "rejected_at": torch.int32}
"""The arrays of a Corpus, with their dtypes."""
_TYPECODES = {torch.int32: "i", torch.int8: "b", torch.int64: "q", torch.float32: "f", torch.uint8: "B"}


@dataclass(frozen=True, eq=False, kw_only=True)
class Corpus:
    """The n documents of a file, N tokens, end to end, on the host; and what of the file became no document.

    ids int32 [N]; trained int8 [N], 0 at each first token; bounds int64 [n + 1]; weights fp32 [n], NaN where a document
    has none. Of each document int64 [n] ``numbers`` (its line), ``digests`` (of its ids: equal ones are duplicates),
    int32 ``n_trained``, uint8 ``flags``, int32 ``rejected_at``: a pair of answers is one document, and the rejected one
    begins there, with its prompt (0: it is no pair). ``marker`` stands between the file's name and the line in a
    sample's name. ``n_samples`` counts the file's samples, those without a document too; ``dropped`` is {reason:
    (samples, tokens)}.
    """

    path: str
    marker: str
    n_samples: int
    dropped: Mapping[str, tuple[int, int]]
    ids: Tensor
    trained: Tensor
    bounds: Tensor
    weights: Tensor
    numbers: Tensor
    digests: Tensor
    n_trained: Tensor
    flags: Tensor
    rejected_at: Tensor

    def __len__(self) -> int:
        return self.numbers.numel()

    def where(self, index: int) -> str:
        """The name of document `index`, such as "file:line"."""
        number = int(self.numbers[index])
        return f"{self.path}{self.marker}{number}" if number else self.path

    def kept_together(self) -> Tensor:
        """int64 [n]: documents with equal numbers belong on one side of a split: those with the same tokens, and of
        pairs those with the same prompt, whose answers a data set often pairs in several ways."""
        pairs = self.rejected_at.nonzero().flatten()
        if not pairs.numel():
            return self.digests
        ids, trained, starts = raw(self.ids), bytes(raw(self.trained)), self.bounds[pairs].tolist()
        prompts = [ids[4 * start:4 * trained.index(1, start)] for start in starts]
        return self.digests.index_copy(0, pairs, torch.tensor(list(map(_digest, prompts))))

    def weight(self, index: int) -> float | None:
        """The weight of document `index`, if it has one."""
        weight = float(self.weights[index])
        return None if weight != weight else weight

    def document(self, index: int, start: int, end: int) -> Document:
        """Tokens [start, end) of the file as a Document; they belong to document `index`."""
        return Document(self.ids[start:end].tolist(), self.trained[start:end].tolist(), self.weight(index),
                        self.where(index), int(self.rejected_at[index]))


class Builder:
    """Grows a Corpus from encoded samples."""

    def __init__(self, path: str, eos_ids: Iterable[int]) -> None:
        self.path, self._eos_ids = path, frozenset(eos_ids)
        self.n_samples, self.marker = 0, ":"
        self._dropped: dict[str, tuple[int, int]] = {}
        self._arrays: dict[str, array[Any]] = {name: array(_TYPECODES[dtype]) for name, dtype in ARRAYS.items()}
        self._arrays["bounds"].append(0)

    @property
    def n_tokens(self) -> int:
        """Tokens of the documents so far."""
        return len(self._arrays["ids"])

    def add(self, samples: Iterable[Encoded]) -> None:
        """Append the documents of `samples`, count the rest."""
        for sample in samples:
            self.n_samples += 1
            if sample.reason:
                n_samples, n_tokens = self._dropped.get(sample.reason, (0, 0))
                self._dropped[sample.reason] = (n_samples + 1, n_tokens + sample.n_dropped)
            if sample.ids:
                self._append(sample)

    def _append(self, sample: Encoded) -> None:
        ids, trained, arrays = sample.ids, sample.trained, self._arrays
        arrays["ids"].extend(ids)
        arrays["trained"].frombytes(trained)
        arrays["bounds"].append(len(arrays["ids"]))
        arrays["weights"].append(float("nan") if sample.weight is None else sample.weight)
        arrays["numbers"].append(self._number(sample.where))
        arrays["digests"].append(_digest(ids))
        arrays["n_trained"].append(len(trained) - trained.count(0))
        sides = (slice(sample.rejected_at), slice(sample.rejected_at, None)) if sample.rejected_at else (slice(None),)
        ends = all(self._ends(ids[side], trained[side]) for side in sides)
        arrays["flags"].append(ENDS * ends + sample.flags)
        arrays["rejected_at"].append(sample.rejected_at)

    def _ends(self, ids: array[int], trained: bytes) -> bool:
        """Whether an end-of-text token is trained, nearly always the last one."""
        return bool(trained[-1] and ids[-1] in self._eos_ids) or any(
            target and token in self._eos_ids for token, target in zip(ids, trained, strict=True))

    def _number(self, where: str) -> int:
        digits = where[len(self.path) + len(self.marker):]
        if not (digits.isdecimal() and where.startswith(self.marker, len(self.path))):
            parts = re.fullmatch(r"(\D*)(\d+)", where.removeprefix(self.path))
            if parts is None:
                return 0
            self.marker, digits = parts[1], parts[2]
        return int(digits)

    def finish(self) -> Corpus:
        """The Corpus; nothing can be added any more."""
        found = {name: _tensor(self._arrays[name], dtype) for name, dtype in ARRAYS.items()}
        return Corpus(path=self.path, marker=self.marker, n_samples=self.n_samples, dropped=self._dropped, **found)


def _digest(ids: array[int] | memoryview) -> int:
    """A number in int64 that differs where the ids do."""
    return int.from_bytes(hashlib.blake2b(ids, digest_size=8).digest(), "little", signed=True)


def raw(values: Tensor) -> memoryview:
    """The bytes of a flat tensor, which must outlive the view; numpy, which could give them too, need not be there."""
    n = values.numel() * values.element_size()
    return memoryview((ctypes.c_char * n).from_address(values.data_ptr()) if n else b"").cast("B")


def _tensor(values: array[Any], dtype: torch.dtype) -> Tensor:
    """`values` without a copy."""
    return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)


__all__ = ["ARRAYS", "BLANK", "ENDS", "OPEN", "SPOILT", "Builder", "Corpus", "raw"]
