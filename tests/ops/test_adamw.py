"""adamw_: against torch.optim.AdamW and its own reference, repeatable, blind to how the buffer is cut, and refusing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minitune.errors import InputError
from minitune.ops import adamw, backends, moments8
from minitune.ops.adamw import CHUNK, adamw_, adamw_8bit_, adamw_8bit_reference_, adamw_reference_
from minitune.ops.moments8 import Moment8

CPU = torch.device("cpu")
SETTINGS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
BOTH = pytest.mark.parametrize("op", [adamw_, adamw_reference_])


def buffers(n: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator), torch.zeros(n), torch.zeros(n)]


def gradient(n: int, step: int) -> Tensor:
    scale = torch.logspace(-6, 2, n)  # eight decades: eps matters at one end, not at the other
    return torch.randn(n, generator=torch.Generator().manual_seed(100 + step)) * scale


def run(op, n: int, steps: int, **settings) -> list[Tensor]:
    state = buffers(n)
    for step in range(1, steps + 1):
        op(state[0], gradient(n, step), *state[1:], **SETTINGS, step=step, **settings)
    return state


@BOTH
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_twenty_steps_follow_torch(op, weight_decay):
    n = 1237
    start, m, v = run(op, n, 20, weight_decay=weight_decay)
    theirs = torch.nn.Parameter(buffers(n)[0])
    optimizer = torch.optim.AdamW([theirs], lr=3e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=weight_decay,
                                  foreach=False)
    for step in range(1, 21):
        theirs.grad = gradient(n, step)
        optimizer.step()
    state = optimizer.state[theirs]
    # the parameter moves by lr a step: each step may round once more or less, in units of the parameter's last place
    torch.testing.assert_close(start, theirs.detach(), rtol=5e-7, atol=5e-7)
    torch.testing.assert_close(m, state["exp_avg"], rtol=2e-6, atol=1e-12)
    torch.testing.assert_close(v, state["exp_avg_sq"], rtol=2e-6, atol=1e-20)


def test_follows_the_formula_in_fp64():
    p, m, v = (t.double() for t in buffers(777))
    for step in range(1, 11):
        g = gradient(777, step).double() * 0.5
        p -= 3e-3 * 0.1 * p
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        p -= 3e-3 * (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
    for op in (adamw_, adamw_reference_):
        ours = run(op, 777, 10, weight_decay=0.1, grad_scale=torch.tensor(0.5))[0]
        assert ((ours - p).norm() / p.norm()).item() < 2e-7


@BOTH
def test_is_bitwise_repeatable_and_blind_to_aligned_cuts(op):
    n = CHUNK + 1000 if op is adamw_reference_ else 5000
    whole, again = run(op, n, 3, weight_decay=0.1), run(op, n, 3, weight_decay=0.1)
    parts = buffers(n)
    for step in range(1, 4):
        grad = gradient(n, step)
        for cut in (slice(0, 48), slice(48, 1024), slice(1024, n)):
            op(parts[0][cut], grad[cut], parts[1][cut], parts[2][cut], **SETTINGS, step=step, weight_decay=0.1)
    for a, b, c in zip(whole, again, parts, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@BOTH
def test_grad_scale_is_a_scaled_gradient(op):
    state, expected = buffers(100), buffers(100)
    op(state[0], gradient(100, 1), *state[1:], **SETTINGS, weight_decay=0.0, step=1, grad_scale=torch.tensor(0.37))
    op(expected[0], gradient(100, 1) * torch.tensor(0.37), *expected[1:], **SETTINGS, weight_decay=0.0, step=1)
    assert all(torch.equal(a, b) for a, b in zip(state, expected, strict=True))


@BOTH
def test_a_scale_that_is_nan_takes_no_step(op):
    state = run(op, 300, 3, weight_decay=0.1)
    before, grad = [t.clone() for t in state], gradient(300, 4)
    op(state[0], grad, *state[1:], **SETTINGS, weight_decay=0.1, step=4, grad_scale=torch.tensor(float("nan")))
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True)) and bool(grad.isnan().all())


@BOTH
@pytest.mark.parametrize("bad", [torch.zeros(9), torch.zeros(10).double(), torch.zeros(5, 2), torch.zeros(20)[::2]])
def test_refuses_other_buffers_by_name(op, bad):
    p, m, v = buffers(10)
    with pytest.raises(InputError, match=r"exp_avg_sq is torch\.float"):
        op(p, torch.zeros(10), m, bad, **SETTINGS, weight_decay=0.0, step=1)
    assert torch.equal(p, buffers(10)[0]) and not m.any() and not v.any()


@pytest.mark.parametrize("scale", [torch.tensor(0.5).double(), torch.tensor([0.5])])
@BOTH
def test_refuses_another_scale_by_name(op, scale):
    p, m, v = buffers(10)
    with pytest.raises(InputError, match=r"grad_scale is torch\.float.*must be a torch\.float32 \[\]"):
        op(p, torch.zeros(10), m, v, **SETTINGS, weight_decay=0.0, step=1, grad_scale=scale)


# ---- moments in 8 bits ----------------------------------------------------------------------------------------------
def run_8bit(n: int, steps: int, cuts: tuple[slice, ...] | None = None, **settings) -> tuple[Tensor, list[Moment8]]:
    param, moments = buffers(n)[0], [moments8.zeros(n, signed, torch.device("cpu")) for signed in (True, False)]
    for step in range(1, steps + 1):
        grad = gradient(n, step)
        for cut in cuts or (slice(0, n),):
            adamw_8bit_(param[cut], grad[cut], *(m.part(cut) for m in moments),
                        **SETTINGS | {"weight_decay": 0.0} | settings, step=step)
    return param, moments


@pytest.mark.parametrize("n", [1, 256, 1237])
def test_the_first_step_in_8_bits_is_that_of_fp32(n):
    """Both start from zero moments, and a step uses them before they are encoded."""
    p, m, v = run(adamw_, n, 1, weight_decay=0.1)
    ours, moments = run_8bit(n, 1, weight_decay=0.1)
    torch.testing.assert_close(ours, p, rtol=5e-7, atol=5e-7)
    for values, moment in zip((m, v), moments, strict=True):
        wanted = moments8.zeros(n, moment.signed, torch.device("cpu"))
        moments8.encode_(wanted, values)
        torch.testing.assert_close(moment.absmax, wanted.absmax)
        assert (moment.codes.int() - wanted.codes.int()).abs().max() <= 1, "a value within rounding of a midpoint"


@pytest.mark.skipif(bool(backends.missing("native", CPU)), reason=str(backends.missing("native", CPU)))
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("n", [1, 255, 256, 1000, 70_001])
def test_8_bits_in_cpp_are_the_references(n, isa, monkeypatch):
    """Numbers that are not finite included; a square root may differ in its last bit."""
    monkeypatch.setenv("MINITUNE_CPU_ISA", isa)
    from minitune import _C
    try:
        _C.cpu_isa()
    except RuntimeError as error:
        pytest.skip(str(error))
    found = []
    for op in (adamw_8bit_, adamw_8bit_reference_):
        param, moments = buffers(n)[0], [moments8.zeros(n, signed, CPU) for signed in (True, False)]
        for step in range(1, 6):
            grad = gradient(n, step)
            if step == 4 and n > 300:
                grad[7], grad[300] = float("nan"), -float("inf")
            op(param, grad, *moments, **SETTINGS, weight_decay=0.1, step=step,
               grad_scale=torch.tensor(0.37) if step % 2 else None)
            found.append([param.clone(), grad, *(t.clone() for moment in moments for t in moment[:2])])
    for ours, theirs in zip(found[:5], found[5:], strict=True):
        torch.testing.assert_close(ours[0], theirs[0], rtol=5e-7, atol=5e-7, equal_nan=True)
        for a, b in zip(ours[1:], theirs[1:], strict=True):
            assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    assert found[4][2].bool().any()


def test_8_bits_take_the_extension_where_it_is(monkeypatch):
    if backends.missing("native", CPU):
        pytest.skip(backends.missing("native", CPU))
    monkeypatch.setattr(adamw, "adamw_8bit_reference_", None)
    param, _ = run_8bit(10, 1)
    assert not torch.equal(param, buffers(10)[0])
    with backends.use("reference"), pytest.raises(TypeError):
        run_8bit(10, 1)


def test_8_bits_are_repeatable_and_blind_to_cuts_at_blocks():
    n = CHUNK + 1000
    (whole, moments), (again, others) = run_8bit(n, 2), run_8bit(n, 2)
    parts, cut_moments = run_8bit(n, 2, (slice(0, 512), slice(512, 8192), slice(8192, n)))
    assert torch.equal(whole, again) and torch.equal(whole, parts)
    for a, b, c in zip(moments, others, cut_moments, strict=True):
        assert torch.equal(a.codes, b.codes) and torch.equal(a.codes, c.codes) and torch.equal(a.absmax, c.absmax)


def test_8_bits_with_a_scale_are_a_scaled_gradient():
    factor = torch.tensor(0.37)
    n, found, expected = 300, buffers(300)[0], buffers(300)[0]
    for param, grad, scale in ((found, gradient(n, 1), factor), (expected, gradient(n, 1) * factor, None)):
        moments = [moments8.zeros(n, signed, torch.device("cpu")) for signed in (True, False)]
        adamw_8bit_(param, grad, *moments, **SETTINGS, weight_decay=0.0, step=1, grad_scale=scale)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_8_bits_take_no_step_of_a_scale_that_is_nan(backend):
    if backend == "native" and backends.missing("native", CPU):
        pytest.skip("no extension")
    param, moments = run_8bit(700, 3)
    before = [t.clone() for t in (param, *(t for m in moments for t in (m.codes, m.absmax)))]
    grad = gradient(700, 4)
    with backends.use(backend):
        adamw_8bit_(param, grad, *moments, **SETTINGS, weight_decay=0.1, step=4, grad_scale=torch.tensor(float("nan")))
    after = (param, *(t for m in moments for t in (m.codes, m.absmax)))
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)) and bool(grad.isnan().all())


def test_one_gradient_a_thousand_times_the_others_does_not_blow_them_up():
    """Their squares lie below half of the first level. As 0 they would leave steps of hundreds of lr (seen: 515)."""
    n, lr = 256, 1e-3
    factors = torch.ones(n).index_fill_(0, torch.tensor([17]), 3000.0)
    param, moments = torch.zeros(n), [moments8.zeros(n, signed, torch.device("cpu")) for signed in (True, False)]
    largest = 0.0
    for step in range(1, 200):
        before, grad = param.clone(), torch.randn(n, generator=torch.Generator().manual_seed(step)) * factors
        adamw_8bit_(param, grad, *moments, lr=lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=step)
        largest = max(largest, float((param - before).abs().max()) / lr)
    assert largest < 5


def test_8_bits_refuse_other_moments_by_name():
    p, g = torch.zeros(300), torch.zeros(300)
    first, second = (moments8.zeros(300, signed, torch.device("cpu")) for signed in (True, False))
    for bad, message in (((second, second), r"exp_avg\.signed is False"),
                         ((first, moments8.zeros(200, False, torch.device("cpu"))), r"exp_avg_sq\.codes .*\[200\]")):
        with pytest.raises(InputError, match=message):
            adamw_8bit_(p, g, *bad, **SETTINGS, weight_decay=0.0, step=1)
