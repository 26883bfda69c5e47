"""Models of random weights made on the device itself, by Hugging Face name, so that every side trains the same one."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import ALPHA, RANK, SEED, Size, token_ids
from minitune.config import LINEAR_NAMES


def values(name: str, shape: tuple[int, ...], device: str | torch.device, dtype: torch.dtype) -> Tensor:
    """The weight of this name: 1 for norms, else normal with deviation 0.02, or 1/sqrt(in) for the A of an adapter."""
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{SEED}/{name}".encode()))
    scale = shape[-1] ** -0.5 if name.endswith("lora_A") else 0.02
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).mul_(scale).to(dtype)


def ours(size: Size, device: str, quant: str | None, memory: Any, train: str | None = None) -> Any:
    """A minitune Model with adapters, or with the base weights that `train` names; never written to a disk."""
    from minitune import LoRA
    from minitune.api import Model
    from minitune.config import ModelConfig
    from minitune.model.llama import Llama
    from minitune.ops import nf4

    config = ModelConfig(vocab_size=size.vocab, d_model=size.d_model, n_layers=size.layers, n_heads=size.heads,
                         n_kv_heads=size.kv_heads, head_dim=size.head_dim, d_ff=size.d_ff, max_positions=16_384,
                         tied_head=size.tied)
    network = Llama(config, dtype=torch.bfloat16, device=device, memory=memory, quantized=quant is not None)
    for name, weight in network.hf_weights().items():
        weight.copy_(values(name, tuple(weight.shape), device, torch.bfloat16))
    for name, shape in network.nf4_shapes().items():
        network.put_nf4(name, nf4.quantize(values(name, shape, device, torch.bfloat16), quant == "nf4-dq"))
    if train is not None:
        network.unfreeze(train)
        return Model(network, None)
    network.add_adapters(LoRA(rank=RANK, alpha=ALPHA), SEED)
    for path, adapter in network.adapters().items():
        adapter.A.data.copy_(values(f"{path}.lora_A", tuple(adapter.A.shape), device, torch.float32))
    return Model(network, None)


def batch(size: Size, lengths: tuple[int, ...], device: str) -> Any:
    """Every token trained but each document's last."""
    import minitune as mt

    bounds = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tokens = torch.tensor(token_ids(size, sum(lengths)))
    labels = tokens.roll(-1)
    labels[bounds[1:].long() - 1] = -100
    return mt.Batch(tokens=tokens, labels=labels, cu_seqlens=bounds).to(device)


def theirs(size: Size, device: str, quant: str | None, compiled: bool, checkpointing: bool) -> Any:
    """transformers + PEFT (+ bitsandbytes) with the same weights and the same adapters."""
    import peft
    import transformers

    settings: dict[str, Any] = {
        "vocab_size": size.vocab, "hidden_size": size.d_model, "intermediate_size": size.d_ff, "rms_norm_eps": 1e-5,
        "num_hidden_layers": size.layers, "num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim, "max_position_embeddings": 16_384, "attn_implementation": "sdpa",
        "use_cache": False}
    config = transformers.LlamaConfig(**settings)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        try:
            base: Any = transformers.LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for name, weight in base.named_parameters():
            weight.copy_(values(name, tuple(weight.shape), device, weight.dtype))
    if quant is not None:
        _quantise(base, device, quant == "nf4-dq")
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    wanted = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LINEAR_NAMES), task_type="CAUSAL_LM")
    model: Any = peft.get_peft_model(base, wanted)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_A" in name:
                path = name.removeprefix("base_model.model.").split(".lora_A")[0]
                weight.copy_(values(f"{path}.lora_A", tuple(weight.shape), device, torch.float32))
    model.train()
    return torch.compile(model, dynamic=False) if compiled else model


def _quantise(base: Any, device: str, double_quant: bool) -> None:
    """Every linear of the layers becomes bitsandbytes' Linear4bit, as transformers itself would place it."""
    import bitsandbytes

    for layer in base.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name in LINEAR_NAMES:
                linear = getattr(part, name, None)
                if linear is None:
                    continue
                new = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, bias=False,
                                                 compute_dtype=torch.bfloat16, quant_type="nf4",
                                                 compress_statistics=double_quant, device="meta")
                new.weight = bitsandbytes.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4",
                                                        compress_statistics=double_quant)
                setattr(part, name, new.to(device))
    base.is_loaded_in_4bit = True
