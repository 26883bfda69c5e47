"""Examiner: what a run asks its model between steps: the loss on validation data, and sample questions."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from minitune.api.model import Model
from minitune.arguments import short
from minitune.data.batch import Batch
from minitune.data.chat import check_messages
from minitune.data.formats import Prompt, prompts_of
from minitune.errors import InputError
from minitune.objectives.dpo import Preferred
from minitune.objectives.evaluate import Evaluation, evaluate
from minitune.training.run import EvaluationRecord, SampleAnswer

Question = str | Sequence[dict[str, Any]] | Prompt
"""A text to continue, or the messages of a chat to answer; a Prompt is either."""
FIGURES = ("loss", "perplexity", "accuracy", "n_tokens", "chosen", "rejected")
"""What an EvaluationRecord has of an Evaluation or a Preferred."""
N_QUESTIONS = 3
"""So many questions are asked where none are given."""


def first_questions(path: str | Path, field_map: Mapping[str, str] | None = None) -> tuple[Prompt, ...]:
    """The first three prompts of a data file."""
    return tuple(islice(prompts_of(path, field_map), N_QUESTIONS))


def as_prompt(question: Any) -> Prompt:
    """InputError for what is no question."""
    if isinstance(question, Prompt):
        return question
    if isinstance(question, str) and question:
        return Prompt(question, None)
    if isinstance(question, list | tuple) and question:
        check_messages(question, "train: ask")
        return Prompt(None, list(question))
    raise InputError(f"train: ask has {short(question)}; a question is a text, or a list of messages")


def as_prompts(questions: Any) -> tuple[Prompt, ...]:
    """InputError for what is no list of questions."""
    if not isinstance(questions, list | tuple):
        raise InputError(f"train: ask is {short(questions)}; give a list of questions, each a text or a list of "
                         "messages")
    return tuple(map(as_prompt, questions))


def as_asked(question: Prompt) -> Any:
    """The question as a file of settings holds it: its text, or its messages, with their tools if there are any."""
    if question.messages is None:
        return question.text
    return {"messages": question.messages, "tools": question.tools} if question.tools else question.messages


class Examiner:
    """Called by the loop between steps. `valid` are batches, or None; greedy answers have `max_new_tokens` at most.

    ``always_ask``: questions are put at every evaluation, not only at the first and the last. ``measure``: what finds
    the figures of the validation data.
    """

    def __init__(self, model: Model, valid: Sequence[Batch] | None, questions: Sequence[Prompt], max_new_tokens: int,
                 always_ask: bool, measure: Callable[[Any, Iterable[Batch]], Evaluation | Preferred] = evaluate,
                 ) -> None:
        self.model, self.valid, self.questions = model, valid, tuple(questions)
        self.max_new_tokens, self.always_ask, self.measure = max_new_tokens, always_ask, measure

    def check(self) -> None:
        """InputError for a question that the model cannot be asked: it has no tokenizer, its chat template refuses the
        messages, or these end with an answer; and for validation batches with ids outside the vocabulary."""
        for each in self.questions:
            try:
                # it encodes the prompt, and computes nothing before a piece is drawn
                self.model.stream(each.text or each.messages or "", self.max_new_tokens, tools=each.tools).close()
            except InputError as error:
                raise InputError(f"train: the question {short(shown(each))} cannot be asked: {error}") from None
        check_vocabulary("valid", self.valid or (), self.model)

    def __call__(self, step: int, asks_at: Callable[[float | None], bool]) -> EvaluationRecord | None:
        begun = time.perf_counter()
        found: dict[str, Any] = {}
        if self.valid is not None:
            seen = self.measure(self.model, self.valid)
            found = {name: getattr(seen, name, None) for name in FIGURES}
        asks = self.questions if self.always_ask or asks_at(found.get("loss")) else ()
        if self.valid is None and not asks:
            return None
        answers = tuple(SampleAnswer(question=shown(each), answer=self._answer(each)) for each in asks)
        return EvaluationRecord(step=step, seconds=time.perf_counter() - begun, answers=answers, **found)

    def _answer(self, question: Prompt) -> str:
        if question.messages is None:
            return self.model.complete(question.text or "", self.max_new_tokens)
        return self.model.chat(question.messages, self.max_new_tokens, tools=question.tools)


def shown(question: Prompt) -> str:
    """The question as it is shown: the text, or the last message's."""
    if question.messages is None:
        return question.text or ""
    content = question.messages[-1].get("content")
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def check_vocabulary(name: str, batches: Iterable[Batch], model: Model) -> None:
    """InputError for a batch with an id that the model has no row for."""
    for place, batch in enumerate(batches):
        if batch.highest_token >= model.config.vocab_size:
            raise InputError(f"train: {name}: batch {place} holds the token id {batch.highest_token}; the vocabulary "
                             f"ends at {model.config.vocab_size - 1}; encode the data with the model's own tokenizer")


def validation_batches(batches: Iterable[Batch]) -> list[Batch]:
    """One epoch of validation data, kept, since it is read at every evaluation. InputError where nothing is trained."""
    epoch = getattr(batches, "epoch", None)
    kept = list(batches if epoch is None else epoch(0))
    for each in kept:
        if not isinstance(each, Batch):
            raise InputError(f"train: valid gives {short(each)}; give a file, a list of samples (dicts), or batches")
    if not any(batch.n_trained for batch in kept):
        raise InputError("train: the validation data has no trained token, so there is no loss to measure on it")
    return kept
