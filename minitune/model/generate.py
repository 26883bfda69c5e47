"""Generation: prompts are read in one packed pass, then every sequence grows by one token a step over a KV cache."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minitune.config import check_seed, check_whole, short
from minitune.errors import InputError
from minitune.model import half
from minitune.model.attention_half import AttentionHalf
from minitune.model.llama import Llama
from minitune.model.memory import free_bytes
from minitune.ops import attention, lora_matmul, rms_norm, rope
from minitune.ops.documents import Documents

WORTH_PREPARING = 16
"""From so many new tokens on, laying the weights out for decoding on a CPU costs less than it saves."""
ROOM = 256
"""New tokens that a cache has room for at first. When full it doubles, so a high limit costs nothing until then."""

Choose = Callable[[Tensor], Tensor]
"""Logits fp32 [n, vocab_size] -> the next token of each row, int64 [n]."""


class Cache:
    """Rotated keys and values of every layer, [n, kv_heads, capacity, head_dim], and how much of each row is filled.

    It begins with `capacity` and grows up to `limit`.
    """

    def __init__(self, network: Llama, n: int, capacity: int, limit: int):
        config = network.config
        shape = (n, config.n_kv_heads, capacity, config.head_dim)
        self.keys, self.values = ([torch.zeros(shape, dtype=network.dtype, device=network.device)
                                   for _ in range(config.n_layers)] for _ in range(2))
        self.lengths, self.capacity, self.limit = [0] * n, capacity, limit

    def make_room(self) -> None:
        """Room for one more token in each row; tensor by tensor, so that no more than one lies there twice."""
        if max(self.lengths) < self.capacity:
            return
        self.capacity = min(2 * self.capacity, self.limit)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                n, kv_heads, filled, head_dim = old.shape
                tensors[layer] = old.new_zeros(n, kv_heads, self.capacity, head_dim)
                tensors[layer][:, :, :filled] = old

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write one key and one value [n, kv_heads, head_dim] behind what each row holds; `lengths` is left alone."""
        if len(set(self.lengths)) == 1:     # a slice is a plain copy, cheaper than an index
            place = self.lengths[0]
            self.keys[layer][:, :, place], self.values[layer][:, :, place] = k, v
        else:
            rows, places = torch.arange(len(self.lengths)), torch.tensor(self.lengths)
            self.keys[layer][rows, :, places], self.values[layer][rows, :, places] = k, v


@torch.no_grad()
def generate(network: Llama, prompts: Sequence[Sequence[int]], max_new_tokens: int, choose: Choose,
             finished: Callable[[int, list[int]], bool]) -> list[list[int]]:
    """New ids of each prompt, the one that finished it included.

    `finished(row, ids)` is asked after each token whether that row is done. InputError for an empty prompt or an id
    outside the vocabulary.
    """
    _check(network, prompts, max_new_tokens)
    new: list[list[int]] = [[] for _ in prompts]
    if max_new_tokens == 0:
        return new
    longest = max(map(len, prompts))
    cache = Cache(network, len(prompts), longest + min(ROOM, max_new_tokens), longest + max_new_tokens)
    network.check_length(longest + max_new_tokens)
    hidden = prefill(network, prompts, cache)
    size = sum(math.prod(shape) for _, shape, _, _ in network.dense_weights()) * network.dtype.itemsize
    prepare = (max_new_tokens >= WORTH_PREPARING and network.device.type == "cpu"
               and 2 * size < free_bytes(network.device))
    with network.weights_at_hand(len(prompts)) if prepare else contextlib.nullcontext():
        _grow(network, hidden, cache, new, max_new_tokens, choose, finished)
    return new


def _grow(network: Llama, hidden: Tensor, cache: Cache, new: list[list[int]], max_new_tokens: int, choose: Choose,
          finished: Callable[[int, list[int]], bool]) -> None:
    """Append to each row of `new` until it is finished or has `max_new_tokens`."""
    done = [False] * len(new)
    for step in range(max_new_tokens):
        tokens = choose(network.logits(hidden)).tolist()
        for row, token in enumerate(tokens):
            if not done[row]:
                new[row].append(token)
                done[row] = finished(row, new[row])
        if all(done) or step == max_new_tokens - 1:
            return
        hidden = decode(network, tokens, cache)


def _check(network: Llama, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    check_whole("generate", "max_new_tokens", max_new_tokens, low=0)
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"generate: prompt {i} is empty; give at least one token, for example the tokenizer's BOS")
        worst = max(prompt, key=lambda token: token if token >= 0 else math.inf)
        if not 0 <= worst < network.config.vocab_size:
            raise InputError(f"generate: prompt {i} holds the id {worst}; the vocabulary ends at "
                             f"{network.config.vocab_size - 1}")


def prefill(network: Llama, prompts: Sequence[Sequence[int]], cache: Cache) -> Tensor:
    """Read all prompts as one packed stream and fill the cache -> hidden [n, d_model] of each prompt's last token."""
    network.refresh_images()
    documents = Documents.from_lengths(tuple(map(len, prompts)), network.device)
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=network.device)
    cos, sin = rope.tables(network.config, documents.positions().to(network.device), documents)
    context = half.Context(cos, sin, documents)
    x, branch = F.embedding(tokens, network.embedding).to(network.dtype), None
    for index, layer in enumerate(network.blocks()):
        weights = layer.attention.operands()
        kept = layer.attention.project(x, branch, weights[0], context)
        (q, k), v = layer.attention.halves(kept["qk"]), kept["v"]
        start = 0
        for row, length in enumerate(documents.lengths):
            cache.keys[index][row, :, :length] = k[start : start + length].transpose(0, 1)
            cache.values[index][row, :, :length] = v[start : start + length].transpose(0, 1)
            start += length
        out, _ = attention.forward(q, k, v, documents, layer.attention.window, needs_backward=False)
        x, branch = half.run(layer.mlp, kept["x"], lora_matmul.forward(out.flatten(1), weights[1])[0], context)
    cache.lengths = list(documents.lengths)
    ends = documents.cu_seqlens[1:].long() - 1
    return _last(network, x[ends], branch[ends] if branch is not None else None)


def decode(network: Llama, tokens: Sequence[int], cache: Cache) -> Tensor:
    """One more token in each row, int [n] -> hidden [n, d_model]. The adapters are those of `prefill`."""
    device = network.device
    cache.make_room()
    cos, sin = rope.step_tables(network.config, cache.lengths, device)
    context = half.Context(cos, sin, Documents.from_lengths((1,) * len(tokens)))
    x, branch = F.embedding(torch.tensor(tokens, device=device), network.embedding).to(network.dtype), None
    for index, layer in enumerate(network.blocks()):
        weights = layer.attention.operands()
        kept = layer.attention.project(x, branch, weights[0], context)
        q, k = layer.attention.halves(kept["qk"])
        cache.append(index, k, kept["v"])
        out = _attend(layer.attention, q, cache.keys[index], cache.values[index], cache.lengths)
        x, branch = half.run(layer.mlp, kept["x"], lora_matmul.forward(out, weights[1])[0], context)
    cache.lengths = [length + 1 for length in cache.lengths]
    return _last(network, x, branch)


def _attend(layer: AttentionHalf, q: Tensor, keys: Tensor, values: Tensor, lengths: list[int]) -> Tensor:
    """q [n, heads, head_dim] against the first lengths[row] + 1 entries of each row -> [n, heads·head_dim]."""
    longest = max(lengths) + 1
    first = 0 if layer.window is None else max(0, min(lengths) + 1 - layer.window)
    mask = None
    if min(lengths) + 1 < longest or first > 0 or (layer.window is not None and longest > layer.window):
        place = torch.arange(first, longest, device=q.device)
        last = torch.tensor(lengths, device=q.device)[:, None]
        mask = (place <= last) if layer.window is None else (place <= last) & (place > last - layer.window)
        mask = mask[:, None, None]
    out = F.scaled_dot_product_attention(q[:, :, None], keys[:, :, first:longest], values[:, :, first:longest],
                                         attn_mask=mask, enable_gqa=q.shape[1] != keys.shape[1])
    return out[:, :, 0].flatten(1)


def _last(network: Llama, x: Tensor, branch: Tensor | None) -> Tensor:
    return rms_norm.forward(x, network.norm, network.config.norm_eps, branch)[0]


def sampler(temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
            seed: int | None = None, device: torch.device | str = "cpu") -> Choose:
    """Greedy at temperature 0; else a draw from softmax(logits / temperature), cut to the `top_k` likeliest tokens and
    then to the fewest whose probabilities reach `top_p` (Holtzman et al. 2020, arXiv:1904.09751)."""
    if not _is_number(temperature) or not 0 <= temperature <= sys.float_info.max:
        raise InputError(f"generate: temperature is {short(temperature)}; it must be 0 (greedy) or a positive number")
    if top_k is not None:
        check_whole("generate", "top_k", top_k)
    if top_p is not None and (not _is_number(top_p) or not 0 < top_p <= 1):
        raise InputError(f"generate: top_p is {short(top_p)}; it must be a number above 0 and at most 1")
    if seed is not None:
        check_seed("generate", seed)
    if temperature == 0:
        return lambda logits: logits.argmax(-1)
    temperature, generator = float(temperature), torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)

    def draw(logits: Tensor) -> Tensor:
        ordered, ids = ((logits - logits.amax(-1, keepdim=True)) / temperature).sort(-1, descending=True)
        if top_k is not None:
            ordered, ids = ordered[:, :top_k], ids[:, :top_k]
        p = ordered.softmax(-1)
        if top_p is not None:
            p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
        return ids.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]

    return draw


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
