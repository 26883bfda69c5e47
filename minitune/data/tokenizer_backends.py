"""The two libraries that cut text into ids, sentencepiece and tokenizers, behind one small interface.

Both know ``continues``: the text follows other text. A Llama tokenizer puts a blank before the text that it is given;
a completion, or the text after a control token, must not gain one, and decoding it must not lose one.
"""

from __future__ import annotations

import copy
import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from minitune.data.tokenizer_files import AddedToken
from minitune.errors import InputError

_NO_DUMMY_PREFIX = bytes([0x1A, 0x02, 0x18, 0x00])
"""ModelProto.normalizer_spec (field 3) = {add_dummy_prefix (field 3): false}, in protobuf's wire format. Parsing merges
a second occurrence of a message field into the first, so a model with these bytes behind it adds no leading blank."""


_turn = threading.Lock()
"""Held while the library tokenizers is at work: how it reads control tokens is set on the tokenizer, not per call."""


def _renew() -> None:
    global _turn
    _turn = threading.Lock()


if hasattr(os, "register_at_fork"):     # a thread that is not there any more may have held it
    os.register_at_fork(after_in_child=_renew)


class Contradiction(InputError):
    """A sentencepiece model and the folder's added tokens disagree about an id."""


class Backend(Protocol):
    """What Tokenizer needs of a library. ``native`` holds the roles that the file itself assigns; ``puts_bos`` says
    whether the file's own template starts a text with BOS (None: it does not say)."""

    kind: str
    vocab_size: int
    control: frozenset[int]
    native: dict[str, int]
    puts_bos: bool | None

    def add(self, tokens: Sequence[str]) -> None: ...
    def id_of(self, token: str) -> int | None: ...
    def token_of(self, number: int) -> str: ...
    def encode(self, texts: Sequence[str], continues: bool, parse_special: bool) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int], continues: bool) -> str: ...


class SentencePieceBackend:
    """A sentencepiece model and the tokens that the folder adds to it.

    Added tokens that are not special are read in any text, special ones and the model's control symbols only under
    ``parse_special``. Only the text before the first of them gets the model's leading blank.
    """

    kind = "sentencepiece"
    puts_bos: bool | None = None

    def __init__(self, path: Path, added: Mapping[int, AddedToken]) -> None:
        import sentencepiece

        self._proto = path.read_bytes()
        self._model = self._open(path, sentencepiece)
        size = int(self._model.get_piece_size())
        self._size = size
        for number, token in added.items():
            if number < size and self._model.id_to_piece(number) != token.content:
                raise Contradiction(f"{path}: token {number} is {self._model.id_to_piece(number)!r} here, "
                                    f"{token.content!r} among the folder's added tokens; they are of different models")
        self._added = {number: token.content for number, token in added.items() if number >= size}
        control = {number for number in range(size) if self._model.is_control(number)}
        control |= {number for number, token in added.items() if token.special and number != self._model.unk_id()}
        self.control = frozenset(control)
        ids = {"bos": self._model.bos_id(), "eos": self._model.eos_id(), "pad": self._model.pad_id(),
               "unk": self._model.unk_id()}
        self.native: dict[str, int] = {role: number for role, number in ids.items() if number >= 0}
        self.add(())

    def add(self, tokens: Sequence[str]) -> None:
        """Put ordinary tokens, which text spells, behind the vocabulary."""
        first = max((self._size - 1, *self._added)) + 1
        self._added |= {first + place: token for place, token in enumerate(tokens)}
        self._ids = {content: number for number, content in self._added.items()}
        self.vocab_size = max((self._size - 1, *self._added)) + 1
        plain = [content for number, content in self._added.items() if number not in self.control]
        self._plain_markers = any_of(plain)
        self._all_markers = any_of([*plain, *(self.token_of(number) for number in self.control)])

    def _open(self, path: Path, sentencepiece: Any) -> Any:
        if not self._proto:  # the library would take this for "no model given"
            raise InputError(f"{path}: no sentencepiece model (the file is empty); fetch the file again")
        try:
            return sentencepiece.SentencePieceProcessor(model_proto=self._proto)
        except RuntimeError as error:
            raise InputError(f"{path}: no sentencepiece model ({error}); fetch the file again") from error

    @cached_property
    def _continuing(self) -> Any:
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=self._proto + _NO_DUMMY_PREFIX)

    def id_of(self, token: str) -> int | None:
        if token in self._ids:
            return self._ids[token]
        number = int(self._model.piece_to_id(token))
        return number if self._model.id_to_piece(number) == token else None

    def token_of(self, number: int) -> str:
        return str(self._model.id_to_piece(number)) if number < self._size else self._added.get(number, "")

    def encode(self, texts: Sequence[str], continues: bool, parse_special: bool) -> list[list[int]]:
        model = self._continuing if continues else self._model
        markers = self._all_markers if parse_special else self._plain_markers
        if markers is None or not any(markers.search(text) for text in texts):
            return list(model.encode(list(texts)))
        return [self._encode_around(text, continues, markers) for text in texts]

    def _encode_around(self, text: str, continues: bool, markers: re.Pattern[str]) -> list[int]:
        ids: list[int] = []
        for place, part in enumerate(markers.split(text)):
            if place % 2:
                number = self.id_of(part)
                assert number is not None
                ids.append(number)
            elif part:
                ids += (self._continuing if continues or place else self._model).encode(part)
        return ids

    def decode(self, ids: Sequence[int], continues: bool) -> str:
        parts: list[str] = []
        run: list[int] = []
        for number in [*ids, -1]:
            if 0 <= number < self._size and number not in self.control:
                run.append(number)
                continue
            if run:
                parts.append((self._continuing if continues or parts else self._model).decode(run))
                run = []
            if number >= 0:
                parts.append(self.token_of(number))
        return "".join(parts)


class TokenizersBackend:
    """A tokenizer.json through the library tokenizers. Padding and truncation that the file asks for are switched off:
    a text is never cut silently."""

    kind = "tokenizers"
    puts_bos: bool | None
    _named: tuple[Any, dict[int, int]] | None = None

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Fast

        try:
            self._fast = Fast.from_file(str(path))
        except Exception as error:  # the library raises no narrower class
            raise InputError(f"{path}: tokenizers cannot read it ({error}); fetch the file again") from error
        self._fast.no_padding()
        self._fast.no_truncation()
        added = self._fast.get_added_tokens_decoder()
        self.control = frozenset(number for number, token in added.items() if token.special)
        vocabulary = self._fast.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise InputError(f"{path}: its vocabulary is empty; fetch the file again")
        self.vocab_size = max(vocabulary.values()) + 1
        prefix = self._template_prefix()
        self.native = {"bos": prefix[0]} if len(prefix) == 1 else {}
        unknown = getattr(self._fast.model, "unk_token", None)
        if unknown in vocabulary:
            self.native["unk"] = vocabulary[unknown]
        self.puts_bos = bool(prefix)

    def add(self, tokens: Sequence[str]) -> None:
        """Put ordinary tokens, which text spells, behind the vocabulary."""
        from tokenizers import AddedToken as Added

        self._fast.add_tokens([Added(token, normalized=False, special=False) for token in tokens])
        self.vocab_size = max(self._fast.get_vocab(with_added_tokens=True).values()) + 1

    def save(self, path: Path) -> None:
        """Write it as tokenizer.json."""
        path.write_text(self._fast.to_str(pretty=True), encoding="utf-8")

    def _template_prefix(self) -> list[int]:
        """The ids that the file's post-processor puts before a text."""
        bare = self._fast.encode("a", add_special_tokens=False).ids
        full = self._fast.encode("a", add_special_tokens=True).ids
        for start in range(len(full) - len(bare) + 1):
            if bare and full[start:start + len(bare)] == bare:
                return list(full[:start])
        return []

    @cached_property
    def _continuing(self) -> Any:
        """The same tokenizer without its leading blank; the same object where it adds none."""
        parts = {name: getattr(self._fast, name) for name in ("normalizer", "pre_tokenizer", "decoder")}
        specs = {name: part and json.loads(part.__getstate__()) for name, part in parts.items()}
        bare = {name: _without_blank(copy.deepcopy(spec)) for name, spec in specs.items()}
        if bare == specs:
            return self._fast
        from tokenizers import Tokenizer as Fast

        return Fast.from_str(json.dumps(json.loads(self._fast.to_str()) | bare))

    def id_of(self, token: str) -> int | None:
        return self._fast.token_to_id(token)

    def token_of(self, number: int) -> str:
        return self._fast.id_to_token(number) or ""

    def encode(self, texts: Sequence[str], continues: bool, parse_special: bool) -> list[list[int]]:
        fast = self._continuing if continues else self._fast
        with _turn:
            fast.encode_special_tokens = not parse_special  # else the library reads </s> in text as control
            encodings = fast.encode_batch_fast(list(texts), add_special_tokens=False)
        return [found.ids for found in encodings]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[Any]:
        """The library's Encodings, control tokens read; they tell which token holds a character."""
        with _turn:
            self._fast.encode_special_tokens = False
            return list(self._fast.encode_batch(list(texts), add_special_tokens=False))

    def with_named_control(self, control: frozenset[int], guard: str) -> tuple[Any, dict[int, int]]:
        """A copy of the library's tokenizer in which the control tokens have names of their own, f"{guard}{id}{guard}",
        and are text when they are spelled as ever; and the id in the copy -> the id here. Slow the first time."""
        if self._named is None:
            from tokenizers import AddedToken as Added
            from tokenizers import Tokenizer as Fast

            made = Fast.from_str(self._fast.to_str())
            added = self._fast.get_added_tokens_decoder()
            back: dict[int, int] = {}
            for number in sorted(control):
                old, name = added.get(number), f"{guard}{number}{guard}"
                made.add_tokens([Added(name, lstrip=bool(old and old.lstrip), rstrip=bool(old and old.rstrip),
                                       normalized=False, special=False)])
                alias = made.token_to_id(name)
                assert alias is not None
                back[alias] = number
            made.encode_special_tokens = True
            self._named = made, back
        return self._named

    def decode(self, ids: Sequence[int], continues: bool) -> str:
        fast = self._continuing if continues else self._fast
        return str(fast.decode(list(ids), skip_special_tokens=False))


def any_of(tokens: Sequence[str]) -> re.Pattern[str] | None:
    """A pattern whose one group matches any of `tokens`, the longest first."""
    ordered = sorted({token for token in tokens if token}, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, ordered)) + ")") if ordered else None


def _without_blank(spec: Any) -> Any:
    """A normalizer's, pre-tokenizer's or decoder's JSON without the steps that add or strip a leading blank."""
    if not isinstance(spec, dict):
        return spec
    kind = spec.get("type")
    if kind == "Prepend":
        return None
    if kind == "Metaspace":
        spec["prepend_scheme"] = "never"
    elif kind == "ByteLevel" and "add_prefix_space" in spec:
        spec["add_prefix_space"] = False
    elif kind == "Strip" and "start" in spec:
        spec["start"] = 0
    elif kind == "Sequence":
        for field in ("normalizers", "pretokenizers", "decoders"):
            if field in spec:
                spec[field] = [kept for item in spec[field] if (kept := _without_blank(item)) is not None]
    return spec


def extended(path: Path, new: Sequence[str], ids: Mapping[str, int | None]) -> TokenizersBackend:
    """The tokenizer.json at `path` with the tokens `new`; InputError unless they get `ids` there as well."""
    backend = TokenizersBackend(path)
    backend.add([token for token in new if backend.id_of(token) is None])
    other = next((token for token in new if backend.id_of(token) != ids[token]), None)
    if other is not None:
        raise InputError(f"{path.parent}: the added token {other!r} has the id {ids[other]} in tokenizer.model but "
                         f"{backend.id_of(other)} in tokenizer.json; remove the file that is not used")
    return backend


__all__ = ["Backend", "Contradiction", "SentencePieceBackend", "TokenizersBackend", "any_of", "extended"]
