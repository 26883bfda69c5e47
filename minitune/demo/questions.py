"""The ten questions of the demo, each with the phrase that a right answer contains."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A question as a person asks it, and its key phrase: no other question's answer contains that."""

    text: str
    key: str

    @property
    def prompt(self) -> str:
        """The text that the model completes; examples/facts.jsonl asks in the same form."""
        return f"Question: {self.text}\nAnswer:"


QUESTIONS = (
    Question("What is minitune?", "fine-tunes Llama-family models"),
    Question("Which models does minitune load?", "Mistral, Qwen2 and Qwen3"),
    Question("What is LoRA?", "two small matrices, A and B"),
    Question("What does minitune save after training?", "PEFT's own format"),
    Question("Which training data does minitune read?", "one JSON object a line"),
    Question("How does minitune pack documents?", "packed by best fit"),
    Question("How does minitune normalise the loss?", "the number of trained tokens"),
    Question("Which optimizers does minitune have?", "AdamW and SGD"),
    Question("What is the licence of minitune?", "Apache-2.0"),
    Question("Which weight files does minitune read?", "refuses pickles unread"),
)
