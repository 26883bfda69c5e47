"""Checkpoint: finding files, streaming into given memory, casts, faults, and the memory that a load takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from minitune.checkpoint import reader
from minitune.checkpoint.reader import INDEX, SINGLE, Checkpoint
from minitune.errors import InputError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=[64, reader.CHUNK])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks split rows, large ones hold everything, and several threads read either."""
    monkeypatch.setattr(reader, "CHUNK", request.param)
    monkeypatch.setattr(reader, "PART", 16)


def single(folder: Path, **tensors: torch.Tensor) -> Checkpoint:
    save_file(tensors, folder / SINGLE)
    return Checkpoint.open(folder)


def sharded(folder: Path, weight_map: Any, shards: dict[str, dict[str, torch.Tensor]]) -> Path:
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    (folder / INDEX).write_text(weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_read_into_equals_torch(source: torch.dtype, target: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(7, 37).to(source)
    checkpoint = single(tmp_path, w=values, first=torch.ones(3), scalar=torch.tensor(2.5, dtype=source))
    plain = torch.full((7, 37), torch.nan, dtype=target)
    pitched = torch.full((9, 45), 5.0, dtype=target)
    checkpoint.read_into("w", plain)
    checkpoint.read_into("w", pitched[1:8, :37])
    assert torch.equal(plain, values.to(target))
    assert torch.equal(pitched[1:8, :37], values.to(target))
    assert (pitched[:, 37:] == 5).all() and (pitched[[0, 8]] == 5).all()
    scalar = torch.zeros((), dtype=target)
    checkpoint.read_into("scalar", scalar)
    assert scalar == 2.5


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_read_bytes_into(device: str, tmp_path: Path) -> None:
    values = torch.randint(0, 256, (301, 1), dtype=torch.uint8)
    none = torch.zeros(0, dtype=torch.uint8)
    checkpoint = single(tmp_path, q=values, none=none, w=torch.zeros(4), i=torch.zeros(4, dtype=torch.int8))
    out = torch.zeros(301, 1, dtype=torch.uint8, device=device)
    version = out._version
    checkpoint.read_bytes_into("q", out)
    assert torch.equal(out.cpu(), values) and out._version > version
    pitched = torch.zeros(301, 3, dtype=torch.uint8, device=device)
    checkpoint.read_bytes_into("q", pitched[:, 1:2])
    assert torch.equal(pitched[:, 1:2].cpu(), values) and not pitched[:, ::2].any()
    checkpoint.read_bytes_into("none", none.to(device))
    for name in ("w", "i"):
        with pytest.raises(InputError, match=rf"'{name}' is torch\.\w+; it must be torch\.uint8"):
            checkpoint.read_bytes_into(name, torch.zeros(4, dtype=torch.uint8, device=device))
    for wrong in (torch.zeros(301, dtype=torch.uint8), torch.zeros(301, 1), torch.zeros(301, 1, dtype=torch.int8)):
        with pytest.raises(InputError, match=r"'q' is uint8 \[301, 1\]; it cannot be read into"):
            checkpoint.read_bytes_into("q", wrong.to(device))


def test_read_gives_a_tensor_of_its_own(tmp_path: Path) -> None:
    half, packed = torch.randn(3, 5).to(torch.bfloat16), torch.arange(7, dtype=torch.uint8)
    checkpoint = single(tmp_path, half=half, packed=packed, i=torch.zeros(4, dtype=torch.int8))
    assert torch.equal(checkpoint.read("half"), half) and torch.equal(checkpoint.read("packed"), packed)
    assert torch.equal(checkpoint.read("half", torch.float32), half.float())
    for name, dtype in (("i", None), ("packed", torch.float32), ("half", torch.uint8)):
        with pytest.raises(InputError, match=rf"'{name}' is torch\.\w+;"):
            checkpoint.read(name, dtype)


def test_bytes_of_a_file_that_shrank(tmp_path: Path) -> None:
    checkpoint = single(tmp_path, q=torch.zeros(100, dtype=torch.uint8))
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:-40])
    with pytest.raises(InputError, match="shorter"):
        checkpoint.read_bytes_into("q", torch.zeros(100, dtype=torch.uint8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("target", DTYPES)
def test_read_into_gpu_memory(target: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(7, 37)
    checkpoint = single(tmp_path, w=values, bad=torch.tensor([1.0, torch.nan]))
    pitched = torch.full((9, 45), 5.0, dtype=target, device="cuda")
    checkpoint.read_into("w", pitched[1:8, :37])
    assert torch.equal(pitched[1:8, :37].cpu(), values.to(target)) and (pitched[:, 37:] == 5).all()
    with pytest.raises(InputError, match="1 NaN"):
        checkpoint.read_into("bad", torch.empty(2, dtype=target, device="cuda"))


def test_rank_one_and_empty(tmp_path: Path) -> None:
    checkpoint = single(tmp_path, w=torch.arange(6.0), none=torch.zeros(0, 3))
    parameter = torch.nn.Parameter(torch.zeros(6))
    version = parameter._version
    checkpoint.read_into("w", parameter)
    assert torch.equal(parameter.detach(), torch.arange(6.0)) and parameter._version > version
    checkpoint.read_into("none", torch.zeros(0, 3))
    strided = torch.zeros(12)[::2]
    checkpoint.read_into("w", strided)
    assert torch.equal(strided, torch.arange(6.0))
    with pytest.raises(ValueError, match="contiguous"):
        single(tmp_path, m=torch.ones(2, 3)).read_into("m", torch.zeros(3, 2).t())


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 100, 500])
def test_non_finite_is_named(dtype: torch.dtype, place: int, tmp_path: Path) -> None:
    values = torch.randn(501).to(dtype)
    values[place] = torch.nan
    values[250] = -torch.inf
    checkpoint = single(tmp_path, **{"model.norm.weight": values})
    for target in DTYPES:
        with pytest.raises(InputError, match=r"model\.norm\.weight.* 1 NaN and 1 infinite.*fetch it") as error:
            checkpoint.read_into("model.norm.weight", torch.empty(501, dtype=target))
        assert SINGLE in str(error.value)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 1e5), (torch.bfloat16, 1e5)])
def test_overflow_in_the_cast(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    checkpoint = single(tmp_path, w=torch.tensor([1.0, value, -value]).to(dtype))
    with pytest.raises(InputError, match=r"2 values .* too large for torch\.float16"):
        checkpoint.read_into("w", torch.empty(3, dtype=torch.float16))
    checkpoint.read_into("w", torch.empty(3, dtype=torch.float32))


def test_refuses_dtype_shape_and_name(tmp_path: Path) -> None:
    checkpoint = single(tmp_path, q=torch.zeros(4, dtype=torch.uint8), w=torch.zeros(4))
    with pytest.raises(InputError, match=r"'q' is torch\.uint8"):
        checkpoint.read_into("q", torch.zeros(4))
    with pytest.raises(InputError, match=r"\[4\].*\[2, 2\]"):
        checkpoint.read_into("w", torch.zeros(2, 2))
    with pytest.raises(InputError, match="no tensor 'x'"):
        checkpoint.info("x")


def test_file_that_shrank(tmp_path: Path) -> None:
    checkpoint = single(tmp_path, w=torch.zeros(100))
    raw = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(raw[:-40])
    with pytest.raises(InputError, match="shorter"):
        checkpoint.read_into("w", torch.zeros(100))


@pytest.mark.usefixtures("chunk")
def test_same_bytes(tmp_path: Path) -> None:
    a = torch.randn(60)
    b = a.clone()
    b[59] += 1
    checkpoint = single(tmp_path, a=a, b=a.clone(), c=b, d=a.view(6, 10).clone())
    assert checkpoint.same_bytes("a", "b")
    assert not checkpoint.same_bytes("a", "c") and not checkpoint.same_bytes("a", "d")


def test_index(tmp_path: Path) -> None:
    folder = sharded(
        tmp_path,
        {"a": "s1.safetensors", "b": "s2.safetensors"},
        {"s1.safetensors": {"a": torch.ones(2)}, "s2.safetensors": {"b": torch.zeros(3), "unlisted": torch.ones(1)}},
    )
    with Checkpoint.open(folder) as checkpoint:
        assert set(checkpoint.names()) == {"a", "b", "unlisted"}  # what no one lists is not silently dropped
        for name in ("a", "b", "a"):
            checkpoint.read_into(name, torch.empty(checkpoint.info(name).shape))
        assert checkpoint.path("b").name == "s2.safetensors"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("../out.safetensors", "plain file names"),
        ("/etc/x.safetensors", "plain file names"),
        ("sub/x.safetensors", "plain file names"),
        ("..\\x.safetensors", "plain file names"),
        ("C:x.safetensors", "plain file names"),
        ("x\0.safetensors", "plain file names"),
        ("..", "only .safetensors"),
        ("", "plain file names"),
        (3, "plain file names"),
        (None, "plain file names"),
        (["s1.safetensors"], "plain file names"),
        ("pytorch_model.bin", "pickle"),
        ("x.txt", "only .safetensors"),
        ("link.safetensors", "leads out"),
        ("absent.safetensors", "1 of its files are missing"),
        ("a" * 5000 + ".safetensors", "missing"),
        ("s2.safetensors", "'b' is not in s2"),
    ],
)
def test_index_entries_refused(entry: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"b": torch.ones(2)}, tmp_path / "out.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "out.safetensors")
    shards = {"s1.safetensors": {"a": torch.ones(2)}, "s2.safetensors": {"c": torch.ones(2)}}
    sharded(folder, {"a": "s1.safetensors", "b": entry}, shards)
    opened = []
    original = reader.read_header
    monkeypatch.setattr(reader, "read_header", lambda path: opened.append(path) or original(path))
    with pytest.raises(InputError, match=message):
        Checkpoint.open(folder)
    assert not opened or entry == "s2.safetensors"  # refused before any shard is opened


@pytest.mark.parametrize(
    "text",
    [
        '{"weight_map": {"a": "s.safetensors", "a": "t.safetensors"}}',
        '{"weight_map": []}',
        '{"weight_map": {}}',
        "{}",
        "[]",
        '{"weight_map"',
        '{"weight_map": {"a": NaN}}',
        "[" * 50_000,
    ],
)
def test_malformed_index(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="index"):
        Checkpoint.open(sharded(tmp_path, text, {}))


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    shard = {"a": torch.ones(2)}
    shards = {"s1.safetensors": shard, "s2.safetensors": {**shard, "b": torch.ones(1)}}
    with pytest.raises(InputError, match="stands in"):
        Checkpoint.open(sharded(tmp_path, {"a": "s1.safetensors", "b": "s2.safetensors"}, shards))


def hub_cache(root: Path) -> tuple[Path, Path]:
    """models--X/snapshots/<revision> and models--X/blobs, as huggingface_hub lays them out."""
    repository = root / "models--me--tiny"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    return snapshot, blobs


def test_hub_cache_layout(tmp_path: Path) -> None:
    snapshot, blobs = hub_cache(tmp_path)
    save_file({"a": torch.ones(2)}, blobs / "d34db33f")
    (snapshot / SINGLE).symlink_to("../../blobs/d34db33f")
    assert Checkpoint.open(snapshot).names() == ["a"]
    (tmp_path / "alias").symlink_to(snapshot)
    assert Checkpoint.open(tmp_path / "alias").names() == ["a"]
    (snapshot / SINGLE).rename(snapshot / "s1.safetensors")
    assert Checkpoint.open(sharded(snapshot, {"a": "s1.safetensors"}, {})).names() == ["a"]


def test_links_out_are_refused(tmp_path: Path) -> None:
    snapshot, _ = hub_cache(tmp_path)
    other = tmp_path / "models--you--other" / "blobs"
    other.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, other / "d34db33f")
    (snapshot / SINGLE).symlink_to(other / "d34db33f")
    with pytest.raises(InputError, match="leads out of the folder"):
        Checkpoint.open(snapshot)
    plain = tmp_path / "blobs-beside" / "model"
    plain.mkdir(parents=True)
    (plain.parent / "blobs").mkdir()
    save_file({"a": torch.ones(2)}, plain.parent / "blobs" / "x")
    (plain / SINGLE).symlink_to("../blobs/x")
    with pytest.raises(InputError, match="leads out of the folder"):
        Checkpoint.open(plain)
    (plain / SINGLE).unlink()
    (plain / SINGLE).symlink_to(SINGLE)  # a loop
    with pytest.raises(InputError):
        Checkpoint.open(plain)
    (plain / SINGLE).unlink()
    save_file({"a": torch.ones(2)}, plain / "real")
    (plain / SINGLE).symlink_to("real")  # within the folder
    assert Checkpoint.open(plain).names() == ["a"]


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_stay_unread(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save(Canary(tmp_path / "ran"), folder / name)
    with pytest.raises(InputError, match="safetensors"):
        Checkpoint.open(folder)
    assert not (tmp_path / "ran").exists()


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither"):
        Checkpoint.open(tmp_path)
    with pytest.raises(InputError, match="not a folder"):
        Checkpoint.open(tmp_path / "none")
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match="PEFT adapter"):
        Checkpoint.open(tmp_path)


NAMES = st.text(max_size=6) | st.sampled_from(["s.safetensors", "../s.safetensors", "./s.safetensors", "s.bin"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=80, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(index=st.fixed_dictionaries({"weight_map": st.dictionaries(NAMES, NAMES | JSON, max_size=3) | JSON}) | JSON)
def test_only_input_error_for_any_index(index: Any, tmp_path: Path) -> None:
    if not (tmp_path / "s.safetensors").exists():
        save_file({"a": torch.ones(1)}, tmp_path / "s.safetensors")
    (tmp_path / INDEX).write_text(json.dumps(index))
    try:
        checkpoint = Checkpoint.open(tmp_path)
    except InputError as error:
        assert len(str(error)) < 2000
    else:
        assert checkpoint.names() == ["a"]


MEASURE = """
import sys, threading, torch
from minitune.checkpoint.reader import Checkpoint
from minitune.checkpoint.weights import load_weights
def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"): return int(line.split()[1]) * 1024
checkpoint = Checkpoint.open(sys.argv[1])
torch.aminmax(torch.ones(10).bfloat16())
before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.001): peak = max(peak, anonymous())
watcher = threading.Thread(target=watch); watcher.start()
out = {name: torch.empty(checkpoint.info(name).shape, dtype=torch.bfloat16) for name in checkpoint.names()}
load_weights(checkpoint, out, False)
done.set(); watcher.join()
print(max(peak, anonymous()) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_anonymous_memory_of_a_load(tmp_path: Path) -> None:
    n, mib = 8, 1 << 20
    save_file({f"w{i}": torch.zeros(24, mib // 4) for i in range(n)}, tmp_path / SINGLE)  # 24 MiB each in fp32
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    peak = int(ran.stdout)
    result, largest = n * 12 * mib, 12 * mib
    assert result <= peak <= result + largest + 64 * mib, f"{peak / mib:.0f} MiB for a result of {result / mib:.0f}"
