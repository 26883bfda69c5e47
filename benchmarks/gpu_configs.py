"""Every Triton kernel of a step in other configurations than its own: which tiles, warps and stages a GPU likes best.

``PARTS=configs python -m benchmarks.gpu`` runs it; KERNELS="dkdv product" measures only those whose names hold one of
the words. It prints a row of JSON a configuration: what its kernel's CONFIGS may hold for this generation. What does
not compile, or finds no room, is a row with the reason. All of a kernel's are compiled side by side, then timed one by
one, at shapes of Llama-2-7B with 16k tokens, bf16; each result is held to that of the kernel's own configuration. Of
attention's dq and dkdv the whole backward is timed, the other one in its own configuration.
``--device cpu`` runs two of each, tiny, under Triton's interpreter.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.gpu_timing import emit, error, reason, timed

if TYPE_CHECKING:
    from minitune.kernels.launch import Config

LIMIT = 2e-2
"""‖difference‖ / ‖own result‖: another order of sums in bf16, and no more."""
SHOWN_ON_CPU = 2
SUMS = 128
"""Half of a thread's registers."""
Run = Callable[["Config"], list[Tensor]]


class Case:
    """A kernel on its tensors: ``run(config)`` gives what it writes. ``outputs``: tensors that it is given to write to,
    ``in_place``: those that it reads and writes."""

    def __init__(self, run: Run, outputs: Sequence[Tensor] = (), in_place: Sequence[Tensor] = ()) -> None:
        self.run, self.outputs = run, outputs
        self._begun = [(each, each.clone()) for each in in_place]

    def checked(self, config: Config) -> list[Tensor]:
        """The result of one run, where all that it has to write was NaN, or what it was at first: what it leaves out
        is seen."""
        for each in self.outputs:
            each.fill_(math.nan)
        for each, begun in self._begun:
            each.copy_(begun)
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)        # with it torch.empty gives NaN too
        try:
            return [each.clone() for each in self.run(config)]
        finally:
            torch.use_deterministic_algorithms(before)


@dataclass(frozen=True)
class Kernel:
    """`own`: the configuration that it is launched with. The others are all of `tiles` (name -> sizes), `warps` and
    `stages`, with the `fixed` tiles; `loop`: the kernel's own loop takes the stages too, as STAGES; `sums`: a program
    holds one for each element of a tile of these sizes, and SUMS of them are the most for a thread. `make` gives the
    case, of random tensors and whether the shape is the real one."""

    name: str
    own: Config
    tiles: Mapping[str, tuple[int, ...]]
    make: Callable[[Callable[..., Tensor], bool], Case]
    warps: tuple[int, ...] = (4, 8)
    stages: tuple[int, ...] = (1,)
    fixed: Mapping[str, int] = field(default_factory=dict)
    loop: bool = False
    sums: tuple[str, ...] = ()

    def configs(self) -> list[Config]:
        """Its own first."""
        kind = type(self.own)
        others = [kind({**dict(zip(self.tiles, sizes, strict=True)), **self.fixed,
                        **({"STAGES": stages} if self.loop else {})}, warps, stages)
                  for *sizes, warps, stages in itertools.product(*self.tiles.values(), self.warps, self.stages)]
        return [self.own, *(each for each in others if each.arguments() != self.own.arguments() and (
            math.prod(each.tiles[name] for name in self.sums) <= SUMS * 32 * each.num_warps))]


# ---- what is run ----------------------------------------------------------------------------------------------------
def _attention(step: str, heads: int, kv_heads: int, head_dim: int) -> Callable[[Callable[..., Tensor], bool], Case]:
    def make(random: Callable[..., Tensor], real: bool) -> Case:
        from minitune.kernels import attention as kernel
        from minitune.ops.documents import Documents

        lengths, wanted = ((2048,) * 8, (heads, kv_heads)) if real else ((20, 13), (2, 1))
        qkv = random(sum(lengths), wanted[0] + 2 * wanted[1], head_dim)
        starts, ends = Documents.from_lengths(lengths, qkv.device).spans
        q, k, v = qkv.split((wanted[0], wanted[1], wanted[1]), 1)
        out, lse = kernel.forward(q, k, v, starts, None)
        written = torch.empty_like(out)
        dout = random(*out.shape)
        own = {name: kernel._config_of(name, q) for name in ("dq", "dkdv")}

        def run(config: Config) -> list[Tensor]:
            if step == "forward":
                return list(kernel.forward(q, k, v, starts, None, out=written, config=config))
            chosen: dict[str, Any] = {f"{name}_config": config if name == step else each for name, each in own.items()}
            return list(kernel.backward(dout, q, k, v, out, lse, starts, ends, None, **chosen))

        return Case(run, [written])

    return make


def _product(forward: bool) -> Callable[[Callable[..., Tensor], bool], Case]:
    """That of gate and up, with two adapters of rank 16."""
    def make(random: Callable[..., Tensor], real: bool) -> Case:
        from minitune.kernels import lora_matmul as kernel

        tokens, inner, outer, rank = (16_384, 4096, 22_016, 32) if real else (32, 32, 64, 16)
        weight = random(outer, inner, scale=inner**-0.5)
        if forward:
            x, s, b = random(tokens, inner), random(tokens, rank), random(outer, rank)
            out = random(tokens, outer)
            return Case(lambda config: [kernel.forward(x, weight, s, b, None, out=out, config=config)], [out])
        dy, ds, a = random(tokens, outer), random(tokens, rank), random(rank, inner)
        dx = random(tokens, inner)
        return Case(lambda config: [kernel.backward_input(dy, weight, ds, a, out=dx, config=config)], [dx])

    return make


def _adapters(random: Callable[..., Tensor], real: bool) -> Case:
    from minitune.kernels import lora_matmul as kernel

    tokens, inner, outer, rank = (16_384, 4096, 22_016, 32) if real else (32, 32, 64, 16)
    dy, x, s, ds = random(tokens, outer), random(tokens, inner), random(tokens, rank), random(tokens, rank)
    return Case(lambda config: list(kernel.backward_adapters(dy, x, s, ds, config=config)))


def _norm(back: bool) -> Callable[[Callable[..., Tensor], bool], Case]:
    def make(random: Callable[..., Tensor], real: bool) -> Case:
        from minitune.kernels import rms_norm as kernel

        shape = (16_384, 4096) if real else (5, 48)
        x, other, weight, y = random(*shape), random(*shape), random(shape[1]), random(*shape)
        if not back:
            return Case(lambda config: [kernel.forward(x, weight, 1e-5, other, out=y, config=config)[0]], [y])
        rstd = kernel.forward(x, weight, 1e-5)[1]
        return Case(lambda config: [kernel.backward(other, x, rstd, weight, x, out=y, config=config)], [y])

    return make


def _swiglu(back: bool) -> Callable[[Callable[..., Tensor], bool], Case]:
    def make(random: Callable[..., Tensor], real: bool) -> Case:
        from minitune.kernels import swiglu as kernel

        tokens, f = (16_384, 11_008) if real else (5, 48)
        gate_up, dh, h = random(tokens, 2 * f), random(tokens, f), random(tokens, f)
        if not back:
            return Case(lambda config: [kernel.forward(gate_up, out=h, config=config)], [h])
        gradient = random(tokens, 2 * f)
        return Case(lambda config: [kernel.backward(dh, gate_up, gradient=gradient, h=h, config=config), h],
                    [gradient, h])

    return make


def _rope(random: Callable[..., Tensor], real: bool) -> Case:
    from minitune.kernels import rope as kernel

    tokens, heads, head_dim = (16_384, 64, 128) if real else (5, 3, 16)
    x = random(tokens, heads, head_dim)
    angle = (random(tokens, head_dim // 2).float() * 4).round() * (torch.pi / 2)
    cos, sin = angle.cos().round(), angle.sin().round()     # quarter turns are exact: in place, over and over
    return Case(lambda config: [kernel.rotate_(x, cos, sin, config=config)], in_place=[x])


def _adamw(random: Callable[..., Tensor], real: bool) -> Case:
    from minitune.kernels import adamw as kernel

    buffers = [random(40_000_000 if real else 1000).float().abs() for _ in range(4)]

    def run(config: Config) -> list[Tensor]:
        kernel.adamw_(buffers[0], buffers[1], buffers[2], buffers[3], lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8,
                      weight_decay=0.0, step=10, config=config)
        return buffers

    return Case(run, in_place=buffers)


def _losses(random: Callable[..., Tensor], real: bool) -> Case:
    from minitune.kernels import linear_cross_entropy as kernel

    n, vocab = (4096, 32_000) if real else (4, 80)
    logits = random(n, vocab)
    labels = torch.arange(n, device=logits.device) % vocab
    losses = torch.empty(n, device=logits.device)

    def run(config: Config) -> list[Tensor]:
        kernel.losses_(logits, labels, losses, gradient=False, config=config)
        return [losses]

    return Case(run, [losses])


def kernels(device: torch.device) -> list[Kernel]:
    """Those of a 7B step first."""
    from minitune.kernels import adamw, attention, linear_cross_entropy, lora_matmul, rms_norm, rope, swiglu
    from minitune.kernels.launch import pick

    def own(module: Any, name: str) -> Config:
        return pick(module.CONFIGS[name], device)

    def of_attention(heads: int, kv_heads: int, head_dim: int) -> list[Kernel]:
        return [Kernel(f"attention {step} {heads}/{kv_heads}x{head_dim}", own(attention, f"{step} {head_dim}"),
                       {"BLOCK_M": (32, 64, 128) if step == "dkdv" else (64, 128), "BLOCK_N": (32, 64, 128)},
                       _attention(step, heads, kv_heads, head_dim), stages=(2, 3), loop=True)
                for step in ("forward", "dq", "dkdv")]

    found = of_attention(32, 32, 128)
    for name, forward in (("forward", True), ("backward", False)):
        found.append(Kernel(f"lora_product {name}", own(lora_matmul, "product"),
                            {"BT": (64, 128, 256), "BN": (128, 256), "BK": (32, 64)}, _product(forward),
                            stages=(3, 4), fixed={"GROUP": 8}, sums=("BT", "BN")))
    rows, blocks = {"TILE": (1024, 2048, 4096, 8192)}, {"BLOCK": (512, 1024, 2048, 4096)}
    found += [Kernel("lora_adapters", own(lora_matmul, "adapters"),
                     {"BC": (64, 128, 256), "BR": (64,), "BT": (32, 64, 128)}, _adapters, stages=(3, 4)),
              Kernel("rms_norm forward", own(rms_norm, "forward"), rows, _norm(False)),
              Kernel("rms_norm backward", own(rms_norm, "backward"), rows, _norm(True)),
              Kernel("swiglu forward", own(swiglu, "forward"), blocks, _swiglu(False)),
              Kernel("swiglu backward", own(swiglu, "backward"), blocks, _swiglu(True)),
              Kernel("rope rotate", own(rope, "rotate"), {"TILE": (512, 1024, 2048, 4096), "CHUNK": (4, 8, 16)}, _rope),
              Kernel("adamw", own(adamw, "adamw"), {"TILE": (512, 1024, 2048, 4096)}, _adamw),
              Kernel("linear_cross_entropy losses", own(linear_cross_entropy, "losses"),
                     {"TILE": (4096, 8192, 16_384)}, _losses, warps=(8, 16, 32)),
              *of_attention(14, 2, 64), *of_attention(8, 4, 256)]
    wanted = os.environ.get("KERNELS", "").split()
    return [each for each in found if not wanted or any(word in each.name for word in wanted)]


# ---- compiled side by side, timed one by one ------------------------------------------------------------------------
class Random:
    """Tensors of one kind on one device, the same for each kernel."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        found = torch.empty(*shape, device=self.device).normal_(generator=self._generator)
        return (found * scale).to(self.dtype)


@functools.lru_cache(maxsize=1)
def _ready(name: str, device: str) -> tuple[Kernel, Case]:
    kernel = next(each for each in kernels(torch.device(device)) if each.name == name)
    real = device == "cuda"
    return kernel, kernel.make(Random(device, torch.bfloat16 if real else torch.float32), real)


def _count(kernel: Kernel, device: str) -> int:
    return len(kernel.configs()) if device == "cuda" else SHOWN_ON_CPU


def compiled(name: str, index: int, device: str) -> str | None:
    """Run one configuration of a kernel, which leaves it in Triton's cache -> why it does not run, or None."""
    try:
        kernel, case = _ready(name, device)
        case.run(kernel.configs()[index])
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as failure:        # whatever a compiler says of sizes that it was not made for
        return reason(failure)
    return None


def measure(name: str, device: str, faults: list[str | None]) -> None:
    """A row for each configuration of a kernel, its own first; `faults`: why one does not run."""
    kernel, case = _ready(name, device)
    expected: list[Tensor] = []
    for index, (config, fault) in enumerate(zip(kernel.configs(), faults, strict=False)):
        row: dict[str, Any] = {"what": "config", "kernel": name, "own": index == 0, "tiles": dict(config.tiles),
                               **config.options()}
        try:
            if fault is not None:
                raise RuntimeError(fault)
            found = case.checked(config)
            expected = expected or found
            apart = max(error(a, b.double()) for a, b in zip(found, expected, strict=True))
            ms = timed(functools.partial(case.run, config), device, warmup_ms=10, repeat_ms=40)
        except RuntimeError as failure:
            emit(**row, error=reason(failure), **({"right": False} if index == 0 else {}))
        else:
            emit(**row, ms=ms, apart=apart, right=apart <= LIMIT)


def _interpret() -> None:
    """In each process, before Triton is imported there."""
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.kernels import interpreter_bf16  # the interpreter as it comes fails beside a numpy of today

    interpreter_bf16.install()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    device = parser.parse_args().device
    begin = _interpret if device == "cpu" else None
    if begin is not None:
        begin()
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=begin) as pool:
        for kernel in kernels(torch.device(device)):
            one = functools.partial(compiled, kernel.name, device=device)
            measure(kernel.name, device, list(pool.map(one, range(_count(kernel, device)))))
            _ready.cache_clear()
            if device == "cuda":
                torch.cuda.empty_cache()
    emit(what="end")


if __name__ == "__main__":
    main()
