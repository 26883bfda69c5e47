"""The memory policy: what of a forward pass is kept, and where, decided from sizes and free memory."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from minitune.config import MemoryPolicy, ModelConfig

SHARE, OWN_SHARE = 0.6, 0.85
"""Share of the free memory that a step may fill before `auto` turns to the next cheaper policy; of a GPU, which is one
program's, where little is trained (adapters), so that gradients and moments are small."""
PROCESSORS = 132
"""Of an H100, by which FlashAttention's deterministic backward splits its sums."""


def kept_bytes(config: ModelConfig, tokens: int, policy: MemoryPolicy, element_size: int) -> int:
    """Bytes that all layers keep between forward and backward for `tokens` tokens; S and 1/rms are left out (< 1 %)."""
    heads, kv_heads, d = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim, config.d_model
    pointwise = 2 * d + 2 * heads + 2 * kv_heads + 2 * config.d_ff    # x of both halves; q, k, v, attended; gate, up
    if config.qk_norm:
        pointwise += heads + kv_heads                           # q and k before their norms
    keep = pointwise + 2 * d + config.d_ff                      # both norms' outputs, SwiGLU's product
    values = {"offload": 0, "full": d, "pointwise": pointwise, "keep": keep}[policy]
    return values * config.n_layers * tokens * element_size


def at_work_bytes(config: ModelConfig, tokens: int, dtype: torch.dtype, device: torch.device) -> int:
    """About what one layer's backward takes beside what was kept: a layer's own tensors once more, and attention's sums
    and operands: on a GPU dq in fp32, as often as FlashAttention splits one document's keys; on a CPU what each thread
    lays out of a document in tiles (seven operands of 16 bits, three sums of 32)."""
    layer = kept_bytes(config, tokens, "keep", dtype.itemsize) // config.n_layers
    if device.type == "cuda":
        return layer + -(-PROCESSORS // config.n_heads) * tokens * config.n_heads * config.head_dim * 4
    return layer + min(torch.get_num_threads(), config.n_kv_heads) * tokens * config.head_dim * (7 * 2 + 3 * 4)


class Trained(NamedTuple):
    """How many values are trained, adapters' or the base's; of the base, how many are copied into the compute dtype for
    use in all layers, and in the one with the most of them; how many gradients such a layer has; the largest weight
    outside of the layers, twice where that is embedding and head: both gradients wait for their sum; and how many
    gradients there is no memory taken for yet, since only the backward makes them."""

    values: int = 0
    copied: int = 0
    layer_copied: int = 0
    layer_gradients: int = 0
    outside: int = 0
    to_come: int = 0

    def kept_bytes(self, policy: MemoryPolicy, element_size: int) -> int:
        """Bytes of copies that lie between forward and backward."""
        return self.copied * element_size if policy in ("keep", "pointwise") else 0

    def at_work_bytes(self, element_size: int) -> int:
        """Bytes that the backward takes at a time, of a layer or outside: copies, products, and gradients in fp32."""
        layer = self.layer_copied * element_size + self.layer_gradients * (element_size + 4)
        return max(layer, self.outside * (element_size + 4))


ADAPTERS = Trained()
"""As if nothing were trained: what adapters need beside their values is not worth counting."""

STATE_BYTES, SMALL_SHARE = 12, 0.05
"""Bytes of a trained value's gradient and AdamW's moments, which may be still to come; and the share of a GPU's free
memory up to which OWN_SHARE leaves room for them."""

COMPOSED = 3
"""A half under plain autograd keeps about so many times what the hand-written one does."""


def step_bytes(config: ModelConfig, tokens: int, policy: MemoryPolicy, dtype: torch.dtype, device: torch.device,
               composed: bool = False, trained: Trained = ADAPTERS) -> tuple[int, int]:
    """(bytes that lie between forward and backward; about those that the backward takes beside them at a time)."""
    kept = kept_bytes(config, tokens, policy, dtype.itemsize) * (COMPOSED if composed and policy == "keep" else 1)
    work = at_work_bytes(config, tokens, dtype, device) + trained.at_work_bytes(dtype.itemsize)
    return kept + trained.kept_bytes(policy, dtype.itemsize), work


def free_bytes(device: torch.device) -> int:
    """Memory that a forward pass may still take on `device`; without end where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if not hasattr(os, "sysconf"):
        return sys.maxsize
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():       # a container's own limit
        stat = dict(line.split() for line in (limit.parent / "memory.stat").read_text().splitlines())
        cached = int(stat.get("inactive_file", 0))      # files' pages, which the kernel gives back when asked
        free = min(free, int(limit.read_text()) - int(used.read_text()) + cached)
    return free


def pinned_bytes(n_bytes: int) -> int:
    """What a pinned buffer takes of the host's memory: torch's allocator rounds up to a power of two."""
    return 1 << max(0, n_bytes - 1).bit_length()


def reuse_freed_memory() -> None:
    """Tell glibc's malloc to keep freed memory for the next tensor instead of handing it back to the kernel.

    A training step on a CPU frees and takes the same large tensors over and over, and fresh pages for them cost time.
    It holds for the whole process from here on. Where malloc is another one, nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mmap_threshold, trim_threshold = -3, -1     # the numbers of malloc.h
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)


def policies(device: torch.device, composed: bool) -> tuple[MemoryPolicy, ...]:
    """Those that "auto" takes, the fastest first. With ``composed`` the layers run under plain autograd, which knows
    "keep" and "full" alone. The results are the same bit for bit."""
    if composed:
        return ("keep", "full")
    return ("keep", "pointwise", "full", *(("offload",) if device.type == "cuda" else ()))


def choose_policy(config: ModelConfig, tokens: int, memory: MemoryPolicy, dtype: torch.dtype, device: torch.device,
                  composed: bool = False, trained: Trained = ADAPTERS, fastest: MemoryPolicy = "keep") -> MemoryPolicy:
    """`memory` itself, or for "auto" the first of `policies`, from `fastest` on, whose kept bytes fit."""
    if memory != "auto":
        return memory
    known = policies(device, composed)
    free = free_bytes(device)
    own = device.type == "cuda" and not composed and trained.values * STATE_BYTES <= SMALL_SHARE * free
    room = free * (OWN_SHARE if own else SHARE) - 4 * trained.to_come
    for policy in known[known.index(fastest):]:
        kept, work = step_bytes(config, tokens, policy, dtype, device, composed, trained)
        if policy != "offload" and kept + work <= room:
            return policy
    parked = config.n_layers * pinned_bytes(kept_bytes(config, tokens, "full", dtype.itemsize) // config.n_layers)
    parks = "offload" in known and parked <= free_bytes(torch.device("cpu")) * SHARE
    return "offload" if parks else "full"
