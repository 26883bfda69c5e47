"""The ops between a layer's products, each by our kernel, plain PyTorch, torch.compile and Liger where it is installed.

``python -m benchmarks.gpu_ops --device cuda`` prints a row of JSON a figure: milliseconds, the bytes that the op has to
read and write, and the share of the measured copy rate. Shapes of Llama-2-7B and Llama-3-8B with 16k tokens, bf16. What
our kernel gives is held to fp64 first, by twice the error of plain PyTorch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_timing import copy_rate, emit, error, reason, timed
from minitune.ops import adamw, backends, linear_cross_entropy, rms_norm, rope, swiglu, tuned

D, VOCAB, TOKENS, EPS = 4096, 32_000, 16_384, 1e-5
ADAPTERS = 40_000_000
"""Trained parameters of Llama-2-7B with rank 16 on all linears."""


@dataclass
class Case:
    """One op at one shape: `run` of each variant gives the tensors to check, `truth` the same from fp64 operands."""

    name: str
    shape: tuple[int, ...]
    n_bytes: int
    ours: Callable[[], list[Tensor]]
    plain: Callable[[], list[Tensor]]
    truth: Callable[[], list[Tensor]]
    others: dict[str, Callable[[], Any]] = field(default_factory=dict)


def cases(tokens: int, d: int, d_ffs: tuple[int, ...], vocab: int, device: str) -> Iterator[Case]:
    """Made one after the other: each is dropped before the next takes its memory."""
    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).bfloat16()

    yield _norm(random, tokens, d)
    yield _norm_with_s(random, tokens, d)
    yield _norm_backward(random, tokens, d)
    for d_ff in d_ffs:
        yield _swiglu(random, tokens, d_ff)
        yield _swiglu_backward(random, tokens, d_ff)
    yield _rope(random, tokens, 2 * d // 128 or 2, min(128, d // 2))
    yield _losses(random, min(tokens, 4096), vocab)


def _norm(random: Any, tokens: int, d: int) -> Case:
    x, branch, weight = random(tokens, d), random(tokens, d), random(d)
    compiled = torch.compile(lambda x, b, w: (rms_norm.reference(x + b, w, EPS), x + b))
    return Case("rms_norm with the sum", (tokens, d), 4 * x.nbytes,
                lambda: [rms_norm.forward(x, weight, EPS, branch)[0]],
                lambda: [rms_norm.reference(x + branch, weight, EPS)],
                lambda: [rms_norm.reference((x + branch).double(), weight.double(), EPS)],
                {"torch.compile": lambda: compiled(x, branch, weight)} | _liger_norm(x, weight))


def _norm_with_s(random: Any, tokens: int, d: int) -> Case:
    """With the thin product of three adapters of rank 16: by one kernel, and by the norm's and the library."""
    x, branch, weight, a = random(tokens, d), random(tokens, d), random(d), random(48, d, scale=d**-0.5)

    def ours(way: str) -> list[Tensor]:
        with tuned.forced(rms_norm_s=way):
            y, _, _, s = rms_norm.forward_s(x, weight, EPS, branch, a)
        return [y, y @ a.mT if s is None else s]

    def plain(wide: torch.dtype) -> list[Tensor]:
        y = rms_norm.reference((x + branch).to(wide), weight.to(wide), EPS)
        return [y, y @ a.to(wide).mT]

    return Case("norm with the sum and S", (tokens, d), 4 * x.nbytes, lambda: ours("triton"),
                lambda: plain(x.dtype), lambda: plain(torch.float64),
                {"minitune's norm, then the library": lambda: ours("reference")})


def _norm_backward(random: Any, tokens: int, d: int) -> Case:
    x, dy, past, weight = random(tokens, d), random(tokens, d), random(tokens, d), random(d)
    with backends.use("reference"):
        rstd = rms_norm.forward(x, weight, EPS)[1]

    def plain(wide: torch.dtype) -> list[Tensor]:
        leaf = x.to(wide, copy=True).requires_grad_()
        y = rms_norm.reference(leaf, weight.to(wide), EPS)
        return [torch.autograd.grad(y, leaf, dy.to(wide))[0] + past.to(wide)]

    def formula(dy: Tensor, x: Tensor, r: Tensor, w: Tensor, past: Tensor) -> Tensor:
        g, wide = dy.float() * w.float(), x.float()
        return ((g - wide * r * r * (g * wide).mean(-1, keepdim=True)) * r + past).to(x.dtype)

    compiled = torch.compile(formula)
    return Case("rms_norm backward with the sum", (tokens, d), 4 * x.nbytes,
                lambda: [rms_norm.backward(dy, x, rstd, weight, past)], lambda: plain(x.dtype),
                lambda: plain(torch.float64), {"torch.compile": lambda: compiled(dy, x, rstd, weight, past)})


def _swiglu(random: Any, tokens: int, d_ff: int) -> Case:
    gate_up = random(tokens, 2 * d_ff)
    compiled = torch.compile(swiglu.reference)
    return Case("swiglu", (tokens, d_ff), gate_up.nbytes * 3 // 2, lambda: [swiglu.forward(gate_up)],
                lambda: [swiglu.reference(gate_up)], lambda: [swiglu.reference(gate_up.double())],
                {"torch.compile": lambda: compiled(gate_up)} | _liger_swiglu(gate_up))


def _swiglu_backward(random: Any, tokens: int, d_ff: int) -> Case:
    gate_up, dh = random(tokens, 2 * d_ff), random(tokens, d_ff)
    out, scratch = torch.empty_like(gate_up), dh.clone()

    def plain(wide: torch.dtype) -> list[Tensor]:
        leaf = gate_up.to(wide, copy=True).requires_grad_()
        return [torch.autograd.grad(swiglu.reference(leaf), leaf, dh.to(wide))[0]]

    def formula(dh: Tensor, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.float().chunk(2, -1)
        s = gate.sigmoid()
        return torch.cat((dh * up * s * (1 + gate * (1 - s)), dh * gate * s), -1).to(gate_up.dtype)

    compiled = torch.compile(formula)
    scratch.copy_(dh)
    return Case("swiglu backward", (tokens, d_ff), gate_up.nbytes * 5 // 2,
                lambda: [swiglu.backward(scratch, gate_up, out=out)[0]], lambda: plain(dh.dtype),
                lambda: plain(torch.float64), {"torch.compile": lambda: compiled(dh, gate_up)})


def _rope(random: Any, tokens: int, heads: int, head_dim: int) -> Case:
    x = random(tokens, heads, head_dim)
    angles = torch.rand(tokens, head_dim // 2, device=x.device)
    cos, sin = angles.cos(), angles.sin()
    back, work = x.clone(), x.clone()
    compiled = torch.compile(rope.reference)

    def ours() -> list[Tensor]:
        return [rope.rotate_(work, cos, sin)]

    def checked() -> list[Tensor]:
        return [rope.rotate_(back.copy_(x), cos, sin)]

    case = Case("rope", (tokens, heads, head_dim), 2 * x.nbytes, checked,
                lambda: [rope.reference(x, cos.bfloat16(), sin.bfloat16())],
                lambda: [rope.reference(x.double(), cos.double(), sin.double())],
                {"torch.compile": lambda: compiled(x, cos, sin)})
    case.others["minitune, in place"] = ours
    return case


def _losses(random: Any, n: int, vocab: int) -> Case:
    logits = random(n, vocab, scale=3.0)
    labels = torch.randint(0, vocab, (n,), device=logits.device)
    work, losses = logits.clone(), torch.empty(n, device=logits.device)

    def ours() -> list[Tensor]:
        linear_cross_entropy.losses_(work, labels, losses, 0.0, True)
        return [losses, work]

    def checked() -> list[Tensor]:
        work.copy_(logits)
        return ours()

    def plain(wide: torch.dtype) -> list[Tensor]:
        leaf = logits.to(wide, copy=True).requires_grad_()
        found = F.cross_entropy(leaf.to(torch.promote_types(wide, torch.float32)), labels, reduction="none")
        return [found.detach(), torch.autograd.grad(found.sum(), leaf)[0]]

    case = Case("cross-entropy and its gradient", (n, vocab), 3 * logits.nbytes, checked, lambda: plain(logits.dtype),
                lambda: plain(torch.float64))
    case.others["minitune, in place"] = ours
    return case


def _liger_norm(x: Tensor, weight: Tensor) -> dict[str, Callable[[], Any]]:
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    except ImportError:
        return {}
    return {"Liger, without the sum": lambda: LigerRMSNormFunction.apply(x, weight, EPS)}


def _liger_swiglu(gate_up: Tensor) -> dict[str, Callable[[], Any]]:
    try:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return {}
    gate, up = (part.contiguous() for part in gate_up.chunk(2, -1))
    return {"Liger": lambda: LigerSiLUMulFunction.apply(gate, up)}


def measure(case: Case, device: str, copied: float) -> None:
    """Check, then time every variant; a row each."""
    row = {"what": "op", "op": case.name, "shape": list(case.shape), "bytes": case.n_bytes}
    truth, plain = case.truth(), case.plain()
    found = case.ours()
    pairs = list(zip(found, plain, truth, strict=True))
    errors = [error(value, t) for value, _, t in pairs]
    right = all(e <= 2 * error(p, t) + 1e-3 for e, (_, p, t) in zip(errors, pairs, strict=True))
    del truth, plain, found, pairs
    variants = {"minitune": case.ours, "plain PyTorch": case.plain, **case.others}
    if "minitune, in place" in variants:        # what is checked copies its input first
        variants["minitune"] = variants.pop("minitune, in place")
    for name, run in variants.items():
        try:
            ms = timed(run, device)
        except (RuntimeError, ImportError, TypeError, ValueError) as failure:
            emit(**row, variant=name, error=reason(failure), **({"right": False} if name == "minitune" else {}))
            continue
        rate = case.n_bytes / ms["median"] / 1e6
        emit(**row, variant=name, ms=ms, gb_per_s=rate, share_of_copy=rate / copied,
             **({"right": right, "errors": errors} if name == "minitune" else {}))


def measure_adamw(n: int, device: str, copied: float) -> None:
    """One step over a flat buffer: four fp32 values read and three written for each parameter."""
    buffers = [torch.rand(n, device=device) for _ in range(4)]
    settings = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "step": 10}
    ours, plain = ([x.clone() for x in buffers] for _ in range(2))
    adamw.adamw_(*ours, **settings)     # type: ignore[arg-type]
    with backends.use("reference"):
        adamw.adamw_(*plain, **settings)    # type: ignore[arg-type]
    right = all(error(found, expected) < 1e-5 for found, expected in zip(ours, plain, strict=True))
    del ours, plain
    for name, backend in (("minitune", None), ("torch fused", "reference")):
        row = {"what": "op", "op": "adamw", "shape": [n], "bytes": 28 * n, "variant": name}
        try:
            with backends.use(backend) if backend else torch.no_grad():
                ms = timed(lambda: adamw.adamw_(*buffers, **settings), device)     # type: ignore[arg-type]
        except (RuntimeError, ImportError) as failure:
            emit(**row, error=reason(failure), right=False)
            continue
        rate = 28 * n / ms["median"] / 1e6
        emit(**row, ms=ms, gb_per_s=rate, share_of_copy=rate / copied,
             **({"right": right} if name == "minitune" else {}))


def measure_head(tokens: int, d: int, vocab: int, device: str) -> None:
    """linear_cross_entropy with its gradient beside the two products that it cannot do without: logits and d hidden."""
    hidden = torch.randn(tokens, d, device=device).bfloat16()
    weight = (torch.randn(vocab, d, device=device) * d**-0.5).bfloat16()
    labels = torch.randint(0, vocab, (tokens,), device=device)
    logits, d_hidden = hidden.new_empty(tokens, vocab), torch.empty_like(hidden)

    def bare() -> None:
        torch.mm(hidden, weight.mT, out=logits)
        torch.mm(logits, weight, out=d_hidden)

    def ours() -> tuple[Tensor, Tensor | None]:
        return linear_cross_entropy.losses_and_gradient(hidden, weight, labels, 0.0, gradient=True)

    row = {"what": "over", "op": "linear_cross_entropy", "shape": [tokens, d, vocab]}
    try:
        leaf = hidden[:512].float().requires_grad_()
        expected = linear_cross_entropy.reference(leaf, weight.float(), labels[:512])
        slope = torch.autograd.grad(expected.sum(), leaf)[0]
        losses, gradient = ours()
        assert gradient is not None
        errors = [error(losses[:512], expected.detach()), error(gradient[:512], slope)]
        bare_ms, ms = timed(bare, device), timed(ours, device)
    except RuntimeError as failure:
        emit(**row, error=reason(failure), right=False)
        return
    emit(**row, ms=ms, bare_ms=bare_ms, over=ms["median"] / bare_ms["median"], errors=errors,
         right=max(errors) < 1e-2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    device = parser.parse_args().device
    real = device == "cuda"
    torch.manual_seed(0)
    rate = copy_rate(device)
    emit(what="copy rate", gb_per_s=rate, backends=backends.backends(device))
    sizes: tuple[int, int, tuple[int, ...], int] = (
        (TOKENS, D, (11_008, 14_336), VOCAB) if real else (32, 256, (96,), 301))
    # The two without a rival that torch.compile has to make first: a part that is cut off loses what comes last.
    measure_adamw(ADAPTERS if real else 10_000, device, rate)
    measure_head(*((TOKENS, D, VOCAB) if real else (64, 32, 301)), device)
    for case in cases(*sizes, device):
        if real:
            torch.cuda.empty_cache()
        measure(case, device, rate)
    emit(what="end")


if __name__ == "__main__":
    main()
