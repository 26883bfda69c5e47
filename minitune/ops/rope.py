"""rope: rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its five ways to scale frequencies."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from minitune.config import ModelConfig, Rope
from minitune.ops import backends
from minitune.ops.chunks import in_cache
from minitune.ops.documents import Documents
from minitune.ops.transfer import sent
from minitune.ops.versions import written


def frequencies(rope: Rope, head_dim: int, max_positions: int, length: int = 0) -> tuple[Tensor, float]:
    """Angular frequency of each rotated pair, fp32 [head_dim / 2], and the factor on cos and sin.

    `length` is the number of tokens of the document; only ``dynamic`` depends on it, and only past `max_positions`.
    """
    theta = rope.theta
    if rope.kind == "dynamic":      # NTK-aware: the base grows with the document
        ratio = rope.factor * max(length, max_positions) / max_positions - (rope.factor - 1)
        theta = theta * ratio ** (head_dim / (head_dim - 2))
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if rope.kind == "linear":
        return inverse / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(inverse, rope, rope.original_max_positions or max_positions), 1.0
    if rope.kind == "yarn":
        return _yarn(inverse, rope, head_dim, rope.original_max_positions or max_positions)
    return inverse, 1.0


def _llama3(inverse: Tensor, rope: Rope, original: int) -> Tensor:
    """Long waves are slowed by `factor`, short ones stay, those between are blended (Llama 3.1's reference code)."""
    turns = original * inverse / (2 * math.pi)      # of each pair within the original context
    blend = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - blend) * inverse / rope.factor + blend * inverse


def _yarn(inverse: Tensor, rope: Rope, head_dim: int, original: int) -> tuple[Tensor, float]:
    """NTK-by-parts interpolation and attention temperature (Peng et al. 2023, arXiv:2309.00071, eq. 17 to 22)."""
    def pair_of(turns: float) -> float:     # the pair that turns `turns` times within the original context
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2).float() - low) / ((high - low) or 0.001)).clamp(0, 1)

    def temperature(scale: float | None) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * (1.0 if scale is None else scale) * math.log(rope.factor) + 1.0

    attention = rope.attention_factor
    if attention is None:
        both = rope.mscale and rope.mscale_all_dim
        attention = temperature(rope.mscale) / temperature(rope.mscale_all_dim) if both else temperature(None)
    return inverse / rope.factor * ramp + inverse * (1 - ramp), attention


def tables(config: ModelConfig, positions: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
    """positions int64 [T] -> cos, sin, fp32 [T, head_dim / 2] on positions' device.

    Each document is rotated as if it stood alone: with ``dynamic`` its own length decides its frequencies.
    """
    if config.rope.kind == "dynamic" and documents.max_seqlen > config.max_positions:
        known = {n: frequencies(config.rope, config.head_dim, config.max_positions, n)[0] for n in documents.lengths}
        rows = torch.stack([known[n] for n in documents.lengths])
        rows = sent(rows, positions.device)
        lengths = documents.cu_seqlens.to(positions.device).diff()
        return _angles(positions, rows.repeat_interleave(lengths, dim=0, output_size=documents.n_tokens), 1.0)
    return _angles(positions, *_static(config.rope, config.head_dim, config.max_positions, positions.device))


@functools.lru_cache(maxsize=32)
def _static(rope: Rope, head_dim: int, max_positions: int, device: torch.device) -> tuple[Tensor, float]:
    """Frequencies that no document changes, kept on the device: a copy in each pass would make a GPU wait."""
    inverse, factor = frequencies(rope, head_dim, max_positions)
    return sent(inverse, device), factor


def step_tables(config: ModelConfig, places: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin fp32 [n, head_dim / 2] for the tokens that stand at `places`, each the last of its document."""
    known = {p: frequencies(config.rope, config.head_dim, config.max_positions, p + 1) for p in places}
    rows = sent(torch.stack([known[p][0] for p in places]), device)
    return _angles(sent(torch.tensor(places), device), rows, known[places[0]][1])


def _angles(positions: Tensor, inverse: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    angles = positions[:, None].float() * inverse
    return angles.cos().mul_(factor), angles.sin().mul_(factor)


def reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, head_dim] -> rotated: the halves (a, b) of a head become (a·cos - b·sin, b·cos + a·sin)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """In place; ``back=True`` turns the other way, which is the backward of the rotation."""
    if backends.choose("rope", x.device, dtype=x.dtype) == "triton":
        written(x)
        from minitune.kernels import rope as kernel

        return kernel.rotate_(x, cos, sin, back=back)
    if backends.by_rows("rope", x):
        torch.ops.minitune.rows_rope(x, cos, sin, back)
        written(x)
        return x
    sign = -1.0 if back else 1.0
    for rows in in_cache(len(x), x[:1].numel(), x.device):
        wide = x[rows].to(cos.dtype)
        a, b = wide.chunk(2, dim=-1)
        c, s = cos[rows, None], sin[rows, None]
        turned = torch.empty_like(wide)
        turned_a, turned_b = turned.chunk(2, dim=-1)
        torch.mul(a, c, out=turned_a).addcmul_(b, s, value=-sign)
        torch.mul(b, c, out=turned_b).addcmul_(a, s, value=sign)
        x[rows] = turned
    return x


def join(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, back: bool = False) -> Tensor:
    """q [T, heads, head_dim], k and v [T, kv_heads, head_dim] -> side by side in `out` [T, heads + 2·kv_heads,
    head_dim], q and k rotated with the bits of `rotate_`."""
    if backends.choose("rope", out.device, dtype=out.dtype) == "triton":
        from minitune.kernels import rope as kernel

        q, k, v = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (q, k, v))
        written(out)
        return kernel.join(q, k, v, cos, sin, out, back=back)
    for place, part in zip(out.split((q.shape[1], k.shape[1], k.shape[1]), dim=1), (q, k, v), strict=True):
        place.copy_(part)
    rotate_(out[:, : q.shape[1] + k.shape[1]], cos, sin, back=back)
    return out
