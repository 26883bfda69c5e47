"""nf4: weights in 4 bits (Dettmers et al. 2023, QLoRA, arXiv:2305.14314): contract, reference and choice of backend.

A tensor is cut, in row-major order, into blocks of 64 values. A block keeps its largest magnitude (absmax, fp32) and
for each value the number of the nearest of 16 levels, the quantiles of a normal distribution scaled to [-1, 1]. Two
numbers share a byte, the first in the high half. With double quantisation the absmax values are stored in 8 bits as
well, in blocks of 256 of their own, after their mean was taken off. The layout is bitsandbytes'.

Backends: native (the C++/CUDA extension of csrc/), triton (kernels/nf4.py, on a GPU) and the reference here, which
defines the bits that all of them give.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minitune.errors import InputError
from minitune.ops import backends
from minitune.ops.moments8 import dynamic_levels
from minitune.ops.transfer import sent

TABLE = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
         -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
         0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
"""The 16 levels. Their one home: the extension and the kernels get them as an argument."""
BLOCKSIZE = 64
NESTED_BLOCKSIZE = 256
TINY = 1e-38
"""An absmax below this is taken for this where it divides."""
STEP = 1 << 18
"""Values that the reference works on at a time, a multiple of every block size."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False, repr=False)
class NF4Weight:
    """A tensor in NF4.

    packed uint8 [ceil(numel / 2)]; absmax fp32 [blocks], or uint8 [blocks] where it is quantised itself, and then
    nested_absmax fp32 [ceil(blocks / 256)], nested_code fp32 [256] and nested_offset fp32 [], with
    absmax = nested_code[absmax] · nested_absmax + nested_offset. `shape` and `dtype` are those of the tensor that was
    quantised.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    nested_offset: Tensor | None
    blocksize: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        check(self)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nested(self) -> bool:
        """Whether absmax is quantised itself."""
        return self.nested_absmax is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the names of the fields."""
        named = {"packed": self.packed, "absmax": self.absmax, "nested_absmax": self.nested_absmax,
                 "nested_code": self.nested_code, "nested_offset": self.nested_offset}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: torch.device | str) -> NF4Weight:
        """The same on another device."""
        moved: dict[str, Tensor] = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return replace(self, **moved)    # type: ignore[arg-type]

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """The values in `dtype` (the original's if None): fp32 code · fp32 absmax, rounded once.

        `out`, if given, is filled and returned: [rows, columns] of the same shape, fp32, fp16 or bf16, on the same
        device; its rows must be contiguous and may lie apart (a row pitch). It must not be part of an autograd graph:
        it is meant to be one buffer that every weight is decoded into in its turn.
        """
        return dequantize(self, dtype, out)

    def __repr__(self) -> str:
        kind = "nf4-dq" if self.nested else "nf4"
        return (f"NF4Weight({kind}, shape={list(self.shape)}, dtype={str(self.dtype).removeprefix('torch.')}, "
                f"device={self.device}, {self.nbytes:,} bytes)")


def check(weight: NF4Weight) -> None:
    """InputError unless dtypes, sizes and devices of a NF4Weight fit each other."""
    n, block = weight.numel, weight.blocksize
    check_blocksize(block)
    if any(type(size) is not int or size < 1 for size in weight.shape):
        raise InputError(f"nf4: shape is {list(weight.shape)}; its sizes must be whole numbers of at least 1")
    blocks = -(-n // block)
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "packed": (torch.uint8, (-(-n // 2),)),
        "absmax": (torch.uint8 if weight.nested else torch.float32, (blocks,))}
    if weight.nested:
        expected |= {"nested_absmax": (torch.float32, (-(-blocks // NESTED_BLOCKSIZE),)),
                     "nested_code": (torch.float32, (256,)), "nested_offset": (torch.float32, ())}
    found = weight.tensors()
    if set(found) != set(expected):
        raise InputError(f"nf4: a weight has {', '.join(found)}; it must have {', '.join(expected)}")
    for name, (dtype, shape) in expected.items():
        tensor = found[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise InputError(f"nf4: {name} is {tensor.dtype} {list(tensor.shape)}; for shape {list(weight.shape)} in "
                             f"blocks of {block} it must be a contiguous {dtype} {list(shape)}")
        if tensor.device != weight.packed.device:
            raise InputError(f"nf4: {name} lies on {tensor.device}, but packed on {weight.packed.device}")
    if weight.dtype not in DTYPES:
        raise InputError(f"nf4: dtype is {weight.dtype}; it must be float32, float16 or bfloat16")


def check_blocksize(blocksize: int) -> None:
    if type(blocksize) is not int or not 32 <= blocksize <= 4096 or blocksize & (blocksize - 1):
        raise InputError(f"nf4: blocksize is {blocksize!r}; it must be a power of two from 32 to 4096")


# ---- quantise -------------------------------------------------------------------------------------------------------
@torch.no_grad()
def quantize(weight: Tensor, double_quant: bool = True, blocksize: int = BLOCKSIZE) -> NF4Weight:
    """weight fp32, fp16 or bf16 of any shape -> NF4Weight on the same device, the same bits on every backend.

    InputError for another dtype, an empty tensor, or values that are not finite (with their count).
    """
    check_blocksize(blocksize)
    if weight.dtype not in DTYPES:
        raise InputError(f"nf4: a weight of {weight.dtype} cannot be quantised; give float32, float16 or bfloat16")
    if weight.numel() == 0:
        raise InputError(f"nf4: a weight of shape {list(weight.shape)} holds no value")
    flat = weight.detach().contiguous().view(-1)
    backend = backends.choose("nf4", flat.device)
    if backend == "native":
        packed, absmax = torch.ops.minitune.nf4_quantize(flat, table(flat.device), blocksize)
    elif backend == "triton":
        from minitune.kernels import nf4 as kernel

        packed, absmax = kernel.quantize(flat, table(flat.device), blocksize)
    else:
        packed, absmax = quantize_reference(flat, blocksize)
    if not bool(absmax.isfinite().all()):      # a NaN or an infinity makes its block's absmax one
        bad = flat.numel() - int(flat.isfinite().sum())
        raise InputError(f"nf4: the weight holds {bad:,} values that are NaN or infinite, of {flat.numel():,}")
    shape, dtype = tuple(weight.shape), weight.dtype
    if not double_quant:
        return NF4Weight(packed, absmax, None, None, None, blocksize, shape, dtype)
    offset = absmax.double().mean().float()
    code = nested_code(flat.device)
    if backend == "native":
        codes, nested_absmax = torch.ops.minitune.nf4_quantize_absmax(absmax, offset, code)
    else:
        codes, nested_absmax = quantize_absmax_reference(absmax, offset, code)
    return NF4Weight(packed, codes, nested_absmax, code, offset, blocksize, shape, dtype)


def quantize_reference(flat: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """flat [n] -> (packed uint8 [ceil(n / 2)], absmax fp32 [ceil(n / blocksize)]).

    A full block is multiplied by 1 / max(absmax, 1e-38); a last one that is not full is divided by its absmax, which
    is then stored as at least 1e-38: so does bitsandbytes. A level is the nearest by the midpoints of the table.
    """
    levels = table(flat.device)
    midpoints = (levels[1:] + levels[:-1]) / 2
    n = flat.numel()
    full = n - n % blocksize
    packed = torch.empty(-(-n // 2), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device=flat.device)
    for first in range(0, full, STEP):
        last = min(first + STEP, full)
        blocks, scales = flat[first:last].float().view(-1, blocksize), absmax[first // blocksize : last // blocksize]
        scales.copy_(blocks.abs().amax(1))
        scaled = (blocks * (1 / scales.clamp(min=TINY))[:, None]).view(-1)
        packed[first // 2 : last // 2] = _pack(torch.bucketize(scaled, midpoints, out_int32=True))
    if full < n:
        rest = flat[full:].float()
        absmax[-1] = rest.abs().amax().clamp(min=TINY)
        packed[full // 2 :] = _pack(torch.bucketize(rest / absmax[-1], midpoints, out_int32=True))
    return packed, absmax


def _pack(codes: Tensor) -> Tensor:
    """int32 codes [n] -> uint8 [ceil(n / 2)], the first in the high half."""
    if len(codes) % 2:
        codes = torch.cat((codes, codes.new_full((1,), TABLE.index(0.0))))
    return (codes[::2] << 4 | codes[1::2]).to(torch.uint8)


def quantize_absmax_reference(absmax: Tensor, offset: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """absmax fp32 [blocks] -> (uint8 [blocks], nested_absmax fp32 [ceil(blocks / 256)]): the nearest of 256 levels."""
    centred = absmax - offset
    rest = -len(centred) % NESTED_BLOCKSIZE
    blocks = torch.nn.functional.pad(centred, (0, rest)).view(-1, NESTED_BLOCKSIZE)
    nested_absmax = blocks.abs().amax(1)
    scaled = (blocks / nested_absmax.clamp(min=TINY)[:, None]).view(-1)[: len(centred)]
    midpoints = (code[1:] + code[:-1]) / 2
    return torch.bucketize(scaled.contiguous(), midpoints).to(torch.uint8), nested_absmax


# ---- dequantise -----------------------------------------------------------------------------------------------------
@torch.no_grad()
def dequantize(weight: NF4Weight, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """See `NF4Weight.dequantize`."""
    if out is not None:
        return _into(weight, dtype, out)
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise InputError(f"nf4: dequantize to {dtype}; it must be float32, float16 or bfloat16")
    rows, columns = _rows_columns(weight.shape)
    if backends.choose("nf4", weight.device) == "native":
        values: Tensor = torch.ops.minitune.nf4_dequantize(*operands(weight), rows, columns, dtype)
        return values.view(weight.shape)
    return _into(weight, dtype, torch.empty(weight.shape, dtype=dtype, device=weight.device))


def _into(weight: NF4Weight, dtype: torch.dtype | None, out: Tensor) -> Tensor:
    if (tuple(out.shape) != weight.shape or out.dtype not in DTYPES or dtype not in (None, out.dtype)
            or out.device != weight.device):
        wanted = "float32, float16 or bfloat16" if dtype is None else dtype
        raise InputError(f"nf4: out is {out.dtype} {list(out.shape)} on {out.device}; it must be {wanted} "
                         f"{list(weight.shape)} on {weight.device}")
    if out.requires_grad:
        raise InputError("nf4: out requires a gradient; give a plain buffer")
    rows, columns = _rows_columns(weight.shape)
    target = out.detach().view(rows, columns) if out.is_contiguous() else out.detach()
    apart = target.dim() == 2 and rows > 1 and target.stride(0) < columns
    if target.dim() != 2 or apart or (columns > 1 and target.stride(1) != 1):
        raise InputError(f"nf4: out has strides {out.stride()}; its rows must be contiguous and must not overlap")
    backend = backends.choose("nf4", weight.device)
    if backend == "native":
        torch.ops.minitune.nf4_dequantize_out(*operands(weight), target)
    elif backend == "triton":
        from minitune.kernels import nf4 as kernel

        kernel.dequantize(*operands(weight), target)
    else:
        _reference_into(weight, target)
    torch.autograd.graph.increment_version(out)      # a write through a raw pointer does not
    return out


def dequantize_reference(weight: NF4Weight) -> Tensor:
    """fp32 [*shape]: code · absmax."""
    return _values(weight, 0, weight.numel).view(weight.shape)


def _reference_into(weight: NF4Weight, target: Tensor) -> None:
    """The reference a piece at a time: its indices take several times the values' memory."""
    rows, columns = target.shape
    if target.is_contiguous():
        rows, columns, target = 1, rows * columns, target.view(1, -1)
    for row in range(rows):
        for first in range(0, columns, STEP):
            last = min(first + STEP, columns)
            target[row, first:last] = _values(weight, row * columns + first, row * columns + last)


def _values(weight: NF4Weight, first: int, last: int) -> Tensor:
    """fp32 [last - first]: the values first … last - 1, counted in row-major order."""
    packed = weight.packed[first // 2 : -(-last // 2)]
    codes = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)[first % 2 :][: last - first]
    begin = first // weight.blocksize
    scales = absmax_of(weight, begin, -(-last // weight.blocksize)).repeat_interleave(weight.blocksize)
    scales = scales[first - begin * weight.blocksize :][: last - first]
    return table(weight.device)[codes.int()] * scales


def absmax_of(weight: NF4Weight, first: int = 0, last: int | None = None) -> Tensor:
    """fp32: absmax of the blocks first … last - 1 (all of them), decoded where it is quantised: a product, then a sum,
    each rounded."""
    stored = weight.absmax[first:last]
    if weight.nested_absmax is None or weight.nested_code is None or weight.nested_offset is None:
        return stored
    begin = first // NESTED_BLOCKSIZE
    scales = weight.nested_absmax[begin : -(-(first + len(stored)) // NESTED_BLOCKSIZE)]
    scales = scales.repeat_interleave(NESTED_BLOCKSIZE)[first - begin * NESTED_BLOCKSIZE :][: len(stored)]
    return weight.nested_code[stored.int()] * scales + weight.nested_offset


Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, int]


def operands(weight: NF4Weight) -> Operands:
    """The arguments that every backend's dequantise takes first."""
    return (weight.packed, weight.absmax, weight.nested_absmax, weight.nested_code, weight.nested_offset,
            table(weight.device), weight.blocksize)


def _rows_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


# ---- tables ---------------------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=16)
def table(device: torch.device) -> Tensor:
    """TABLE as fp32 [16] on `device`."""
    with torch.inference_mode(False):
        return sent(torch.tensor(TABLE, dtype=torch.float32), device)


@functools.lru_cache(maxsize=16)
def nested_code(device: torch.device) -> Tensor:
    """The 256 levels of the nested absmax, fp32, sorted: those of signed moments in 8 bits."""
    with torch.inference_mode(False):
        return sent(dynamic_levels(signed=True), device)
