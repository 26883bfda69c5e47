"""Generation: prompts are read in one packed pass, then every sequence grows by one token a step over a KV cache."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Generator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minitune.arguments import check_seed, check_whole, is_number, short
from minitune.errors import InputError
from minitune.model import half
from minitune.model.attention_half import AttentionHalf
from minitune.model.llama import Llama
from minitune.model.memory import free_bytes
from minitune.ops import attention, lora_matmul, one_row, rms_norm, rope
from minitune.ops.documents import Documents
from minitune.ops.one_row import LayerWeights, OneRow

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
        if len(set(self.lengths)) == 1:     # a plain copy, cheaper than an index
            self.keys[layer].select(2, self.lengths[0]).copy_(k)
            self.values[layer].select(2, self.lengths[0]).copy_(v)
        else:
            rows, places = torch.arange(len(self.lengths)), torch.tensor(self.lengths)
            self.keys[layer][rows, :, places], self.values[layer][rows, :, places] = k, v


def generate(network: Llama, prompts: Sequence[Sequence[int]], max_new_tokens: int, choose: Choose,
             finished: Callable[[int, list[int]], bool]) -> list[list[int]]:
    """New ids of each prompt, the one that finished it included.

    `finished(row, ids)` is asked after each token whether that row is done. InputError for an empty prompt or an id
    outside the vocabulary.
    """
    new: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(new)
    with network.turn, contextlib.closing(steps(network, prompts, max_new_tokens, choose)) as found:
        for tokens in found:
            for row, token in enumerate(tokens):
                if not done[row]:
                    new[row].append(token)
                    done[row] = finished(row, new[row])
            if all(done):
                break
    return new


def steps(network: Llama, prompts: Sequence[Sequence[int]], max_new_tokens: int,
          choose: Choose) -> Generator[list[int]]:
    """The next token of each prompt, one list a step, up to `max_new_tokens` steps; close it to end sooner.

    Nothing is computed before a step is asked for. InputError, at once, for an empty prompt or an id outside the
    vocabulary. Between two steps the model must not be trained; whether its adapters are on counts as it is now.
    Threads may share the network: a step is done in one turn (`generate` does all of them in one).
    """
    _check(network, prompts, max_new_tokens)
    return _steps(network, prompts, max_new_tokens, choose, network.output.enabled)


@torch.no_grad()
def _steps(network: Llama, prompts: Sequence[Sequence[int]], max_new_tokens: int,
           choose: Choose, adapted: bool) -> Generator[list[int]]:
    if max_new_tokens == 0 or not prompts:
        return
    longest = max(map(len, prompts))
    cache = Cache(network, len(prompts), longest + min(ROOM, max_new_tokens), longest + max_new_tokens)
    network.check_length(longest)
    with network.turn, network.adapters_switched(adapted):
        hidden = prefill(network, prompts, cache)
    size = sum(math.prod(shape) for _, shape, _, _ in network.dense_weights()) * network.dtype.itemsize
    prepare = (max_new_tokens >= WORTH_PREPARING and network.device.type == "cpu"
               and 2 * size < free_bytes(network.device))
    with network.weights_at_hand(len(prompts)) if prepare else contextlib.nullcontext():
        with network.turn, network.adapters_switched(adapted):
            row = one_row_of(network) if len(prompts) == 1 and one_row.fits(network.dtype, network.device) else None
            tokens: list[int] = choose(network.logits(hidden)).tolist()
        yield tokens
        for step in range(max_new_tokens - 1):
            if longest + step == network.config.max_positions:     # the first token behind the last place it knows
                network.check_length(longest + step + 1)
            with network.turn, network.adapters_switched(adapted):
                tokens = choose(network.logits(decode(network, tokens, cache, row))).tolist()
            yield tokens


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
    x, branch = network.embed(tokens), None
    for index, layer in enumerate(network.blocks()):
        weights = layer.attention.operands()
        kept = layer.attention.project(x, branch, weights[0], context)
        (q, k), v = layer.attention.split_qk(kept["qk"]), kept["v"]
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


def decode(network: Llama, tokens: Sequence[int], cache: Cache, row: OneRow | None = None) -> Tensor:
    """One more token in each row, int [n] -> hidden [n, d_model]. The adapters are those of `prefill`. With `row` it
    takes the faster way of a single sequence, and overwrites the hidden state at the next call."""
    device = network.device
    cache.make_room()
    documents = Documents.from_lengths((1,) * len(tokens))
    if network.config.rope.kind == "dynamic":
        cos, sin = rope.step_tables(network.config, cache.lengths, device)
    else:
        cos, sin = rope.tables(network.config, torch.tensor(cache.lengths, device=device), documents)
    x, branch = network.embed(torch.tensor(tokens, device=device)), None
    if row is not None:
        (place,) = cache.lengths
        cache.lengths = [place + 1]
        return row.step(x, cos, sin, cache.keys, cache.values, place)
    context = half.Context(cos, sin, documents)
    for index, layer in enumerate(network.blocks()):
        weights = layer.attention.operands()
        kept = layer.attention.project(x, branch, weights[0], context)
        q, k = layer.attention.split_qk(kept["qk"])
        cache.append(index, k, kept["v"])
        out = _attend(layer.attention, q, cache.keys[index], cache.values[index], cache.lengths)
        x, branch = half.run(layer.mlp, kept["x"], lora_matmul.forward(out, weights[1])[0], context)
    cache.lengths = [length + 1 for length in cache.lengths]
    return _last(network, x, branch)


def one_row_of(network: Llama) -> OneRow:
    """The network, with its adapters as `prefill` found them, for decoding one sequence on a CPU."""
    def cast(weight: Tensor | None) -> Tensor | None:
        return None if weight is None else weight.detach().to(network.dtype)

    config, layers = network.config, []
    for block in network.blocks():
        attention, mlp = block.attention, block.mlp
        (qkv, o), (gate_up, down) = attention.operands(), mlp.operands()
        layers.append(LayerWeights(attention.norm.detach().to(network.dtype), qkv, cast(attention.q_norm),
                                   cast(attention.k_norm), o, mlp.norm.detach().to(network.dtype), gate_up, down,
                                   attention.window))
    shape = one_row.Shape(config.d_model, config.n_heads, config.n_kv_heads, config.head_dim, config.d_ff,
                          config.norm_eps)
    return OneRow(layers, network.norm.detach().to(network.dtype), shape, network.dtype)


def _attend(layer: AttentionHalf, q: Tensor, keys: Tensor, values: Tensor, lengths: list[int]) -> Tensor:
    """q [n, heads, head_dim] against the first lengths[row] + 1 entries of each row -> [n, heads·head_dim].

    The query heads that share a key head go as so many queries of that head: no key is repeated, each is read once.
    """
    longest = max(lengths) + 1
    first = 0 if layer.window is None else max(0, min(lengths) + 1 - layer.window)
    mask = None
    if min(lengths) + 1 < longest or (layer.window is not None and longest > layer.window):
        place = torch.arange(first, longest, device=q.device)
        last = torch.tensor(lengths, device=q.device)[:, None]
        mask = (place <= last) if layer.window is None else (place <= last) & (place > last - layer.window)
        mask = mask[:, None, None]
    n, kv_heads, _, head_dim = keys.shape
    out = F.scaled_dot_product_attention(
        q.reshape(n, kv_heads, -1, head_dim), keys[:, :, first:longest], values[:, :, first:longest], attn_mask=mask)
    return out.reshape(n, -1)


def _last(network: Llama, x: Tensor, branch: Tensor | None) -> Tensor:
    return rms_norm.forward(x, network.norm, network.config.norm_eps, branch)[0]


def sampler(temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
            seed: int | None = None, device: torch.device | str = "cpu") -> Choose:
    """Greedy at temperature 0; else a draw from softmax(logits / temperature), cut to the `top_k` likeliest tokens and
    then to the fewest whose probabilities reach `top_p` (Holtzman et al. 2020, arXiv:1904.09751)."""
    if not is_number(temperature) or not 0 <= temperature <= sys.float_info.max:
        raise InputError(f"generate: temperature is {short(temperature)}; it must be 0 (greedy) or a positive number")
    if top_k is not None:
        check_whole("generate", "top_k", top_k)
    if top_p is not None and (not is_number(top_p) or not 0 < top_p <= 1):
        raise InputError(f"generate: top_p is {short(top_p)}; it must be a number above 0 and at most 1")
    if seed is not None:
        check_seed("generate", seed)
    if temperature == 0:
        return lambda logits: logits.argmax(-1)
    temperature = max(float(temperature), torch.finfo(torch.float32).tiny)     # below it fp32 knows only 0
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)

    def draw(logits: Tensor) -> Tensor:
        p, ids = distribution(logits, temperature, top_k, top_p)
        return ids.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]

    return draw


def distribution(logits: Tensor, temperature: float, top_k: int | None = None,
                 top_p: float | None = None) -> tuple[Tensor, Tensor]:
    """Logits fp32 [n, vocab_size] -> (weights fp32 [n, k], the likeliest first, not summing to 1 once `top_p` cut them;
    their ids int64 [n, k]): what `sampler` draws from. k is vocab_size or `top_k`."""
    ordered, ids = ((logits - logits.amax(-1, keepdim=True)) / temperature).sort(-1, descending=True)
    if top_k is not None:
        ordered, ids = ordered[:, :top_k], ids[:, :top_k]
    p = ordered.softmax(-1)
    if top_p is not None and top_p < 1:     # 1 cuts nothing, whatever the sum is rounded to
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
    return p, ids
