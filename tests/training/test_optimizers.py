"""AdamW and SGD: against torch.optim over random shapes, repeatable, converging, and torch's habits kept."""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from minitune.errors import InputError
from minitune.training import flat
from minitune.training.optimizers import MOMENTS, SGD, AdamW, clip_grad_norm

SHAPES = [(7, 5), (1,), (33,), (4, 3, 2), (16, 16), (0,), (252,), (2, 129)]


LAYOUTS = {"one buffer": flat.WHOLE, "some apart": 100, "each apart": 1}
"""From how many elements on a parameter is a buffer of its own."""


@pytest.fixture(autouse=True, params=LAYOUTS)
def layout(request, monkeypatch):
    monkeypatch.setattr(flat, "WHOLE", LAYOUTS[request.param])


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def backward(params: list[nn.Parameter], step: int, skip: tuple[int, ...] = ()) -> None:
    """A loss whose gradients are random numbers of the step."""
    generator = torch.Generator().manual_seed(1000 + step)
    factors = [torch.randn(p.shape, generator=generator) for p in params]
    sum((p * f).sum() for i, (p, f) in enumerate(zip(params, factors, strict=True)) if i not in skip).backward()


def assert_close(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_follows_torch_with_skipped_parameters_clipping_and_groups(weight_decay):
    ours, theirs = parameters(), parameters()

    def groups(p: list[nn.Parameter]) -> list[dict]:
        return [{"params": p[:3]}, {"params": p[3:], "lr": 1e-2, "weight_decay": weight_decay / 2}]

    mine = AdamW(groups(ours), lr=3e-3, weight_decay=weight_decay)
    torchs = torch.optim.AdamW(groups(theirs), lr=3e-3, weight_decay=weight_decay, foreach=False)
    for step in range(20):
        skip = () if step < 5 else (0, 5) if step < 9 else (1, 4)  # their step counts part ways
        for params, optimizer in ((ours, mine), (theirs, torchs)):
            optimizer.zero_grad()
            backward(params, step, skip)
        norm = mine.clip(2.0)
        expected = nn.utils.clip_grad_norm_(theirs, 2.0)
        assert norm.item() == pytest.approx(expected.item(), rel=1e-6) and norm.item() > 2
        mine.step()
        torchs.step()
    assert_close(ours, theirs)


@pytest.mark.parametrize(("momentum", "nesterov", "decay"), [(0.0, False, 0.0), (0.9, False, 0.1), (0.9, True, 0.0)])
def test_sgd_follows_torch_with_decoupled_decay(momentum, nesterov, decay):
    ours, theirs = parameters(), parameters()
    mine = SGD(ours, lr=0.01, momentum=momentum, nesterov=nesterov, weight_decay=decay)
    torchs = torch.optim.SGD(theirs, lr=0.01, momentum=momentum, nesterov=nesterov)
    for step in range(20):
        skip = (2,) if step % 3 == 0 else ()  # its first step comes later than the others'
        for params, optimizer in ((ours, mine), (theirs, torchs)):
            optimizer.zero_grad()
            backward(params, step, skip)
        for p in theirs:
            if p.grad is not None:
                p.data.mul_(1 - 0.01 * decay)
        mine.step()
        torchs.step()
    assert_close(ours, theirs)


@pytest.mark.parametrize("make", [lambda p: AdamW(p, lr=0.01, weight_decay=0.1), lambda p: SGD(p, 0.01, momentum=0.9),
                                  lambda p: AdamW(p, lr=0.01, moments="8bit")])
def test_is_bitwise_repeatable(make):
    results = []
    for _ in range(2):
        params = parameters()
        optimizer = make(params)
        for step in range(5):
            optimizer.zero_grad()
            backward(params, step)
            optimizer.clip(1.0)
            optimizer.step()
        results.append([p.detach().clone() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("make", [lambda p: AdamW(p, lr=0.05), lambda p: SGD(p, 0.1, momentum=0.9, nesterov=True),
                                  lambda p: AdamW(p, lr=0.05, moments="8bit")])
def test_converges_on_least_squares(make):
    generator = torch.Generator().manual_seed(0)
    x, truth = torch.randn(64, 6, generator=generator), torch.randn(6, 3, generator=generator)
    weight = nn.Parameter(torch.zeros(6, 3))
    optimizer = make([weight])
    for _ in range(400):
        optimizer.zero_grad()
        (x @ weight - x @ truth).square().mean().backward()
        optimizer.step()
    assert ((weight - truth).norm() / truth.norm()).item() < 1e-3


def test_version_counters_move_for_those_that_moved():
    params = parameters()
    optimizer = AdamW(params)
    backward(params, 0, skip=(4,))
    before = [p._version for p in params]
    optimizer.step()
    assert [p._version > v for p, v in zip(params, before, strict=True)] == [i != 4 for i in range(len(params))]


def test_a_parameter_without_gradient_neither_decays_nor_moves():
    params = parameters()
    optimizer = AdamW(params, lr=0.1, weight_decay=0.5)
    backward(params, 0)
    optimizer.step()
    optimizer.zero_grad()
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    optimizer.zero_grad(set_to_none=False)  # a gradient of zero is a gradient
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(params, before, strict=True) if p.numel())


def test_foreign_gradients_and_storages_are_taken_in():
    ours, theirs = parameters(), parameters()
    mine, torchs = AdamW(ours, lr=0.01), torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.0)
    for step in range(4):
        for params in (ours, theirs):
            for p in params:
                p.grad = None  # as nn.Module.zero_grad does
            backward(params, step)
            params[0].grad = params[0].grad * 3
            if step == 2:
                params[1].data = params[1].data + 1
        mine.step()
        torchs.step()
    assert_close(ours, theirs)
    if max(p.numel() for p in ours) < flat.WHOLE:
        assert ours[1].untyped_storage().data_ptr() == ours[0].untyped_storage().data_ptr()


def test_a_gradient_from_before_the_optimizer_counts():
    ours, theirs = parameters(), parameters()
    backward(ours, 0)
    backward(theirs, 0)
    AdamW(ours, lr=0.01).step()
    torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.0).step()
    assert_close(ours, theirs)


def continued(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(params, step, skip=(2,) if step == 1 else ())
        optimizer.step()


MAKERS = {
    "adamw": (lambda p: AdamW(p, lr=0.01, weight_decay=0.1), lambda p: torch.optim.AdamW(p, lr=0.5, weight_decay=0.9)),
    "sgd": (lambda p: SGD(p, 0.01, momentum=0.9), lambda p: torch.optim.SGD(p, 0.5, momentum=0.1)),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_state_goes_to_torch_and_comes_back(kind):
    ours, torchs = MAKERS[kind]
    straight, there, back = parameters(), parameters(), parameters()
    continued(ours(straight), straight, range(9))

    first = ours(there)
    continued(first, there, range(3))
    theirs = torchs(there)  # torch's optimizer on the same parameters, with our state and settings
    theirs.load_state_dict(copy.deepcopy(first.state_dict()))
    continued(theirs, there, range(3, 6))

    with torch.no_grad():
        for a, b in zip(back, there, strict=True):
            a.copy_(b)
    last = ours(back)
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    last.load_state_dict(torch.load(file))
    continued(last, back, range(6, 9))
    assert_close(back, straight)


def test_state_dict_has_torchs_format():
    params, theirs = parameters(), parameters()
    optimizer, torchs = AdamW(params), torch.optim.AdamW(theirs)
    assert optimizer.state_dict()["state"] == {}
    continued(optimizer, params, range(2))
    continued(torchs, theirs, range(2))
    ours, expected = optimizer.state_dict()["state"], torchs.state_dict()["state"]
    assert ours.keys() == expected.keys()
    for index, entry in expected.items():
        assert ours[index].keys() == entry.keys()
        assert all(ours[index][k].shape == v.shape and ours[index][k].dtype == v.dtype for k, v in entry.items())
    assert [ours[i]["step"].item() for i in range(3)] == [2, 2, 1]


@pytest.mark.parametrize("moments", MOMENTS)
def test_resume_is_bitwise_and_an_empty_state_resets(moments):
    straight, resumed = parameters(), parameters()
    continued(AdamW(straight, lr=0.01, moments=moments), straight, range(6))
    first = AdamW(resumed, lr=0.01, moments=moments)
    continued(first, resumed, range(3))
    empty, state = AdamW(parameters()).state_dict(), copy.deepcopy(first.state_dict())
    second = AdamW(resumed, lr=0.3, moments=moments)
    second.load_state_dict(empty)
    second.load_state_dict(state)
    continued(second, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(resumed, straight, strict=True))
    second.load_state_dict(empty)
    assert not second.state_dict()["state"]
    fresh = copy.deepcopy(resumed)
    continued(second, resumed, range(6, 8))
    continued(AdamW(fresh, lr=empty["param_groups"][0]["lr"], moments=moments), fresh, range(6, 8))
    assert all(torch.equal(a, b) for a, b in zip(resumed, fresh, strict=True))


@pytest.mark.parametrize("moments", MOMENTS)
def test_a_deep_copy_goes_on_alone(moments):
    module = nn.Linear(5, 3)
    optimizer = AdamW(module.parameters(), lr=0.1, moments=moments)
    module(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    twin, twin_optimizer = copy.deepcopy((module, optimizer))
    for m, o in ((module, optimizer), (twin, twin_optimizer)):
        o.zero_grad()
        m(torch.ones(2, 5)).square().sum().backward()
        o.step()
    assert torch.equal(module.weight, twin.weight)
    assert module.weight.data_ptr() != twin.weight.data_ptr()
    assert twin_optimizer.state[twin.weight]["step"].item() == 2


def test_schedulers_and_closures_work():
    weight = nn.Parameter(torch.tensor([3.0]))
    optimizer = AdamW([weight], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9
    assert weight.item() == pytest.approx(2.9, abs=1e-5)
    scheduler.step()
    optimizer.step(closure)
    assert weight.item() == pytest.approx(2.85, abs=1e-4)


@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: torch.optim.SGD(p, lr=1.0)])
def test_clip_of_plain_parameters_and_torch_optimizers(wrap):
    ours, theirs = parameters()[1:], parameters()[1:]
    backward(ours, 0, skip=(2,))
    backward(theirs, 0, skip=(2,))
    norm, expected = clip_grad_norm(wrap(ours), 0.5), nn.utils.clip_grad_norm_(theirs, 0.5)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)
    assert clip_grad_norm(wrap(ours), None).item() == pytest.approx(0.5, rel=1e-5)


def test_parameters_frozen_or_moved_later():
    module = nn.Linear(4, 4)
    module.bias.requires_grad_(False)
    optimizer = AdamW(module.parameters(), weight_decay=0.1)
    bias = module.bias.detach().clone()
    module(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert module.bias.grad is None and torch.equal(module.bias, bias)
    module.to(torch.float64)
    with pytest.raises(InputError, match=r"parameter 0 .*torch\.float64 .*make the optimizer"):
        optimizer.step()


@pytest.mark.parametrize(("make", "message"), [
    (lambda: AdamW([]), "params is empty"),
    (lambda: AdamW(torch.zeros(3)), "params is one tensor"),
    (lambda: AdamW(["x"]), "parameter 0 of group 0 is a str"),
    (lambda: AdamW(parameters(), lr=float("nan")), "lr is nan"),
    (lambda: AdamW(parameters(), lr=torch.tensor(0.1)), "lr is tensor"),
    (lambda: AdamW(parameters(), betas=(0.9, 1.0)), r"betas is \(0\.9, 1\.0\)"),
    (lambda: AdamW(parameters(), betas=(True, 0.9)), r"betas is \(True, 0\.9\)"),
    (lambda: AdamW(parameters(), lr=True), "lr is True; it must be a finite number"),
    (lambda: AdamW(parameters(), betas=0.9), r"betas is 0\.9; it must be two numbers"),
    (lambda: AdamW(parameters(), betas=(0.9, "a")), r"betas is \(0\.9, 'a'\)"),
    (lambda: AdamW(None), "params is None; give a list"),
    (lambda: AdamW({"params": parameters()}), "give a list of parameters, or of groups"),
    (lambda: AdamW([{"lr": 0.1}]), r"group 0 is \{'lr': 0\.1\}; it must be a table"),
    (lambda: AdamW([{"params": parameters()}, parameters()[0]]), "group 1 is .*; it must be a table"),
    (lambda: AdamW([{"params": 3}]), "group 0 is"),
    (lambda: SGD(parameters(), lr=0.1, momentum=2), "momentum is 2; it must be below 1"),
    (lambda: AdamW(parameters(), weight_decay="a"), "weight_decay is 'a'"),
    (lambda: AdamW(parameters(), eps=-1.0), "eps is -1"),
    (lambda: AdamW([{"params": parameters(), "weight_decay": -0.1}]), "weight_decay is -0.1"),
    (lambda: SGD(parameters(), lr=0.1, momentum=-1), "momentum is -1"),
    (lambda: SGD(parameters(), lr=0.1, nesterov=True), "nesterov is True"),
    (lambda: AdamW(parameters(), moments="int8"), "moments is 'int8'; it must be one of fp32, 8bit"),
    (lambda: SGD(parameters(), lr=0.1, moments="8bit"), "moments is '8bit'; it keeps its momentum in fp32 only"),
    (lambda: AdamW([("l.0.A", nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)))]), r"l\.0\.A is .*bfloat16"),
    (lambda: AdamW([torch.zeros(3, requires_grad=True) * 2]), "no dense leaf"),
    (lambda: AdamW([(p := nn.Parameter(torch.zeros(3))), p]), "given twice"),
    (lambda: AdamW([nn.Parameter((t := torch.zeros(9))[:6]), nn.Parameter(t[3:])]), "share memory"),
])
def test_refuses_bad_arguments_by_name(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_refuses_states_that_do_not_fit():
    params = parameters()
    optimizer = AdamW(params)
    backward(params, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    other = [nn.Parameter(torch.zeros(2, 2)) for _ in SHAPES]
    theirs = torch.optim.AdamW(other, amsgrad=True)
    with pytest.raises(InputError, match="amsgrad=True"):
        optimizer.load_state_dict(theirs.state_dict())
    stranger = AdamW(other)
    for p in other:
        p.grad = torch.ones(2, 2)
    stranger.step()
    with pytest.raises(InputError, match=r"exp_avg of parameter 0 is \[2, 2\], the parameter is \[7, 5\]"):
        optimizer.load_state_dict(stranger.state_dict())
    with pytest.raises(InputError, match=r"groups of \[1\] parameters, this optimizer has \[8\]"):
        optimizer.load_state_dict(AdamW([nn.Parameter(torch.zeros(1))]).state_dict())
    decayed = torch.optim.SGD(parameters(), lr=0.1, weight_decay=0.1).state_dict()
    with pytest.raises(InputError, match=r"weight_decay=0\.1 as a part of the gradient"):
        SGD(params, lr=0.1).load_state_dict(decayed)
    after = optimizer.state_dict()
    assert all(torch.equal(after["state"][0][k], v) for k, v in before["state"][0].items())


def test_making_and_stepping_does_not_import_dynamo():
    """torch's own add_param_group and zero_grad do, which costs a second of every start."""
    code = ("import sys, torch; from minitune.training.optimizers import AdamW; p = torch.nn.Parameter(torch.ones(3)); "
            "o = AdamW([p]); (p * 2).sum().backward(); o.clip(1.0); o.step(); o.zero_grad(); "
            "sys.exit('torch._dynamo' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
