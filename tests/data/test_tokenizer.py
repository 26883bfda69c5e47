"""The tokenizer against sentencepiece, tokenizers and transformers; control tokens in text; broken folders."""

from __future__ import annotations

import copy
import json
import multiprocessing
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minitune.data import tokenizer_backends
from minitune.data.tokenizer import Tokenizer, load_tokenizer
from minitune.data.tokenizer_writer import copy_tokenizer
from minitune.errors import InputError

Make = Callable[..., Path]
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def spm(folder: Path):
    return pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def fast(folder: Path):
    found = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    found.no_truncation()
    found.no_padding()
    found.encode_special_tokens = True
    return found


def test_sentencepiece_is_the_truth(llama: Path, hard: list[str], corpus: list[str]) -> None:
    tokenizer, truth = load_tokenizer(llama), spm(llama)
    assert tokenizer.kind == "sentencepiece"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (1, 2, None, 0)
    assert tokenizer.vocab_size == truth.get_piece_size() and tokenizer.eos_ids == (2,) and tokenizer.adds_bos
    assert tokenizer.control_ids == {1, 2}
    assert tokenizer.encode_many(hard, bos=False) == [truth.encode(text) for text in hard]
    for text in hard + corpus:
        ids = tokenizer.encode(text, eos=True)
        assert ids == [1, *truth.encode(text), 2]
        assert tokenizer.decode(ids) == truth.decode(ids)
        assert tokenizer.control_ids.isdisjoint(ids[1:-1])


def test_tokenizers_is_the_truth(byte_level: Make, hard: list[str], corpus: list[str]) -> None:
    for folder in (byte_level(), byte_level(bos=True)):
        tokenizer, truth = load_tokenizer(folder), fast(folder)
        assert tokenizer.kind == "tokenizers" and tokenizer.vocab_size == truth.get_vocab_size()
        for text in hard + corpus:
            ids = tokenizer.encode(text, eos=True)
            assert ids == [*truth.encode(text).ids, 1]
            assert tokenizer.decode(ids) == text


def test_transformers_agrees_on_byte_level(byte_level: Make, hard: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    for bos in (False, True):
        folder = byte_level(bos=bos)
        truth = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        tokenizer = load_tokenizer(folder)
        for text in hard:
            assert tokenizer.encode(text) == truth(text, split_special_tokens=True)["input_ids"]


@FEW
@given(text=st.text(max_size=40), completion=st.text(max_size=40))
def test_a_continuation_neither_gains_nor_loses_a_blank(
        llama: Path, byte_level: Make, text: str, completion: str) -> None:
    tokenizer, truth = _loaded(llama), spm(llama)
    whole = truth.decode(truth.encode(text + completion))
    ids = tokenizer.encode(text)
    more = tokenizer.encode(completion, bos=False, continues=bool(text))
    assert tokenizer.decode(ids + more) == whole
    assert tokenizer.decode(ids) + tokenizer.decode(more, continues=bool(text)) == whole
    other = _loaded(_byte_level_once(byte_level))
    ids, more = other.encode(text), other.encode(completion, bos=False, continues=True)
    assert other.decode(ids + more) == text + completion
    assert other.decode(ids) == text


_CACHE: dict[object, object] = {}


def _loaded(folder: Path) -> Tokenizer:
    return _CACHE.setdefault(folder, load_tokenizer(folder) if folder not in _CACHE else None)  # type: ignore[return-value]


def _byte_level_once(make: Make) -> Path:
    if "byte level" not in _CACHE:
        _CACHE["byte level"] = make(bos=True)
    return _CACHE["byte level"]  # type: ignore[return-value]


@pytest.mark.parametrize("scheme", ["metaspace first", "metaspace always", "prepend"])
def test_llama_style_tokenizer_json_continues(
        tmp_path: Path, scheme: str, write_folder: Make, corpus: list[str]) -> None:
    tk = pytest.importorskip("tokenizers")
    made = tk.Tokenizer(tk.models.BPE(byte_fallback=True, unk_token="<unk>"))
    if scheme == "prepend":
        made.normalizer = tk.normalizers.Sequence([tk.normalizers.Prepend("▁"), tk.normalizers.Replace(" ", "▁")])
        made.decoder = tk.decoders.Sequence([tk.decoders.Replace("▁", " "), tk.decoders.ByteFallback(),
                                             tk.decoders.Fuse(), tk.decoders.Strip(" ", 1, 0)])
    else:
        made.pre_tokenizer = tk.pre_tokenizers.Metaspace(prepend_scheme=scheme.split()[1])
        made.decoder = tk.decoders.Metaspace(prepend_scheme=scheme.split()[1])
    trainer = tk.trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    made.train_from_iterator(corpus, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(write_folder(tmp_path, tokenizer_config={"eos_token": "</s>"}))
    assert tokenizer.encode("the dog") == made.encode("the dog").ids
    prompt, more = tokenizer.encode("What is"), tokenizer.encode("the dog", continues=True)
    assert tokenizer.decode(prompt + more) == "What isthe dog"
    assert tokenizer.decode(tokenizer.encode(" dog", continues=True), continues=True) == " dog"
    assert tokenizer.decode(prompt + tokenizer.encode(" dog", continues=True)) == "What is dog"
    assert tokenizer.encode("the dog") == made.encode("the dog").ids


def test_control_tokens_are_read_only_when_asked(llama: Path, byte_level: Make) -> None:
    tokenizer, truth = load_tokenizer(llama), spm(llama)
    assert tokenizer.encode("<s>the dog</s>", bos=False, parse_special=True) == [
        1, *tokenizer.encode("the dog", bos=False, continues=True), 2]
    assert tokenizer.encode("a</s>", bos=False, parse_special=True) == [*truth.encode("a"), 2]
    other = load_tokenizer(byte_level())
    assert other.encode("a<|end|>b", parse_special=True) == [*other.encode("a"), 1, *other.encode("b")]
    assert 1 not in other.encode("a<|end|>b")
    think = other.id_of("<think>")
    assert think is not None and think not in other.control_ids and think in other.encode("a<think>b")


def test_decode_shows_control_tokens_when_asked(llama: Path, byte_level: Make) -> None:
    tokenizer = load_tokenizer(llama)
    ids = tokenizer.encode("the dog", eos=True)
    assert tokenizer.decode(ids) == "the dog" and tokenizer.decode(ids, skip_special=False) == "<s> the dog</s>"
    assert tokenizer.encode("<s> the dog</s>", bos=False, parse_special=True) == ids
    other = load_tokenizer(byte_level(bos=True))
    ids = other.encode("the dog", eos=True)
    assert other.decode(ids) == "the dog" and other.decode(ids, skip_special=False) == "<|begin|>the dog<|end|>"
    for some in (tokenizer, other):
        assert some.decode([]) == ""
        dog = some.encode(" dog", bos=False)
        assert some.decode([*dog, some.vocab_size + 5, *dog]) == " dog\ufffd" + some.decode(dog, continues=True)
        with pytest.raises(InputError, match="-3 is no token id"):
            some.decode([5, -3])


def test_user_defined_control_pieces_stay_text(
        tmp_path: Path, write_folder: Make, train_sentencepiece: Callable[..., None]) -> None:
    """sentencepiece itself reads a user-defined piece in any text."""
    train_sentencepiece(tmp_path / "tokenizer.model", user_defined_symbols=["<|im_end|>", "<|im_start|>", "<sep>"])
    folder = write_folder(tmp_path, tokenizer_config={
        "eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer, truth = load_tokenizer(folder), spm(folder)
    text = "a <|im_end|><|im_start|>user <sep>"
    assert tokenizer.eos_id in truth.encode(text)
    ids = tokenizer.encode(text)
    assert tokenizer.control_ids.isdisjoint(ids[1:]) and tokenizer.id_of("<sep>") in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id in tokenizer.encode(text, parse_special=True)


@pytest.mark.parametrize("kind", ["unigram", "word level"])
def test_a_vocabulary_that_spells_its_control_tokens(
        tmp_path: Path, kind: str, write_folder: Make, corpus: list[str]) -> None:
    """These models find "</s>" in their own vocabulary, past what the library's switch prevents."""
    tk = pytest.importorskip("tokenizers")
    if kind == "unigram":
        made = tk.Tokenizer(tk.models.Unigram())
        made.train_from_iterator(corpus, tk.trainers.UnigramTrainer(
            vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False))
    else:
        vocabulary = {"<unk>": 0, "</s>": 1, "the": 2, "<": 3, "/s>": 4}
        made = tk.Tokenizer(tk.models.WordLevel(vocabulary, unk_token="<unk>"))
        made.pre_tokenizer = tk.pre_tokenizers.WhitespaceSplit()
        made.add_special_tokens(["<unk>", "</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(write_folder(tmp_path, tokenizer_config={"eos_token": "</s>", "unk_token": "<unk>"}))
    assert tokenizer.eos_id == 1 and 1 not in tokenizer.encode("the </s> the") and 1 not in tokenizer.encode("</s>")
    assert tokenizer.encode("the </s>", parse_special=True)[-1] == 1
    if kind == "word level":
        assert tokenizer.encode("the </s> 語") == [2, 3, 4, 0]


def test_tokens_added_to_a_sentencepiece_model(small_spm: Path, tmp_path: Path, write_folder: Make) -> None:
    shutil.copy(small_spm / "tokenizer.model", tmp_path)
    write_folder(tmp_path, added_tokens={"<|im_end|>": 400}, tokenizer_config={
        "bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>", "chat_template": "{{ x }}",
        "added_tokens_decoder": {"401": {"content": "<pad>", "special": True}, "403": {"content": "<tool>"}}})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (404, 400, 401)
    assert tokenizer.chat_template == "{{ x }}" and tokenizer.control_ids == {1, 2, 400, 401}
    ids = tokenizer.encode("the <|im_end|><tool> dog", bos=False)
    assert 400 not in ids and ids.count(403) == 1 and tokenizer.decode(ids) == "the <|im_end|><tool> dog"
    assert tokenizer.encode("the dog<|im_end|>", parse_special=True) == tokenizer.encode("the dog", eos=True)
    assert tokenizer.decode([400, 402, 401], skip_special=False) == "<|im_end|><pad>"
    tokenizer.check_vocab(404)
    with pytest.raises(InputError, match=r"up to 403 \('<tool>'\) but the model has 400 rows"):
        tokenizer.check_vocab(400)


def test_both_files(small_spm: Path, byte_level: Make, tmp_path: Path, write_folder: Make) -> None:
    """sentencepiece decides, unless tokenizer.json is of another model or tokenizer.model is a tiktoken file."""
    shutil.copy(small_spm / "tokenizer.model", tmp_path)
    agreeing = {"added_tokens": [{"id": 1, "content": "<s>", "special": True}, {"id": 400, "content": "<x>"}]}
    write_folder(tmp_path, tokenizer=agreeing)
    assert load_tokenizer(tmp_path).kind == "sentencepiece" and load_tokenizer(tmp_path).vocab_size == 401
    shutil.copy(byte_level() / "tokenizer.json", tmp_path)
    assert load_tokenizer(tmp_path).kind == "tokenizers"
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert load_tokenizer(tmp_path).kind == "tokenizers"
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="tiktoken"):
        load_tokenizer(tmp_path)


def test_which_family_begins_with_bos(
        byte_level: Make, small_spm: Path, tmp_path: Path, write_folder: Make) -> None:
    llama3 = load_tokenizer(byte_level(bos=True))
    assert llama3.adds_bos and llama3.encode("a")[0] == 0 and 0 not in llama3.encode("a", bos=False)
    qwen = load_tokenizer(byte_level(config={"bos_token_id": 0, "eos_token_id": 1}))
    assert qwen.bos_id is None and not qwen.adds_bos and qwen.encode("a") == qwen.encode("a", bos=False)
    silent = load_tokenizer(byte_level(bos=True, tokenizer_config={"add_bos_token": False}, config={"eos_token_id": 1}))
    assert silent.bos_id == 0 and not silent.adds_bos and silent.eos_id == 1
    shutil.copy(small_spm / "tokenizer.model", tmp_path)
    write_folder(tmp_path, tokenizer_config={"add_bos_token": False})
    assert not load_tokenizer(tmp_path).adds_bos


def test_ids_that_end_a_generation(byte_level: Make) -> None:
    """generation_config.json goes before config.json; an id there that is ordinary text is a stale default."""
    folder = byte_level(config={"eos_token_id": 5}, generation_config={"eos_token_id": [0, 1, 77], "pad_token_id": -1})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_id == 1 and tokenizer.eos_ids == (1, 0) and tokenizer.pad_id == 2
    bare = load_tokenizer(byte_level(tokenizer_config={}, config={"eos_token_id": 77}))
    assert bare.eos_id is None and bare.eos_ids == ()
    with pytest.raises(InputError, match="no end-of-text token"):
        bare.encode("a", eos=True)


def test_text_that_is_no_unicode(llama: Path, byte_level: Make) -> None:
    for tokenizer in (load_tokenizer(llama), load_tokenizer(byte_level())):
        with pytest.raises(InputError, match=r"'\\ud800' at character 1 is a lone surrogate"):
            tokenizer.encode("a\ud800")
        with pytest.raises(InputError, match="expected text, got int"):
            tokenizer.encode_many(["a", 5])  # type: ignore[list-item]


def test_threads_may_share_a_tokenizer(byte_level: Make) -> None:
    tokenizer = load_tokenizer(byte_level())
    text = f"{tokenizer.token(tokenizer.require_eos())} and text " * 20
    wanted = {parse: tokenizer.encode(text, parse_special=parse) for parse in (True, False)}
    assert wanted[True] != wanted[False]

    def encode(place: int) -> bool:
        return tokenizer.encode_many([text] * 8, parse_special=bool(place % 2)) == [wanted[bool(place % 2)]] * 8

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(encode, range(200)))


def test_a_fork_in_the_middle_of_encoding(byte_level: Make) -> None:
    tokenizer = load_tokenizer(byte_level())
    with tokenizer_backends._turn:      # as another thread holds it, which the child has not
        child = multiprocessing.get_context("fork").Process(target=tokenizer.encode, args=("the dog",))
        child.start()
        child.join(20)
        ended = child.exitcode
        child.kill()
    assert ended == 0


def test_a_tokenizer_can_be_copied(small_spm: Path, byte_level: Make) -> None:
    for folder in (small_spm, byte_level()):
        tokenizer = load_tokenizer(folder)
        assert copy.deepcopy(tokenizer).encode("the dog") == tokenizer.encode("the dog")


def test_copied_files_make_the_same_tokenizer(byte_level: Make, tmp_path: Path) -> None:
    folder = byte_level(bos=True, config={"eos_token_id": 1})
    copy_tokenizer(folder, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert load_tokenizer(tmp_path).encode("the dog", eos=True) == load_tokenizer(folder).encode("the dog", eos=True)


def test_folders_without_a_usable_tokenizer(
        tmp_path: Path, small_spm: Path, byte_level: Make, write_folder: Make) -> None:
    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            load_tokenizer(folder)
        assert str(folder) in str(caught.value)

    folder = tmp_path / "missing"
    refused("no such folder")
    folder = write_folder(tmp_path / "empty")
    refused("holds no tokenizer")
    for broken in (b"", b"garbage", (small_spm / "tokenizer.model").read_bytes()[:500],
                   b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"):
        (folder / "tokenizer.model").write_bytes(broken)
        refused("tokenizer.model: no sentencepiece model")
    (folder / "tokenizer.model").unlink()
    good = (byte_level() / "tokenizer.json").read_text()
    unmergeable = '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}'
    for text in ("", "{}", good[:300], "[" * 100_000, unmergeable):
        (folder / "tokenizer.json").write_text(text)
        refused("tokenizer.json: tokenizers cannot read it")
    (folder / "tokenizer.json").write_text(good)
    assert load_tokenizer(folder).eos_id is None
    bad = [("[1]", "holds a list"), ("{", "not valid JSON"), ("[" * 100_000, "not valid JSON"),
           (json.dumps({"eos_token": 5}), "eos_token is 5"),
           (json.dumps({"eos_token": "<gone>"}), "'<gone>', which the"),
           (json.dumps({"add_bos_token": "yes"}), "add_bos_token is 'yes'"),
           (json.dumps({"added_tokens_decoder": [1]}), "added_tokens_decoder must be"),
           (json.dumps({"added_tokens_decoder": {"x": "a"}}), "added_tokens_decoder")]
    for text, message in bad:
        (folder / "tokenizer_config.json").write_text(text)
        refused(message)
    write_folder(folder, tokenizer_config={}, config={"eos_token_id": "2"})
    refused("eos_token_id in config.json")


def test_chat_template_sources(byte_level: Make) -> None:
    folder = byte_level(tokenizer_config={"chat_template": [{"name": "rag", "template": "r"},
                                                            {"name": "default", "template": "d"}]})
    assert load_tokenizer(folder).chat_template == "d"
    (folder / "chat_template.jinja").write_text("j", encoding="utf-8")
    assert load_tokenizer(folder).chat_template == "j"
    assert load_tokenizer(byte_level()).chat_template is None


def test_the_real_model_is_there_where_the_oracles_are(mistral: Path | None) -> None:
    """mistral-common is a test dependency: without this the truth above would be skipped unseen."""
    pytest.importorskip("mistral_common")
    assert mistral is not None
