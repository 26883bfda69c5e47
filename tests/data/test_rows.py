"""Rows of every kind of file: what is read, where it stands, bounded memory, and one file:line error for the rest."""

from __future__ import annotations

import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minitune.data import rows
from minitune.data.rows import read_rows
from minitune.errors import InputError


def read(path: Path, content: bytes) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a file with this content, each `where` without the file's name."""
    path.write_bytes(content)
    return [(where.removeprefix(str(path)), row) for where, row in read_rows(path)]


JSON_READ = {
    b'[{"a": 1}, {"a": 2},\n\n {"a":\n 3}]\n': [(":1", 1), (":1", 2), (":3", 3)],
    b'\xef\xbb\xbf\n [\n{"a": "\\ud83d\\ude00"}\r\n,\r\n{"a": "\xc3\xa9"}]': [(":3", "😀"), (":5", "é")],
    b'{\n  "a": 1\n}': [(":1", 1)],
    b'{"a": 1}\n{"a": 2} {"a": 3}\n': [(":1", 1), (":2", 2), (":2", 3)],
    b'[{"a": "x]},{\\"\\\\"}]': [(":1", 'x]},{"\\')],
}


@pytest.mark.parametrize("content", JSON_READ, ids=lambda content: repr(content[:20]))
@pytest.mark.parametrize("chunk", [1, 7, 2**20])
def test_json_is_an_array_or_objects_one_after_the_other(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, chunk: int) -> None:
    monkeypatch.setattr(rows, "_CHUNK", chunk)
    found = read(tmp_path / "a.JSON", content)
    assert [(where, row["a"]) for where, row in found] == JSON_READ[content]


BAD_JSON = {
    b"": "holds no samples",
    b" \n ": "holds no samples",
    b"[]": "holds no samples; its array is empty",
    b"[\n1, 2]": r":2: '1, 2\]' where a sample must begin",
    b'["a"]': "where a sample must begin, which is a JSON object",
    b'"text"': ":1: '\"text\"' where a sample must begin",
    b"[[{}]]": r"where a sample must begin",
    b"[": "the file ends where a sample must begin",
    b'[{"a": 1},': "the file ends where a sample must begin",
    b'[{"a": 1},\n]': r":2: '\]' where a sample must begin",
    b'[{"a": 1}\n\n{"a": 2}]': ':3: \'{"a": 2}\\]\' after a sample of the array; write ","',
    b'[{"a": 1}\n': "the file ends after a sample of the array",
    b'[{"a": 1}]\n[{"a": 2}]': r":2: '\[{\"a\": 2}\]' behind the end of the array; remove it",
    b'{"a": 1},\n{"a": 2}': ":1: ',' where a sample must begin.*without a comma",
    b'[{"a": 1},\n\n{"a":\n1 2}]': ":4: not valid JSON: Expecting ',' delimiter at column 3, in the sample that begins "
                                   "on line 3; correct it",
    b'[{"a": 1}, {"a" 1}]': ":1: not valid JSON: Expecting ':' delimiter at column 17; correct it",
    b'[\n{"a": "x': ":2: not valid JSON: (Unterminated string starting at column 7|the file ends)",
    b'[\n{"a": 1': ":2: not valid JSON: the file ends before the sample that begins here does",
    b'[{"a": 1},\n{"a": 1, "a": 2}]': ":2: the key 'a' is given twice",
    b'[{"a": NaN}]': ":1: NaN is no JSON number",
    b'[{"a": 1e999}]': "too large",
    b'[\n{"a": "\\ud83d"}]': ":2: holds the lone surrogate",
    b'[{"a": 1},\n{"a": "\xff"}]': ":2: not UTF-8 \\(byte 0xff\\); save",
    b'[{"a": "\xc3': "not UTF-8",
    '[{"a": 1}]'.encode("utf-16"): ":1: is UTF-16, not UTF-8; save",
    b'[{"a": "\xfe\xff"}]': ":1: not UTF-8 \\(byte 0xfe\\); save",
    b"[" + b'{"a":' * 200_000: "nested too deeply",
    b"{'a': 1}": "not valid JSON: Expecting property name",
}


@pytest.mark.parametrize("content", BAD_JSON, ids=lambda content: repr(content[:24]))
@pytest.mark.parametrize("chunk", [3, 2**20])
def test_bad_json_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, chunk: int) -> None:
    monkeypatch.setattr(rows, "_CHUNK", chunk)
    path = tmp_path / "a.json"
    with pytest.raises(InputError, match=BAD_JSON[content]) as caught:
        read(path, content)
    assert str(caught.value).startswith(f"{path}:") and len(str(caught.value)) < len(str(path)) + 250


def test_a_large_array_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("w") as file:
        file.write("[" + ",".join(json.dumps({"text": "x" * 1000, "n": i}) for i in range(40_000)) + "]")   # 40 MB
    tracemalloc.start()
    try:
        assert [row["n"] for _, row in read_rows(path)] == list(range(40_000))
        assert tracemalloc.get_traced_memory()[1] < 12 * 2**20
    finally:
        tracemalloc.stop()


def test_a_sample_that_never_ends_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_LINE", 2**20)
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.write(b'[\n{"a": "' + b"x" * 2**23)
        file.truncate(2**31)
    with pytest.raises(InputError, match=r":2: the sample that begins here is longer than 1,048,576.*; close it"):
        list(read_rows(path))
    path.write_text('{ "data" : [ {"text": "' + "x" * 2**21 + '"}]}')
    with pytest.raises(InputError, match=r":1: .* 1,048,576 .*; if 'data' holds the samples, write that list alone"):
        list(read_rows(path))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_to_json_gives_the_rows_before_it_or_one_error(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject) -> None:
    monkeypatch.setattr(rows, "_CHUNK", data.draw(st.sampled_from([1, 5, 2**20])))
    values = st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3))
    samples = data.draw(st.lists(st.dictionaries(st.text(max_size=5), values, max_size=3), min_size=1, max_size=4))
    whole = json.dumps(samples, indent=data.draw(st.sampled_from([None, 1]))).encode()
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, len(whole)))
    damaged = whole[:start] + data.draw(st.binary(max_size=4)) + whole[end:]
    path = tmp_path / "a.json"
    assert [row for _, row in read(path, whole)] == samples
    try:
        expected = json.loads(damaged)
    except ValueError:
        expected = None
    try:
        found = [row for _, row in read(path, damaged)]
        assert expected is None or found == (expected if isinstance(expected, list) else [expected])
    except InputError as error:
        assert str(error).startswith(f"{path}:") and "\n" not in str(error)


def test_a_text_file_is_one_row(tmp_path: Path) -> None:
    content = "\ufeffOne.\r\n\r\n Zwei – 三\n".encode()
    assert read(tmp_path / "a.txt", content) == [(":1", {"text": "One.\r\n\r\n Zwei – 三\n"})]
    assert read(tmp_path / "a.md", b"# x") == [(":1", {"text": "# x"})]
    for content, message in ((b"", "holds no text"), (b" \n", "holds no text"), (b"a\nb\n\xe9", ":3: not UTF-8")):
        with pytest.raises(InputError, match=message):
            read(tmp_path / "a.txt", content)


def test_a_text_file_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_TEXT", 4)
    assert read(tmp_path / "a.txt", b"1234") == [(":1", {"text": "1234"})]
    with pytest.raises(InputError, match="up to 4 bytes; split it"):
        read(tmp_path / "a.txt", b"12345")


def test_parquet_makes_up_no_fields(tmp_path: Path) -> None:
    """Arrow gives each object of a column the fields of all of them; what was a list's or a map's own null stays."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    table: list[dict[str, Any]] = [
        {"calls": [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": [{"z": 1}, {"w": None}]}}],
         "id": None}, {"calls": [{"name": "h", "arguments": {"x": 2}}], "id": 3}, {"calls": None, "id": 4}]
    parquet.write_table(pyarrow.Table.from_pylist(table), path)
    table[0]["calls"][1]["arguments"]["y"][1] = {}
    assert [row for _, row in read_rows(path)] == table
    kind = pyarrow.map_(pyarrow.string(), pyarrow.int64())
    given = pyarrow.table({"m": pyarrow.array([[("a", None), ("b", 1)]], kind),
                           "l": pyarrow.array([[None, 1]])})
    parquet.write_table(given, path)
    assert [row for _, row in read_rows(path)] == [{"m": {"a": None, "b": 1}, "l": [None, 1]}]
    parquet.write_table(pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"]), path)
    with pytest.raises(InputError, match="has two columns named 'text'; rename"):
        list(read_rows(path))


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(rows, "_PARQUET_ROWS", 2)
    path = tmp_path / "a.parquet"
    table = [{"messages": [{"role": "user", "content": f"é {i}", "name": None}], "n": i} for i in range(5)]
    parquet.write_table(pyarrow.Table.from_pylist(table), path, row_group_size=3)
    for row in table:
        del row["messages"][0]["name"]
    assert list(read_rows(path)) == [(f"{path}: row {i + 1}", row) for i, row in enumerate(table)]
    whole = path.read_bytes()
    for content in (b"", b"PAR1", whole[:-20], whole[:100] + b"\xff" * 40 + whole[140:]):
        with pytest.raises(InputError, match="cannot be read as Parquet after row"):
            read(path, content)
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(InputError, match="holds no samples"):
        list(read_rows(path))


def test_without_pyarrow_the_message_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"a.parquet: Parquet .* pip install 'minitune\[parquet\]'"):
        read(tmp_path / "a.parquet", b"PAR1")


def test_other_endings_are_jsonl_or_refused_by_name(tmp_path: Path) -> None:
    assert read(tmp_path / "a.ndjson", b'\n{"a": 1}\n') == [(":2", {"a": 1})]
    assert read(tmp_path / "data", b'{"a": 1}') == [(":1", {"a": 1})]
    for name in ("a.csv", "a.jsonl.gz", "a.pkl", "a.arrow"):
        with pytest.raises(InputError, match=f"{name}: files that end in .* are not read; "):
            read(tmp_path / name, b"a,b\n1,2\n")
    for name in ("b.json", "b.txt", "b.parquet", "b.csv", "b"):
        with pytest.raises(InputError, match=f"{name}: no such file"):
            list(read_rows(tmp_path / name))
    (tmp_path / "c.json").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        list(read_rows(tmp_path / "c.json"))
