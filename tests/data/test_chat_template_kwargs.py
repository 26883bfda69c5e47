"""Settings of a chat template, chat_template_kwargs: what transformers writes with them, and what is no setting."""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any

import pytest

from minitune.data import cache
from minitune.data.tokenizer import Tokenizer, load_tokenizer
from minitune.errors import InputError
from tests.data.chat_templates import QWEN_3

ASKED = [{"role": "user", "content": "Is it so?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "yes"}]
THOUGHT = "<think>\n\n</think>\n\n"
STYLED = ("{{ style.name | default('none') if style is defined }}{# loud #}{% for m in messages %}"
          "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
          "{{ '<|im_start|>assistant\n' if add_generation_prompt }}")


@pytest.fixture
def qwen(qwen_with: Callable[[str], Tokenizer]) -> Tokenizer:
    return qwen_with(QWEN_3)


@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": True}, {"enable_thinking": False}])
@pytest.mark.parametrize("prompt", [False, True])
def test_ids_are_those_of_transformers(qwen: Tokenizer, kwargs: dict[str, Any], prompt: bool) -> None:
    transformers = pytest.importorskip("transformers")
    truth = transformers.PreTrainedTokenizerFast(tokenizer_file=str(qwen.folder / "tokenizer.json"),
                                                 eos_token="<|im_end|>", chat_template=QWEN_3)
    qwen.chat_template_kwargs = kwargs
    chat = ASKED if prompt else ANSWERED
    ids, _ = qwen.encode_chat(chat, add_generation_prompt=prompt)
    assert ids == truth.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False, **kwargs)


def test_what_the_template_writes_with_them_is_not_trained(qwen: Tokenizer) -> None:
    said = {}
    for thinking in (True, False):
        qwen.chat_template_kwargs = {"enable_thinking": thinking}
        ids, trained = qwen.encode_chat(ANSWERED)
        said[thinking] = qwen.decode([each for each, flag in zip(ids, trained, strict=True) if flag],
                                     skip_special=False)
        assert qwen.turn_end == "<|im_end|>"
    assert said == {True: f"{THOUGHT}yes<|im_end|>", False: "yes<|im_end|>"}
    qwen.chat_template_kwargs = {}
    assert qwen.render_chat(ASKED, add_generation_prompt=True).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("value", ["loud", "<|im_end|>", "é\n", ["a"], 1.5, None])
def test_any_json_is_a_value(qwen_with: Callable[[str], Tokenizer], value: Any) -> None:
    tokenizer = qwen_with(STYLED)
    plain = tokenizer.render_chat(ANSWERED)
    tokenizer.chat_template_kwargs = {"style": {"name": value}}
    assert tokenizer.chat_template_kwargs == {"style": {"name": value}}
    assert tokenizer.render_chat(ANSWERED) == f"{value}{plain}"


def test_a_cached_file_belongs_to_its_settings(qwen: Tokenizer, tmp_path: Any) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "yes"}\n')
    found = {cache.entry(path, qwen, None)}
    for thinking in (True, False):
        qwen.chat_template_kwargs = {"enable_thinking": thinking}
        found.add(cache.entry(path, qwen, None))
    assert len(found) == 3 and None not in found


@pytest.mark.parametrize(("given", "words"), [
    ({"enable_thinkin": False}, r"does not read 'enable_thinkin'; did you mean 'enable_thinking'\?"),
    ({"zzz": 1}, "does not read 'zzz'; leave it out"),
    ({"messages": []}, "messages is no setting, it comes from the conversation"),
    ({"eos_token": "x"}, "eos_token is no setting"),
    ({"enable_thinking": {1}}, r"enable_thinking is \{1\}; it must be JSON"),
    ({"enable_thinking": float("nan")}, "enable_thinking is nan; it must be JSON"),
    ({"enable_thinking": ["\ud800"]}, r"enable_thinking is \['\\ud800'\]; it must be JSON"),
    ({"enable_thinking": {1: 2, "1": 3}}, "enable_thinking is .*; it must be JSON"),
    ({"message": 1}, "does not read 'message'"), ({"endfor": 1}, "does not read 'endfor'"),
    ({"range": 1}, "does not read 'range'"), ({"assistant": 1}, "does not read 'assistant'"),
    ("enable_thinking", "is 'enable_thinking'; give a table"), ({1: 2}, "give a table")])
def test_what_is_no_setting_is_refused_and_changes_nothing(qwen: Tokenizer, given: Any, words: str) -> None:
    qwen.chat_template_kwargs = {"enable_thinking": False}
    with pytest.raises(InputError, match=f"^chat_template_kwargs.*{words}"):
        qwen.chat_template_kwargs = given
    assert qwen.chat_template_kwargs == {"enable_thinking": False}


def test_they_are_a_copy_and_are_set_as_a_whole(qwen_with: Callable[[str], Tokenizer]) -> None:
    tokenizer, mine = qwen_with(STYLED), {"style": {"name": ["a"], 2: 1}}
    tokenizer.chat_template_kwargs = mine
    mine["style"]["name"].append("b")       # type: ignore[attr-defined,index,union-attr]
    assert tokenizer.chat_template_kwargs == {"style": {"name": ["a"], "2": 1}}
    with pytest.raises(TypeError):
        tokenizer.chat_template_kwargs["style"] = "loud"        # type: ignore[index]


def test_a_name_beside_what_looks_like_a_comment_is_read(qwen_with: Callable[[str], Tokenizer]) -> None:
    tokenizer = qwen_with("{{ '{#' }}{{ style }}{{ '#}' }}" + STYLED)
    tokenizer.chat_template_kwargs = {"style": "loud"}
    assert tokenizer.render_chat(ANSWERED).startswith("{#loud#}")


def test_a_template_that_cannot_be_read_is_told(qwen_with: Callable[[str], Tokenizer]) -> None:
    with pytest.raises(InputError, match=r"^chat_template_kwargs: the chat template cannot be read: .*end of template"):
        qwen_with("{% if").chat_template_kwargs = {"style": "loud"}


def test_names_in_comments_and_a_tokenizer_without_template_read_none(
        qwen_with: Callable[[str], Tokenizer], byte_level: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="does not read 'loud'"):
        qwen_with(STYLED).chat_template_kwargs = {"loud": True}
    with pytest.raises(InputError, match="has 'loud', but the tokenizer has no chat template; leave it out"):
        load_tokenizer(byte_level()).chat_template_kwargs = {"loud": True}


@pytest.mark.parametrize("costly", ["{{ 'a' * 10**9 }}", "{% set k = 'a' * 10**9 %}", "{{ 7 ** (7**9) }}"])
def test_a_template_is_computed_nowhere_but_in_its_own_process(qwen_with: Callable[[str], Tokenizer],
                                                               costly: str) -> None:
    """jinja computes a template's constants when it is asked which names the template reads."""
    tokenizer = qwen_with(STYLED + costly)
    before = resource.getrusage(resource.RUSAGE_SELF)
    if "**9)" in costly:
        with pytest.raises(InputError, match="the chat template cannot be read: it takes too long"):
            tokenizer.chat_template_kwargs = {"style": 1}
    else:       # jinja gives up where the memory ends, and would compute it when it writes
        tokenizer.chat_template_kwargs = {"style": 1}
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_maxrss - before.ru_maxrss < 100 << 10 and after.ru_utime - before.ru_utime < 1
