"""4-bit weights on a GPU: each backend gives the CPU's bits; QLoRA learns as on the CPU and waits for nothing.

The backend is chosen by MINITUNE_BACKEND, as a user would.
"""

import math
import os
import shutil
from pathlib import Path

import pytest
import torch

import minitune as mt
from minitune.model.init import init_weights
from minitune.model.llama import Llama
from minitune.ops import backends, nf4
from minitune.ops.nf4_linear import DecodeBuffer, FusedNF4
from tests.batches import documents, packed
from tests.tolerance import relative

pytestmark = pytest.mark.gpu
SHAPES = {"two nested blocks": (270, 64), "whole segments": (3, 128), "ragged rows": (3, 100), "odd": (7, 33),
          "three dimensions": (2, 3, 70), "one value": (1,), "less than a block": (31,),
          "a last block of one value": (193,), "many tiles": (301, 4104)}
# rows, columns, row pitch, first column: for each of them a reason to leave the widest stores
PITCHED = {"as an adapter's weight": (70, 128, 192, 0), "wide and aligned": (5, 192, 208, 16),
           "misaligned": (5, 192, 199, 3), "odd": (5, 33, 40, 0), "several tiles a row": (4, 1030, 1031, 1),
           "one column": (9, 1, 4, 0)}
LARGE = mt.ModelConfig(vocab_size=1000, d_model=1024, n_layers=4, n_heads=8, n_kv_heads=8, head_dim=128, d_ff=12288)


@pytest.fixture(params=(*backends.OPS["nf4"], "reference"))
def backend(request, monkeypatch):
    reason = backends.missing(request.param, torch.device("cuda"))
    if reason:
        pytest.skip(reason)
    monkeypatch.setenv("MINITUNE_BACKEND", request.param)
    return request.param


def _on_cpu():
    return backends.use("reference")


def _bits(values):
    return values.cpu().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.element_size()])


def _values(shape, dtype=torch.float32):
    """Values of all sizes: a block of zeros, one so small that its absmax is raised, one of large values."""
    values = torch.randn(math.prod(shape))
    for block, factor in zip(values.split(64)[1:], (0.0, 1e-39, 5e3), strict=False):
        block.mul_(factor)
    return values.view(shape).to(dtype)


def _quantized(shape, double_quant, blocksize=64):
    with _on_cpu():
        return nf4.quantize(_values(shape), double_quant, blocksize)


def _check_decode(weight, dtype, room, out):
    """`out`, a view of `room`, gets the CPU's bits, and the rest of `room` is not touched."""
    room.fill_(math.nan)
    assert weight.to("cuda").dequantize(out=out) is out
    with _on_cpu():
        expected = weight.dequantize(dtype)
    assert torch.equal(_bits(out.contiguous()), _bits(expected))
    out.fill_(math.nan)
    assert bool(room.isnan().all()), "values outside of out were written"


# ---- bits -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", nf4.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_dequantize_has_the_cpus_bits(shape, dtype, double_quant, backend):
    weight, n = _quantized(shape, double_quant), math.prod(shape)
    for start in (0, 3) if dtype == torch.bfloat16 else (0,):     # 3: no store may be wide
        room = torch.empty(start + n + 70, dtype=dtype, device="cuda")
        _check_decode(weight, dtype, room, room[start : start + n].view(shape))
    with _on_cpu():
        expected = weight.dequantize(dtype)
    assert torch.equal(_bits(weight.to("cuda").dequantize(dtype)), _bits(expected))


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "columns", "pitch", "start"), PITCHED.values(), ids=PITCHED)
def test_rows_may_lie_apart(rows, columns, pitch, start, dtype, double_quant, backend):
    room = torch.empty(start + rows * pitch, dtype=dtype, device="cuda")
    _check_decode(_quantized((rows, columns), double_quant), dtype, room, room[start:].view(rows, pitch)[:, :columns])


def test_more_than_all_blocks_do_in_one_round(backend):
    """9 million values: the extension's grid is no larger than the GPU, so each block comes round again."""
    rows, columns, pitch = 2200, 4104, 4168
    room = torch.empty(rows * pitch, dtype=torch.bfloat16, device="cuda")
    _check_decode(_quantized((rows, columns), True), torch.bfloat16, room, room.view(rows, pitch)[:, :columns])
    _check_encode(_values((rows, columns), torch.bfloat16), True)


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
@pytest.mark.parametrize("shape", [(6, 1024), (5, 1031)], ids=str)
def test_other_blocks(shape, blocksize, backend):
    weight = _quantized(shape, True, blocksize)
    room = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    _check_decode(weight, torch.bfloat16, room, room)
    _check_encode(_values(shape), True, blocksize)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_parts_below_each_other_in_one_buffer(double_quant, backend):
    """As gate and up lie beside the columns of an adapter."""
    parts = [_quantized((33, 64), double_quant), _quantized((64, 64), not double_quant)]
    room = torch.full((97, 128), math.nan, dtype=torch.bfloat16, device="cuda")
    fused = FusedNF4([part.to("cuda") for part in parts], DecodeBuffer(torch.bfloat16))
    fused.decode(room[:, :64])
    with _on_cpu():
        expected = torch.cat([part.dequantize(torch.bfloat16) for part in parts])
    assert torch.equal(_bits(room[:, :64].contiguous()), _bits(expected)) and bool(room[:, 64:].isnan().all())
    with fused.decoded() as whole:
        assert torch.equal(_bits(whole), _bits(expected))


SCALES = (math.nan, math.inf, -math.inf, 1e-40, -1e-45, 0.0, -0.0, 65504.0, 65519.9, 65520.0, 6e-5, 5.9e-8, 3.4e38,
          3.3895e38, 1.1754944e-38, 9.2e-41)
"""Products with these are NaN, infinite, denormal, zero, or lie at the edge of fp16."""


def _same_bits_but_for_nan(found, expected):
    """A NaN is one, but torch's own casts write it in several ways."""
    nan = expected.isnan()
    assert torch.equal(found.cpu().isnan(), nan)
    assert torch.equal(_bits(found.cpu().masked_fill(nan, 0)), _bits(expected.masked_fill(nan, 0)))


@pytest.mark.parametrize("columns", [512, 504 + 7], ids=["wide stores", "narrow stores"])
@pytest.mark.parametrize("dtype", nf4.DTYPES, ids=str)
def test_dequantize_any_scale(dtype, columns, backend):
    n = len(SCALES) * columns
    packed = torch.arange(256, dtype=torch.uint8).repeat(len(SCALES))[: -(-n // 2)]     # every pair of codes under each
    scales = torch.tensor(SCALES).repeat_interleave(8)[: -(-n // 64)].contiguous()
    weight = nf4.NF4Weight(packed, scales, None, None, None, 64, (len(SCALES), columns), torch.float32)
    with _on_cpu():
        expected = weight.dequantize(dtype)
    _same_bits_but_for_nan(weight.to("cuda").dequantize(dtype), expected)


@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("dtype", nf4.DTYPES, ids=str)
def test_the_extension_quantizes_what_is_not_finite_as_the_reference_does(dtype, blocksize):
    """`nf4.quantize` refuses it, by what the kernel says of absmax."""
    if backends.missing("native", torch.device("cuda")):
        pytest.skip("the extension is missing")
    for start, n in ((0, 8192), (1, 8192), (0, 5003)):      # wide loads, narrow ones, a last block that is not full
        values = torch.randn(start + n)
        for i, value in enumerate((math.nan, math.inf, -math.inf, 3e38, 1e-39, 0.0)):
            values[64 * i + 3 : 64 * i + 64 : 7] = value
        values = values.to(dtype)
        expected, scales = nf4.quantize_reference(values[start:], blocksize)
        on_gpu = values.to("cuda")[start:]
        packed, absmax = torch.ops.minitune.nf4_quantize(on_gpu, nf4.table(on_gpu.device), blocksize)
        assert torch.equal(packed.cpu(), expected)
        _same_bits_but_for_nan(absmax, scales)


def test_the_extension_is_there_where_nvcc_is():
    """Else each case above that is named native would be skipped, unseen."""
    if os.environ.get("MINITUNE_NATIVE") == "0" or os.environ.get("MINITUNE_CUDA") == "0":
        pytest.skip("left out on request")
    if not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
        pytest.skip("there is no nvcc")
    missing = backends.missing("native", torch.device("cuda"))
    assert missing is None, f"{missing}; build it: python setup.py build_ext --inplace"


def _check_encode(values, double_quant, blocksize=64):
    with _on_cpu():
        expected = nf4.quantize(values, double_quant, blocksize).tensors()
    found = nf4.quantize(values.to("cuda"), double_quant, blocksize).tensors()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(_bits(found[name]), _bits(value)), name


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", nf4.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_quantize_has_the_cpus_bits(shape, dtype, double_quant, backend):
    _check_encode(_values(shape, dtype), double_quant)


def test_a_weight_that_is_not_finite_is_refused(backend):
    values = torch.randn(5, 100)
    values[2, 3], values[4, 99] = math.nan, -math.inf
    with pytest.raises(mt.InputError, match="2 values that are NaN or infinite, of 500"):
        nf4.quantize(values.to("cuda"))


# ---- training -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose widths no block divides, without transformers, which a GPU machine may lack."""
    config = mt.ModelConfig(vocab_size=97, d_model=48, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=8, d_ff=80,
                            dtype="float32")
    network = Llama(config, dtype=torch.float32)
    init_weights(network, 0, std=0.15)
    place = tmp_path_factory.mktemp("model")
    mt.Model(network, None).save(place)
    return place


def _batch():
    return packed(documents(), 65)


def _results(folder, device, quant, settings):
    model = mt.load(folder, device=device, dtype="float32", quant=quant, **settings)
    for adapter in model.network.adapters().values():
        adapter.B.data.copy_(torch.randn(adapter.B.shape, generator=torch.Generator().manual_seed(2)) * 0.05)
    loss = model.loss(_batch())
    loss.backward()
    parts = [part for projection in model.network.projections() for part in projection.fused.parts]
    return (loss.detach().cpu(), [p.grad.cpu() for p in model.trainable_parameters()],
            [tensor.cpu() for part in parts for tensor in part.tensors().values()],
            model.generate([[5, 6, 7], [8]], 12))


@pytest.mark.parametrize("settings", [{"lora": mt.LoRA(rank=4)}, {"lora": mt.LoRA(rank=4), "memory": "full"},
                                      {"train": "norms"}, {"lora": mt.LoRA(rank=4, dora=True)}],
                         ids=["halves", "halves, full", "norms", "composed"])
@pytest.mark.parametrize("quant", ["nf4", "nf4-dq"])
def test_losses_gradients_and_generation_equal_the_cpus_in_fp32(folder, quant, settings, backend):
    with _on_cpu():
        loss, gradients, parts, new = _results(folder, "cpu", quant, settings)
    gpu_loss, gpu_gradients, gpu_parts, gpu_new = _results(folder, "cuda", quant, settings)
    assert all(torch.equal(a, b) for a, b in zip(gpu_parts, parts, strict=True))
    assert relative(gpu_loss, loss) < 1e-5 and gpu_new == new
    for a, b in zip(gpu_gradients, gradients, strict=True):
        assert relative(a, b) < 1e-4


@pytest.mark.parametrize("memory", ["keep", "pointwise", "full"])
def test_a_step_in_bf16_repeats_bit_for_bit_and_waits_for_nothing(folder, memory, backend):
    losses, gradients = [], []
    for _ in range(2):
        model = mt.load(folder, lora=mt.LoRA(rank=4), device="cuda", dtype="bfloat16", quant="nf4-dq", memory=memory)
        optimizer = mt.AdamW(model.trainable_parameters(), lr=1e-2)
        batch = _batch().pin_memory().to("cuda")
        run = []
        try:
            for step in range(5):
                torch.cuda.set_sync_debug_mode("error" if step >= 2 else "default")
                optimizer.zero_grad()
                loss = model.loss(batch)
                loss.backward()
                optimizer.clip(1.0)
                optimizer.step()
                run.append(loss.detach())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        losses.append(torch.stack(run).cpu())
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.trainable_parameters()]))
    assert torch.equal(*losses) and losses[0][-1] < losses[0][0]
    assert torch.equal(*gradients) and bool(gradients[0].any())


@pytest.mark.parametrize("quant", ["nf4", "nf4-dq"])
def test_device_memory_of_a_load(quant, tmp_path):
    """At most the result, the largest tensor and 16 MiB: the 16-bit model is never there as a whole."""
    if backends.choose("nf4", torch.device("cuda")) == "reference":
        pytest.skip("the reference takes several times a tensor's memory to quantise it")
    network = Llama(LARGE, dtype=torch.bfloat16)
    init_weights(network, 0)
    mt.Model(network, None).save(tmp_path)
    nf4.quantize(torch.ones(64, 64, device="cuda")).dequantize()      # tables and compiled kernels are there
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = mt.load(tmp_path, quant=quant, device="cuda", dtype="bfloat16")
    peak = torch.cuda.max_memory_allocated() - before
    result = sum(t.numel() * t.element_size() for t in model.network.hf_weights().values())
    result += sum(part.nbytes for p in model.network.projections() for _, part in p.nf4_parts())
    largest, whole = 2 * LARGE.d_model * LARGE.d_ff, 2 * sum(math.prod(s) for _, s, *_ in model.network.dense_weights())
    assert result < 0.35 * whole
    assert peak <= result + largest + (16 << 20), f"{peak >> 20} MiB for a result of {result >> 20} MiB"
