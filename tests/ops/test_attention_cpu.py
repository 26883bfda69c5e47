"""attention_cpu: tiles and blocks against the dense reference in fp64; the tiles' operators as torch sees them."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from minitune.ops import attention, attention_cpu, backends
from minitune.ops.deterministic import deterministic
from minitune.ops.documents import Documents
from tests.tolerance import check, relative

CPU = torch.device("cpu")
BF16 = torch.bfloat16
has_tiles = backends.backends("cpu")["attention"] == "native"
UNITS = ("avx512_bf16", "amx")
needs_tiles = pytest.mark.skipif(not has_tiles, reason="no CPU that multiplies bf16, or no extension")


def _units():
    """Those of UNITS that are here."""
    from minitune import _C

    return UNITS[: UNITS.index(_C.cpu_isa()) + 1]


CASES = {       # lengths, heads, kv_heads, head_dim, window
    "one document": ((37,), 3, 3, 20, None),
    "one token": ((1, 1), 2, 1, 16, None),
    "several blocks": ((600,), 2, 1, 64, None),
    "just a slab": ((32, 64), 2, 2, 64, None),
    "equal side by side": ((40, 40, 40), 4, 2, 80, None),
    "equal apart": ((17, 30, 17, 0, 1, 30), 6, 2, 128, None),
    "many short": ((5, 17, 3, 20, 1, 33, 40, 31, 2, 18, 60, 63, 9), 4, 2, 96, None),
    "many short, window": ((5, 17, 3, 20, 33, 40, 31, 18), 4, 2, 48, 6),
    "window inside a block": ((50, 9), 2, 2, 256, 7),
    "window across blocks": ((530, 300), 2, 1, 64, 100),
    "window of two": ((70, 5), 2, 1, 64, 2),
    "window of slabs": ((200,), 2, 2, 64, 64),
    "window of many slabs": ((700,), 4, 2, 64, 300),
}


@pytest.fixture(params=[*UNITS, "blocks"])
def way(request, monkeypatch):
    if request.param == "blocks" and has_tiles:
        monkeypatch.setenv("MINITUNE_CPU_ISA", "avx512")
    elif request.param in UNITS:
        if not has_tiles or request.param not in _units():
            pytest.skip(f"no {request.param} here, or no extension")
        monkeypatch.setenv("MINITUNE_CPU_ISA", request.param)
    return request.param


def _inputs(lengths, heads, kv_heads, d, dtype=BF16):
    """q, k and v side by side as a layer has them, dout."""
    qkv = torch.randn(sum(lengths), heads + 2 * kv_heads, d).to(dtype)
    return [*qkv.split((heads, kv_heads, kv_heads), 1), torch.randn(sum(lengths), heads, d).to(dtype)]


def _run(q, k, v, dout, documents, window):
    """As a layer calls it: into rows and gradients with room behind them."""
    rows = torch.full((len(q), q[0].numel() + 8), float("nan"), dtype=q.dtype)
    out, saved = attention.forward(q, k, v, documents, window, rows=rows[:, : q[0].numel()])
    gradient = torch.full((len(q), q.shape[1] + 2 * k.shape[1] + 1, q.shape[2]), float("nan"), dtype=q.dtype)
    attention.backward(dout, saved, gradient[:, :-1])
    assert rows[:, -8:].isnan().all() and gradient[:, -1].isnan().all(), "written beside its place"
    return [out, *gradient[:, :-1].split((q.shape[1], k.shape[1], k.shape[1]), 1)]


def _reference(q, k, v, dout, documents, window):
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = attention.reference(q, k, v, documents, window)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward(case, way):
    *shape, window = CASES[case]
    documents, inputs = Documents.from_lengths(shape[0]), _inputs(*shape)
    assert attention.forward_way(*inputs[:2], documents, window) == ("native" if way in UNITS else "blocks")
    truth = _reference(*(x.double() for x in inputs), documents, window)
    plain = _reference(*inputs, documents, window)
    found = _run(*inputs, documents, window)
    for name, value, p, t in zip(("out", "dq", "dk", "dv"), found, plain, truth, strict=True):
        check(f"{name} ({case})", value, p, t)


@needs_tiles
def test_large_scores_lose_nothing():
    """The largest score is taken off before the exponential: a softmax that sees one key alone."""
    documents, (q, k, v, dout) = Documents.from_lengths((300,)), _inputs((300,), 2, 1, 64)
    inputs = q * 40, k * 40, v, dout
    truth, plain = _reference(*(x.double() for x in inputs), documents, None), _reference(*inputs, documents, None)
    check("out", attention.forward(*inputs[:3], documents)[0], plain[0], truth[0])
    lse = attention_cpu.forward_tiles(*inputs[:3], documents, None)[1]
    scores = torch.einsum("ihd,jd->hij", inputs[0].double(), inputs[1][:, 0].double()) / 8
    hidden = torch.ones(300, 300, dtype=torch.bool).triu(1)
    assert torch.allclose(lse.double(), scores.masked_fill(hidden, -torch.inf).logsumexp(-1), rtol=1e-6, atol=1e-4)


@needs_tiles
@pytest.mark.parametrize("size", [1e3, 1e6])
def test_scores_beyond_the_precision_of_their_sum(size):
    """Of a model that has diverged: each query sees one key, p is 1 or 0, and nothing overflows."""
    documents, (q, k, v, dout) = Documents.from_lengths((300,)), _inputs((300,), 2, 1, 64)
    inputs = q * size, k * size, v, dout
    out, *gradients = _run(*inputs, documents, None)
    truth = _reference(*(x.double() for x in inputs), documents, None)
    plain = _reference(*inputs, documents, None)
    check("out", out, plain[0], truth[0])
    assert all(x.isfinite().all() for x in gradients)


@needs_tiles
@pytest.mark.parametrize("window", [None, 40, 280])
@pytest.mark.parametrize(("lengths", "heads"), [((100, 7, 300, 33), (6, 3)), ((300,), (4, 1))], ids=["many", "one"])
def test_neither_threads_nor_what_lay_in_memory_before_change_a_bit(lengths, heads, window):
    documents, inputs = Documents.from_lengths(lengths), _inputs(lengths, *heads, 80)
    threads, found = torch.get_num_threads(), []
    try:
        for n, poisoned in ((1, False), (2, True), (3, False)):
            torch.set_num_threads(n)
            with deterministic(warn_only=True, fill=poisoned):
                bits = torch.empty(0).new_empty(64, dtype=torch.uint8)      # as the threads' room
                assert not poisoned or bits.view(BF16).isnan().all()
                found.append(_run(*inputs, documents, window))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_documents_do_not_see_each_other(way):
    """Not even a NaN among them."""
    lengths = (12, 20, 12)
    q, k, v, dout = _inputs(lengths, 2, 1, 64)
    documents = Documents.from_lengths(lengths)
    before = _run(q, k, v, dout, documents, None)
    for x in (q, k, v, dout):
        x[12:32] = float("nan")
    for a, b in zip(before, _run(q, k, v, dout, documents, None), strict=True):
        assert torch.equal(a[:12], b[:12]) and torch.equal(a[32:], b[32:]) and b[12:32].isnan().all()


@needs_tiles
def test_a_forward_goes_with_any_backward(monkeypatch):
    documents, inputs = Documents.from_lengths((70, 33)), _inputs((70, 33), 4, 2, 64)
    q, k, v, dout = inputs
    truth = _reference(*(x.double() for x in inputs), documents, None)
    plain = _reference(*inputs, documents, None)
    for first, second in (("", "avx512"), ("avx512", "")):
        monkeypatch.setenv("MINITUNE_CPU_ISA", first)
        saved = attention.forward(q, k, v, documents)[1]
        assert (saved.lse is None) == (first == "avx512")
        monkeypatch.setenv("MINITUNE_CPU_ISA", second)
        gradient = torch.empty(103, 8, 64, dtype=BF16)
        attention.backward(dout, saved, gradient)
        for name, value, p, t in zip(("dq", "dk", "dv"), gradient.split((4, 2, 2), 1), plain[1:], truth[1:],
                                     strict=True):
            check(name, value, p, t)


@pytest.mark.skipif(bool(backends.missing("native", CPU)), reason="no extension")
def test_a_cpu_with_tiles_is_known_as_one(monkeypatch):
    """Else every test of them would be skipped, unseen."""
    from minitune import _C

    monkeypatch.delenv("MINITUNE_CPU_ISA", raising=False)
    listed = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    vectors = all(f" {name} " in listed for name in ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"))
    known = vectors and all(f" {name} " in listed for name in ("amx_tile", "amx_bf16"))
    gcc = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True).stdout if vectors else "0"
    if vectors and int(gcc.split(".")[0]) < 11:
        pytest.skip("a compiler that cannot build them")
    permits = ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0 if known else False       # arch_prctl of x86-64
    assert (_C.cpu_isa() == "amx") == (known and permits)
    assert (_C.cpu_isa() in UNITS) == vectors


def test_when_tiles_are_taken(monkeypatch):
    documents = Documents.from_lengths((9,))
    q, k, *_ = _inputs((9,), 2, 1, 64)
    best = "native" if has_tiles else "blocks"
    assert attention.forward_way(q, k, documents, None) == best
    assert attention.forward_way(q.float(), k.float(), documents, None) == "blocks"
    with backends.use("reference"):
        assert attention.forward_way(q, k, documents, None) == "blocks"
    with backends.use("native") if not backends.missing("native", CPU) else backends.use("reference"):
        assert attention.forward_way(q, k, documents, None) == best
    monkeypatch.setenv("MINITUNE_CPU_ISA", "portable")
    assert attention.forward_way(q, k, documents, None) == "blocks"


def test_heads_that_lie_apart_are_brought_together(way):
    q, k, v, _ = _inputs((40,), 2, 2, 64)
    documents = Documents.from_lengths((40,))
    apart = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    assert torch.equal(attention.forward(*apart, documents)[0], attention.forward(q, k, v, documents)[0])


# ---- the operators ---------------------------------------------------------------------------------------------------
def _arguments(backward=False):
    q, k, v, dout = _inputs((9, 4), 4, 2, 16)
    starts, lse = torch.tensor([0, 9, 13], dtype=torch.int32), torch.zeros(4, 13)
    if not backward:
        return {"q": q, "k": k, "v": v, "starts": starts, "window": 0, "out": torch.empty_like(dout), "lse": lse}
    gradients = {f"d{name}": torch.empty_like(x) for name, x in (("q", q), ("k", k), ("v", v))}
    return {"dout": dout, "q": q, "k": k, "v": v, "out": dout.clone(), "lse": lse, "starts": starts, "window": 0,
            **gradients}


WRONG = [
    ({"q": torch.zeros(13, 4, 16)}, "q is Float, k BFloat16; both must be bfloat16"),
    ({"k": torch.zeros(13, 2, 16), "v": torch.zeros(13, 2, 16)}, "q is BFloat16, k Float; both must be bfloat16"),
    ({"q": torch.zeros(13, 4, 0, dtype=BF16), "k": torch.zeros(13, 2, 0, dtype=BF16)}, "q has heads without values"),
    ({"q": torch.zeros(13, 64, dtype=BF16)}, "q and k have 2 and 3 dimensions, not 3 each"),
    ({"k": torch.zeros(12, 2, 16, dtype=BF16)}, "tokens and head_dim must be the same"),
    ({"k": torch.zeros(13, 3, 16, dtype=BF16)}, "q has 4 heads, k 3; the first must be a multiple of the second"),
    ({"v": torch.zeros(13, 1, 16, dtype=BF16)}, "v is 13 x 1 x 16 of BFloat16; it must be 13 x 2 x 16"),
    ({"v": torch.zeros(2, 13, 16, dtype=BF16).transpose(0, 1)}, "v has rows that are not contiguous, or overlap"),
    ({"starts": torch.tensor([0, 9, 12], dtype=torch.int32)}, "starts must ascend from 0 to the 13 tokens of q"),
    ({"starts": torch.tensor([0, 14, 13], dtype=torch.int32)}, "starts must ascend from 0 to the 13 tokens of q"),
    ({"starts": torch.tensor([-1, 13], dtype=torch.int32)}, "starts must ascend from 0 to the 13 tokens of q"),
    ({"starts": torch.tensor([0, 13])}, "starts is Long; it must be Int"),
    ({"starts": torch.empty(0, dtype=torch.int32)}, "starts is empty"),
    ({"window": -1}, "window is -1; it must not be negative"),
    ({"lse": torch.zeros(4, 12)}, "lse has 48 elements; it must have 52"),
    ({"out": torch.zeros(13, 4, 8, dtype=BF16)}, "out is 13 x 4 x 8 of BFloat16; it must be 13 x 4 x 16"),
]


@needs_tiles
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_wrong_arguments_are_refused(wrong, message, backward):
    op = torch.ops.minitune.attention_tiles_backward if backward else torch.ops.minitune.attention_tiles
    op(**_arguments(backward))
    with pytest.raises(RuntimeError, match=message):
        op(**(_arguments(backward) | wrong))


@needs_tiles
def test_gradients_of_a_wrong_shape_are_refused():
    arguments = _arguments(backward=True) | {"dk": torch.zeros(13, 4, 16, dtype=BF16)}
    with pytest.raises(RuntimeError, match="dk is 13 x 4 x 16 of BFloat16; it must be 13 x 2 x 16"):
        torch.ops.minitune.attention_tiles_backward(**arguments)


@needs_tiles
def test_a_lower_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("MINITUNE_CPU_ISA", "avx512")
    with pytest.raises(RuntimeError, match=r"no products of bf16 here: .* or MINITUNE_CPU_ISA lowers it"):
        torch.ops.minitune.attention_tiles(**_arguments())


@needs_tiles
@pytest.mark.parametrize("lengths", [(0,), (0, 0)])
def test_nothing_to_do(lengths):
    q, k, v, dout = _inputs((), 2, 1, 64)
    out, saved = attention.forward(q, k, v, Documents.from_lengths(lengths))
    attention.backward(dout, saved, torch.empty(0, 4, 64, dtype=BF16))
    assert out.shape == (0, 2, 64) and saved.lse.shape == (2, 0)


@needs_tiles
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_as_torch_sees_it(backward):
    op = torch.ops.minitune.attention_tiles_backward if backward else torch.ops.minitune.attention_tiles
    torch.library.opcheck(op.default, tuple(_arguments(backward).values()))


def test_blocks_are_summed_in_fp32():
    """Equal scores, and 1 from every query: a value gets 1 / (how many keys the query sees), 64 blocks, 8 heads."""
    length, heads = 4096, 8
    q, k = torch.zeros(length, heads, 8).bfloat16(), torch.randn(length, 1, 8).bfloat16()
    documents = Documents.from_lengths((length,))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(k)
    attention_cpu.backward_blocks(torch.ones_like(q), q, k, k, documents, None, (dq, dk, dv))
    expected = heads * (1 / torch.arange(1, length + 1).double()).flip(0).cumsum(0).flip(0)
    assert relative(dv[:, 0], expected[:, None].expand(-1, 8)) < 2.2e-3
