"""attention: the CPU's blocks and torch's kernels, forward and backward, against the dense reference in fp64."""

import pytest
import torch

import minitune as mt
from minitune.ops import attention, attention_library, backends, tuned
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
                         ids=["dispatch", "library"])
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


class OnGpu:
    """As much of q as the choice of a way asks for."""

    shape, device, dtype = (4, 8, 64), torch.device("cuda"), torch.bfloat16


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Every backend is there, FlashAttention takes 16 bits, cuDNN these and no window."""
    monkeypatch.setattr(attention.backends, "missing", lambda name, device: None)
    monkeypatch.setattr(attention_library, "flash", lambda q, window: q.dtype == torch.bfloat16)
    monkeypatch.setattr(attention_library, "_fused", lambda q, most: q.dtype == torch.bfloat16)
    ways = {}

    def way(op, *_, without):
        return None if ways.get(op) in without else ways.get(op)

    monkeypatch.setattr(attention.tuned, "way", way)
    return ways


K = torch.empty(4, 2, 64, device="meta")
EQUAL, RAGGED = Documents.from_lengths((90, 90, 0)), Documents.from_lengths((140, 1, 39))
BOUNDS = Documents(EQUAL.cu_seqlens, (180, 0, 0), exact=False)
SHORT = Documents.from_lengths((1,) * 180)


def test_the_kernel_of_ours_takes_what_flash_attention_does_not(as_on_a_gpu, monkeypatch):
    assert attention.forward_way(OnGpu, K, RAGGED, None) == attention.backward_way(OnGpu, K, 60, None) == "flash"
    monkeypatch.setattr(OnGpu, "dtype", torch.float32)
    assert attention.forward_way(OnGpu, K, RAGGED, None) == attention.backward_way(OnGpu, K, 60, None) == "triton"


def test_forward_and_backward_are_chosen_each_by_itself(as_on_a_gpu):
    as_on_a_gpu["attention backward"] = "triton"
    assert (attention.forward_way(OnGpu, K, RAGGED, None), attention.backward_way(OnGpu, K, 60, None)) == (
        "flash", "triton")


def test_cudnns_forward_is_for_documents_known_to_be_equally_long(as_on_a_gpu):
    as_on_a_gpu["attention forward"] = "cudnn"
    assert attention.forward_way(OnGpu, K, EQUAL, None) == "cudnn"
    assert attention.forward_way(OnGpu, K, EQUAL, 90) == "cudnn"       # a window that hides nothing
    for documents, window in ((RAGGED, None), (BOUNDS, None), (SHORT, None), (EQUAL, 7)):
        assert attention.forward_way(OnGpu, K, documents, window) == "flash"
    assert not attention.reads_lengths(OnGpu, K, 100, None)


def test_cudnns_backward_is_for_whoever_asks_for_it(as_on_a_gpu, monkeypatch):
    with backends.use("cudnn"):
        assert attention.forward_way(OnGpu, K, EQUAL, None) == "cudnn graph"
        assert attention.forward_way(OnGpu, K, RAGGED, None) == "cudnn graph"
        for documents, window in ((BOUNDS, None), (SHORT, None), (EQUAL, 7)):
            as_on_a_gpu["attention forward"] = None
            assert attention.forward_way(OnGpu, K, documents, window) == "flash"
            as_on_a_gpu["attention forward"] = "triton"         # then what was measured counts
            assert attention.forward_way(OnGpu, K, documents, window) == "triton"
        assert backends.choose("rms_norm", OnGpu.device) == "triton"        # which knows no cuDNN
        monkeypatch.setattr(OnGpu, "dtype", torch.float32)
        assert attention.forward_way(OnGpu, K, EQUAL, None) == "triton"


def test_cudnn_without_a_gpu_is_refused():
    q, k, v, _ = _inputs((4,), 2, 1, torch.float32)
    with backends.use("cudnn"), pytest.raises(mt.InputError, match="'cudnn' was asked for, but on cpu: cuDNN needs a"):
        attention.forward(q, k, v, Documents.from_lengths((4,)))


def test_documents_know_whether_they_are_equally_long():
    assert (EQUAL.n_equal, RAGGED.n_equal, BOUNDS.n_equal, SHORT.n_equal) == (2, None, None, 180)


def test_reference_gradcheck():
    documents = Documents.from_lengths((3, 4))
    q, k, v = (x.double().requires_grad_() for x in _inputs((3, 4), 2, 1, torch.float32, d=4)[:3])
    assert torch.autograd.gradcheck(lambda q, k, v: attention.reference(q, k, v, documents, 2), (q, k, v))


WAYS = [("reference", "reference"), ("triton", "triton"), ("reference", "triton"), ("triton", "reference"),
        ("cudnn", "reference"), ("cudnn", "triton")]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(8, 2, 128), *(pytest.param(heads, marks=pytest.mark.slow) for heads in (
    (8, 8, 128), (4, 2, 64), (4, 1, 80), (4, 2, 256)))], ids=str)
@pytest.mark.parametrize("ways", WAYS, ids=" then ".join)
def test_any_forward_goes_with_any_backward(ways, heads):
    """What one leaves, the log-sum-exp above all, is what another reads. q, k and v lie side by side, as a layer's."""
    n_heads, kv_heads, d = heads
    for lengths, window in (((700,) * 4, None), ((1000, 1, 24, 0, 500), None), ((700, 300), 90)):
        documents = Documents.from_lengths(lengths, "cuda")
        *parts, dout = (x.cuda() for x in _inputs(lengths, n_heads, kv_heads, torch.bfloat16, d=d))
        inputs = [*torch.cat(parts, 1).split((n_heads, kv_heads, kv_heads), dim=1), dout]
        truth = _run(attention.reference, *(x.double() for x in inputs), documents, window)
        plain = _run(attention.reference, *inputs, documents, window)
        fits = lengths[0] == lengths[-1] and d <= 128
        with tuned.forced(attention_forward=ways[0], attention_backward=ways[1]):
            taken = attention.forward_way(inputs[0], inputs[1], documents, window)
            results = [_side_by_side(*inputs, documents, window) for _ in range(2)]
        assert taken == (ways[0] if ways[0] == "triton" or (ways[0] == "cudnn" and fits) else "flash")
        for name, value, p, t in zip(("out", "dq", "dk", "dv"), results[0], plain, truth, strict=True):
            check(f"{name}, {lengths}", value, p, t)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), "two runs differ"


def _side_by_side(q, k, v, dout, documents, window):
    """[out, dq, dk, dv] by the op's own functions, which take views as they are and give the gradients in one buffer
    or apart."""
    out, saved = attention.forward(q, k, v, documents, window)
    apart = attention.backward_apart(dout, saved)
    if apart is None:
        gradient = q.new_empty(len(q), q.shape[1] + 2 * k.shape[1], q.shape[2])
        attention.backward(dout, saved, gradient)
        apart = gradient.split((q.shape[1], k.shape[1], k.shape[1]), dim=1)
    return [out, *apart]


@pytest.mark.gpu
def test_lengths_that_are_bounds_give_the_bits_of_the_true_ones():
    """As in a graph that was recorded: to the host the row is one document, the device knows better."""
    lengths = (600, 300, 100)
    true = Documents.from_lengths(lengths, "cuda")
    bounds = Documents(true.cu_seqlens, (1000, 0, 0), exact=False)
    inputs = [x.cuda() for x in _inputs(lengths, 8, 2, torch.bfloat16, d=128)]
    for way in ("reference", "triton"):
        with tuned.forced(attention_forward=way, attention_backward=way):
            for one, other in zip(*(_side_by_side(*inputs, each, None) for each in (true, bounds)), strict=True):
                assert torch.equal(one, other), way


@pytest.mark.gpu
def test_cudnn_both_ways_is_right_though_it_need_not_repeat():
    for lengths in ((700,) * 4, (1000, 1, 24, 500)):
        documents = Documents.from_lengths(lengths, "cuda")
        inputs = [x.cuda() for x in _inputs(lengths, 8, 2, torch.bfloat16, d=128)]
        truth = _run(attention.reference, *(x.double() for x in inputs), documents, None)
        plain = _run(attention.reference, *inputs, documents, None)
        with backends.use("cudnn"):
            assert attention.forward_way(inputs[0], inputs[1], documents, None) == "cudnn graph"
            found = _run(attention.differentiable, *inputs, documents, None)
        for name, value, p, t in zip(("out", "dq", "dk", "dv"), found, plain, truth, strict=True):
            check(f"{name}, {lengths}", value, p, t)


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


def test_a_window_of_the_library_does_not_count_the_token_itself(monkeypatch):
    monkeypatch.setattr(attention_library, "_flash_windows", lambda: True)
    assert attention_library._window(5) == {"window_size_left": 4, "window_size_right": 0}
    assert attention_library._window(None) == {"window_size_left": -1, "window_size_right": 0}
