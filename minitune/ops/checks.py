"""checks: every op at a model's true shapes, by the backend that it takes here, against its reference in fp64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from minitune.config import ModelConfig
from minitune.ops import (
    attention,
    backends,
    few_rows,
    linear_cross_entropy,
    lora_matmul,
    nf4,
    products,
    rms_norm,
    rope,
    swiglu,
)
from minitune.ops.checks_update import Function, Results, Update
from minitune.ops.documents import Documents
from minitune.ops.lora_matmul import LoraWeights
from minitune.ops.nf4_linear import DecodeBuffer, FusedNF4, nf4_linear

REFERENCE_ROWS = 512
"""Tokens whose logits the reference has at a time: in fp64 those of a large vocabulary are a megabyte each."""


class Check(NamedTuple):
    """The largest error of a result, what is allowed (twice that of plain PyTorch in the same dtype, and one ulp of the
    largest value), and whether the root mean square keeps the same rule."""

    op: str
    what: str
    backend: str
    error: float
    allowed: float
    right: bool


class Case(NamedTuple):
    """An op with random operands. Results that `exact` names are packed values, or decoded ones: they must have the
    reference's bits. Such a case knows no fp64."""

    op: str
    backend: str
    function: Function
    operands: dict[str, Tensor]
    exact: tuple[str, ...] = ()

    def results(self, kind: str) -> Results:
        """By the op itself ("ours"), by its reference ("plain"), or by that in fp64 ("truth")."""
        wide = {name: x.double() if kind == "truth" and x.is_floating_point() else x
                for name, x in self.operands.items()}
        with torch.enable_grad():
            return {what: value.detach() for what, value in self.function(kind, wide).items()}

    def checks(self) -> Iterator[Check]:
        """One Check for every result."""
        ours, plain = self.results("ours"), self.results("plain")
        truth = plain if self.exact else self.results("truth")
        for what, value in ours.items():
            if what in self.exact:
                wrong = int((_bits(value) != _bits(plain[what])).sum())
                yield Check(self.op, f"{what} that differ, of {value.numel():,}", self.backend, wrong, 0, not wrong)
            else:
                yield _compare(self.op, what, self.backend, value, plain[what], truth[what])


def run(config: ModelConfig, tokens: int, dtype: torch.dtype, device: torch.device, rank: int = 16) -> Iterator[Check]:
    """One Check for every result of every op, at `tokens` tokens in a few documents of unequal length."""
    for case in cases(config, tokens, dtype, device, rank):
        yield from case.checks()


def cases(config: ModelConfig, tokens: int, dtype: torch.dtype, device: torch.device, rank: int = 16) -> Iterator[Case]:
    """What `run` checks, each made when it is asked for; the same operands whenever the arguments are the same."""
    made = _Inputs(config, tokens, dtype, device, rank)
    update = Update(config.d_model, config.d_ff, rank, dtype, device, made.generator)
    for op, make in (("rms_norm", made.norm), ("swiglu", made.swiglu), ("rope", made.rope),
                     ("attention", made.attention), ("linear_cross_entropy", made.losses),
                     ("lora_matmul", made.product), ("lora_gradients", update.lora_gradients),
                     ("lora_images", update.lora_images), ("adamw", update.adamw), ("sgd", update.sgd),
                     ("few_rows", made.row), ("products", made.apart), ("nf4", made.packed_row)):
        yield Case(op, made.backend(op), *make())
    yield Case("nf4", made.backend("nf4"), *made.packed(), ("codes", "absmax", "values"))
    yield Case("adamw_8bit", made.backend("adamw_8bit"), *update.adamw_8bit(), ("8-bit moments",))


def _bits(values: Tensor) -> Tensor:
    return values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.element_size()])


def _compare(op: str, what: str, backend: str, value: Tensor, plain: Tensor, truth: Tensor) -> Check:
    error, allowed = (value.double() - truth).abs(), (plain.double() - truth).abs()
    ulp = float(truth.abs().max()) * torch.finfo(value.dtype).eps
    limit = 2 * float(allowed.max()) + ulp
    rms = float(error.square().mean().sqrt()) <= 2 * float(allowed.square().mean().sqrt()) + ulp
    worst = float(error.max())
    return Check(op, what, backend, worst, limit, worst <= limit and rms)      # NaN is above everything


class _Inputs:
    """Random operands of each op, and the function from them to its results: kind "ours", or by the reference."""

    def __init__(self, config: ModelConfig, tokens: int, dtype: torch.dtype, device: torch.device, rank: int):
        self.config, self.tokens, self.dtype, self.device, self.rank = config, tokens, dtype, device, rank
        part = max(1, tokens // 5)
        self.documents = Documents.from_lengths(tuple(n for n in (part, 1, tokens - part - 1) if n > 0), device)
        self.generator = torch.Generator(device).manual_seed(0)

    def backend(self, op: str) -> str:
        """What the op takes at these shapes."""
        if op == "attention":
            q, k = (self.random(1, n, self.config.head_dim) for n in (self.config.n_heads, self.config.n_kv_heads))
            window = self.config.windows[0]
            way = attention.forward_way(q, k, self.documents, window)
            back = attention.backward_way(q, k, self.documents.max_seqlen, window)
            return f"{way}, backward {back}" if way in ("triton", "flash", "cudnn") and way != back else way
        if op == "lora_matmul":
            a = self.random(2 * self.rank, self.config.d_model)
            weight = torch.empty(2 * self.config.d_ff, self.config.d_model, device="meta")
            way = LoraWeights(weight, None, a, a).way("forward", self.tokens)
            return "addmm" if way == "augmented" else way       # what is checked has no margins
        return backends.choose(op, self.device, dtype=self.dtype)

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, device=self.device) * scale
        return values.to(self.dtype)

    def norm(self) -> tuple[Function, dict[str, Tensor]]:
        shape = self.tokens, self.config.d_model
        eps = self.config.norm_eps

        def function(kind: str, t: dict[str, Tensor]) -> Results:
            if kind == "ours":
                y, rstd, total, s = rms_norm.forward_s(t["x"], t["weight"], eps, t["branch"], t["a"])
                d_weight = rms_norm.backward_weight(t["dy"], total, rstd)
                dx = rms_norm.backward(t["dy"], total, rstd, t["weight"], t["past"])
                return {"y": y, "S": y @ t["a"].mT if s is None else s, "dx": dx, "d weight": d_weight}
            leaves = (t["x"] + t["branch"]).requires_grad_(), t["weight"].clone().requires_grad_()
            y = rms_norm.reference(*leaves, eps)
            dx, d_weight = torch.autograd.grad(y, leaves, t["dy"])
            return {"y": y.detach(), "S": y.detach() @ t["a"].mT, "dx": dx + t["past"], "d weight": d_weight}

        names, d = ("x", "branch", "dy", "past"), shape[1]
        adapters = self.random(3 * self.rank, d, scale=d**-0.5)
        return function, {name: self.random(*shape) for name in names} | {"weight": self.random(d), "a": adapters}

    def swiglu(self) -> tuple[Function, dict[str, Tensor]]:
        def function(kind: str, t: dict[str, Tensor]) -> Results:
            if kind == "ours":
                return {"h": swiglu.forward(t["gate_up"]), "d": swiglu.backward(t["dh"].clone(), t["gate_up"])[0]}
            gate_up = t["gate_up"].clone().requires_grad_()
            h = swiglu.reference(gate_up)
            return {"h": h, "d": torch.autograd.grad(h, gate_up, t["dh"])[0]}

        f = self.config.d_ff
        return function, {"gate_up": self.random(self.tokens, 2 * f, scale=3.0), "dh": self.random(self.tokens, f)}

    def rope(self) -> tuple[Function, dict[str, Tensor]]:
        cos, sin = rope.tables(self.config, self.documents.positions().to(self.device), self.documents)

        def function(kind: str, t: dict[str, Tensor]) -> Results:
            if kind == "ours":
                return {"x": rope.rotate_(t["x"].clone(), cos, sin)}
            return {"x": rope.reference(t["x"], cos.to(t["x"].dtype), sin.to(t["x"].dtype))}

        return function, {"x": self.random(self.tokens, self.config.n_heads, self.config.head_dim)}

    def attention(self) -> tuple[Function, dict[str, Tensor]]:
        heads, kv_heads, window = self.config.n_heads, self.config.n_kv_heads, self.config.windows[0]

        def function(kind: str, t: dict[str, Tensor]) -> Results:
            if kind == "ours":
                out, saved = attention.forward(t["q"], t["k"], t["v"], self.documents, window)
                gradient = out.new_empty(len(out), heads + 2 * kv_heads, out.shape[2])
                attention.backward(t["dout"], saved, gradient)
                return {"out": out} | dict(zip(("dq", "dk", "dv"), gradient.split((heads, kv_heads, kv_heads), 1),
                                               strict=True))
            q, k, v = (t[name].clone().requires_grad_() for name in ("q", "k", "v"))
            out = attention.reference(q, k, v, self.documents, window)
            gradients = torch.autograd.grad(out, (q, k, v), t["dout"])
            return {"out": out} | dict(zip(("dq", "dk", "dv"), gradients, strict=True))

        sizes = {"q": heads, "k": kv_heads, "v": kv_heads, "dout": heads}
        return function, {name: self.random(self.tokens, n, self.config.head_dim) for name, n in sizes.items()}

    def losses(self) -> tuple[Function, dict[str, Tensor]]:
        d, vocab = self.config.d_model, self.config.vocab_size

        def function(kind: str, t: dict[str, Tensor]) -> Results:
            take, rows = ((linear_cross_entropy.linear_cross_entropy, self.tokens) if kind == "ours"
                          else (linear_cross_entropy.reference, REFERENCE_ROWS))
            found = []
            for part, labels in zip(t["hidden"].split(rows), t["labels"].split(rows), strict=True):
                hidden = part.clone().requires_grad_()
                losses = take(hidden, t["head"], labels)
                found.append((losses, torch.autograd.grad(losses.sum(), hidden)[0]))
            return dict(zip(("losses", "d hidden"), map(torch.cat, zip(*found, strict=True)), strict=True))

        labels = torch.randint(0, vocab, (self.tokens,), generator=self.generator, device=self.device)
        return function, {"hidden": self.random(self.tokens, d), "head": self.random(vocab, d, scale=d**-0.5),
                          "labels": labels}

    def product(self) -> tuple[Function, dict[str, Tensor]]:
        n, k, r = 2 * self.config.d_ff, self.config.d_model, 2 * self.rank

        def function(kind: str, t: dict[str, Tensor]) -> Results:
            w = LoraWeights(t["weight"], None, t["a"], t["b"])
            if kind == "ours":
                y, s = lora_matmul.forward(t["x"], w)
                ds = lora_matmul.backward_s(t["dy"], w)
                assert s is not None and ds is not None
                da, db = lora_matmul.backward_adapters(t["dy"], t["x"], s, ds, w)
                return {"y": y, "dx": lora_matmul.backward_input(t["dy"], ds, w), "dA": da, "dB": db}
            free = [t[name].clone().requires_grad_() for name in ("x", "a", "b")]
            y = lora_matmul.reference(free[0], w._replace(a=free[1], b=free[2]))
            return {"y": y} | dict(zip(("dx", "dA", "dB"), torch.autograd.grad(y, free, t["dy"]), strict=True))

        return function, {"x": self.random(self.tokens, k), "weight": self.random(n, k, scale=k**-0.5),
                          "a": self.random(r, k, scale=k**-0.5), "b": self.random(n, r),
                          "dy": self.random(self.tokens, n)}

    def row(self) -> tuple[Function, dict[str, Tensor]]:
        def function(kind: str, t: dict[str, Tensor]) -> Results:
            return {"y": few_rows.product(t["x"], t["weight"]) if kind == "ours" else t["x"] @ t["weight"].mT}

        n, k = self.config.d_ff, self.config.d_model
        return function, {"x": self.random(1, k), "weight": self.random(n, k, scale=k**-0.5)}

    def apart(self) -> tuple[Function, dict[str, Tensor]]:
        """A product by parts of its rows, at whatever shape, where there is such a way."""
        def function(kind: str, t: dict[str, Tensor]) -> Results:
            if kind != "ours" or backends.choose("products", self.device, dtype=self.dtype) != "native":
                return {"y": products.reference(t["x"], t["right"])}
            return {"y": products.apart(t["x"], t["right"], t["x"].new_empty(len(t["x"]), t["right"].shape[1]))}

        k, n = self.config.d_ff, self.config.d_model
        return function, {"x": self.random(self.tokens, k), "right": self.random(k, n, scale=k**-0.5)}

    def packed(self) -> tuple[Function, dict[str, Tensor]]:
        """A weight packed and decoded."""
        def function(kind: str, t: dict[str, Tensor]) -> Results:
            with contextlib.nullcontext() if kind == "ours" else backends.use("reference"):
                weight = nf4.quantize(t["weight"])
                return {"codes": weight.packed, "absmax": weight.absmax, "values": weight.dequantize(self.dtype)}

        return function, {"weight": self.random(self.config.d_ff, self.config.d_model)}

    def packed_row(self) -> tuple[Function, dict[str, Tensor]]:
        """One row times a weight in NF4, as generation multiplies it; the truth knows the weight decoded."""
        n, k = self.config.d_ff, self.config.d_model
        packed = nf4.quantize(self.random(n, k, scale=k**-0.5))
        fused = FusedNF4([packed], DecodeBuffer(self.dtype))

        def function(kind: str, t: dict[str, Tensor]) -> Results:
            if kind != "ours":
                return {"y of one row": t["x"] @ t["weight"].mT}
            if not fused.reads_packed(self.dtype):
                return {"y of one row": nf4_linear(t["x"], fused)}
            y = t["x"].new_empty(1, n)
            fused.vector_product()(t["x"][0], y[0])
            return {"y of one row": y}

        return function, {"x": self.random(1, k), "weight": packed.dequantize(self.dtype)}
