"""Every op by each backend at tiny, ragged shapes, forward and backward, then exit code 0: what tests/test_gpu_ops.py
gives compute-sanitizer to watch.

``python tests/gpu_small_ops.py [--device cpu]`` prints a line for each backend: what it ran, or why it is not there.
Every result must be finite; whether it is right, other tests ask, at shapes that leave no room for chance.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))     # a checkout need not be installed

import torch
from torch import Tensor

import minitune as mt
from minitune.model.init import init_weights
from minitune.model.llama import Llama
from minitune.ops import backends, checks, linear_cross_entropy, lora_matmul, nf4, rms_norm, rope, tuned
from minitune.ops.documents import Documents
from minitune.ops.lora_matmul import LoraWeights

CONFIG = mt.ModelConfig(vocab_size=211, d_model=80, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=40, d_ff=84,
                        windows=(7, None), qk_norm=True, qkv_bias=True, o_bias=True, mlp_bias=True)
LENGTHS = (11, 1, 25)
TOKENS, RANK = sum(LENGTHS), 5
SPLIT = 600
"""Tokens from which on the kernel of an adapter's gradient splits its loop."""
PITCHED = ((5, 192, 208, 16), (5, 192, 199, 3), (7, 33, 40, 0), (4, 1030, 1031, 1), (9, 1, 4, 0))
"""Rows, columns, row pitch and first column of what a packed weight is decoded into."""
AUGMENTED = {"attention_forward": "triton", "attention_backward": "triton", "lora_matmul_forward": "augmented",
             "lora_matmul_input": "augmented"}


def finite(name: str, *values: Tensor) -> None:
    for value in values:
        if not bool(value.isfinite().all()):
            sys.exit(f"{name}: {int((~value.isfinite()).sum())} of {value.numel()} values are not finite")


def ops(backend: str, device: torch.device) -> set[str]:
    """The ops that take this backend, each once. What the library does on a GPU is not ours to watch; on a CPU an op
    may be plain PyTorch around a native piece."""
    ran = set()
    for case in checks.cases(CONFIG, TOKENS, torch.bfloat16, device, RANK):
        if case.backend == backend or device.type == "cpu":
            finite(f"{case.op} by {backend}", *case.results("ours").values())
            ran.add(case.op)
    return ran


def rest(device: torch.device) -> None:
    """What neither those nor a step at so few tokens come to: logits at no multiple of 16 bytes, an adapter's gradient
    in parts, a gradient of attention that the library gave in pieces."""
    generator = torch.Generator(device).manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).bfloat16()

    logits, labels = random(3, CONFIG.vocab_size), torch.tensor([0, 7, CONFIG.vocab_size - 1], device=device)
    losses = torch.empty(3, device=device)
    linear_cross_entropy.losses_(logits, labels, losses, 0.1, True)
    dy, x, s, ds = (random(SPLIT, columns) for columns in (CONFIG.d_ff, CONFIG.d_model, RANK, RANK))
    weights = LoraWeights(random(CONFIG.d_ff, CONFIG.d_model), None, random(RANK, CONFIG.d_model),
                          random(CONFIG.d_ff, RANK))
    gradients = lora_matmul.backward_adapters(dy, x, s, ds, weights)
    heads = CONFIG.n_heads, CONFIG.n_kv_heads, CONFIG.n_kv_heads
    parts = [random(TOKENS, n, CONFIG.head_dim) for n in heads]
    documents = Documents.from_lengths(LENGTHS, device)
    cos, sin = rope.tables(CONFIG, documents.positions().to(device), documents)
    joined = rope.join(*parts, cos, sin, torch.empty(TOKENS, sum(heads), CONFIG.head_dim, dtype=x.dtype, device=device),
                       back=True)
    finite("the rest", logits, losses, *gradients, joined)


def packed_rows(device: torch.device) -> None:
    """Weights packed, and decoded into rows that lie apart, in memory that ends where the last row does."""
    for rows, columns, pitch, start in PITCHED:
        for dtype in nf4.DTYPES:
            for double_quant in (False, True):
                weight = nf4.quantize(torch.randn(rows, columns, device=device).to(dtype), double_quant)
                room = torch.empty(start + (rows - 1) * pitch + columns, dtype=dtype, device=device)
                out = room.as_strided((rows, columns), (pitch, 1), start)
                finite(f"nf4 {rows} x {columns}", weight.dequantize(out=out), weight.dequantize())


def steps(device: torch.device) -> None:
    """A step of a tiny network by each policy that recomputes, one by each optimizer."""
    for memory, moments in (("pointwise", "fp32"), ("full", "8bit"), ("keep", None)):
        network = _network(device)
        network.memory = memory
        parameters = [p for adapter in network.adapters().values() for p in (adapter.A, adapter.B)]
        optimizer = (mt.SGD(parameters, lr=1e-2, momentum=0.9, nesterov=True) if moments is None
                     else mt.AdamW(parameters, lr=1e-2, moments=moments))
        _step(network, device)
        optimizer.clip(1.0)
        optimizer.step()
        finite(f"a step, {memory}, {moments}", *(each for p in parameters for each in (p.detach(), p.grad)))


def augmented_step(device: torch.device) -> None:
    """The kernels write into rows with room behind them. On a CPU in fp32: at sizes that are no multiples of 64 its
    bf16 products read what lies behind a row, and there minitune never takes this way."""
    network = _network(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    with tuned.forced(**AUGMENTED):
        for projection in network.projections():
            projection.lay_out()
        finite("an augmented step", _step(network, device))


def _network(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Llama:
    network = Llama(CONFIG, dtype=dtype)
    init_weights(network, seed=1, std=0.1)
    network.add_adapters(mt.LoRA(rank=RANK), seed=2)
    for adapter in network.adapters().values():
        adapter.B.data.normal_(0, 0.1)
    return network.to(device)


def _step(network: Llama, device: torch.device) -> Tensor:
    documents = Documents.from_lengths(LENGTHS, device)
    tokens = torch.randint(0, CONFIG.vocab_size, (TOKENS,)).to(device)
    hidden = network(tokens, documents.positions().to(device), documents)
    losses = network.losses_at(hidden, tokens.roll(1), 0.1)
    losses.sum().backward()
    return losses.detach()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    device = torch.device(parser.parse_args(arguments).device)
    torch.manual_seed(0)
    rms_norm.MIN_ROWS = 1       # the kernel that gives the thin product too, at any size
    for backend in ("triton", "native"):
        reason = backends.missing(backend, device)
        if reason:
            print(f"{backend} is not there: {reason}", flush=True)
            continue
        with backends.use(backend), tuned.forced(rms_norm_s="triton"):
            ran = ops(backend, device)
            packed_rows(device)
            if backend == "triton" or device.type == "cpu":     # on a GPU nothing else is native
                rest(device)
                steps(device)
        print(f"{backend} ran {', '.join(sorted(ran))}", flush=True)
    augmented_step(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("all ran", flush=True)


if __name__ == "__main__":
    main()
