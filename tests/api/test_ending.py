"""Answers in pieces: no half character, no beginning of a stop text, and joined what the whole would be."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minitune as mt
from minitune.api.ending import Ending, Turn, Writer, turn_of
from minitune.data.tokenizer import load_tokenizer

TEXTS = ["def add(a, b):\n    return a + b", " Hello, fox",
         "👩‍👩‍👧‍👦🏳️‍🌈 \U0001f600", "naïve é", "日本語 テキスト", "שלום", "a\ufffdb", "  "]


@pytest.fixture(scope="session")
def byte_fallback(tmp_path_factory):
    """A tokenizer.json as Llama 2's, whose decoder shows a run of bytes as U+FFFD each unless all of it is valid."""
    tokenizers = pytest.importorskip("tokenizers")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdefghijklmnopqrstuvwxyz+():,", "▁a"]
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(
        {piece: i for i, piece in enumerate(pieces)}, [("▁", "a")], unk_token="<unk>", fuse_unk=True,
        byte_fallback=True))
    n, d = tokenizers.normalizers, tokenizers.decoders
    fast.normalizer = n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")])
    fast.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    fast.add_special_tokens(["<s>", "</s>"])
    folder = tmp_path_factory.mktemp("fallback")
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


@pytest.fixture(scope="session", params=["sentencepiece", "byte level", "byte fallback"])
def tokenizer(request, small_spm, byte_level, byte_fallback):
    return load_tokenizer({"sentencepiece": small_spm, "byte level": byte_level(), "byte fallback": byte_fallback}[
        request.param])


def _whole(tokenizer, ids, stops):
    """(text, ids, whether it was stopped), by decoding all from the start after each token."""
    def cut(some):
        text = tokenizer.decode(some, continues=True)
        return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)

    for n in range(1, len(ids) + 1):
        if ids[n - 1] in tokenizer.eos_ids or cut(ids[:n]) is not None:
            break
    else:
        return tokenizer.decode(ids, continues=True), ids, False
    kept = ids[: n - 1] if ids[n - 1] in tokenizer.eos_ids else ids[:n]
    at = cut(kept)
    text = tokenizer.decode(kept, continues=True)[:at]
    while at is not None and len(tokenizer.decode(kept, continues=True)) > at:
        kept = kept[:-1]
    return text, kept, True


def _write(writer, ids):
    """(pieces, counts of settled ids) after each token, and at the end."""
    pieces, settled = [], []
    for token in ids:
        pieces.append(writer.add(token))
        settled.append(writer.settled)
        if writer.finish_reason:
            break
    return [*pieces, writer.close()], settled


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_pieces_are_the_whole_for_any_ids_and_stop_texts(tokenizer, data):
    bytes_ = [i for i in range(tokenizer.vocab_size) if tokenizer.token(i).startswith("<0x")] or [3]
    known = st.one_of(st.integers(0, tokenizer.vocab_size + 1), st.sampled_from(bytes_),
                      st.sampled_from([tokenizer.encode(text, bos=False) for text in TEXTS]))
    drawn = data.draw(st.lists(known, max_size=25))
    ids = [i for part in drawn for i in (part if isinstance(part, list) else [part])]
    text = tokenizer.decode(ids, continues=True)
    spans = st.tuples(st.integers(0, max(len(text) - 1, 0)), st.integers(1, 4)).map(lambda s: text[s[0]: s[0] + s[1]])
    stops = [stop for stop in data.draw(st.lists(st.one_of(spans, st.sampled_from(["\n\n", "aa", " fox"])), max_size=2))
             if stop]
    writer = Writer(Ending(frozenset(tokenizer.eos_ids), tokenizer, stops))
    pieces, settled = _write(writer, ids)
    expected, kept, stopped = _whole(tokenizer, ids, stops)
    assert "".join(pieces) == expected
    assert writer.ids == kept and (writer.finish_reason == "stop") == stopped
    assert settled == sorted(settled) and all(count <= len(kept) for count in settled)


@pytest.mark.parametrize("text", TEXTS)
def test_a_piece_never_ends_within_a_character(tokenizer, text):
    ids = tokenizer.encode(text, bos=False, continues=True)
    pieces, _ = _write(Writer(Ending(frozenset(), tokenizer, None)), ids)
    assert "".join(pieces) == text
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


def test_text_comes_as_soon_as_it_is_sure(tokenizer):
    ids = tokenizer.encode("a b c STOP d", bos=False, continues=True)
    writer = Writer(Ending(frozenset(), tokenizer, ["STOP", "c S"]))
    said = ""
    for token in ids:
        said += writer.add(token)
        if writer.finish_reason:
            break
        full = tokenizer.decode(writer.ids, continues=True)
        assert "a b ".startswith(said)
        assert len(full) - len(said) <= 3      # no more than the beginning of a stop text is held back
    assert said == "a b " and writer.finish_reason == "stop"


def test_without_stop_texts_ids_alone_decode_nothing(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "decode", None)
    writer = Writer(Ending(frozenset({7}), tokenizer, None), reads=False)
    assert _write(writer, [3, 4, 5, 7])[0] == [""] * 5 and writer.ids == [3, 4, 5] and writer.finish_reason == "stop"


@pytest.mark.parametrize(("turn", "written", "text"), [
    (Turn(None, " ", " "), " yes ", "yes"), (Turn(None, " ", " "), "yes", "yes"),
    (Turn(None, "  ", ""), " yes", " yes"), (Turn(None, "", " "), "yes  ", "yes "),
    (Turn(None, "ab", ""), "aab", "aab"), (Turn(None, "ab", ""), "a", "a"),
    (Turn(None, "a ", "\n"), "a b\n", "b"), (Turn(None, " ", " "), " ", "")])
def test_the_frame_that_a_template_writes_is_no_part_of_the_answer(tokenizer, turn, written, text):
    ids = tokenizer.encode(written, bos=False, continues=True)
    eos = min(tokenizer.eos_ids)
    writer = Writer(Ending(frozenset({eos}), tokenizer, None, turn))
    assert "".join(_write(writer, [*ids, eos])[0]) == text
    cut = Writer(Ending(frozenset({eos}), tokenizer, None, turn))
    lead = turn.lead if written.startswith(turn.lead) else ""
    assert "".join(_write(cut, ids)[0]) == written[len(lead):]     # cut off: what it ends with is the answer's own


TEMPLATES = {
    "llama 2": ("{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
                "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}", "</s>", " ", " "),
    "chatml": ("{% for m in messages %}{{ '<s>' + m.role + '\n' + m.content + '<unk>\n' }}{% endfor %}"
               "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}", "<unk>", "", ""),
    "two ends": ("{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<unk>\n' }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
                 "<unk>", "", ""),
    "no thinking": ("{% for m in messages %}{{ '<s>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
                    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<unk>\n' }}{% endfor %}"
                    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}",
                    "<unk>", "<think>\n\n</think>\n\n", ""),
    "channels": ("{% for m in messages %}{{ '<s>' + m.role + '<s>final<s>' + m.content + '<unk>' }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<s>assistant' }}{% endif %}", "<unk>", "final", ""),
    "no end": ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
               "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}", None, "", ""),
    "refusing": ("{{ raise_exception('tools only') }}", None, "", ""),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_frame_is_asked_of_the_template(tmp_path, train_sentencepiece, write_folder, name):
    template, end, lead, trail = TEMPLATES[name]
    train_sentencepiece(tmp_path / "tokenizer.model")
    made = load_tokenizer(write_folder(tmp_path, tokenizer_config={
        "bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<unk>"], "chat_template": template}))
    assert turn_of(made) == Turn(None if end is None else made.id_of(end), lead, trail)


def test_the_plain_template_ends_a_turn_with_eos(tokenizer):
    assert turn_of(tokenizer) == Turn(tokenizer.eos_id)


@pytest.mark.parametrize("stop", [3, [3], "", ["a", ""], {"a"}])
def test_stop_texts_are_texts(tokenizer, stop):
    with pytest.raises(mt.InputError, match="generate: stop is"):
        Ending(frozenset(), tokenizer, stop)
    with pytest.raises(mt.InputError, match="need a tokenizer"):
        Ending(frozenset(), None, "a")
