"""moments8: bitsandbytes' levels, the nearest of them, no square that becomes 0; and how AdamW fares with them."""

from __future__ import annotations

import copy

import pytest
import torch

from minitune.errors import InputError
from minitune.ops import moments8, nf4
from minitune.training.optimizers import AdamW

CPU = torch.device("cpu")
SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def encoded(values: torch.Tensor, signed: bool) -> moments8.Moment8:
    moment = moments8.zeros(len(values), signed, CPU)
    moments8.encode_(moment, values)
    return moment


@SIGNS
def test_the_levels_are_those_of_bitsandbytes(signed):
    oracle = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    levels = moments8.table(signed, CPU)[0]
    assert torch.equal(levels, oracle.create_dynamic_map(signed=signed))
    assert len(levels.unique()) == 256 and torch.equal(levels, levels.sort().values)


def test_the_signed_levels_are_those_of_nested_quantisation():
    assert torch.equal(moments8.table(True, CPU)[0], nf4.nested_code(CPU))


@SIGNS
def test_the_tree_finds_what_bisection_finds(signed):
    levels, tree = moments8.table(signed, CPU)
    midpoints = (levels[1:] + levels[:-1]) / 2
    values = torch.cat([torch.rand(5000) * 2 - 1, levels, midpoints, midpoints.nextafter(torch.tensor(2.0)),
                        torch.tensor([float("nan"), float("inf"), -float("inf")])])
    node = torch.ones(len(values), dtype=torch.long)
    for _ in range(8):
        node = 2 * node + (~(values <= tree[node])).long()
    assert torch.equal(node - 256, torch.bucketize(values, midpoints))


@SIGNS
@pytest.mark.parametrize("n", [0, 1, 255, 256, 1000])
def test_every_value_gets_the_nearest_level_of_its_block(signed, n):
    values = torch.randn(n) * torch.logspace(-8, 3, n)[torch.randperm(n)]
    values = values if signed else values.abs()
    moment, levels = encoded(values, signed), moments8.table(signed, CPU)[0].double()
    for block, scale, codes in zip(values.split(256), moment.absmax, moment.codes.split(256), strict=False):
        assert scale == block.abs().max()
        distance = (block.double()[:, None] - levels * scale.double()).abs()
        if not signed:
            distance[:, 0] = float("inf")
        own = distance.gather(1, codes.long()[:, None])[:, 0]
        assert bool((own <= distance.amin(1) * (1 + 1e-5)).all())
    decoded = moments8.decode(moment)
    assert torch.equal(decoded, moments8.table(signed, CPU)[0][moment.codes.long()]
                       * moment.absmax.repeat_interleave(256)[:n])
    if n:
        assert (decoded - values).abs().max() <= 0.05 * values.abs().max()


@SIGNS
def test_zeros_are_zero_and_stay_zero(signed):
    zeros = moments8.zeros(300, signed, CPU)
    assert not moments8.decode(zeros).any()
    again = encoded(torch.zeros(300), signed)
    assert torch.equal(again.codes, zeros.codes) and torch.equal(again.absmax, zeros.absmax)
    assert not moments8.decode(encoded(torch.full((300,), 1e-45), signed)).isnan().any()


def test_a_square_that_is_not_zero_does_not_become_zero():
    values = torch.tensor([1.0, 1e-12, 0.0, 3e-7])
    decoded = moments8.decode(encoded(values, signed=False))
    assert (decoded > 0).tolist() == [True, True, False, True]
    assert decoded[1] == decoded[3] == moments8.table(False, CPU)[0][1]


def test_a_part_is_a_run_of_whole_blocks():
    values = torch.randn(1000)
    moment, part = encoded(values, True), slice(256, 1000)
    alone = encoded(values[part], True)
    assert torch.equal(moment.part(part).codes, alone.codes) and torch.equal(moment.part(part).absmax, alone.absmax)
    moment.part(slice(512, 600)).absmax.fill_(5.0)
    assert moment.absmax[2] == 5.0 and moment.part(slice(512, 512)).absmax.numel() == 0


@pytest.mark.parametrize(("change", "message"), [
    (lambda m: m._replace(codes=m.codes.int()), r"exp_avg\.codes is torch\.int32 \[300\]"),
    (lambda m: m._replace(absmax=m.absmax[:1]), r"exp_avg\.absmax is torch\.float32 \[1\].*for 300 values .* \[2\]"),
    (lambda m: m._replace(codes=m.codes.repeat(2)[::2]), r"must be a contiguous torch\.uint8 \[300\]"),
    (lambda m: m._replace(signed=False), r"exp_avg\.signed is False"),
])
def test_refuses_what_does_not_fit_by_name(change, message):
    moment = moments8.zeros(300, True, CPU)
    moments8.check("op", "exp_avg", moment, True, torch.zeros(300))
    with pytest.raises(InputError, match=message):
        moments8.check("op", "exp_avg", change(moment), True, torch.zeros(300))


# ---- in the optimizer -----------------------------------------------------------------------------------------------
def trained(optimizer: AdamW, steps: int, x: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    weight = optimizer.param_groups[0]["params"][0]
    for _ in range(steps):
        optimizer.zero_grad()
        (x @ (weight - truth)).square().mean().backward()
        optimizer.step()
    return weight.detach()


def test_adamw_stays_within_5_percent_of_fp32_in_a_quarter_of_the_memory():
    """Least squares, two thirds of the way to the truth, where paths part most (seen: 2.7 %)."""
    x, truth = torch.randn(256, 64), torch.randn(64, 16)
    optimizers = [AdamW([torch.zeros(64, 16, requires_grad=True)], lr=0.01, moments=m) for m in ("fp32", "8bit")]
    expected, found = (trained(optimizer, 300, x, truth) for optimizer in optimizers)
    assert 0 < ((found - expected).norm() / expected.norm()).item() < 0.05
    assert (x @ (found - truth)).square().mean() < 0.03 * (x @ truth).square().mean()
    wide, narrow = (sum(v.nbytes for k, v in o.state_dict()["state"][0].items() if k != "step") / 1024
                    for o in optimizers)
    assert wide == 8 and narrow <= 2.1


def test_no_block_has_values_of_two_parameters():
    """Gradients of 1 in one parameter leave what its neighbour in memory keeps as exact as if it were alone."""
    pair, alone = ([torch.zeros(n, requires_grad=True) for n in sizes] for sizes in ((300, 40), (40,)))
    both, single = AdamW(pair, moments="8bit"), AdamW(alone, moments="8bit")
    small = torch.randn(40) * 1e-6
    pair[0].grad.fill_(1.0)
    for parameter, optimizer in ((pair[1], both), (alone[0], single)):
        parameter.grad.copy_(small)
        optimizer.step()
    for name, value in single.state[alone[0]].items():
        assert torch.equal(value, both.state[pair[1]][name]), name
    assert both.state[pair[0]]["exp_avg_absmax"].shape == (2,)


def test_a_state_of_the_other_kind_is_converted():
    x, truth = torch.randn(90, 30), torch.randn(30, 20)
    first, second, third = (AdamW([torch.zeros(30, 20, requires_grad=True)], moments=moments)
                            for moments in ("fp32", "8bit", "fp32"))
    trained(first, 5, x, truth)
    second.load_state_dict(first.state_dict())
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    assert [o.param_groups[0]["moments"] for o in (second, third)] == ["8bit", "fp32"]
    wide, narrow, again = (o.state_dict()["state"][0] for o in (first, second, third))
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        moment = encoded(wide[name].view(-1), signed)
        assert torch.equal(narrow[f"{name}_codes"], moment.codes.view(30, 20))
        assert torch.equal(narrow[f"{name}_absmax"], moment.absmax)
        assert torch.equal(again[name], moments8.decode(moment).view(30, 20))
    assert wide["step"] == narrow["step"] == again["step"] == 5 and narrow.keys() & wide.keys() == {"step"}
    trained(second, 2, x, truth)
    assert second.state_dict()["state"][0]["step"] == 7


@pytest.mark.parametrize(("change", "message"), [
    (lambda entry: entry.update(exp_avg_absmax=torch.zeros(9)), r"exp_avg_absmax of parameter 0 is \[9\]"),
    (lambda entry: entry.update(exp_avg_sq_codes=torch.zeros(3)), r"exp_avg_sq_codes of parameter 0 is \[3\]"),
    (lambda entry: entry.pop("exp_avg_absmax"), "it needs step, exp_avg, exp_avg_sq"),
])
def test_a_state_that_does_not_fit_is_refused(change, message):
    optimizer = AdamW([torch.zeros(300, requires_grad=True)], moments="8bit")
    optimizer.param_groups[0]["params"][0].grad.fill_(1.0)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    change(state["state"][0])
    with pytest.raises(InputError, match=message):
        optimizer.load_state_dict(state)
