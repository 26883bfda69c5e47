"""lora_images: the Triton kernel writes the bits that plain copies write, and nothing else."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from minitune.kernels import lora_images as kernels
from minitune.kernels.launch import Config
from minitune.ops import backends
from minitune.ops.lora_images import Images

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
POISON = 777.0
SMALL = Config({"TILE": 64}, num_warps=2)
# (rows, columns, pitch, scale), one behind the other; behind each is a gap
EVEN = [(16, 64, 64, 1.0), (40, 16, 48, 2.0), (8, 136, 136, 1.0), (9, 8, 8, -0.3), (1, 8, 24, 1e-3)]
MIXED = {"rank 3": [(3, 64, 64, 1.0), (50, 3, 3, 0.1), (50, 3, 19, 1 / 3)], "37 columns": [(5, 37, 37, 1.0)],
         "37 columns, pitched": [(11, 37, 40, 3.0)], "one value": [(1, 1, 1, 0.7)], "all even": EVEN,
         "even but for one's columns": [*EVEN, (2, 12, 16, 0.7)], "even but for one's pitch": [*EVEN, (2, 8, 11, 0.7)],
         "no rows": [(0, 8, 8, 1.0), (2, 8, 8, 5.0), (0, 8, 8, 1.0)]}


def _copies(entries, device, gap=8):
    """(sources, offsets, pitches, scales, values in flat) of entries that begin at multiples of 8."""
    offsets, end = [], gap
    for rows, _, pitch, _ in entries:
        offsets.append(end)
        end += -(-rows * pitch // 8) * 8 + gap
    sources = [torch.randn(rows, columns).to(device) for rows, columns, _, _ in entries]
    return sources, offsets, [entry[2] for entry in entries], [entry[3] for entry in entries], end


def _expected(flat, sources, offsets, pitches, scales):
    flat = flat.clone()
    for source, offset, pitch, scale in zip(sources, offsets, pitches, scales, strict=True):
        flat[offset:].as_strided(source.shape, (pitch, 1)).copy_(source * scale)
    return flat


@pytest.mark.parametrize("entries", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_images_are_the_bits_of_plain_copies(entries, dtype, device):
    *copies, n = _copies(entries, device)
    flat = torch.full((n,), POISON, dtype=dtype, device=device)
    expected = _expected(flat, *copies)
    table = kernels.table(*copies, device, config=SMALL)
    assert table.even == all(columns % 8 == pitch % 8 == 0 for _, columns, pitch, _ in entries)
    kernels.refresh(table, flat, config=SMALL)
    assert torch.equal(flat, expected)


@pytest.mark.parametrize("moved", ["source", "offset", "flat"])
def test_what_is_not_aligned(moved, device):
    """A table is even only where all is; where flat itself starts does not matter to it."""
    (source,), (offset,), *rest, n = _copies(EVEN[1:2], device)
    source = torch.cat((source.flatten(), source.flatten()))[(moved == "source"):][: source.numel()].view(source.shape)
    offset += moved == "offset"
    flat = torch.full((n + 1,), POISON, dtype=torch.bfloat16, device=device)[(moved == "flat"):]
    expected = _expected(flat, [source], [offset], *rest)
    table = kernels.table([source], [offset], *rest, device, config=SMALL)
    assert table.even == (moved == "flat")
    kernels.refresh(table, flat, config=SMALL)
    assert torch.equal(flat, expected)


def test_a_table_serves_as_long_as_its_sources_stay(device):
    """By the default configuration, entries of more than one of its tiles among them."""
    *copies, n = _copies([(16, 600, 600, 1.0), (300, 16, 48, 2.0), (16, 8, 8, 0.5)], device)
    table = kernels.table(*copies, device)
    assert len(table.tiles) == 3 + 2 + 1
    for _ in range(2):
        flat = torch.full((n,), POISON, dtype=torch.bfloat16, device=device)
        kernels.refresh(table, flat)
        assert torch.equal(flat, _expected(torch.full_like(flat, POISON), *copies))
        for source in copies[0]:
            source.mul_(-1.7)


def test_a_table_of_nothing(device, monkeypatch):
    monkeypatch.setattr(kernels, "lora_images_refresh", None)      # nothing is launched
    for sources in ([], [torch.empty(0, 8, device=device)]):
        numbers = [8] * len(sources)
        kernels.refresh(kernels.table(sources, numbers, numbers, numbers, device), torch.empty(0, device=device))


def test_a_flat_that_is_too_short_is_not_written(device):
    *copies, n = _copies(EVEN[:1], device, gap=0)
    with pytest.raises(AssertionError):
        kernels.refresh(kernels.table(*copies, device), torch.empty(n - 1, dtype=torch.bfloat16, device=device))


def test_what_is_remembered_of_the_parameters_is_what_they_are(device):
    """A parameter that an optimizer moved to its buffer, and one whose factor was set anew."""
    images, flat, old = Images(), torch.zeros(64, device=device), torch.randn(4, 8).to(device)
    parameter, place = torch.nn.Parameter(old.clone()), flat[16:48].view(4, 8)
    with backends.use("triton"):
        images.refresh(flat, [(place, parameter.detach(), 1.0)])
        assert torch.equal(place, old)
        left = parameter.data
        parameter.data = old * 3
        left.fill_(POISON)
        images.refresh(flat, [(place, parameter.detach(), 1.0)])
        assert torch.equal(place, old * 3)
        images.refresh(flat, [(place, parameter.detach(), 0.5)])
        assert torch.equal(place, old * 1.5)
        images.refresh(flat, [(flat[:32].view(4, 8), parameter.detach(), 0.5)])
        assert torch.equal(flat[:32].view(4, 8), old * 1.5)
