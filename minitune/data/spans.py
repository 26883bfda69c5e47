"""Rendered chats to ids, trained characters to trained ids. Control tokens are read only where the template wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from minitune.data.mask import Spans
from minitune.data.template import Rendered
from minitune.data.tokenizer_backends import TokenizersBackend, any_of
from minitune.errors import InputError

if TYPE_CHECKING:
    from minitune.data.tokenizer import Tokenizer

WithLead = tuple[list[int], list[bool], str]
"""ids, which of them are trained, and the characters before a trained span that share a token with its beginning (""
as a rule)."""

_GUARD = "\U0010f7d5"
"""Around the names that stand in for control tokens: a private-use character, so that no text has it by chance."""


def encode_rendered(tokenizer: Tokenizer, chats: Sequence[Rendered], spans: Sequence[Spans]) -> list[WithLead]:
    """The ids of each chat's text, and which of them hold a character of its spans.

    A token that reaches into the beginning of a span is trained, as in transformers' own mask; one that begins within
    a span and reaches beyond its end is as well.
    """
    if isinstance(tokenizer.backend, TokenizersBackend):
        return _by_offsets(tokenizer, tokenizer.backend, chats, spans)
    return _by_runs(tokenizer, chats, spans)


# -- tokenizers: it splits at control tokens itself, and tells each token's characters

def _by_offsets(tokenizer: Tokenizer, backend: TokenizersBackend, chats: Sequence[Rendered], spans: Sequence[Spans]
                ) -> list[WithLead]:
    found: dict[int, WithLead] = {}
    complete = tokenizer.control_ids <= backend.control
    plain = [i for i, chat in enumerate(chats) if complete and not chat.spelled]
    for i, encoding in zip(plain, backend.encode_with_offsets([chats[i].text for i in plain]), strict=True):
        found[i] = _flag(encoding, encoding.ids, chats[i].text, spans[i])
    others = [i for i in range(len(chats)) if i not in found]
    if others:
        named = _by_names(tokenizer, backend, [chats[i] for i in others], [spans[i] for i in others])
        found.update(zip(others, named, strict=True))
    return [found[i] for i in range(len(chats))]


def _by_names(tokenizer: Tokenizer, backend: TokenizersBackend, chats: Sequence[Rendered], spans: Sequence[Spans]
              ) -> list[WithLead]:
    """Chats whose messages spell control tokens. The template's own are written by their names, which stand for them
    in a copy of the tokenizer; what messages spell is then text to it."""
    named, back = backend.with_named_control(tokenizer.control_ids, _GUARD)
    names = {tokenizer.token(number): named.id_to_token(alias) for alias, number in back.items()}
    pattern = any_of(list(names))

    def rename(chat: Rendered, text: str) -> str:
        return chat.read(pattern.sub(lambda match: names[match[0]], text) if pattern else text)

    for chat in chats:
        if _GUARD in chat.text:
            raise InputError(f"{chat.where}: holds U+{ord(_GUARD):X} beside a control token's spelling; minitune uses "
                             "this private-use character itself, remove it")
    texts = [rename(chat, chat.text) for chat in chats]
    found: list[WithLead] = []
    for chat, text, cuts, encoding in zip(chats, texts, spans, named.encode_batch(texts, add_special_tokens=False),
                                          strict=True):
        ids = encoding.ids
        leaked = tokenizer.control_ids.intersection(ids) - {tokenizer.unk_id}
        if leaked:
            raise InputError(f"{chat.where}: this vocabulary reads plain text as the control token "
                             f"{tokenizer.token(min(leaked))!r}; remove it from the messages")
        moved = [(len(rename(chat, chat.text[:start])), len(rename(chat, chat.text[:end]))) for start, end in cuts]
        found.append(_flag(encoding, [back.get(number, number) for number in ids], text, moved))
    return found


def _flag(encoding: Any, ids: list[int], text: str, spans: Spans) -> WithLead:
    trained = [False] * len(ids)
    lead = ""
    for start, end in spans:
        first, last = _token_at(encoding, start, len(text), len(ids)), _token_at(encoding, end, len(text), len(ids))
        if last < len(ids) and encoding.token_to_chars(last)[0] < end:
            last += 1
        if first < last:
            lead = max(lead, text[encoding.token_to_chars(first)[0]:start], key=len)
            trained[first:last] = [True] * (last - first)
    return ids, trained, lead


def _token_at(encoding: Any, place: int, length: int, count: int) -> int:
    """The first token that holds character `place`, or, where none does (a token may swallow blanks), a later one."""
    while place < length:
        number = encoding.char_to_token(place)
        if number is not None:
            return int(number)
        place += 1
    return count


# -- sentencepiece: split at control tokens here; a span that begins inside a run of text cuts it there

Heads = dict[tuple[str, bool], list[int]]
"""(The beginning of a run up to a cut, whether the run continues a text) -> its ids."""


def _by_runs(tokenizer: Tokenizer, chats: Sequence[Rendered], spans: Sequence[Spans]) -> list[WithLead]:
    pattern = any_of([tokenizer.token(number) for number in tokenizer.control_ids])
    parts = [pattern.split(chat.text) if pattern else [chat.text] for chat in chats]
    wanted = [(chat.read(piece), place > 0) for chat, pieces in zip(chats, parts, strict=True)
              for place, piece in enumerate(pieces) if place % 2 == 0]
    heads = [(chat.read(pieces[place][:cut]), place > 0) for chat, pieces, cuts in zip(chats, parts, spans, strict=True)
             for place, cut in _cuts(pieces, cuts)]
    encoded = _encode_runs(tokenizer, [*wanted, *heads])
    return [_join(tokenizer, chat, pieces, cuts, encoded)
            for chat, pieces, cuts in zip(chats, parts, spans, strict=True)]


def _cuts(pieces: Sequence[str], spans: Spans) -> Iterator[tuple[int, int]]:
    """(which piece, where in it) for each end of a span that lies inside a run of text, not at its ends."""
    bounds = iter(sorted({bound for span in spans for bound in span}))
    bound = next(bounds, None)
    start = 0
    for place, piece in enumerate(pieces):
        end = start + len(piece)
        while bound is not None and bound < end:
            if bound > start and place % 2 == 0:
                yield place, bound - start
            bound = next(bounds, None)
        start = end


def _encode_runs(tokenizer: Tokenizer, runs: Sequence[tuple[str, bool]]) -> Heads:
    """The ids of each different run; one that continues nothing gets the tokenizer's leading blank."""
    found: Heads = {}
    for continues in (False, True):
        texts = list(dict.fromkeys(run for run, follows in runs if follows == continues))
        ids = tokenizer.encode_many(texts, bos=False, continues=continues) if texts else []
        found.update({(text, continues): each for text, each in zip(texts, ids, strict=True)})
    return found


def _join(tokenizer: Tokenizer, chat: Rendered, pieces: Sequence[str], spans: Spans, encoded: Heads) -> WithLead:
    ids: list[int] = []
    trained: list[bool] = []
    lead = ""
    start = 0
    for place, piece in enumerate(pieces):
        end = start + len(piece)
        within = [(max(a - start, 0), min(b - start, len(piece))) for a, b in spans if a < end and b > start]
        if place % 2:
            number = tokenizer.id_of(piece)
            assert number is not None
            ids.append(number)
            trained.append(bool(within))
        elif piece:
            run = encoded[chat.read(piece), place > 0]
            flags = [False] * len(run)
            for a, b in within:
                first, before = _cut(tokenizer, chat, piece, a, place > 0, encoded)
                last, rest = _cut(tokenizer, chat, piece, b, place > 0, encoded)
                last += bool(rest)
                lead = max(lead, before, key=len)
                flags[first:last] = [True] * (last - first)
            ids += run
            trained += flags
        start = end
    return ids, trained, lead


def _cut(tokenizer: Tokenizer, chat: Rendered, piece: str, place: int, continues: bool, encoded: Heads
         ) -> tuple[int, str]:
    """(the token of a run, `piece`, that holds character `place`; the characters before it in that token).

    The ids of the characters before the place are the run's first ones, unless a token reaches over it.
    """
    run = encoded[chat.read(piece), continues]
    if place in (0, len(piece)):
        return (len(run) if place else 0), ""
    head = chat.read(piece[:place])
    alone = encoded[head, continues]
    if run[:len(alone)] == alone:
        return len(alone), ""
    common = next((i for i, (a, b) in enumerate(zip(alone, run, strict=False)) if a != b), min(len(alone), len(run)))
    known = tokenizer.decode(run[:common], skip_special=False, continues=continues)
    while common and not head.startswith(known):        # the bytes of one character
        common -= 1
        known = tokenizer.decode(run[:common], skip_special=False, continues=continues)
    return common, head[len(known):]


__all__ = ["encode_rendered"]
