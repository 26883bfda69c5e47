"""The files in examples/ are what the demo takes them for."""

from __future__ import annotations

import pytest

from minitune.demo.questions import QUESTIONS
from tests.files import EXAMPLES, records


def test_every_fact_is_a_prompt_in_the_demo_form_and_a_short_completion() -> None:
    for fact in records(EXAMPLES / "facts.jsonl"):
        assert set(fact) == {"prompt", "completion"}
        assert fact["prompt"].startswith("Question: ") and fact["prompt"].endswith("\nAnswer:")
        assert fact["completion"].startswith(" ") and fact["completion"].endswith(".")
        assert len(fact["completion"].split()) <= 25


def test_prompts_are_unique() -> None:
    prompts = [fact["prompt"] for fact in records(EXAMPLES / "facts.jsonl")]
    assert len(prompts) == len(set(prompts)) >= 40


def test_there_are_ten_questions_and_the_first_is_the_promised_one() -> None:
    assert len({question.text for question in QUESTIONS}) == 10
    assert QUESTIONS[0].text == "What is minitune?"


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.key)
def test_key_phrase_marks_the_answer_to_its_question_alone(question) -> None:
    answers = {fact["prompt"]: fact["completion"] for fact in records(EXAMPLES / "facts.jsonl")}
    assert {answer for answer in answers.values() if question.key in answer} == {answers[question.prompt]}
    assert question.key not in question.prompt, "the question itself must not give the answer away"


def test_chats_alternate_and_end_with_the_assistant() -> None:
    for chat in records(EXAMPLES / "chat.jsonl"):
        roles = [message["role"] for message in chat["messages"] if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
        assert all(message["content"].strip() for message in chat["messages"])


def test_what_is_shipped_is_small() -> None:
    files = {path.name: path.stat().st_size for path in (EXAMPLES / "base").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.model", "SOURCE.md"} <= files.keys()
    assert sum(files.values()) <= 8_000_000
