"""Tokenizer: text to ids and back, exactly as the checkpoint's own tokenizer library does it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from minitune.data.tokenizer_backends import Backend, Contradiction, SentencePieceBackend, TokenizersBackend
from minitune.data.tokenizer_files import TOKENIZER_FILES, TokenizerFiles, added_in_fast_file, read_tokenizer_files
from minitune.errors import InputError

UNKNOWN_ID = "\ufffd"
"""What an id that the tokenizer does not know decodes to: a model's head may be padded beyond the vocabulary."""


class Tokenizer:
    """A checkpoint's tokenizer; `load_tokenizer` makes one.

    ``vocab_size`` (the largest id + 1), ``bos_id``, ``eos_id``, ``pad_id``, ``unk_id`` (int or None), ``eos_ids`` (all
    ids that end a generation), ``control_ids`` (frozenset: no text spells them), ``adds_bos`` (does this family begin a
    text with BOS), ``chat_template`` (its Jinja source, or None), ``kind`` ("sentencepiece" or "tokenizers"),
    ``folder``.
    """

    def __init__(self, files: TokenizerFiles, backend: Backend) -> None:
        self._backend = backend
        self.folder = files.folder
        self.kind = backend.kind
        self.vocab_size = backend.vocab_size
        self.chat_template = files.chat_template
        named = {number for token in files.control if (number := backend.id_of(token)) is not None}
        control = frozenset(backend.control | named)
        self.bos_id = self._role("bos", files, control)
        self.eos_id = self._role("eos", files, control)
        self.pad_id = self._role("pad", files, control)
        self.unk_id = self._role("unk", files, control)
        ends = {number for number in (self.bos_id, self.eos_id) if number is not None}
        self.control_ids = control | ends
        stops = [self.eos_id, *(number for number in files.eos_ids if number in self.control_ids)]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(number for number in stops if number is not None))
        says = (files.add_bos, backend.puts_bos, True)
        self.adds_bos = self.bos_id is not None and next(flag for flag in says if flag is not None)

    def _role(self, role: str, files: TokenizerFiles, control: frozenset[int]) -> int | None:
        """The id of bos, eos, pad or unk: by name, else by the tokenizer file, else by config.json's id.

        A null bos_token means none (Qwen). An id in config.json counts only where it is a control token: that file
        often carries a default that names ordinary text.
        """
        token = files.named.get(role)
        if token is not None:
            number = self._backend.id_of(token)
            if number is None and role in ("bos", "eos"):
                raise InputError(f"{files.folder}: {role}_token is {token!r}, which the vocabulary lacks; correct "
                                 "tokenizer_config.json or fetch the tokenizer again")
            return number
        if role == "bos" and role in files.named:
            return None
        if role in self._backend.native:
            return self._backend.native[role]
        number = files.ids.get(role)
        return number if number in control else None

    def encode(self, text: str, bos: bool = True, eos: bool = False, parse_special: bool = False, *,
               continues: bool = False) -> list[int]:
        """The ids of `text`. ``bos`` puts BOS before it where the family has one; ``eos`` puts EOS behind it.

        A control token that is written in the text is text, unless ``parse_special``. ``continues`` says that the text
        follows other text, so that it gets no leading blank of the tokenizer's own; combine it with ``bos=False``.
        Raises InputError for text that is no Unicode (a lone surrogate), and for ``eos`` where the tokenizer has none.
        """
        return self.encode_many([text], bos, eos, parse_special, continues=continues)[0]

    def encode_many(self, texts: Sequence[str], bos: bool = True, eos: bool = False, parse_special: bool = False, *,
                    continues: bool = False) -> list[list[int]]:
        """`encode` for many texts at once, on all cores."""
        try:
            found = self._backend.encode(texts, continues, parse_special)
        except (RuntimeError, TypeError, UnicodeError):
            _check_texts(texts)
            raise
        if not parse_special:
            found = [self._encode_cut(text, continues) if not self._leaks.isdisjoint(ids) else ids
                     for text, ids in zip(texts, found, strict=True)]
        head = [self.bos_id] if bos and self.adds_bos and self.bos_id is not None else []
        tail = [self.require_eos()] if eos else []
        return [head + ids + tail for ids in found] if head or tail else found

    def decode(self, ids: Iterable[int], skip_special: bool = True, *, continues: bool = False) -> str:
        """The text of `ids`. ``continues``: they follow other ids, so the first one keeps its leading blank.

        An id that the tokenizer does not know becomes U+FFFD, a negative one raises InputError.
        """
        numbers = [int(number) for number in ids]
        if numbers and min(numbers) < 0:
            raise InputError(f"decode: {min(numbers)} is no token id")
        if skip_special:
            numbers = [number for number in numbers if number not in self.control_ids]
        if not numbers or max(numbers) < self.vocab_size:
            return self._backend.decode(numbers, continues)
        parts: list[str] = []
        run: list[int] = []
        for number in [*numbers, self.vocab_size]:
            if number < self.vocab_size:
                run.append(number)
                continue
            parts += [self._backend.decode(run, continues or bool(parts)), UNKNOWN_ID]
            run = []
        return "".join(parts[:-1])

    def token(self, number: int) -> str:
        """The vocabulary's own spelling of id `number`, such as "▁the" or "</s>"; "" where there is none."""
        return self._backend.token_of(number) if 0 <= number < self.vocab_size else ""

    def id_of(self, token: str) -> int | None:
        """The id of a token spelled as the vocabulary spells it, or None."""
        return self._backend.id_of(token)

    def require_eos(self) -> int:
        """``eos_id``; InputError where the tokenizer names none."""
        if self.eos_id is None:
            raise InputError(f"{self.folder}: the tokenizer has no end-of-text token; name one as eos_token in "
                             "tokenizer_config.json")
        return self.eos_id

    def check_vocab(self, vocab_size: int) -> None:
        """InputError if some id of this tokenizer has no row in a model of `vocab_size` rows."""
        if self.vocab_size > vocab_size:
            last = self.vocab_size - 1
            raise InputError(f"{self.folder}: the tokenizer's ids go up to {last} ({self.token(last)!r}) but the model "
                             f"has {vocab_size} rows; use the tokenizer that belongs to this model")

    @cached_property
    def _leaks(self) -> frozenset[int]:
        """The ids that plain text must not yield. The unknown token may be one of a file's special ones, yet is how
        text that a vocabulary lacks is rightly read; unless it also ends or begins a text."""
        return self.control_ids if self.unk_id in (None, self.bos_id, self.eos_id) else self.control_ids - {self.unk_id}

    @cached_property
    def _control_starts(self) -> re.Pattern[str]:
        names = {self.token(number) for number in self._leaks} - {""}
        return re.compile("(?=" + "|".join(re.escape(name) for name in sorted(names)) + ")")

    def _encode_cut(self, text: str, continues: bool) -> list[int]:
        """For a vocabulary that itself reads a control token in plain text (user-defined pieces, added tokens that are
        not marked special): cut each one after its first character, so that no part spells it."""
        cuts = [match.start() + 1 for match in self._control_starts.finditer(text)]
        bounds = [0, *cuts, len(text)]
        ids: list[int] = []
        for start, end in pairwise(bounds):
            ids += self._backend.encode([text[start:end]], continues or start > 0, False)[0]
        leaked = self._leaks.intersection(ids)
        if leaked:
            raise InputError(f"{self.folder}: this vocabulary reads plain text as the control token "
                             f"{self.token(min(leaked))!r}; remove it from the text {text[:40]!r}…")
        return ids

    def __repr__(self) -> str:
        return (f"Tokenizer({str(self.folder)!r}, {self.kind}, vocab_size={self.vocab_size}, bos_id={self.bos_id}, "
                f"eos_id={self.eos_id})")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    tokenizer.model is read through sentencepiece, tokenizer.json through tokenizers. Where a folder has both,
    sentencepiece decides: conversions of it differ on leading blanks and indented code. Tokens that the folder adds to
    the sentencepiece vocabulary are read from added_tokens.json, tokenizer_config.json and tokenizer.json. A
    tokenizer.model that is a tiktoken file (Llama 3's original/) or contradicts the folder's added tokens gives way to
    tokenizer.json. A control token is what the files call special or give a role (bos, eos, pad,
    additional_special_tokens); an added token that is neither, such as Qwen3's <think>, is ordinary vocabulary.
    Raises InputError for a folder without a tokenizer and for a broken file.
    """
    files = read_tokenizer_files(Path(folder))
    return Tokenizer(files, _open_backend(files))


def copy_tokenizer(source: str | Path, target: str | Path) -> None:
    """Copies the tokenizer's own files from one checkpoint folder to another; config.json is not one of them."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file() and Path(source).resolve() != Path(target).resolve():
            shutil.copyfile(Path(source) / name, Path(target) / name)


def _open_backend(files: TokenizerFiles) -> Backend:
    path = files.sentencepiece
    if path is None:
        assert files.fast is not None
        return TokenizersBackend(files.fast)
    if _is_tiktoken(path):
        if files.fast is None:
            raise InputError(f"{path}: a tiktoken file, which minitune does not read; use the Hugging Face folder of "
                             "the same model, which has tokenizer.json")
        return TokenizersBackend(files.fast)
    try:
        return SentencePieceBackend(path, {**files.added, **added_in_fast_file(files.fast)})
    except Contradiction:
        if files.fast is None:
            raise
        return TokenizersBackend(files.fast)


def _is_tiktoken(path: Path) -> bool:
    """A tiktoken file is lines of base64, a blank, a rank."""
    with path.open("rb") as file:
        return re.fullmatch(rb"[A-Za-z0-9+/=]+ \d+\s*", file.readline(256)) is not None


def _check_texts(texts: Sequence[str]) -> None:
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"encode: expected text, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"encode: {text[error.start]!r} at character {error.start} is a lone surrogate, not text; "
                             "repair the text's encoding") from error


__all__ = ["Tokenizer", "copy_tokenizer", "load_tokenizer"]
