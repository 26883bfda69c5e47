"""The header parser: reads what safetensors writes, refuses everything out of order, in bounded time."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from minitune.checkpoint.safetensors_header import DTYPES, read_header
from minitune.errors import InputError


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def test_agrees_with_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {name: torch.zeros(3, 2).to(dtype) for name, dtype in DTYPES.items()}
    tensors["empty"], tensors["scalar"] = torch.zeros(4, 0), torch.tensor(1.5)
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    with safe_open(path, "pt") as theirs:
        assert set(header.tensors) == set(theirs.keys())
        for name, info in header.tensors.items():
            assert info.shape == tuple(tensors[name].shape) and info.dtype == tensors[name].dtype, name
    info = header.tensors["scalar"]
    assert path.read_bytes()[info.begin : info.end] == tensors["scalar"].numpy().tobytes()


BAD: dict[str, tuple[Any, bytes, str]] = {
    "two names": (b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8), "twice"),
    "two fields": (b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}', bytes(8), "twice"),
    "leading space": (b" " + json.dumps({"a": entry()}).encode(), bytes(8), "start with"),
    "not json": (b'{"a": }', b"", "not valid JSON"),
    "more after it": (b"{} {}", b"", "not valid JSON"),
    "not utf-8": (b'{"a\xff": 1}', b"", "UTF-8"),
    "surrogate": (b'{"\\ud800": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8), "surrogate"),
    "nested": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"", "nested"),
    "many values": (b'{"a":[' + b"{}," * 1_000_001 + b"{}]}", b"", "JSON values"),
    "NaN": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', bytes(8), "NaN"),
    "infinite": (b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}', bytes(8), "finite"),
    "long number": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', bytes(8), "JSON"),
    "extra field": ({"a": entry(x=1)}, bytes(8), "exactly"),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "exactly"),
    "entry no object": ({"a": 3}, b"", "exactly"),
    "unknown dtype": ({"a": entry(dtype="F33")}, bytes(8), "F33"),
    "dtype no string": ({"a": entry(dtype=["F32"])}, bytes(8), "dtype"),
    "negative": ({"a": entry(shape=(-2,))}, bytes(8), "shape"),
    "float": ({"a": entry(shape=(2.0,))}, bytes(8), "shape"),
    "bool": ({"a": entry(shape=(True, 2))}, bytes(8), "shape"),
    "shape no list": ({"a": {**entry(), "shape": 2}}, bytes(8), "shape"),
    "overflow": ({"a": entry(shape=(2**62, 2**62))}, bytes(8), "overflows"),
    "hidden overflow": ({"a": entry(shape=(2**62, 2**62, 0), offsets=(0, 0))}, b"", "overflows"),
    "too large": ({"a": entry(shape=(2**63,))}, bytes(8), "2\\^63"),
    "rank": ({"a": entry(shape=(1,) * 65, offsets=(0, 4))}, bytes(4), "64"),
    "bytes against shape": ({"a": entry(shape=(3,))}, bytes(8), "12 bytes"),
    "offsets reversed": ({"a": entry(offsets=(8, 0))}, bytes(8), "begin"),
    "offsets float": ({"a": entry(offsets=(0, 8.0))}, bytes(8), "offsets"),
    "three offsets": ({"a": entry(offsets=(0, 4, 8))}, bytes(8), "offsets"),
    "hole": ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20), "hole of 4"),
    "hole at start": ({"a": entry(offsets=(4, 12))}, bytes(12), "hole"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), "overlaps"),
    "the same bytes": ({"a": entry(), "b": entry()}, bytes(8), "overlaps"),
    "trailing": ({"a": entry()}, bytes(9), "1 bytes follow"),
    "truncated data": ({"a": entry()}, bytes(7), "truncated; fetch the file again"),
    "metadata no strings": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "metadata no object": ({"__metadata__": []}, b"", "__metadata__"),
    "a list": (b"[]", b"", "start with"),
    "much white space": (b"{" + b" " * 90_000_000, b"", "not valid JSON"),
    "many quotes": (b'{"' + b'\\"' * 40_000_000, b"", "escapes"),
}


@pytest.mark.parametrize("fault", BAD)
def test_refuses(fault: str, tmp_path: Path) -> None:
    header, data, message = BAD[fault]
    path = write(tmp_path / "bad.safetensors", header, data)
    start = time.process_time()
    with pytest.raises(InputError, match=message) as error:
        read_header(path)
    assert str(path) in str(error.value) and len(str(error.value)) < 1000
    assert time.process_time() - start < 5      # it takes tenths of one; quadratic, hours


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "truncated"),
        (b"\x01\x00", "truncated"),
        ((100_000_001).to_bytes(8, "little"), "100,000,001"),
        (b"\xff" * 8, "format allows"),
        (b"<!DOCTYPE html>", "is it safetensors. If so, fetch the file again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer.*git lfs pull"),
        ((50).to_bytes(8, "little") + b"{}", "truncated: fetch the file again"),
    ],
)
def test_refuses_lengths(raw: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=message):
        read_header(path)


def test_missing_folder_and_pipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_header(tmp_path / "none")
    with pytest.raises(InputError, match=r"regular file|cannot be opened"):
        read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # a plain open would wait for ever
    with pytest.raises(InputError, match="regular file"):
        read_header(tmp_path / "pipe")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16"]) | VALUES,
        "shape": st.lists(st.integers(0, 4), max_size=3) | VALUES,
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2) | VALUES,
    }
)


@settings(max_examples=150, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.text(max_size=3), ENTRY | VALUES, max_size=3) | VALUES, data=st.binary(max_size=48))
def test_only_input_error_for_any_json(header: Any, data: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "any.safetensors", header, data)
    try:
        found = read_header(path)
    except InputError as error:
        assert len(str(error)) < 2000
    else:
        assert sum(info.n_bytes for info in found.tensors.values()) == len(data)


@settings(max_examples=150, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 200), value=st.integers(0, 255), cut=st.integers(0, 200))
def test_only_input_error_for_damage(place: int, value: int, cut: int, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": entry(), "b": entry((3,), (8, 14), "BF16")}, bytes(14))
    raw = bytearray(path.read_bytes())
    raw[place % len(raw)] = value
    path.write_bytes(raw[: len(raw) - cut % 20])
    try:
        read_header(path)
    except InputError as error:
        assert str(path) in str(error)
