"""attention: the Triton kernels against the reference: output, log-sum-exp and gradients, whatever the documents, the
window, the tiles and the pitch of rows."""

import math
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from minitune.kernels import attention
from minitune.kernels.launch import Config
from minitune.ops.attention import reference
from minitune.ops.documents import Documents
from tests.tolerance import check, check_rms, relative

MIXED = (37, 1, 64, 5, 90)
PAD = 8
"""Columns behind each row of a buffer, which belong to nobody."""


@dataclass(frozen=True)
class Case:
    """tiles: (BLOCK_M, BLOCK_N) of every kernel, None = what the device is launched with."""

    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    d: int
    window: int | None = None
    tiles: tuple[int, int] | None = None


CASES = {
    "several documents a tile": Case(MIXED, 6, 2, 64, None, (32, 32)),
    "several tiles a document, wide in keys": Case((100, 31), 2, 2, 40, None, (16, 32)),
    "several tiles a document, wide in queries": Case((100, 32), 3, 1, 40, None, (32, 16)),
    "short documents in small tiles": Case((37, 1, 16, 5, 32), 2, 2, 80, None, (16, 16)),
    "a window within a tile": Case(MIXED, 2, 1, 80, 5, (32, 32)),
    "a window over several tiles": Case((90, 3, 40), 2, 1, 40, 40, (16, 16)),
    "a window with a middle, wide in queries": Case((120,), 2, 1, 64, 70, (32, 16)),
    "a window beyond the stream": Case((40, 9), 4, 4, 64, 2**31 - 1, (16, 32)),
    "tiles that documents fill": Case((64, 32, 32), 2, 1, 32, None, (32, 32)),
    "head 5": Case((70, 33), 2, 1, 5, None, (32, 32)),
}
DEFAULT = {
    "head 64": Case((400, 1, 23, 100), 1, 1, 64),
    "head 80": Case((500, 1, 23, 200), 1, 1, 80),
    "head 96, a window": Case((500, 1, 23, 200), 1, 1, 96, 200),
    "head 128": Case((500, 1, 23, 200), 2, 1, 128),
    "head 256": Case((200, 1, 50), 2, 1, 256),
}


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty gives NaN: nothing may be read that was not written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _config(case):
    if case.tiles is None:
        return None
    return Config({"BLOCK_M": case.tiles[0], "BLOCK_N": case.tiles[1], "STAGES": 2}, num_warps=4, num_stages=2)


def _bounds(lengths, device):
    """starts, ends int32 [T]"""
    sizes = torch.tensor(lengths)
    ends = sizes.cumsum(0)
    return [x.repeat_interleave(sizes).to(torch.int32).to(device) for x in (ends - sizes, ends)]


def _split(buffer, case):
    """q, k, v of rows [(heads + 2 kv_heads) · D + PAD]: views."""
    parts = buffer[:, :-PAD].unflatten(1, (-1, case.d)).split([case.heads, case.kv_heads, case.kv_heads], dim=1)
    assert all(part.data_ptr() >= buffer.data_ptr() and part.stride(2) == 1 for part in parts)
    return parts


def _inputs(case, dtype):
    tokens = sum(case.lengths)
    qkv = torch.randn(tokens, (case.heads + 2 * case.kv_heads) * case.d + PAD)
    qkv[:, -PAD:] = math.nan
    return qkv.to(dtype), torch.randn(tokens, case.heads, case.d).to(dtype)


def _poisoned(*shape, dtype, device):
    return torch.full(shape, math.nan, dtype=dtype, device=device)


def _run(case, qkv, dout, device):
    """{"out", "lse", "dq", "dk", "dv"} by the kernels, written into poisoned buffers."""
    qkv, dout = qkv.to(device), dout.to(device)
    starts, ends = _bounds(case.lengths, device)
    q, k, v = _split(qkv, case)
    config = _config(case)
    rows = _poisoned(len(q), case.heads * case.d + PAD, dtype=q.dtype, device=device)
    out = rows[:, :-PAD].unflatten(1, (-1, case.d))
    d_qkv = _poisoned(*qkv.shape, dtype=q.dtype, device=device)
    same, lse = attention.forward(q, k, v, starts, case.window, out=out, config=config)
    gradients = attention.backward(dout, q, k, v, out, lse, starts, ends, case.window, gradients=_split(d_qkv, case),
                                   dq_config=config, dkdv_config=config)
    assert same is out and [x.data_ptr() for x in gradients] == [x.data_ptr() for x in _split(d_qkv, case)]
    assert rows[:, -PAD:].isnan().all() and d_qkv[:, -PAD:].isnan().all(), "written behind the rows"
    return {name: x.cpu() for name, x in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), strict=True)}


def _expected(case, qkv, dout, dtype):
    """The same by the reference and autograd, computed in `dtype`."""
    documents = Documents.from_lengths(case.lengths)
    q, k, v = (x.to(dtype).requires_grad_() for x in _split(qkv, case))
    out = reference(q, k, v, documents, case.window)
    gradients = torch.autograd.grad(out, (q, k, v), dout.to(dtype))
    lse = _lse(q.detach(), k.detach(), case, torch.promote_types(dtype, torch.float32))
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse, *gradients), strict=True))


def _lse(q, k, case, dtype):
    """[heads, T]"""
    starts = _bounds(case.lengths, "cpu")[0]
    place = torch.arange(len(q))
    hidden = (place > place[:, None]) | (place < starts[:, None])
    if case.window is not None:
        hidden |= place <= place[:, None] - case.window
    keys = k.repeat_interleave(case.heads // case.kv_heads, dim=1).to(dtype).transpose(0, 1)
    scores = q.to(dtype).transpose(0, 1) @ keys.mT / math.sqrt(case.d)
    return scores.masked_fill(hidden, -math.inf).logsumexp(-1)


def _check(case, dtype, device, factor=1):
    qkv, dout = _inputs(case, dtype)
    qkv *= factor
    found = _run(case, qkv, dout, device)
    plain, truth = (_expected(case, qkv, dout, kind) for kind in (dtype, torch.float64))
    for name, value in found.items():
        if dtype != torch.float32:
            check(name, value, plain[name], truth[name])
            continue
        # A GPU adds the products of a dot one by one, the CPU's library in many lanes: single values of short documents
        # differ by more than twice of what plain PyTorch errs by there.
        check_rms(name, value, plain[name], truth[name])
        assert value.isfinite().all() and relative(value, truth[name]) < 2e-6, name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_output_and_gradients_are_the_references(case, device):
    _check(case, torch.float32, device)


@pytest.mark.parametrize("case", DEFAULT.values(), ids=DEFAULT)
def test_as_it_is_launched(case, device):
    _check(case, torch.bfloat16, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(dtype, device):
    _check(CASES["a window over several tiles"], dtype, device)


def test_large_scores_do_not_overflow(device):
    """Scores of some hundred: a hidden one may lie far above all that a row sees."""
    _check(Case((50, 30), 2, 1, 32, None, (16, 16)), torch.bfloat16, device, factor=8)


@pytest.mark.parametrize("case", [
    Case((20, 13), 2, 2, 64, 1, (16, 16)), Case((1,), 2, 1, 64), Case((1,) * 40, 1, 1, 64, None, (16, 32))],
    ids=["a window of one", "one token", "documents of one"])
def test_tokens_that_see_themselves_alone(case, device):
    """The output is v and nothing reaches q and k, but for what two ways of summing dout·out differ by."""
    qkv, dout = _inputs(case, torch.float32)
    found = _run(case, qkv, dout, device)
    q, k, v = _split(qkv, case)
    group = case.heads // case.kv_heads
    torch.testing.assert_close(found["out"], v.repeat_interleave(group, 1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["dv"], dout.unflatten(1, (-1, group)).sum(2), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["lse"], (q * k.repeat_interleave(group, 1)).sum(-1).T / 8, rtol=1e-6, atol=1e-6)
    assert max(float(found[name].abs().max()) for name in ("dq", "dk")) < 1e-5


def test_fresh_outputs_and_any_layout(device):
    """Without buffers of the caller; heads outermost in memory, and an upstream gradient that is not contiguous."""
    case = CASES["tiles that documents fill"]
    qkv, dout = _inputs(case, torch.float32)
    q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1).to(device) for x in _split(qkv, case))
    upstream = dout.transpose(1, 2).contiguous().transpose(1, 2).to(device)
    starts, ends = _bounds(case.lengths, device)
    out, lse = attention.forward(q, k, v, starts, None)
    gradients = attention.backward(upstream, q, k, v, out, lse, starts, ends, None)
    assert out.is_contiguous() and all(x.is_contiguous() for x in gradients)
    plain, truth = (_expected(case, qkv, dout, kind) for kind in (torch.float32, torch.float64))
    for name, value in zip(truth, (out, lse, *gradients), strict=True):
        check(name, value.cpu(), plain[name], truth[name])


def test_no_tokens(device):
    q, k = torch.empty(0, 4, 32, device=device), torch.empty(0, 2, 32, device=device)
    bounds = torch.empty(0, dtype=torch.int32, device=device)
    out, lse = attention.forward(q, k, k, bounds, None)
    gradients = attention.backward(out, q, k, k, out, lse, bounds, bounds, None)
    assert lse.shape == (4, 0) and [x.shape for x in gradients] == [q.shape, k.shape, k.shape]


def test_bitwise_repeatable(device):
    case = Case((250, 1, 100), 2, 1, 128)
    qkv, dout = _inputs(case, torch.bfloat16)
    first, second = (_run(case, qkv, dout, device) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
