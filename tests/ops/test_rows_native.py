"""rows_native: the extension's row ops on every instruction set, against fp64 by the rule, and as torch sees them."""

import pytest
import torch
import torch.nn.functional as F

from minitune.ops import backends, linear_cross_entropy, moments8, rms_norm, rope, swiglu
from tests.tolerance import check, relative

CPU = torch.device("cpu")
absent = backends.missing("native", CPU)
pytestmark = pytest.mark.skipif(bool(absent), reason=str(absent))
OPS = torch.ops.minitune
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=["portable", "avx2", "avx512"], autouse=True)
def isa(request, monkeypatch):
    monkeypatch.setenv("MINITUNE_CPU_ISA", request.param)
    from minitune import _C
    try:
        _C.cpu_isa()
    except RuntimeError as error:
        pytest.skip(str(error))


def _three(function, dtype, *operands):
    """(plain PyTorch in dtype, the truth in fp64) of function's results."""
    return ([r.detach() for r in function(*(x.to(kind) if x.is_floating_point() else x for x in operands))]
            for kind in (dtype, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 37), (3, 1), (4, 3, 20)], ids=str)
def test_rms_norm(shape, dtype):
    x, branch, dy, past = (torch.randn(shape).to(dtype) for _ in range(4))
    weight = torch.rand(shape[-1]).to(dtype) + 0.5

    def reference(x, branch, dy, past, weight):
        total = (x + branch).requires_grad_()
        y = rms_norm.reference(total, weight, 1e-5)
        return y, torch.autograd.grad(y, total, dy)[0] + past

    plain, truth = _three(reference, dtype, x, branch, dy, past, weight)
    buffer = torch.full((shape[0], x[0].numel() + 3), float("nan"), dtype=dtype)
    out = buffer[:, : x[0].numel()].view_as(x) if x.dim() == 2 else buffer[:, : x[0].numel()].unflatten(1, shape[1:])
    y, rstd, total = rms_norm.forward(x, weight, 1e-5, branch, out=out)
    assert y is out and bool(buffer[:, -3:].isnan().all()) and torch.equal(total, x + branch)
    check("y", y, plain[0], truth[0])
    assert torch.equal(rms_norm.apply(total, rstd, weight), y)
    check("dx", rms_norm.backward(dy, total, rstd, weight, past), plain[1], truth[1])
    alone = rms_norm.backward(dy, total, rstd, weight)
    allowed = 1e-6 if dtype == torch.float32 else 6e-3
    assert relative(rms_norm.backward(dy, total, rstd, weight, past), alone + past) < allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu(dtype):
    gate_up, dh = (torch.randn(7, 2 * 51) * 5).to(dtype), torch.randn(7, 51).to(dtype)
    gate_up[0, :5] = torch.tensor([90.0, -90.0, 1e4, -1e4, -1e30])

    def reference(gate_up, dh):
        leaf = gate_up.clone().requires_grad_()
        h = swiglu.reference(leaf)
        return h, torch.autograd.grad(h, leaf, dh)[0]

    plain, truth = _three(reference, dtype, gate_up, dh)
    check("h", swiglu.forward(gate_up), plain[0], truth[0])
    gradient, h = swiglu.backward(dh.clone(), gate_up, want_h=True)
    check("d", gradient, plain[1], truth[1])
    assert torch.equal(h, swiglu.forward(gate_up))
    work = gate_up.clone()
    assert swiglu.backward(dh.clone(), work, overwrite=True)[0] is work and torch.equal(work, gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope(dtype):
    wide = torch.randn(6, 5, 14).to(dtype)
    x, angles = wide[:, :3], torch.rand(6, 7) * 6
    cos, sin = angles.cos(), angles.sin()
    plain, truth = _three(lambda x, cos, sin: [rope.reference(x, cos, sin)], dtype, x, cos, sin)
    turned = rope.rotate_(x.clone(), cos, sin)
    check("x", turned, plain[0], truth[0])
    rest = wide[:, 3:].clone()
    rope.rotate_(x, cos, sin)
    assert torch.equal(x, turned) and torch.equal(wide[:, 3:], rest)
    assert relative(rope.rotate_(turned, cos, sin, back=True), rope.rotate_(x, cos, sin, back=True)) == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses(dtype, smoothing):
    logits, labels = (torch.randn(9, 101) * 4).to(dtype), torch.randint(0, 101, (9,))
    logits[0] = 0
    logits[1, 5] = 1e4

    def reference(logits):
        leaf = logits.clone().requires_grad_()
        wide = leaf.to(torch.promote_types(leaf.dtype, torch.float32))
        losses = F.cross_entropy(wide, labels, reduction="none", label_smoothing=smoothing)
        return losses, torch.autograd.grad(losses.sum(), leaf)[0]

    plain, truth = _three(reference, dtype, logits)
    work, losses = logits.clone(), torch.empty(9)
    linear_cross_entropy.losses_(work, labels, losses, smoothing, True)
    check("losses", losses, plain[0], truth[0])
    check("d logits", work, plain[1], truth[1])
    again = torch.empty(9)
    linear_cross_entropy.losses_(logits, labels, again, smoothing, False)
    assert torch.equal(again, losses)


def test_losses_of_what_is_no_number():
    logits = torch.zeros(3, 4)
    logits[0, 1], logits[1, 2], logits[2] = float("nan"), float("inf"), float("-inf")
    losses = torch.empty(3)
    OPS.rows_losses(logits, torch.zeros(3, dtype=torch.int64), losses, 0.0, True)
    assert bool(losses.isnan().all()) and bool(logits.isnan().any(1).all())


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax(dtype, window):
    queries, keys, begin = 5, 19, 14
    scores, dp = (torch.randn(2 * queries, keys).to(dtype) * 3 for _ in range(2))
    place, at = torch.arange(keys), begin + torch.arange(queries).repeat(2)[:, None]
    hidden = (place > at) | ((place <= at - window) if window else torch.zeros(1, dtype=torch.bool))

    def reference(scores, dp):
        leaf = scores.clone().requires_grad_()
        wide = torch.promote_types(leaf.dtype, torch.float32)
        p = leaf.masked_fill(hidden, float("-inf")).softmax(-1, dtype=wide).to(leaf.dtype)
        return p, torch.autograd.grad(p, leaf, dp)[0]

    plain, truth = _three(reference, dtype, scores, dp)
    p = scores.clone()
    OPS.rows_softmax(p, queries, begin, window)
    check("p", p, plain[0], truth[0])
    assert bool((p[hidden.expand_as(p)] == 0).all())
    OPS.rows_softmax_backward(dp, p)
    check("ds", dp, plain[1], truth[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 1000), (5, 31), (300, 64), (3, 2048), (3, 2080), (3, 3001), (2, 5007)], ids=str)
def test_product(shape, dtype):
    weight, x = torch.randn(shape[0], shape[1] + 3).to(dtype)[:, : shape[1]], torch.randn(shape[1]).to(dtype)
    y = torch.full((shape[0],), float("nan"), dtype=dtype)
    OPS.rows_product(weight, x, y)
    check("y", y, torch.mv(weight, x), torch.mv(weight.double(), x.double()))


def test_a_product_with_what_is_no_number_is_none():
    y = torch.zeros(2, dtype=torch.bfloat16)
    weight = torch.ones(2, 40, dtype=torch.bfloat16)
    weight[0, 39] = float("nan")
    OPS.rows_product(weight, torch.ones(40, dtype=torch.bfloat16), y)
    assert bool(y[0].isnan()) and y[1] == 40


def test_a_product_needs_columns():
    with pytest.raises(RuntimeError, match="rows_product: weight has rows without elements"):
        OPS.rows_product(torch.empty(3, 0), torch.empty(0), torch.empty(3))


def _calls():
    x, weight, angles = torch.randn(4, 2, 6), torch.rand(6), torch.rand(4, 3)
    rstd, labels = torch.rand(4, 2, 1), torch.randint(0, 9, (4,))
    return {"rms_norm": (x, x + 1, weight, 1e-5, False, rstd.clone(), x.clone(), x.clone()),
            "rms_norm_backward": (x + 1, x, rstd, weight, x * 2, x.clone()),
            "swiglu": (torch.randn(4, 10), torch.randn(4, 5)),
            "swiglu_backward": (torch.randn(4, 5), torch.randn(4, 10), torch.randn(4, 10), torch.randn(4, 5)),
            "rope": (x.clone(), angles, angles, True),
            "losses": (torch.randn(4, 9), labels, torch.empty(4), 0.1, True),
            "softmax": (torch.randn(6, 8), 3, 4, 2), "softmax_backward": (torch.randn(6, 8), torch.rand(6, 8)),
            "product": (torch.randn(5, 8), torch.randn(8), torch.empty(5)),
            "adamw_8bit": (torch.randn(300), torch.randn(300), *moments8.zeros(300, True, CPU)[:2],
                           *moments8.zeros(300, False, CPU)[:2], moments8.table(True, CPU), moments8.table(False, CPU),
                           0.9, 0.99, 1e-8, 1.0, 1.0, 1e-3, 0.5)}


@pytest.mark.parametrize("name", list(_calls()))
def test_opcheck(name):
    torch.library.opcheck(getattr(OPS, f"rows_{name}").default, _calls()[name])


@pytest.mark.parametrize("name", list(_calls()))
def test_wrong_tensors_are_refused(name):
    """Misshapen, of another dtype, not in rows, or larger than its memory: an error that names the op, and nothing is
    read."""
    arguments = list(_calls()[name])
    for i, value in enumerate(arguments):
        if not isinstance(value, torch.Tensor):
            continue
        hollow = value.clone()
        hollow.untyped_storage().resize_(value.element_size())
        wrongs = [value.double() if value.is_floating_point() else value.int(), hollow]
        wrongs += [value.mT] if value.dim() == 2 else []
        alone = name == "softmax" or (name == "losses" and i == 0)      # whose width is nobody else's
        wrongs += [value[..., :-1]] if value.shape[-1] > 1 and not alone else []
        for wrong in wrongs:
            with pytest.raises(RuntimeError, match=f"rows_{name}: "):
                getattr(OPS, f"rows_{name}")(*arguments[:i], wrong, *arguments[i + 1:])


@pytest.mark.parametrize(("queries", "begin", "window"), [(1, 48, 1), (3, 2, 0), (0, 0, 0), (1, -1, 0), (1, 0, -1),
                                                          (2**62, 2**62, 0)], ids=str)
def test_queries_that_lie_outside_the_scores_are_refused(queries, begin, window):
    with pytest.raises(RuntimeError, match="rows_softmax: "):
        OPS.rows_softmax(torch.randn(6, 4), queries, begin, window)


def test_a_label_outside_the_vocabulary_is_named():
    for label in (-1, 5, 2**40):
        with pytest.raises(RuntimeError, match=rf"label 1 is {label}; it must be from 0 to 4"):
            OPS.rows_losses(torch.randn(2, 5), torch.tensor([0, label]), torch.empty(2), 0.0, False)


def test_results_do_not_depend_on_the_threads():
    x, weight = torch.randn(64, 1000, dtype=torch.bfloat16), torch.rand(1000).bfloat16()
    results, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        product = torch.empty(64, dtype=torch.bfloat16)
        OPS.rows_product(x, weight, product)
        results.append((rms_norm.forward(x, weight, 1e-5)[0], product))
    torch.set_num_threads(before)
    assert all(map(torch.equal, *results))
