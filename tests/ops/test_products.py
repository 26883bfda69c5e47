"""products: by parts as whole, where the library would leave threads idle; what the op refuses."""

import pytest
import torch

from minitune.ops import backends, products
from tests.tolerance import check

CPU, BF16 = torch.device("cpu"), torch.bfloat16
needs_tiles = pytest.mark.skipif(backends.choose("products", CPU, dtype=BF16) != "native", reason="a CPU without tiles")
needs_extension = pytest.mark.skipif(bool(backends.missing("native", CPU)), reason="the extension is not built")


def operands(rows, columns=256, depth=96, transposed=True, room=0):
    x = torch.randn(rows, depth + room).bfloat16()[:, :depth]
    right = torch.randn(columns, depth).bfloat16().mT if transposed else torch.randn(depth, columns).bfloat16()
    return x, right


def apart(x, right):
    out = torch.full((len(x), right.shape[1]), float("nan"), dtype=x.dtype)
    torch.ops.minitune.product_apart(x, right, out)
    return out


@needs_extension
@pytest.mark.parametrize("room", [0, 32])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 31, 64, 65, 700])
def test_by_parts_is_the_product(rows, transposed, room):
    x, right = operands(rows, transposed=transposed, room=room)
    if not rows:
        assert apart(x, right).shape == (0, 256)
        return
    check("y", apart(x, right), x @ right, x.double() @ right.double())
    wide = torch.full((rows, 300), 7.0, dtype=BF16)         # rows of an operand that has room behind them
    torch.ops.minitune.product_apart(x, right, wide[:, :256])
    assert torch.equal(wide[:, :256], apart(x, right)) and bool((wide[:, 256:] == 7).all())


@needs_extension
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads):
    before = torch.get_num_threads()
    x, right = operands(200)
    try:
        torch.set_num_threads(threads)
        check("y", apart(x, right), x @ right, x.double() @ right.double())
    finally:
        torch.set_num_threads(before)


@needs_tiles
@pytest.mark.parametrize(("rows", "columns", "by_parts"), [
    (638, 512, False), (639, 512, True), (1536, 512, True), (1537, 512, False),
    (1024, 255, False), (1024, 256, True), (1024, 1152, True), (1024, 1153, False)])
def test_where_a_product_goes_by_parts(rows, columns, by_parts, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x, right = operands(rows, columns, depth=8)
    assert products._apart(x, right) == by_parts
    check("y", products.mm(x, right), x @ right, products.reference(x.double(), right.double()))
    out = torch.empty(rows, columns, dtype=BF16)
    assert products.mm(x, right, out) is out and torch.equal(out, products.mm(x, right))
    assert not products._apart(x.float(), right.float())
    with backends.use("reference"):
        assert not products._apart(x, right)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert not products._apart(x, right)


@needs_tiles
def test_gradients_are_not_lost(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x, right = operands(700)
    x.requires_grad_()
    products.mm(x, right).sum().backward()
    check("dx", x.grad, torch.ones(700, 256).bfloat16() @ right.mT, torch.ones(700, 256).double() @ right.mT.double())
    with torch.no_grad():
        assert products._apart(x, right) and torch.equal(products.mm(x, right), apart(x.detach(), right))


@needs_extension
@pytest.mark.parametrize(("shapes", "words"), [
    (((3, 4), (5, 6), (3, 6)), "x is 3 x 4, right 5 x 6, out 3 x 6; they must be n x k, k x m and n x m"),
    (((3, 4), (4, 6), (2, 6)), "out 2 x 6"), (((3, 4), (4, 6), (3, 5)), "out 3 x 5"),
    (((3,), (4, 6), (3, 6)), "x, right and out have 1, 2 and 2 dimensions, not 2 each")])
def test_shapes_that_do_not_fit_are_refused(shapes, words):
    with pytest.raises(RuntimeError, match=words):
        torch.ops.minitune.product_apart(*(torch.zeros(shape, dtype=BF16) for shape in shapes))


@needs_extension
def test_dtypes_are_one():
    with pytest.raises(RuntimeError, match=r"x is Float, right BFloat16, out BFloat16; they must be of one dtype"):
        torch.ops.minitune.product_apart(torch.zeros(3, 4), torch.zeros(4, 6).bfloat16(), torch.zeros(3, 6).bfloat16())


@needs_extension
def test_the_schema_says_what_is_written():
    x, right = operands(65)
    torch.library.opcheck(torch.ops.minitune.product_apart.default, (x, right, torch.empty(65, 256, dtype=BF16)),
                          test_utils=("test_schema", "test_faketensor"))
