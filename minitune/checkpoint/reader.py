"""Checkpoint: the tensors of a Hugging Face folder, read as a stream into memory that is already there, or mapped."""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from minitune.arguments import short
from minitune.checkpoint.files import listing, open_regular, read_json_object
from minitune.checkpoint.folders import CONVERT, PICKLES, SINGLE, no_weights
from minitune.checkpoint.mapped import LEAST, map_bytes
from minitune.checkpoint.safetensors_header import Header, TensorInfo, read_header
from minitune.devices import DTYPES
from minitune.errors import InputError

CHUNK = 16 << 20
"""Bytes of the buffer between file and destination: the only memory that reading takes beside it."""
STRAIGHT = 4
"""As many times that are read at once where the bytes go straight into the destination."""
READERS = 8
"""Threads that read side by side. What takes the time is less the file than the pages of the destination, which
the system hands out at the first touch."""
PART = 1 << 20
"""A part of a chunk below which another thread is not worth its start."""
FLOATS = tuple(DTYPES.values())
INDEX = "model.safetensors.index.json"
SPOILT = "the file is damaged, or its training diverged: fetch it again, or take another one"


class Checkpoint:
    """The tensors of one or several safetensors files, by name. Opening reads headers only."""

    def __init__(self, headers: list[Header]) -> None:
        self._infos: dict[str, TensorInfo] = {}
        self._paths: dict[str, Path] = {}
        for header in headers:
            for name, info in header.tensors.items():
                if name in self._infos:
                    raise InputError(f"{header.path}: tensor {short(name)} stands in {self._paths[name]}, too")
                self._infos[name], self._paths[name] = info, header.path
        self._open: tuple[Path, FileIO] | None = None
        self._staging: dict[bool, Tensor] = {}
        self._readers: ThreadPoolExecutor | None = None

    @staticmethod
    def open(folder: str | Path) -> Checkpoint:
        """The checkpoint of a model folder: ``model.safetensors``, else all shards of its index.

        Raises InputError for a folder without either (pickles are refused unread) and for any fault in the index or
        in a header. Links that lead out of the folder are refused; in Hugging Face's cache
        (``models--X/snapshots/<revision>``), links into ``models--X/blobs`` are not.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"{folder}: is not a folder; give the folder of a Hugging Face model")
        if (folder / SINGLE).is_file() or (folder / SINGLE).is_symlink():
            return Checkpoint([read_header(_shard_path(folder, SINGLE, str(folder)))])
        if (folder / INDEX).is_file():
            return Checkpoint(_indexed(folder))
        raise InputError(f"{folder}: holds neither {SINGLE} nor {INDEX}; {no_weights(folder)}")

    @staticmethod
    def open_file(path: str | Path) -> Checkpoint:
        """The tensors of one safetensors file."""
        return Checkpoint([read_header(path)])

    def names(self) -> list[str]:
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        if name not in self._infos:
            raise InputError(f"the checkpoint has no tensor {short(name)}")
        return self._infos[name]

    def path(self, name: str) -> Path:
        """The file that holds the tensor."""
        return self._paths[name]

    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """A tensor of the file as it is, uint8 too, or in another dtype of FLOATS; floats are known to be finite."""
        info = self.info(name)
        out = torch.empty(info.shape, dtype=dtype or info.dtype, device=device)
        if out.dtype == torch.uint8:
            self.read_bytes_into(name, out)
        else:
            self.read_into(name, out)
        return out

    def read_into(self, name: str, out: Tensor) -> None:
        """Fill ``out`` with a tensor of the file: same shape, any device, both fp32, fp16 or bf16.

        ``out`` may be a view whose rows ``out[i]`` are contiguous but not adjacent. Bytes go straight into the
        destination where no cast, device copy or row pitch lies between. Raises InputError, with ``out`` half
        written, for NaN and infinity, for values that overflow in the cast, and for a file that shrank.
        """
        info, path = self.info(name), self._paths[name]
        if info.dtype not in FLOATS:
            raise InputError(f"{path}: tensor {short(name)} is {info.dtype}; float32, float16 and bfloat16 are read")
        if tuple(out.shape) != info.shape or out.dtype not in FLOATS:
            raise InputError(
                f"{path}: tensor {short(name)} has shape {list(info.shape)}; it cannot be read into "
                f"{list(out.shape)} of {out.dtype}"
            )
        target = out.detach()  # shares memory and version counter, but is no leaf that autograd guards
        with torch.no_grad():
            for piece, place in self._stream(name, target):
                if not _finite(piece):
                    raise InputError(self._not_finite(name, place, target.dtype))
        torch.autograd.graph.increment_version(out)  # a write through a raw pointer does not

    def mapped(self, names: Sequence[str], dtype: torch.dtype) -> Tensor | None:
        """The tensors [rows, …] of these names below each other, where they lie in their file: nothing is copied.

        None where they cannot be had so: of another dtype, not side by side in one file, at an odd address, small, or
        on a system that maps no files. What is written into the tensor reaches no file; `map_bytes` says what becomes
        of it if the file changes. Raises InputError for NaN and infinity.
        """
        infos, path = [self.info(name) for name in names], self._paths[names[0]]
        begin, end = infos[0].begin, infos[-1].end
        joined = all(self._paths[after.name] == path and before.end == after.begin
                     for before, after in itertools.pairwise(infos))
        if not joined or end - begin < LEAST or begin % dtype.itemsize or any(info.dtype != dtype for info in infos):
            return None
        found = map_bytes(self._file(path), begin, end)
        if found is None:
            return None
        for info in infos:
            values = found[info.begin - begin : info.end - begin].view(dtype)
            for place, piece in enumerate(values.split(STRAIGHT * CHUNK // dtype.itemsize)):
                if not _finite(piece):
                    raise InputError(self._not_finite(info.name, info.begin + place * STRAIGHT * CHUNK, dtype))
        return found.view(dtype).view(-1, *infos[0].shape[1:])

    def read_bytes_into(self, name: str, out: Tensor) -> None:
        """Fill ``out`` with a uint8 tensor of the file: same shape, any device. Raises InputError where it shrank."""
        info, path = self.info(name), self._paths[name]
        if info.dtype != torch.uint8:
            raise InputError(f"{path}: tensor {short(name)} is {info.dtype}; it must be torch.uint8 here")
        if tuple(out.shape) != info.shape or out.dtype != torch.uint8:
            raise InputError(
                f"{path}: tensor {short(name)} is uint8 {list(info.shape)}; it cannot be read into "
                f"{list(out.shape)} of {out.dtype}"
            )
        with torch.no_grad():
            for _ in self._stream(name, out.detach()):
                pass
        torch.autograd.graph.increment_version(out)

    def same_bytes(self, first: str, second: str) -> bool:
        """Whether two tensors agree in dtype, shape and every byte. Reads both, by halves of a chunk."""
        a, b = self.info(first), self.info(second)
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        buffer = self._buffer(CHUNK, torch.empty(0))
        for offset in range(0, a.n_bytes, CHUNK // 2):
            n_bytes = min(CHUNK // 2, a.n_bytes - offset)
            left, right = buffer[:n_bytes], buffer[CHUNK // 2 :][:n_bytes]
            self._fill(self._paths[first], a.begin + offset, left, n_bytes)
            self._fill(self._paths[second], b.begin + offset, right, n_bytes)
            if not torch.equal(left, right):
                return False
        return True

    def close(self) -> None:
        """Close the file last read, free the buffer and end the threads. A later read makes them anew."""
        if self._readers is not None:
            self._readers.shutdown()        # before the file is closed, whose number may then be another's
        self._readers = None
        self._release()
        self._staging.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _buffer(self, n_bytes: int, like: Tensor) -> Tensor:
        """uint8 [n_bytes] of host memory, the same at every call; pinned where it feeds a GPU."""
        pinned = like.device.type == "cuda"
        if pinned not in self._staging:
            self._staging[pinned] = torch.empty(CHUNK, dtype=torch.uint8, pin_memory=pinned)
        return self._staging[pinned][:n_bytes]

    def _stream(self, name: str, target: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Fill ``target`` from the file piece by piece; gives each filled piece and the byte where it starts."""
        info, path = self._infos[name], self._paths[name]
        straight = target.device.type == "cpu" and target.dtype == info.dtype and target.is_contiguous()
        place = info.begin
        for piece in _pieces(target, (STRAIGHT if straight else 1) * CHUNK // info.dtype.itemsize):
            n_bytes = piece.numel() * info.dtype.itemsize
            source = piece if straight else self._buffer(n_bytes, piece).view(info.dtype).view(piece.shape)
            self._fill(path, place, source, n_bytes)
            if not straight:
                piece.copy_(source)
            yield piece, place
            place += n_bytes

    def _fill(self, path: Path, place: int, out: Tensor, n_bytes: int) -> None:
        """Read ``n_bytes`` at byte ``place`` of the file into the contiguous host tensor ``out``."""
        file = self._file(path)
        if not n_bytes:
            return
        memory = memoryview((ctypes.c_char * n_bytes).from_address(out.data_ptr())).cast("B")
        size = max(PART, -(-n_bytes // READERS))
        if n_bytes <= size or not hasattr(os, "preadv"):        # not on Windows
            _read(file, path, place, memory)
            return
        self._readers = self._readers or ThreadPoolExecutor(READERS)
        parts = [self._readers.submit(_read, file, path, place + begin, memory[begin : begin + size])
                 for begin in range(0, n_bytes, size)]
        try:
            wait(parts)     # all of them, so that none writes any more when the first error is raised
        except BaseException:       # Ctrl-C
            for part in parts:
                part.cancel()
            wait(parts)
            raise
        for part in parts:
            part.result()

    def _file(self, path: Path) -> FileIO:
        if self._open is None or self._open[0] != path:
            self._release()
            self._open = (path, open_regular(path))
        return self._open[1]

    def _release(self) -> None:
        if self._open:
            self._open[1].close()
        self._open = None

    def _not_finite(self, name: str, place: int, dtype: torch.dtype) -> str:
        """The message for a tensor whose first bad chunk starts at byte ``place``: counts over the whole rest."""
        info, path = self._infos[name], self._paths[name]
        n_nan = n_inf = n_overflow = 0
        for offset in range(place, info.end, CHUNK):
            n_bytes = min(CHUNK, info.end - offset)
            values = self._buffer(n_bytes, torch.empty(0)).view(info.dtype)
            self._fill(path, offset, values, n_bytes)
            n_nan += int(values.isnan().sum())
            n_inf += int(values.isinf().sum())
            n_overflow += int(values.to(dtype).isinf().sum())
        if n_nan or n_inf:
            return f"{path}: tensor {short(name)} holds {n_nan:,} NaN and {n_inf:,} infinite values; " + SPOILT
        return (
            f"{path}: tensor {short(name)}: {n_overflow:,} values of {info.dtype} are too large for {dtype}; "
            "load the model in another dtype"
        )


def _read(file: FileIO, path: Path, place: int, memory: memoryview) -> None:
    """Fill `memory` with what the file holds from byte `place` on."""
    filled = 0
    while filled < len(memory):
        try:
            if hasattr(os, "preadv"):
                got = os.preadv(file.fileno(), [memory[filled:]], place + filled)
            else:
                file.seek(place + filled)
                got = file.readinto(memory[filled:])
        except OSError as error:
            raise InputError(f"{path}: cannot be read at byte {place + filled:,}: {error.strerror}") from error
        if not got:
            raise InputError(f"{path}: ends at byte {place + filled:,}; it has become shorter while it was read")
        filled += got


def _finite(piece: Tensor) -> bool:
    """Whether no element is NaN or infinite: aminmax hands NaN on and runs at memory speed, unlike isfinite."""
    if not piece.numel():
        return True
    low, high = torch.aminmax(piece)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _pieces(out: Tensor, most: int) -> Iterator[Tensor]:
    """Views of ``out`` in the order of its elements, each of at most ``most``: runs, or blocks of pitched rows."""
    if out.is_contiguous():
        yield from out.view(-1).split(most)
        return
    row = out[0].numel()
    if not out[0].is_contiguous():
        raise ValueError(f"rows of the destination must be contiguous; its strides are {out.stride()}")
    if row > most:
        for i in range(len(out)):
            yield from out[i].view(-1).split(most)
    else:
        yield from out.split(most // row)


def _inside(folder: Path, target: Path) -> bool:
    """Whether a resolved file lies in the resolved folder, or among the blobs of the same cached repository."""
    if target.is_relative_to(folder):
        return True
    for place in (folder, *folder.parents):
        if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--"):
            return target.parent == place.parent.parent / "blobs"
    return False


def _shard_path(folder: Path, name: Any, where: str) -> Path:
    """The path of a file that the folder really holds; opens nothing."""
    if not isinstance(name, str) or not name or PurePosixPath(name).name != name or set(name) & set("/\\:\0"):
        raise InputError(f"{where}: names the file {short(name)}; only plain file names within the folder are read")
    if name.endswith(PICKLES):
        raise InputError(f"{where}: names {short(name)}, a pickle, which can run code; {CONVERT}")
    if not name.endswith(".safetensors"):
        raise InputError(f"{where}: names the file {short(name)}; only .safetensors files are read")
    path = folder / name
    try:
        real, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be resolved: {error}") from None
    if not _inside(home, real):
        raise InputError(f"{path}: is a link that leads out of the folder, to {real}; put the file itself there")
    return path


def _indexed(folder: Path) -> list[Header]:
    """Headers of all shards, after every entry of the index was checked."""
    index = folder / INDEX
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map must map tensor names to file names, but is {short(weight_map)}")
    paths: dict[str, Path] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or file not in paths:
            path = _shard_path(folder, file, f"{index}: weight_map: {short(name)}")
            paths[file] = path
    absent = [str(path) for path in paths.values() if not os.path.isfile(path)]
    if absent:
        raise InputError(f"{index}: {len(absent)} of its files are missing; fetch them:{listing(absent)}")
    headers = {file: read_header(path) for file, path in sorted(paths.items())}
    lacking = [f"{short(n)} is not in {file}" for n, file in weight_map.items() if n not in headers[file].tensors]
    if lacking:
        raise InputError(f"{index}: {len(lacking)} tensors are not where it says; the files are not of one "
                         f"model, so fetch them all again from one place:{listing(lacking)}")
    return list(headers.values())
