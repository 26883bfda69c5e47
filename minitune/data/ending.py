"""When a generated answer is done, and what of it is handed out."""

from __future__ import annotations

from collections.abc import Sequence

from minitune.config import short
from minitune.data.tokenizer import Tokenizer
from minitune.errors import InputError


class Ending:
    """EOS ids and stop texts of one call: none, one or several."""

    def __init__(self, eos_ids: frozenset[int], tokenizer: Tokenizer | None, stop: str | Sequence[str] | None):
        texts = [stop] if isinstance(stop, str) else [] if stop is None else stop
        if not isinstance(texts, Sequence) or not all(isinstance(text, str) and text for text in texts):
            raise InputError(f"generate: stop is {short(stop)}; give a text or a list of texts, none of them empty")
        if texts and tokenizer is None:
            raise InputError("generate: stop texts need a tokenizer, and the checkpoint folder has none")
        self.eos_ids, self.stop = eos_ids, tuple(texts)
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
