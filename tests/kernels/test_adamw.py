"""adamw: the Triton kernels follow the reference over several steps; moments in 8 bits have its very bits."""

import math
import struct

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from minitune.kernels import adamw as kernels
from minitune.kernels.launch import Config
from minitune.ops import adamw as op
from minitune.ops import backends, moments8
from tests.tolerance import relative

SETTINGS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
SMALL = Config({"TILE": 256}, num_warps=1)
SIZES = {"one value": 1, "ragged": 777, "several tiles": 1024, "several tiles, ragged": 2500}
SIZES_8BIT = {"one value": 1, "less than a block": 100, "a block": 256, "blocks, ragged": 700}


def _gradient(n, step):
    """Eight decades, so eps matters at one end alone; in blocks, one value is far above the others."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(n, generator=generator) * torch.logspace(-6, 2, n)[torch.randperm(n, generator=generator)]


def _run(step_op, n, device, steps=5, scale=None, **more):
    """param, grad, exp_avg, exp_avg_sq after some steps, on the CPU."""
    buffers = [t.to(device) for t in (torch.randn(n, generator=torch.Generator().manual_seed(0)), torch.empty(n),
                                      torch.zeros(n), torch.zeros(n))]
    for step in range(1, steps + 1):
        buffers[1].copy_(_gradient(n, step))
        step_op(*buffers, **SETTINGS, step=step, grad_scale=scale if scale is None else scale.to(device), **more)
    return [b.cpu() for b in buffers]


@pytest.mark.parametrize("n", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("scale", [None, torch.tensor(0.37)], ids=["as it is", "scaled"])
def test_five_steps_follow_the_reference(n, scale, device):
    found = _run(kernels.adamw_, n, device, scale=scale, config=SMALL)
    expected = _run(op.adamw_reference_, n, "cpu", scale=scale)
    for name, a, b in zip(("param", "grad", "exp_avg", "exp_avg_sq"), found, expected, strict=True):
        assert relative(a, b) <= 1e-6, name
    assert torch.equal(found[1], expected[1]), "the gradient is scaled in its place"


def test_is_bitwise_repeatable_and_blind_to_cuts_and_tiles(device):
    kernel = kernels.adamw_
    whole, again = (_run(kernel, 2500, device, config=config) for config in (None, SMALL))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))

    def cut(*buffers, **settings):
        for part in (slice(0, 48), slice(48, 1024), slice(1024, None)):
            kernel(*(b[part] for b in buffers), **settings)

    assert all(torch.equal(a, b) for a, b in zip(whole, _run(cut, 2500, device), strict=True))


def test_nothing_is_written_beyond_the_end(device):
    scale = torch.tensor(0.5, device=device)
    buffers = [torch.full((300,), 7.0, device=device) for _ in range(4)]
    kernels.adamw_(*(b[:130] for b in buffers), **SETTINGS, step=1, grad_scale=scale)
    flat = [torch.full((600,), 7.0, device=device) for _ in range(2)]
    codes = [torch.full((600,), 7, dtype=torch.uint8, device=device) for _ in range(2)]
    absmax = [torch.full((3,), 7.0, device=device) for _ in range(2)]
    tables = [moments8.table(signed, flat[0].device) for signed in (True, False)]
    kernels.adamw_8bit_(*(b[:300] for b in flat), codes[0][:300], absmax[0][:2], codes[1][:300], absmax[1][:2], *tables,
                        **SETTINGS, step=1, grad_scale=scale)
    for end, written in ((130, buffers), (300, [*flat, *codes]), (2, absmax)):
        assert all(bool((b[:end] != 7).all() and (b[end:] == 7).all()) for b in written)


def test_a_scale_that_is_nan_takes_no_step(device):
    scale, tables = torch.tensor(float("nan"), device=device), [moments8.table(s, torch.device(device)) for s in (1, 0)]
    kept = [torch.full((300,), 7.0, device=device) for _ in range(3)]
    codes = [torch.full((300,), 7, dtype=torch.uint8, device=device) for _ in range(2)]
    absmax = [torch.full((2,), 7.0, device=device) for _ in range(2)]
    for grad in (torch.ones(300, device=device), torch.full((300,), float("inf"), device=device)):
        kernels.adamw_(kept[0], grad.clone(), *kept[1:], **SETTINGS, step=1, grad_scale=scale)
        kernels.adamw_8bit_(kept[0], grad, codes[0], absmax[0], codes[1], absmax[1], *tables, **SETTINGS, step=1,
                            grad_scale=scale)
        assert bool(grad.isnan().all()) and all(bool((t == 7).all()) for t in (*kept, *codes, *absmax))


def _state(n, device):
    """Two moments in the middle of a run, a block of zeros among them."""
    first, second = torch.randn(n) * torch.rand(n) ** 4, torch.rand(n) ** 8
    first[256:512], second[256:512] = 0, 0
    state = []
    for signed, values in ((True, first), (False, second)):
        moment = moments8.zeros(n, signed, torch.device("cpu"))
        moments8.encode_(moment, values)
        state.append(moments8.Moment8(moment.codes.to(device), moment.absmax.to(device), signed))
    return state


@pytest.mark.parametrize("n", SIZES_8BIT.values(), ids=SIZES_8BIT)
@pytest.mark.parametrize("scale", [None, torch.tensor(0.37)], ids=["as it is", "scaled"])
def test_8_bits_are_the_references_bits(n, scale, device):
    """Codes and absmax: products, sums and quotients are rounded one by one, so no value falls on the other side of a
    midpoint, and none may. Parameters: torch on a CPU takes roots from MKL, whose last bit is not IEEE's."""
    torch.manual_seed(n)
    begun, state = torch.randn(n), _state(n, device)
    param, expected = begun.to(device, copy=True), begun.clone()
    expected_state = [m._replace(codes=m.codes.cpu().clone(), absmax=m.absmax.cpu().clone()) for m in state]
    for step in range(1, 6):
        grad, plain = _gradient(n, step).to(device), _gradient(n, step)
        with backends.use("triton"):
            op.adamw_8bit_(param, grad, *state, **SETTINGS, step=step,
                           grad_scale=scale if scale is None else scale.to(device))
        op.adamw_8bit_reference_(expected, plain, *expected_state, **SETTINGS, step=step, grad_scale=scale)
        moved = float((expected - begun).abs().max())
        torch.testing.assert_close(param.cpu(), expected, rtol=3e-7, atol=3e-7 * moved)
        assert torch.equal(grad.cpu(), plain)
        for mine, theirs in zip(state, expected_state, strict=True):
            assert torch.equal(mine.codes.cpu(), theirs.codes)
            assert torch.equal(mine.absmax.cpu(), theirs.absmax)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_codes_on_both_sides_of_every_midpoint(signed, device):
    """Each midpoint and its two neighbours in fp32, in blocks whose absmax is 1, as moments that one step leaves there:
    beta 0 makes the gradient the new first moment, and its square the second."""
    levels = moments8.table(signed, torch.device("cpu"))[0]
    middle = (levels[1:] + levels[:-1]) / 2
    values = torch.cat([middle, middle.nextafter(torch.tensor(2.0)), middle.nextafter(torch.tensor(-2.0))])
    blocks = torch.nn.functional.pad(values, (0, -len(values) % 255)).view(-1, 255)
    grad = torch.cat([blocks, torch.ones(len(blocks), 1)], 1).view(-1)
    grad = grad if signed else grad.sqrt()
    found, expected = ([moments8.zeros(len(grad), kind, torch.device(place)) for kind in (True, False)]
                       for place in (device, "cpu"))
    settings = SETTINGS | {"beta1": 0.0, "beta2": 0.0, "step": 1}
    with backends.use("triton"):
        op.adamw_8bit_(torch.zeros_like(grad, device=device), grad.to(device), *found, **settings)
    op.adamw_8bit_reference_(torch.zeros_like(grad), grad, *expected, **settings)
    mine, theirs = found[not signed], expected[not signed]
    assert torch.equal(mine.codes.cpu(), theirs.codes)
    assert len(theirs.codes.unique()) >= 254


def test_the_public_op_takes_the_kernel_where_it_is_asked_for(device):
    with backends.use("triton"):
        found = _run(op.adamw_, 500, device)
    assert torch.equal(found[0], _run(kernels.adamw_, 500, device)[0])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")      # the interpreter's numpy
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_visible_in_its_block(bad, device):
    grad = torch.randn(512)
    grad[300] = bad
    state = _state(512, device)
    param = torch.zeros(512, device=device)
    with backends.use("triton"):
        for step in (1, 2):
            op.adamw_8bit_(param, grad.to(device), *state, **SETTINGS, step=step)
    assert [[bool(value.isfinite()) for value in moment.absmax] for moment in state] == [[True, False]] * 2
    assert bool(param[:256].isfinite().all()) and not bool(param[300].isfinite())


def test_an_empty_buffer_is_left_alone(device):
    empty = torch.zeros(0, device=device)
    kernels.adamw_(empty, empty, empty, empty, **SETTINGS, step=1)


def test_the_constants_are_those_of_the_op(device):
    assert kernels.BLOCK.value == moments8.BLOCK
    assert kernels.TINY_BITS.value == struct.unpack("<I", struct.pack("<f", moments8.TINY))[0]
