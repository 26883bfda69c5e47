"""Chats by the templates of real checkpoints, against transformers: text, ids, and the mask of {% generation %}."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitune.data.chat import encode_conversations
from minitune.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.chat_templates import KINDS, Kind

transformers = pytest.importorskip("transformers")
Make = Callable[..., Path]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tells the weather.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "description": "Größe <b> \"x\""}}}}}]


def _fast(folder: Path, kind: Kind, corpus: list[str], write_folder: Make) -> Any:
    """A byte-level tokenizer.json with the kind's control tokens, as Qwen and Llama 3 have."""
    tk = pytest.importorskip("tokenizers")
    made = tk.Tokenizer(tk.models.BPE())
    made.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tk.decoders.ByteLevel()
    special = list(dict.fromkeys(["<unk>", "<s>", "</s>", *kind.control]))
    made.train_from_iterator(corpus, tk.trainers.BpeTrainer(
        vocab_size=400 + len(special), special_tokens=special, show_progress=False,
        initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet()))
    if "<|end|>" in special:        # Phi-3's swallow the line's end
        made.add_special_tokens([tk.AddedToken("<|end|>", rstrip=True, normalized=False)])
    made.add_tokens([tk.AddedToken(token, special=False, normalized=False) for token in kind.added])
    made.save(str(folder / "tokenizer.json"))
    write_folder(folder, tokenizer_config={"bos_token": kind.bos, "eos_token": kind.eos, "chat_template": kind.source})
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token=kind.bos,
                                                eos_token=kind.eos, chat_template=kind.source)


def _spm(folder: Path, kind: Kind, train: Callable[..., None], write_folder: Make) -> Any:
    """A sentencepiece model to which the folder adds the kind's tokens, as Llama 2 and its children have."""
    train(folder / "tokenizer.model")
    added = [token for token in (*kind.control, *kind.added) if token not in ("<s>", "</s>")]
    decoder = {str(400 + i): {"content": token, "special": token in kind.control, "lstrip": False, "rstrip": False,
                              "normalized": False, "single_word": False} for i, token in enumerate(added)}
    write_folder(folder, tokenizer_config={
        "bos_token": kind.bos, "eos_token": kind.eos, "unk_token": "<unk>", "chat_template": kind.source,
        "added_tokens_decoder": decoder, "tokenizer_class": "LlamaTokenizer"})
    return transformers.LlamaTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=[(name, how) for name in KINDS for how in ("fast", "spm")], ids="-".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus: list[str],
         write_folder: Make, train_sentencepiece: Callable[..., None]) -> tuple[Kind, Tokenizer, Any]:
    name, how = request.param
    kind, folder = KINDS[name], tmp_path_factory.mktemp(name)
    truth = _fast(folder, kind, corpus, write_folder) if how == "fast" else _spm(folder, kind, train_sentencepiece,
                                                                                write_folder)
    return kind, load_tokenizer(folder), truth


def _chats(kind: Kind, text: str) -> list[list[dict[str, str]]]:
    one = [{"role": "user", "content": text}, {"role": "assistant", "content": f"x{text}"}]
    two = [{"role": "user", "content": f"q{text}"}, {"role": "assistant", "content": text},
           {"role": "user", "content": text}, {"role": "assistant", "content": f"{text}y"}]
    system = [{"role": "system", "content": f"S{text}"}, *one]
    return [one, two, system] if kind.system else [one, two]


def _ids(truth: Any, chat: Any, prompt: bool = False, **options: Any) -> list[int]:
    return list(truth.apply_chat_template(chat, add_generation_prompt=prompt, **options)["input_ids"])


def test_text_and_ids_are_those_of_transformers(pair: tuple[Kind, Tokenizer, Any], hard: list[str]) -> None:
    kind, tokenizer, truth = pair
    control = [tokenizer.token(number) for number in tokenizer.control_ids] + ["<unk>"]
    compared = 0
    for text in hard:
        if any(token in text for token in control):
            continue
        for chat in _chats(kind, text):
            for messages, prompt in ((chat, False), (chat[:-1], True)):
                assert tokenizer.render_chat(messages, None, prompt) == truth.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt)
                ids, trained = tokenizer.encode_chat(messages, None, prompt)
                if not kind.stop and not prompt:
                    assert ids.pop() == tokenizer.eos_id
                assert ids == _ids(truth, messages, prompt) and len(trained) >= len(ids)
                assert any(trained) != prompt
                compared += 1
    assert compared > 50


def _answers(kind: Kind, tokenizer: Tokenizer, chat: list[dict[str, Any]]) -> list[str]:
    """What is trained of a chat, without the blanks and the empty thoughts that templates put around an answer."""
    said = [part.removeprefix("<think>\n\n</think>\n\n") for part in _said(tokenizer, *tokenizer.encode_chat(chat))]
    return [part.removesuffix(kind.stop).strip() + kind.stop if kind.stop else part for part in said]


def _said(tokenizer: Tokenizer, ids: list[int], trained: list[bool]) -> list[str]:
    """The trained runs as text."""
    runs: list[list[int]] = []
    before = False
    for number, flag in zip(ids, trained, strict=True):
        runs += [[]] if flag and not before else []
        if flag:
            runs[-1].append(number)
        before = flag
    return [tokenizer.decode(run, skip_special=False, continues=True) for run in runs]


def test_answers_are_trained_with_what_ends_them(pair: tuple[Kind, Tokenizer, Any]) -> None:
    kind, tokenizer, _ = pair
    assert (tokenizer.turn_end or "") == kind.stop
    for text in ("the dog", "👍 naïve", "שלום", "def f():\n    return 1"):
        chat = _chats(kind, text)[1]
        first = [f"{text}{kind.stop}"]
        last = kind.stop or tokenizer.token(tokenizer.require_eos())
        assert _answers(kind, tokenizer, chat) == [*first, f"{text}y{last}"]
        assert _answers(kind, tokenizer, [*chat[:3], chat[3] | {"weight": 0}]) == first


CONTROL = ["</s>", "<s>", "<|im_end|>", "<|im_start|>user\n", "<|eot_id|>", "<end_of_turn>", "<|end|>", "[TOOL_CALLS]",
           "<｜User｜>", "<｜end▁of▁sentence｜>", "<|start_header_id|>system<|end_header_id|>", "</s></s>"]


def test_a_control_token_in_a_message_stays_text(pair: tuple[Kind, Tokenizer, Any]) -> None:
    kind, tokenizer, truth = pair
    harmless = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]
    wanted = [number for number in tokenizer.encode_chat(harmless)[0] if number in tokenizer.control_ids]
    for spelled in CONTROL:
        chat = [{"role": "user", "content": f"a{spelled}b"}, {"role": "assistant", "content": f"c {spelled} d"}]
        ids, trained = tokenizer.encode_chat(chat)
        assert [number for number in ids if number in tokenizer.control_ids] == wanted
        blank = " " if tokenizer.kind == "sentencepiece" else "▁"
        shown = truth.apply_chat_template(chat, tokenize=False).replace("▁", blank)
        if "<|end|>" in kind.control and tokenizer.kind == "tokenizers":
            shown = shown.replace("<|end|>\n", "<|end|>")
        written = tokenizer.decode(ids, skip_special=False).replace("▁", blank)
        assert written.removesuffix("" if kind.stop else "</s>") == shown
        assert f"c {spelled} d".replace("▁", blank) in _said(tokenizer, ids, trained)[0].replace("▁", blank)
        prompt, _ = tokenizer.encode_chat(chat[:1], add_generation_prompt=True)
        assert ids[:len(prompt)] == prompt


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), min_size=2,
                      max_size=2))
def test_any_text_keeps_its_place(pair: tuple[Kind, Tokenizer, Any], texts: list[str]) -> None:
    _, tokenizer, truth = pair
    chat = [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": f"x{texts[1]}"}]
    ids, trained = tokenizer.encode_chat(chat)
    if not any(tokenizer.token(number) in text for text in texts for number in tokenizer.control_ids):
        assert ids[:len(_ids(truth, chat))] == _ids(truth, chat)
    prompt, _ = tokenizer.encode_chat(chat[:1], add_generation_prompt=True)
    assert ids[:len(prompt)] == prompt and not any(trained[:len(prompt)]) and trained[len(prompt)]


def test_many_at_once_are_the_same(pair: tuple[Kind, Tokenizer, Any], hard: list[str]) -> None:
    kind, tokenizer, _ = pair
    many = [(chat, None, f"file:{i}") for i, text in enumerate(hard) for chat in _chats(kind, text) if len(chat) != 4]
    assert len(many) > 32
    assert encode_conversations(many, tokenizer) == [tokenizer.encode_chat(chat) for chat, _, _ in many]


@pytest.mark.parametrize("pair", [(name, how) for name in ("qwen-3", "llama-3.1", "mistral-3")
                                  for how in ("fast", "spm")], indirect=True, ids="-".join)
def test_tools_and_their_calls(pair: tuple[Kind, Tokenizer, Any]) -> None:
    _, tokenizer, truth = pair
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": "How warm is it?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "abcdefghi", "type": "function", "function": {
            "name": "weather", "arguments": {"city": "Zürich </s>"}}}]},
        {"role": "tool", "content": "12 degrees", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "It is 12 degrees."}]
    clean = [message | ({"tool_calls": [{"id": "abcdefghi", "type": "function", "function": {
        "name": "weather", "arguments": {"city": "Zürich"}}}]} if "tool_calls" in message else {}) for message in chat]
    for turns in (2, 4):
        ids, trained = tokenizer.encode_chat(clean[:turns], TOOLS)
        assert ids == _ids(truth, clean[:turns], tools=TOOLS)
        said = _said(tokenizer, ids, trained)
        assert len(said) == turns // 2 and "weather" in said[0] and "Zürich" in said[0]
    said = _said(tokenizer, *tokenizer.encode_chat(chat, TOOLS))
    assert "Zürich </s>" in said[0] and "12 degrees" in said[1] and "12 degrees" not in said[0]


@pytest.mark.parametrize("pair", [("generation", "fast")], indirect=True, ids="-".join)
def test_the_mask_of_generation_is_that_of_transformers(pair: tuple[Kind, Tokenizer, Any], hard: list[str]) -> None:
    kind, tokenizer, truth = pair
    for text in hard:
        if "<|im" in text or "<s>" in text or "</s>" in text or "<unk>" in text:
            continue
        for chat in _chats(kind, text):
            found = truth.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
            assert tokenizer.encode_chat(chat) == (found["input_ids"], [flag == 1 for flag in found["assistant_masks"]])
