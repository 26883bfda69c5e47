"""When a generated answer is done, and what of it is handed out, in pieces or whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from minitune.arguments import short
from minitune.data.tokenizer import UNKNOWN_ID, Tokenizer
from minitune.errors import InputError

FinishReason = Literal["stop", "length"]
"""stop: an end token or a stop text; length: the limit on new tokens, or whoever asked wanted no more."""


@dataclass(frozen=True)
class Turn:
    """How a chat template frames an assistant's content: the token that ends the turn, and the text that the template
    itself writes before and behind the content, such as a blank; these are no part of an answer."""

    end: int | None = None
    lead: str = ""
    trail: str = ""


class Ending:
    """What ends the answers of one call: end tokens, stop texts (none, one or several), the frame of a turn."""

    def __init__(self, eos_ids: frozenset[int], tokenizer: Tokenizer | None, stop: str | Sequence[str] | None,
                 turn: Turn | None = None):
        texts = [stop] if isinstance(stop, str) else [] if stop is None else stop
        if not isinstance(texts, Sequence) or not all(isinstance(text, str) and text for text in texts):
            raise InputError(f"generate: stop is {short(stop)}; give a text or a list of texts, none of them empty")
        if texts and tokenizer is None:
            raise InputError("generate: stop texts need a tokenizer, and the checkpoint folder has none")
        self.turn = turn or Turn()
        self.eos_ids = eos_ids if self.turn.end is None else eos_ids | {self.turn.end}
        self.stop, self.tokenizer = tuple(texts), tokenizer

    def decode(self, ids: Sequence[int]) -> str:
        return "" if self.tokenizer is None else self.tokenizer.decode(ids, continues=True)

    def first_stop(self, text: str) -> int | None:
        """Where the first stop text begins, in characters."""
        return min((at for stop in self.stop if (at := text.find(stop)) >= 0), default=None)

    def unsure(self, text: str) -> int:
        """How many characters at the end of `text` may turn out to be the beginning of a stop text, or be the trail."""
        found = [_overlap(text, stop, len(stop) - 1) for stop in self.stop]
        return max([*found, _overlap(text, self.turn.trail, len(self.turn.trail))])

    def in_character(self, ids: Sequence[int], text: str) -> bool:
        """Whether `text`, which `ids` decode to, may still change at its end: half a character, or a run of single
        bytes in a tokenizer.json (its decoder shows all of a run as U+FFFD if any of it is not valid)."""
        if text.endswith(UNKNOWN_ID):
            return True
        if self.tokenizer is None or self.tokenizer.kind != "tokenizers":
            return False
        last = next((i for i in reversed(ids) if i not in self.tokenizer.control_ids), None)
        token = "" if last is None else self.tokenizer.token(last)
        return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _overlap(text: str, pattern: str, most: int) -> int:
    """The length, up to `most`, of the longest end of `text` with which `pattern` begins."""
    return next((n for n in range(min(most, len(text)), 0, -1) if text.endswith(pattern[:n])), 0)


class Writer:
    """One answer as it grows: takes its tokens one by one, gives text as soon as no later token can change it.

    The pieces that `add` and at last `close` return are the answer's text, without stop text and frame. ``ids`` are its
    tokens without end token and stop text, final once ``finish_reason`` is set; the first ``settled`` of them are final
    at any time. With ``reads`` False it gives no text, and decodes nothing unless there are stop texts.
    """

    def __init__(self, ending: Ending, reads: bool = True):
        self.ids: list[int] = []
        self.settled = 0
        self.finish_reason: FinishReason | None = None
        self._ending = ending
        self._reads = ending.tokenizer is not None and (reads or bool(ending.stop))
        self._lead = ending.turn.lead
        self._start = self._next = 0        # ids[start:next] are decoded already; what follows is decoded behind them
        self._known = 0                     # characters of their text
        self._held = ""                     # decoded, but not handed out yet
        self._given = 0                     # characters handed out, the lead among them

    def add(self, token: int) -> str:
        """The text that this token makes sure of, often "". Not to be called once ``finish_reason`` is set."""
        if token in self._ending.eos_ids:
            return self._finish("stop")
        self.ids.append(token)
        if not self._reads:
            self.settled += 1
            return ""
        window = self.ids[self._start:]
        text = self._ending.decode(window)
        at = self._ending.first_stop(self._held + text[self._known:])
        if at is not None:
            return self._cut(self._held + text[self._known:], at)
        if self._ending.in_character(window, text):
            return ""
        self._held += text[self._known:]
        self._start, self._next = self._next, len(self.ids)
        self._known = len(self._ending.decode(self.ids[self._start:]))
        return self._give(self._ending.unsure(self._held))

    def close(self) -> str:
        """No token follows: the text that was held back."""
        return "" if self.finish_reason else self._finish("length")

    def _give(self, unsure: int) -> str:
        """Hand out all but the last `unsure` characters of what is held; at the beginning, drop the lead."""
        if self._lead:
            if len(self._held) < len(self._lead) and self._lead.startswith(self._held):
                return ""
            if self._held.startswith(self._lead):
                self._given, self._held = len(self._lead), self._held[len(self._lead):]
            self._lead, unsure = "", min(unsure, len(self._held))
        given, self._held = self._held[: len(self._held) - unsure], self._held[len(self._held) - unsure:]
        self._given += len(given)
        if not self._held:
            self.settled = len(self.ids)
        return given

    def _cut(self, text: str, at: int) -> str:
        """A stop text begins `at` a place of the text that is not handed out yet."""
        self.finish_reason = "stop"
        cut = self._given + at
        while len(self._ending.decode(self.ids)) > cut:     # a token may reach into the stop text
            self.ids.pop()
        self.settled = len(self.ids)
        return text[:at].removeprefix(self._lead) if self._lead else text[:at]

    def _finish(self, reason: FinishReason) -> str:
        self.finish_reason, self.settled = reason, len(self.ids)
        if not self._reads:
            return ""
        text = self._held + self._ending.decode(self.ids[self._start:])[self._known:]
        if self._lead:
            text = text.removeprefix(self._lead)
        return text.removesuffix(self._ending.turn.trail) if reason == "stop" and self._ending.turn.trail else text


def turn_of(tokenizer: Tokenizer) -> Turn:
    """Asks the tokenizer's chat template: what it writes around an answer to a first message, and what ends it.

    The end is the first control token behind the content (<|im_end|>, <|eot_id|>, </s>). An answer is what follows the
    prompt of a generation, up to there. A template that writes no such end, or refuses so plain a conversation, leaves
    the model's own end tokens.
    """
    asked = {"role": "user", "content": "Hi"}
    try:
        prompt, _ = tokenizer.encode_chat([asked], add_generation_prompt=True)
        whole, _ = tokenizer.encode_chat([asked, {"role": "assistant", "content": "Yes", "weight": 0}])
    except InputError:
        return Turn()
    common = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b),
                  min(len(prompt), len(whole)))
    answer = whole[common:]
    texts = [tokenizer.decode(answer[:n], continues=True) for n in range(len(answer) + 1)]
    written = next((n for n, text in enumerate(texts) if "Yes" in text), len(texts))
    end = next((n for n in range(written, len(answer)) if answer[n] in tokenizer.control_ids), None)
    if end is None:
        return Turn()
    lead, _, trail = texts[end].partition("Yes")
    return Turn(answer[end], lead, trail)


__all__ = ["Ending", "FinishReason", "Turn", "Writer", "turn_of"]
