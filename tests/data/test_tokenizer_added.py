"""Tokens added to a tokenizer: the saved folder means the same to transformers, and what could not be saved is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import minitune as mt
from minitune.data.tokenizer import load_tokenizer
from minitune.data.tokenizer_writer import save_tokenizer
from minitune.errors import InputError

Make = Callable[..., Path]


@pytest.mark.parametrize("listed", [True, False], ids=["decoder", "no decoder"])
@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizers"])
def test_transformers_reads_what_was_added(kind: str, listed: bool, small_spm: Path, byte_level: Make, tmp_path: Path,
                                           write_folder: Make) -> None:
    transformers = pytest.importorskip("transformers")
    if kind == "sentencepiece":
        source, tokens = shutil.copytree(small_spm, tmp_path / "source"), ("<unk>", "<s>", "</s>")
        config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, "bos_token": "<s>",
                  "eos_token": "</s>", "unk_token": "<unk>"}
    else:
        source, tokens = byte_level(), ("<|begin|>", "<|end|>", "<|pad|>")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "bos_token": None}
    if listed:
        config["added_tokens_decoder"] = {str(i): {"content": token, "special": True} for i, token in enumerate(tokens)}
    write_folder(source, tokenizer_config=config, config={})
    ours = load_tokenizer(source, add=["<new>", "the", "<more>"])
    target = tmp_path / "saved"
    target.mkdir()
    save_tokenizer(ours, target)
    truth = transformers.AutoTokenizer.from_pretrained(str(target))
    for text in ("the <new> dog", "<more>", "a<new><new> b"):
        ids = ours.encode(text)
        assert list(truth(text)["input_ids"]) == ids == load_tokenizer(target).encode(text)
        assert set(ids) & {ours.id_of("<new>"), ours.id_of("<more>")}
    decoder = json.loads((target / "tokenizer_config.json").read_text()).get("added_tokens_decoder")
    assert (decoder is not None) == listed
    if decoder:
        assert decoder[str(ours.id_of("<new>"))] == {
            "content": "<new>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": False}
        assert [decoder[str(i)]["special"] for i in range(3)] == [True] * 3


def test_tokens_to_add_are_a_list(small_spm: Path) -> None:
    with pytest.raises(InputError, match=r"add is '<new>'; give a list of tokens, as \['<new>'\]"):
        load_tokenizer(small_spm, add="<new>")


def test_ids_that_differ_between_the_two_files_are_refused_at_once(small_spm: Path, tmp_path: Path) -> None:
    tk = pytest.importorskip("tokenizers")
    folder = shutil.copytree(small_spm, tmp_path / "both")
    tk.Tokenizer(tk.models.BPE(vocab={"a": 0, "b": 1}, merges=[])).save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).kind == "sentencepiece"
    with pytest.raises(InputError, match=r"'<new>' has the id 400 in tokenizer.model but 2 in tokenizer.json; remove"):
        load_tokenizer(folder, add=["<new>"])


def test_files_that_change_while_they_are_read_are_refused(small_spm: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    from minitune.data import tokenizer

    folder = shutil.copytree(small_spm, tmp_path / "changing")

    def change(files: object) -> object:
        (folder / "tokenizer_config.json").write_text("{}")
        return opened(files)

    opened = tokenizer._open_backend
    monkeypatch.setattr(tokenizer, "_open_backend", change)
    with pytest.raises(InputError, match="changed while they were read"):
        load_tokenizer(folder)
    assert load_tokenizer(folder).digests.keys() == {"tokenizer.model", "tokenizer_config.json"}


@pytest.mark.parametrize("text", ["Do you have maps?", "What is LoRA?\n\n  x = 1", "naïve café, 12.5 %", "日本語"])
def test_transformers_reads_a_bare_sentencepiece_folder_as_we_do(tmp_path, text):
    transformers = pytest.importorskip("transformers")
    base = Path(mt.__file__).parent / "examples" / "base"
    tokenizer = mt.data.load_tokenizer(base)
    shutil.copyfile(base / "tokenizer.model", tmp_path / "tokenizer.model")
    bare = mt.data.load_tokenizer(tmp_path)
    (tmp_path / "saved").mkdir()
    save_tokenizer(bare, tmp_path / "saved")
    for folder in (base, tmp_path / "saved"):
        assert transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == tokenizer.encode(text)
