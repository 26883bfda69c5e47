"""attention: the CPU's blocks and torch's kernels, forward and backward, against the dense reference in fp64."""

import pytest
import torch

from minitune.ops import attention, attention_library
from minitune.ops.documents import Documents
from tests.tolerance import check, relative

CASES = {
    "one block": ((37,), 3, 3, None),
    "several blocks": ((600,), 2, 1, None),
    "equal side by side": ((40, 40, 40), 4, 2, None),
    "equal apart": ((17, 30, 17, 1, 30), 6, 2, None),
    "many short": ((5, 17, 3, 20, 1, 33, 40, 31, 2, 18, 60, 63, 9), 4, 2, None),
    "many short, window": ((5, 17, 3, 20, 33, 40, 31, 18), 4, 2, 6),
    "window inside a block": ((50, 9), 2, 2, 7),
    "window across blocks": ((530, 300), 2, 1, 100),
}


def _inputs(lengths, heads, kv_heads, dtype, d=20):
    tokens = sum(lengths)
    shapes = ((tokens, heads, d), (tokens, kv_heads, d), (tokens, kv_heads, d), (tokens, heads, d))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def _run(function, q, k, v, dout, documents, window):
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = function(q, k, v, documents, window)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [attention.differentiable, attention_library.by_document],
                         ids=["blocks", "library"])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward(case, function, dtype):
    lengths, heads, kv_heads, window = CASES[case]
    documents, inputs = Documents.from_lengths(lengths), _inputs(lengths, heads, kv_heads, dtype)
    truth = _run(attention.reference, *(x.double() for x in inputs), documents, window)
    plain = _run(attention.reference, *inputs, documents, window)
    for name, value, p, t in zip(("out", "dq", "dk", "dv"), _run(function, *inputs, documents, window), plain, truth,
                                 strict=True):
        if function is attention_library.by_document and dtype == torch.float32:
            assert relative(value, t) < 2e-6, name      # torch's own exponential errs a little more than softmax does
        else:
            check(f"{name} ({case})", value, p, t)


def test_documents_do_not_see_each_other():
    lengths = (12, 20, 12)
    q, k, v, _ = _inputs(lengths, 2, 1, torch.float32)
    documents = Documents.from_lengths(lengths)
    before = attention.forward(q, k, v, documents)[0]
    k[12:32] += 1
    v[12:32] += 1
    after = attention.forward(q, k, v, documents)[0]
    assert torch.equal(before[:12], after[:12]) and torch.equal(before[32:], after[32:])
    assert not torch.equal(before[12:32], after[12:32])


def test_the_graph_of_a_library_call_serves_the_backward():
    lengths = (8, 8, 5)
    q, k, v, dout = _inputs(lengths, 4, 2, torch.float32)
    documents = Documents.from_lengths(lengths)
    out, graph = attention_library.forward(q, k, v, documents, None)
    expected = _run(attention.reference, q, k, v, dout, documents, None)
    for keep in (True, False):
        for value, e in zip((out, *attention_library.backward(dout, graph, keep)), expected, strict=True):
            assert torch.allclose(value, e, atol=1e-5)
    assert attention_library.forward(q, k, v, documents, None, needs_backward=False)[1] is None


def test_determinism_is_more_than_a_wish_and_is_put_back():
    """FlashAttention's backward adds in any order where the flag only warns."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    with attention_library._deterministic():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory


def test_the_kernel_of_ours_takes_what_flash_attention_does_not(monkeypatch):
    q, k = torch.empty(4, 8, 64, device="meta"), torch.empty(4, 2, 64, device="meta")
    asked = []
    monkeypatch.setattr(attention.backends, "choose", lambda op, device, measured, dtype: asked.append(measured))

    class OnGpu:
        shape, device, dtype = q.shape, torch.device("cuda"), torch.float32

    monkeypatch.setattr(attention.tuned, "way", lambda *_: None)
    attention.backend(OnGpu, k, 100, None)
    monkeypatch.setattr(attention_library, "flash", lambda q, window: True)
    attention.backend(OnGpu, k, 100, None)
    assert asked == ["triton", None]


def test_reference_gradcheck():
    documents = Documents.from_lengths((3, 4))
    q, k, v = (x.double().requires_grad_() for x in _inputs((3, 4), 2, 1, torch.float32, d=4)[:3])
    assert torch.autograd.gradcheck(lambda q, k, v: attention.reference(q, k, v, documents, 2), (q, k, v))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 300])
def test_gpu_kernels(window):
    lengths = (1000, 24, 1000, 3000)
    documents = Documents.from_lengths(lengths, "cuda")
    inputs = [x.cuda() for x in _inputs(lengths, 8, 2, torch.bfloat16, d=128)]
    truth = _run(attention.reference, *(x.double() for x in inputs), documents, window)
    plain = _run(attention.reference, *inputs, documents, window)
    results = [_run(attention.differentiable, *inputs, documents, window) for _ in range(2)]
    for name, value, p, t in zip(("out", "dq", "dk", "dv"), results[0], plain, truth, strict=True):
        check(name, value, p, t)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), "two runs differ"
