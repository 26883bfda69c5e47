"""library: every op passes opcheck, compiles whole, and gives the gradients of its reference."""

import pytest
import torch

import minitune as mt
from minitune.ops import attention, library, linear_cross_entropy, lora_matmul, rms_norm, rope, swiglu
from minitune.ops.documents import Documents
from minitune.ops.lora_matmul import LoraWeights
from tests.tolerance import relative

LENGTHS = [5, 9, 2]
T = sum(LENGTHS)
DOCUMENTS = Documents.from_lengths(tuple(LENGTHS))


def _calls():
    """name -> (arguments, the reference of the first result; what is differentiable has requires_grad)."""
    def free(*shape):
        return torch.randn(*shape, requires_grad=True)

    weight, head, base, bias, angles = (torch.randn(*s) for s in ((12,), (31, 12), (10, 12), (10,), (T, 4)))
    labels = torch.randint(0, 31, (T,))
    return {
        "rms_norm": ((free(T, 12), free(T, 12), weight, 1e-5), lambda x, b, w, e: rms_norm.reference(x + b, w, e)),
        "swiglu": ((free(T, 14),), swiglu.reference),
        "rope": ((free(T, 3, 8), angles.cos(), angles.sin()), rope.reference),
        "attention": ((free(T, 4, 8), free(T, 2, 8), free(T, 2, 8), DOCUMENTS.cu_seqlens, LENGTHS, 4),
                      lambda q, k, v, c, n, w: attention.reference(q, k, v, DOCUMENTS, w)),
        "linear_cross_entropy": ((free(T, 12), head, labels, 0.1), linear_cross_entropy.reference),
        "lora_matmul": ((free(T, 12), base, bias, free(3, 12), free(10, 3)),
                        lambda *given: lora_matmul.reference(given[0], LoraWeights(*given[1:]))),
    }


NAMES = list(_calls())


def _first(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    torch.library.opcheck(getattr(library.OPS, name).default, _calls()[name][0])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", NAMES)
def test_the_gradients_are_the_references(name, compiled):
    arguments, reference = _calls()[name]
    torch._dynamo.reset()

    def run(*given):
        return _first(getattr(library.OPS, name)(*given))

    value = (torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run)(*arguments)
    expected = reference(*arguments)
    assert relative(value, expected) < 1e-6
    free = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    upstream = torch.randn_like(value)
    for one, other in zip(*(torch.autograd.grad(y, free, upstream) for y in (value, expected)), strict=True):
        assert relative(one, other) < 1e-5


def _awkward(x):
    """The same values where no two of a row lie side by side."""
    if not isinstance(x, torch.Tensor) or x.dim() < 2:
        return x
    apart = torch.stack((x.detach(), torch.full_like(x, torch.nan)), dim=-1)[..., 0]
    return apart.requires_grad_(x.requires_grad)


@pytest.mark.parametrize("name", NAMES)
def test_values_may_lie_anywhere(name):
    arguments, _ = _calls()[name]
    awkward = [_awkward(x) for x in arguments]
    op = getattr(library.OPS, name)
    value, expected = _first(op(*awkward)), _first(op(*arguments))
    assert relative(value, expected) < 1e-6
    upstream = torch.randn_like(value)
    free = [[x for x in given if isinstance(x, torch.Tensor) and x.requires_grad] for given in (awkward, arguments)]
    gradients = [torch.autograd.grad(y, x, _awkward(upstream)) for y, x in zip((value, expected), free, strict=True)]
    for found, given in zip(*gradients, strict=True):
        assert relative(found, given) < 1e-5


@pytest.mark.parametrize("name", ["rms_norm", "attention", "linear_cross_entropy", "lora_matmul"])
def test_another_dtype_is_refused(name):
    arguments, _ = _calls()[name]
    given = [arguments[0], arguments[1].to(torch.bfloat16), *arguments[2:]]
    with pytest.raises(mt.InputError, match=f"torch.ops.minitune.{name}: the dtypes are .*they must be one"):
        getattr(library.OPS, name)(*(x.detach() if isinstance(x, torch.Tensor) else x for x in given))


def test_another_device_and_wrong_lengths_are_refused():
    x, weight = torch.randn(4, 8), torch.randn(8)
    with pytest.raises(mt.InputError, match="rms_norm: weight lies on meta, x on cpu; move them together"):
        library._norm(x, x, weight.to("meta"), 1e-5)
    q, bounds = torch.randn(4, 2, 8), torch.tensor([0, 3, 4], dtype=torch.int32)
    with pytest.raises(mt.InputError, match="lengths are 2 that add up to 5, for 4 tokens"):
        library.OPS.attention(q, q, q, bounds, [3, 2], None)
    with pytest.raises(mt.InputError, match=r"labels is torch.int32 \[4\]; it must be torch.int64 \[4\]"):
        library.OPS.linear_cross_entropy(x, torch.randn(9, 8), torch.zeros(4, dtype=torch.int32), 0.0)
