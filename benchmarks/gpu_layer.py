"""One layer of a Llama-2-7B with LoRA, forward and backward: milliseconds, and its share of the measured matrix rate.

``python -m benchmarks.gpu_layer --device cuda`` prints a row of JSON a figure. Random weights, 16k tokens; FLOPs a
token = 4·linears + 3.5·causal attention + 6·adapters, as for a whole step without its head.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu_step import layer_flops_a_token
from benchmarks.gpu_timing import emit, matrix_rate, reason, timed
from benchmarks.random_weights import ours
from benchmarks.shapes import SEED, SEVEN_B, TINY, Size
from minitune.model.half import Context, run_layer
from minitune.ops import rope
from minitune.ops.documents import Documents

LAYOUTS = {"cuda": ((2048,) * 8, (16_384,)), "cpu": ((16,) * 2,)}
QUANTS = (None, "nf4-dq")


def measure(size: Size, lengths: tuple[int, ...], quant: str | None, device: str) -> dict[str, Any]:
    """Forward alone, then forward and backward of one layer. Right: its gradients are finite and not zero."""
    network = ours(replace(size, layers=1), device, quant, "keep").network
    for adapter in network.adapters().values():
        torch.nn.init.normal_(adapter.B, std=0.02)
    network.refresh_images()
    documents = Documents.from_lengths(lengths, network.device)
    cos, sin = rope.tables(network.config, documents.positions().to(network.device), documents)
    context, tokens = Context(cos, sin, documents), sum(lengths)
    x, branch, dy = (torch.randn(tokens, size.d_model, device=device).to(network.dtype) for _ in range(3))
    x.requires_grad_()
    branch.requires_grad_()
    (layer,) = network.blocks()
    parameters = [p for adapter in network.adapters().values() for p in (adapter.A, adapter.B)]

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        return run_layer(layer.attention, layer.mlp, x, branch, context)

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forward(), [x, *parameters], (dy, dy))

    sizes = torch.stack([gradient.float().norm() for gradient in both()])
    right = bool(sizes.isfinite().all()) and bool((sizes > 0).all())
    ms = {"forward": timed(forward, device), "both": timed(both, device)}
    flops = layer_flops_a_token(size, lengths) * tokens
    return {"ms": ms["both"], "forward_ms": ms["forward"], "tflops": flops / ms["both"]["median"] / 1e9, "right": right}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    device = parser.parse_args().device
    torch.manual_seed(SEED)
    rate = matrix_rate(device)
    emit(what="matrix rate", tflops=rate)
    for lengths in LAYOUTS[device]:
        for quant in QUANTS:
            row = {"what": "layer", "case": f"{len(lengths)} x {lengths[0]}, {quant or 'bf16'}", "tokens": sum(lengths)}
            try:
                found = measure(SEVEN_B if device == "cuda" else TINY, lengths, quant, device)
                emit(**row, **found, share_of_rate=found["tflops"] / rate)
            except (RuntimeError, ImportError, AttributeError, ValueError, TypeError) as failure:
                emit(**row, error=reason(failure), right=False)
    emit(what="end")


if __name__ == "__main__":
    main()
