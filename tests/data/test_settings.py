"""The settings of data: texts become tables, shares are exact, and what makes no sense is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minitune.config import Data
from minitune.errors import InputError


def test_tables() -> None:
    data = Data(field_map=("prompt=question", " completion = a=b"), mix=("odd=name.jsonl=0.5", "b.jsonl=2"))
    assert data.fields() == {"prompt": "question", "completion": "a=b"}
    assert data.shares(Path("a.jsonl")) == {"a.jsonl": 1.0, "odd=name.jsonl": 0.5, "b.jsonl": 2.0}
    assert Data(mix=("a.jsonl=3",)).shares("a.jsonl") == {"a.jsonl": 3.0}
    assert Data(valid=Path("v.jsonl")).valid == "v.jsonl" and Data(mix=["a=1"]).mix == ("a=1",)      # type: ignore
    assert Data().cached is None and Data(cache=False).cached is False


@pytest.mark.parametrize(("settings", "message"), [
    ({"mix": ("a.jsonl",)}, "mix has 'a.jsonl'; write FILE=SHARE"),
    ({"mix": ("=1",)}, "mix has '=1'; write FILE=SHARE"),
    ({"mix": ("a=x",)}, "mix has 'a=x'; the share must be a number"),
    ({"mix": ("a=nan",)}, "the share of 'a' is nan; it must be a positive number of at most 1000"),
    ({"mix": ("a=inf",)}, "the share of 'a' is inf"),
    ({"mix": ("a=-1",)}, "the share of 'a' is -1.0"),
    ({"mix": ("a=0",)}, "the share of 'a' is 0.0"),
    ({"mix": ("a=1", "a=2")}, "mix names 'a' twice"),
    ({"mix": "a=1"}, "mix is 'a=1'; it must be a list of texts"),
    ({"field_map": "prompt=q"}, "field_map is 'prompt=q'; it must be a list of texts such as prompt=question"),
    ({"field_map": ("prompt",)}, "field_map has 'prompt'; write ours=yours"),
    ({"field_map": (3,)}, r"field_map is \(3,\)"),
    ({"long": "cut"}, "long is 'cut'; it must be one of refuse, split, truncate"),
    ({"valid_split": float("nan")}, "valid_split is nan"),
    ({"valid_split": -0.1}, "valid_split is -0.1"),
    ({"valid_split": float("inf")}, "valid_split is inf"),
    ({"valid_split": 1.5}, "valid_split is 1.5; below 1 it is a share"),
    ({"valid_split": "0.1"}, "valid_split is '0.1'; it must be a number"),
    ({"valid": "v.jsonl", "valid_split": 0.1}, "both valid and valid_split are given"),
    ({"valid": 3}, "valid is 3; it must be a text"),
    ({"cache": 1}, "cache is 1; it must be true or false"),
])
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"data: .*{message}"):
        Data(**settings)
