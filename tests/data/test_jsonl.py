"""JSONL: what is read, and one file:line error for everything that is not."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minitune.data.jsonl import read_jsonl
from minitune.errors import InputError

GOOD = b'{"text": "ok"}\n'
BAD = {
    b"{": "not valid JSON: the line ends before its JSON does; write one JSON object a line",
    b'{"text": "a"': "not valid JSON: the line ends before its JSON does",
    b'{"text": "a" ': "not valid JSON: the line ends before its JSON does",
    b'{"text": "a': "not valid JSON: Unterminated string starting at column 10;",
    b"[": "the line ends before its JSON does; a JSON array must be written as one object a line",
    b'[{"text": "a"},': "the line ends before its JSON does; a JSON array must be",
    b"{'text': 'a'}": "not valid JSON",
    b'{"text": "a",}': "not valid JSON",
    b'{"text": "a"} {"text": "b"}': "Extra data",
    b'{"text": "a\tb"}': "Invalid control character at column 12",
    b'{"text": "\\x"}': "not valid JSON",
    b"hello": "not valid JSON",
    b"\x00\x00": "not valid JSON",
    b"[" * 200_000: "nested too deeply",
    b'{"a":' * 200_000: "nested too deeply",
    b'{"text": NaN}': "NaN is no JSON number",
    b'{"text": -Infinity}': "-Infinity is no JSON number",
    b'{"text": 1e999}': "too large",
    b'{"text": ' + b"1" * 6000 + b"}": "the number 1+ is too large",
    b'{"text": "a", "text": "b"}': "'text' is given twice",
    b'{"m": {"r": 1, "r": 2}}': "'r' is given twice",
    b'{"text": "\\ud83d"}': "lone surrogate",
    b'{"\\uDC00": [["x"]]}': "lone surrogate",
    b'{"text": "\xff"}': "not UTF-8 \\(byte 0xff at byte 11",
    b'{"text": "\xed\xa0\x80"}': "not UTF-8",
    '{"text": "a"}'.encode("utf-16"): "is UTF-16, not UTF-8; save",
    b"\xef\xbb\xbf{}": "not valid JSON",
    b"[1, 2]": "an array, not a JSON object; a JSON array must be written .* or the file be named .json",
    b'"text"': "a string, not a JSON object",
    b"null": "null, not a JSON object",
    b"3.5": "a number, not a JSON object",
    b"true": "true or false, not a JSON object",
}


@pytest.mark.parametrize("line", BAD, ids=lambda line: repr(line[:24]))
def test_a_bad_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(GOOD + b"\n" + GOOD + line + b"\n" + GOOD)
    found: list[str] = []
    with pytest.raises(InputError, match=BAD[line]) as caught:
        for where, _ in read_jsonl(path):
            found.append(where)
    assert found == [f"{path}:1", f"{path}:3"]
    assert str(caught.value).startswith(f"{path}:4: ") and len(str(caught.value)) < len(str(path)) + 250


def test_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "\\ud83d\\ude00 \xe2\x80\xa8"}\r\n  \n\n{"n": {"a": [1, 1.5]}}')
    assert list(read_jsonl(path)) == [(f"{path}:1", {"text": "😀 \u2028"}), (f"{path}:4", {"n": {"a": [1, 1.5]}})]


def test_files_without_samples(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for content in (b"", b"\n \n", b"\xef\xbb\xbf"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="holds no samples"):
            list(read_jsonl(path))
    (tmp_path / "samples.jsonl").write_text('{"text": "a"}')
    with pytest.raises(InputError, match=r"smaples\.jsonl: no such file \(did you mean .*samples\.jsonl\?\); give"):
        list(read_jsonl(tmp_path / "smaples.jsonl"))
    with pytest.raises(InputError, match="no such file"):
        list(read_jsonl(tmp_path / "b.jsonl"))
    with pytest.raises(InputError, match="is a folder"):
        list(read_jsonl(tmp_path))


def test_a_giant_line_costs_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(GOOD + b'{"text": "')
        file.truncate(2**30)  # a sparse file: the line is 1 GiB of zeros
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=rf"{path}:2: the line is longer than 67,108,864 bytes"):
            list(read_jsonl(path))
        assert tracemalloc.get_traced_memory()[1] < 160 * 2**20
    finally:
        tracemalloc.stop()
    path.write_bytes(GOOD)
    monkeypatch.setattr("minitune.data.jsonl.MAX_LINE", len(GOOD))
    assert len(list(read_jsonl(path))) == 1
    monkeypatch.setattr("minitune.data.jsonl.MAX_LINE", len(GOOD) - 1)
    with pytest.raises(InputError, match=":1: the line is longer"):
        list(read_jsonl(path))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_gives_samples_or_one_error(tmp_path: Path, data: st.DataObject) -> None:
    values = st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3))
    sample = data.draw(st.dictionaries(st.text(max_size=5), values, max_size=3))
    line = json.dumps(sample, ensure_ascii=data.draw(st.booleans())).encode("utf-8", "replace")
    start = data.draw(st.integers(0, len(line)))
    end = data.draw(st.integers(start, len(line)))
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + line[:start] + data.draw(st.binary(max_size=4)) + line[end:] + b"\n")
    try:
        for where, found in read_jsonl(path):
            assert isinstance(found, dict) and where.startswith(f"{path}:")
    except InputError as error:
        assert str(error).startswith(f"{path}:")


def test_faults_that_need_words_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for content, words in ((gzip.compress(b'{"text": "a"}'), "is packed by gzip, whatever its name says; unpack it"),
                           (b'{"text": "a", "weight": ' + b"1" * 5001 + b"}", "the number 1+ is too large")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"a\.jsonl:1: {words}"):
            list(read_jsonl(path))
