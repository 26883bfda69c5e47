"""What a model says: completions, chats and streams of them agree, one by one and many at once."""

import json
import math

import pytest
import torch

import minitune as mt
from minitune.api.generation import Answer
from tests.files import write_tiny

MESSAGES = [{"role": "user", "content": "What is minitune?"}]
PROMPTS = ["import", "The number", "def add(a, b):\n    return"]


@pytest.fixture(scope="module")
def model(tiny):
    """A tiny network of random weights, wide enough to write all kinds of tokens, the bytes among them."""
    return mt.load(tiny, device="cpu", dtype="float32")


def test_many_texts_at_once_are_as_one_by_one(model):
    one_by_one = [model.complete(text, 20) for text in PROMPTS]
    assert model.complete(PROMPTS, 20) == model.complete(tuple(PROMPTS), 20) == one_by_one
    assert model.complete([], 20) == []
    answers = model.answer(PROMPTS, 20)
    assert [answer.text for answer in answers] == one_by_one
    assert [answer.ids for answer in answers] == model.generate([model.tokenizer.encode(text) for text in PROMPTS], 20)


@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0, "seed": 3}, {"temperature": 3.0, "top_k": 90, "seed": 4},
                                      {"temperature": 2.0, "top_p": 0.9, "seed": 5, "stop": ["e", " a"]}], ids=str)
@pytest.mark.parametrize("prompt", [*PROMPTS, MESSAGES], ids=str)
def test_a_stream_is_the_whole_answer_in_pieces(model, prompt, settings):
    whole = model.chat if isinstance(prompt, list) else model.complete
    stream = model.stream(prompt, 60, **settings)
    assert stream.finish_reason is None
    pieces = list(stream)
    answer = model.answer(prompt, 60, **settings)
    assert "".join(pieces) == whole(prompt, 60, **settings) == answer.text
    assert stream.finish_reason == answer.finish_reason
    assert "" not in pieces and (len(pieces) > 1 or settings)
    ids = model.tokenizer.encode(PROMPTS[0])
    assert list(model.stream(ids, 60, **settings)) == model.generate(ids, 60, **settings)


def test_why_an_answer_ended(model):
    text = model.complete("import", 30)
    stop = text[10:13]
    assert model.answer("import", 30).finish_reason == "length"
    assert model.answer("import", 30, stop=stop) == Answer(text[: text.index(stop)], model.generate(
        model.tokenizer.encode("import"), 30, stop=stop), "stop")
    assert model.answer(["import", "import os"], 30, stop=stop)[0].finish_reason == "stop"
    assert model.answer("import", 0) == Answer("", [], "length")


def test_a_stream_computes_no_more_than_is_asked_for(model, monkeypatch):
    from minitune.model import generate as generation

    made, real = [], generation.decode
    monkeypatch.setattr(generation, "decode", lambda *arguments: made.append(1) or real(*arguments))
    stream = model.stream([5, 6, 7], 1000)
    assert not made
    assert len([next(stream) for _ in range(4)]) == 4 and len(made) == 3
    stream.close()
    assert list(stream) == [] and stream.finish_reason is None and len(made) == 3


def test_a_chat_renders_the_template_and_ends_with_its_turn(model):
    ids = model.tokenizer.encode("### User:\nWhat is minitune?\n\n### Assistant:\n")
    assert model.chat(MESSAGES, 30) == model.tokenizer.decode(model.generate(ids, 30), continues=True)
    assert model.chat([MESSAGES, [*MESSAGES, {"role": "assistant", "content": "A tool."}, *MESSAGES]], 12) == [
        model.chat(MESSAGES, 12), model.chat([*MESSAGES, {"role": "assistant", "content": "A tool."}, *MESSAGES], 12)]


def test_a_chat_ends_where_its_template_ends_a_turn(tmp_path):
    """ChatML, whose <|im_end|> no file of the folder calls EOS; and a blank that the template writes is not said."""
    write_tiny(tmp_path)
    template = ("{% for m in messages %}{{ '<s>' + m.role + ' ' + m.content + '<unk>' }}{% endfor %}"
                "{% if add_generation_prompt %}{{ '<s>assistant' }}{% endif %}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<unk>"], "chat_template": template}))
    model = mt.load(tmp_path, device="cpu", dtype="float32")
    end, said = model.tokenizer.id_of("<unk>"), model.tokenizer.encode(" Yes, it is.", bos=False, continues=True)
    _say(model, [*said, end, 5, 6])
    assert end not in model.eos_ids
    assert model.answer(MESSAGES, 20) == Answer("Yes, it is.", said, "stop")
    _say(model, [*said, end, 5, 6])
    assert "".join(model.stream(MESSAGES, 20)) == "Yes, it is."
    _say(model, [*said, end, 5, 6])
    assert model.complete("x", 8).startswith(" Yes, it is.")     # a text that is no chat goes on


def _say(model, ids):
    """Make the network answer with `ids` at its next call, whatever the prompt."""
    def logits(hidden):
        made = torch.zeros(len(hidden), model.config.vocab_size)
        made[:, ids[said[0] % len(ids)]] = 1
        said[0] += 1
        return made

    said = [0]
    model.network.logits = logits


MISUSE = {
    "no message": (lambda m: m.chat([]), "chat: messages is \\[\\]"),
    "a text": (lambda m: m.chat("Hi"), "chat: messages is 'Hi'"),
    "none": (lambda m: m.chat(None), "chat: messages is None"),
    "no role": (lambda m: m.chat([{"content": "Hi"}]), "role"),
    "no content": (lambda m: m.chat([{"role": "user"}]), "content"),
    "one message": (lambda m: m.chat(MESSAGES[0]), "chat: messages is {"),
    "nothing to answer": (lambda m: m.chat([*MESSAGES, {"role": "assistant", "content": "x"}]), "assistant's, {"),
    "empty among many": (lambda m: m.chat([MESSAGES, []]), "chat: messages is \\[\\]"),
    "temperature nan": (lambda m: m.chat(MESSAGES, temperature=math.nan), "temperature is nan"),
    "temperature inf": (lambda m: m.stream("a", temperature=math.inf), "temperature is inf"),
    "top_p 0": (lambda m: m.complete("a", temperature=1.0, top_p=0), "top_p is 0"),
    "top_p nan": (lambda m: m.complete("a", temperature=1.0, top_p=math.nan), "top_p is nan"),
    "top_k 0": (lambda m: m.complete("a", temperature=1.0, top_k=0), "top_k is 0"),
    "stream of many": (lambda m: m.stream(["a", "b"]), "stream: prompt is"),
    "stream of nothing": (lambda m: m.stream([]), "empty"),
    "stream of a number": (lambda m: m.stream(3), "ids is 3"),
    "an id too large": (lambda m: m.stream([10**6]), "1000000"),
    "numbers as texts": (lambda m: m.complete([1, 2]), "expected text"),
    "max_new_tokens": (lambda m: m.chat(MESSAGES, max_new_tokens=-1), "max_new_tokens is -1"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_one_clear_error_at_once(model, name):
    run, words = MISUSE[name]
    with pytest.raises(mt.InputError, match=words) as error:
        run(model)
    assert "\n" not in str(error.value)


def test_without_a_tokenizer_ids_are_answered_and_texts_refused(tmp_path):
    mt.init("tiny", tmp_path, seed=1)
    model = mt.load(tmp_path, device="cpu", dtype="float32")
    assert model.answer([5, 6], 3) == Answer("", model.generate([5, 6], 3), "length")
    assert list(model.stream([5, 6], 3)) == model.generate([5, 6], 3)
    for run in (lambda: model.complete("a"), lambda: model.chat(MESSAGES), lambda: model.stream("a")):
        with pytest.raises(mt.InputError, match="no tokenizer"):
            run()
