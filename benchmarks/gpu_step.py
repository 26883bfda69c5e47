"""A training step of Llama-2-7B by minitune, LoRA and QLoRA: tokens/s, memory, share of the measured matrix rate.

``python -m benchmarks.gpu_step --device cuda`` prints a row of JSON a figure. Random weights, rank 16, every token
trained; FLOPs a token = 4·(linears + head) + 3.5·causal attention + 6·adapters, no recompute counted.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import random_weights
from benchmarks.gpu_timing import emit, matrix_rate, reason
from benchmarks.harness import summary
from benchmarks.random_weights import ours
from benchmarks.shapes import LR, RANK, SEED, SEVEN_B, TINY, Size
from minitune.training.flops import Costs

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
CASES = ((None, (2048,) * 8), ("nf4-dq", (2048,) * 8), (None, (16_384,)))
TINY_CASES = ((None, (16,) * 2), ("nf4-dq", (16,) * 2))


def write_folder(size: Size, folder: Path, device: str) -> None:
    """A Hugging Face folder as published ones look, without transformers, which a GPU machine may lack."""
    from safetensors.torch import save_file

    generator = torch.Generator(device).manual_seed(SEED)

    def weight(outer: int, inner: int) -> torch.Tensor:
        return (torch.randn(outer, inner, device=device, generator=generator) * 0.02).bfloat16().cpu()

    d = size.d_model
    tensors = {"model.embed_tokens.weight": weight(size.vocab, d), "lm_head.weight": weight(size.vocab, d),
               "model.norm.weight": torch.ones(d, dtype=torch.bfloat16)}
    for layer in range(size.layers):
        at = f"model.layers.{layer}."
        for name, (inner, outer) in zip(LINEARS, linear_widths(size), strict=True):
            tensors[f"{at}{name}.weight"] = weight(outer, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{name}.weight"] = torch.ones(d, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": size.vocab,
        "hidden_size": d, "intermediate_size": size.d_ff, "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads, "head_dim": size.head_dim,
        "max_position_embeddings": 16_384, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16"}))


def layer_flops_a_token(size: Size, lengths: tuple[int, ...]) -> float:
    """Of one layer's forward and backward, for one token."""
    return _costs(replace(size, layers=1)).of_documents(lengths, 0) / sum(lengths)


def flops_a_token(size: Size, lengths: tuple[int, ...]) -> float:
    """Of one training step, for one token."""
    return _costs(size).of_documents(lengths, sum(lengths)) / sum(lengths)


def _costs(size: Size) -> Costs:
    return Costs(frozen=size.layers * sum(inner * outer for _, inner, outer in size.products()), trained=0,
                 adapters=size.layers * RANK * sum(inner + outer for inner, outer in linear_widths(size)),
                 head=size.vocab * size.d_model, head_products=2, attention_width=size.heads * size.head_dim,
                 windows=(None,) * size.layers)


def linear_widths(size: Size) -> list[tuple[int, int]]:
    """(in, out) of the seven linears, each with an adapter of its own."""
    d, heads, kv = size.d_model, size.heads * size.head_dim, size.kv_heads * size.head_dim
    return [(d, heads), (d, kv), (d, kv), (heads, d), (d, size.d_ff), (d, size.d_ff), (size.d_ff, d)]


def seconds_a_step(step: Any, steps: int, device: str) -> list[float]:
    """Seconds of each step. On a GPU by events, so that nothing waits for the device between steps."""
    if device != "cuda":
        taken = []
        for _ in range(steps):
            begun = time.perf_counter()
            step()
            taken.append(time.perf_counter() - begun)
        return taken
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [1e-3 * a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def train(model: Any, size: Size, lengths: tuple[int, ...], device: str, warmup: int, steps: int,
          moments: str = "fp32") -> dict[str, Any]:
    """Warm up, time; the loss of the one repeated batch must fall and gradients must not be zero."""
    import minitune as mt

    model.train()
    batch = random_weights.batch(size, lengths, device)
    parameters = list(model.trainable_parameters())
    optimizer = mt.AdamW(parameters, lr=LR, moments=moments)
    losses: list[torch.Tensor] = []

    def step() -> None:
        optimizer.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())

    for _ in range(warmup):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_a_step(step, steps, device)
    curve = [float(loss) for loss in losses]
    optimizer.zero_grad()
    model.loss(batch).backward()
    norm = float(torch.stack([p.grad.float().norm() for p in parameters if p.grad is not None]).norm())
    found: dict[str, Any] = {"tokens_per_s": summary([sum(lengths) / s for s in seconds]), "seconds": seconds,
                             "losses": curve, "grad_norm": norm, "right": curve[-1] < curve[0] and norm > 0}
    if device == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
        found["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    device = parser.parse_args().device
    real = device == "cuda"
    size, warmup, steps = (SEVEN_B, 2, 5) if real else (TINY, 1, 3)
    torch.manual_seed(SEED)
    rate = matrix_rate(device)
    emit(what="matrix rate", tflops=rate)
    for quant, lengths in CASES if real else TINY_CASES:
        case = f"{quant or 'bf16'}, {len(lengths)} x {lengths[0]}, memory auto"
        row = {"what": "step", "case": case, "layers": size.layers, "tokens": sum(lengths)}
        try:
            model = ours(size, device, quant, "auto")
            found = train(model, size, lengths, device, warmup, steps)
            found["policy"] = model.network._policy(sum(lengths))
            del model
            flops = flops_a_token(size, lengths)
            emit(**row, **found, flops_a_token=flops,
                 share_of_rate=found["tokens_per_s"]["median"] * flops / rate / 1e12)
        except (RuntimeError, ImportError, AttributeError, ValueError, TypeError) as failure:
            emit(**row, error=reason(failure), right=False)
        if real:
            gc.collect()
            torch.cuda.empty_cache()
    emit(what="end")


if __name__ == "__main__":
    main()
