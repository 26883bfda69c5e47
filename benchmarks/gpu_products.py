"""The price of LoRA of rank 16 and 64 in the four products of a 7B layer: bare, addmm, augmented product, Triton.

``python -m benchmarks.gpu_products --device cuda`` checks, times and prints a row of JSON a figure. X [T, K] input,
W [N, K] base weight, A [r, K] and B [N, r] adapters with the scaling folded into B, S = X·Aᵀ, Y = X·Wᵀ + S·Bᵀ;
backward dS = dY·B, dX = dY·W + dS·A, dA = dSᵀ·X, dB = dYᵀ·S. q/k/v and gate/up are one product with one adapter each,
so their ranks add up and B is block-diagonal. Beside each pass stands its floor: what it adds to the bare product at
the least.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu_timing import copy_rate, emit, error, matrix_rate, reason, timed
from minitune.ops.backends import missing

RANKS = (16, 64)
"""Of each adapter."""
ROW_BYTES = 128
LIMIT = 1e-2
CHECKED_ROWS = 128
# name, in K, the widths of the outputs that share the product
SHAPES = (("qkv", 4096, (4096, 4096, 4096)), ("o", 4096, (4096,)), ("gate_up", 4096, (11008, 11008)),
          ("down", 11008, (4096,)))
TINY = (("qkv", 128, (64, 64, 64)), ("down", 192, (128,)))


@dataclass
class Product:
    """The tensors of one product. `each` is an adapter's rank, `rank` their sum, `padded` the columns that it takes in
    a row."""

    name: str
    n_tokens: int
    inner: int
    outer: int
    each: int
    rank: int
    padded: int
    x: Tensor
    w: Tensor
    a: Tensor
    b: Tensor
    dy: Tensor
    s: Tensor
    ds: Tensor
    y: Tensor
    dx: Tensor
    da: Tensor
    db: Tensor
    wide_w: Tensor
    wide_x: Tensor
    wide_dy: Tensor

    @property
    def flops(self) -> int:
        """Of the base product, one direction: what every variant's rate is counted by."""
        return 2 * self.n_tokens * self.inner * self.outer

    def floor_ms(self, step: str, copied: float, multiplied: float) -> float:
        """What the adapters add at the least, `copied` GB/s and `multiplied` TFLOP/s being the ceilings: S comes from
        who makes X, and is met within the product; dS and dB take one more reading of dY, dA one of X."""
        tokens, widths = self.n_tokens, {"forward": 0, "backward": self.outer + self.inner}
        read = 2 * tokens * (widths[step] + self.rank)
        deeper = 2 * tokens * self.rank * (self.outer if step == "forward" else self.inner)
        return read / copied / 1e6 + deeper / multiplied / 1e9


def make(name: str, inner: int, widths: tuple[int, ...], n_tokens: int, device: str, each: int = 16) -> Product:
    """Random tensors whose adapter term is as large as the base term, so that losing it cannot pass the check."""
    outer, rank = sum(widths), each * len(widths)
    lanes = ROW_BYTES // 2
    padded = -(-rank // lanes) * lanes
    if inner % lanes or outer % lanes:
        raise ValueError(f"{name}: {inner} and {outer} must be multiples of {lanes}, so that padded rows stay aligned")

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).bfloat16()

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device=device)

    x, w, dy = random(n_tokens, inner), random(outer, inner, scale=inner**-0.5), random(n_tokens, outer)
    a = random(rank, inner, scale=inner**-0.5)
    b = torch.zeros(outer, rank, dtype=torch.bfloat16, device=device)
    for i, width in enumerate(widths):
        b[i * width:(i + 1) * width, i * each:(i + 1) * each] = random(width, each, scale=each**-0.5)
    wide_w, wide_x, wide_dy = (torch.zeros(*shape, dtype=torch.bfloat16, device=device) for shape in (
        (outer + padded, inner + padded), (n_tokens, inner + padded), (n_tokens, outer + padded)))
    wide_w[:outer, :inner], wide_w[:outer, inner:inner + rank], wide_w[outer:outer + rank, :inner] = w, b, a
    wide_x[:, :inner], wide_dy[:, :outer] = x, dy
    s, ds = x @ a.t(), dy @ b
    wide_x[:, inner:inner + rank], wide_dy[:, outer:outer + rank] = s, ds
    return Product(name, n_tokens, inner, outer, each, rank, padded, x, w, a, b, dy, s, ds, empty(n_tokens, outer),
                   empty(n_tokens, inner), empty(rank, inner), empty(outer, rank), wide_w, wide_x, wide_dy)


def forward_variants(p: Product) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, function that writes p.y)."""
    base, wide_base = p.w.t(), p.wide_w[:p.outer].t()
    x_rows, s_tail = p.wide_x[:, :p.inner], p.wide_x[:, p.inner:p.inner + p.rank]

    def bare() -> None:
        torch.mm(p.x, base, out=p.y)

    def addmm() -> None:
        torch.mm(p.x, p.a.t(), out=p.s)
        torch.mm(p.x, base, out=p.y)
        p.y.addmm_(p.s, p.b.t())

    def augmented() -> None:
        torch.mm(p.wide_x, wide_base, out=p.y)

    def augmented_tail() -> None:
        torch.mm(x_rows, p.a.t(), out=s_tail)
        augmented()

    def augmented_copy() -> None:
        x_rows.copy_(p.x)
        augmented_tail()

    def triton() -> None:
        from minitune.kernels import lora_matmul as ours

        torch.mm(p.x, p.a.t(), out=p.s)
        ours.forward(p.x, p.w, p.s, p.b, None, out=p.y)

    yield from {"bare": bare, "addmm": addmm, "augmented, tail by the producer": augmented,
                "augmented, S as a product": augmented_tail, "augmented, X copied": augmented_copy}.items()
    if not missing("triton", p.x.device):
        yield "Triton", triton


def backward_variants(p: Product) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, function that writes p.dx and, but for bare, p.da and p.db)."""
    wide_base = p.wide_w[:, :p.inner]
    dy_rows, ds_tail = p.wide_dy[:, :p.outer], p.wide_dy[:, p.outer:p.outer + p.rank]
    x_rows, s_tail = p.wide_x[:, :p.inner], p.wide_x[:, p.inner:p.inner + p.rank]

    def bare() -> None:
        torch.mm(p.dy, p.w, out=p.dx)

    def addmm() -> None:
        torch.mm(p.dy, p.b, out=p.ds)
        torch.mm(p.dy, p.w, out=p.dx)
        p.dx.addmm_(p.ds, p.a)
        torch.mm(p.ds.t(), p.x, out=p.da)
        torch.mm(p.dy.t(), p.s, out=p.db)

    def augmented() -> None:
        torch.mm(p.wide_dy, wide_base, out=p.dx)
        torch.mm(ds_tail.t(), x_rows, out=p.da)
        torch.mm(dy_rows.t(), s_tail, out=p.db)

    def augmented_tail() -> None:
        torch.mm(dy_rows, p.b, out=ds_tail)
        augmented()

    def augmented_copy() -> None:
        dy_rows.copy_(p.dy)
        augmented_tail()

    def triton() -> None:
        from minitune.kernels import lora_matmul as ours

        torch.mm(p.dy, p.b, out=p.ds)
        ours.backward_input(p.dy, p.w, p.ds, p.a, out=p.dx)
        p.da, p.db = ours.backward_adapters(p.dy, p.x, p.s, p.ds)

    yield from {"bare": bare, "addmm": addmm, "augmented, tail by the producer": augmented,
                "augmented, dS as a product": augmented_tail, "augmented, dY copied": augmented_copy}.items()
    if not missing("triton", p.x.device):
        yield "Triton", triton      # last: its dA and dB are fp32


@dataclass
class Truth:
    """fp64 results: Y and dX at the rows `rows`, dA and dB whole; `plain` is without adapters."""

    rows: Tensor
    y: Tensor
    dx: Tensor
    plain_y: Tensor
    plain_dx: Tensor
    da: Tensor
    db: Tensor


def truth(p: Product) -> Truth:
    """From the bf16 inputs, with no rounding in between."""
    rows = torch.randperm(p.n_tokens, device=p.x.device)[:CHECKED_ROWS]
    w, a, b = p.w.double(), p.a.double(), p.b.double()
    x, dy = p.x.double(), p.dy.double()
    s, ds = x @ a.t(), dy @ b
    plain_y, plain_dx = x[rows] @ w.t(), dy[rows] @ w
    return Truth(rows, plain_y + s[rows] @ b.t(), plain_dx + ds[rows] @ a, plain_y, plain_dx, ds.t() @ x, dy.t() @ s)


def check(p: Product, t: Truth, variant: str, step: str, run: Callable[[], None]) -> dict[str, float]:
    """Each output's error after one run over poisoned outputs. dB counts only where B may be other than zero."""
    for out in (p.y, p.dx, p.da, p.db):
        out.fill_(float("nan"))
    run()
    if step == "forward":
        return {"Y": error(p.y[t.rows], t.plain_y if variant == "bare" else t.y)}
    if variant == "bare":
        return {"dX": error(p.dx[t.rows], t.plain_dx)}
    return {"dX": error(p.dx[t.rows], t.dx), "dA": error(p.da, t.da), "dB": error(p.db, t.db)}


def measure(p: Product, device: str, copied: float, multiplied: float) -> None:
    """Check and time all variants of one product; a row each."""
    t = truth(p)
    for step, variants in (("forward", forward_variants(p)), ("backward", backward_variants(p))):
        plain: dict[str, float] = {}
        bare_ms = 0.0
        for variant, run in variants:
            row = {"what": "product", "product": p.name, "pass": step, "variant": variant, "tokens": p.n_tokens,
                   "in": p.inner, "out": p.outer, "each": p.each, "rank": p.rank, "padded_rank": p.padded,
                   "floor_ms": p.floor_ms(step, copied, multiplied)}
            try:
                errors = check(p, t, variant, step, run)
                plain = errors if variant == "addmm" else plain
                right = all(found <= min(LIMIT, 2 * plain.get(name, LIMIT)) for name, found in errors.items())
                if not right:
                    emit(**row, errors=errors, right=False)
                    continue
                ms = timed(run, device)
                bare_ms = ms["median"] if variant == "bare" else bare_ms
                emit(**row, errors=errors, right=True, ms=ms, tflops=p.flops / ms["median"] / 1e9,
                     over_bare=ms["median"] / bare_ms if bare_ms else None)
            except RuntimeError as failure:
                emit(**row, error=reason(failure), right=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    device = parser.parse_args().device
    torch.manual_seed(0)
    copied, multiplied = copy_rate(device), matrix_rate(device)
    emit(what="matrix rate", tflops=multiplied)
    emit(what="copy rate", gb_per_s=copied)
    for each in RANKS:
        for name, inner, widths in SHAPES if device == "cuda" else TINY:
            made = make(name, inner, widths, 16_384 if device == "cuda" else 256, device, each)
            measure(made, device, copied, multiplied)
    emit(what="end")


if __name__ == "__main__":
    main()
