"""GraphedStep: forward and backward of a micro-batch recorded as one CUDA graph, and replayed for each that follows.

A graph runs the same kernels over the same memory, so the host has next to nothing to do in a step. All that differs
from batch to batch has to be a tensor of fixed size: `padded` fills up the number of documents and of trained
positions. The optimizer stays outside, in few launches; so learning rate and clipping are free in each step.

No GPU has seen this file yet: tests/test_gpu_graph.py is its test there; tests/kernels/test_graph.py runs all but the
recording.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minitune.arguments import short
from minitune.data.batch import Batch
from minitune.errors import InputError
from minitune.ops import attention
from minitune.ops.documents import Documents
from minitune.ops.transfer import sent
from minitune.training.optimizers import FlatOptimizer
from minitune.training.step import Objective, StepResult, checked, own_loss, update

DEVICE = "cuda"
WARM_UPS = 3
"""Passes before the recording: they compile kernels, and make what is made once."""
TENSORS = ("tokens", "labels", "cu_seqlens", "positions", "trained", "weights")


def padded(batch: Batch, n_documents: int, n_trained: int) -> Batch:
    """A batch of the host with so many documents and trained positions; losses and gradients stay what they are.

    What is added: documents without a token behind the last one, and the row's last position, which is never a target,
    as a trained one with weight 0. ``n_trained`` of the result is the true number still. InputError where the batch
    has more of either, or lies on a device.
    """
    if batch.tokens.device.type != "cpu":
        raise InputError(f"padded: the batch lies on {batch.tokens.device}; give one of the host, it is copied")
    for name, own, most in (("documents", len(batch.documents.lengths), n_documents),
                            ("trained positions", batch.n_trained, n_trained)):
        if own > most:
            raise InputError(f"padded: the batch has {own} {name}, the graph has room for {most}; record one with room "
                             "for more")
    last = batch.n_tokens - 1
    plain = torch.ones(last + 1, dtype=torch.float32) if batch.weights is None else batch.weights
    labels, weights = batch.labels.clone(), plain.clone()
    labels[last], weights[last] = 0, 0.0
    bounds, extra = batch.cu_seqlens, n_documents - len(batch.documents.lengths)
    bounds = torch.cat((bounds, bounds[-1:].expand(extra)))
    trained = torch.cat((batch.trained, torch.full((n_trained - batch.n_trained,), last)))
    return _with(batch, labels=labels, weights=weights, cu_seqlens=bounds, trained=trained,
                 documents=Documents(bounds, (*batch.documents.lengths, *[0] * extra), exact=False))


def _with(batch: Batch, **changed: Any) -> Batch:
    """A copy with other fields, which need not be those that a Batch derives by itself."""
    copy = object.__new__(Batch)
    for name in Batch.__dataclass_fields__:
        object.__setattr__(copy, name, changed.get(name, getattr(batch, name)))
    return copy


class GraphedStep:
    """`mt.train_step` for micro-batches of one size: the same gradients and updates, bit for bit, as that
    has on the same `padded` batches.

    example: a micro-batch of the host, of T tokens as all that follow. n_documents, n_trained: how many documents and
    trained positions one may have, at most. `objective` has to take what differs from batch to batch from the batch's
    tensors, as `model.loss_sum` does. As long as this is used the model must not be moved, nor its parameters replaced.

    Raises InputError where no graph can be recorded: not on a GPU, an optimizer of another kind, layers under plain
    autograd, "offload", dynamic RoPE, an attention that reads the documents' lengths on the host.
    """

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, example: Batch, objective: Objective = own_loss,
                 *, n_documents: int, n_trained: int):
        if hasattr(objective, "n_losses"):
            raise InputError("GraphedStep: the objective counts its own losses (n_losses), and a graph divides by "
                             "trained tokens; take train_step")
        self.model, self.optimizer, self.objective = model, _checked(model, optimizer, example), objective
        self.sizes = example.n_tokens, n_documents, n_trained
        host = padded(example, n_documents, n_trained)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._batch = _with(host, **{name: sent(getattr(host, name), model.device) for name in TENSORS})
        self._factor = sent(torch.ones((), dtype=torch.float32), model.device)
        self._adapted = model.network.output.enabled
        self.optimizer.keep_gradients()
        self.optimizer.zero_grad()
        before = [_version(p) for p in self._parameters]
        try:
            self._replay, self._loss_sum = record(self._run, model.device)
        except BaseException:
            self.optimizer.keep_gradients(False)
            raise
        self._places = self._addresses()
        self._reached = [p for p, version in zip(self._parameters, before, strict=True) if _version(p) != version]
        optimizer.zero_grad()

    def __call__(self, micro_batches: Sequence[Batch], lr: float | None = None,
                 clip: float | None = 1.0) -> StepResult:
        """As `train_step`, of batches on the host."""
        micro_batches = checked("GraphedStep", micro_batches, lr, clip)
        network = self.model.network
        if network.needs_composed or network.output.enabled != self._adapted:
            raise InputError("GraphedStep: dropout, or the adapters, are switched otherwise than when the graph was "
                             "recorded; record a new one, or take train_step")
        n_step = sum(batch.n_trained for batch in micro_batches)
        if n_step == 0:
            raise InputError("GraphedStep: no token of this step is trained (all labels are -100); check the data")
        ready = [self._fitting(batch) for batch in micro_batches if batch.n_trained]
        self.optimizer.zero_grad()
        if self._addresses() != self._places:
            raise InputError("GraphedStep: a parameter or a gradient lies elsewhere than when the graph was recorded; "
                             "record a new one")
        factor = torch.ones((), dtype=torch.float32) / n_step
        self._factor.copy_(_pinned(factor, self._factor.device), non_blocking=True)
        total: Tensor | None = None
        for batch in ready:
            for name in TENSORS:
                value = _pinned(getattr(batch, name), self._factor.device)
                getattr(self._batch, name).copy_(value, non_blocking=True)
            self._replay()
            total = self._loss_sum.clone() if total is None else total + self._loss_sum
        assert total is not None
        # The replay wrote the gradients behind autograd's back.
        torch.autograd.graph.increment_version([p.grad for p in self._reached if p.grad is not None])
        loss = total / n_step
        norm = update(self.optimizer, lr, clip, loss)
        return StepResult(loss, norm, n_step, sum(batch.n_tokens for batch in micro_batches))

    def _addresses(self) -> list[int]:
        return [tensor.data_ptr() for p in self._parameters for tensor in (p, p.grad) if tensor is not None]

    def _fitting(self, batch: Batch) -> Batch:
        n_tokens, n_documents, n_trained = self.sizes
        if batch.n_tokens != n_tokens:
            raise InputError(f"GraphedStep: a batch has {batch.n_tokens:,} tokens; the graph is of {n_tokens:,}")
        if batch.highest_token >= self.model.config.vocab_size:
            raise InputError(f"GraphedStep: a batch holds token {batch.highest_token}; the model's go up to "
                             f"{self.model.config.vocab_size - 1}")
        return padded(batch, n_documents, n_trained)

    def _run(self) -> Tensor:
        """Loss and gradients of what lies in the batch's memory; the sum of the losses."""
        # To the host it is one document as long as the row: no number of the first batch may stay in the graph. The
        # object is a new one each time, for it remembers what it has computed from its tensors.
        n_tokens, n_documents, _ = self.sizes
        documents = Documents(self._batch.cu_seqlens, (n_tokens, *[0] * (n_documents - 1)), exact=False)
        loss_sum, _ = self.objective(self.model, _with(self._batch, documents=documents))
        (loss_sum * self._factor).backward()
        return loss_sum.detach().float()


def record(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """(what does again all that `run` did on the device, the memory of its result)."""
    stream = torch.cuda.Stream(device)      # of its own, for the warm-up too
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = run()
    return graph.replay, result


def _checked(model: Any, optimizer: torch.optim.Optimizer, example: Batch) -> FlatOptimizer:
    """The optimizer, if a graph can be recorded; else InputError says why not."""
    if not hasattr(model, "network") or not isinstance(example, Batch):
        raise InputError(f"GraphedStep: model is {short(model)}, example {short(example)}; give what mt.load returns, "
                         "and an mt.Batch")
    network, reason = model.network, None
    q, k = (torch.empty(1, heads, model.config.head_dim, dtype=network.dtype, device=model.device)
            for heads in (model.config.n_heads, model.config.n_kv_heads))
    if model.device.type != DEVICE:
        reason = f"the model is on {model.device}; load it with device=\"cuda\", or take train_step"
    elif not isinstance(optimizer, FlatOptimizer):
        reason = f"the optimizer is {type(optimizer).__name__}, whose gradients move; take mt.AdamW or mt.SGD"
    elif network.needs_composed:
        reason = "dropout and DoRA take plain autograd, which is not recorded; take train_step"
    elif network.output.is_adapted:
        reason = "an adapter on lm_head, or trained token rows, take plain autograd, which is not recorded"
    elif network.memory not in ("keep", "pointwise", "full"):
        reason = (f"memory is {network.memory!r}, which a graph cannot decide or do; load the model with "
                  'memory="keep", "pointwise" or "full"')
    elif model.config.rope.kind == "dynamic":
        reason = "dynamic RoPE depends on each document's length, which the host has to know; take train_step"
    elif any(attention.reads_lengths(q, k, example.n_tokens, window) for window in set(model.config.windows)):
        reason = ("attention takes each document by itself here, by lengths that the host has to know; take bfloat16 "
                  "and heads of at most 256, or train_step")
    if reason is not None or not isinstance(optimizer, FlatOptimizer):
        raise InputError(f"GraphedStep: {reason}")
    return optimizer


def _version(parameter: Tensor) -> int:
    return -1 if parameter.grad is None else parameter.grad._version


def _pinned(value: Tensor, device: torch.device) -> Tensor:
    return value.pin_memory() if device.type == "cuda" else value


__all__ = ["GraphedStep", "padded"]
