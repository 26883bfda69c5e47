"""A LoRA training step of a shallow Llama-2-7B by minitune: tokens/s, memory, share of the measured matrix rate.

``python -m benchmarks.gpu_step --device cuda`` prints a row of JSON a figure. Four layers of the true shape with random
weights; every token trained; FLOPs a token = 4·(linears + head) + 3.5·causal attention + 6·adapters, no recompute
counted.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_timing import emit, matrix_rate, reason
from benchmarks.harness import summary
from benchmarks.shapes import ALPHA, LR, RANK, SEED, Size, token_ids
from minitune.training.flops import Costs

SEVEN_B = Size(layers=4, d_model=4096, d_ff=11_008, heads=32, kv_heads=32, head_dim=128)
TINY = Size(layers=2, d_model=64, d_ff=128, heads=4, kv_heads=2, head_dim=16, vocab=256)
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
CASES = (("8 x 2048, memory auto", (2048,) * 8, "auto"), ("1 x 16384, memory auto", (16_384,), "auto"),
         ("8 x 2048, memory full", (2048,) * 8, "full"))
TINY_CASES = (("2 x 16, memory auto", (16,) * 2, "auto"),)


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


def flops_a_token(size: Size, lengths: tuple[int, ...]) -> float:
    """Of one training step, for one token."""
    costs = Costs(frozen=size.layers * sum(inner * outer for _, inner, outer in size.products()), trained=0,
                  adapters=size.layers * RANK * sum(inner + outer for inner, outer in linear_widths(size)),
                  head=size.vocab * size.d_model, head_products=2, attention_width=size.heads * size.head_dim,
                  windows=(None,) * size.layers)
    return costs.of_documents(lengths, sum(lengths)) / sum(lengths)


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


def measure(folder: Path, size: Size, lengths: tuple[int, ...], memory: Any, device: str, steps: int) -> dict[str, Any]:
    """Load, warm up, time."""
    import minitune as mt

    begun = time.perf_counter()
    model = mt.load(folder, device=device, dtype=torch.bfloat16, lora=mt.LoRA(rank=RANK, alpha=ALPHA), memory=memory,
                    seed=SEED)
    loaded = time.perf_counter() - begun
    return {**train(model, size, lengths, device, 3, steps), "load_s": loaded}


def train(model: Any, size: Size, lengths: tuple[int, ...], device: str, warmup: int, steps: int) -> dict[str, Any]:
    """Warm up, time; the loss of the one repeated batch must fall and gradients must not be zero."""
    import minitune as mt

    model.train()
    bounds = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tokens = torch.tensor(token_ids(size, sum(lengths)))
    labels = tokens.roll(-1)
    labels[bounds[1:].long() - 1] = -100
    batch = mt.Batch(tokens=tokens, labels=labels, cu_seqlens=bounds).to(device)
    parameters = list(model.trainable_parameters())
    optimizer = mt.AdamW(parameters, lr=LR)
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
    size, steps = (SEVEN_B, 10) if real else (TINY, 3)
    torch.manual_seed(SEED)
    rate = matrix_rate(device)
    emit(what="matrix rate", tflops=rate)
    with tempfile.TemporaryDirectory() as place:
        write_folder(size, Path(place), device)
        for case, lengths, memory in CASES if real else TINY_CASES:
            row = {"what": "step", "case": case, "layers": size.layers, "tokens": sum(lengths)}
            try:
                found = measure(Path(place), size, lengths, memory, device, steps)
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
