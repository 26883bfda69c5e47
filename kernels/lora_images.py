"""lora_images: Triton kernel that brings the images of all adapters, in the compute dtype, up to date in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minitune.kernels.launch import Config, pick

FIELDS = tl.constexpr(5)
"""Of an entry: address, offset, pitch, columns, number of values."""
GROUP = 8
"""Values that are moved together where a table is even: one store of 128 bits."""

CONFIGS: dict[str, dict[int, Config]] = {
    "refresh": {80: Config({"TILE": 4096}, num_warps=8, registers=80)},
}


class Table(NamedTuple):
    """What `refresh` copies, on the device. It holds the sources' addresses, not the sources: they have to stay.

    entries int64 [sources, FIELDS]; scales fp32 [sources]; tiles int64 [programs, 2], each an entry and the first of
    the at most `tile` values; end: behind the last value written; even: GROUP values always lie in one row, aligned.
    """

    entries: Tensor
    scales: Tensor
    tiles: Tensor
    tile: int
    end: int
    even: bool


@triton.jit(do_not_specialize_on_alignment=["entries", "scales", "tiles"])
def lora_images_refresh(entries, scales, tiles, flat, GROUP: tl.constexpr, TILE: tl.constexpr):
    """TILE values of one entry, in groups that lie beside each other in its source and in flat."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 2
    entry = tl.load(tile)
    fields = entries + entry * FIELDS
    source = tl.multiple_of(tl.load(fields).to(tl.pointer_type(tl.float32)), GROUP * 2)
    offset, pitch = tl.multiple_of(tl.load(fields + 1), GROUP), tl.multiple_of(tl.load(fields + 2), GROUP)
    columns = tl.multiple_of(tl.load(fields + 3).to(tl.int32), GROUP)
    start = tl.multiple_of(tl.load(tile + 1).to(tl.int32), GROUP)
    index = start + tl.arange(0, TILE // GROUP) * GROUP
    live = (index < tl.load(fields + 4).to(tl.int32))[:, None]
    row = index // columns
    place = offset + row * pitch + (index - row * columns)      # 64 bits wide, as pitch is
    lane = tl.arange(0, GROUP)[None, :]
    values = tl.load(source + (index[:, None] + lane), mask=live, other=0) * tl.load(scales + entry)
    tl.store(flat + (place[:, None] + lane), values.to(flat.dtype.element_ty), mask=live)


def table(sources: Sequence[Tensor], offsets: Sequence[int], pitches: Sequence[int], scales: Sequence[float],
          device: torch.device | str, *, config: Config | None = None) -> Table:
    """sources: contiguous fp32 [rows, columns] on `device`. Value (i, j) of one, times its scale, is to be written to
    offset + i * pitch + j. No two values may share a place. One copy that waits for nothing brings it to the device."""
    device = torch.device(device)
    tile = (config or pick(CONFIGS["refresh"], device)).tiles["TILE"]
    entries = []
    for source, offset, pitch in zip(sources, offsets, pitches, strict=True):
        columns, values = source.shape[1], source.numel()
        assert source.dtype == torch.float32 and source.is_contiguous() and source.device.type == device.type
        assert offset >= 0 and pitch >= columns and values <= 2**31 - tile, (list(source.shape), offset, pitch)
        entries.append((source.data_ptr(), offset, pitch, columns, values))
    n = len(entries)
    programs = torch.tensor([triton.cdiv(values, tile) for *_, values in entries], dtype=torch.int64)
    entry = torch.repeat_interleave(torch.arange(n), programs)
    first = (torch.arange(len(entry)) - (programs.cumsum(0) - programs)[entry]) * tile
    factors = torch.zeros(n + n % 2)
    factors[:n] = torch.tensor(scales)
    parts = [torch.stack((entry, first), 1).flatten(), torch.tensor(entries, dtype=torch.int64).flatten(),
             factors.view(torch.int64)]
    whole = torch.cat(parts)
    if device.type == "cuda":
        whole = whole.pin_memory()
    on_device = whole.to(device, non_blocking=True).split([len(part) for part in parts])
    return Table(
        entries=on_device[1].view(n, FIELDS.value), scales=on_device[2].view(torch.float32)[:n],
        tiles=on_device[0].view(-1, 2), tile=tile,
        end=max((offset + (values // columns - 1) * pitch + columns
                 for _, offset, pitch, columns, values in entries if values), default=0),
        even=all(address % 16 == 0 and offset % GROUP == 0 and pitch % GROUP == 0 and columns % GROUP == 0
                 for address, offset, pitch, columns, _ in entries))


def refresh(table: Table, flat: Tensor, *, config: Config | None = None) -> None:
    """Fill flat [n] (bf16, fp16 or fp32, contiguous) as the table says; what no entry names stays as it is."""
    assert flat.is_contiguous() and flat.numel() >= table.end and flat.device == table.tiles.device
    if len(table.tiles) == 0:
        return
    config = config or pick(CONFIGS["refresh"], flat.device)
    with torch.cuda.device_of(flat):
        lora_images_refresh[(len(table.tiles),)](table.entries, table.scales, table.tiles, flat,
                                                 GROUP=GROUP if table.even else 1, TILE=table.tile, **config.options())
