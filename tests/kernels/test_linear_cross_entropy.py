"""linear_cross_entropy: losses and gradients of the Triton kernel against torch's cross-entropy, whatever the rows."""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed")

from minitune.kernels import linear_cross_entropy as kernels
from minitune.kernels.launch import Config
from tests import tolerance

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = Config({"TILE": 256}, num_warps=4)
POISON = 777.0
ROWS = {"less than a tile, ragged": (97, 112), "several tiles, ragged end": (1003, 1008),
        "several tiles, whole groups": (1000, 1008), "whole tiles": (512, 512), "contiguous, not aligned": (1003, 1003),
        "fewer than a group": (5, 16)}


def _logits(n, V, pitch, dtype, device):
    """(buffer [n, pitch] of poison, the logits in it [n, V])"""
    buffer = torch.full((n, pitch), POISON, dtype=dtype, device=device)
    logits = buffer[:, :V]
    logits.copy_(3 * torch.randn(n, V))
    return buffer, logits


def _run(logits, labels, smoothing=0.0, gradient=True, config=SMALL):
    losses = torch.full(labels.shape, math.nan, device=labels.device)
    kernels.losses_(logits, labels, losses, smoothing=smoothing, gradient=gradient, config=config)
    return losses


def _by_torch(logits, labels, smoothing, wide):
    """(losses, gradients in the dtype of `logits`), computed in the dtype `wide`."""
    x = logits.detach().clone().requires_grad_()
    losses = F.cross_entropy(x.to(wide), labels, reduction="none", label_smoothing=smoothing)
    losses.sum().backward()
    return losses.detach(), x.grad


def _check(logits, labels, smoothing=0.0, config=SMALL):
    plain = _by_torch(logits, labels, smoothing, torch.float32)
    truth = _by_torch(logits.double(), labels, smoothing, torch.float64)
    losses = _run(logits, labels, smoothing, config=config)
    tolerance.check("losses", losses, plain[0], truth[0])
    tolerance.check("gradients", logits, plain[1], truth[1])


@pytest.mark.parametrize(("V", "pitch"), ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_and_gradients(V, pitch, smoothing, dtype, device):
    buffer, logits = _logits(5, V, pitch, dtype, device)
    labels = torch.tensor([0, V - 1, V // 2, V // 8 * 8 - 1, 3], device=device) % V
    _check(logits, labels, smoothing)
    assert bool((buffer[:, V:] == POISON).all()), "values between the rows were written"


@pytest.mark.parametrize(("V", "pitch"), [(97, 112), (1003, 1008)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_gradients_the_logits_stay(V, pitch, smoothing, dtype, device):
    buffer, logits = _logits(3, V, pitch, dtype, device)
    before, labels = buffer.clone(), torch.tensor([1, V - 1, 7], device=device)
    losses = _run(logits, labels, smoothing, gradient=False)
    assert torch.equal(buffer, before)
    assert torch.equal(losses, _run(logits, labels, smoothing))


@pytest.mark.parametrize(("V", "pitch"), [(97, 112), (97, 97), (kernels.LONG + 3, kernels.LONG + 16)],
                         ids=["losses", "losses_narrow", "losses_long"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_default_configurations(V, pitch, dtype, device, request, monkeypatch):
    """Each kind of row gets its own, and comes out right with it."""
    _, logits = _logits(2, V, pitch, dtype, device)
    named = next(kind for kind in kernels.CONFIGS if f"-{kind}-" in f"-{request.node.callspec.id}-")
    monkeypatch.setattr(kernels, "CONFIGS", {named: kernels.CONFIGS[named]})
    _check(logits, torch.tensor([V - 1, 0], device=device), config=None)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(smoothing, dtype, device):
    """Each row by itself, so that a large loss does not hide another's error."""
    n, V = 9, 523
    _, logits = _logits(n, V, 528, dtype, device)
    labels = torch.full((n,), 300, device=device)
    logits[0, 300], logits[1, 300], logits[2, 17], logits[3, 17] = 1e4, -1e4, 1e4, -1e4
    logits[4:7] = torch.tensor([0.0, 1e4, -1e4], device=device)[:, None]    # all equal
    logits[7, ::2] = 1e4                                                    # half of them, the label's too
    logits[8] = torch.finfo(dtype).min if not smoothing else -3e4
    logits[8, 300] = 2.0                                                    # a mask as some write it
    for row in range(n):
        _check(logits[row : row + 1], labels[row : row + 1], smoothing)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_that_are_minus_infinity(dtype, device):
    """Whole groups and tiles of them, beginning and end; at last all but the label's."""
    _, logits = _logits(4, 523, 528, dtype, device)
    logits[0, 1::3] = -math.inf
    logits[1, :299], logits[2, 301:] = -math.inf, -math.inf
    logits[3, :300], logits[3, 301:] = -math.inf, -math.inf
    labels = torch.full((4,), 300, device=device)
    assert bool(torch.isposinf(_run(logits.clone(), labels, 0.1)).all()), "smoothing gives each of them a share"
    _check(logits, labels)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_is_not_finite_is_what_torch_makes_of_it(smoothing, device):
    _, logits = _logits(5, 523, 528, torch.float32, device)
    labels = torch.full((5,), 300, device=device)
    logits[0, 300], logits[1, 17], logits[2, 17], logits[3] = -math.inf, math.nan, math.inf, -math.inf
    expected = _by_torch(logits, labels, smoothing, torch.float32)[0]
    losses = _run(logits, labels, smoothing)
    torch.testing.assert_close(losses, expected, equal_nan=True)
    assert logits.isfinite().all(1).tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("wrong", [-1, -100, 1003, 2**32 + 3, -(2**63)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_label_outside_gives_nan_and_stays_in_its_row(wrong, smoothing, device):
    buffer, logits = _logits(3, 1003, 1008, torch.float32, device)
    labels = torch.tensor([4, wrong, 5], device=device)
    plain = _by_torch(logits[::2], labels[::2], smoothing, torch.float32)
    losses = _run(logits, labels, smoothing)
    assert losses.isnan().tolist() == [False, True, False]
    assert bool(logits[1].isnan().all()) and bool((buffer[:, 1003:] == POISON).all())
    torch.testing.assert_close((losses[::2], logits[::2]), plain)


def test_a_confident_tokens_gradient_is_rounded_once(device):
    """p - 1 formed from a p that was rounded to 16 bits would be 0."""
    logits = torch.zeros(1, 96, dtype=torch.bfloat16, device=device)
    logits[0, 3] = 14.0
    truth = _by_torch(logits.double(), torch.tensor([3], device=device), 0.0, torch.float64)[1]
    _run(logits, torch.tensor([3], device=device))
    torch.testing.assert_close(logits.double(), truth, rtol=4e-3, atol=0)


def test_no_tokens_launch_nothing(device, monkeypatch):
    monkeypatch.setattr(kernels, "linear_cross_entropy_losses", None)
    _run(torch.empty(0, 97, device=device), torch.empty(0, dtype=torch.int64, device=device))


def test_rows_that_lie_far_apart(device):
    """On a GPU behind 2^31 values."""
    pitch = 2**30 if device == "cuda" else 2**10
    logits = torch.empty(3 * pitch + 97, dtype=torch.bfloat16, device=device).as_strided((4, 97), (pitch, 1))
    logits.copy_(torch.randn(4, 97))
    _check(logits, torch.tensor([0, 96, 5, 50], device=device))
