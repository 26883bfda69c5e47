"""When a generated answer is done, and what of it is handed out."""

from __future__ import annotations

from minitune.data.tokenizer import Tokenizer
from minitune.errors import InputError


class Ending:
    """EOS ids and stop texts of one call."""

    def __init__(self, eos_ids: frozenset[int], tokenizer: Tokenizer | None, stop: tuple[str, ...]):
        if stop and tokenizer is None:
            raise InputError("generate: stop texts need a tokenizer, and the checkpoint folder has none")
        if any(not text for text in stop):
            raise InputError("generate: a stop text is empty")
        self.eos_ids, self.stop = eos_ids, stop
        self.tokenizer = tokenizer

    def decode(self, ids: list[int]) -> str:
        return "" if self.tokenizer is None else self.tokenizer.decode(ids, continues=True)

    def _cut(self, ids: list[int]) -> int | None:
        """Where the first stop text begins in the decoded ids, in characters."""
        text = self.decode(ids) if self.stop else ""
        return min((at for stop in self.stop if (at := text.find(stop)) >= 0), default=None)

    def reached(self, row: int, ids: list[int]) -> bool:
        return ids[-1] in self.eos_ids or self._cut(ids) is not None

    def text(self, ids: list[int]) -> str:
        """Up to the stop text, to the character: a token may reach into it."""
        ids = ids[:-1] if ids and ids[-1] in self.eos_ids else ids
        return self.decode(ids)[: self._cut(ids)]

    def trim(self, ids: list[int]) -> list[int]:
        """Without EOS, and without any token that reaches into the stop text."""
        if ids and ids[-1] in self.eos_ids:
            ids = ids[:-1]
        cut = self._cut(ids)
        while cut is not None and len(self.decode(ids)) > cut:
            ids = ids[:-1]
        return ids
