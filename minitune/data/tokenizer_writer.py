"""Writes a tokenizer's files into another checkpoint folder, the tokens that were added to it included."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitune.data.tokenizer import Tokenizer
from minitune.data.tokenizer_backends import extended
from minitune.data.tokenizer_files import NAMED_TEMPLATES, TOKENIZER_FILES, read_json


def copy_tokenizer(source: str | Path, target: str | Path) -> None:
    """Copies the tokenizer's own files from one checkpoint folder to another; config.json is not one of them."""
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        return
    uses = [str(path.relative_to(source)) for path in (source / NAMED_TEMPLATES).glob("*.jinja")]
    for name in (*TOKENIZER_FILES, *uses):
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)


def save_tokenizer(tokenizer: Tokenizer, target: str | Path) -> None:
    """Copies a tokenizer's files to another folder, what was added to it included.

    An added token is written wherever the folder's files list such: in tokenizer.json, in added_tokens.json beside a
    tokenizer.model, and in tokenizer_config.json where that has added_tokens_decoder, from which transformers reads
    them alone then.
    """
    target = Path(target)
    copy_tokenizer(tokenizer.folder, target)
    if not (target / "tokenizer.json").is_file() and not (target / "tokenizer_config.json").is_file():
        _write_json(target / "tokenizer_config.json", _llama_config(tokenizer))
    if not tokenizer.new:
        return
    ids = {token: tokenizer.id_of(token) for token in tokenizer.new}
    if (target / "tokenizer.json").is_file():
        extended(target / "tokenizer.json", tokenizer.new, ids).save(target / "tokenizer.json")
    if (target / "tokenizer.model").is_file():
        _write_json(target / "added_tokens.json", {**read_json(target / "added_tokens.json"), **ids})
    path = target / "tokenizer_config.json"
    config = read_json(path)
    if config.get("added_tokens_decoder"):
        listed = {str(number): {"content": token, "lstrip": False, "normalized": False, "rstrip": False,
                                "single_word": False, "special": False} for token, number in ids.items()}
        _write_json(path, {**config, "added_tokens_decoder": {**config["added_tokens_decoder"], **listed}})


def _llama_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """What transformers has to know of a bare tokenizer.model, to read it as sentencepiece does."""
    roles = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "unk_token": tokenizer.unk_id}
    return {"tokenizer_class": "LlamaTokenizer", "add_bos_token": tokenizer.adds_bos, "add_eos_token": False,
            **{role: tokenizer.token(number) for role, number in roles.items() if number is not None}}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


__all__ = ["copy_tokenizer", "save_tokenizer"]
