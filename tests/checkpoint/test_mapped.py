"""mapped: weights that a CPU reads where the system has their file; what is copied all the same, what is released."""

import ctypes
import errno
import mmap
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import minitune as mt
from minitune.api import Model
from minitune.checkpoint import mapped
from minitune.checkpoint.mapped import LEAST, map_bytes
from minitune.checkpoint.reader import SINGLE, Checkpoint
from minitune.checkpoint.weights import save_weights
from minitune.config import ModelConfig
from minitune.errors import InputError
from minitune.model.init import init_weights
from minitune.model.llama import Llama

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files are mapped on Linux alone")
_SYSTEM = mapped._system()
ROWS = LEAST // 2 // 64     # of 64 values in bf16 make LEAST bytes


def _maps(path: Path) -> list[tuple[int, int]]:
    """The addresses at which this process has mapped a file."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [line[0].split("-") for line in lines if line[-1] == str(path)]
    return [(int(begin, 16), int(end, 16)) for begin, end in spans]


def _lies_in(tensor: torch.Tensor, path: Path) -> bool:
    return any(begin <= tensor.data_ptr() < tensor.data_ptr() + tensor.nbytes <= end for begin, end in _maps(path))


def _checkpoint(folder: Path, **tensors: torch.Tensor) -> Checkpoint:
    save_file(tensors, folder / SINGLE)
    return Checkpoint.open(folder)


def _values(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model whose larger weights have over LEAST bytes."""
    config = ModelConfig(vocab_size=2048, d_model=512, n_layers=2, n_heads=8, n_kv_heads=2, head_dim=64, d_ff=2048)
    network = Llama(config, dtype=torch.bfloat16)
    init_weights(network, 0)
    Model(network, None).save(tmp_path)
    return tmp_path


def test_tensors_side_by_side_are_one(tmp_path):
    a, b = _values(ROWS, 64), _values(3, 64)
    checkpoint = _checkpoint(tmp_path, a=a, b=b)
    found = checkpoint.mapped(["a", "b"], torch.bfloat16)
    assert torch.equal(found, torch.cat([a, b])) and _lies_in(found, tmp_path / SINGLE)
    assert found.untyped_storage().nbytes() == found.nbytes       # torch.save would write no more than these


def test_a_mapping_lasts_as_long_as_its_tensors(tmp_path):
    path, descriptors = tmp_path / SINGLE, len(os.listdir("/proc/self/fd"))
    checkpoint = _checkpoint(tmp_path, a=_values(ROWS, 64))
    found = checkpoint.mapped(["a"], torch.bfloat16)
    assert found is not None
    checkpoint.close()
    assert len(os.listdir("/proc/self/fd")) <= descriptors      # a mapping keeps none open
    row = found[7]
    del found
    assert _lies_in(row, path)
    del row
    assert not _maps(path)


def test_writing_reaches_no_file_and_a_file_that_is_replaced_stays(tmp_path):
    before = _values(ROWS, 64)
    found = _checkpoint(tmp_path, a=before).mapped(["a"], torch.bfloat16)
    assert found is not None
    found[0] = 0
    assert torch.equal(load_file(tmp_path / SINGLE)["a"], before)
    save_file({"a": _values(1, 1)}, tmp_path / "other")
    os.replace(tmp_path / "other", tmp_path / SINGLE)
    assert torch.equal(found[1:], before[1:]) and found[0].count_nonzero() == 0


@pytest.mark.parametrize("names", [
    ["a", "c"], ["b", "a"], ["c", "b", "a", "c"],       # not side by side, in another order
    ["small"], ["wide"], ["wide", "a"]])                # wide is fp32, and comes first in the file
def test_what_does_not_lie_as_it_is_wanted_is_left(tmp_path, names):
    wide = _values(ROWS, 64, dtype=torch.float32)
    tensors = {name: _values(ROWS, 64) for name in "abc"} | {"small": _values(2, 64), "wide": wide}
    checkpoint = _checkpoint(tmp_path, **tensors)
    assert checkpoint.info("wide").end == checkpoint.info("a").begin
    assert checkpoint.mapped(names, torch.bfloat16) is None
    if names == ["wide", "a"]:
        assert checkpoint.mapped(names, torch.float32) is None
    found = checkpoint.mapped(["a", "b", "c"], torch.bfloat16)
    assert found is not None and torch.equal(found, torch.cat([tensors[name] for name in "abc"]))


def test_neighbours_by_their_places_may_lie_in_two_files(tmp_path):
    first = _checkpoint(tmp_path, a=_values(ROWS, 64))
    (tmp_path / "more").mkdir()
    second = _checkpoint(tmp_path / "more", filler=_values(ROWS, 64), later=_values(ROWS, 64))
    later, end = second.info("later"), first.info("a").end
    # So would the file say it if its header were as much longer as all that stands before.
    first._infos["b"] = replace(later, name="b", begin=end, end=end + later.n_bytes)
    first._paths["b"] = second.path("later")
    assert first.mapped(["a", "b"], torch.bfloat16) is None and first.mapped(["a"], torch.bfloat16) is not None


def test_an_odd_address_a_short_file_and_a_system_that_refuses(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(LEAST))
    with open(tmp_path / "file", "rb", buffering=0) as file:
        assert map_bytes(file, 5, LEAST) is not None
        assert map_bytes(file, 0, LEAST + 1) is None
        monkeypatch.setattr(mapped, "_system", lambda: None)
        assert map_bytes(file, 0, LEAST) is None
        for answer, error in ((-1, errno.EFAULT), (-1, errno.EINVAL), (0, 0)):      # the disk; an old Linux; well
            system = mock.Mock(wraps=_SYSTEM)
            system.madvise.side_effect = lambda *of, told=(answer, error): ctypes.set_errno(told[1]) or told[0]
            monkeypatch.setattr(mapped, "_system", lambda system=system: system)
            assert (map_bytes(file, 0, LEAST) is None) == (error == errno.EFAULT)
            assert not _maps(tmp_path / "file")
    monkeypatch.undo()
    raw = b'{"a":{"dtype":"BF16","shape":[%d],"data_offsets":[0,%d]}}' % (LEAST, 2 * LEAST)
    raw += b" " * (1 - len(raw) % 2)
    (tmp_path / SINGLE).write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(2 * LEAST))
    assert Checkpoint.open(tmp_path).mapped(["a"], torch.bfloat16) is None


def test_values_that_are_no_numbers_are_named(tmp_path):
    bad = _values(ROWS, 64)
    bad[-1, 3], bad[-1, 5], bad[0, 0] = float("nan"), float("inf"), 1.0
    checkpoint = _checkpoint(tmp_path, a=_values(ROWS, 64), b=bad)
    with pytest.raises(InputError, match="tensor 'b' holds 1 NaN and 1 infinite values"):
        checkpoint.mapped(["a", "b"], torch.bfloat16)
    assert not _maps(tmp_path / SINGLE)


def test_a_model_reads_its_weights_where_they_lie(base):
    path, truth = base / SINGLE, load_file(base / SINGLE)
    model = mt.load(base, device="cpu", dtype="bfloat16")
    weights = model.network.hf_weights()
    assert all(torch.equal(value, truth[name]) for name, value in weights.items())
    there = {name for name, value in weights.items() if _lies_in(value, path)}
    assert {name.split(".")[-2] for name in there} >= {"gate_proj", "up_proj", "down_proj"}
    assert not any("norm" in name or "k_proj" in name for name in there)
    copied = mt.load(base, device="cpu", dtype="float32")
    assert not any(_lies_in(value, path) for value in copied.network.hf_weights().values())
    model.save(base)        # over its own file
    assert all(torch.equal(value, truth[name]) for name, value in load_file(path).items())
    tokens = torch.arange(9) % model.config.vocab_size
    assert torch.equal(model.logits(tokens), mt.load(base, device="cpu", dtype="bfloat16").logits(tokens))


@pytest.mark.parametrize("what", [{"lora": mt.LoRA(rank=2, targets=("up_proj",))}, {"train": "norms"}, {"adapter": ""}])
def test_a_model_that_can_be_trained_depends_on_no_file(base, tmp_path_factory, what):
    if "adapter" in what:
        what = {"adapter": tmp_path_factory.mktemp("adapter")}
        mt.load(base, device="cpu", dtype="bfloat16", lora=mt.LoRA(rank=2)).save_adapter(what["adapter"])
    model = mt.load(base, device="cpu", dtype="bfloat16", **what)
    assert not _maps(base / SINGLE) and model.network.embedding.shape == (2048, 512)


def test_a_page_behind_a_mapping_may_be_read(tmp_path):
    (tmp_path / "file").write_bytes(b"\1" * (LEAST + mmap.PAGESIZE))
    for end in (LEAST, LEAST + 100):
        with open(tmp_path / "file", "rb", buffering=0) as file:
            found = map_bytes(file, 0, end)
        assert found is not None
        behind = -end % mmap.PAGESIZE
        beyond = ctypes.string_at(found.data_ptr() + end, behind + mmap.PAGESIZE)
        assert beyond == b"\1" * behind + bytes(mmap.PAGESIZE)


def test_in_4_bits_embedding_and_head_are_mapped_and_shards_as_well(base, tmp_path):
    model = mt.load(base, device="cpu", dtype="bfloat16", quant="nf4")
    assert _lies_in(model.network.embedding, base / SINGLE) and len(_maps(base / SINGLE)) == 2
    whole = mt.load(base, device="cpu", dtype="bfloat16")
    shutil.copytree(base, tmp_path / "sharded")
    tensors = {name: weight.clone() for name, weight in whole.network.hf_weights().items()}
    save_weights(tmp_path / "sharded", tensors, shard_bytes=4e6)
    sharded = mt.load(tmp_path / "sharded", device="cpu", dtype="bfloat16")
    assert sum(bool(_maps(path)) for path in (tmp_path / "sharded").glob("model-*")) > 1
    tokens = torch.arange(9)
    assert torch.equal(sharded.logits(tokens), whole.logits(tokens))
