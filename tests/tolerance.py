"""The one rule of numerics: a result may err about twice as much as plain PyTorch in the same dtype, not more.

Against a truth in fp64: max|e| <= 2 · max|e of plain PyTorch| + one ulp of max|truth|, and the same for the root mean
square. Where a test states a figure instead, it is `relative`: the norm of the difference over that of the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relative(value: Tensor, reference: Tensor) -> float:
    """‖value - reference‖ / ‖reference‖ in fp64."""
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm().clamp_min(1e-300))


def check(name: str, value: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Hold `value` to the rule, `plain` being PyTorch's own result in the dtype of `value`, `truth` the one in fp64.

    A failure says where the largest error lies and by how much it is out.
    """
    assert value.shape == truth.shape, f"{name}: shape {list(value.shape)}, expected {list(truth.shape)}"
    assert value.dtype == plain.dtype, f"{name}: dtype {value.dtype}, plain PyTorch gives {plain.dtype}"
    assert torch.isfinite(value).all(), f"{name}: {int((~torch.isfinite(value)).sum())} values are not finite"
    error, allowed = (value.double() - truth).abs(), (plain.double() - truth).abs()
    ulp = float(truth.abs().max()) * torch.finfo(value.dtype).eps
    at = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)] if error.dim() else []
    assert error.max() <= 2 * allowed.max() + ulp, (
        f"{name}: max error {error.max():.3e} at {at} ({float(value[tuple(at)])} for {float(truth[tuple(at)])}); plain "
        f"PyTorch errs by {allowed.max():.3e}, one ulp is {ulp:.3e}")
    check_rms(name, value, plain, truth)


def check_rms(name: str, value: Tensor, plain: Tensor, truth: Tensor) -> None:
    """The rule for the root mean square alone: for whole layers, where roundings that differ by chance add up and the
    single largest error says little."""
    rms, allowed = ((x.double() - truth).square().mean().sqrt() for x in (value, plain))
    ulp = float(truth.abs().max()) * torch.finfo(value.dtype).eps
    assert rms <= 2 * allowed + ulp, f"{name}: rms error {rms:.3e}; plain PyTorch errs by {allowed:.3e}"
