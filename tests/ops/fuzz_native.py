"""Calls the native ops of NF4 and attention with thousands of random arguments, right and wrong:
`python fuzz_native.py EXTENSION ROUNDS`.

For an extension that is built with sanitizers (test_nf4_arguments.py builds and runs it). A wrong call must raise
RuntimeError; a right one is held to a few lines of arithmetic. Nothing of minitune is imported but the file named.
"""

import importlib.machinery
import importlib.util
import os
import random
import sys

import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ANY = [*DTYPES, torch.float64, torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool, torch.complex64]
TABLE = torch.linspace(-1, 1, 16)
HUGE = [2**31, 2**40, 2**62, 2**63 - 1]


def spoil(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor with one thing wrong with it, as a rule."""
    way, n = random.randrange(10), tensor.numel()
    if way == 0:
        return tensor.to(random.choice(ANY))
    if way == 1:
        return tensor.flatten()[: random.randint(0, n)]
    if way == 2:
        return torch.cat((tensor.flatten(), tensor.flatten()[:1], tensor.new_zeros(random.randint(0, 2))))
    if way == 3:
        return tensor.flatten().repeat_interleave(2)[::2]
    if way == 4:
        return tensor.flatten()[:1].expand(n)
    if way == 5:
        return tensor.new_empty(random.choice([(0,), (0, 4), (1,), (2, 3), (n, 1), (1, n)]))
    if way == 6:                                              # the same numbers behind an address that is not aligned
        data = bytearray(tensor.numel() * tensor.element_size() + 1)
        return torch.frombuffer(data, dtype=tensor.dtype, offset=1, count=n) if n else tensor
    if way == 7:                                              # a storage that is smaller than its tensor says
        short = tensor.clone()
        short.untyped_storage().resize_(random.randint(0, short.untyped_storage().nbytes()))
        return short
    if way == 8:
        return tensor.view(*tensor.shape, 1).transpose(0, -1)
    return None


def shape() -> tuple[int, int]:
    if random.random() < 0.05:
        return random.choice([(0, 0), (0, 5), (5, 0), (1, 1)])
    columns = [random.randint(1, 70), random.randint(1, 400), 64 * random.randint(1, 5)]
    return random.randint(1, 40), random.choice(columns)


def operands(n: int, blocksize: int) -> list:
    blocks = -(-n // blocksize)
    packed = torch.randint(256, (-(-n // 2),), dtype=torch.uint8)
    if random.random() < 0.5:
        return [packed, torch.randn(blocks), None, None, None, TABLE, blocksize]
    return [packed, torch.randint(256, (blocks,), dtype=torch.uint8), torch.rand(-(-blocks // 256)),
            torch.randn(256).sort().values, torch.tensor(0.25), TABLE, blocksize]


def decoded(packed, absmax, nested_absmax, nested_code, nested_offset, table, blocksize, n):
    if nested_code is not None:
        absmax = nested_code[absmax.long()] * nested_absmax.repeat_interleave(256)[: len(absmax)] + nested_offset
    codes = torch.stack((packed >> 4, packed & 15), 1).flatten()[:n]
    return table[codes.long()] * absmax.repeat_interleave(blocksize)[:n]


def dequantize() -> bool:
    (rows, columns), blocksize, dtype = shape(), 2 ** random.randint(5, 12), random.choice(DTYPES)
    right = operands(rows * columns, blocksize)
    given, wrong = list(right), random.random() < 0.7
    if wrong:
        at = random.randrange(len(given))
        if isinstance(given[at], int):
            given[at] = random.choice([0, -64, 1, 16, 63, 96, 8192, *HUGE])
        else:
            given[at] = torch.rand(3) if given[at] is None else spoil(given[at])
    if random.random() < 0.5:
        if random.random() < 0.3:
            shapes = [(-1, 4), (4, -1), (rows + 1, columns + 3), (rows, columns + 2), (2**32, 2**31), (2**62, 4),
                      (0, HUGE[3]), (1, HUGE[3])]
            wrong, (rows, columns) = True, random.choice(shapes)
        if random.random() < 0.1:
            wrong, dtype = True, random.choice(ANY[3:])
        value = torch.ops.minitune.nf4_dequantize(*given, rows, columns, dtype)
    else:
        value, more = target(rows, columns, dtype)
        wrong = wrong or more
        torch.ops.minitune.nf4_dequantize_out(*given, value)
    if not wrong:
        expected = decoded(*right, rows * columns).to(dtype).view(rows, columns)
        assert torch.equal(value, expected), "a wrong value"
    return wrong


def target(rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, bool]:
    """A buffer, and whether it may be a wrong one. It ends with its last value, so that a write behind it is seen."""
    pitch = columns + random.choice([0, 0, 1, 3, 8])
    extent = max(0, (rows - 1) * pitch + columns) if rows and columns else 0
    out = torch.zeros(extent, dtype=dtype).as_strided((rows, columns), (pitch, 1))
    if random.random() < 0.6:
        return out, False
    way = random.randrange(7)
    if way == 0:
        return torch.zeros(columns, rows, dtype=dtype).t(), True
    if way == 1:
        return torch.zeros(rows, 2 * columns, dtype=dtype)[:, ::2], True
    if way == 2:
        return torch.zeros(1, columns, dtype=dtype).expand(rows, columns), True
    if way == 3:
        return torch.zeros(rows, columns, 1, dtype=dtype), True
    if way == 4:
        return torch.zeros(rows, columns, dtype=random.choice(ANY[3:])), True
    if way == 5:
        return torch.zeros(rows * columns + 1, dtype=dtype).as_strided((rows, columns), (max(columns - 1, 0), 1)), True
    whole = torch.zeros(rows, columns, dtype=dtype)
    whole.untyped_storage().resize_(random.randint(0, whole.untyped_storage().nbytes()))
    return whole, True


def product() -> bool:
    (rows, columns), blocksize = shape(), 2 ** random.randint(5, 12)
    dtype = random.choice([torch.float32, torch.bfloat16])
    right = [*operands(rows * columns, blocksize), torch.randn(columns).to(dtype), torch.zeros(rows, dtype=dtype)]
    given, wrong = list(right), random.random() < 0.6
    if wrong:
        at = random.randrange(len(given))
        given[at] = (random.choice([0, -64, 16, 63, *HUGE]) if isinstance(given[at], int)
                     else torch.rand(3) if given[at] is None else spoil(given[at]))
    torch.ops.minitune.nf4_product(*given)
    if not wrong:
        weight = decoded(*right[:-2], rows * columns).to(dtype).view(rows, columns).double()
        error = (given[-1].double() - weight @ right[-2].double()).abs()
        limit = weight.abs() @ right[-2].double().abs()
        assert (error <= limit * (1e-5 if dtype == torch.float32 else 5e-3)).all(), "a wrong product"
    return wrong


def quantize() -> bool:
    rows, columns = shape()
    weight, table, blocksize = torch.randn(rows * columns).to(random.choice(DTYPES)), TABLE, 2 ** random.randint(5, 12)
    wrong = random.random() < 0.6
    if wrong:
        at = random.randrange(3)
        weight = spoil(weight) if at == 0 else weight
        table = spoil(table) if at == 1 else table
        blocksize = random.choice([0, -1, 16, 65, *HUGE]) if at == 2 else blocksize
    packed, absmax = torch.ops.minitune.nf4_quantize(weight, table, blocksize)
    if not wrong:
        assert len(packed) == -(-weight.numel() // 2) and len(absmax) == -(-weight.numel() // blocksize)
        error = (decoded(packed, absmax, None, None, None, TABLE, blocksize, weight.numel()) - weight.float()).abs()
        limit = absmax.repeat_interleave(blocksize)[: weight.numel()] / 15
        assert (error <= limit * 1.001).all(), "not the nearest level"
    return wrong


def quantize_absmax() -> bool:
    given = [torch.rand(random.choice([0, 1, 255, 256, 257, random.randint(1, 3000)])), torch.tensor(0.5),
             torch.linspace(-1, 1, 256)]
    wrong = random.random() < 0.6
    if wrong:
        at = random.randrange(3)
        given[at] = spoil(given[at])
    codes, nested_absmax = torch.ops.minitune.nf4_quantize_absmax(*given)
    if not wrong:
        value = given[2][codes.long()] * nested_absmax.repeat_interleave(256)[: len(codes)] + 0.5
        assert ((value - given[0]).abs() <= 0.5 / 254).all(), "not the nearest level"
    return wrong


def attention() -> bool:
    """Forward or backward in tiles, where the CPU multiplies bf16. NaN lies beside what is written, and has to stay
    there: a sanitizer does not see the stores of tiles."""
    units = ["avx512_bf16", "amx"]
    if BEST not in units:
        return product()
    os.environ["MINITUNE_CPU_ISA"] = random.choice(units[: units.index(BEST) + 1])
    heads, kv_heads = random.choice([(1, 1), (2, 1), (4, 2), (3, 3)])
    lengths = [random.choice([0, 1, 31, 32, 33, random.randint(2, 90)]) for _ in range(random.randint(1, 3))]
    tokens, d, window = sum(lengths), random.choice([1, 16, 20, 64, 80]), random.choice([0, 0, 1, 5, 40, 10**12])
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

    def side_by_side() -> list:
        """q, k, v, and a head of NaN."""
        rows = torch.randn(tokens, heads + 2 * kv_heads + 1, d).bfloat16()
        rows[:, -1] = float("nan")
        return list(rows.split((heads, kv_heads, kv_heads, 1), 1))

    (q, k, v, _), (out, dk, dv, beside) = side_by_side(), side_by_side()
    given = [q, k, v, bounds, window, out, torch.zeros(heads, tokens)]
    backward = random.random() < 0.5
    if backward:
        dout = torch.randn(tokens, heads, d).bfloat16()
        given = [dout, q, k, v, q.clone(), torch.zeros(heads, tokens), bounds, window, out, dk, dv]
    wrong = random.random() < 0.7
    if wrong:
        at = random.randrange(len(given))
        if isinstance(given[at], int):
            given[at] = random.choice([-1, -HUGE[3]])
        elif given[at] is bounds and random.random() < 0.7:
            given[at] = torch.randint(-5, tokens + 5, (len(bounds),)).to(torch.int32)
        else:
            given[at] = spoil(given[at])
    op = torch.ops.minitune.attention_tiles_backward if backward else torch.ops.minitune.attention_tiles
    try:
        op(*given)
    except (RuntimeError, TypeError):
        assert wrong, "a right call is refused"
        raise
    assert beside.isnan().all(), "written beside its place"
    if not wrong and tokens and not backward:
        first = [int(bounds[i]) for i in range(len(lengths)) if lengths[i]]      # each sees itself alone
        assert torch.equal(out[first], v[first].repeat_interleave(heads // kv_heads, 1)), "a wrong value"
    if not wrong and backward:
        assert all(x.isfinite().all() for x in (out, dk, dv)), "a value that no right call gives"
    return wrong


BEST = ""       # the CPU's instruction set


def main() -> None:
    global BEST
    path, rounds = sys.argv[1], int(sys.argv[2])
    loader = importlib.machinery.ExtensionFileLoader("_C", path)
    extension = importlib.util.module_from_spec(importlib.util.spec_from_file_location("_C", path, loader=loader))
    loader.exec_module(extension)
    os.environ.pop("MINITUNE_CPU_ISA", None)
    BEST, names = extension.cpu_isa(), ["portable", "avx2", "avx512", "avx512_bf16", "amx"]
    counts = {"right": 0, "wrong, refused": 0, "wrong, harmless": 0}
    for round_ in range(rounds):
        random.seed(round_)
        torch.manual_seed(round_)
        os.environ["MINITUNE_CPU_ISA"] = random.choice(names[: names.index(BEST) + 1])
        try:
            wrong = random.choice([dequantize, dequantize, product, quantize, quantize_absmax, attention, attention])()
            counts["wrong, harmless" if wrong else "right"] += 1
        except (RuntimeError, TypeError):      # TypeError: what no tensor is, in a tensor's place
            counts["wrong, refused"] += 1
    print(counts)
    assert min(counts.values()) > 50, "too few of a kind"


if __name__ == "__main__":
    main()
