"""samples: rows in memory give what a file of the same rows gives, and are as strict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minitune import data
from minitune.data.samples import are_samples, rows_of
from minitune.data.tokenizer import Tokenizer, load_tokenizer
from minitune.errors import InputError

ROWS: list[dict[str, Any]] = [
    {"prompt": "number 1", "completion": " is odd"}, {"text": "and so on", "weight": 2},
    {"prompt": "é\u2028ü", "completion": " 😀"}, {"prompt": "a", "chosen": " b", "rejected": " c"}]


class Table:
    """As much of a datasets.Dataset as is asked for."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int | str) -> Any:
        return self.rows[place] if isinstance(place, int) else [row[place] for row in self.rows]


@pytest.fixture(scope="module")
def tokenizer(small_spm: Path) -> Tokenizer:
    return load_tokenizer(small_spm)


@pytest.mark.parametrize("kind", [list, tuple, Table])
def test_they_give_what_a_file_of_them_gives(kind: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    of_file, of_rows = (data.stream(given, tokenizer, tokens=64, epochs=2, seed=3) for given in (path, kind(ROWS)))
    assert [batch.tokens.tolist() for batch in of_file] == [batch.tokens.tolist() for batch in of_rows]
    assert [batch.labels.tolist() for batch in of_file] == [batch.labels.tolist() for batch in of_rows]
    source = of_rows.ledger.sources[0]
    assert (source.path, source.samples) == ("samples", len(ROWS))
    assert source.dropped == of_file.ledger.sources[0].dropped > 0
    assert [document.where for document in of_rows.documents] == [f"samples: row {n}" for n in (1, 2, 3, 4)]


def test_fields_have_other_names(tokenizer: Tokenizer) -> None:
    rows = [{"question": "a", "answer": " b"}]
    stream = data.stream(rows, tokenizer, tokens=64, field_map={"prompt": "question", "completion": "answer"})
    assert stream.n_documents == 1


@pytest.mark.parametrize("field_map", ["prompt=question", ["prompt=question"], 3])
def test_a_field_map_is_a_mapping(field_map: Any, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"stream: field_map is .*; give .our field: your field., such as"):
        data.stream(ROWS, tokenizer, tokens=64, field_map=field_map)


@pytest.mark.parametrize(("row", "message"), [
    ({"text": {1, 2}}, "samples: row 2: holds what JSON cannot say .*; give texts, numbers, lists and dicts"),
    ({"text": "\ud800"}, "samples: row 2: holds the lone surrogate"),
    ({"text": "a", "weight": float("nan")}, "samples: row 2: .*NaN"),
    ("a text", "samples: row 2: is 'a text'; each must be a dict, as the first one is"),
    ({"body": "a"}, "samples: row 2: .*body"), ({"prompt": 3, "completion": "a"}, "samples: row 2: prompt is 3")])
def test_what_is_wrong_names_the_row(row: Any, message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=message):
        data.stream([{"text": "a"}, row], tokenizer, tokens=64)


def test_a_row_that_holds_itself_is_refused(tokenizer: Tokenizer) -> None:
    row: dict[str, Any] = {"text": "a"}
    row["more"] = row
    with pytest.raises(InputError, match=r"samples: row 1: holds what JSON cannot say .Circular reference"):
        data.stream([row], tokenizer, tokens=64)


def test_the_rows_are_left_as_they_are(tokenizer: Tokenizer) -> None:
    before = json.dumps(ROWS)
    data.stream(ROWS, tokenizer, tokens=64)
    assert json.dumps(ROWS) == before


def test_what_a_table_filled_up_is_absent() -> None:
    row = {"messages": [{"role": "user", "content": "a", "name": None}], "tools": None, "list": [None]}
    assert next(rows_of(Table([row])))[1] == {"messages": [{"role": "user", "content": "a"}], "tools": None,
                                              "list": [None]}
    assert next(rows_of([row]))[1] == row


def test_what_holds_samples() -> None:
    assert are_samples(ROWS) and are_samples(tuple(ROWS)) and are_samples(Table(ROWS))
    for other in ("a.jsonl", Path("a.jsonl"), {"a.jsonl": 1.0}, [], ["a.jsonl"], [[1, 2]], 3, None, iter(ROWS)):
        assert not are_samples(other)


class Frame:
    """As much of a pandas.DataFrame as is asked for: its places are names."""

    columns = ("text",)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, name: str) -> list[str]:
        return {"text": ["a"]}[name]

    def to_dict(self, kind: str) -> Any:
        return [{"text": "a"}]


@pytest.mark.parametrize(("given", "message"), [
    ({"train": Table(ROWS)}, r"path is .*; give one of its tables, such as data\['train'\]"),
    ({"text": ["a", "b"]}, "path is .*; give a list of dicts, one a sample"),
    ({"prompt": "a", "completion": "b"}, "path is .*; give a list of dicts, one a sample"),
    (Frame(), r'path is .*; give data.to_dict\("records"\)'), ([[1, 2]], "path is .*, or samples as a list of dicts")])
def test_other_tables_are_answered_with_how_to_give_them(given: Any, message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=message):
        data.stream(given, tokenizer, tokens=64)


def test_a_field_that_is_nan_is_named() -> None:
    with pytest.raises(InputError, match=r"samples: row 2: the field 'note' is NaN; write a number, or None .* pandas"):
        list(rows_of([{"text": "NaN"}, {"text": "a", "note": float("nan")}]))
    with pytest.raises(InputError, match="samples: row 1: NaN is no JSON number"):
        list(rows_of([{"text": "a", "notes": [float("nan")]}]))


def test_texts_are_no_files(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"and none of these is a file; give texts as samples: \[\{\"text\": "):
        data.stream(["number 1", "and so on"], tokenizer, tokens=64)
    with pytest.raises(InputError, match=r"rows.jsonl: no such file"):
        data.stream(["rows.jsonl", "and so on"], tokenizer, tokens=64)
