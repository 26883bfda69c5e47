"""The native NF4 ops against the reference of ops/nf4.py, bit for bit: each instruction set, dtype, kind of shape."""

import pytest
import torch

from minitune.ops import backends, nf4
from tests.tolerance import check

CPU = torch.device("cpu")
absent = backends.missing("native", CPU)
pytestmark = pytest.mark.skipif(absent is not None, reason=f"minitune._C is missing: {absent}")
OPS = torch.ops.minitune
BITS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
# a whole number of blocks and of 8s; no multiple of a block; odd columns, so that rows begin within a byte; one value;
# a last block that is short; columns shorter than a block
SHAPES = [(64, 64), (3, 104), (7, 33), (1, 1), (5, 131), (1, 1000), (40, 7), (9, 640)]
LEVELS = torch.tensor(nf4.TABLE)


def _instruction_sets():
    if absent:
        return ["portable"]
    from minitune import _C

    names = ["portable", "avx2", "avx512", "avx512_bf16", "amx"]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MINITUNE_CPU_ISA", raising=False)
        return [name for name in names[: names.index(_C.cpu_isa()) + 1] if name != "amx"]      # which adds nothing here


ISAS = _instruction_sets()


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    from minitune import _C

    monkeypatch.setenv("MINITUNE_CPU_ISA", request.param)
    assert _C.cpu_isa() == request.param
    return request.param


def _weight(shape, blocksize=64, nested=False):
    """Any codes and scales: what a quantiser writes and what it does not."""
    rows, columns = shape
    blocks = -(-rows * columns // blocksize)
    packed = torch.randint(256, (-(-rows * columns // 2),), dtype=torch.uint8)
    if not nested:
        return nf4.NF4Weight(packed, torch.randn(blocks), None, None, None, blocksize, shape, torch.float32)
    codes = torch.randint(256, (blocks,), dtype=torch.uint8)
    return nf4.NF4Weight(packed, codes, torch.rand(-(-blocks // 256)), nf4.nested_code(CPU), torch.tensor(0.37),
                         blocksize, shape, torch.float32)


def _same_bits(value, reference):
    """NaN aside, whose bits torch's own casts do not settle (bf16: 0xffff in their vector code, 0x7fc0 elsewhere)."""
    assert value.dtype == reference.dtype and value.shape == reference.shape
    bits = BITS[value.element_size()]
    nan = reference.isnan()
    assert torch.equal(value.isnan(), nan)
    assert torch.equal(value.masked_fill(nan, 0).view(bits), reference.masked_fill(nan, 0).view(bits))


# ---- dequantise -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", nf4.DTYPES)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_dequantize(isa, blocksize, dtype, nested):
    for shape in SHAPES:
        weight = _weight(shape, blocksize, nested)
        reference = nf4.dequantize_reference(weight).to(dtype)
        _same_bits(OPS.nf4_dequantize(*nf4.operands(weight), *shape, dtype), reference)
        for gap in (0, 1, 8):
            buffer = torch.full((shape[0], shape[1] + gap), 7.0, dtype=dtype)
            OPS.nf4_dequantize_out(*nf4.operands(weight), buffer[:, : shape[1]])
            _same_bits(buffer[:, : shape[1]].contiguous(), reference)
            assert (buffer[:, shape[1]:] == 7).all(), "wrote between the rows"


@pytest.mark.parametrize("dtype", nf4.DTYPES)
def test_dequantize_any_scale(isa, dtype):
    """Scales whose products are NaN, infinite, denormal, zero, at the edge of fp16, and fp32's largest."""
    scales = [float("nan"), float("inf"), -float("inf"), 1e-40, -1e-45, 0.0, -0.0, 65504.0, 65519.9, 65520.0, 6e-5,
              1e-7, 5.9e-8, 3.4e38, 3.3895e38, 1.1754944e-38, 9.2e-41]
    scales += (torch.randn(400) * 10.0 ** torch.randint(-44, 38, (400,))).tolist()
    packed = torch.arange(256, dtype=torch.uint8).repeat(len(scales))     # every pair of codes under every scale
    weight = nf4.NF4Weight(packed, torch.tensor(scales).repeat_interleave(8), None, None, None, 64, (len(scales), 512),
                           torch.float32)
    value = OPS.nf4_dequantize(*nf4.operands(weight), len(scales), 512, dtype)
    _same_bits(value, nf4.dequantize_reference(weight).to(dtype))
    if dtype == torch.bfloat16:
        assert set((value[0].view(torch.int16) & 0xffff).tolist()) == {0x7fc0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_larger_than_the_caches_has_the_same_bits(dtype, monkeypatch):
    """From 64 MiB on the widest path stores past the caches, where an address allows it."""
    shape = 8200, 4104
    weight, decoded = _weight(shape, nested=True), []
    for isa in (ISAS[0], ISAS[-1]):
        monkeypatch.setenv("MINITUNE_CPU_ISA", isa)
        for gap in (0, 24, 8):      # rows that begin at multiples of 64 bytes, and at others
            room = torch.full((shape[0], shape[1] + gap), 7.0, dtype=dtype)
            OPS.nf4_dequantize_out(*nf4.operands(weight), room[:, : shape[1]])
            assert bool((room[:, shape[1]:] == 7).all()), "wrote between the rows"
            decoded.append(room[:, : shape[1]])
    rows = torch.randint(shape[0], (40,))
    whole = nf4.dequantize_reference(weight)[rows].to(dtype)
    assert torch.equal(decoded[0][rows], whole)
    assert all(torch.equal(other, decoded[0]) for other in decoded[1:])


def test_threads_give_the_same_bits():
    weight, before = _weight((1024, 2049), nested=True), torch.get_num_threads()
    flat = torch.randn(2_098_177)
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = torch.zeros(1024, 2056, dtype=torch.bfloat16)
            OPS.nf4_dequantize_out(*nf4.operands(weight), out[:, :2049])
            packed, absmax = OPS.nf4_quantize(flat, nf4.table(CPU), 64)
            codes, nested_absmax = OPS.nf4_quantize_absmax(absmax, absmax.mean(), nf4.nested_code(CPU))
            results.append((OPS.nf4_dequantize(*nf4.operands(weight), 1024, 2049, torch.float32), out, packed, absmax,
                            codes, nested_absmax))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))
    _same_bits(results[0][0], nf4.dequantize_reference(weight))
    _same_bits(results[0][1][:, :2049].contiguous(), results[0][0].bfloat16())


# ---- quantise -------------------------------------------------------------------------------------------------------
def _values(n, dtype):
    """Normal values; midpoints and their neighbours; and blocks of zeros, tiny, huge, infinite and NaN values."""
    flat = torch.randn(n)
    midpoints = (LEVELS[1:] + LEVELS[:-1]) / 2
    hard = torch.cat((LEVELS, midpoints, midpoints.nextafter(torch.ones(15)), midpoints.nextafter(-torch.ones(15))))
    flat[64:125] = hard[: len(flat[64:125])]
    for i, value in enumerate((0.0, -0.0, 1e-39, 3e38, float("inf"), -float("inf"), float("nan"))):
        block = flat[128 + 64 * i: 192 + 64 * i]
        block[3::7] = value
        if abs(value) < 1:
            block[:] = value
    return flat.to(dtype)


@pytest.mark.parametrize("dtype", nf4.DTYPES)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_quantize(isa, blocksize, dtype):
    for n in (1, 2, 63, 64, 65, 100, 1000, 4096, 8193):
        flat = _values(n, dtype)
        packed, absmax = OPS.nf4_quantize(flat, nf4.table(CPU), blocksize)
        expected, expected_absmax = nf4.quantize_reference(flat, blocksize)
        _same_bits(absmax, expected_absmax)
        assert torch.equal(packed, expected)


@pytest.mark.parametrize("n", [1, 255, 256, 257, 5000])
def test_quantize_absmax(n):
    code = nf4.nested_code(CPU)
    absmax = torch.rand(n) * 10.0 ** torch.randint(-42, 30, (n,))
    for values in (torch.rand(n), absmax, torch.zeros(n), torch.where(absmax < 1e-30, torch.nan, absmax)):
        offset = values.nanmean()
        codes, nested_absmax = OPS.nf4_quantize_absmax(values, offset, code)
        expected, expected_absmax = nf4.quantize_absmax_reference(values, offset, code)
        _same_bits(nested_absmax, expected_absmax)
        assert torch.equal(codes, expected)


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_whole_way_is_the_references(isa, double_quant):
    for shape in ((65, 100), (33,), (2, 3, 37)):
        values = torch.randn(shape, dtype=torch.bfloat16)
        with backends.use("reference"):
            expected = nf4.quantize(values, double_quant)
            decoded = expected.dequantize()
        with backends.use("native"):
            weight = nf4.quantize(values, double_quant)
            _same_bits(weight.dequantize(), decoded)
        for name, tensor in expected.tensors().items():
            assert torch.equal(weight.tensors()[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("shape", [(7, 64), (5, 100), (3, 37), (300, 256), (2, 20_480), (3, 4480)], ids=str)
def test_a_product_is_that_of_the_decoded_weight(shape, blocksize, nested, dtype, isa):
    weight, x = _weight(shape, blocksize, nested), torch.randn(shape[1]).to(dtype)
    y, decoded = torch.full((shape[0],), float("nan"), dtype=dtype), weight.dequantize(dtype)
    OPS.nf4_product(*nf4.operands(weight), x, y)
    truth, terms = decoded.double() @ x.double(), decoded.double().abs() @ x.double().abs()
    if dtype == torch.float32:      # of a few sums, the library's may all have come out well by chance
        assert ((y - truth).abs() <= 0.5 * torch.finfo(dtype).eps * shape[1] ** 0.5 * terms).all()
    else:
        check("y", y, torch.mv(decoded, x), truth)


# ---- as torch sees them ---------------------------------------------------------------------------------------------
def _calls():
    plain, nested = _weight((6, 37)), _weight((8, 64), nested=True)
    absmax, code = torch.rand(300), nf4.nested_code(CPU)
    return {"nf4_dequantize": [(*nf4.operands(plain), 6, 37, torch.bfloat16),
                               (*nf4.operands(nested), 8, 64, torch.float32)],
            "nf4_dequantize_out": [(*nf4.operands(plain), torch.zeros(6, 40)[:, :37]),
                                   (*nf4.operands(nested), torch.zeros(8, 64, dtype=torch.float16))],
            "nf4_product": [(*nf4.operands(plain), torch.randn(37), torch.zeros(6)),
                            (*nf4.operands(nested), torch.randn(64).bfloat16(), torch.zeros(8).bfloat16())],
            "nf4_quantize": [(torch.randn(201), nf4.table(CPU), 64), (torch.randn(128).half(), nf4.table(CPU), 32)],
            "nf4_quantize_absmax": [(absmax, absmax.mean(), code)]}


NAMES = ["nf4_dequantize", "nf4_dequantize_out", "nf4_product", "nf4_quantize", "nf4_quantize_absmax"]


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    for arguments in _calls()[name]:
        torch.library.opcheck(getattr(OPS, name).default, arguments)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_whole(name):
    op = getattr(OPS, name)
    for arguments in _calls()[name]:
        def run(*given):
            result = op(*given)
            return given[-1] + 1 if result is None else result

        torch._dynamo.reset()
        expected = run(*arguments)
        value = torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments)
        for one, other in zip(*((v if isinstance(v, tuple) else (v,)) for v in (value, expected)), strict=True):
            assert torch.equal(one, other)


def test_the_instruction_set_must_be_one_that_there_is(monkeypatch):
    from minitune import _C

    weight = _weight((2, 64))
    monkeypatch.setenv("MINITUNE_CPU_ISA", "sse9")
    for call in (_C.cpu_isa, lambda: OPS.nf4_dequantize(*nf4.operands(weight), 2, 64, torch.float32),
                 lambda: OPS.nf4_quantize(torch.randn(64), nf4.table(CPU), 64)):
        with pytest.raises(RuntimeError, match="sse9"):
            call()
    if len(ISAS) < 3:
        monkeypatch.setenv("MINITUNE_CPU_ISA", "avx512")
        with pytest.raises(RuntimeError, match="no more than"):
            _C.cpu_isa()
