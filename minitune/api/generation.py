"""Generation: a network with its tokenizer, and what it writes: answers to ids, texts and conversations, whole or in
pieces."""

from __future__ import annotations

import contextlib
import json
import operator
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import torch
from torch import Tensor, nn

from minitune.api.ending import Ending, FinishReason, Turn, Writer, turn_of
from minitune.arguments import answers_names, short
from minitune.config import ModelConfig
from minitune.data.tokenizer import Tokenizer
from minitune.errors import InputError
from minitune.model.generate import generate, sampler, steps
from minitune.model.llama import Llama

Piece = TypeVar("Piece", str, int)
Message = Mapping[str, Any]
Stop = str | Sequence[str] | None


@dataclass(frozen=True)
class Answer:
    """What a model wrote: its text, its ids without the end, and why it ended: "stop" (an end token or a stop text) or
    "length" (`max_new_tokens`). Without a tokenizer the text is empty."""

    text: str
    ids: list[int]
    finish_reason: FinishReason


@dataclass(frozen=True)
class Asked:
    """The prompts of one call: their ids, whether there is one that is no list of prompts, whether the answers are
    wanted as text, and the frame of a conversation's turn."""

    prompts: list[list[int]]
    single: bool
    text: bool
    turn: Turn | None = None


class Pieces(Generic[Piece]):
    """An iterator over the pieces of one answer as they are written. ``finish_reason`` is None until it is done;
    `close`, or dropping it, ends the generation."""

    def __init__(self, found: Generator[list[int]], writer: Writer, text: bool):
        self._writer, self._text = writer, text
        self._pieces: Generator[Any] = self._write(found)

    @property
    def finish_reason(self) -> FinishReason | None:
        return self._writer.finish_reason

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        piece: Piece = next(self._pieces)
        return piece

    def close(self) -> None:
        self._pieces.close()

    def _write(self, found: Generator[list[int]]) -> Generator[Any]:
        given = 0
        with contextlib.closing(found):
            for (token,) in found:
                piece = self._writer.add(token)
                if self._writer.finish_reason is not None:
                    break
                yield from ([piece] if piece else []) if self._text else self._writer.ids[given : self._writer.settled]
                given = self._writer.settled
            else:
                piece = self._writer.close()
        yield from ([piece] if piece else []) if self._text else self._writer.ids[given:]


class Generation(nn.Module):
    """A network with its tokenizer (None if the checkpoint has none) and the folder it came from.

    All that it writes is greedy at temperature 0, else drawn from softmax(logits / temperature), cut to the `top_k`
    likeliest tokens, then to the fewest whose probabilities reach `top_p`; the same `seed` draws the same. An answer
    ends at an end token, at a `stop` text (which is not part of it) or after `max_new_tokens`.
    """

    def __init__(self, network: Llama, tokenizer: Tokenizer | None, path: Path | None = None):
        super().__init__()
        self.network, self.path = network, path
        self._tokenizer = tokenizer
        self._framed: tuple[str, Turn] | None = None

    @property
    def config(self) -> ModelConfig:
        return self.network.config

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def tokenizer(self) -> Tokenizer:
        """InputError if the checkpoint folder has none."""
        if self._tokenizer is None:
            raise InputError(f"{self.path}: no tokenizer.json or tokenizer.model in the folder; text needs one, put it "
                             "beside config.json")
        return self._tokenizer

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends an answer, by config.json, generation_config.json and the tokenizer."""
        known = set(self.config.eos_ids)
        if self._tokenizer is not None:
            known |= set(self._tokenizer.eos_ids)
        return frozenset(known)

    @overload
    def generate(self, ids: Sequence[int] | Tensor, max_new_tokens: int = ..., temperature: float = ...,
                 top_k: int | None = ..., top_p: float | None = ..., stop: Stop = ...,
                 seed: int | None = ...) -> list[int]: ...
    @overload
    def generate(self, ids: Sequence[Sequence[int]], max_new_tokens: int = ..., temperature: float = ...,
                 top_k: int | None = ..., top_p: float | None = ..., stop: Stop = ...,
                 seed: int | None = ...) -> list[list[int]]: ...
    @answers_names
    def generate(self, ids: Any, max_new_tokens: int = 128, temperature: float = 0.0, top_k: int | None = None,
                 top_p: float | None = None, stop: Stop = None, seed: int | None = None) -> Any:
        """Continue one prompt (ids) or many (a list of them) -> the new ids alone, without end token and stop text."""
        asked = _asked_ids(ids)
        answers = self._answers(asked, max_new_tokens, (temperature, top_k, top_p, seed), stop)
        return answers[0].ids if asked.single else [answer.ids for answer in answers]

    @overload
    def complete(self, text: str, max_new_tokens: int = ..., temperature: float = ..., top_k: int | None = ...,
                 top_p: float | None = ..., stop: Stop = ..., seed: int | None = ...) -> str: ...
    @overload
    def complete(self, text: list[str] | tuple[str, ...], max_new_tokens: int = ..., temperature: float = ...,
                 top_k: int | None = ..., top_p: float | None = ..., stop: Stop = ...,
                 seed: int | None = ...) -> list[str]: ...
    @answers_names
    def complete(self, text: Any, max_new_tokens: int = 128, temperature: float = 0.0, top_k: int | None = None,
                 top_p: float | None = None, stop: Stop = None, seed: int | None = None) -> Any:
        """What the model writes after `text`, or after each of a list of texts, all at once; control strings inside
        them stay text."""
        asked = _asked_text(self.tokenizer, text)
        answers = self._answers(asked, max_new_tokens, (temperature, top_k, top_p, seed), stop)
        return answers[0].text if asked.single else [answer.text for answer in answers]

    @overload
    def chat(self, messages: Sequence[Message], max_new_tokens: int = ..., temperature: float = ...,
             top_k: int | None = ..., top_p: float | None = ..., stop: Stop = ..., seed: int | None = ...,
             tools: Sequence[Any] | None = ...) -> str: ...
    @overload
    def chat(self, messages: Sequence[Sequence[Message]], max_new_tokens: int = ..., temperature: float = ...,
             top_k: int | None = ..., top_p: float | None = ..., stop: Stop = ..., seed: int | None = ...,
             tools: Sequence[Any] | None = ...) -> list[str]: ...
    @answers_names
    def chat(self, messages: Any, max_new_tokens: int = 512, temperature: float = 0.0, top_k: int | None = None,
             top_p: float | None = None, stop: Stop = None, seed: int | None = None,
             tools: Sequence[Any] | None = None) -> Any:
        """The next assistant's message of a conversation, [{"role": "user", "content": "…"}, …], or of each of a list
        of them: its content, as text. The tokenizer's own chat template renders them, and says what ends a turn.

        InputError for what is no conversation, for one that already ends with an assistant's message, and where the
        template refuses it.
        """
        asked = self._asked_messages(messages, tools)
        answers = self._answers(asked, max_new_tokens, (temperature, top_k, top_p, seed), stop)
        return answers[0].text if asked.single else [answer.text for answer in answers]

    @answers_names
    def answer(self, prompt: Any, max_new_tokens: int = 512, temperature: float = 0.0, top_k: int | None = None,
               top_p: float | None = None, stop: Stop = None, seed: int | None = None,
               tools: Sequence[Any] | None = None) -> Any:
        """`generate`, `complete` or `chat`, by what `prompt` is (ids, a text, a conversation, or a list of one kind),
        as an `Answer` with text, ids and finish_reason, or a list of them."""
        asked = self._asked(prompt, tools)
        answers = self._answers(asked, max_new_tokens, (temperature, top_k, top_p, seed), stop, reads=True)
        return answers[0] if asked.single else answers

    @overload
    def stream(self, prompt: str | Sequence[Message], max_new_tokens: int = ..., temperature: float = ...,
               top_k: int | None = ..., top_p: float | None = ..., stop: Stop = ..., seed: int | None = ...,
               tools: Sequence[Any] | None = ...) -> Pieces[str]: ...
    @overload
    def stream(self, prompt: Sequence[int] | Tensor, max_new_tokens: int = ..., temperature: float = ...,
               top_k: int | None = ..., top_p: float | None = ..., stop: Stop = ..., seed: int | None = ...,
               tools: Sequence[Any] | None = ...) -> Pieces[int]: ...
    @answers_names
    def stream(self, prompt: Any, max_new_tokens: int = 512, temperature: float = 0.0, top_k: int | None = None,
               top_p: float | None = None, stop: Stop = None, seed: int | None = None,
               tools: Sequence[Any] | None = None) -> Any:
        """The answer in pieces, as it is written: texts for a text or a conversation, ids for ids.

        No piece holds half a character or the beginning of a stop text, and joined they are what `complete`, `chat` or
        `generate` would give. While it runs the model must not be trained; made within `adapter_disabled`, it is the
        base's throughout.
        """
        asked = self._asked(prompt, tools)
        if not asked.single:
            raise InputError(f"stream: prompt is {short(prompt)}; give one text, conversation or list of ids")
        writer = Writer(self._ending(asked, stop), asked.text)
        choose = sampler(temperature, top_k, top_p, seed, self.device)
        return Pieces(steps(self.network, asked.prompts, max_new_tokens, choose), writer, asked.text)

    def _asked(self, prompt: Any, tools: Sequence[Any] | None) -> Asked:
        """By the first innermost thing: a text, a message, or else ids."""
        inner = prompt
        while isinstance(inner, Sequence) and not isinstance(inner, str) and len(inner):
            inner = inner[0]
        if isinstance(inner, str):
            return _asked_text(self.tokenizer, prompt)
        if isinstance(inner, Mapping):
            return self._asked_messages(prompt, tools)
        return _asked_ids(prompt)

    def _asked_messages(self, messages: Any, tools: Sequence[Any] | None) -> Asked:
        several = isinstance(messages, list | tuple) and len(messages) > 0 and isinstance(messages[0], list | tuple)
        conversations = messages if several else [messages]
        prompts = [self.tokenizer.encode_chat(turns, tools, add_generation_prompt=True)[0] for turns in conversations]
        for turns in conversations:
            if turns[-1]["role"] == "assistant":
                raise InputError(f"chat: the last message is the assistant's, {short(turns[-1])}; end with the message "
                                 "to answer")
        return Asked(prompts, not several, text=True, turn=self._turn)

    @property
    def _turn(self) -> Turn:
        """Found once for each setting of the chat template."""
        settings = json.dumps(dict(self.tokenizer.chat_template_kwargs))       # of values, True is 1
        if self._framed is None or self._framed[0] != settings:
            self._framed = settings, turn_of(self.tokenizer)
        return self._framed[1]

    def _ending(self, asked: Asked, stop: Stop) -> Ending:
        return Ending(self.eos_ids, self._tokenizer, stop, asked.turn)

    def _answers(self, asked: Asked, max_new_tokens: int, draw: tuple[float, int | None, float | None, int | None],
                 stop: Stop, reads: bool = False) -> list[Answer]:
        """The answers to all prompts at once; their texts are there if they are wanted."""
        ending = self._ending(asked, stop)
        writers = [Writer(ending, reads or asked.text) for _ in asked.prompts]
        texts: list[list[str]] = [[] for _ in writers]

        def finished(row: int, ids: list[int]) -> bool:
            texts[row].append(writers[row].add(ids[-1]))
            return writers[row].finish_reason is not None

        generate(self.network, asked.prompts, max_new_tokens, sampler(*draw, self.device), finished)
        for text, writer in zip(texts, writers, strict=True):
            text.append(writer.close())
        return [Answer("".join(text), writer.ids, writer.finish_reason or "length")
                for text, writer in zip(texts, writers, strict=True)]


def _asked_ids(ids: Any) -> Asked:
    """A flat list or tensor of ids, or a list of such."""
    if isinstance(ids, Tensor):
        ids = ids.tolist()
    try:
        single = len(ids) == 0 or not isinstance(ids[0], Sequence | Tensor)
        prompts = [[operator.index(number) for number in prompt] for prompt in ([ids] if single else ids)]
    except (TypeError, RuntimeError, LookupError) as error:
        raise InputError(f"generate: ids is {short(ids)}; give token ids or a list of such, as tokenizer.encode(text) "
                         "makes them; complete(text) takes text") from error
    return Asked(prompts, single, text=False)


def _asked_text(tokenizer: Tokenizer, text: Any) -> Asked:
    single = not isinstance(text, list | tuple)
    return Asked(tokenizer.encode_many([text] if single else text), single, text=True)
