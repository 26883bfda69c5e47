"""Packed causal attention by our kernel, by the dispatch and by each of torch's backends: checked, then timed.

``python -m benchmarks.gpu_attention --device cuda`` prints a row of JSON a figure. q [T, H, D], k and v [T, H_kv, D],
all documents of a case end to end; no document sees another. A backend that a device or a torch lacks is a row with the
reason. Backward is timed twice, as it comes and with torch.use_deterministic_algorithms.
"""

from __future__ import annotations

import argparse
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu_timing import emit, error, matrix_rate, reason, timed
from minitune.ops import attention
from minitune.ops.backends import missing
from minitune.ops.documents import Documents

SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION}
RAGGED = (4096, 3001, 2500, 2048, 1777, 1024, 700, 512, 383, 300, 43)
CASES = (("8 x 2048, 32 heads", (2048,) * 8, 32, 32, 128), ("8 x 2048, 32/8 heads", (2048,) * 8, 32, 8, 128),
         ("1 x 16384, 32 heads", (16_384,), 32, 32, 128),
         ("ragged, 32 heads", RAGGED, 32, 32, 128), ("ragged, 32/8 heads", RAGGED, 32, 8, 128))
TINY = (("2 x 32, 4 heads", (32,) * 2, 4, 4, 16), ("ragged, 4/2 heads", (33, 20, 11), 4, 2, 16))


@dataclass
class Case:
    """One layout with its random tensors; `out` is the gradient that comes in from above."""

    name: str
    lengths: tuple[int, ...]
    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    cu: Tensor

    @property
    def grouped(self) -> bool:
        return self.q.shape[1] != self.k.shape[1]

    @property
    def flops(self) -> int:
        """Of the causal half, forward; backward is 2.5 times that."""
        return sum(2 * self.q.shape[1] * self.q.shape[2] * length**2 for length in self.lengths)


def make(name: str, lengths: tuple[int, ...], heads: int, kv_heads: int, dim: int, device: str) -> Case:
    total = sum(lengths)
    q, k, v, do = (torch.randn(total, h, dim, device=device).bfloat16() for h in (heads, kv_heads, kv_heads, heads))
    cu = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    return Case(name, lengths, q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), do, cu)


@torch.no_grad()
def reference(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """out, dq, dk, dv by the definition, in `dtype` throughout (softmax in fp32 at least), one document and head group
    at a time, so that the score matrices stay small."""
    group, scale = case.q.shape[1] // case.k.shape[1], case.q.shape[2] ** -0.5
    results = [torch.zeros_like(t, dtype=dtype) for t in (case.do, case.q, case.k, case.v)]
    begin = 0
    for length in case.lengths:
        here = slice(begin, begin + length)
        hidden = torch.ones(length, length, dtype=torch.bool, device=case.q.device).triu(1)
        for head in range(case.k.shape[1]):
            mine = slice(head * group, (head + 1) * group)
            q, do = (t[here, mine].transpose(0, 1).to(dtype) for t in (case.q, case.do))
            k, v = (t[here, head].to(dtype) for t in (case.k, case.v))
            scores = (q @ k.t() * scale).masked_fill(hidden, float("-inf"))
            p = scores.softmax(-1, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)
            dp = do @ v.t()
            ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
            results[0][here, mine] = (p @ v).transpose(0, 1)
            results[1][here, mine] = (ds @ k).transpose(0, 1)
            results[2][here, head] = (ds.transpose(1, 2) @ q).sum(0)
            results[3][here, head] = (p.transpose(1, 2) @ do).sum(0)
        begin += length
    return results


# ---- backends -------------------------------------------------------------------------------------------------------
class Backend(Protocol):
    """forward() gives out; backward() gives dq, dk, dv of the last forward, as often as it is called."""

    def forward(self) -> Tensor: ...

    def backward(self) -> tuple[Tensor, ...]: ...


class Differentiable:
    """A backend that autograd knows."""

    def __init__(self, case: Case, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self.case, self.function = case, function
        self.out: Tensor | None = None

    def forward(self) -> Tensor:
        self.out = self.function(self.case.q, self.case.k, self.case.v)
        return self.out

    def backward(self) -> tuple[Tensor, ...]:
        out = self.forward() if self.out is None else self.out
        return torch.autograd.grad(out, (self.case.q, self.case.k, self.case.v), self.case.do, retain_graph=True)


def sdpa(case: Case, backend: SDPBackend, expand: bool) -> Backend:
    """Equal lengths as one batch [n, H, S, D]; else one call a document. `expand` repeats k and v for their group."""

    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if expand:
            k, v = (t.repeat_interleave(q.shape[-2] // t.shape[-2], -2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=case.grouped and not expand)
        return out.transpose(1, 2)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            if len(set(case.lengths)) == 1:
                batched = (t.view(len(case.lengths), case.lengths[0], *t.shape[1:]) for t in (q, k, v))
                return one(*batched).reshape(q.shape)
            parts = zip(*(t.split(case.lengths) for t in (q, k, v)), strict=True)
            return torch.cat([one(*(t.unsqueeze(0) for t in part)).squeeze(0) for part in parts])

    return Differentiable(case, run)


def varlen(case: Case) -> Backend:
    """torch.nn.attention.varlen; its way of saying "causal" and "grouped" changed between torch 2.10 and 2.13."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        options["enable_gqa"] = case.grouped
    longest = max(case.lengths)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = varlen_attn(q, k, v, case.cu, case.cu, longest, longest, **options)
        return out if isinstance(out, Tensor) else out[0]

    return Differentiable(case, run)


class AtenFlash:
    """FlashAttention by the operators under SDPA and varlen, which take cu_seqlens and give their own backward."""

    def __init__(self, case: Case) -> None:
        self.case, self.longest = case, max(case.lengths)
        self.saved: tuple[Any, ...] = ()

    @torch.no_grad()
    def forward(self) -> Tensor:
        c = self.case
        self.saved = torch.ops.aten._flash_attention_forward(c.q, c.k, c.v, c.cu, c.cu, self.longest, self.longest, 0.0,
                                                             True, False)
        out: Tensor = self.saved[0]
        return out

    @torch.no_grad()
    def backward(self) -> tuple[Tensor, ...]:
        c = self.case
        out, lse, state, unused = self.saved[:4]
        return tuple(torch.ops.aten._flash_attention_backward(
            c.do, c.q, c.k, c.v, out, lse, c.cu, c.cu, self.longest, self.longest, 0.0, True, state, unused))


class AtenEfficient:
    """The memory-efficient kernels by their operators: [1, T, H, D] with cu_seqlens; k and v repeated for their group,
    and the repeated heads' gradients added up again."""

    CAUSAL_FROM_TOP_LEFT = 1

    def __init__(self, case: Case) -> None:
        self.case, self.longest = case, max(case.lengths)
        self.saved: tuple[Any, ...] = ()

    @torch.no_grad()
    def forward(self) -> Tensor:
        c = self.case
        group = c.q.shape[1] // c.k.shape[1]
        q, k, v = (t.unsqueeze(0) for t in (c.q, *(t.repeat_interleave(group, 1) for t in (c.k, c.v))))
        out, lse, seed, offset, most_q, most_k = torch.ops.aten._efficient_attention_forward(
            q, k, v, None, c.cu, c.cu, self.longest, self.longest, 0.0, self.CAUSAL_FROM_TOP_LEFT, True)
        self.saved = (q, k, v, out, lse, seed, offset, most_q, most_k)
        found: Tensor = out.squeeze(0)
        return found

    @torch.no_grad()
    def backward(self) -> tuple[Tensor, ...]:
        c = self.case
        q, k, v, out, lse, seed, offset, most_q, most_k = self.saved
        dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
            c.do.unsqueeze(0), q, k, v, None, out, c.cu, c.cu, most_q, most_k, lse, 0.0, seed, offset,
            self.CAUSAL_FROM_TOP_LEFT, False)
        dk, dv = (t.squeeze(0).unflatten(1, (c.k.shape[1], -1)).sum(2) for t in (dk, dv))
        return dq.squeeze(0), dk, dv


class Ours:
    """minitune's Triton kernel; its backward is deterministic as it comes."""

    def __init__(self, case: Case) -> None:
        reason_why = missing("triton", case.q.device)
        if reason_why:
            raise RuntimeError(reason_why)
        from minitune.kernels import attention as kernel

        self.case, self.kernel = case, kernel
        self.spans = Documents(case.cu, case.lengths).spans
        self.saved: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def forward(self) -> Tensor:
        c = self.case
        self.saved = self.kernel.forward(c.q, c.k, c.v, self.spans[0], None)
        return self.saved[0]

    @torch.no_grad()
    def backward(self) -> tuple[Tensor, ...]:
        c = self.case
        out, lse = self.saved or self.kernel.forward(c.q, c.k, c.v, self.spans[0], None)
        self.saved = out, lse
        return self.kernel.backward(c.do, c.q, c.k, c.v, out, lse, *self.spans, None)


class Dispatched:
    """What a training step runs: `ops/attention.py`, which takes what it takes at this shape."""

    def __init__(self, case: Case) -> None:
        self.case, self.documents = case, Documents(case.cu, case.lengths)
        self.saved: attention.Saved | None = None

    @torch.no_grad()
    def forward(self) -> Tensor:
        c = self.case
        out, self.saved = attention.forward(c.q.detach(), c.k.detach(), c.v.detach(), self.documents)
        return out

    def backward(self) -> tuple[Tensor, ...]:
        if self.saved is None:
            self.forward()
        assert self.saved is not None
        apart = attention.backward_apart(self.case.do, self.saved, keep_graph=True)
        if apart is not None:
            return apart
        c = self.case
        whole = c.q.new_empty(len(c.q), c.q.shape[1] + 2 * c.k.shape[1], c.q.shape[2])
        with torch.no_grad():
            attention.backward(c.do, self.saved, whole, keep_graph=True)
        return whole.split((c.q.shape[1], c.k.shape[1], c.k.shape[1]), dim=1)


def backends(case: Case) -> Iterator[tuple[str, Callable[[], Backend]]]:
    """(name, maker) of every way; those that are likelier to break the device come last."""
    manner = "batch" if len(set(case.lengths)) == 1 else "call a document"
    yield "minitune", lambda: Ours(case)
    yield "dispatch", lambda: Dispatched(case)
    yield "varlen_attn", lambda: varlen(case)
    yield "aten flash, cu_seqlens", lambda: AtenFlash(case)
    yield "aten efficient, cu_seqlens", lambda: AtenEfficient(case)
    for name, sdpa_backend in SDPA.items():
        expand = case.grouped and name == "efficient"  # it knows no groups
        yield (f"sdpa {name}, one {manner}{', kv repeated' if expand else ''}",
               lambda backend=sdpa_backend, expand=expand: sdpa(case, backend, expand))  # type: ignore[misc]


# ---- check and time -------------------------------------------------------------------------------------------------
def figures(backend: Backend, step: str, case: Case, device: str, truth: list[Tensor],
            allowed: list[float]) -> dict[str, Any]:
    """Errors, whether they are allowed, whether a repeat is bitwise the same, and, only where right, the time."""
    out = backend.forward()
    if step == "forward":
        first, found, again = 0, (out,), (backend.forward(),)
        run: Callable[[], object] = backend.forward
        flops = float(case.flops)
    else:
        first, found, again = 1, backend.backward(), backend.backward()  # type: ignore[assignment]
        run, flops = backend.backward, 2.5 * case.flops
    limits = allowed[first:first + len(found)]
    errors = [error(t.detach(), right) for t, right in zip(found, truth[first:], strict=False)]
    result: dict[str, Any] = {"errors": errors, "allowed": limits,
                              "right": all(off <= limit for off, limit in zip(errors, limits, strict=True)),
                              "repeats": all(torch.equal(a, b) for a, b in zip(found, again, strict=True))}
    if result["right"]:
        result["ms"] = timed(run, device)
        result["tflops"] = flops / result["ms"]["median"] / 1e9
    return result


def measure(case: Case, device: str) -> None:
    """Every backend on one case: a row for forward, one for backward, one for deterministic backward."""
    truth, plain = reference(case, torch.float32), reference(case, torch.bfloat16)
    allowed = [2 * error(found, right) for found, right in zip(plain, truth, strict=True)]

    for name, maker in backends(case):
        for step in ("forward", "backward", "backward, deterministic"):
            row = {"what": "attention", "case": case.name, "backend": name, "pass": step}
            torch.use_deterministic_algorithms(step.endswith("deterministic"))
            try:
                with warnings.catch_warnings(record=True) as told:  # torch says why a kernel does not apply in warnings
                    warnings.simplefilter("always")
                    emit(**row, **figures(maker(), step, case, device, truth, allowed))
            except (RuntimeError, ImportError, ValueError, TypeError, AttributeError) as failure:
                because = [str(warning.message).strip().splitlines()[0][:200] for warning in told]
                emit(**row, unavailable=reason(failure), because=because)
            finally:
                torch.use_deterministic_algorithms(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    device = parser.parse_args().device
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it would be timed too
    emit(what="matrix rate", tflops=matrix_rate(device))
    for name, lengths, heads, kv_heads, dim in CASES if device == "cuda" else TINY:
        measure(make(name, lengths, heads, kv_heads, dim, device), device)
    emit(what="end")


if __name__ == "__main__":
    main()
