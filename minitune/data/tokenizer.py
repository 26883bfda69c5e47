"""Tokenizer: text to ids and back, exactly as the checkpoint's own tokenizer library does it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

from minitune.arguments import short
from minitune.data import chat
from minitune.data.template import ChatTemplate, checked_kwargs
from minitune.data.tokenizer_backends import Backend, Contradiction, SentencePieceBackend, TokenizersBackend, extended
from minitune.data.tokenizer_files import (
    TokenizerFiles,
    added_in_fast_file,
    digests_of,
    read_tokenizer_files,
)
from minitune.errors import InputError
from minitune.names import TOKENIZER_ELSEWHERE

UNKNOWN_ID = "\ufffd"
"""What an id that the tokenizer does not know decodes to: a model's head may be padded beyond the vocabulary."""


class Tokenizer:
    """A checkpoint's tokenizer; `load_tokenizer` makes one.

    ``vocab_size`` (the largest id + 1), ``bos_id``, ``eos_id``, ``pad_id``, ``unk_id`` (int or None), ``eos_ids`` (all
    ids that end a generation), ``control_ids`` (frozenset: no text spells them), ``adds_bos`` (does this family begin a
    text with BOS), ``chat_template`` (its Jinja source, or None), ``chat_templates`` (that of each use, as "default" or
    "tool_use"), ``kind`` ("sentencepiece" or "tokenizers"), ``folder``, ``backend`` (the library behind it), ``added``
    (the tokens that `load_tokenizer` was asked to add to the folder's), ``new`` (those of them that the folder had
    not), ``digests`` ({file name: sha256} of the files as they were read). ``now`` may be set: the moment (datetime)
    that a chat template writes where it calls strftime_now; None is the clock's. ``chat_template_kwargs`` may be set
    too: what the template reads beside the conversation, such as {"enable_thinking": False}.
    """

    def __init__(self, files: TokenizerFiles, backend: Backend, added: Sequence[str], new: Sequence[str],
                 digests: Mapping[str, str]) -> None:
        self.backend = backend
        self.added, self.new, self.digests = tuple(added), tuple(new), dict(digests)
        self.folder = files.folder
        self.kind = backend.kind
        self.vocab_size = backend.vocab_size
        self.chat_templates = files.chat_templates
        self.chat_template = files.chat_templates.get("default")
        self.now: datetime | None = None
        self._kwargs: dict[str, Any] = {}
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
        self._template_file = files.template_file
        self._templates: dict[str, ChatTemplate] = {}       # by their use, each made when it is first asked for

    def _role(self, role: str, files: TokenizerFiles, control: frozenset[int]) -> int | None:
        """The id of bos, eos, pad or unk: by name, else by the tokenizer file, else by config.json's id.

        A null bos_token means none (Qwen). An id in config.json counts only where it is a control token: that file
        often carries a default that names ordinary text.
        """
        token = files.named.get(role)
        if token is not None:
            number = self.backend.id_of(token)
            if number is None and role in ("bos", "eos"):
                raise InputError(f"{files.folder}: {role}_token is {token!r}, which the vocabulary lacks; correct "
                                 "tokenizer_config.json or fetch the tokenizer again")
            return number
        if role == "bos" and role in files.named:
            return None
        if role in self.backend.native:
            return self.backend.native[role]
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
            found = self.backend.encode(texts, continues, parse_special)
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
            return self.backend.decode(numbers, continues)
        parts: list[str] = []
        run: list[int] = []
        for number in [*numbers, self.vocab_size]:
            if number < self.vocab_size:
                run.append(number)
                continue
            parts += [self.backend.decode(run, continues or bool(parts)), UNKNOWN_ID]
            run = []
        return "".join(parts[:-1])

    def token(self, number: int) -> str:
        """The vocabulary's own spelling of id `number`, such as "▁the" or "</s>"; "" where there is none."""
        return self.backend.token_of(number) if 0 <= number < self.vocab_size else ""

    def id_of(self, token: str) -> int | None:
        """The id of a token spelled as the vocabulary spells it, or None."""
        return self.backend.id_of(token)

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

    # -- chat

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None,
                    add_generation_prompt: bool = False) -> tuple[list[int], list[bool]]:
        """(ids, trained) of a conversation [{"role", "content", …}] by the tokenizer's template, else the plain one.

        The ids are those of transformers' `apply_chat_template(tokenize=True)`, except that a control token which a
        message spells stays text, and that a template which writes JSON gets a call's arguments as an object where they
        are JSON text. ``trained`` says which are the assistant's (turns with "weight": 0 are not), the
        token that ends a turn included; where the template writes none, EOS is put behind a conversation that ends with
        an answer. With ``add_generation_prompt`` the ids are a prompt, and none is trained. A template that calls
        strftime_now writes today's date, or that of ``now``. Raises InputError for what is no conversation, for one
        that the template refuses or leaves a part out of, and where what is trained cannot be told
        (`minitune.data.mask.trained_spans`).
        """
        return chat.encode_chat(messages, self, tools, add_generation_prompt)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None,
                    add_generation_prompt: bool = False) -> str:
        """A conversation as text, control tokens spelled out: to look at, since text that a message spells cannot be
        told from them any more."""
        return chat.render_chat(messages, self, tools, add_generation_prompt)

    @property
    def chat_template_kwargs(self) -> Mapping[str, Any]:
        """To be set as a whole; a value of it cannot be."""
        return MappingProxyType(self._kwargs)

    @chat_template_kwargs.setter
    def chat_template_kwargs(self, given: Mapping[str, Any]) -> None:
        self._kwargs = checked_kwargs(given, self.chat_templates.values())
        self._templates.clear()
        self.__dict__.pop("turn_end", None)

    @property
    def writes_date(self) -> bool:
        """Whether a chat template calls strftime_now, so that what is trained on depends on the day."""
        return any("strftime_now" in source for source in self.chat_templates.values())

    def clock(self) -> datetime:
        """``now``, or the moment that it is."""
        return self.now or datetime.now()

    def template_for(self, tools: Sequence[Any] | None = None) -> ChatTemplate | None:
        """The chat template for conversations with or without tools; None where the folder has none."""
        if not self.chat_templates:
            return None
        use = "tool_use" if tools and "tool_use" in self.chat_templates else "default"
        if use not in self.chat_templates:
            uses = ", ".join(sorted(self.chat_templates))
            raise InputError(f"{self._template_file}: has chat templates for {uses}, but none named default; name one "
                             "so")
        if use not in self._templates:
            roles = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id, "unk": self.unk_id}
            variables = {f"{role}_token": self.token(number) for role, number in roles.items() if number is not None}
            variables |= self._kwargs
            name = str(self._template_file) if use == "default" else f"{self._template_file} ({use})"
            control = [self.token(number) for number in self.control_ids]
            self._templates[use] = ChatTemplate(name, self.chat_templates[use], variables, control, self.clock)
        return self._templates[use]

    @cached_property
    def turn_end(self) -> str | None:
        """The control string that the chat template writes behind an assistant's turn, such as "<|im_end|>"; None where
        it writes none or does not render so plain a conversation as is tried."""
        template = self.template_for()
        if template is None:
            return self.token(self.eos_id) if self.eos_id is not None else None
        asked = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
        try:
            text = next(template.render([(asked, None, "chat")])).text
        except InputError:
            return None
        behind = text.rpartition("Yes")[2].lstrip()
        return next((token for token in template.control if behind.startswith(token)), None)

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
            ids += self.backend.encode([text[start:end]], continues or start > 0, False)[0]
        leaked = self._leaks.intersection(ids)
        if leaked:
            raise InputError(f"{self.folder}: this vocabulary reads plain text as the control token "
                             f"{self.token(min(leaked))!r}; remove it from the text {text[:40]!r}…")
        return ids

    def __getattr__(self, name: str) -> Any:
        """What others' tokenizers have is answered with ours."""
        said = f"; here it is {TOKENIZER_ELSEWHERE[name]}" if name in TOKENIZER_ELSEWHERE else ""
        raise AttributeError(f"a Tokenizer has no {name}{said}", name=name, obj=self)

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise InputError("tokenizer: it is not called here; say tokenizer.encode(text), encode_many(texts) or "
                         "encode_chat(messages)")

    def __repr__(self) -> str:
        return (f"Tokenizer({str(self.folder)!r}, {self.kind}, vocab_size={self.vocab_size}, bos_id={self.bos_id}, "
                f"eos_id={self.eos_id})")


def load_tokenizer(folder: str | Path, add: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer of a checkpoint folder, with the tokens `add` behind its vocabulary: ordinary ones, which text
    spells, each one id; those that it has already are left as they are.

    tokenizer.model is read through sentencepiece, tokenizer.json through tokenizers. Where a folder has both,
    sentencepiece decides: conversions of it differ on leading blanks and indented code. Tokens that the folder adds to
    the sentencepiece vocabulary are read from added_tokens.json, tokenizer_config.json and tokenizer.json. A
    tokenizer.model that is a tiktoken file (Llama 3's original/) or contradicts the folder's added tokens gives way to
    tokenizer.json. A control token is what the files call special or give a role (bos, eos, pad,
    additional_special_tokens); an added token that is neither, such as Qwen3's <think>, is ordinary vocabulary.
    Raises InputError for a folder without a tokenizer, for a broken file, and where tokenizer.model and tokenizer.json
    would give an added token different ids.
    """
    if isinstance(add, str):
        raise InputError(f"load_tokenizer: add is {short(add)}; give a list of tokens, as [{short(add)}]")
    for token in add:
        if not isinstance(token, str) or not token.strip() or token != token.strip():
            raise InputError(f"load_tokenizer: the token to add is {short(token)}; give a text without blanks around "
                             "it")
    folder = Path(folder)
    digests = digests_of(folder)
    files = read_tokenizer_files(folder)
    backend = _open_backend(files)
    new = [token for token in dict.fromkeys(add) if backend.id_of(token) is None]
    backend.add(new)
    if new and files.fast is not None and isinstance(backend, SentencePieceBackend):
        extended(files.fast, new, {token: backend.id_of(token) for token in new})
    if digests_of(folder) != digests:
        raise InputError(f"{folder}: the tokenizer's files changed while they were read; load it again")
    return Tokenizer(files, backend, tuple(dict.fromkeys(add)), new, digests)


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


__all__ = ["Tokenizer", "load_tokenizer"]
