"""The other trainers of bench_peers, LitGPT and torchtune, each run in a process of its own as its own recipe runs it.

``python -m benchmarks.peer_sides PEER --folder … --size … --layout …`` serves the commands of that side. Both take the
weights of a Hugging Face folder through their own converters. Adapters r 16 on the seven linears, in bf16 like the base
(which is what both do under bf16), torch's fused AdamW, no activation checkpointing, no padding.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.harness import serve
from benchmarks.shapes import ALPHA, LR, RANK, SEED, SIZES, Size, layout, token_ids
from benchmarks.train_sides import Trainer

NORM_EPS = 1e-6
"""What transformers' LlamaConfig says where nothing else is said."""
MAX_LENGTH = 2048
IGNORED = -100


def checkpoint(folder: Path, size: Size) -> dict[str, Tensor]:
    """Hugging Face names -> bf16 weights; a tied head by its own name too, since neither builder here ties it."""
    tensors: dict[str, Tensor] = {}
    for part in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(part)
    if size.tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return tensors


class LitGPT(Trainer):
    """litgpt.lora's model and the loss of `litgpt finetune_lora` (the head in chunks of 128 tokens, or `whole`),
    precision bf16-true; `compiled` as one graph, which that command does not offer."""

    def __init__(self, folder: Path, size: Size, ids: Tensor, compiled: bool, whole: bool) -> None:
        from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
        from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
        from litgpt.utils import chunked_cross_entropy

        torch.manual_seed(SEED)
        config = Config(
            name="bench", block_size=MAX_LENGTH, n_layer=size.layers, n_head=size.heads, n_query_groups=size.kv_heads,
            head_size=size.head_dim, n_embd=size.d_model, intermediate_size=size.d_ff, vocab_size=size.vocab,
            padded_vocab_size=size.vocab, bias=False, rotary_percentage=1.0, parallel_residual=False,
            norm_class_name="RMSNorm", norm_eps=NORM_EPS, mlp_class_name="LLaMAMLP", lora_r=RANK, lora_alpha=ALPHA,
            lora_dropout=0.0, lora_query=True, lora_key=True, lora_value=True, lora_projection=True, lora_mlp=True)
        self.model: Any = GPT(config).to(torch.bfloat16)
        converted: dict[str, Tensor] = {}
        copy_weights_hf_llama(config, {}, converted, dict(checkpoint(folder, size)))
        missing, unexpected = self.model.load_state_dict(converted, strict=False)
        if unexpected or not all("lora" in name for name in missing):
            raise RuntimeError(f"LitGPT's weights: missing {missing}, unexpected {unexpected}")
        self.model.max_seq_length = ids.shape[1]
        mark_only_lora_as_trainable(self.model)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, weight_decay=0.0, fused=True)
        self.forward = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.ids, self.whole, self.cross_entropy = ids, whole, chunked_cross_entropy

    def loss(self) -> Tensor:
        if self.whole:
            logits = self.forward(self.ids)[..., :-1, :]
        else:
            logits = self.forward(self.ids, lm_head_chunk_size=128)
            logits[-1] = logits[-1][..., :-1, :]
        loss: Tensor = self.cross_entropy(logits, self.ids[..., 1:])
        return loss


class Torchtune(Trainer):
    """torchtune's LoRA Llama and chunked loss (or `whole`, torch's own), as lora_finetune_single_device builds them
    with dtype bf16; `compiled` with its own `compile: True`, layer by layer."""

    def __init__(self, folder: Path, size: Size, ids: Tensor, compiled: bool, whole: bool) -> None:
        from torchtune import training
        from torchtune.models.convert_weights import hf_to_tune
        from torchtune.models.llama2 import lora_llama2
        from torchtune.modules.loss import CEWithChunkedOutputLoss
        from torchtune.modules.peft import get_adapter_params, set_trainable_params

        if size.heads * size.head_dim != size.d_model:
            raise RuntimeError("torchtune's llama2 has heads of d_model / n_heads alone")
        torch.manual_seed(SEED)
        with training.set_default_dtype(torch.bfloat16):
            self.model: Any = lora_llama2(
                ["q_proj", "k_proj", "v_proj", "output_proj"], apply_lora_to_mlp=True, vocab_size=size.vocab,
                num_layers=size.layers, num_heads=size.heads, num_kv_heads=size.kv_heads, embed_dim=size.d_model,
                max_seq_len=MAX_LENGTH, intermediate_dim=size.d_ff, norm_eps=NORM_EPS, lora_rank=RANK,
                lora_alpha=ALPHA)
        converted = hf_to_tune(checkpoint(folder, size), num_heads=size.heads, num_kv_heads=size.kv_heads,
                               dim=size.d_model, head_dim=size.head_dim)
        missing, unexpected = self.model.load_state_dict(converted, strict=False)
        if unexpected or not all("lora" in name for name in missing):
            raise RuntimeError(f"torchtune's weights: missing {missing}, unexpected {unexpected}")
        adapters = get_adapter_params(self.model)
        set_trainable_params(self.model, adapters)
        self.parameters = list(adapters.values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, weight_decay=0.0, fused=True)
        self.cross_entropy: Any = torch.nn.CrossEntropyLoss() if whole else CEWithChunkedOutputLoss()
        if not whole:
            self.model.set_num_output_chunks(self.cross_entropy.num_output_chunks)
        if compiled:
            training.compile_model(self.model)
            self.cross_entropy = training.compile_loss(self.cross_entropy)
        self.ids = ids
        self.labels = torch.hstack((ids[:, 1:], torch.full((len(ids), 1), IGNORED)))

    def loss(self) -> Tensor:
        logits, labels = self.model(self.ids), self.labels
        if isinstance(logits, Tensor):
            logits, labels = logits.flatten(0, 1), labels.flatten()
        loss: Tensor = self.cross_entropy(logits, labels)
        return loss


PEERS: dict[str, type[LitGPT] | type[Torchtune]] = {"litgpt": LitGPT, "torchtune": Torchtune}


def handlers(told: argparse.Namespace) -> dict[str, Any]:
    """Build the side that was asked for and name the commands it answers."""
    size, lengths = SIZES[told.size], layout(told.layout)
    ids = torch.tensor(token_ids(size, sum(lengths))).view(len(lengths), lengths[0])
    side = PEERS[told.peer](told.folder, size, ids, told.compiled, told.whole)
    return {"steps": side.steps, "profile": side.profile}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=list(PEERS))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--size", choices=sorted(SIZES), required=True)
    parser.add_argument("--layout", default="4x256")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--whole", action="store_true", help="the head over all tokens at once")
    told = parser.parse_args()
    serve(lambda: handlers(told))


if __name__ == "__main__":
    main()
