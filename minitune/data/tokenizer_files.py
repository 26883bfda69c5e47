"""Reads a checkpoint folder's tokenizer files: which exist, the tokens that they name, the chat template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitune.arguments import short
from minitune.errors import InputError

ROLES = ("bos", "eos", "pad", "unk")
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "chat_template.jinja", "chat_template.json")
NAMED_TEMPLATES = "additional_chat_templates"
"""The folder of chat templates for special uses, as transformers writes it: tool_use.jinja."""
_MODEL_FILES = ("config.json", "generation_config.json")
"""Files of the model that name control tokens."""


@dataclass(frozen=True)
class AddedToken:
    """A token that a folder lists beside its vocabulary. ``special``: text must not spell it."""

    content: str
    special: bool


@dataclass(frozen=True)
class TokenizerFiles:
    """What the folder says about its tokenizer. ``named`` maps "bos", "eos", "pad", "unk" to a token or to None (said
    to have none); a role that no file speaks of is absent. ``control`` are all tokens that a file gives a role.
    ``chat_templates`` maps a use ("default", "tool_use") to Jinja source, ``template_file`` is the default's file.
    """

    folder: Path
    sentencepiece: Path | None
    fast: Path | None
    named: Mapping[str, str | None]
    control: frozenset[str]
    added: Mapping[int, AddedToken]
    add_bos: bool | None
    eos_ids: tuple[int, ...]
    ids: Mapping[str, int]
    chat_templates: Mapping[str, str]
    template_file: Path


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Reads tokenizer_config.json, special_tokens_map.json, added_tokens.json, generation_config.json, config.json.

    All are optional; tokenizer_config.json wins over special_tokens_map.json. Raises InputError for a folder without
    a tokenizer and for a file that is not what its name promises.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder that holds tokenizer.model or tokenizer.json")
    sentencepiece, fast = folder / "tokenizer.model", folder / "tokenizer.json"
    if not sentencepiece.is_file() and not fast.is_file():
        raise InputError(f"{folder}: holds no tokenizer; put tokenizer.model (sentencepiece) or tokenizer.json there")
    map_path, config_path = folder / "special_tokens_map.json", folder / "tokenizer_config.json"
    settings = {**read_json(map_path), **read_json(config_path)}
    model = {**read_json(folder / "config.json"), **read_json(folder / "generation_config.json")}
    where = config_path if config_path.is_file() else map_path
    named = {role: _content(settings[f"{role}_token"], where, f"{role}_token")
             for role in ROLES if f"{role}_token" in settings}
    control = {token for role, token in named.items() if token is not None and role != "unk"}
    for field in ("additional_special_tokens", "extra_special_tokens"):
        listed = settings.get(field) or ()
        values: Iterable[Any] = listed.values() if isinstance(listed, dict) else listed
        control |= {token for value in values if (token := _content(value, where, field)) is not None}
    add_bos = settings.get("add_bos_token")
    if add_bos is not None and not isinstance(add_bos, bool):
        raise InputError(f"{where}: add_bos_token is {add_bos!r}; it must be true or false")
    listed_ids = {role: _ids(model.get(f"{role}_token_id"), folder, f"{role}_token_id") for role in ROLES}
    templates, template_file = _chat_templates(folder, settings, config_path)
    return TokenizerFiles(
        folder, sentencepiece if sentencepiece.is_file() else None, fast if fast.is_file() else None, named,
        frozenset(control), _added(folder, settings, where, control), add_bos, listed_ids["eos"],
        {role: found[0] for role, found in listed_ids.items() if found}, templates, template_file)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, or {} where there is no such file; InputError where it is something else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}, not a JSON object; fetch the file again")
    return value


def digests_of(folder: Path) -> dict[str, str]:
    """{name: sha256} of the files in `folder` that a tokenizer is read from; chat templates of special uses, which the
    Tokenizer holds as text, are not among them."""
    found: dict[str, str] = {}
    for name in (*TOKENIZER_FILES, *_MODEL_FILES):
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def added_in_fast_file(path: Path | None) -> dict[int, AddedToken]:
    """The ``added_tokens`` of a tokenizer.json, by id; {} without such a file."""
    if path is None:
        return {}
    tokens = read_json(path).get("added_tokens") or []
    try:
        return {int(token["id"]): AddedToken(str(token["content"]), bool(token.get("special"))) for token in tokens}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: added_tokens must list objects with id and content; fetch the file again") from error


def _content(value: Any, path: Path, field: str) -> str | None:
    """A token as these files write it: a string, an object with "content", or null."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is None or isinstance(value, str):
        return value or None
    raise InputError(f"{path}: {field} is {value!r}; it must be a string, an object with a content, or null")


def _ids(value: Any, folder: Path, field: str) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(item, int) or isinstance(item, bool) for item in values):
        raise InputError(f"{folder}: {field} in config.json or generation_config.json is {value!r}; it must be a "
                         "token id or a list of them")
    return tuple(item for item in values if item >= 0)


def _added(folder: Path, settings: Mapping[str, Any], path: Path, control: set[str]) -> dict[int, AddedToken]:
    """added_tokens.json (token: id, before 2023) and tokenizer_config.json's added_tokens_decoder (id: token)."""
    added: dict[int, AddedToken] = {}
    old = folder / "added_tokens.json"
    for token, number in read_json(old).items():
        if not isinstance(number, int):
            raise InputError(f"{old}: the id of {token!r} is {number!r}; it must be an integer")
        added[number] = AddedToken(token, token in control)
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise InputError(f"{path}: added_tokens_decoder must be an object, not {type(decoder).__name__}")
    for key, value in decoder.items():
        content = _content(value, path, f"added_tokens_decoder[{key!r}]")
        if content is None or not str(key).isdigit():
            raise InputError(f"{path}: added_tokens_decoder[{key!r}] must map a token id to a token, not to {value!r}")
        special = isinstance(value, dict) and bool(value.get("special"))
        added[int(key)] = AddedToken(content, special or content in control)
    return added


def _chat_templates(folder: Path, settings: Mapping[str, Any], config: Path) -> tuple[dict[str, str], Path]:
    """The chat templates by use, and the file of the default one.

    chat_template.jinja and additional_chat_templates/ win over tokenizer_config.json, that over chat_template.json.
    """
    old = folder / "chat_template.json"
    path = config if settings.get("chat_template") is not None or not old.is_file() else old
    value = settings.get("chat_template") if path == config else read_json(old).get("chat_template")
    found: dict[str, str] = {}
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        found = {item.get("name"): item.get("template") for item in value}
    elif value is not None:
        found = {"default": value}
    if not all(isinstance(name, str) and isinstance(source, str) for name, source in found.items()):
        raise InputError(f"{path}: chat_template is {short(value)}; it must be a string, or a list of objects with a "
                         "name and a template")
    for use in sorted((folder / NAMED_TEMPLATES).glob("*.jinja")):
        found[use.stem] = _read_template(use)
    if (folder / "chat_template.jinja").is_file():
        path = folder / "chat_template.jinja"
        found["default"] = _read_template(path)
    return found, path


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error}); fetch the file again") from error


__all__ = ["NAMED_TEMPLATES", "ROLES", "TOKENIZER_FILES", "AddedToken", "TokenizerFiles", "added_in_fast_file",
           "digests_of", "read_json", "read_tokenizer_files"]
