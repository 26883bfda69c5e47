"""products: by parts as whole, where the library would leave threads idle; what the op refuses."""

import pytest
import torch

import minitune as mt
from minitune.api import Model
from minitune.model.init import init_weights
from minitune.model.llama import Llama
from minitune.ops import backends, products
from tests.tolerance import check

CPU, BF16 = torch.device("cpu"), torch.bfloat16
needs_tiles = pytest.mark.skipif(backends.choose("products", CPU, dtype=BF16) != "native", reason="a CPU without tiles")
needs_extension = pytest.mark.skipif(bool(backends.missing("native", CPU)), reason="the extension is not built")


@pytest.fixture(autouse=True)
def two_threads():
    """Whatever the rest of the suite has: fewer would make one part of all rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def by_parts(monkeypatch):
    """The products that went by parts: their shapes."""
    seen, op = [], torch.ops.minitune.product_apart

    def spy(x, right, out):
        seen.append((len(x), *right.shape))
        op(x, right, out)

    monkeypatch.setattr(torch.ops.minitune, "product_apart", spy)
    return seen


def operands(rows, columns=512, depth=512, transposed=True, room=0):
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
        assert apart(x, right).shape == (0, 512)
        return
    check("y", apart(x, right), x @ right, x.double() @ right.double())
    wide = torch.full((rows, 600), 7.0, dtype=BF16)         # rows of an operand that has room behind them
    torch.ops.minitune.product_apart(x, right, wide[:, :512])
    assert torch.equal(wide[:, :512], apart(x, right)) and bool((wide[:, 512:] == 7).all())


@needs_extension
@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(threads):
    torch.set_num_threads(threads)
    x, right = operands(200, room=32, transposed=False)
    check("y", apart(x, right), x @ right, x.double() @ right.double())


@needs_tiles
@pytest.mark.parametrize(("rows", "columns", "depth", "taken"), [
    (639, 512, 512, False), (640, 512, 512, True), (1536, 512, 512, True), (1537, 512, 512, False),
    (1024, 511, 512, False), (1024, 512, 512, True), (1024, 1023, 512, True), (1024, 1024, 512, False),
    (1024, 512, 511, False)])
def test_where_a_product_goes_by_parts(rows, columns, depth, taken, by_parts):
    x, right = operands(rows, columns, depth)
    y, out = products.mm(x, right), torch.empty(rows, columns, dtype=BF16)
    check("y", y, x @ right, products.reference(x.double(), right.double()))
    assert products.mm(x, right, out) is out and torch.equal(out, y)
    assert by_parts == [(rows, depth, columns)] * 2 * taken


@needs_tiles
def test_where_it_does_not(by_parts):
    x, right = operands(700)
    products.mm(x.float(), right.float())
    with backends.use("reference"):
        products.mm(x, right)
    with torch.inference_mode():        # which the other threads do not know of
        assert products.mm(x, right).is_inference()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        products.mm(x, right)
    assert not by_parts


@needs_tiles
@pytest.mark.parametrize("trained", ["x", "right", "both"])
def test_gradients_are_not_lost(trained, by_parts):
    x, right = operands(700, transposed=False)
    x.requires_grad_(trained != "right")
    right.requires_grad_(trained != "x")
    products.mm(x, right).sum().backward()
    ones = torch.ones(700, 512, dtype=BF16)
    if trained != "right":
        check("dx", x.grad, ones @ right.detach().mT, ones.double() @ right.detach().double().mT)
    if trained != "x":
        check("dw", right.grad, x.detach().mT @ ones, x.detach().double().mT @ ones.double())
    assert not by_parts
    with torch.no_grad():
        assert torch.equal(products.mm(x, right), apart(x.detach(), right.detach())) and len(by_parts) == 2


@needs_tiles
def test_a_step_takes_it_in_each_pass_and_memory_policies_agree(by_parts):
    """Also the products that are formed again are the same, bit for bit."""
    config = mt.ModelConfig(vocab_size=320, d_model=512, n_layers=2, n_heads=8, n_kv_heads=8, head_dim=64, d_ff=512)
    tokens = torch.randint(0, 320, (640,))
    labels = tokens.roll(-1)
    labels[-1] = -100
    batch, found = mt.Batch(tokens=tokens, labels=labels, cu_seqlens=torch.tensor([0, 640], dtype=torch.int32)), []
    for policy in ("keep", "pointwise", "full"):
        network = Llama(config, dtype=BF16, memory=policy)
        init_weights(network, 0)
        network.add_adapters(mt.LoRA(rank=2), 0)
        by_parts.clear()
        Model(network, None).loss(batch).backward()
        found.append([p.grad for p in network.parameters() if p.requires_grad])
        # Of each layer o and down forward, all four backward; but nobody wants the gradient of the first one's input.
        assert {rows for rows, _, _ in by_parts} == {640} and len(by_parts) >= 2 * (2 + 4) - 1
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others, strict=True))


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
    torch.library.opcheck(torch.ops.minitune.product_apart.default, (x, right, torch.empty(65, 512, dtype=BF16)),
                          test_utils=("test_schema", "test_faketensor"))
